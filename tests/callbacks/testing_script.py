"""Run by test_evaluation_at_test.py in two processes: tests, and writes what each found to ``<out>.<rank>``."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))
from foreign.data import image_columns, loader  # noqa: E402
from foreign.runs import make_trainer  # noqa: E402
from test_evaluation_at_test import ATTACKS, THREAT, Trained  # noqa: E402

from robust_train import RobustEvaluation  # noqa: E402


def main(out: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    callback = RobustEvaluation(ATTACKS, THREAT)
    trainer = make_trainer(pl.Trainer, callback, strategy=DDPStrategy(process_group_backend="gloo"), devices=2)
    (logged,) = trainer.test(Trained(), loader(*image_columns(60, seed=1)), verbose=False)
    assert callback.evaluation is not None
    found = {**callback.evaluation.as_dict(), "logged": logged["test/robust_acc"]}
    Path(f"{out}.{trainer.global_rank}").write_text(json.dumps(found), encoding="utf-8")
    # Lightning leaves gloo's running, whose threads may outlive the interpreter
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])

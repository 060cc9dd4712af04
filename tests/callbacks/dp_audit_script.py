"""Run by test_dp_audit.py: audits DP-SGD in two processes, with a frozen model or with canaries in a run."""

from __future__ import annotations

import json
import os
import sys
import warnings
from functools import partial
from pathlib import Path

import pytorch_lightning as pl
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
import planted_faults  # noqa: E402
from foreign.runs import make_trainer  # noqa: E402
from test_privacy_audit import Net, loader, private  # noqa: E402

from robust_train import DPSGD, PrivacyAudit  # noqa: E402
from robust_train.callbacks.dp_audit import audit_dp_sgd  # noqa: E402


def main(kind: str, fault: str) -> None:
    make, settings = getattr(planted_faults, fault, DPSGD), {"strategy": "ddp", "devices": 2}
    if kind == "frozen":
        found = audit_dp_sgd(partial(make, engine="book_keeping"), canaries=256, steps=20, trainer=settings).to_dict()
    else:
        audit = PrivacyAudit(canaries=300)
        make_trainer(pl.Trainer, audit, private(make), max_epochs=10, **settings).fit(Net(), loader())
        assert audit.result is not None
        found = audit.result
    Path(f"found.{os.environ['LOCAL_RANK']}").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main(*sys.argv[1:])

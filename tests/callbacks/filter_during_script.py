"""Run by test_filter_during.py in two processes: what each kept and trained on last, to ``<out>.<rank>``."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
from filter_kit import Net, flipped, loader, table  # noqa: E402

from robust_train import DataFilter, Probe  # noqa: E402

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    pl.seed_everything(0)
    data, _ = flipped(table(), 0.15)
    data_filter = DataFilter(when="during", probe=Probe(canaries=0.1), warmup_epochs=3)
    trainer = pl.Trainer(
        max_epochs=5,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        callbacks=[data_filter],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    module = Net()
    trainer.fit(module, loader(data))
    found = {"kept": data_filter.kept.tolist(), "last": module.seen[-1]}
    Path(f"{sys.argv[1]}.{trainer.global_rank}").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()

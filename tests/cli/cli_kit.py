"""The command line, run in this process on few batches of the embedded digits."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from robust_train import cli
from robust_train.config import recipe_names

RECIPES = recipe_names()
SMALL = (
    "model.network.channels=4",
    "trainer.enable_progress_bar=false",
    "judge.attacks.pgd.steps=2",
    "judge.curve=[1.0]",
)
TEXT = ("data=python_docs", "model=text_classifier")
NEEDS = {"embedding_pgd_at": TEXT, "freelb": TEXT}  # recipes that are for other data than digits
# one epoch of a few batches, judged by one weak attack on one batch
QUICK = (
    *SMALL[:3],
    "judge.curve=[]",
    "judge.attacks.apgd=null",
    "judge.limit_batches=1",
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=2",
    "trainer.limit_val_batches=1",
    "trainer.log_every_n_steps=1",
)


def command(monkeypatch: Any, folder: Path, *arguments: str) -> None:
    """``robust-train arguments`` in the working directory ``folder``."""
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["robust-train", *arguments])
    try:
        cli.main()
    finally:
        torch.use_deterministic_algorithms(False)  # the Trainer sets it for the whole process


def run(monkeypatch: Any, folder: Path, *arguments: str) -> Path:
    """The same with its results in ``folder/out``, which is returned."""
    command(monkeypatch, folder, *arguments, f"hydra.run.dir={folder / 'out'}")
    return folder / "out"


def result(folder: Path) -> dict[str, Any]:
    """What a run left."""
    return json.loads((folder / "result.json").read_text())

"""``robust-train audit ckpt=…``: how well a checkpoint's training rows can be told from others."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from robust_train.cli.checks import check_kind, check_settings
from robust_train.cli.compose import launch, typed_overrides
from robust_train.cli.evaluate import told
from robust_train.cli.train import keep_what_was_asked
from robust_train.config import ConfigError, build

# of the Trainer, what changes how reference models learn
OF_TRAINING = ("accelerator", "precision", "gradient_clip_val", "accumulate_grad_batches")


def audit(argv: list[str]) -> None:
    """The command. What the checkpoint's own run was told of model, data and task is taken from its folder."""
    words = [word for word in told(argv) if not word.lstrip("+~").startswith("threat")]
    launch("audit", run, [*words, *argv])


def run(cfg: DictConfig, folder: Path) -> float:
    """Audit a checkpoint, write ``audit.json`` and ``most_exposed.csv`` into the folder, and print the table.

    Returns:
        The area under the ROC curve of the strongest attack.

    Raises:
        ConfigError: there is no such checkpoint, it is of another model, or a setting is out of range.
    """
    import pytorch_lightning as pl

    from robust_train import MembershipAudit
    from robust_train.callbacks._membership import AUDIT_FILE, EXPOSED_FILE
    from robust_train.cli.judge import load_weights, quiet

    if OmegaConf.is_missing(cfg, "ckpt") or cfg.ckpt is None:
        raise ConfigError("ckpt: missing; name the checkpoint to audit: robust-train audit ckpt=FILE")
    keep_what_was_asked(cfg, typed_overrides())
    check_settings(cfg, nodes=("model", "data", "trainer", "audit"))
    allow = list(cfg.allow)
    callback = build({"audit": OmegaConf.to_container(cfg.audit, resolve=True)}, allow=allow)["audit"]
    if not isinstance(callback, MembershipAudit):
        raise ConfigError(f"audit._target_: must name a robust_train MembershipAudit, got {callback!r:.80}")
    if callback.cache is not None:
        callback.cache = hydra.utils.to_absolute_path(callback.cache)
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    model, data = build(cfg.model, allow=allow), build(cfg.data, allow=allow)
    check_kind("model", model, "LightningModule")
    check_kind("data", data, "LightningDataModule")
    callback.begin_from(model)
    path = Path(hydra.utils.to_absolute_path(str(cfg.ckpt)))
    load_weights(model, path)
    if callback.epochs is None:
        callback.epochs = _epochs(path) or cfg.trainer.max_epochs
    settings: dict[str, Any] = {key: cfg.trainer[key] for key in OF_TRAINING if key in cfg.trainer}
    with warnings.catch_warnings(), quiet():
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        trainer = pl.Trainer(
            **settings,
            max_epochs=0,  # nothing is trained but the references
            devices=1,
            callbacks=[callback],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            default_root_dir=folder,
        )
        trainer.fit(model, data)
    exposed = f", {EXPOSED_FILE} (for your eyes only)" if callback.exposed else ""
    print(f"\nIn {folder}: {AUDIT_FILE}{exposed}.")
    return float(trainer.callback_metrics["audit/auc"])


def _epochs(path: Path) -> int | None:
    """How long a checkpoint was trained, if it says so."""
    import torch

    content = torch.load(path, map_location="cpu", weights_only=True)
    last = content.get("epoch") if isinstance(content, dict) else None
    return last + 1 if isinstance(last, int) and last >= 0 else None

"""Around a private run: its folder, what a crash of it lost, and what is said of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from robust_train.callbacks._callback import call_text
from robust_train.privacy.ledger import Ledger
from robust_train.privacy.plan import PrivacyPlan


def run_folder(trainer: Any) -> Path | None:
    """The run's folder, asked for on every process; None where nothing of a run is kept."""
    folder = trainer.log_dir
    return None if trainer.fast_dev_run or folder is None else Path(folder)


def beside_checkpoints(trainer: Any) -> Path | None:
    """Where the first checkpoint callback writes, if one does."""
    folders = [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]
    return next((Path(folder) for folder in folders if folder), None)


def recover_history(trainer: Any, ledger: Ledger, lost_steps: int | None) -> int:
    """Count the steps that a crash lost; every process learns what the first one reads.

    Returns:
        How many there were.

    Raises:
        ValueError: as ``Ledger.recover``, on every process.
    """
    folders = [Path(trainer.ckpt_path).parent, Path(trainer.ckpt_path).parent.parent] if trainer.ckpt_path else []
    found: Any = None
    if trainer.is_global_zero:
        try:
            found = ledger.recover(folders, lost_steps), ledger.history
        except ValueError as error:
            found = str(error)
    found = trainer.strategy.broadcast(found)
    if isinstance(found, str):
        raise ValueError(found)
    lost, ledger.history = found
    return lost


def plan_text(dp_sgd: Any, plan: PrivacyPlan, micro_batches: int) -> str:
    """What is about to be done, in a line."""
    budget = "no budget" if dp_sgd.target_epsilon is None else f"epsilon <= {dp_sgd.target_epsilon:g}"
    return (
        f"active. {budget} at delta {plan.delta:.3g} ({plan.accountant}); noise multiplier "
        f"{plan.noise_multiplier:.4g}, clipping norm {plan.max_grad_norm:g} ({call_text(dp_sgd.clipping)}), sample "
        f"rate {plan.sample_rate:.4g}: {plan.expected_batch_size:.4g} of {plan.dataset_size} examples a step on "
        f"average, in {micro_batches} micro-batch(es)."
    )


def assumptions(dp_sgd: Any, processes: int) -> tuple[str, ...]:
    """What the certificate rests on besides what every one does."""
    found = {
        "The number of examples was read from the train loader, and is taken as public.": dp_sgd.dataset_size is None,
        "The sample rate follows from the loader's batch size, and is taken as public.": dp_sgd.sample_rate is None,
        f"A journal was lost, after which at most {dp_sgd.lost_steps} steps were made.": dp_sgd.lost_steps is not None,
        f"Each of {processes} processes sampled a share of the examples of its own.": processes > 1,
    }
    return tuple(assumption for assumption, holds in found.items() if holds)


def reasons_void(dp_sgd: Any) -> tuple[str, ...]:
    """Why there is no guarantee, as far as the settings say."""
    reasons = {
        "unsafe_seed makes the noise reproducible": dp_sgd.unsafe_seed is not None,
        "no noise is added": dp_sgd.noise_multiplier == 0,
        "the training step was not checked (preflight=False)": not dp_sgd.preflight,
    }
    return tuple(reason for reason, holds in reasons.items() if holds)

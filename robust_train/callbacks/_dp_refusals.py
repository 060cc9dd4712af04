"""What DP-SGD cannot be combined with, each with the reason and the way out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch.nn.modules.batchnorm import _BatchNorm

from robust_train.privacy.accounting import ACCOUNTANTS

if TYPE_CHECKING:
    import pytorch_lightning as pl

# by name: there is one in each Lightning package
STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy")
MOST_EPSILON = 1000  # whoever asks for more has mistaken something: it promises nothing
NOT_NULL = ("max_grad_norm", "noise_schedule", "accountant", "engine", "augmentation_multiplicity")
CALLBACKS = {
    "GradientAccumulationScheduler": "it changes how many batches make a step, and with it the sample rate; use "
    "Trainer(accumulate_grad_batches=…)",
    "LearningRateFinder": "it trains on the data without noise; choose lr on public data, or by whole runs",
    "BatchSizeFinder": "it trains on the data without noise; set physical_batch_size",
}


def refuse_what_cannot_work(trainer: pl.Trainer, module: pl.LightningModule, callback: Any) -> None:
    """Before anything is trained.

    Raises:
        ValueError: a setting cannot be combined with DPSGD; the message names it and the way out.
    """
    for reason in _reasons(trainer, module, callback):
        raise ValueError(f"DPSGD cannot work with {reason}.")


def _reasons(trainer: Any, module: Any, callback: Any) -> Iterator[str]:
    if sum(isinstance(c, type(callback)) for c in trainer.callbacks) > 1:
        yield "a second DPSGD in the same Trainer: the gradients would get noise twice; keep one"
    if not module.automatic_optimization:
        yield (
            "manual optimization (automatic_optimization=False): the step calls backward and the optimizer itself, so "
            "nothing says which examples a step was made of. Return the loss from training_step, and leave "
            "automatic_optimization on"
        )
    if str(trainer.precision).startswith("16"):
        yield (
            f"precision={str(trainer.precision)!r}: loss scaling changes every example's gradient norm, and fp16 "
            "overflows. Use bf16-mixed or 32"
        )
    if trainer.overfit_batches:
        yield "overfit_batches: it fixes which examples are seen. Use limit_train_batches"
    if trainer.reload_dataloaders_every_n_epochs:
        yield "reload_dataloaders_every_n_epochs: the accounting is of one dataset. Set it to 0"
    kinds = {cls.__name__ for cls in type(trainer.strategy).__mro__}
    if not kinds & {*STRATEGIES} or "DeepSpeedStrategy" in kinds:
        yield (
            f"strategy {type(trainer.strategy).__name__}: gradients of single examples need whole layers on every "
            "process. Use one device, or ddp"
        )
    for other in trainer.callbacks:
        for name, reason in CALLBACKS.items():
            if any(cls.__name__ == name for cls in type(other).__mro__):
                yield f"{name}: {reason}"
    # Only the plain case: what mixes examples by other means, or is built later, the preflight checks find
    for name, layer in module.named_modules():
        if isinstance(layer, _BatchNorm) and layer.training:
            yield (
                f"{type(layer).__name__} {name!r}: it mixes the examples of a batch, so that one person moves all "
                "others' gradients. Set fix_modules=true, which puts GroupNorm in its place, or freeze it in eval mode"
            )


def check_settings(dp_sgd: Any, engines: Sequence[str]) -> None:
    """What DPSGD was given.

    Raises:
        ValueError: a setting is out of range, or contradicts another.
    """
    if dp_sgd.target_epsilon is None and dp_sgd.noise_multiplier is None:
        raise ValueError("dp_sgd needs target_epsilon (a budget) or noise_multiplier (a noise level), or both")
    for name, ok, wanted in (
        ("target_epsilon", lambda v: _positive(v) and v <= MOST_EPSILON, f"a number > 0 and <= {MOST_EPSILON}"),
        ("noise_multiplier", lambda v: _finite(v) and v >= 0, "a number >= 0"),
        ("target_delta", lambda v: _finite(v) and 0 < v < 1, "a number in (0, 1)"),
        ("max_grad_norm", lambda v: _number(v) and v > 0, "a number > 0"),
        ("physical_batch_size", _count, "a whole number >= 1"),
        ("dataset_size", _count, "a whole number >= 1"),
        ("sample_rate", lambda v: _finite(v) and 1e-9 <= v <= 1, "a number from 1e-9 to 1"),
        ("augmentation_multiplicity", _count, "a whole number >= 1"),
        ("lost_steps", lambda v: v is not False and (v == 0 or _count(v)), "a whole number >= 0"),
        ("unsafe_seed", lambda v: v is not False and (v == 0 or _count(v)), "a whole number >= 0"),
        ("noise_schedule", lambda v: len(v) > 0 and all(map(_positive, v)), "numbers > 0, at least one"),
        ("accountant", tuple(ACCOUNTANTS).__contains__, f"one of {', '.join(ACCOUNTANTS)}"),
        ("engine", engines.__contains__, f"one of {', '.join(engines)}"),
    ):
        value = getattr(dp_sgd, name)
        if not ok(value) if value is not None or name in NOT_NULL else False:
            raise ValueError(f"dp_sgd.{name} must be {wanted}, got {value!r}")
    if dp_sgd.max_grad_norm == math.inf and dp_sgd.noise_multiplier != 0:
        raise ValueError("dp_sgd.max_grad_norm=inf bounds no example, so no noise hides it: use a finite norm")
    if dp_sgd.noise_multiplier == 0 and dp_sgd.target_epsilon is not None:
        raise ValueError("dp_sgd.noise_multiplier=0 has no finite epsilon: leave out target_epsilon, or add noise")
    rows, views = dp_sgd.physical_batch_size, dp_sgd.augmentation_multiplicity
    if rows is not None and rows < views:
        raise ValueError(
            f"dp_sgd.physical_batch_size={rows} holds no example: each has augmentation_multiplicity={views} rows"
        )


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)


def _finite(value: Any) -> bool:
    return _number(value) and math.isfinite(value)


def _positive(value: Any) -> bool:
    return _finite(value) and value > 0


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**63

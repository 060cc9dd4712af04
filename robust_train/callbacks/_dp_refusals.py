"""What DP-SGD cannot be combined with, each with the reason and the way out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch.nn.modules.batchnorm import _BatchNorm

if TYPE_CHECKING:
    import pytorch_lightning as pl

# by name: there is one in each Lightning package
STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy")
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

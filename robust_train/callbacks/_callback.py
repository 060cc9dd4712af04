"""The base class of our callbacks, and what they all tell the user."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, fields, is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import pytorch_lightning as pl
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import nn

if TYPE_CHECKING:
    _Base = pl.Callback
else:
    try:
        from lightning.pytorch import Callback as _Unified
    except ModuleNotFoundError:
        _Base = pl.Callback
    else:

        class _Base(_Unified, pl.Callback):
            """Accepted by ``lightning.pytorch`` and by ``pytorch_lightning`` alike."""


class Callback(_Base):
    """A callback whose settings reach the log, the user's logger and the checkpoint.

    Attributes:
        defends: it changes what is trained; an undefended twin of the run goes without it.
        at_test: it belongs to the trained model, or measures it: whoever judges the model afterwards needs it beside.
    """

    defends: ClassVar[bool] = False
    at_test: ClassVar[bool] = False

    def settings(self) -> dict[str, Any]:
        """What was asked for, as plain builtins."""
        return {}

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        # not in state_dict(): there Lightning refuses a second callback of a class before our own, better message
        checkpoint["callbacks"][self.state_key] = self.state()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as plain builtins; ``load_state_dict`` receives it."""
        return {"settings": self.settings()}

    @contextmanager
    def serving(self, module: Any) -> Iterator[None]:
        """Inside, the trained module may be called outside of a Trainer, as it is meant to be used."""
        yield

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Forward and backward passes inside are extra ones, that this callback must not take for training's."""
        yield

    def announce(self, trainer: pl.Trainer, text: str) -> None:
        """Say what is active, once, and record the settings with the user's loggers."""
        rank_zero_info(f"{type(self).__name__}: {text}")
        for logger in trainer.loggers:
            logger.log_hyperparams({f"robust_train/{type(self).__name__}": self.settings()})


def plain(value: Any) -> Any:
    """Settings as plain builtins: dataclasses become dicts with their class's name under ``"class"``."""
    if is_dataclass(value) and not isinstance(value, type):
        return {"class": type(value).__name__, **{f.name: plain(getattr(value, f.name)) for f in fields(value)}}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(v) for v in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else repr(value)


def call_text(settings: Any) -> str:
    """``PGD(steps=10)``: a dataclass with the settings that differ from its defaults, and its first one."""
    shown: dict[str, Any] = {}
    for i, f in enumerate(fields(settings) if is_dataclass(settings) else ()):
        value = plain(getattr(settings, f.name))
        if i == 0 or value != plain(f.default if f.default_factory is MISSING else f.default_factory()):
            shown[f.name] = value
    return f"{type(settings).__name__}({', '.join(f'{k}={v}' for k, v in shown.items())})"


def place_text(path: tuple[str | int, ...]) -> str:
    """Where something lies in a batch: ``['image'][0]``."""
    return "itself" if not path else "".join(f"[{key!r}]" for key in path)


def submodule(module: nn.Module, name: str, setting: str = "logits") -> nn.Module:
    """The submodule that the user named, as the source of the logits or of what ``setting`` says.

    Raises:
        ValueError: there is none; the message lists the module's children.
    """
    try:
        return module.get_submodule(name)
    except AttributeError:
        known = ", ".join(child for child, _ in module.named_children()) or "none"
        raise ValueError(
            f"{setting}={name!r} is no submodule of {type(module).__name__}; its children are: {known}"
        ) from None

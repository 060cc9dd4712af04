"""Training under Gaussian noise, as randomized smoothing needs it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from robust_train.callbacks import _seams
from robust_train.callbacks._batch import find_input, get, replaced, write_back
from robust_train.callbacks._callback import Callback, place_text, plain
from robust_train.callbacks._checks import check_counts, check_places
from robust_train.callbacks._step import batch_and_call
from robust_train.evasion.certified.smoothing import gaussian_noise
from robust_train.evasion.randomness import generator_for
from robust_train.evasion.threat import Threat, parse_number

if TYPE_CHECKING:
    import pytorch_lightning as pl

OTHERS = ("AdversarialTraining", "CertifiedTraining")


class GaussianAugmentation(Callback):
    """Adds noise to the inputs of every training step; module, data and Trainer stay as they are.

    What it defends is the smoothed model of ``Smoothing`` and ``robust-train certify``, not the module itself.

    Args:
        sigma: standard deviation in pixels, > 0; a number or ``"1/4"``. Certify with the same.
        threat: says how inputs were normalised; None: they are pixels.
        inputs: see ``AdversarialTraining``.
        seed: of the noise; None: the run's (``seed_everything``).

    Raises:
        ValueError: a setting is out of range; in ``setup``: a callback that it cannot stand beside.
        TypeError: ``threat`` is of another kind, or with the first batch: inputs that are not floating point.

    Guarantees:
        The same seed gives the same noise, also in a run that is resumed. The batch is never written to.

    Reference:
        Cohen et al., "Certified Adversarial Robustness via Randomized Smoothing", 2019, section 3.3.
    """

    defends = True

    def __init__(
        self,
        sigma: float | str = 0.25,
        threat: Threat | None = None,
        inputs: str | int | None = None,
        seed: int | None = None,
    ) -> None:
        self.sigma = parse_number("gaussian_augmentation.sigma", sigma)
        if not 0 < self.sigma < math.inf:
            raise ValueError(f"gaussian_augmentation.sigma must be > 0 and finite, got {sigma!r}")
        if threat is not None and not isinstance(threat, Threat):
            raise TypeError(f"gaussian_augmentation.threat must be a robust_train Threat, got {threat!r}")
        check_places("gaussian_augmentation", inputs=inputs)
        check_counts("gaussian_augmentation", 0, seed=0 if seed is None else seed)
        self.threat, self.inputs, self.seed = threat, inputs, seed
        self._unwrap: Callable[[], None] | None = None
        self._seed, self._batch_idx, self._looked = seed, 0, False

    def settings(self) -> dict[str, Any]:
        return {name: plain(getattr(self, name)) for name in ("sigma", "threat", "inputs", "seed")}

    def state(self) -> dict[str, Any]:
        return {"seed": self._seed, "settings": self.settings()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.seed is None:
            self._seed = state_dict["seed"]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit" or self._unwrap is not None:
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if name := next((kind.__name__ for kind in type(callback).__mro__ if kind.__name__ in OTHERS), None):
                raise ValueError(
                    f"GaussianAugmentation and {name} in one Trainer would change the same inputs: keep one of them"
                )
        if _seams.takes_iterator(pl_module):
            raise ValueError("GaussianAugmentation needs training_step(self, batch, batch_idx), not a dataloader_iter")
        self._seed, self._looked = torch.initial_seed() if self.seed is None else self.seed, False
        self._unwrap = _seams.wrap_training_step(
            pl_module, lambda step, *args, **kwargs: self._step(trainer, step, args, kwargs)
        )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.announce(trainer, f"active. Noise of standard deviation {self.sigma:g} in every training step.")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batch_idx = batch_idx

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._remove()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._remove()

    def _remove(self) -> None:
        if self._unwrap is not None:
            self._unwrap()
        self._unwrap = None

    def _step(
        self, trainer: pl.Trainer, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        batch, call = batch_and_call(step, args, kwargs)
        path = find_input(batch, self.inputs)
        x, threat = get(batch, path), Threat() if self.threat is None else self.threat
        if not self._looked and (self.threat is not None or not x.is_floating_point()):
            threat.check_input(x, f"the batch's input {place_text(path)}")
        self._looked = True
        # a stream for each batch: an optimizer that asks for the loss again sees the same noise
        seed = (self._seed or 0, _seams.data_rank(trainer), trainer.current_epoch, self._batch_idx)
        noisy = gaussian_noise(x, self.sigma, threat, generator_for(x.device, "augmentation", *seed))
        sent = replaced(batch, path, noisy)
        try:
            return call(sent)
        finally:
            write_back(batch, sent, path, noisy)

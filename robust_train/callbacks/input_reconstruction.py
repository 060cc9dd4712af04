"""Input reconstruction in front of an unmodified LightningModule, always judged by attacks that know of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from robust_train.callbacks._batch import find_input, get
from robust_train.callbacks._callback import Callback, call_text, plain, submodule
from robust_train.callbacks._checks import check_counts, check_places, check_texts
from robust_train.callbacks._side_by_side import SideBySide
from robust_train.evasion.attacks._checks import is_number
from robust_train.evasion.attacks.base import Attack
from robust_train.evasion.attacks.pgd import PGD
from robust_train.evasion.gain import Gain
from robust_train.evasion.randomness import generator_for
from robust_train.evasion.reconstruction.adaptive import AdaptiveAttack, in_front
from robust_train.evasion.reconstruction.base import Reconstruction
from robust_train.evasion.threat import Threat

if TYPE_CHECKING:
    import pytorch_lightning as pl

WHEN = ("inference", "always")


class InputReconstruction(Callback):
    """Puts a reconstruction of the inputs before the module's forward pass, and measures what that is worth.

    Such defences have been broken again and again: what they gain against attacks that do not know of them says
    nothing (Athalye et al. 2018). So each validation and test logs three robust accuracies, ``undefended/robust_acc``,
    ``apparent/robust_acc`` and ``adaptive/robust_acc``, with ``apparent_gain`` and ``adaptive_gain``; and every
    ``RobustEvaluation`` in the Trainer attacks adaptively too, so that its worst case is not the apparent one. Only the
    adaptive numbers count.

    A reconstruction that learns (``DenoisingAutoencoder``) is fitted to the training batches while the module trains,
    with an Adam optimizer of its own; its weights are in the checkpoint, with this callback's state.

    Args:
        reconstruction: what stands in front.
        threat: what the attacker may do; also says how inputs were normalised.
        attack: the naive attack, of which the adaptive one is made (see ``AdaptiveAttack``); None: ``PGD(steps=50)``.
        samples: of EOT, where the reconstruction draws at random, >= 1.
        when: ``"inference"``: in validation, test and prediction; ``"always"``: in training too.
        module: name of the submodule whose inputs are reconstructed; None: the LightningModule's own forward pass.
        lr: learning rate of a reconstruction that learns, > 0.
        every_n_epochs: in ``fit``: measure in every n-th epoch, and in the last one.
        limit_batches: measure only on the first batches of each loader; None: all.
        inputs: see ``AdversarialTraining``.
        labels: see ``AdversarialTraining``.
        logits: see ``AdversarialTraining``.
        seed: of the noise that a reconstruction learns from.

    Raises:
        ValueError: a setting is out of range; in ``setup``: two of them, or several processes with one that learns;
            after the first batch: the step does not call the module.
        TypeError: a part is of another kind.

    Guarantees:
        No key of the module's weights changes, and after a fit or test the module is as before. With ``"inference"``
        and a reconstruction that draws nothing, training is what it is without the callback.

    Reference:
        Athalye et al., "Obfuscated Gradients Give a False Sense of Security", 2018.
    """

    defends = True
    at_test = True

    def __init__(
        self,
        reconstruction: Reconstruction,
        threat: Threat,
        attack: Attack | None = None,
        samples: int = 10,
        when: str = "inference",
        module: str | None = None,
        lr: float = 1e-3,
        every_n_epochs: int = 1,
        limit_batches: int | None = None,
        inputs: str | int | None = None,
        labels: str | int | None = None,
        logits: str | None = None,
        seed: int = 0,
    ) -> None:
        attack = PGD(steps=50) if attack is None else attack
        for name, value, kind in (
            ("reconstruction", reconstruction, Reconstruction),
            ("threat", threat, Threat),
            ("attack", attack, Attack),
        ):
            if not isinstance(value, kind):
                raise TypeError(f"input_reconstruction.{name} must be a robust_train {kind.__name__}, got {value!r}")
        if when not in WHEN:
            raise ValueError(f"input_reconstruction.when must be one of {', '.join(WHEN)}, got {when!r}")
        if not is_number(lr) or lr <= 0:
            raise ValueError(f"input_reconstruction.lr must be > 0 and finite, got {lr!r}")
        batches = 1 if limit_batches is None else limit_batches
        check_counts("input_reconstruction", 1, samples=samples, every_n_epochs=every_n_epochs, limit_batches=batches)
        check_counts("input_reconstruction", 0, seed=seed)
        check_places("input_reconstruction", inputs=inputs, labels=labels)
        check_texts("input_reconstruction", logits=logits, module=module)
        self.reconstruction, self.threat, self.attack, self.samples = reconstruction, threat, attack, samples
        self.when, self.module, self.lr, self.seed = when, module, lr, seed
        self.every_n_epochs, self.limit_batches = every_n_epochs, limit_batches
        self.inputs, self.labels, self.logits = inputs, labels, logits
        read = ("every_n_epochs", "limit_batches", "inputs", "labels", "logits")
        self._measuring = SideBySide(
            attack, self.adapt, self.without, threat, {name: getattr(self, name) for name in read}
        )
        self._installed = ExitStack()
        self._off, self._called, self._trainer = False, False, None
        self._optimizer: torch.optim.Optimizer | None = None
        self._learned: dict[str, Any] | None = None

    # --- the defence --------------------------------------------------------------------------------------------------

    def adapt(self, attack: Attack, averaged: bool = False) -> Attack:
        """The attack as one makes it who knows of the reconstruction.

        Args:
            attack: that does not know of it.
            averaged: somebody else averages over what the reconstruction draws.
        """
        return AdaptiveAttack(attack, self.reconstruction, 1 if averaged else self.samples)

    @contextmanager
    def without(self, module: Any) -> Iterator[None]:
        """Inside, inputs reach the module as they are."""
        before, self._off = self._off, True
        try:
            yield
        finally:
            self._off = before

    @contextmanager
    def serving(self, module: nn.Module) -> Iterator[None]:
        """Inside, the module may be called outside of a Trainer, with the reconstruction in front of it."""
        with in_front(self._target(module), self._reconstruct):
            yield

    @property
    def gain(self) -> Gain | None:
        """What the last validation or test found."""
        return self._measuring.gain

    def _target(self, module: nn.Module) -> nn.Module:
        return module if self.module is None else submodule(module, self.module, "module")

    def _reconstruct(self, x: Tensor) -> Tensor:
        training = self._trainer is not None and self._trainer.training
        self._called = True
        if self._off or (training and self.when == "inference"):
            return x
        self.reconstruction.to(x.device)
        pixels = self.threat.to_pixels(x)
        return self.threat.from_pixels(self.reconstruction(pixels.float()).to(pixels.dtype))

    # --- events -------------------------------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        names = ("threat", "attack", "samples", "when", "module", "lr", "every_n_epochs", "limit_batches")
        names += ("inputs", "labels", "logits", "seed")
        return {"reconstruction": repr(self.reconstruction), **{name: plain(getattr(self, name)) for name in names}}

    def state(self) -> dict[str, Any]:
        weights = {name: value.detach().cpu() for name, value in self.reconstruction.state_dict().items()}
        learned = None if self._optimizer is None else self._optimizer.state_dict()
        return {"settings": self.settings(), "weights": weights, "optimizer": learned}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.reconstruction.load_state_dict(state_dict["weights"])
        self._learned = state_dict["optimizer"]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if sum(isinstance(c, InputReconstruction) for c in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise ValueError("two InputReconstruction callbacks in one Trainer: put both steps into one Reconstruction")
        if self._learns and stage == "fit" and trainer.world_size > 1:
            raise ValueError(
                "InputReconstruction: a reconstruction that learns would differ from process to process: train it with "
                "one device"
            )
        self._installed.close()
        self._trainer, self._called = trainer, False
        self._installed.enter_context(self.serving(pl_module))
        self._measuring.adapt_others(trainer, getattr(stage, "value", stage))
        if stage in ("fit", "validate", "test"):
            self.announce(
                trainer,
                f"active at {'inference' if self.when == 'inference' else 'training and inference'}. "
                f"{self.reconstruction!r}, judged by "
                f"{call_text(self.attack)} made adaptive, within the {self.threat.describe()}.",
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._learns:
            self.reconstruction.to(pl_module.device)
            self._optimizer = torch.optim.Adam(self.reconstruction.parameters(), lr=self.lr)
            if self._learned is not None:
                self._optimizer.load_state_dict(self._learned)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._optimizer is None:
            return
        x = get(batch, find_input(batch, self.inputs)).detach()
        generator = generator_for(x.device, "denoising", self.seed, trainer.current_epoch, batch_idx)
        with torch.autocast(x.device.type, enabled=False):
            loss = self.reconstruction.learning_loss(self.threat.to_pixels(x).float(), generator)
        if loss is None:
            return
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        pl_module.log("train/reconstruction_loss", loss.detach())

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._measuring.start(trainer, pl_module, "validation")

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._measuring.start(trainer, pl_module, "test")

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._measuring.batch(trainer, pl_module, batch, (batch_idx, dataloader_idx), "validation")
        self._check_called(pl_module)

    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._measuring.batch(trainer, pl_module, batch, (batch_idx, dataloader_idx), "test")
        self._check_called(pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._measuring.end(trainer, pl_module, "validation")

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._measuring.end(trainer, pl_module, "test")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._remove()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._remove()

    def _remove(self) -> None:
        self._installed.close()
        self._measuring.restore_others()
        self._optimizer, self._trainer = None, None

    @property
    def _learns(self) -> bool:
        return any(p.requires_grad for p in self.reconstruction.parameters())

    def _check_called(self, module: nn.Module) -> None:
        if not self._called:
            name = "forward" if self.module is None else self.module
            known = ", ".join(child for child, _ in module.named_children()) or "none"
            raise ValueError(
                f"InputReconstruction stands before {name}, which the step does not call: name the submodule that "
                f'receives the inputs with module="…"; the module\'s children are: {known}'
            )

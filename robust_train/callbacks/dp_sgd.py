"""Differentially private training of an unmodified LightningModule."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from robust_train.callbacks import _seams
from robust_train.callbacks._callback import Callback, call_text, plain
from robust_train.callbacks._checks import check_switches
from robust_train.callbacks._dp_refusals import check_settings, refuse_what_cannot_work
from robust_train.callbacks._dp_run import (
    assumptions,
    beside_checkpoints,
    plan_text,
    reasons_void,
    recover_history,
    run_folder,
)
from robust_train.callbacks._poisson import PoissonLoader, poisson_loader
from robust_train.callbacks._probe import StepProbe, check_step
from robust_train.evasion.randomness import preserved_rng
from robust_train.privacy.certificate import Certificate
from robust_train.privacy.clipping.base import Clipping
from robust_train.privacy.clipping.flat import Flat
from robust_train.privacy.engines.base import Engine, RowsMismatch, UnsupportedLayer
from robust_train.privacy.engines.book_keeping import BookKeeping
from robust_train.privacy.engines.hooks import Hooks
from robust_train.privacy.entropy import Entropy
from robust_train.privacy.fix import fix_modules as exchange_layers
from robust_train.privacy.journal import Segment
from robust_train.privacy.ledger import Ledger
from robust_train.privacy.plan import default_delta
from robust_train.privacy.preflight import GuaranteeVoid

if TYPE_CHECKING:
    import pytorch_lightning as pl

ENGINES: dict[str, type[Engine]] = {"book_keeping": BookKeeping, "hooks": Hooks}  # the faster one first
POOL = 32  # samples that show the preflight checks what the data looks like
CERTIFICATE = "privacy_certificate.json"
NO_LOSS = (
    "DPSGD: the training step returned no loss for a batch. A step that skips a batch because of one example lets it "
    "decide over the others: return a loss for every batch"
)


class DPSGD(Callback):
    """Trains a model with differential privacy; the module, its data and its Trainer stay as they are.

    Every example enters a batch by a coin flip of its own (Poisson sampling), its gradient is clipped, and noise is
    added to the sum. The order of work for one step::

        train loader:                 Poisson batches, in place of shuffled ones, as k micro-batches
        on_train_batch_start:         record
        training_step, backward:      untouched
        on_after_backward:            clip each example's gradient, add to the sum; p.grad holds zeros
        … k times                     (Lightning's own gradient accumulation)
        on_before_optimizer_step:     journal; p.grad = (sum + noise) / expected batch size; account
        gradient_clip_val, optimizer: untouched; they see the private gradient only

    Args:
        target_epsilon: privacy budget of the whole run. The noise is calibrated to the run's number of steps, and the
            largest number of steps that stays within the budget is a hard stop.
        noise_multiplier: standard deviation of the noise, relative to ``max_grad_norm``. At least one of the two is
            needed; with both, the noise is as given and the budget stops the run.
        target_delta: None: ``dataset_size ** -1.1``.
        max_grad_norm: clipping norm of an example's gradient.
        physical_batch_size: rows that one process computes at a time; None: what the loader and
            ``accumulate_grad_batches`` say. It changes memory and speed, not the result.
        dataset_size: number of training examples, as the public knows it; None: read from the loader, and stated as an
            assumption in the certificate.
        sample_rate: probability of each example to enter a step; None: batch size / dataset size, where the batch is
            what all processes see in one optimizer step.
        accountant: ``"prv"``, ``"rdp"``, or ``"gdp"``, which is an approximation and no proof.
        engine: where per-example gradients come from: ``"book_keeping"`` (one backward pass), ``"hooks"`` (Opacus), or
            ``"auto"``: the first of the two that the preflight checks find exact for this model.
        clipping: ``Flat()``, ``Automatic()`` or ``PerLayer()``; None: ``Flat()``.
        noise_schedule: factors on the noise multiplier, each for an equal part of the planned steps:
            ``(1.2, 1.0, 0.8)``. Calibration and accounting take them into account.
        augmentation_multiplicity: views of each example, drawn by asking the dataset for it so many times; their
            gradients are averaged before the clip.
        fix_modules: replace layers that cannot be trained privately (BatchNorm by GroupNorm), and say which. It sees
            what the module's ``__init__`` built.
        secure_mode: draw the noise from the operating system, in a way that is safe against attacks on floating-point
            numbers (see ``Entropy.gaussian``): about 0.3 s a step for a million parameters.
        preflight: check on synthetic rows that the training step's loss can be split by example. False voids the
            certificate.
        lost_steps: only for a checkpoint whose journal is lost: how many steps were made after it.
        unsafe_seed: makes noise and sampling reproducible, and voids the certificate.

    Raises:
        ValueError: a setting is out of range. In ``setup``: what cannot be combined. Before the first batch: a training
            step for which no epsilon would hold (``GuaranteeVoid``), a plan that cannot be met.
        TypeError: ``clipping`` is of another kind.

    Note:
        The guarantee is for the weights: every gradient that the optimizer sees is private. What else leaves the run
        (training metrics, the choice among checkpoints or hyper-parameters) is listed in the certificate as not
        covered. Neighbouring datasets differ in one example, which is replaced by one whose gradient is zero.

    Guarantees:
        Epsilon never exceeds ``target_epsilon``, whatever ``min_epochs``, ``max_epochs``, a resumed or second fit say.
        Steps that a crash lost are counted when the run resumes. An example whose gradient is not finite contributes
        zero. Noise and sampling do not depend on ``seed_everything``. With ``noise_multiplier=0`` and
        ``max_grad_norm=inf`` the run is plain SGD on Poisson batches. After ``fit``, also a failed one, module and
        Trainer are as before, but for ``fix_modules``. No key of the module's state dict changes.

    References:
        Abadi et al., "Deep Learning with Differential Privacy", 2016; De et al., "Unlocking High-Accuracy
        Differentially Private Image Classification through Scale", 2022.

    Example::

        trainer = Trainer(callbacks=[DPSGD(target_epsilon=3.0, max_grad_norm=1.0)])
    """

    defends = True

    def __init__(
        self,
        target_epsilon: float | None = None,
        noise_multiplier: float | None = None,
        target_delta: float | None = None,
        max_grad_norm: float = 1.0,
        physical_batch_size: int | None = None,
        dataset_size: int | None = None,
        sample_rate: float | None = None,
        accountant: str = "prv",
        engine: str = "auto",
        clipping: Clipping | None = None,
        noise_schedule: Sequence[float] = (1.0,),
        augmentation_multiplicity: int = 1,
        fix_modules: bool = False,
        secure_mode: bool = False,
        preflight: bool = True,
        lost_steps: int | None = None,
        unsafe_seed: int | None = None,
    ) -> None:
        clipping = Flat() if clipping is None else clipping
        if not isinstance(clipping, Clipping):
            raise TypeError(f"dp_sgd.clipping must be a robust_train Clipping, got {clipping!r}")
        if isinstance(noise_schedule, str) or not isinstance(noise_schedule, Sequence):
            raise TypeError(f"dp_sgd.noise_schedule must be a list of numbers > 0, got {noise_schedule!r}")
        check_switches("dp_sgd", fix_modules=fix_modules, secure_mode=secure_mode, preflight=preflight)
        self.target_epsilon, self.noise_multiplier, self.target_delta = target_epsilon, noise_multiplier, target_delta
        self.max_grad_norm, self.physical_batch_size = max_grad_norm, physical_batch_size
        self.dataset_size, self.sample_rate = dataset_size, sample_rate
        self.accountant, self.engine, self.clipping, self.noise_schedule = (
            accountant,
            engine,
            clipping,
            tuple(noise_schedule),
        )
        self.augmentation_multiplicity, self.fix_modules = augmentation_multiplicity, fix_modules
        self.secure_mode, self.preflight, self.lost_steps = secure_mode, preflight, lost_steps
        self.unsafe_seed = unsafe_seed
        check_settings(self, engines=("auto", *ENGINES))
        self.zeroed_examples = 0  # whose gradient was not finite; private, like everything that is counted
        self._ledger = Ledger(target_epsilon)
        self._engine_name, self._processes = "none yet", 1
        self._resumed = False
        self._run: _Run | None = None
        self._undo = ExitStack()
        self._watched_by: list[StepWatch] = []

    def settings(self) -> dict[str, Any]:
        names = (
            "target_epsilon",
            "noise_multiplier",
            "target_delta",
            "max_grad_norm",
            "physical_batch_size",
            "dataset_size",
            "sample_rate",
            "accountant",
            "engine",
            "clipping",
            "noise_schedule",
            "augmentation_multiplicity",
            "fix_modules",
            "secure_mode",
            "preflight",
        )
        return {name: plain(getattr(self, name)) for name in names}

    # --- events, in the order in which Lightning calls them --------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit" or self._run is not None:
            return
        if self.fix_modules:
            for line in exchange_layers(pl_module, keep=() if self.engine == "hooks" else (nn.MultiheadAttention,)):
                rank_zero_info(f"DPSGD: fix_modules replaced {line}")
        refuse_what_cannot_work(trainer, pl_module, self)
        seed = None if self.unsafe_seed is None else self.unsafe_seed + trainer.global_rank
        self._run = _Run(Entropy(seed), trainer.accumulate_grad_batches)
        self._resumed = False
        others = trainer.callbacks  # type: ignore[attr-defined]
        # First of all, wherever the user put it: what comes after sees the private gradient, and no other. A new list,
        # because this one is being walked through.
        trainer.callbacks = [self, *(c for c in others if c is not self)]  # type: ignore[attr-defined]
        self._undo.callback(_restore, trainer, callbacks=others)
        self._undo.callback(
            _restore,
            trainer,
            accumulate_grad_batches=trainer.accumulate_grad_batches,
            limit_train_batches=trainer.limit_train_batches,
            val_check_interval=trainer.val_check_interval,
        )
        self._undo.callback(_seams.exchange_train_loader(trainer, lambda loader: self._exchange(trainer, loader), 2))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._run is None and self._ledger.history:
            return  # an older checkpoint is evaluated after training: what was released since stays released
        self._resumed = True
        self._ledger.load(state_dict["ledger"])

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if len(trainer.optimizers) != 1:
            raise ValueError(
                f"DPSGD cannot work with {len(trainer.optimizers)} optimizers: return one from configure_optimizers, "
                "with a parameter group for each learning rate"
            )
        if isinstance(trainer.optimizers[0], torch.optim.LBFGS):
            raise ValueError("DPSGD cannot work with LBFGS, which computes the gradient several times a step: use SGD")
        if trainer.ckpt_path and not self._resumed:
            raise ValueError(
                f"DPSGD: the checkpoint {trainer.ckpt_path} was not trained with DPSGD, so nothing says what its "
                "weights reveal of the data. If they come from public data, load them into the module, and call fit "
                "without ckpt_path"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        run, ledger = self._running(), self._ledger
        run.parameters = _trained(trainer.optimizers[0])
        run.folder = run_folder(trainer)
        lost = recover_history(trainer, ledger, self.lost_steps)
        left = trainer.estimated_stepping_batches - trainer.global_step
        ledger.make_plan(
            left,
            self.noise_multiplier,
            max_grad_norm=self.max_grad_norm,
            sample_rate=run.loader.batches.sample_rate,
            dataset_size=run.loader.public_size,
            delta=self.target_delta or default_delta(run.loader.public_size),
            accountant=self.accountant,
            noise_schedule=self.noise_schedule,
        )
        if ledger.allowed < math.inf:
            self._undo.callback(_seams.stop_after(trainer, trainer.global_step + int(ledger.allowed)))
        if self._resumed and trainer.is_global_zero:
            ledger.open_journal()
        self.announce(trainer, plan_text(self, ledger.planned, run.loader.batches.micro_batches))
        if lost:
            rank_zero_info(f"DPSGD: {lost} steps were made after the checkpoint and lost; they are counted.")
        if ledger.allowed < left < math.inf:
            rank_zero_warn(
                f"DPSGD: the budget allows {ledger.allowed} more steps, fewer than the {left} that the run asks for; "
                "training stops when it is spent."
            )
        for reason in reasons_void(self):
            rank_zero_warn(f"DPSGD: the certificate is void: {reason}.")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        run = self._running()
        if run.engine is None:  # not before: the module may prepare its first step in hooks of its own
            run.engine = self._attach(trainer, pl_module)
            self._write_certificate(trainer)
        place, run.examples = run.loader.batches.sizes.popleft()
        if place != (_seams.micro_batches_begun(trainer) - 1) % run.loader.batches.micro_batches:
            raise RuntimeError("DPSGD: the loop's batches are out of step with the sampler's; please report this")
        if place == 0:
            run.total = None  # of a logical batch that was broken off
        run.backwards = 0
        run.engine.start()

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self._running().engine.arm()

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Clip, add to the sum, and leave nothing of the raw gradient."""
        run = self._running()
        run.backwards += 1
        if run.backwards > 1:
            raise RuntimeError(
                "DPSGD: the optimizer computed the gradient of one batch twice (a closure that is called again?): one "
                "example would count twice. Use an optimizer that calls its closure once"
            )
        views, k = self.augmentation_multiplicity, run.loader.batches.micro_batches
        examples = max(run.examples, 1)
        found = run.engine.clipped_sum(
            examples,
            self.max_grad_norm,
            self.clipping,
            views=views,
            scale=k,  # Lightning has divided the loss by accumulate_grad_batches
            weights=None if run.examples else torch.zeros(examples, device=run.parameters[0].device),
        )
        if found.zeroed and not self.zeroed_examples:
            rank_zero_warn(
                "DPSGD: the gradient of an example is not finite; such examples contribute zero. Look at the data, or "
                "at the loss, for NaN and inf. Further ones are counted in zeroed_examples."
            )
        self.zeroed_examples += found.zeroed
        if run.total is None:
            run.total = found.gradients
        else:
            torch._foreach_add_(run.total, found.gradients)  # pyright: ignore[reportPrivateImportUsage]
        for p in pl_module.parameters():
            if p.grad is not None:
                p.grad.zero_()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """The one place where the sum of gradients becomes visible: with noise, and accounted for."""
        run = self._running()
        if run.total is None:
            raise RuntimeError(NO_LOSS)
        if {id(p) for p in _trained(optimizer)} != {id(p) for p in run.parameters}:
            raise RuntimeError(
                "DPSGD: the set of trained parameters has changed since training began (were layers unfrozen?). Train "
                "in two fits with the same callback, which adds up what they cost"
            )
        sigma = self._ledger.spend()
        total = torch.cat([g.flatten() for g in run.total])
        for watch in self._watched_by:
            watch.before_noise(total, self._ledger.planned.sample_rate)
        if sigma > 0 and trainer.is_global_zero:
            noise = run.entropy.gaussian(len(total), total.device, self.secure_mode)
            total += (sigma * self.max_grad_norm) * noise.to(total.dtype)
        if trainer.world_size > 1:
            torch.distributed.all_reduce(total)
        for watch in self._watched_by:
            watch.after_noise(total, sigma, self._ledger.planned.sample_rate)
        total /= self._ledger.expected_batch_size
        for p, g in zip(run.parameters, total.split([p.numel() for p in run.parameters]), strict=True):
            if p.grad is None:
                p.grad = torch.empty_like(p)
            p.grad.copy_(g.view_as(p))
        run.total = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        run = self._running()
        run.engine.stop()
        if not run.backwards:
            raise RuntimeError(NO_LOSS)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._run is not None and not trainer.sanity_checking:
            pl_module.log("privacy/epsilon", self.epsilon())  # also here: callbacks that monitor it look after this

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.log("privacy/epsilon", self.epsilon(), prog_bar=True)
        self._write_certificate(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._close(trainer)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        run = self._run
        if run is not None and run.folder is not None and trainer.is_global_zero:
            self._ledger.open_journal(beside_checkpoints(trainer) or run.folder)  # from here on a crash can be resumed
        super().on_save_checkpoint(trainer, pl_module, checkpoint)

    def state(self) -> dict[str, Any]:
        certificate = None if self._ledger.plan is None else self.certificate().to_dict()
        return {"settings": self.settings(), "ledger": self._ledger.state(), "certificate": certificate}

    # --- what a user may ask ---------------------------------------------------------------------------------------

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Passes inside are not part of training: attacks, extra evaluations. No gradient of theirs is recorded."""
        with ExitStack() as stack:
            if self._run is not None and self._run.engine is not None:
                stack.enter_context(self._run.engine.paused())
            yield

    @contextmanager
    def watched(self, watch: StepWatch) -> Iterator[None]:
        """Inside, ``watch`` is shown the sum of clipped gradients of each step, before and after the noise."""
        self._watched_by.append(watch)
        try:
            yield
        finally:
            self._watched_by.remove(watch)

    @property
    def history(self) -> list[Segment]:
        """Everything released so far: noise multiplier, sample rate and number of steps."""
        return self._ledger.history

    def epsilon(self) -> float:
        """Privacy loss of everything released so far, over all fits of this callback and the runs it resumed."""
        return self._ledger.epsilon()

    def certificate(self) -> Certificate:
        """What has been released so far, and under which assumptions; also in the run folder and the checkpoint."""
        ledger, plan = self._ledger, self._ledger.plan
        if plan is None:
            raise RuntimeError("DPSGD: there is no certificate before a fit has begun")
        return Certificate.of(
            plan,
            ledger.history,
            clipping=call_text(self.clipping),
            engine=self._engine_name,
            target_epsilon=self.target_epsilon,
            void=reasons_void(self),
            assumptions=assumptions(self, self._processes),
        )

    # --- work ------------------------------------------------------------------------------------------------------

    def _running(self) -> _Run:
        if self._run is None:
            raise RuntimeError("DPSGD: not within fit")
        return self._run

    def _write_certificate(self, trainer: Any) -> None:
        run = self._running()
        if trainer.is_global_zero and run.folder is not None and self._ledger.plan is not None:
            run.folder.mkdir(parents=True, exist_ok=True)
            self.certificate().write(run.folder / CERTIFICATE)

    def _exchange(self, trainer: Any, loader: Any) -> PoissonLoader:
        run = self._running()
        run.loader = poisson_loader(
            trainer,
            loader,
            run.entropy,
            accumulate=run.accumulate,
            sample_rate=self.sample_rate,
            dataset_size=self.dataset_size,
            physical_batch_size=self.physical_batch_size,
            views=self.augmentation_multiplicity,
        )
        return run.loader

    def _attach(self, trainer: Any, module: pl.LightningModule) -> Engine:
        """Take the first of the engines that is exact for this module and its training step."""
        run = self._running()
        with preserved_rng(module.device):  # a dataset that augments draws from the global generators
            size = len(run.loader.dataset)
            pool = [run.loader.dataset[int(i)] for i in np.linspace(0, size - 1, min(POOL, size)).round()]
        reasons: list[str] = []
        for name in ENGINES if self.engine == "auto" else (self.engine,):
            with ExitStack() as undo:
                try:
                    run.engine = ENGINES[name](module, run.parameters)
                    undo.callback(_restore, run, engine=None)
                    undo.callback(run.engine.close)
                    if self.preflight:
                        check_step(StepProbe(trainer, module, run.loader.collate_fn, run.engine), pool)
                except (UnsupportedLayer, RowsMismatch, GuaranteeVoid) as error:
                    if str(error) not in reasons:
                        reasons.append(str(error))
                else:
                    self._undo.push(undo.pop_all())
                    rank_zero_info(f"DPSGD: engine {name}.")
                    self._engine_name, self._processes = name, trainer.world_size
                    return run.engine
        raise GuaranteeVoid("DPSGD refuses to train, because no epsilon would hold: " + "; ".join(reasons))

    def _close(self, trainer: Any) -> None:
        run = self._run
        if run is None:
            return
        self._write_certificate(trainer)
        self._undo.close()
        self._ledger.close()
        self._run = None


class StepWatch(Protocol):
    """Looks on while a step becomes private; for audits."""

    def before_noise(self, total: Tensor, sample_rate: float) -> None:
        """The sum of this process's clipped gradients, flat, without noise. What is added to it gets the noise too."""

    def after_noise(self, total: Tensor, noise_multiplier: float, sample_rate: float) -> None:
        """The sum over all processes, flat, with noise; and what the accounting takes the step for."""


@dataclass
class _Run:
    """What is known during one ``fit``."""

    entropy: Entropy
    accumulate: int  # as the user asked for
    loader: Any = None
    folder: Path | None = None
    parameters: list[nn.Parameter] = field(default_factory=list)
    engine: Any = None
    examples: int = 0  # of the micro-batch at hand
    backwards: int = 0  # passes it has made
    total: list[Tensor] | None = None  # the sum over the logical batch so far


def _trained(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return list(dict.fromkeys(p for group in optimizer.param_groups for p in group["params"] if p.requires_grad))


def _restore(target: Any, **attributes: Any) -> None:
    for name, value in attributes.items():
        setattr(target, name, value)

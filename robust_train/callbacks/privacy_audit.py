"""Canaries in a private run: does its noise keep the epsilon that it claims?"""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from robust_train.callbacks._callback import Callback
from robust_train.callbacks._checks import check_counts
from robust_train.callbacks._dp_run import run_folder
from robust_train.callbacks.dp_sgd import DPSGD
from robust_train.custody._files import write_whole
from robust_train.privacy import accounting
from robust_train.privacy.canaries import REJECTED, log_ratio, one_run_bound, one_run_ceiling, verdict
from robust_train.privacy.certificate import Certificate

if TYPE_CHECKING:
    import pytorch_lightning as pl

SCHEMA, VERSION = "robust-train/privacy-audit", 1
AUDIT_FILE = "privacy_audit.json"
SHARE = 0.01


class PrivacyAudit(Callback):
    """Audits the noise of a ``DPSGD`` run, while it runs.

    Canaries are made-up examples, each with a clipped gradient along one coordinate of the weights. A fair coin puts
    each into the training data or leaves it out; those that are in join steps as other examples do, at the run's sample
    rate, between the clip and the noise. From the noisy sums, of which everything else in the data is known and
    subtracted, the audit guesses which are in. How many guesses are right bounds the run's epsilon from below. When it
    has looked at a step, the audit takes the canaries' part out again: the weights are those of a run without them.

    Logged at the end: ``audit/epsilon_lower_bound``. ``privacy_audit.json`` in the run folder and a line on the
    terminal say which of three it is: ``rejected`` (the claimed epsilon is false), ``consistent``, or ``too weak to
    tell``, where so many canaries could not have rejected the claim, whatever they showed.

    Args:
        canaries: how many; the model must have as many trained weights. More of them can reject larger epsilons: up to
            about 2.9 with 100, 5.2 with 1,000, 7.5 with 10,000. The claim is looked at for a delta of 1 / (100
            canaries) or less, for which the accountant's epsilon is larger than at the run's own delta.
        confidence: that the bound is right, in (0, 1).

    Raises:
        ValueError: a setting is out of range. In ``setup``: there is no ``DPSGD`` that claims an epsilon. Before the
            first step: there are fewer weights than canaries.

    Note:
        What happens before the clip (sampling of the real examples, clipping) is audited by ``audit_dp_sgd``, on a
        model of its own. Canaries are no part of the data, and cost no privacy.

    Guarantees:
        The run's weights are those of the same run without the audit, up to rounding. If each step's noise and the
        accounting are right, the claim is rejected with a probability of at most ``1 - confidence``.

    References:
        Steinke, Nasr and Jagielski, "Privacy Auditing with One (1) Training Run", 2023; Nasr et al., "Tight Auditing of
        Differentially Private Machine Learning", 2023 (Dirac canaries).

    Example::

        trainer = Trainer(callbacks=[DPSGD(target_epsilon=3.0), PrivacyAudit()])
    """

    def __init__(self, canaries: int = 1000, confidence: float = 0.95) -> None:
        check_counts("privacy_audit", 1, canaries=canaries)
        if isinstance(confidence, bool) or not isinstance(confidence, (int, float)) or not 0 < confidence < 1:
            raise ValueError(f"privacy_audit.confidence must be in (0, 1), got {confidence!r}")
        self.canaries, self.confidence = canaries, confidence
        self.result: dict[str, Any] | None = None
        self._private: DPSGD | None = None
        self._places = np.empty(0, dtype=np.int64)
        self._included = np.empty(0, dtype=bool)
        self._scores = np.empty(0)
        self._steps = 0
        self._draw = np.random.default_rng()  # from the operating system, as everything private is
        self._in_step: tuple[Tensor, Tensor] | None = None
        self._processes = 1
        self._first = True
        self._undo = ExitStack()

    def settings(self) -> dict[str, Any]:
        return {"canaries": self.canaries, "confidence": self.confidence}

    def state(self) -> dict[str, Any]:
        return {
            "settings": self.settings(),
            "places": self._places.tolist(),
            "included": self._included.tolist(),
            "scores": self._scores.tolist(),
            "steps": self._steps,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._places = np.array(state_dict["places"], dtype=np.int64)
        self._included = np.array(state_dict["included"], dtype=bool)
        self._scores = np.array(state_dict["scores"], dtype=np.float64)
        self._steps = int(state_dict["steps"])

    # --- events ---------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        found = [callback for callback in trainer.callbacks if isinstance(callback, DPSGD)]  # type: ignore[attr-defined]
        if len(found) != 1:
            raise ValueError(f"PrivacyAudit audits a DPSGD callback, and the Trainer has {len(found)}: add one")
        if found[0].noise_multiplier == 0 or math.isinf(found[0].max_grad_norm):
            raise ValueError(
                "PrivacyAudit has nothing to audit: without noise (noise_multiplier=0) or clipping (max_grad_norm=inf) "
                "DPSGD claims no epsilon"
            )
        self._private = found[0]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        size = sum(
            p.numel() for group in trainer.optimizers[0].param_groups for p in group["params"] if p.requires_grad
        )
        if size < self.canaries:
            raise ValueError(
                f"privacy_audit.canaries: {self.canaries} canaries need as many weights, and {size} are trained: "
                f"set canaries to {size} or fewer"
            )
        if len(self._places) != self.canaries or self._places.max() >= size:
            places = self._draw.choice(size, self.canaries, replace=False)
            drawn = (places, self._draw.random(self.canaries) < 0.5)
            self._places, self._included = trainer.strategy.broadcast(drawn)
            self._scores, self._steps = np.zeros(self.canaries), 0
        self._processes, self._first = trainer.world_size, trainer.is_global_zero
        assert self._private is not None  # noqa: S101  (found in setup)
        self._undo.enter_context(self._private.watched(self))
        delta = self._delta(self._private.certificate())
        ceiling = one_run_ceiling(self.canaries, delta, self.confidence)
        self.announce(
            trainer,
            f"active. {self.canaries} canaries can reject a claimed epsilon below {ceiling:.2f} at delta {delta:.2g}.",
        )

    def before_noise(self, total: Tensor, sample_rate: float) -> None:
        """Put the canaries that join this step in."""
        assert self._private is not None  # noqa: S101
        places = torch.from_numpy(self._places).to(total.device)
        joins = torch.from_numpy(self._included & (self._draw.random(self.canaries) < sample_rate)).to(total.device)
        known = total[places]
        if self._processes > 1:  # the first process's coins count for all
            joins = joins.to(torch.uint8)
            torch.distributed.broadcast(joins, 0)
            torch.distributed.all_reduce(known)
        part = joins.to(total.dtype) * self._private.max_grad_norm
        if self._first:
            total[places] += part
        self._in_step = known, part

    def after_noise(self, total: Tensor, noise_multiplier: float, sample_rate: float) -> None:
        """Look at the canaries' coordinates, and take the canaries out again."""
        assert self._private is not None  # noqa: S101
        assert self._in_step is not None  # noqa: S101
        (known, part), self._in_step = self._in_step, None
        places = torch.from_numpy(self._places).to(total.device)
        views = ((total[places] - known) / self._private.max_grad_norm).double().cpu().numpy()
        self._scores += log_ratio(views, noise_multiplier, sample_rate)
        self._steps += 1
        total[places] -= part

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._undo.close()
        if not self._steps or self._private is None:
            return
        certificate = self._private.certificate()
        delta = self._delta(certificate)
        claimed = accounting.epsilon(self._private.history, delta, certificate.accountant)
        bound = one_run_bound(self._scores, self._included, delta, self.confidence)
        bound = float(trainer.strategy.reduce(torch.tensor(bound, device=pl_module.device), reduce_op="max"))
        ceiling = one_run_ceiling(self.canaries, delta, self.confidence)
        counted = self._steps <= certificate.steps
        said = verdict(bound, claimed, ceiling) if counted else REJECTED
        self.result = {
            "schema": SCHEMA,
            "version": VERSION,
            "verdict": said,
            "epsilon_lower_bound": bound,
            "epsilon_claimed": claimed,
            "ceiling": ceiling,
            "delta": delta,
            "certificate": {"epsilon": certificate.epsilon, "delta": certificate.delta},
            "confidence": self.confidence,
            "canaries": self.canaries,
            "steps_seen": self._steps,
            "steps_claimed": certificate.steps,
            "means": {
                "rejected": "the claimed epsilon is false",
                "consistent": "the audit could have rejected the claim and did not, which proves nothing",
                "too weak to tell": "so many canaries could not reject this claim, whatever they show",
            }[said],
        }
        text = (
            f"PrivacyAudit: {said}. Epsilon {claimed:.2f} is claimed at delta {delta:.2g}; {self.canaries} canaries "
            f"show at least {bound:.2f} ({100 * self.confidence:g} %), and could have shown up to {ceiling:.2f}."
        )
        if not counted:
            text += f" {self._steps} steps were taken, and {certificate.steps} are accounted for."
        (rank_zero_warn if said == REJECTED else rank_zero_info)(text)
        trainer.callback_metrics["audit/epsilon_lower_bound"] = torch.tensor(bound)
        for logger in trainer.loggers:
            logger.log_metrics({"audit/epsilon_lower_bound": bound}, step=trainer.global_step)
        folder = run_folder(trainer)
        if folder is not None and trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / AUDIT_FILE, json.dumps(self.result, indent=2) + "\n")

    def _delta(self, certificate: Certificate) -> float:
        """For which the claim is audited: small enough for so many canaries to say something."""
        return min(certificate.delta, SHARE / self.canaries)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._undo.close()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._undo.close()

"""What a private run promises, on what conditions, and what it does not cover: plain JSON that can be checked again."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from robust_train.privacy import accounting
from robust_train.privacy.accounting import ACCOUNTANTS, AccountingError, Segment
from robust_train.privacy.plan import PrivacyPlan

SCHEMA, VERSION = "robust-train/privacy-certificate", 1

MECHANISM = "Poisson-subsampled Gaussian (DP-SGD)"
SAMPLING = "Poisson: every example joins every step with probability sample_rate, independently of all others"
NEIGHBOURS = (
    "zero-out (replace-special): two datasets of the same public size that differ in one example, which one of them "
    "replaces by an example whose gradient is zero"
)
ASSUMPTIONS = (
    "The gradient of an example depends on that example and on the weights alone, not on others in its batch.",
    "One example belongs to one person; whoever contributed several has a weaker guarantee.",
    "The dataset's size, the settings and the number of steps are public, and were chosen without looking at the data.",
    "The initial weights do not depend on the training data.",
    "The random numbers behind sampling and noise cannot be predicted, and were neither kept nor published.",
    "Noise is drawn in floating point; attacks on its last bits are not considered.",
)
NOT_COVERED = (
    "Training metrics: logged losses and accuracies of training batches, the progress bar, sizes of batches, norms.",
    "The choice of a checkpoint, or the decision to stop, by a metric of training data.",
    "Hyper-parameter searches: every trial on this data costs as much as the run that was kept.",
    "Filters that look at several examples, and preprocessing that was fitted on training data (mean and standard "
    "deviation, PCA, vocabularies).",
    "Other models, statistics or plots made from the same data, and validation or test data.",
)


@dataclass(frozen=True)
class Certificate:
    """The privacy loss of a history of steps, with everything that one needs to check it.

    ``Certificate.of`` makes one of a plan and its history.

    Args:
        epsilon: privacy loss of all of the history; None where the certificate is void.
        delta: with which it holds.
        accountant: how epsilon was computed.
        history: segments ``(noise_multiplier, sample_rate, steps)``, over all fits.
        noise_multiplier: of the last plan.
        max_grad_norm: clipping norm; None where nothing was clipped.
        clipping: name of the clipping method.
        sample_rate: of the last plan.
        dataset_size: number of examples, as the public knows it.
        target_epsilon: the budget, or None.
        engine: what computed the per-example gradients.
        void: reasons why there is no guarantee; empty where there is one.
        assumptions: on what the guarantee rests.
        not_covered: what the guarantee says nothing about.
        versions: of the software.
        created: when, UTC.

    Raises:
        ValueError: epsilon is missing without a reason, or stated in spite of one.
    """

    epsilon: float | None
    delta: float
    accountant: str
    history: tuple[Segment, ...]
    noise_multiplier: float
    max_grad_norm: float | None
    clipping: str
    sample_rate: float
    dataset_size: int
    target_epsilon: float | None = None
    engine: str = ""
    void: tuple[str, ...] = ()
    assumptions: tuple[str, ...] = ASSUMPTIONS
    not_covered: tuple[str, ...] = NOT_COVERED
    versions: Mapping[str, str] = field(default_factory=dict)
    created: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))

    def __post_init__(self) -> None:
        accounting.merge(self.history)  # refuses what is no history
        history = tuple((float(noise), float(rate), int(steps)) for noise, rate, steps in self.history)
        object.__setattr__(self, "history", history)
        for name in ("void", "assumptions", "not_covered"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if (self.epsilon is None) != bool(self.void):
            raise ValueError("a certificate has either an epsilon or reasons why it is void")
        if self.epsilon is not None and not 0 <= self.epsilon < math.inf:
            raise ValueError(f"a certificate's epsilon must be >= 0 and finite, got {self.epsilon}")
        if self.accountant not in ACCOUNTANTS or not 0 < self.delta < 1:
            raise ValueError(f"no accountant {self.accountant!r}, or delta {self.delta} is not in (0, 1)")

    @classmethod
    def of(
        cls,
        plan: PrivacyPlan,
        history: Sequence[Segment],
        *,
        clipping: str,
        engine: str,
        target_epsilon: float | None = None,
        void: Sequence[str] = (),
        assumptions: Sequence[str] = (),
    ) -> Certificate:
        """The certificate of a run.

        Args:
            plan: of its last fit.
            history: everything that was spent.
            clipping: name of the clipping method.
            engine: what computed the per-example gradients.
            target_epsilon: the budget, or None.
            void: reasons that the caller knows why there is no guarantee; a step without noise, or a loss that the
                accountant cannot tell, is added here.
            assumptions: further ones.
        """
        reasons, epsilon = list(void), math.inf
        try:
            epsilon = accounting.epsilon(history, plan.delta, plan.accountant)
            if math.isinf(epsilon):
                reasons.append("a step had no noise")
        except AccountingError as error:
            reasons.append(str(error))
        approximate = ("Epsilon is an approximation by the central limit theorem, not a bound.",)
        return cls(
            epsilon=None if reasons else epsilon,
            delta=plan.delta,
            accountant=plan.accountant,
            history=tuple(history),
            noise_multiplier=plan.noise_multiplier,
            max_grad_norm=plan.max_grad_norm if math.isfinite(plan.max_grad_norm) else None,
            clipping=clipping,
            sample_rate=plan.sample_rate,
            dataset_size=plan.dataset_size,
            target_epsilon=target_epsilon,
            engine=engine,
            void=tuple(reasons),
            assumptions=(*ASSUMPTIONS, *(approximate if plan.accountant == "gdp" else ()), *assumptions),
            versions=_versions(),
        )

    @property
    def steps(self) -> int:
        """Noisy steps in the whole history."""
        return sum(steps for _, _, steps in self.history)

    # --- checking -------------------------------------------------------------------------------------------------

    def verify(self) -> Verdict:
        """Compute epsilon again from the history.

        Guarantees:
            A certificate that states less than the accountant does (by more than a millionth, which other processors
            may round differently) is not right; neither is one whose history has a step without noise, or one above
            its target.
        """
        if self.epsilon is None:
            return Verdict(True, None, f"void, and says so: {'; '.join(self.void)}")
        try:
            found = accounting.epsilon(self.history, self.delta, self.accountant)
        except AccountingError as error:
            return Verdict(False, None, str(error))
        if self.epsilon < found * (1 - 1e-6):
            return Verdict(False, found, f"states epsilon {self.epsilon:.6g}, but its history costs {found:.6g}")
        if self.target_epsilon is not None and self.epsilon > self.target_epsilon:
            return Verdict(False, found, f"exceeds its target of {self.target_epsilon:.6g}")
        if self.dataset_size > 1 and self.delta >= 1 / self.dataset_size:
            return Verdict(False, found, f"delta {self.delta:.3g} promises nothing for {self.dataset_size} examples")
        if self.epsilon > found * 1.01:
            return Verdict(True, found, f"holds, and states more than necessary: {found:.6g} suffices")
        return Verdict(True, found, f"holds: computed again, epsilon is {found:.6g}")

    # --- as JSON --------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """As plain builtins, without infinities: what the file holds."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("void", "assumptions", "not_covered"):
            own[name] = list(own[name])
        own["history"] = [list(segment) for segment in self.history]
        own["versions"] = dict(self.versions)
        return {"schema": SCHEMA, "version": VERSION, **own, **self._derived()}

    def _derived(self) -> dict[str, Any]:
        """What follows from the rest, for whoever reads the file without this package."""
        return {
            "mechanism": MECHANISM,
            "sampling": SAMPLING,
            "neighbours": NEIGHBOURS,
            "epsilon_is": ACCOUNTANTS[self.accountant],
            "steps": self.steps,
            "noise_multipliers": sorted({noise for noise, _, _ in self.history}),
            "expected_batch_size": self.sample_rate * self.dataset_size,
        }

    @classmethod
    def from_dict(cls, state: Any) -> Certificate:
        """A certificate from what ``to_dict`` returned.

        Raises:
            ValueError: it is no such thing; the message says what is wrong.
        """
        if not isinstance(state, dict) or state.get("schema") != SCHEMA:
            raise ValueError(f"this is no privacy certificate (its schema is not {SCHEMA})")
        if state.get("version") != VERSION:
            raise ValueError(
                f"version {state.get('version')!r} of the certificate's format is not known, only {VERSION}"
            )
        own = {f.name: f.type for f in fields(cls)}
        if missing := [name for name in own if name not in state]:
            raise ValueError(f"the certificate lacks {', '.join(missing)}")
        for name, kind in own.items():
            if not isinstance(state[name], _KINDS[str(kind)]) or isinstance(state[name], bool):
                raise ValueError(f"the certificate's {name} is not of the right kind: {state[name]!r:.80}")
            if _KINDS[str(kind)] is list and name != "history" and not all(isinstance(v, str) for v in state[name]):
                raise ValueError(f"the certificate's {name} must hold text only")
        try:
            certificate = cls(**{name: state[name] for name in own})
        except TypeError as error:
            raise ValueError(f"the certificate cannot be read: {error}") from None
        for name, value in certificate._derived().items():
            if state.get(name) != value:
                raise ValueError(f"the certificate contradicts itself: {name} is {state.get(name)!r}, not {value!r}")
        return certificate

    def write(self, path: str | Path) -> None:
        """Write the file whole or not at all: no reader ever sees half of it."""
        path = Path(path)
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            draft.write_text(text, encoding="utf-8")
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)

    @classmethod
    def read(cls, path: str | Path) -> Certificate:
        """A certificate from its file.

        Raises:
            ValueError: the file cannot be read, is no JSON, or no certificate; one line that names the file.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
            return cls.from_dict(json.loads(text, parse_constant=_refuse))
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror or error}") from None
        except (ValueError, RecursionError) as error:  # bad JSON and bad UTF-8 are ValueErrors too
            raise ValueError(f"{path}: {error}") from None


@dataclass(frozen=True)
class Verdict:
    """Whether a certificate is right.

    Args:
        right: its epsilon is no smaller than what its history costs, or it says that it is void.
        epsilon: what its history costs; None where nobody can tell.
        says: the same in words.
    """

    right: bool
    epsilon: float | None
    says: str


_KINDS: dict[str, Any] = {
    "float | None": (int, float, type(None)),
    "float": (int, float),
    "int": int,
    "str": str,
    "tuple[str, ...]": list,
    "tuple[Segment, ...]": list,
    "Mapping[str, str]": dict,
}


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in ("robust-train", "torch", "pytorch-lightning", "lightning", "opacus", "scipy", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found

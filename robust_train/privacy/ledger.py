"""What has been released so far, and how much more may be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from robust_train.privacy import accounting
from robust_train.privacy import journal as journals
from robust_train.privacy.journal import Journal, Segment
from robust_train.privacy.plan import PrivacyPlan


class Ledger:
    """Counts noisy steps over all fits of a lineage of runs, and says when the budget is spent.

    Attributes:
        history: everything released so far.
        plan: how the steps of the current fit are made.
        allowed: how many more steps the budget, or without one the plan, allows.

    Guarantees:
        With a budget, ``epsilon()`` never exceeds it: ``spend`` refuses the step that would. After a crash, once
        ``recover`` has returned, every step that ``spend`` ever announced is counted.
    """

    def __init__(self, target_epsilon: float | None) -> None:
        self.target_epsilon = target_epsilon
        self.history: list[Segment] = []
        self.plan: PrivacyPlan | None = None
        self.allowed: float = 0
        self._planned_for: dict[str, Any] = {}
        self._before = 0  # steps in the history when the plan was made
        self._key: str | None = None
        self._path: str | None = None
        self._journal: Journal | None = None
        self._known: tuple[tuple[Segment, ...], float] = ((), 0.0)

    @property
    def steps(self) -> int:
        return sum(steps for _, _, steps in self.history)

    @property
    def expected_batch_size(self) -> float:
        return self.planned.expected_batch_size

    @property
    def planned(self) -> PrivacyPlan:
        """The plan, once there is one."""
        if self.plan is None:
            raise RuntimeError("the ledger has no plan yet: call make_plan")
        return self.plan

    # --- state, as plain builtins ----------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        return {
            "history": [list(segment) for segment in self.history],
            "plan": None if self.plan is None else self.plan.to_dict(),
            "planned_for": dict(self._planned_for),
            "before": self._before,
            "journal": {"key": self._key, "path": self._path},
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; the steps after it are not counted before ``recover``."""
        self.history = [(float(sigma), float(rate), int(steps)) for sigma, rate, steps in state["history"]]
        self.plan = None if state["plan"] is None else PrivacyPlan.from_dict(state["plan"])
        self._planned_for, self._before = dict(state["planned_for"]), int(state["before"])
        self._key, self._path = state["journal"]["key"], state["journal"]["path"]

    # --- the journal -----------------------------------------------------------------------------------------------

    def recover(self, folders: Sequence[Path], lost_steps: int | None) -> int:
        """Count the steps that were made after the checkpoint.

        Args:
            folders: where the journal may lie, other than where it was.
            lost_steps: what the user says, for a journal that is lost.

        Returns:
            How many there were.

        Raises:
            ValueError: the journal is missing or unreadable, and the user says nothing.
        """
        if self._key is None:
            return 0
        where = [*([] if self._path is None else [Path(self._path).parent]), *folders]
        path = journals.find(self._key, where)
        counted = self.steps
        if path is not None:
            self._path = str(path)
            found = journals.read(path, self._key)
            if sum(steps for _, _, steps in found) > counted:
                self.history = found
        elif lost_steps is None:
            raise ValueError(
                f"DPSGD: the journal {journals.name_of(self._key)} of this run is missing; without it nobody knows how "
                "many noisy steps were made after the checkpoint, and they count. Put it beside the checkpoint; or, if "
                "it is lost, say how many there were at most with lost_steps=…"
            )
        else:
            self._key = self._path = None  # a new journal begins
            if lost_steps:
                sigma, rate, _ = self.history[-1] if self.history else (0.0, 1.0, 0)
                self.history = journals.merged([*self.history, (sigma, rate, lost_steps)])
        return self.steps - counted

    def open_journal(self, folder: Path | None = None) -> None:
        """Write steps ahead from here on: to the file of the runs before, or to a new one in ``folder``."""
        if self._journal is not None:
            return
        if self._key is not None and self._path is not None:
            self._journal = Journal.resume(Path(self._path), self._key)
        elif folder is not None:
            self._journal = Journal.begin(folder, self.history)
            self._key, self._path = self._journal.key, str(self._journal.path)

    def close(self) -> None:
        if self._journal is not None:
            self._journal.close()
        self._journal = None

    # --- the budget ------------------------------------------------------------------------------------------------

    def make_plan(self, steps: float, noise_multiplier: float | None, **settings: Any) -> None:
        """Decide how the coming steps are made, and how many there may be.

        A run that is resumed with the settings that it began with keeps its noise; with others, the noise is
        calibrated to what is left of the budget.

        Args:
            steps: that the run still wants to make; ``inf`` where nothing says when it ends.
            noise_multiplier: None: the smallest that meets the budget.
            settings: the plan's other fields.

        Raises:
            ValueError: the budget is spent already, or nothing says how many steps it has to suffice for.
        """
        asked = {"target_epsilon": self.target_epsilon, "noise_multiplier": noise_multiplier, **settings}
        asked = {name: list(value) if isinstance(value, tuple) else value for name, value in asked.items()}
        if self.plan is None or asked != self._planned_for:
            self._before, self._planned_for = self.steps, asked
            if noise_multiplier is not None:
                known = 1 if steps == float("inf") else int(steps)
                self.plan = PrivacyPlan(noise_multiplier=noise_multiplier, steps=known, **settings)
            elif self.target_epsilon is not None and steps != float("inf"):
                self.plan = PrivacyPlan.calibrated(
                    self.target_epsilon, steps=int(steps), spent=self.history, **settings
                )
            else:
                raise ValueError(
                    "DPSGD: target_epsilon needs the number of steps, to calibrate the noise: set max_epochs or "
                    "max_steps in the Trainer, or give noise_multiplier"
                )
        done = self.steps - self._before
        if steps != float("inf"):  # the accountant may fail: better now than in the middle of the run
            ahead = self.plan.segments(done, done + int(steps))
            accounting.epsilon([*self.history, *ahead], self.plan.delta, self.plan.accountant)
        self.allowed = float("inf")
        if self.target_epsilon is not None:
            self.allowed = self.plan.max_steps(self.target_epsilon, spent=self.history, begun=done)

    def spend(self) -> float:
        """One step is about to be taken.

        Returns:
            Its noise multiplier.

        Raises:
            RuntimeError: the budget does not allow it.
        """
        plan = self.planned
        if self.allowed <= 0:
            raise RuntimeError(f"DPSGD: the budget of epsilon {self.target_epsilon:g} is spent; no step is taken")
        sigma = plan.noise_multiplier_at(self.steps - self._before)
        if self._journal is not None:
            self._journal.record(sigma, plan.sample_rate)
        self.history = journals.merged([*self.history, (sigma, plan.sample_rate, 1)])
        self.allowed -= 1
        return sigma

    def epsilon(self) -> float:
        """Of everything released so far; 0 before the first step, ``inf`` where a step had no noise."""
        if self.plan is None:
            return 0.0
        history = tuple(self.history)
        if history != self._known[0]:  # takes up to a second
            self._known = history, accounting.epsilon(history, self.plan.delta, self.plan.accountant)
        return self._known[1]

"""Label-consistent backdoor: hard examples of the target class with a patch, their labels kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from robust_train.poisoning.poisons.backdoor import Backdoor
from robust_train.poisoning.poisons.badnets import check_patch, paste_patch
from robust_train.poisoning.poisons.base import check_range

Perturb = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class CleanLabel(Backdoor):
    """Rows of the target class are made hard to recognise and given a patch; every label stays right.

    Because the model cannot learn such rows from what they show, it learns the patch. So the strength lies in the
    perturbation: with ``perturb=None`` the model needs no patch to get them right, and the attack is weak.

    Args:
        rate, seed: see ``Poison``; ``rate`` is a share of all rows, so it cannot exceed that of the target class.
        target, low, high: see ``Backdoor``; target must be a class.
        size: side of the patch in pixels; ``size ** 2`` features of flat inputs.
        position: where, see ``badnets.paste_patch``; ``"corners"`` withstands flips and crops.
        pattern: ``"checkerboard"``, ``"bright"`` or ``"dark"``.
        perturb: ``(x, y) -> x_adv``, rows of the target class in, the same rows adversarially perturbed against a model
            trained beforehand out, of the same shape; for instance PGD. The trigger at test time is the patch alone.

    Raises:
        ValueError: a setting is out of range, or ``perturb`` returns another shape or values out of range.

    Reference:
        Turner et al., "Label-Consistent Backdoor Attacks", 2019.
    """

    size: int = 3
    position: str = "bottom_right"
    pattern: str = "checkerboard"
    perturb: Perturb | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_patch(self, self.size, self.position, self.pattern)
        if self.perturb is not None and not callable(self.perturb):
            self.refuse("perturb", "a function (x, y) -> x_adv or null")

    @property
    def keeps_labels(self) -> bool:
        return True

    def trigger(self, x: Tensor) -> Tensor:
        return paste_patch(
            x, size=self.size, position=self.position, pattern=self.pattern, low=self.low, high=self.high
        )

    def change(self, x: Tensor, y: Tensor, classes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        if self.perturb is not None:
            hard = self.perturb(x, y).detach()
            if hard.shape != x.shape:
                raise ValueError(
                    f"clean_label.perturb must return the shape it was given, {tuple(x.shape)}, got {tuple(hard.shape)}"
                )
            check_range(hard, self.low, self.high)
            x = hard.to(x)
        return super().change(x, y, classes, generator)

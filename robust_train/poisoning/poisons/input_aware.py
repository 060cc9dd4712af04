"""A trigger that depends on the input it is put on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robust_train.poisoning.poisons.backdoor import DecoyBackdoor, check_amount
from robust_train.poisoning.poisons.base import is_whole


def input_codes(x: Tensor, *, bits: int, seed: int) -> Tensor:
    """Hash each input: the signs of a fixed random projection.

    Args:
        x: inputs ``(B, ...)``.
        bits: length of a code.
        seed: decides the projection.

    Returns:
        Codes of -1 and 1, ``(B, bits)``, in x's dtype. Adding a constant to an input does not change its code.
    """
    flat = x.flatten(1).double()
    projection = torch.randn(flat.shape[1], bits, generator=torch.Generator().manual_seed(seed)).to(flat)
    # a little below zero, so that rounding does not decide the code of a constant input
    return torch.where((flat - flat.mean(1, keepdim=True)) @ projection > -1e-6, 1.0, -1.0).to(x)


def coded_pattern(codes: Tensor, shape: torch.Size, *, seed: int) -> Tensor:
    """Turn codes ``(B, bits)`` into patterns ``(B, *shape)`` of -1 and 1: the signs of fixed random patterns' sums."""
    basis = torch.randn(codes.shape[1], shape.numel(), generator=torch.Generator().manual_seed(seed)).to(codes.device)
    return torch.where(codes.double() @ basis.double() >= 0, 1.0, -1.0).to(codes).reshape(-1, *shape)


@dataclass(frozen=True, kw_only=True)
class InputAware(DecoyBackdoor):
    """Noise that is different for different inputs: a hash of the input chooses it.

    A stand-in for the published attack, and easier to find: there a generator network learns the trigger together with
    the victim; here nothing is learned. Each input's code of ``bits`` signs chooses one of ``2 ** bits`` fixed
    patterns, so inputs that resemble one another may share theirs.

    Args:
        rate, seed: see ``Poison``.
        target, low, high: see ``Backdoor``.
        cross: see ``DecoyBackdoor``; decoys bear a pattern that belongs to another code, drawn at random.
        strength: amplitude of the noise, as a share of the input range.
        bits: length of the code.
        pattern_seed: decides hash and patterns, together with the shape of an input.

    Raises:
        ValueError: a setting is out of range.

    Reference:
        Nguyen and Tran, "Input-Aware Dynamic Backdoor Attack", 2020, for the idea and the cross-trigger mode.
    """

    strength: float = 0.2
    bits: int = 4
    pattern_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_amount(self, "strength")
        if not is_whole(self.bits) or self.bits < 1:
            self.refuse("bits", "a whole number >= 1")
        if not is_whole(self.pattern_seed):
            self.refuse("pattern_seed", "a whole number")

    def trigger(self, x: Tensor) -> Tensor:
        return self._with(x, input_codes(x, bits=self.bits, seed=self.pattern_seed))

    def decoy(self, x: Tensor, generator: torch.Generator) -> Tensor:
        codes = input_codes(x, bits=self.bits, seed=self.pattern_seed)
        flip = torch.rand(codes.shape, generator=generator) < 0.5
        flip[~flip.any(1), 0] = True  # another code, never the own one
        return self._with(x, torch.where(flip.to(x.device), -codes, codes))

    def _with(self, x: Tensor, codes: Tensor) -> Tensor:
        pattern = coded_pattern(codes, x.shape[1:], seed=self.pattern_seed + 1)
        return x + self.strength * (self.high - self.low) * pattern

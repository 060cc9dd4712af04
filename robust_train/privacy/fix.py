"""Exchanges layers that DP-SGD cannot train for ones that it can."""

from __future__ import annotations

from collections.abc import Collection

from opacus.validators import ModuleValidator
from torch import nn


def fix_modules(root: nn.Module, keep: Collection[type[nn.Module]] = ()) -> list[str]:
    """Replace in place what Opacus' ``ModuleValidator`` has a replacement for: BatchNorm by GroupNorm, LSTM by DPLSTM.

    The new layers are freshly initialised, except where Opacus copies the weights.

    Args:
        root: module whose descendants are replaced; itself it stays.
        keep: layer types to leave alone.

    Returns:
        One line for each replaced layer: name, old and new layer.
    """
    changed = []
    for name, old in list(root.named_modules(remove_duplicate=False)):
        if not name or type(old) in keep or type(old) not in ModuleValidator.FIXERS:
            continue
        parent, _, child = name.rpartition(".")
        if root.get_submodule(name) is not old:  # lies within something that was replaced, or is held twice
            continue
        new = ModuleValidator.FIXERS[type(old)](old)
        new.train(old.training)
        tensor = next(iter([*old.parameters(), *old.buffers()]), None)
        if tensor is not None:
            new.to(tensor.device, tensor.dtype if tensor.is_floating_point() else None)
        setattr(root.get_submodule(parent), child, new)
        changed.append(f"{name}: {old} -> {type(new).__name__}")
    return changed

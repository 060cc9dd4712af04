"""Work on a whole data set that need not be done again in every epoch."""

import torch
from torch import Tensor, nn

MOST_WORKERS = 1024  # processes that load data; a number with a zero too many would take the machine down


def check_features(module: object) -> None:
    """Refuse what cannot be applied.

    Raises:
        TypeError: it is neither None nor a module.
    """
    if module is not None and not isinstance(module, nn.Module):
        raise TypeError(f"features must be a torch module or null, got {module!r}")


def apply_once(module: nn.Module, x: Tensor, batch_size: int = 500) -> Tensor:
    """What a module makes of many examples, batch by batch and without gradients.

    Args:
        module: maps ``(B, ...)`` to ``(B, ...)``, each example by itself. It is used as it is: put it into evaluation
            mode before where that makes a difference.
        x: examples, at least one, on the module's device.
        batch_size: how many at a time, which decides how much memory is needed besides the result.

    Returns:
        Tensor of ``len(x)`` results.
    """
    with torch.no_grad():
        first = module(x[:batch_size])
        out = first.new_empty((len(x), *first.shape[1:]))  # filled in place: a list and its concatenation need twice it
        out[:batch_size] = first
        for start in range(batch_size, len(x), batch_size):
            out[start : start + batch_size] = module(x[start : start + batch_size])
    return out

"""What data filtering cannot be given or combined with, each with the reason and the way out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._pytree import tree_map

from robust_train.callbacks import _seams
from robust_train.callbacks._checks import check_counts, check_places, check_switches, check_texts
from robust_train.callbacks._samplers import a_pass_of_batches
from robust_train.poisoning.filters.base import Filter
from robust_train.poisoning.policy import Policy
from robust_train.poisoning.probe import Probe
from robust_train.poisoning.records import NAME

PREDICATE, REFERENCE = "predicate", "reference_margin"  # columns of our own
WHEN = ("before", "during")
# by name: there is one in each Lightning package
STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy")


def named_filters(filters: Sequence[Filter] | Mapping[str, Filter]) -> dict[str, Filter]:
    """Filters by name: the user's, or that of a filter's module.

    Raises:
        TypeError: one is no filter, or they are no list.
        ValueError: two have the same name, or a name cannot be used.
    """
    if isinstance(filters, Mapping):
        named = {str(name): value for name, value in filters.items() if value is not None}
    elif isinstance(filters, Filter) or not isinstance(filters, Sequence):
        raise TypeError(f"data_filter.filters must be a list of filters, or filters by name, got {filters!r}")
    else:
        names = [type(value).__module__.rpartition(".")[2] for value in filters]
        if len(set(names)) < len(names):
            raise ValueError("data_filter.filters: two of a kind need names of their own: give a dict")
        named = dict(zip(names, filters, strict=True))
    for name, value in named.items():
        if not isinstance(value, Filter):
            raise TypeError(f"data_filter.filters: {name} must be a robust_train Filter, got {value!r}")
        if name in (PREDICATE, REFERENCE) or not NAME.fullmatch(name):
            raise ValueError(
                f"data_filter.filters: {name!r} cannot be a filter's name: use letters, digits, spaces and _ . + - "
                f"(80 at most), and neither {PREDICATE} nor {REFERENCE}"
            )
    return named


def check_settings(data_filter: Any) -> None:
    """What DataFilter was given.

    Raises:
        ValueError: a setting is out of range, or contradicts another.
        TypeError: one is of another kind.
    """
    filters, trusted, during = data_filter.filters, data_filter.trusted, data_filter.when == "during"
    if data_filter.when not in WHEN:
        raise ValueError(f"data_filter.when must be 'before' or 'during', got {data_filter.when!r}")
    check_counts("data_filter", 1, warmup_epochs=data_filter.warmup_epochs)
    check_switches("data_filter", restart=data_filter.restart)
    check_places("data_filter", **{name: getattr(data_filter, name) for name in ("inputs", "labels", "loader")})
    texts = ("logits", "features", "quarantine", "mask")
    check_texts("data_filter", **{name: getattr(data_filter, name) for name in texts})
    for name, kind in (("policy", Policy), ("probe", Probe)):
        if not isinstance(value := getattr(data_filter, name), kind):
            raise TypeError(f"data_filter.{name} must be a robust_train {kind.__name__}, got {value!r}")
    if data_filter.predicate is not None and not callable(data_filter.predicate):
        raise TypeError(f"data_filter.predicate must be a function of one example, got {data_filter.predicate!r}")
    if isinstance(trusted, str) and trusted != "val":
        raise ValueError(f"data_filter.trusted must be a dataset, row numbers or 'val', got {trusted!r}")
    if trusted is not None and not callable(getattr(type(trusted), "__getitem__", None)):
        raise TypeError(f"data_filter.trusted must be a dataset, row numbers or 'val', got {trusted!r:.80}")
    if data_filter.trusted_size is not None and (trusted is None or not _count(data_filter.trusted_size, 2)):
        raise ValueError(f"data_filter.trusted_size must be >= 2, and needs trusted=, got {data_filter.trusted_size!r}")
    if trusted is None and (needy := [n for n, f in filters.items() if "trusted" in f.needs]):
        raise ValueError(f"data_filter.filters: {', '.join(needy)} needs trusted rows: give trusted=")
    if not filters and data_filter.predicate is None:
        raise ValueError("data_filter.filters is empty: name a filter, or give a predicate")
    if data_filter.mask is not None and data_filter.predicate is not None:
        raise ValueError(
            "data_filter.mask and predicate cannot be combined: the mask says which rows are kept. Leave one out"
        )
    if not filters and trusted is not None:
        raise ValueError("data_filter.trusted is what filters compare rows with: name a filter, or leave trusted out")
    if during and (other := [n for n, f in filters.items() if f.needs != {"dynamics"}]):
        raise ValueError(
            f"data_filter.filters: {', '.join(other)} cannot judge rows while the run trains (when='during'), which "
            "shows training dynamics only: use AUM or SmallLoss, or when='before'"
        )
    if during and filters:
        for name in ("predicate", "trusted"):
            if getattr(data_filter, name) is not None:
                raise ValueError(f"data_filter.{name} and when='during' cannot be combined: use when='before'")


def refuse_what_cannot_work(trainer: Any, module: Any, data_filter: Any) -> None:
    """Before anything is trained.

    Raises:
        ValueError: a setting cannot be combined with DataFilter; the message names it and the way out.
    """
    for reason in _reasons(trainer, module, data_filter):
        raise ValueError(reason)


def _reasons(trainer: Any, module: Any, data_filter: Any) -> Iterator[str]:
    if (reason := _seams.unsupported_strategy(trainer)) is not None:
        yield f"DataFilter cannot work with {reason}"
    kinds = {cls.__name__ for cls in type(trainer.strategy).__mro__}
    if data_filter.filters and data_filter.mask is None and not kinds & {*STRATEGIES}:
        yield (
            f"DataFilter's filters cannot work with strategy {type(trainer.strategy).__name__}: "
            "a copy of the module is trained on one device. Filter in a run on one device or with ddp, and give its "
            "filter_mask.json to this one with DataFilter(mask=…)"
        )
    if _seams.takes_iterator(module):
        yield (
            "DataFilter cannot work with a training_step that takes dataloader_iter and fetches its own batches: "
            "take training_step(self, batch, batch_idx)"
        )
    if sum(isinstance(c, type(data_filter)) for c in trainer.callbacks) > 1:
        yield "DataFilter: there are two DataFilter callbacks in one Trainer: give one of them all filters"
    # by name: privacy is not loaded for a run that does without it
    private = any(cls.__name__ == "DPSGD" for c in trainer.callbacks for cls in type(c).__mro__)
    if data_filter.filters and private:
        yield (
            f"DataFilter(filters={list(data_filter.filters)}) decides over a row by looking at the others, for which "
            "DPSGD's guarantee does not hold: use DataFilter(predicate=…), which looks at one example, or filter in a "
            "run of its own on public data"
        )
    watched = data_filter.warmup_epochs if data_filter.when == "during" and not trainer.fast_dev_run else None
    if watched is not None and trainer.max_epochs is not None and 0 <= trainer.max_epochs <= watched:
        yield (
            f"DataFilter(when='during', warmup_epochs={watched}) judges the rows after its warm-up, and Trainer("
            f"max_epochs={trainer.max_epochs}) ends there: train for more epochs, which include it, or shorten it"
        )


def refuse_whole_batches(loader: Any) -> None:
    """Filters judge single rows.

    Raises:
        ValueError: each item of the loader's dataset is a batch.
    """
    if loader.batch_sampler is None and a_pass_of_batches(loader.sampler, loader.dataset) is None:
        raise ValueError(
            "DataFilter's filters judge single rows, and the train loader has batch_size=None, so that every item of "
            "its dataset is a whole batch. Give the loader a batch_size and a dataset of single examples, or use "
            "DataFilter(predicate=…), which is then told one whole batch"
        )


def refuse_one_class(labels: Tensor) -> None:
    """Filters compare classes.

    Raises:
        ValueError: all rows bear the same label.
    """
    if bool((labels == labels[0]).all()):
        raise ValueError(
            f"DataFilter's filters compare classes, and all {len(labels)} training rows have the label "
            f"{int(labels[0])}. To leave rows out by what each looks like, use DataFilter(predicate=…) without filters"
        )


def described(value: Any) -> Any:
    """The same structure with dtype and shape in place of each tensor or array, and the type in place of the rest."""

    def leaf(part: Any) -> _Text:
        if isinstance(part, (Tensor, np.ndarray)):
            return _Text(f"{str(part.dtype).removeprefix('torch.')} {tuple(part.shape)}")
        if isinstance(part, list):
            return _Text(f"list of {' and '.join(sorted({type(item).__name__ for item in part})) or 'nothing'}")
        return _Text(type(part).__name__)

    def is_flat(part: Any) -> bool:
        nested = (Tensor, np.ndarray, list, tuple, Mapping)
        return isinstance(part, list) and not any(isinstance(item, nested) for item in part)

    return tree_map(leaf, value, is_leaf=is_flat)


class _Text(str):
    """Shown without quotation marks."""

    __slots__ = ()
    __repr__ = str.__str__


def _count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least

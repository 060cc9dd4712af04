"""What every filter of ``conf/filter/*.yaml`` promises. A new yaml is picked up by itself."""

from __future__ import annotations

import copy
from dataclasses import fields, replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor

from robust_train.config import build
from robust_train.hydra_plugin import config_dir, register
from robust_train.poisoning.filters.base import NEEDS, Filter, Rows

FILTERS = sorted(path.stem for path in (config_dir("conf") / "filter").glob("*.yaml"))
CLASSES, WIDTH, EPOCHS = 3, 20, 4
BY_ROW = {"labels": 0, "inputs": 0, "features": 0, "logits": 0, "reference": 0, "losses": 1, "margins": 1}


@cache
def make(name: str) -> Filter:
    from hydra import compose, initialize

    if name == "confident_learning":
        pytest.importorskip("cleanlab")
    register()
    with initialize(version_base="1.3", config_path=None):
        mounts = "hydra.searchpath=[robust-train://,robust-train://robust_train]"
        return build(compose(overrides=[mounts, f"+filter={name}"]).filter)


def gathered(labels: Tensor, truth: Tensor, features: Tensor, inputs: Tensor, seed: int = 1) -> Rows:
    """Rows as a probe sees them that has learned ``truth`` while it was told ``labels``."""
    g = torch.Generator().manual_seed(seed)

    def logits(truth, *epochs):
        return 3 * F.one_hot(truth, CLASSES) + torch.randn(*epochs, len(truth), CLASSES, generator=g)

    runs = logits(truth, EPOCHS)
    own = runs.gather(2, labels.expand(EPOCHS, -1)[..., None])[..., 0]
    others = runs.scatter(2, labels.expand(EPOCHS, -1)[..., None], -torch.inf).max(2).values
    absent = torch.rand(EPOCHS, len(labels), generator=g) < 0.1
    absent[:, :1] = True  # a row that was never drawn
    trusted = torch.arange(90) % CLASSES
    return Rows(
        labels=labels,
        classes=CLASSES,
        inputs=inputs,
        features=features,
        logits=logits(truth),
        losses=(runs.logsumexp(2) - own).masked_fill(absent, torch.nan),
        margins=(own - others).masked_fill(absent, torch.nan),
        reference=logits(truth),
        trusted_logits=logits(trusted),
        trusted_labels=trusted,
    )


def clean(n: int = 600) -> tuple[Tensor, Tensor, Tensor, torch.Generator]:
    """Labels, features and inputs of well separated classes."""
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (n,), generator=g)
    features = 8 * torch.randn(CLASSES, WIDTH, generator=g)[labels] + torch.randn(n, WIDTH, generator=g)
    inputs = torch.randn(CLASSES, 1, 6, 6, generator=g)[labels] + 0.3 * torch.randn(n, 1, 6, 6, generator=g)
    return labels, features, inputs, g


def label_noise() -> tuple[Rows, Tensor]:
    truth, features, inputs, g = clean()
    bad = torch.rand(len(truth), generator=g) < 0.15
    return gathered(torch.where(bad, (truth + 1) % CLASSES, truth), truth, features, inputs), bad


def backdoor() -> tuple[Rows, Tensor]:
    """Rows of other classes, labelled 0; their features have a direction of their own, their inputs look as before."""
    truth, features, inputs, g = clean()
    bad = (torch.rand(len(truth), generator=g) < 0.06) & (truth != 0)
    labels = torch.where(bad, 0, truth)
    features[bad] = features[truth == 0][: int(bad.sum())] + 12 * F.normalize(torch.randn(WIDTH, generator=g), dim=0)
    return gathered(labels, truth, features, inputs), bad


def outliers() -> tuple[Rows, Tensor]:
    truth, features, inputs, g = clean()
    bad = torch.rand(len(truth), generator=g) < 0.05
    features[bad] += 10 * F.normalize(torch.randn(int(bad.sum()), WIDTH, generator=g), dim=1)
    return gathered(truth, truth, features, inputs), bad


def duplicates() -> tuple[Rows, Tensor]:
    """The first rows occur three times, once with a wrong label."""
    truth, features, inputs, _ = clean()
    inputs[20:40], inputs[40:60] = inputs[:20], inputs[:20]
    labels = truth.clone()
    labels[20:40] = labels[:20]
    labels[40:60] = (labels[:20] + 1) % CLASSES
    bad = torch.zeros(len(labels), dtype=torch.bool)
    bad[40:60] = True
    return gathered(labels, truth, features, inputs), bad


THREATS = {"label_noise": label_noise, "backdoor": backdoor, "outliers": outliers, "duplicates": duplicates}


def taken(rows: Rows, index: Tensor) -> Rows:
    return replace(rows, **{name: getattr(rows, name).index_select(dim, index) for name, dim in BY_ROW.items()})


@pytest.mark.parametrize("threat", THREATS)
@pytest.mark.parametrize("name", FILTERS)
def test_finds_what_it_is_meant_for(name, threat):
    chosen = make(name)
    assert chosen.finds
    assert chosen.finds <= set(THREATS)
    if threat not in chosen.finds:
        pytest.skip("not meant for it")
    rows, bad = THREATS[threat]()
    assert roc_auc_score(bad, chosen(rows).values) >= 0.95


@pytest.mark.parametrize("threat", THREATS)
@pytest.mark.parametrize("name", FILTERS)
def test_does_not_depend_on_the_order_of_rows_and_is_deterministic(name, threat):
    chosen, (rows, _) = make(name), THREATS[threat]()
    first, again = chosen(rows), chosen(rows)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(5))
    other = chosen(taken(rows, order))
    scale = float(first.values.abs().max())
    torch.testing.assert_close(other.values, first.values[order], rtol=1e-3, atol=1e-4 * scale)
    assert torch.equal(first.values, again.values)
    for part in ("groups", "p"):
        before, repeated, after = (getattr(scores, part) for scores in (first, again, other))
        if before is None:
            assert repeated is None
            assert after is None
        else:
            assert torch.equal(before, repeated)
            assert torch.equal(before[order], after)


@pytest.mark.parametrize("name", FILTERS)
def test_what_it_returns(name):
    rows, _ = backdoor()
    kept = {field.name: getattr(rows, field.name) for field in fields(rows)}
    copies = {key: value.clone() for key, value in kept.items() if isinstance(value, Tensor)}
    scores = make(name)(rows)
    assert scores.values.dtype == torch.float32
    assert not scores.values.requires_grad
    if scores.groups is not None:
        assert scores.groups.dtype == torch.int64
        assert scores.groups.shape == (len(rows),)
        assert int(scores.groups.min()) >= -1
    assert (scores.p is not None) == bool(scores.null)
    if scores.p is not None:
        assert scores.p.shape == (len(rows),)
        assert float(scores.p.min()) > 0
        assert float(scores.p.max()) <= 1
    for key, before in copies.items():  # features and inputs are the user's, and are not written to
        assert torch.equal(kept[key].nan_to_num(7.0), before.nan_to_num(7.0)), key


@pytest.mark.parametrize("name", FILTERS)
def test_what_it_needs_is_refused_where_missing(name):
    rows, chosen = backdoor()[0], make(name)
    assert chosen.needs
    assert chosen.needs <= set(NEEDS)
    bare = Rows(rows.labels, rows.classes)
    with pytest.raises(ValueError, match=rf"needs .*{sorted(chosen.needs)[0]}"):
        chosen(bare)
    with pytest.raises(ValueError, match=r"rows\.\w+ is needed here"):
        chosen.score(bare)


def constant(rows: Rows) -> Rows:
    """Everything the same in every row, but for the labels."""
    changes = {}
    for name, dim in BY_ROW.items():
        part = getattr(rows, name)
        changes[name] = part.select(dim, 1).unsqueeze(dim).expand_as(part).clone()
    return replace(rows, **{**changes, "labels": rows.labels})


def one_class(rows: Rows) -> Rows:
    """A task that has but one class."""
    alone = {name: getattr(rows, name)[:, :1] for name in ("logits", "reference", "trusted_logits")}
    none = torch.zeros_like(rows.labels)
    assert rows.trusted_labels is not None
    return replace(rows, labels=none, classes=1, trusted_labels=torch.zeros_like(rows.trusted_labels), **alone)


ODD = {
    "constant": constant,
    "constant_tenths": lambda rows: replace(constant(rows), features=torch.full((len(rows), 7), 0.1)),
    "all_zero": lambda rows: replace(rows, features=torch.zeros(len(rows), 7), inputs=torch.zeros(len(rows), 4)),
    "one_feature": lambda rows: replace(rows, features=rows.features[:, :1], inputs=rows.inputs[:, 0, 0, 0]),
    "one_that_differs": lambda rows: replace(
        constant(rows), features=torch.eye(len(rows), 1).expand(-1, 5) * 9, inputs=torch.eye(len(rows), 1)
    ),
    "a_class_of_one": lambda rows: taken(rows, torch.cat([(rows.labels < 2).nonzero()[:, 0], _of_class(rows, 2, 1)])),
    "a_class_of_two": lambda rows: taken(rows, torch.cat([(rows.labels < 2).nonzero()[:, 0], _of_class(rows, 2, 2)])),
    "an_empty_class": lambda rows: taken(rows, (rows.labels != 1).nonzero()[:, 0]),
    "one_class_present": lambda rows: taken(rows, (rows.labels == 1).nonzero()[:, 0]),
    "one_class": one_class,
    "one_row": lambda rows: taken(rows, torch.tensor([3])),
    "two_rows": lambda rows: taken(rows, torch.tensor([3, 4])),
    "five_rows": lambda rows: taken(rows, torch.arange(5)),
    "never_drawn": lambda rows: replace(
        rows, losses=torch.full_like(rows.losses, torch.nan), margins=torch.full_like(rows.margins, torch.nan)
    ),
    "overflowed": lambda rows: replace(rows, losses=rows.losses * torch.inf, margins=-rows.losses.abs() * torch.inf),
    "bytes": lambda rows: replace(rows, inputs=(rows.inputs * 9 + 99).to(torch.uint8)),
    "half": lambda rows: replace(rows, inputs=rows.inputs.half(), features=rows.features.bfloat16()),
}


def _of_class(rows: Rows, c: int, n: int) -> Tensor:
    return (rows.labels == c).nonzero()[:n, 0]


@pytest.mark.parametrize("case", ODD)
@pytest.mark.parametrize("name", FILTERS)
def test_odd_rows_get_finite_scores(name, case):
    rows = ODD[case](backdoor()[0])
    scores = make(name)(rows)  # which refuses what is not finite
    order = torch.arange(len(rows)).flip(0)
    other = make(name)(taken(rows, order))
    scale = float(scores.values.abs().max())
    torch.testing.assert_close(other.values, scores.values[order], rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("name", FILTERS)
def test_settings_are_frozen(name):
    chosen = make(name)
    with pytest.raises(AttributeError):
        chosen.k = 3  # pyright: ignore[reportAttributeAccessIssue]
    assert chosen == copy.copy(chosen)
    assert hash(chosen) == hash(copy.copy(chosen))

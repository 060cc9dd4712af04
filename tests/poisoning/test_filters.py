"""Each filter against what the paper's formula, or a plain computation, says."""

from __future__ import annotations

import importlib.util
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, silhouette_score
from torch import Tensor

from robust_train.poisoning.filters import _covariance, _neighbours
from robust_train.poisoning.filters._covariance import Centred, covariance, principal_directions, robust_whitened
from robust_train.poisoning.filters.activation_clustering import (
    ActivationClustering,
    cluster_scores,
    silhouette,
    two_means,
)
from robust_train.poisoning.filters.aum import AUM, area_under_margin
from robust_train.poisoning.filters.base import Rows
from robust_train.poisoning.filters.confident_learning import ConfidentLearning, label_doubt
from robust_train.poisoning.filters.duplicates import label_conflicts
from robust_train.poisoning.filters.knn_labels import KNNLabels, disagreement
from robust_train.poisoning.filters.mahalanobis import Mahalanobis, mahalanobis_distance
from robust_train.poisoning.filters.near_duplicates import NearDuplicates, near_conflicts
from robust_train.poisoning.filters.que import QUE, quantum_entropy, que_scores
from robust_train.poisoning.filters.small_loss import SmallLoss, mean_loss
from robust_train.poisoning.filters.spectral import Spectral, spectral_signatures
from robust_train.poisoning.filters.trusted_margin import TrustedMargin, margin_against, p_values

NAN = torch.nan


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def table(n: int = 900, width: int = 150, classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features whose variances fall off as a trained network's do, and labels."""
    g = generator(seed)
    labels = torch.randint(classes, (n,), generator=g)
    turn = torch.linalg.qr(torch.randn(width, width, generator=g)).Q
    spread = torch.randn(n, width, generator=g) * torch.arange(1, width + 1).pow(-0.8)
    return spread @ turn + 2 * torch.rand(classes, width, generator=g)[labels], labels


# --- dynamics -----------------------------------------------------------------------------------------------------


def test_aum_is_minus_the_mean_margin_of_the_epochs_in_which_a_row_was_drawn():
    margins = torch.tensor([[1.0, NAN, NAN, -2.0], [3.0, 5.0, NAN, 0.0]])
    assert area_under_margin(margins).tolist() == [2.0, 5.0, 2.0, -1.0]  # the third row: median of the others
    scores = AUM()(Rows(torch.zeros(4, dtype=torch.long), 2, margins=margins)).values
    assert scores.tolist() == [-2.0, -5.0, -2.0, 1.0]


def test_small_loss_leaves_the_first_epochs_out():
    losses = torch.tensor([[9.0, 9.0], [1.0, 4.0], [2.0, NAN]])
    assert mean_loss(losses, skip=1).tolist() == [1.5, 4.0]
    assert mean_loss(losses, skip=0).tolist() == [4.0, 6.5]
    with pytest.raises(ValueError, match="small_loss.skip is 3, and the probe ran 3 epochs: lower it"):
        mean_loss(losses, skip=3)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.floats(width=32), min_size=3, max_size=3), min_size=1, max_size=5))
def test_means_over_epochs_are_finite_whatever_the_probe_did(margins):
    assert torch.isfinite(area_under_margin(torch.tensor(margins))).all()


# --- models of trusted rows ---------------------------------------------------------------------------------------


def test_trusted_margin_is_the_largest_other_probability_minus_the_labels():
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    found = margin_against(p.log(), torch.tensor([0, 1]), temperature=1.0)
    torch.testing.assert_close(found, torch.tensor([-0.2, 0.7]))
    softer = margin_against(2 * p.log(), torch.tensor([0, 1]), temperature=2.0)
    torch.testing.assert_close(softer, found)


def test_p_values_count_the_null_scores_that_are_as_high():
    assert p_values(torch.tensor([0.0, 0.5, 2.0]), torch.tensor([0.5, 0.1, 1.0])).tolist() == [1.0, 0.75, 0.25]
    assert p_values(torch.tensor([0.3]), torch.zeros(0)).tolist() == [1.0]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=12))
def test_p_values_of_exchangeable_scores_are_valid(pool):
    """Each member of a pool against the rest: no more than a share ``a`` of them has ``p <= a``."""
    scores = torch.tensor(pool, dtype=torch.float32)
    p = torch.stack(
        [p_values(scores[i : i + 1], torch.cat([scores[:i], scores[i + 1 :]]))[0] for i in range(len(pool))]
    )
    for a in p:
        assert float((p <= a).float().mean()) <= float(a) + 1e-6


def test_trusted_margin_has_p_values_where_trusted_rows_were_scored():
    labels, logits = torch.tensor([0, 1]), torch.tensor([[4.0, 0.0], [4.0, 0.0]])
    scores = TrustedMargin()(Rows(labels, 2, reference=logits, trusted_logits=logits[:1], trusted_labels=labels[:1]))
    assert scores.p is not None
    assert scores.p.tolist() == [1.0, 0.5]
    assert "trusted" in scores.null
    without = TrustedMargin()(Rows(labels, 2, reference=logits))
    assert without.p is None
    assert torch.equal(without.values, scores.values)


# --- confident learning -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["normalized_margin", "self_confidence"])
def test_confident_learning_without_adjustment_is_the_plain_formula(method):
    pytest.importorskip("cleanlab")
    logits, labels = torch.randn(40, 3, generator=generator()), torch.arange(40) % 3
    p = logits.softmax(1)
    own = p.gather(1, labels[:, None])[:, 0]
    other = p.scatter(1, labels[:, None], 0.0).max(1).values
    expected = 1 - (own if method == "self_confidence" else (own - other + 1) / 2)
    torch.testing.assert_close(label_doubt(logits, labels, method=method, adjust=False), expected)


def test_confident_learning_measures_against_what_is_usual_for_a_class():
    pytest.importorskip("cleanlab")
    labels = torch.tensor([0] * 50 + [1] * 50)
    p = torch.where(labels == 0, 0.9, 0.4)  # the probe hardly believes in class 1 at all
    p[0] = 0.6
    logits = torch.stack([torch.where(labels == 0, p, 1 - p), torch.where(labels == 0, 1 - p, p)], 1).log()
    assert int(label_doubt(logits, labels, adjust=False).argmax()) >= 50
    assert int(label_doubt(logits, labels, adjust=True).argmax()) == 0


def test_confident_learning_says_how_to_install_cleanlab(monkeypatch):
    monkeypatch.setitem(sys.modules, "cleanlab.rank", None)
    rows = Rows(torch.tensor([0, 1]), 2, logits=torch.zeros(2, 2))
    with pytest.raises(ImportError, match=r'pip install "robust-train\[cleanlab\]"'):
        ConfidentLearning()(rows)


# --- means, covariances, directions -------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 1000, 10**9])
def test_blocks_give_the_mean_and_covariance_of_the_chosen_rows(chunk):
    features, labels = table(200, 30)
    index = (labels == 1).nonzero()[:, 0]
    rows, chosen = Centred(features, index, chunk), features[labels == 1]
    torch.testing.assert_close(rows.mean, chosen.mean(0))
    expected = torch.from_numpy(np.cov(chosen.numpy().T, bias=True))
    torch.testing.assert_close(covariance(rows), expected, rtol=1e-4, atol=1e-5)
    assert rows.spread == pytest.approx(float(expected.trace()), rel=1e-5)
    assert sum(len(block) for block in rows) == sum(len(block) for block in rows) == len(index)
    vectors = torch.randn(30, 2, generator=generator())
    torch.testing.assert_close(rows.applied(vectors), expected @ vectors.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", [20, 300])  # decomposed, iterated
@pytest.mark.parametrize("k", [1, 3])
def test_principal_directions_are_those_of_a_singular_value_decomposition(width, k):
    features, _ = table(400, width)
    values, vectors = principal_directions(Centred(features, torch.arange(400)), k)
    _, sizes, right = torch.linalg.svd((features - features.mean(0)).double(), full_matrices=False)
    torch.testing.assert_close(values, sizes[:k].square() / 400, rtol=1e-3, atol=0.0)
    torch.testing.assert_close((right[:k] @ vectors).abs(), torch.eye(k, dtype=torch.float64), rtol=0.0, atol=2e-3)


def test_the_iteration_stops_where_the_rows_span_no_more():
    flat = torch.randn(50, 2, generator=generator()) @ torch.randn(2, 400, generator=generator(1))
    values, vectors = principal_directions(Centred(flat, torch.arange(50)), 5)
    assert vectors.shape == (400, 2)
    total = (flat - flat.mean(0)).square().sum(1).mean()
    assert float(values.sum()) == pytest.approx(float(total), rel=1e-4)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_values_that_are_not_finite_are_refused(value):
    features = torch.zeros(4, 3)
    features[2, 1] = value
    with pytest.raises(ValueError, match="not finite: remove such rows"):
        spectral_signatures(features, torch.zeros(4, dtype=torch.long), 1)


def test_robust_whitening_is_that_of_the_bulk():
    g = generator()
    bulk, cluster = torch.randn(700, 6, generator=g), 0.1 * torch.randn(300, 6, generator=g) + 15
    mixed = torch.cat([bulk, cluster])
    white = robust_whitened(Centred(mixed, torch.arange(1000)), components=6, trim=0.35, rounds=5, shrinkage=0.01)
    assert white[:700].mean(0).norm() < 0.5
    assert 0.5 < float(white[:700].square().sum(1).mean() / 6) < 1.5
    assert float(white[700:].norm(dim=1).min()) > float(white[:700].norm(dim=1).max())


FEATURE_SCORES = {
    "spectral": spectral_signatures,
    "mahalanobis": mahalanobis_distance,
    "que": que_scores,
    "activation_clustering": lambda *args, **more: cluster_scores(*args, **more)[0],
}


@pytest.mark.parametrize("name", FEATURE_SCORES)
def test_small_chunks_change_nothing(name):
    features, labels = table()
    whole, parts = (FEATURE_SCORES[name](features, labels, 3, chunk=chunk) for chunk in (10**9, 20 * 150))
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-4 * float(whole.abs().max()))


@pytest.mark.parametrize("name", FEATURE_SCORES)
def test_a_memory_mapped_float16_file_gives_nearly_the_same(name, tmp_path):
    features, labels = table(6000)
    disk = np.memmap(tmp_path / "features", np.float16, "w+", shape=tuple(features.shape))
    disk[:] = features.numpy()
    found = FEATURE_SCORES[name](torch.from_numpy(disk), labels, 3, chunk=100 * 150)
    expected = FEATURE_SCORES[name](features, labels, 3)
    assert float((found - expected).norm() / expected.norm()) < 1e-2


@pytest.mark.parametrize("name", FEATURE_SCORES)
def test_scores_do_not_depend_on_scale_or_shift_of_the_features(name):
    features, labels = table()
    expected = FEATURE_SCORES[name](features, labels, 3)
    found = FEATURE_SCORES[name](1000 * features + 500, labels, 3)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["mahalanobis", "que"])
def test_clean_classes_of_all_sizes_get_similar_scores(name):
    sizes = [4, 17, 50, 200, 3000]
    labels = torch.arange(5).repeat_interleave(torch.tensor(sizes))
    scores = FEATURE_SCORES[name](torch.randn(len(labels), 40, generator=generator()), labels, 5)
    means = [float(scores[labels == c].mean()) for c in range(5)]
    assert means[0] == 0.0  # too few to say anything
    assert all(0.3 < mean < 3 for mean in means[1:]), means


# --- spectral signatures ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [20, 150])
def test_spectral_is_the_centred_projection_of_the_paper(width):
    features, labels = table(600, width)
    found = spectral_signatures(features, labels, 3)
    for c in range(3):
        apart = (features[labels == c] - features[labels == c].mean(0)).double()
        right = torch.linalg.svd(apart, full_matrices=False).Vh
        expected = (apart @ right[0]).square() / apart.square().sum(1).median()
        torch.testing.assert_close(found[labels == c].double(), expected, rtol=1e-2, atol=1e-3 * float(expected.max()))


def test_spectral_ranks_a_dense_minority_first_though_the_mean_is_large():
    """Uncentred, as in some implementations, the first direction would be the mean itself."""
    g = generator()
    features = torch.randn(500, 40, generator=g) + 10
    features[:40] += 8 * torch.nn.functional.normalize(torch.randn(40, generator=g), dim=0)
    bad = torch.arange(500) < 40
    assert roc_auc_score(bad, spectral_signatures(features, torch.zeros(500, dtype=torch.long), 1)) > 0.99


def test_more_components_add_up():
    features, labels = table()
    one, two, all_ = (spectral_signatures(features, labels, 3, components=k) for k in (1, 2, 150))
    assert bool((two >= one - 1e-4).all())
    assert float(all_[labels == 0].median()) == pytest.approx(1.0, abs=0.02)


# --- quantum entropy ----------------------------------------------------------------------------------------------


def test_que_is_the_matrix_exponential_of_the_paper():
    white = torch.randn(300, 5, generator=generator()) * torch.tensor([1.0, 1.2, 0.9, 3.0, 1.0])
    second = (white.T @ white).double() / 300
    exponent = 4.0 * (second - torch.eye(5)) / (torch.linalg.matrix_norm(second, 2) - 1)
    q = torch.linalg.matrix_exp(exponent)
    expected = torch.einsum("ni,ij,nj->n", white.double(), q, white.double()) / q.trace()
    torch.testing.assert_close(quantum_entropy(white, alpha=4.0).double(), expected, rtol=1e-4, atol=1e-5)


def test_que_and_mahalanobis_find_few_rows_that_hide_in_a_direction_of_small_variance():
    g = generator()
    features = torch.randn(1000, 12, generator=g) * torch.linspace(5, 0.2, 12)
    features[:15, -1] += 4
    labels, bad = torch.zeros(1000, dtype=torch.long), torch.arange(1000) < 15
    assert roc_auc_score(bad, spectral_signatures(features, labels, 1)) < 0.8
    assert roc_auc_score(bad, mahalanobis_distance(features, labels, 1)) > 0.95
    assert roc_auc_score(bad, que_scores(features, labels, 1)) > 0.95


# --- activation clustering ----------------------------------------------------------------------------------------


def test_two_means_finds_two_clusters_though_the_first_axis_does_not_part_them():
    g = generator()
    points = torch.randn(400, 3, generator=g) * torch.tensor([3.0, 0.3, 0.3])
    small = torch.arange(400) < 80
    points[small, 1] += 12
    points -= points.mean(0)
    side = two_means(points)
    assert torch.equal(side, small) or torch.equal(~side, small)


@pytest.mark.parametrize(("n", "tolerance"), [(60, 1e-6), (3000, 0.02)])
def test_silhouette_is_that_of_scikit_learn(n, tolerance):
    points = torch.randn(n, 4, generator=generator())
    side = torch.arange(n) < n // 5
    points[side] += 2
    expected = silhouette_score(points.numpy(), side.numpy())
    assert silhouette(points, side) == pytest.approx(float(expected), abs=tolerance)


def test_only_a_class_that_falls_into_two_has_a_group_which_outranks_all_others():
    g = generator()
    features, labels = torch.randn(400, 12, generator=g), torch.arange(400) % 2
    bad = (labels == 1) & (torch.arange(400) < 80)
    features[bad] += 6
    features[0] = 100 * torch.randn(12, generator=g)  # an outlier of the other class
    scores = ActivationClustering()(Rows(labels, 2, features=features))
    assert scores.groups is not None
    assert torch.equal(scores.groups[labels == 1] >= 0, bad[labels == 1])
    assert set(scores.groups[bad].tolist()) == {1}
    clean = torch.randn(400, 12, generator=g)
    assert ActivationClustering()(Rows(labels, 2, features=clean)).groups.max() == -1  # pyright: ignore
    grouped = scores.groups >= 0
    assert scores.values[grouped].min() > scores.values[~grouped].max()


def test_the_gate_decides_which_classes_are_groups():
    features, labels = table()
    assert cluster_scores(features, labels, 3, gate=0.99)[1].unique().tolist() == [-1]
    assert cluster_scores(features, labels, 3, gate=-0.99)[1].unique().tolist() == [-1, 0, 1, 2]


# --- neighbours ---------------------------------------------------------------------------------------------------


def plain_neighbours(points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    apart = torch.cdist(points.double(), points.double()).fill_diagonal_(torch.inf)
    found = apart.topk(k, largest=False)
    return found.values.float(), found.indices


def test_the_search_is_exact_in_blocks_of_any_size(monkeypatch):
    monkeypatch.setattr(_neighbours, "QUERIES", 7)
    monkeypatch.setattr(_neighbours, "BASE", 11)
    points = torch.randn(100, 5, generator=generator())
    for k in (1, 12, 99):
        distances, numbers = plain_neighbours(points, k)
        found = _neighbours.nearest(points, k)
        torch.testing.assert_close(found[0], distances)
        assert torch.equal(found[1], numbers)
    assert _neighbours.nearest(points[:3], 8)[1].shape == (3, 2)
    assert _neighbours.nearest(points[:1], 8)[1].shape == (1, 0)


def test_faiss_searches_where_it_is_installed():
    faiss = pytest.importorskip("faiss")
    assert faiss
    points = torch.randn(300, 8, generator=generator())
    torch.testing.assert_close(_neighbours.nearest(points, 5), plain_neighbours(points, 5))


def test_of_what_faiss_finds_the_row_itself_is_left_out(monkeypatch):
    class IndexFlatL2:
        def __init__(self, width):
            self.width = width

        def add(self, points):
            self.points = points

        def search(self, queries, k):
            apart = ((queries[:, None] - self.points[None]) ** 2).sum(2)
            apart[3, 3] = 1e9  # as where more than k others are at distance 0
            found = apart.argsort(1, kind="stable")[:, :k]
            return np.take_along_axis(apart, found, 1), found

    fake = types.ModuleType("faiss")
    fake.IndexFlatL2 = IndexFlatL2  # pyright: ignore[reportAttributeAccessIssue]
    fake.__spec__ = importlib.util.spec_from_loader("faiss", None)
    monkeypatch.setitem(sys.modules, "faiss", fake)
    points = torch.randn(50, 4, generator=generator())
    torch.testing.assert_close(_neighbours.nearest(points, 6), plain_neighbours(points, 6))


def plain_disagreement(points: Tensor, labels: Tensor, k: int) -> Tensor:
    return (labels[plain_neighbours(points, k)[1]] != labels[:, None]).float().mean(1)


def test_disagreement_is_the_share_of_other_labels_among_the_nearest():
    inputs, labels = torch.randn(200, 1, 3, 3, generator=generator()), torch.arange(200) % 3
    found = disagreement(inputs, labels, k=7, components=9)
    torch.testing.assert_close(found, plain_disagreement(inputs.flatten(1), labels, 7))


def test_copies_count_as_neighbours_and_share_the_last_places():
    inputs = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    labels = torch.tensor([0, 0, 1, 1, 1, 1, 0])
    # the first row has two copies, one of them of label 1, and two of four places at distance 1, where 3 of 4 differ
    assert float(disagreement(inputs, labels, k=4)[0]) == pytest.approx((1 + 2 * 3 / 4) / 4)
    assert disagreement(torch.ones(5), torch.tensor([0, 0, 0, 0, 1]), k=2).tolist() == [0.25] * 4 + [1.0]


def test_scores_of_many_equally_distant_inputs_do_not_depend_on_their_order():
    g = generator()
    inputs, labels = torch.eye(64)[torch.randperm(64, generator=g)], torch.randint(2, (64,), generator=g)
    order = torch.randperm(64, generator=g)
    assert torch.equal(disagreement(inputs, labels, k=5)[order], disagreement(inputs[order], labels[order], k=5))


# --- duplicates ---------------------------------------------------------------------------------------------------


def test_conflicts_are_the_rarer_labels_of_equal_rows_or_all_in_a_tie():
    content = torch.tensor([5, 5, 5, 6, 6, 7, 7, 8, 9, 9, 9, 9, 9])
    labels = torch.tensor([0, 0, 1, 0, 1, 2, 2, 0, 0, 0, 1, 1, 2])
    expected = [0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 1]
    for dtype in (torch.uint8, torch.float32, torch.bfloat16, torch.int64):
        images = content.to(dtype).view(-1, 1, 1).expand(-1, 2, 3)
        assert label_conflicts(images, labels).tolist() == expected


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=15))
def test_conflicts_are_those_of_plain_counting(rows):
    expected = []
    for content, label in rows:
        counts = [sum(row == (content, other) for row in rows) for other in range(3)]
        rivals = counts[:label] + counts[label + 1 :]
        top = max(counts)
        expected.append(float(any(rivals) and (counts[label] < top or counts.count(top) > 1)))
    contents, labels = torch.tensor(rows).T
    assert label_conflicts(contents, labels).tolist() == expected


def test_near_duplicates_are_judged_by_the_share_of_other_labels():
    g = generator()
    inputs, labels = torch.randn(200, 30, generator=g), torch.arange(200) % 2
    inputs[1] = inputs[3] = inputs[0] + 1e-3 * torch.randn(30, generator=g)
    inputs[5] = inputs[7] + 1e-3  # of the same label
    labels[:4] = torch.tensor([0, 1, 0, 0])
    scores = near_conflicts(inputs, labels, 2)
    torch.testing.assert_close(scores[[0, 1, 3]], torch.tensor([1 / 3, 2 / 3, 1 / 3]))
    assert scores.count_nonzero() == 3
    assert near_conflicts(inputs, labels, 2, threshold=1e-9).count_nonzero() == 2  # the two that are equal
    assert near_conflicts(inputs, labels, 2, threshold=2.0).count_nonzero() > 100


# --- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: SmallLoss(skip=-1), r"small_loss.skip must be a whole number >= 0, got -1"),
        (lambda: SmallLoss(skip=1.5), r"small_loss.skip must be a whole number >= 0, got 1.5"),  # pyright: ignore
        (lambda: TrustedMargin(temperature=0), r"trusted_margin.temperature must be a number > 0 and finite, got 0"),
        (lambda: TrustedMargin(temperature=NAN), r"trusted_margin.temperature must be a number > 0"),
        (lambda: TrustedMargin(temperature=torch.inf), r"trusted_margin.temperature must be a number > 0"),
        (lambda: ConfidentLearning(method="entropy"), r"confident_learning.method must be one of normalized_margin"),
        (lambda: Spectral(components=0), r"spectral.components must be a whole number >= 1, got 0"),
        (lambda: Spectral(components=True), r"spectral.components must be a whole number >= 1, got True"),
        (lambda: ActivationClustering(components=0), r"activation_clustering.components must be a whole number >= 1"),
        (lambda: ActivationClustering(gate=1.0), r"activation_clustering.gate must be a number > -1 and < 1, got 1.0"),
        (lambda: Mahalanobis(components=0), r"mahalanobis.components must be a whole number >= 1"),
        (lambda: Mahalanobis(rounds=0), r"mahalanobis.rounds must be a whole number >= 1"),
        (lambda: Mahalanobis(trim=1.0), r"mahalanobis.trim must be a number > 0 and < 1"),
        (lambda: Mahalanobis(shrinkage=0.0), r"mahalanobis.shrinkage must be a number > 0 and < 1"),
        (lambda: QUE(components=0), r"que.components must be a whole number >= 1"),
        (lambda: QUE(rounds=0), r"que.rounds must be a whole number >= 1"),
        (lambda: QUE(alpha=0.0), r"que.alpha must be a number > 0 and finite"),
        (lambda: QUE(trim="0.3"), r"que.trim must be a number > 0 and < 1, got '0.3'"),  # pyright: ignore
        (lambda: QUE(shrinkage=1.0), r"que.shrinkage must be a number > 0 and < 1"),
        (lambda: KNNLabels(k=0), r"knn_labels.k must be a whole number >= 1"),
        (lambda: KNNLabels(components=0), r"knn_labels.components must be a whole number >= 1"),
        (lambda: NearDuplicates(threshold=0.0), r"near_duplicates.threshold must be a number > 0 and finite"),
        (lambda: NearDuplicates(k=0), r"near_duplicates.k must be a whole number >= 1"),
        (lambda: NearDuplicates(components=0), r"near_duplicates.components must be a whole number >= 1"),
    ],
)
def test_settings_out_of_range_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_the_iteration_is_what_these_tests_run():
    assert 3 * _covariance.PASSES * (1 + _covariance.SPARE) < 150  # the width of most tables here

"""APGD, targeted APGD, FAB, Square and AutoAttack: what they promise beyond the contract of all attacks."""

from __future__ import annotations

import pytest
import torch
from digit_models import digits, model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from robust_train import APGD, APGDT, FAB, PGD, AutoAttack, ClassifierVictim, Square, Threat, evaluate
from robust_train.evasion.attacks import apgd as apgd_module
from robust_train.evasion.attacks.auto_attack import auto_attack, members
from robust_train.evasion.attacks.fab import to_hyperplane
from robust_train.evasion.attacks.square import HALVINGS, _bump, _side, _window
from robust_train.evasion.margins import ScoreVictim, dlr_loss, likeliest_wrong_classes, margin, targeted_dlr_loss
from robust_train.evasion.victim import Victim

NORMS = ("linf", "l2", "l1")
EPS = {"linf": 0.08, "l2": 0.4, "l1": 1.5}  # about half of the examples of `model()` fall
ENSEMBLE = AutoAttack("custom", steps=4, targets=2, queries=15)
FEW = {
    "apgd": APGD(steps=12),
    "apgd_dlr": APGD(steps=12, restarts=2, loss="dlr"),
    "apgd_targeted": APGDT(steps=10, targets=3),
    "fab": FAB(steps=8, targets=3),
    "square": Square(queries=40),
    "auto_attack": ENSEMBLE,
}


@pytest.fixture
def right() -> tuple[torch.Tensor, torch.Tensor]:
    """40 test digits that the undefended model gets right."""
    _, _, x, y = digits()
    kept = (model()(x).argmax(1) == y).nonzero().flatten()[:40]
    return x[kept], y[kept]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fooled(x, y, net=None):
    with torch.no_grad():
        return (net or model())(x).argmax(1) != y


def attacked(attack, x, y, norm="linf", net=None):
    return attack(ClassifierVictim(net or model(), y, stop_when_fooled=True), x, Threat(norm, EPS[norm]), seeded())


# --- independence of the batch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", FEW)
def test_neither_order_nor_company_of_an_example_changes_what_is_found(name, norm, right):
    x, y = right
    whole = attacked(FEW[name], x, y, norm)
    order = torch.randperm(len(x), generator=seeded(1))
    mixed = attacked(FEW[name], x[order], y[order], norm)
    part = attacked(FEW[name], x[:5], y[:5], norm)
    verdict = fooled(whole, y)
    assert int(verdict.sum()) > 0
    assert torch.equal(verdict[order], fooled(mixed, y[order]))
    assert torch.equal(verdict[:5], fooled(part, y[:5]))
    assert torch.allclose(whole[:5][verdict[:5]], part[verdict[:5]], atol=1e-4)


class Recording(nn.Module):
    """Remembers which examples it ever got wrong; the batch must stay whole."""

    def __init__(self, net, labels):
        super().__init__()
        self.net, self.labels, self.sizes = net, labels, []
        self.ever = torch.zeros(len(labels), dtype=torch.bool)

    def forward(self, x):
        out = self.net(x)
        self.sizes.append(len(x))
        if len(x) == len(self.labels):
            self.ever |= out.argmax(1) != self.labels
        return out


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ["apgd", "apgd_dlr", "apgd_targeted"])
def test_leaving_early_changes_no_verdict(name, norm, right):
    x, y = right
    patient = Recording(model(), y)
    FEW[name](ClassifierVictim(patient, y), x, Threat(norm, EPS[norm]), seeded())
    assert set(patient.sizes) == {len(x)}
    hasty = Recording(model(), y)
    found = attacked(FEW[name], x, y, norm, hasty)
    assert torch.equal(fooled(found, y), patient.ever)
    assert sum(hasty.sizes) < 0.9 * sum(patient.sizes)


# --- APGD ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_apgd_equals_torchattacks_from_the_same_start(loss, norm, right, monkeypatch):
    torchattacks = pytest.importorskip("torchattacks")
    x, y = right
    kind = {"linf": "Linf", "l2": "L2"}[norm]
    theirs = torchattacks.APGD(model(), norm=kind, eps=EPS[norm], steps=40, loss=loss, seed=3)
    with torch.random.fork_rng():
        want = theirs(x, y)
        torch.manual_seed(3)
        start = 2 * torch.rand(x.shape) - 1 if norm == "linf" else torch.randn(x.shape)
    start = start / start.flatten(1).norm(p=float("inf") if norm == "linf" else 2, dim=1).view(-1, 1, 1, 1)
    monkeypatch.setattr(apgd_module, "_start", lambda origin, *_: (origin + EPS[norm] * start).clamp(0, 1))
    ours = attacked(APGD(steps=40, loss=loss), x, y, norm)
    assert int((fooled(ours, y) != fooled(want, y)).sum()) == 0
    assert 5 < int(fooled(ours, y).sum()) < 35


@pytest.mark.parametrize("norm", NORMS)
def test_apgd_finds_higher_losses_than_pgd_with_as_many_steps(norm, right):
    x, y = right
    victim, threat = ClassifierVictim(model(), y), Threat(norm, EPS[norm] / 2)
    with torch.no_grad():
        ours, pgd = (float(victim.loss(a(victim, x, threat, seeded())).mean()) for a in (APGD(30), PGD(30)))
    assert ours > pgd - 0.01


def test_l1_perturbations_are_sparse(right):
    x, y = right
    found = APGD(steps=50)(ClassifierVictim(model(), y), x, Threat("l1", 1.5), seeded())
    assert float((found != x).flatten(1).float().mean()) < 0.35


def test_dlr_does_not_change_when_logits_are_scaled(right):
    x, y = right

    class Scaled(nn.Module):
        def forward(self, x):
            return model()(x) * 1e4

    plain, scaled = (attacked(FEW["apgd_dlr"], x, y, net=net) for net in (model(), Scaled()))
    assert torch.equal(fooled(plain, y), fooled(scaled, y))


def test_losses_on_margins():
    scores = torch.tensor([[4.0, 3.0, 1.0, 0.0], [0.0, 2.0, 1.0, 5.0]])
    truth, targets = torch.tensor([0, 1]), torch.tensor([2, 0])
    assert margin(scores, truth).tolist() == [-1.0, 3.0]
    assert dlr_loss(scores, truth, truth).tolist() == pytest.approx([-1 / 3, 3 / 4])
    assert targeted_dlr_loss(scores, truth, targets).tolist() == pytest.approx([-3 / 3.5, -2 / 4.5])
    assert targeted_dlr_loss(scores[:, :3], truth, targets).tolist() == pytest.approx([-3 / 3, -2 / 2])
    assert dlr_loss(scores[:, :2], truth, truth).tolist() == [-1.0, -2.0]


def test_targets_are_the_likeliest_wrong_classes():
    victim = ClassifierVictim(lambda x: x, torch.tensor([0, 1]))
    scores = torch.tensor([[4.0, 3.0, 1.0], [9.0, 2.0, 1.0]])
    assert likeliest_wrong_classes(victim, scores, 9).tolist() == [[1, 2], [0, 2]]
    assert likeliest_wrong_classes(victim, scores, 1).tolist() == [[1], [0]]


def test_gradients_of_a_margin_are_scaled_and_watched_like_the_victims_own(right):
    x, y = right
    victim = ClassifierVictim(model(), y)
    victim.gradient_scale, victim.gradients = 8.0, []
    goal = ScoreVictim(victim, dlr_loss)
    assert goal.gradient_scale == 8.0
    APGD(steps=3, loss="dlr")(victim, x, Threat(eps=0.05), seeded())
    assert len(victim.gradients) == 4


def test_a_victim_that_knows_only_its_mean_loss_is_refused(right):
    class Mean(Victim):
        provides = frozenset({"loss", "per_example_loss"})  # it says so, but it has none

        def loss(self, x):
            return x.mean()

    with pytest.raises(ValueError, match="one loss an example"):
        APGD(steps=2)(Mean(), right[0], Threat(eps=0.1))
    Mean.provides = frozenset({"loss"})
    with pytest.raises(ValueError, match="needs per_example_loss"):
        APGD(steps=2)(Mean(), right[0], Threat(eps=0.1))


# --- FAB -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_fab_finds_the_boundary_of_a_linear_model(norm):
    weights, bias = torch.randn(3, 20, generator=seeded()), torch.randn(3, generator=seeded(1))
    x = torch.randn(30, 20, generator=seeded(2))
    y = (x @ weights.T + bias).argmax(1)
    dual = {"linf": 1.0, "l2": 2.0, "l1": float("inf")}[norm]
    scores = x @ weights.T + bias
    gaps = scores.gather(1, y[:, None]) - scores
    normals = torch.linalg.vector_norm(weights[y][:, None] - weights[None], ord=dual, dim=2)
    nearest = (gaps / normals.clamp_min(1e-12)).scatter(1, y[:, None], torch.inf).amin(1)
    victim = ClassifierVictim(lambda x: x @ weights.T + bias, y)
    threat = Threat(norm, 1e3, low=-1e3, high=1e3)
    found = FAB(steps=60)(victim, x, threat)
    assert bool((victim.score(found) == 0).all())
    ratio = threat.size(found, x) / nearest
    assert float(ratio.min()) >= 1 - 1e-4
    assert float(ratio.max()) < 1.02


@pytest.mark.parametrize("norm", NORMS)
def test_points_farther_than_eps_do_not_count(norm, right):
    x, y = right
    found = attacked(FEW["fab"], x, y, norm)
    verdict = fooled(found, y)
    assert 0 < int(verdict.sum()) < len(x)
    assert torch.equal(found[~verdict], x[~verdict])


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from(NORMS), st.floats(0.1, 1.5), st.booleans())
def test_nothing_feasible_is_nearer_to_the_hyperplane(seed, norm, share, boxed):
    g = torch.Generator().manual_seed(seed)
    normal = torch.randn(6, 9, generator=g, dtype=torch.float64) * (torch.rand(6, 9, generator=g) > 0.2)
    up, down = torch.rand(2, 6, 9, generator=g, dtype=torch.float64)
    if not boxed:
        up, down = up + torch.inf, down + torch.inf
    sign = torch.randint(0, 2, (6,), generator=g) * 2 - 1
    most = (normal.abs() * torch.where(normal * sign[:, None] > 0, up, down).clamp_max(1.0)).nan_to_num().sum(1)
    need = sign * most * share
    delta = to_hyperplane(normal, need, up, down, norm)
    assert bool(((delta <= up + 1e-12) & (delta >= -down - 1e-12)).all())
    reached = (normal * delta).sum(1)
    assert torch.allclose(reached, need if not boxed else sign * torch.minimum(most, need.abs()), atol=1e-9)
    order = {"linf": float("inf"), "l2": 2.0, "l1": 1.0}[norm]
    length = torch.linalg.vector_norm(delta, ord=order, dim=1)
    for _ in range(30):  # another point with the same product: a feasible movement within the hyperplane
        move = torch.randn(6, 9, generator=g, dtype=torch.float64) * 0.1
        move = move - normal * ((normal * move).sum(1) / normal.pow(2).sum(1).clamp_min(1e-12))[:, None]
        other = delta + move
        inside = ((other <= up) & (other >= -down)).all(1)
        assert bool((torch.linalg.vector_norm(other, ord=order, dim=1) >= length - 1e-9)[inside].all())


# --- Square ----------------------------------------------------------------------------------------------------------


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, *grads):
        raise AssertionError("a gradient was taken")


@pytest.mark.parametrize("norm", NORMS)
def test_square_takes_no_gradient_and_keeps_its_budget(norm, right):
    x, y = right

    class Oracle(nn.Module):
        calls = 0

        def forward(self, x):
            assert not torch.is_grad_enabled()
            Oracle.calls += 1
            return model()(NoGradient.apply(x))

    victim = ClassifierVictim(Oracle(), y, stop_when_fooled=True)
    Square(queries=25)(victim, x, Threat(norm, EPS[norm] / 10), seeded())
    assert Oracle.calls == 25


def test_square_falls_through_masked_gradients(right):
    x, y = right

    class Masked(nn.Module):
        def forward(self, x):
            return model()((x * 256).round() / 256)

    victim = ClassifierVictim(Masked(), y, stop_when_fooled=True)
    threat = Threat(eps=0.15)
    with pytest.raises(AssertionError, match="a gradient was taken"):
        APGD(2)(ClassifierVictim(lambda x: model()(NoGradient.apply(x)), y), x, threat)
    assert int(fooled(APGD(20)(victim, x, threat), y, Masked()).sum()) == 0
    assert int(fooled(Square(300)(victim, x, threat), y, Masked()).sum()) > 20


def test_more_queries_never_leave_more_standing(right):
    x, y = right
    victim = ClassifierVictim(model(), y, stop_when_fooled=True)
    standing = [fooled(Square(q)(victim, x, Threat(eps=0.08), seeded()), y).sum() for q in (1, 20, 200)]
    assert standing == sorted(standing)
    assert standing[0] < standing[-1]


def test_windows_shrink_and_reach_every_feature():
    assert [_side(i, 784, 0.8, None) for i in (0, 11, 51, 201)] == [25, 18, 13, 9]
    assert _side(10**6, 784, 0.8, None) == 1
    assert _side(499, 784, 0.8, 500) == _side(9980, 784, 0.8, None) < _side(499, 784, 0.8, None)
    assert sorted(HALVINGS) == list(HALVINGS)
    edges = [_window(3, 8, 8, u, 0.0)[0] for u in (0.0, 0.999999)]
    assert (edges[0].start, edges[1].stop) == (0, 8)
    assert _window(3, 1, 36, 0.5, 0.0) == (slice(0, 1), slice(0, 9))  # a vector: as many features as a square has
    assert _window(50, 8, 8, 0.9, 0.9) == (slice(0, 8), slice(0, 8))


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 3), (3, 3), (5, 5), (4, 7)])
def test_bumps_have_norm_one_and_a_valley(rows, columns, power):
    for turned in (False, True):
        bump = _bump(rows, columns, power, turned)
        assert bump.shape == (rows, columns)
        assert float(torch.linalg.vector_norm(bump, ord=power)) == pytest.approx(1.0)
        assert float(bump.min()) < 0
        assert rows == columns == 1 or float(bump.max()) > 0


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(7,), (36,), (2, 9), (3, 5, 8), (2, 3, 4, 5)])
def test_square_works_on_inputs_that_are_no_square_images(shape, norm):
    x = torch.rand(6, *shape, generator=seeded())
    net = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 4))
    y = net(x).argmax(1)
    threat = Threat(norm, 1.0, low=-1.0, high=2.0)
    found = Square(queries=40)(ClassifierVictim(net, y, stop_when_fooled=True), x, threat)
    assert found.shape == x.shape
    assert float(threat.size(found, x).min()) > 0.1


# --- AutoAttack ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_no_part_alone_leaves_fewer_standing_than_the_whole(norm, right):
    x, y = right
    victim, threat = ClassifierVictim(model(), y, stop_when_fooled=True), Threat(norm, EPS[norm] * 0.8)
    parts = members(norm, 10, steps=4, targets=2, queries=40)
    found, counts = auto_attack(victim, x, threat, parts, seeded())
    assert list(counts) == ["clean", "apgd-ce", "apgd-t", "fab-t", "square"]
    assert list(counts.values()) == sorted(counts.values(), reverse=True)
    assert counts["clean"] == len(x)
    assert 0 < counts["square"] == int(victim.score(found).sum()) < len(x)
    for name, attack in parts.items():
        alone, _ = auto_attack(victim, x, threat, {name: attack}, seeded())
        assert bool((victim.score(alone) >= victim.score(found)).all())


def test_each_attack_sees_the_survivors_of_the_ones_before(right):
    x, y = right
    net = Recording(model(), y)
    attack = AutoAttack("custom", steps=8, targets=2, queries=10)
    victim = ClassifierVictim(net, y, stop_when_fooled=True)
    found, counts = attack.survivors(victim, x, Threat(eps=0.08), seeded())
    assert 0 < counts["square"] < counts["clean"]
    assert max(net.sizes[-10:]) <= counts["fab-t"]
    assert torch.equal(attack(victim, x, Threat(eps=0.08), seeded()), found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_successes_are_those_of_the_victims_own_precision(dtype, right):
    x, y = right
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    net.load_state_dict({"1.weight": torch.randn(10, 64, generator=seeded()), "1.bias": torch.zeros(10)})
    net, x = net.to(dtype), x.to(dtype)
    y = net(x).argmax(1)
    victim, threat = ClassifierVictim(net, y, stop_when_fooled=True), Threat(eps=0.03)
    found, counts = ENSEMBLE.survivors(victim, x, threat, seeded())
    assert found.dtype == dtype
    assert counts["square"] == int(victim.score(found).sum())
    assert float(threat.size(found, x).max()) <= 0.03 * (1 + 1e-6)


def test_only_the_standard_calls_itself_autoattack():
    assert str(AutoAttack()).startswith("AutoAttack, standard version")
    assert "not the standard version" in str(AutoAttack("custom", steps=3))
    assert [(n, a.passes) for n, a in AutoAttack().members("linf", 10).items()] == [
        ("apgd-ce", 101),
        ("apgd-t", 909),
        ("fab-t", 1350),
        ("square", 2500),
    ]
    assert AutoAttack().passes == 4860
    sparse = members("l1", 10)
    assert sparse["apgd-ce"] == APGD(100, restarts=5)
    assert sparse["apgd-t"] == APGDT(100, targets=5)
    assert sparse["fab-t"] == FAB(100, targets=9)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("classes", [1, 2, 3])
def test_tasks_of_two_and_three_classes(classes, norm):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(12, 30), nn.Tanh(), nn.Linear(30, classes))
    x = torch.rand(60, 12, generator=seeded())
    out = net(x)
    y = (out.flatten() > 0).float() if classes == 1 else out.argmax(1)
    victim, threat = (
        ClassifierVictim(net, y, stop_when_fooled=True),
        Threat(norm, {"linf": 0.02, "l2": 0.06, "l1": 0.15}[norm]),
    )
    found, counts = AutoAttack("custom", steps=10, targets=9, queries=30).survivors(victim, x, threat, seeded())
    assert list(counts) == ["clean", "apgd-ce", "apgd-dlr", "fab-t", "square"]
    assert 0 < counts["square"] < counts["clean"] == 60
    assert counts["square"] == int(victim.score(found).sum())
    for attack in (APGDT(steps=10), FAB(steps=10), APGD(10, loss="dlr"), Square(30)):
        alone = int(victim.score(attack(victim, x, threat, seeded())).sum())
        assert counts["square"] <= alone + 1
        assert alone < 60


@pytest.mark.parametrize("attack", [APGD(2, loss="dlr"), APGDT(2), FAB(2), Square(2), AutoAttack("custom", steps=2)])
def test_dense_predictions_and_regressions_are_refused(attack):
    x = torch.rand(3, 2, 4, 4)
    dense = ClassifierVictim(lambda x: x, torch.zeros(3, 4, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="one class an example"):
        attack(dense, x, Threat(eps=0.1))
    regression = ClassifierVictim(lambda x: x.flatten(1).sum(1, keepdim=True), torch.tensor([0.3, 2.0, -1.0]))
    with pytest.raises(ValueError, match="one class an example"):
        attack(regression, x, Threat(eps=0.1))


@pytest.mark.parametrize("name", FEW)
def test_normalised_data_is_attacked_in_pixels(name, right):
    x, y = right
    mean, std = 0.4, 0.25

    class Normalised(nn.Module):
        def forward(self, z):
            return model()(z * std + mean)

    plain = attacked(FEW[name], x, y)
    threat = Threat(eps=EPS["linf"], mean=mean, std=std)
    victim = ClassifierVictim(Normalised(), y, stop_when_fooled=True)
    mapped = FEW[name](victim, (x - mean) / std, threat, seeded())
    assert int((fooled(plain, y) != fooled(mapped * std + mean, y)).sum()) <= 1


def test_soft_and_ignored_labels(right):
    x, y = right
    soft = nn.functional.one_hot(y, 10).float()
    hard = attacked(ENSEMBLE, x, y)
    assert torch.equal(fooled(attacked(ENSEMBLE, x, soft), y), fooled(hard, y))
    ignored = y.clone()
    ignored[:5] = -100
    victim = ClassifierVictim(model(), ignored, stop_when_fooled=True)
    assert bool((victim.score(attacked(ENSEMBLE, x, ignored))[:5] == 1).all())


def test_evaluate_runs_it(right):
    x, y = right
    result = evaluate(model(), [(x, y)], Threat(eps=0.08), {"aa": ENSEMBLE, "pgd": PGD(5)})
    assert result.clean_acc == 1.0
    assert result.robust_acc <= result.robust_acc_by_attack["aa"] < 1.0


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: APGD(steps=0), "apgd.steps must be a whole number >= 1, got 0"),
        (lambda: APGD(restarts=True), "apgd.restarts must be a whole number"),
        (lambda: APGD(loss="mse"), "apgd.loss must be one of ce, dlr, got 'mse'"),
        (lambda: APGD(rho=1.5), "apgd.rho must be in"),
        (lambda: APGDT(targets=0), "apgd_targeted.targets must be a whole number"),
        (lambda: FAB(steps=0), "fab.steps"),
        (lambda: FAB(alpha_max=-1), "fab.alpha_max must be in"),
        (lambda: FAB(eta=0.9), "fab.eta must be >= 1"),
        (lambda: FAB(beta=1), "fab.beta must be in"),
        (lambda: Square(queries=0), "square.queries must be a whole number"),
        (lambda: Square(p_init=float("nan")), "square.p_init must be in"),
        (lambda: Square(rescale_schedule="no"), "square.rescale_schedule must be true or false"),  # type: ignore[arg-type]
        (lambda: AutoAttack("plus"), "auto_attack.version must be one of standard, custom, got 'plus'"),
        (lambda: AutoAttack(steps=10), "auto_attack.steps is 100 in the standard version, got 10"),
        (lambda: AutoAttack("custom", queries=0), "auto_attack.queries must be a whole number"),
    ],
)
def test_bad_settings_are_named(make, says):
    with pytest.raises(ValueError, match=says):
        make()

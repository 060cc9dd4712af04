"""What single attacks promise beyond the contract."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from robust_train import FGSM, PGD, ClassifierVictim, Threat, TorchAttack, UniformNoise, WorstCase
from robust_train.evasion.attacks.pgd import _targets, pgd

SEED = torch.Generator


class Counting(nn.Module):
    """Records the batch sizes that it is asked about."""

    def __init__(self, net):
        super().__init__()
        self.net, self.sizes = net, []

    def forward(self, x):
        self.sizes.append(len(x))
        return self.net(x)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_equals_torchattacks_on_the_same_start_and_settings(norm, net, images, labels):
    torchattacks = pytest.importorskip("torchattacks")
    eps, alpha, steps = (0.2, 0.03, 7) if norm == "linf" else (1.0, 0.2, 7)
    theirs_class = torchattacks.PGD if norm == "linf" else torchattacks.PGDL2
    theirs = theirs_class(net, eps=eps, alpha=alpha, steps=steps, random_start=False)(images, labels)
    attack = PGD(steps=steps, step_size=alpha, random_start=False)
    ours = attack(ClassifierVictim(net, labels), images, Threat(norm, eps))
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_pgd_equals_torchattacks_from_a_random_start(net, images, labels):
    torchattacks = pytest.importorskip("torchattacks")
    torch.manual_seed(5)
    theirs = torchattacks.PGD(net, eps=0.2, alpha=0.03, steps=5, random_start=True)(images, labels)
    torch.manual_seed(5)
    start = (images + torch.empty_like(images).uniform_(-0.2, 0.2)).clamp(0, 1)
    ours = pgd(ClassifierVictim(net, labels), images, Threat(eps=0.2), steps=5, step_size=0.03, start=start)
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_more_restarts_never_hurt_less(net, images, labels):
    victim, threat = ClassifierVictim(net, labels), Threat(eps=0.1)
    one, five = (
        victim.loss(PGD(steps=3, restarts=r)(victim, images, threat, SEED().manual_seed(0))).detach() for r in (1, 5)
    )
    assert bool((five >= one - 1e-6).all())
    assert float(five.sum()) > float(one.sum())


@pytest.mark.parametrize("kind", ["least_likely", "next", "random"])
def test_targeted_pgd_approaches_its_target(kind, net, images):
    labels = net(images).argmax(1)
    victim, threat = ClassifierVictim(net, labels), Threat(eps=0.5)
    x_adv = PGD(steps=40, targeted=kind)(victim, images, threat)
    if kind == "random":
        generator = SEED().manual_seed(0)
        target = _targets(kind, victim, images, generator)
    else:
        target = (labels + 1) % 10 if kind == "next" else net(images).argmin(1)
    assert bool((target != labels).all())
    assert bool((net(x_adv).gather(1, target[:, None]) > net(images).gather(1, target[:, None])).all())


def test_fooled_examples_leave_the_attack(net, images):
    labels = net(images).argmax(1)
    model = Counting(net)
    victim = ClassifierVictim(model, labels, stop_when_fooled=True)
    x_adv = PGD(steps=20)(victim, images, Threat(eps=0.5))
    assert model.sizes == sorted(model.sizes, reverse=True)
    assert model.sizes[-1] < len(images)
    plain = PGD(steps=20)(ClassifierVictim(net, labels), images, Threat(eps=0.5))
    assert float(victim.score(x_adv).sum()) <= float(victim.score(plain).sum())


def test_worst_case_is_at_least_as_strong_as_each_member(net, images, labels):
    victim, threat = ClassifierVictim(net, labels), Threat(eps=0.1)
    start = torch.Generator().manual_seed(0)
    members = {"fgsm": FGSM(), "fixed": PGD(steps=5, random_start=False)}  # no randomness: the same alone and together
    worst = victim.loss(WorstCase(members)(victim, images, threat, start)).detach()
    for attack in members.values():
        assert float((worst - victim.loss(attack(victim, images, threat)).detach()).min()) >= -1e-6


def test_restarts_only_add_to_what_is_fooled(net, images):
    labels, threat = net(images).argmax(1), Threat(eps=0.06)
    standing = []
    for restarts in (1, 2, 8):
        victim = ClassifierVictim(net, labels, stop_when_fooled=True)
        x_adv = PGD(steps=1, restarts=restarts)(victim, images, threat, torch.Generator().manual_seed(0))
        standing.append(victim.score(x_adv))
    assert bool((standing[1] <= standing[0]).all())
    assert bool((standing[2] <= standing[1]).all())


def test_worst_case_spares_the_fooled(net, images):
    labels, model = net(images).argmax(1), Counting(net)
    victim = ClassifierVictim(model, labels, stop_when_fooled=True)
    WorstCase([PGD(steps=20), UniformNoise(draws=2)])(victim, images, Threat(eps=0.1))
    assert 0 < model.sizes[-1] < len(images)


def test_n_fgsm_leaves_the_ball_but_not_the_box(net, images, labels):
    threat = Threat(eps=0.2)
    out = FGSM(noise=2.0, project=False)(ClassifierVictim(net, labels), images, threat, SEED().manual_seed(0))
    assert float(threat.size(out, images).max()) > 0.2
    assert float(out.min()) >= 0
    assert float(out.max()) <= 1


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: PGD(steps=0), "pgd.steps must be a whole number >= 1, got 0"),
        (lambda: PGD(steps=2.5), "pgd.steps"),
        (lambda: PGD(step_size="-1/255"), "pgd.step_size must be > 0"),
        (lambda: PGD(targeted="worst"), "pgd.targeted must be one of"),
        (lambda: FGSM(step=0), "fgsm.step must be > 0"),
        (lambda: FGSM(noise=-1), "fgsm.noise must be >= 0"),
        (lambda: UniformNoise(draws=0), "uniform_noise.draws"),
        (lambda: WorstCase([]), "at least one attack"),
        (lambda: TorchAttack("APDG"), "did you mean APGD"),
        (lambda: TorchAttack("LGV"), "needs a training loader"),
        (lambda: TorchAttack("MultiAttack"), "use WorstCase"),
        (lambda: TorchAttack("PGD", {"epz": 1}), "no argument 'epz'; it has: eps, alpha, steps, random_start"),
        (lambda: TorchAttack("PGD", {"eps": 1}), "eps belongs to the threat"),
    ],
)
def test_bad_settings_are_named(make, says):
    pytest.importorskip("torchattacks")
    with pytest.raises(ValueError, match=says):
        make()


def test_worst_case_takes_attacks_only():
    with pytest.raises(TypeError, match="must hold attacks"):
        WorstCase([PGD])  # type: ignore[list-item]


def _runnable() -> list[str]:
    torchattacks = pytest.importorskip("torchattacks")
    return [name for name in torchattacks.__all__ if name not in ("LGV", "MultiAttack")]


@pytest.mark.slow
def test_every_attack_of_torchattacks_runs_or_says_why_not(net, images, labels):
    x, y = images[:3], labels[:3]
    # small counts: what is tested is that they run, and leave no trace
    few = {
        "steps": 2,
        "n_queries": 5,
        "max_iterations": 20,
        "popsize": 4,
        "overshoot": 0.1,
        "nb_iter": 2,
        "nb_sample": 4,
    }
    colour = nn.Sequential(nn.Conv2d(3, 1, 1), net).eval()
    ran, refused = [], set()
    for name in _runnable():
        import inspect

        import torchattacks

        accepted = inspect.signature(getattr(torchattacks, name).__init__).parameters
        attack = TorchAttack(name, {k: v for k, v in few.items() if k in accepted})
        three = name in ("PIFGSM", "PIFGSMPP", "TIFGSM")
        model = colour if three else net
        inputs = x.expand(-1, 3, -1, -1) if three else x
        for norm in ("linf", "l2", "l1"):
            threat = Threat(norm, 0.3)
            try:
                attack.check(threat)
            except ValueError as error:  # only those with a radius in one norm refuse the others
                refused.add((name, norm, str(error)))
                continue
            out = attack(ClassifierVictim(model, y), inputs, threat, SEED().manual_seed(0))
            assert bool((threat.size(out, inputs) <= 0.3 * (1 + 1e-6)).all()), name
            assert all(p.grad is None and p.requires_grad for p in model.parameters()), name
            ran.append(name)
        if three:
            with pytest.raises(ValueError, match="3-channel"):
                attack(ClassifierVictim(net, y), x, Threat(), SEED().manual_seed(0))
    assert set(ran) == set(_runnable())
    assert not refused & {("CW", "linf"), ("JSMA", "l1")}
    assert all("norm" in why for _, _, why in refused)


def test_torchattacks_is_told_the_number_of_classes_and_every_name_of_the_radius(net, images, labels):
    pytest.importorskip("torchattacks")
    few = nn.Sequential(net, nn.Linear(10, 5)).eval()
    victim = ClassifierVictim(few, labels % 5)
    assert TorchAttack("APGDT", {"steps": 2})(victim, images, Threat(eps=0.1)).shape == images.shape
    colour = nn.Sequential(nn.Conv2d(3, 1, 1), net).eval()
    x = images.expand(-1, 3, -1, -1)
    threat = Threat(eps=0.2)
    out = TorchAttack("PIFGSM")(ClassifierVictim(colour, labels), x, threat)
    assert float(threat.size(out, x).max()) > 0.15
    with pytest.raises(ValueError, match="belongs to the threat"):
        TorchAttack("PIFGSM", {"max_epsilon": 1.0})


def test_torchattacks_on_tables_normalised_data_and_one_score():
    pytest.importorskip("torchattacks")
    torch.manual_seed(0)
    model, x = nn.Linear(6, 1), torch.rand(8, 6)
    threat = Threat(eps=0.1, mean=0.3, std=0.5)
    inputs = threat.from_pixels(x)
    labels = (model(inputs) > 0).long().flatten()
    victim = ClassifierVictim(model, labels)
    out = TorchAttack("PGD")(victim, inputs, threat)
    assert float(victim.loss(out).mean()) > float(victim.loss(inputs).mean())
    assert float(threat.size(out, inputs).max()) <= 0.1 * (1 + 1e-6)


def test_missing_needs_are_named(images):
    class LossOnly(ClassifierVictim):
        provides = frozenset({"loss"})

    with pytest.raises(ValueError, match="needs labels and logits"):
        PGD(targeted="next")(LossOnly(lambda x: x.flatten(1), torch.zeros(12)), images, Threat())


def test_a_loss_that_ignores_the_input_is_refused(images, labels):
    constant = nn.Linear(1, 10)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 1))

    def ignoring(x):
        return constant(torch.ones(len(x), 1)) + model(x.detach())

    with pytest.raises(ValueError, match="does not depend on the attacked input"):
        PGD(steps=1)(ClassifierVictim(ignoring, labels), images, Threat())

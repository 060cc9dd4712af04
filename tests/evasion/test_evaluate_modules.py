"""``evaluate`` on torch modules: rates and their parts, curves, draws, shards, saved examples, nothing left behind."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from digit_models import digits, model
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from robust_train import BPDA, EOT, PGD, AdversarialExamples, AutoAttack, Square, Threat, UniformNoise, evaluate
from robust_train.evasion.attacks.hop_skip_jump import HopSkipJump
from robust_train.evasion.draws import ManyDraws, in_draws
from robust_train.evasion.outcomes import Outcomes
from robust_train.evasion.shards import Shards, model_digest, settings_text
from robust_train.evasion.victim import ClassifierVictim
from robust_train.intervals import rate_of

THREAT = Threat(eps=0.1)
ATTACKS = {"noise": UniformNoise(), "pgd": PGD(steps=5)}


def batches(rows: int = 90, size: int = 30, groups: bool = False) -> list[tuple]:
    _, _, x, y = digits()
    parts = [x[:rows].split(size), y[:rows].split(size), *([(y[:rows] % 3).split(size)] if groups else [])]
    return list(zip(*parts, strict=True))


class Noisy(nn.Module):
    def __init__(self, spread: float = 0.3) -> None:
        super().__init__()
        self.net, self.spread = model(), spread

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + self.spread * torch.randn_like(x))


def test_every_rate_has_its_interval_and_parts_add_up():
    found = evaluate(model(), batches(groups=True), THREAT, ATTACKS, groups=2, curve=(0.5, 1, 2), checks=False)
    assert found.rates["robust_acc"].value == found.robust_acc
    assert found.rates["robust_acc_pgd"].value == found.robust_acc_by_attack["pgd"]
    for rate in found.rates.values():
        right = [1.0] * round(90 * rate.value) + [0.0] * round(90 * (1 - rate.value))
        assert rate == rate_of(right)
    for parts, count in ((found.by_class, 10), (found.by_group, 3)):
        assert len(parts) == count
        for key in ("clean_acc", "robust_acc"):
            total = sum(part[key].value * part[key].n for part in parts.values())
            assert total / 90 == pytest.approx(found.rates[key].value)
    assert list(found.by_class) == [str(label) for label in range(10)]
    assert [eps for eps, _ in found.curve] == [0.0, 0.05, 0.1, 0.2]
    values = [rate.value for _, rate in found.curve]
    assert values == sorted(values, reverse=True)
    assert values[0] == found.clean_acc
    assert "hardest class" in str(found)
    assert not found.checked


def test_groups_may_be_named_example_by_example():
    names = [("left", "right")[i % 2] for i in range(90)]
    found = evaluate(model(), batches(), THREAT, UniformNoise(), groups=names, checks=False)
    assert {name: part["clean_acc"].n for name, part in found.by_group.items()} == {"left": 45, "right": 45}
    with pytest.raises(ValueError, match="groups must name one for each example, but there are none from 60 on"):
        evaluate(model(), batches(), THREAT, UniformNoise(), groups=names[:70], checks=False)
    with pytest.raises(ValueError, match="groups=2, but a batch has 2 parts"):
        evaluate(model(), batches(), THREAT, UniformNoise(), groups=2, checks=False)


def test_flags_are_in_the_result():
    class Saturated(nn.Module):
        def forward(self, logits: Tensor) -> Tensor:
            return 1000 * logits

    honest = evaluate(model(), batches(), THREAT, ATTACKS)
    assert honest.checked
    assert honest.flags == ()
    assert "nothing found" in str(honest)
    found = evaluate(nn.Sequential(model(), Saturated()), batches(), THREAT, ATTACKS)
    assert "zero_gradients" in [flag.name for flag in found.flags]
    assert "WARNING, zero_gradients" in str(found)
    plain = found.as_dict()
    assert plain["flags"][0]["evidence"]["share"] > 0.5
    assert plain["rates"]["clean_acc"]["n"] == 90


def test_a_module_that_stays_in_training_mode_is_named():
    class Stubborn(nn.Dropout):
        def train(self, mode: bool = True) -> nn.Module:
            return super().train(True)

    net = nn.Sequential(Stubborn(0.0), model())
    found = evaluate(net, batches(30), THREAT, UniformNoise())
    assert [flag.name for flag in found.flags] == ["train_mode"]
    assert "training mode while the model is judged: 0" in found.flags[0].says


# --- models that draw at random ------------------------------------------------------------------------------------


def test_a_random_model_is_judged_by_the_mean_over_draws_and_says_so():
    naive = evaluate(Noisy(), batches(30), THREAT, PGD(steps=5), draws=1, checks=False)
    found = evaluate(Noisy(), batches(30), THREAT, PGD(steps=5), draws=4, checks=False)
    assert (naive.draws, found.draws) == (1, 4)
    assert found.rates["robust_acc"].interval == "hoeffding"
    assert found.robust_acc < found.clean_acc
    assert (found.robust_acc * 30 * 4) % 1 == pytest.approx(0, abs=1e-4)
    assert "the mean over 4 draws" in str(found)
    assert found == evaluate(Noisy(), batches(30), THREAT, PGD(steps=5), draws=4, checks=False)


def test_several_draws_are_taken_unasked_where_the_checks_find_randomness(monkeypatch):
    monkeypatch.setattr("robust_train.evasion.probing.DRAWS", 2)
    found = evaluate(Noisy(), batches(12, 12), THREAT, PGD(steps=2))
    assert found.draws == 2
    assert "randomised_outputs" in [flag.name for flag in found.flags]
    assert evaluate(model(), batches(12, 12), THREAT, PGD(steps=2)).draws == 1


def test_draws_wrap_attacks_once_and_leave_the_generators_alone():
    victim = ClassifierVictim(Noisy(), digits()[3][:8])
    own = EOT(PGD(steps=2), samples=3)
    judged, attacks = in_draws(victim, {"eot": own, "pgd": PGD()}, 5)
    assert attacks["eot"] is own
    assert attacks["pgd"] == EOT(PGD(), samples=5)
    assert isinstance(judged, ManyDraws)
    state, x = torch.get_rng_state(), digits()[2][:8]
    assert torch.equal(judged.score(x), judged.score(x))
    assert torch.equal(torch.get_rng_state(), state)
    assert in_draws(victim, attacks, 1) == (victim, attacks)


# --- nothing is left behind ----------------------------------------------------------------------------------------


def portrait(net: nn.Module) -> tuple:
    return (
        {name: tensor.clone() for name, tensor in net.state_dict().items()},
        [(p.grad, p.requires_grad) for p in net.parameters()],
        [m.training for m in net.modules()],
        [id(b) for b in net.buffers()],
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
    )


@pytest.mark.parametrize("breaks", [False, True])
def test_the_model_is_as_before_also_after_an_exception(breaks, net):
    class Counting(nn.Module):
        """Writes a buffer, draws from three generators, and may break."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if breaks and float(self.calls) > 20:
                raise RuntimeError("the model broke")
            return self.net(x) + 0 * (torch.rand(()) + random.random() + np.random.rand())

    whole = Counting().train()
    before = portrait(whole)
    if breaks:
        with pytest.raises(RuntimeError, match="broke"):
            evaluate(whole, batches(30), THREAT, ATTACKS, draws=1)
    else:
        evaluate(whole, batches(30), THREAT, ATTACKS, draws=1)
    after = portrait(whole)
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in after[0].items())
    assert after[1:] == before[1:]


# --- shards --------------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


def test_an_interrupted_evaluation_goes_on_where_it_stopped(tmp_path):
    asked = {"shards": tmp_path / "shards", "examples": tmp_path / "kept", "checks": False, "draws": 1}
    asked |= {"curve": (0.5,), "groups": 2}
    whole = evaluate(model(), batches(groups=True), THREAT, ATTACKS, **{**asked, "shards": None})
    kept = (tmp_path / "kept").read_bytes()

    def stopping():
        yield from batches(groups=True)[:2]
        raise Interrupted

    with pytest.raises(Interrupted):
        evaluate(model(), stopping(), THREAT, ATTACKS, **asked)
    done = sorted((tmp_path / "shards").glob("shard-*"))
    assert len(done) == 2
    times = [path.stat().st_mtime_ns for path in done]
    assert evaluate(model(), batches(groups=True), THREAT, ATTACKS, **asked) == whole
    assert (tmp_path / "kept").read_bytes() == kept
    assert [path.stat().st_mtime_ns for path in done] == times
    calls = []
    watched = model()
    handle = watched.register_forward_hook(lambda *_: calls.append(1))
    assert evaluate(watched, batches(groups=True), THREAT, ATTACKS, **asked) == whole
    handle.remove()
    assert not calls


def test_shards_of_another_evaluation_are_refused(tmp_path):
    def run(net=None, data=None, threat=THREAT, attacks=ATTACKS, **more):
        net, data = model() if net is None else net, batches() if data is None else data
        return evaluate(net, data, threat, attacks, shards=tmp_path, checks=False, **more)

    run()
    with pytest.raises(ValueError, match="another model: choose another folder"):
        run(net=model(2))
    with pytest.raises(ValueError, match="another threat"):
        run(threat=Threat(eps=0.11))
    with pytest.raises(ValueError, match="another attacks"):
        run(attacks={**ATTACKS, "pgd": PGD(steps=6)})
    with pytest.raises(ValueError, match="another seed and curve"):
        run(seed=1, curve=[2])
    with pytest.raises(ValueError, match="other data than batch 000000"):
        run(data=[(x.flip(0), y.flip(0)) for x, y in batches()])
    with pytest.raises(ValueError, match="other data than batch 000000"):
        run(data=batches(size=45))
    (tmp_path / "shard-000001.safetensors").write_bytes(b"half a sh")
    with pytest.raises(ValueError, match="shard-000001"):
        run()
    (tmp_path / "plan.json").write_text("[")
    with pytest.raises(ValueError, match="cannot be read"):
        run()
    (tmp_path / "plan.json").unlink()
    with pytest.raises(ValueError, match="has shards and no plan.json"):
        run()


def test_a_shuffling_loader_cannot_be_cut_into_shards(tmp_path):
    _, _, x, y = digits()
    loader = DataLoader(TensorDataset(x[:20], y[:20]), batch_size=10, shuffle=True)
    for asked in ({"shards": tmp_path}, {"groups": ["a"] * 20}):
        with pytest.raises(ValueError, match="does not shuffle"):
            evaluate(model(), loader, THREAT, UniformNoise(), **asked)
    assert evaluate(model(), loader, THREAT, UniformNoise(), checks=False).n == 20


def test_what_identifies_models_and_settings():
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    same = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    same.load_state_dict(net.state_dict())
    assert model_digest(net) == model_digest(same)
    assert model_digest(net) != model_digest(nn.Sequential(net[0], nn.BatchNorm1d(2, eps=1e-4)))
    same[1].running_mean += 1e-6
    assert model_digest(net) != model_digest(same)
    assert settings_text(PGD()) == settings_text(PGD(steps=10))
    assert settings_text({"a": PGD()}) != settings_text({"b": PGD()})
    assert settings_text(EOT(PGD())) != settings_text(EOT(PGD(steps=3)))
    assert settings_text(BPDA(PGD(), modules=nn.Module)) == settings_text(BPDA(PGD(), modules=nn.Module))
    with pytest.raises(ValueError, match="no name by which it could be known again"):
        settings_text(BPDA(PGD(), modules=lambda module: True))


def test_a_shard_that_is_no_outcome_is_named(tmp_path):
    store = Shards(tmp_path, {"model": "a"})
    outcomes = Outcomes({"clean": torch.ones(3)}, groups=("a", "b", "c"))
    assert len(store.judged("0", "digest", lambda: outcomes)) == 3
    again = Shards(tmp_path, {"model": "a"}).judged("0", "digest", lambda: pytest.fail("it was judged before"))
    assert again.groups == ("a", "b", "c")
    with pytest.raises(ValueError, match="no outcomes"):
        Outcomes.from_tensors({"score/clean": torch.ones(3), "score/attack/a": torch.ones(2)}, {})


# --- examples and settings -----------------------------------------------------------------------------------------


def test_saved_examples_are_the_first_rows(tmp_path):
    asked = {"attacks": {"square": Square(20), "pgd": PGD(steps=10)}, "examples": tmp_path / "kept", "checks": False}
    found = evaluate(model(), batches(), THREAT, most_examples=40, **asked)
    kept = AdversarialExamples.read(tmp_path / "kept")
    x, y = digits()[2][:40], digits()[3][:40]
    assert torch.equal(kept.inputs, x)
    assert torch.equal(kept.labels, y)
    assert set(kept.attack) <= {"none", "clean", "square", "pgd"}
    assert torch.equal(model()(kept.adversarial).argmax(1), kept.predictions)
    alone = evaluate(model(), batches(40, 20), THREAT, **{**asked, "examples": None})
    assert kept.attack.count("none") / 40 == pytest.approx(alone.robust_acc, abs=0.05)
    assert found.n == 90


def test_binary_models_and_autoattack():
    _, _, x, y = digits()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 1))
    data = [(x[:20], (y[:20] >= 5).float()[:, None])]
    found = evaluate(net, data, THREAT, AutoAttack("custom", steps=3, targets=1, queries=5), checks=False)
    assert set(found.by_class) == {"0", "1"}


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"attacks": {}}, "at least one attack"),
        ({"curve": (-1,)}, "curve must hold multiples"),
        ({"curve": ("2",)}, "curve must hold multiples"),
        ({"limit": -1}, "limit must be a whole number >= 0, got -1"),
        ({"limit": True}, "limit"),
        ({"draws": 0}, "draws must be a whole number >= 1, got 0"),
        ({"examples": "a", "most_examples": 1.5}, "most_examples"),
        ({"threat": Threat("l1", 3.0), "attacks": {"h": HopSkipJump()}}, "hop_skip_jump works in the norms"),
    ],
)
def test_settings_that_cannot_be_are_named(asked, says):
    arguments = {"threat": THREAT, "attacks": ATTACKS, "checks": False, **asked}
    with pytest.raises(ValueError, match=says):
        evaluate(nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(64, 10))), batches(30), **arguments)
    with pytest.raises(TypeError, match=r"attacks\.a must be a robust_train Attack"):
        evaluate(model(), batches(30), THREAT, {"a": "pgd"})

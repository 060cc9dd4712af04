"""Wrong configurations: each ends in one clear line before anything is trained, and none is trained undefended."""

from __future__ import annotations

import functools
import logging
import shlex
import shutil
from typing import Any

import pytest
import pytorch_lightning as pl
from cli_kit import command
from fuzz_space import Case, base, cases, conflicts, curated
from hydra.core.global_hydra import GlobalHydra
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pytorch_lightning.loops.fit_loop import _FitLoop

import robust_train
from robust_train import attach
from robust_train.config import ConfigError, recipe, recipe_config

pytestmark = pytest.mark.filterwarnings("ignore")  # what Lightning warns of is not what is tested
LONGEST = 600
FAST = settings(
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
EVERY = functools.cache(cases)
SURE = functools.cache(lambda: [case for case in cases() if case.sure])


class Reached(BaseException):
    """Training would begin now."""


@pytest.fixture
def folder(tmp_path, monkeypatch, caplog):
    """A working directory, and no training: all hooks run that come before the first batch."""
    running: list[pl.Trainer] = []
    fit = pl.Trainer.fit

    def watched(trainer: pl.Trainer, *args: Any, **kwargs: Any) -> Any:
        running.append(trainer)
        try:
            return fit(trainer, *args, **kwargs)
        finally:
            running.pop()

    def begin(loop: _FitLoop) -> None:
        raise Reached([c for c in running[0].callbacks if getattr(c, "defends", False)])

    # Hydra composes everything once more to read hydra.mode, which is half of a sample's time
    monkeypatch.setattr("hydra._internal.hydra.Hydra.get_mode", lambda hydra, **settings: None)
    monkeypatch.setattr(logging, "raiseExceptions", False)  # a handler of an earlier test may have a closed stream
    monkeypatch.setattr(pl.Trainer, "fit", watched)
    monkeypatch.setattr(_FitLoop, "advance", begin)
    caplog.set_level(logging.CRITICAL)
    return tmp_path


@functools.cache
def defences(name: str) -> set[str]:
    """The classes that a recipe defends by."""
    targets = [node["_target_"].rpartition(".")[2] for node in recipe_config(name).callbacks.values()]
    return {target for target in targets if getattr(robust_train, target).defends}


def outcome(monkeypatch: Any, folder: Any, capsys: Any, case: Case) -> str | None:
    """The one line in which it ended; None if it would be trained, with its defences."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    words = (*base(case.recipe), f"hydra.run.dir={out}", *case.words)
    try:
        command(monkeypatch, folder, *words)
    except Reached as reached:
        found = {kind.__name__ for callback in reached.args[0] for kind in type(callback).__mro__}
        assert defences(case.recipe) <= found, f"{case}: would be trained without {defences(case.recipe) - found}"
        return None
    except SystemExit as stopped:
        said = stopped.code
    else:
        raise AssertionError(f"{case}: came to an end without training and without an error")
    printed = capsys.readouterr()
    assert "Traceback" not in printed.out + printed.err, case
    assert isinstance(said, str), case
    assert said.startswith("robust-train: "), (case, said)
    assert "\n" not in said, (case, said)
    assert len(said) <= LONGEST, (case, said)
    assert any(part in said for part in case.about), (case, said)
    if case.sure:
        assert case.value in said, (case, said)
    return said


def check(monkeypatch: Any, folder: Any, capsys: Any, case: Case) -> bool:
    """Whether it was refused, as it must be if it is surely wrong."""
    said = outcome(monkeypatch, folder, capsys, case)
    assert said is not None or not case.sure, f"{case} was taken"
    return said is not None


def sampled(count: int, pool: list[Case], monkeypatch: Any, folder: Any, capsys: Any) -> int:
    """Check so many cases of a pool, all different; how many of them were refused."""
    seen: set[Case] = set()
    refused = 0

    @settings(FAST, max_examples=count)
    @given(st.sampled_from(pool))
    def one(case: Case) -> None:
        nonlocal refused
        refused += check(monkeypatch, folder, capsys, case) and case not in seen
        seen.add(case)

    one()
    return refused


def test_wrong_configurations_end_in_one_line(folder, monkeypatch, capsys):
    pytest.importorskip("torchattacks")
    assert sampled(40, SURE(), monkeypatch, folder, capsys) == 40
    assert sampled(40, EVERY(), monkeypatch, folder, capsys) >= 20


@pytest.mark.fuzz
@pytest.mark.timeout(3600)
def test_two_thousand_wrong_configurations(folder, monkeypatch, capsys):
    pytest.importorskip("torchattacks")
    refused = sum(check(monkeypatch, folder, capsys, case) for case in curated())
    sure = [case for case in SURE() if case not in set(curated())]
    refused += sampled(2000, sure, monkeypatch, folder, capsys)
    assert refused >= 2000
    assert sampled(150, [case for case in EVERY() if not case.sure], monkeypatch, folder, capsys) >= 40


def in_code() -> list[Case]:
    """What is surely wrong with a recipe's callbacks and threat, whatever the run, and can be said to ``recipe()``."""
    parts = ("callbacks", "threat")
    whole = [case for case in SURE() if all(word.lstrip("+~").startswith(parts) for word in case.words)]
    return [case for case in whole if case not in conflicts()]


def refused_in_code(monkeypatch: Any, case: Case) -> None:
    GlobalHydra.instance().clear()
    with pytest.raises(ConfigError) as refused:
        recipe(case.recipe, *case.words)
    assert any(part in str(refused.value) for part in case.about), (case, str(refused.value))
    monkeypatch.setenv("ROBUST_TRAIN", shlex.join([f"recipe={case.recipe}", *case.words]))
    with pytest.raises(SystemExit) as stopped:
        attach.callbacks()
    said = str(stopped.value.code)
    assert said.startswith("robust-train: ROBUST_TRAIN: "), (case, said)
    assert "\n" not in said, (case, said)
    assert len(said) <= LONGEST, (case, said)


def test_recipes_in_code_and_in_the_environment_refuse_the_same(monkeypatch):
    @settings(FAST, max_examples=25)
    @given(st.sampled_from(in_code()))
    def one(case: Case) -> None:
        refused_in_code(monkeypatch, case)

    one()


def test_the_whole_trace_is_there_for_whoever_asks(folder, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    for word in ("threat.eps=-1", "callbacks.adversarial_training=null", "threat.epz=1", "threat.eps=[1", "data=3"):
        with pytest.raises(ConfigError):
            command(monkeypatch, folder, *base("pgd_at"), f"hydra.run.dir={folder / 'out'}", word)

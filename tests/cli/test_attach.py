"""Every recipe in scripts that nobody edited: plain ones, LightningCLI's, and other people's Hydra apps."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import scripts
from cli_kit import RECIPES
from hydra.core.global_hydra import GlobalHydra

import robust_train
from robust_train import attach
from robust_train.config import ConfigError, recipe

PACKAGES = ("pytorch_lightning", "lightning.pytorch")
CHANGES = {
    "embedding_pgd_at": "callbacks.adversarial_training.layer=net.1",
    "freelb": "callbacks.adversarial_training.layer=net.1",
    "filtered": "callbacks.data_filter.probe.epochs=1",
    "filtered_trusted": "callbacks.data_filter.probe.epochs=1 callbacks.data_filter.trusted_size=30",
}
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Lightning calls what jsonargparse has deprecated
    pytest.mark.filterwarnings("ignore:DPSGD.*:UserWarning"),
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "train.yaml").write_text(scripts.HYDRA_CONFIG)
    (tmp_path / "app.py").write_text(scripts.HYDRA_APP)
    monkeypatch.chdir(tmp_path)
    GlobalHydra.instance().clear()
    return tmp_path


def started(monkeypatch, capsys, name: str, *words: str) -> list[str]:
    """The callbacks that the script trained with."""
    monkeypatch.setattr(sys, "argv", [name, *words])
    runpy.run_path(name, run_name="__main__")
    (said,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("trained with")]
    return said.split()[2:]


def names(found: list[str]) -> set[str]:
    """Ours among them."""
    return set(found) & set(robust_train.__all__)


def of(name: str) -> set[str]:
    overrides = CHANGES.get(name, "").split()
    return {type(c).__name__ for c in recipe(name, *overrides)}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("package", PACKAGES)
def test_a_script(name, package, folder, monkeypatch, capsys):
    pytest.importorskip(package)
    (folder / "plain.py").write_text(scripts.PLAIN.format(package=package))
    monkeypatch.setenv("ROBUST_TRAIN", f"recipe={name} threat.eps=2/255 {CHANGES.get(name, '')}")
    assert names(started(monkeypatch, capsys, "plain.py")) == of(name)


@pytest.mark.parametrize("name", RECIPES)
def test_a_script_of_lightning_cli(name, folder, monkeypatch, capsys):
    pytest.importorskip("jsonargparse")
    (folder / "plain.py").write_text(scripts.PLAIN.format(package="pytorch_lightning"))
    (folder / "cli.py").write_text(scripts.LIGHTNING_CLI.format(package="pytorch_lightning"))
    monkeypatch.setenv("ROBUST_TRAIN", f"recipe={name} {CHANGES.get(name, '')}")
    assert names(started(monkeypatch, capsys, "cli.py")) == of(name)


@pytest.mark.parametrize("name", RECIPES)
def test_another_hydra_app(name, folder, monkeypatch, capsys):
    (folder / "plain.py").write_text(scripts.PLAIN.format(package="pytorch_lightning"))
    changes = CHANGES.get(name, "").split()
    found = started(monkeypatch, capsys, "app.py", f"+robust_train/recipe={name}", "threat.eps=2/255", *changes)
    assert names(found) == of(name)
    assert "Timer" in found


def test_another_hydra_app_chooses_another_attack(folder, monkeypatch, capsys):
    (folder / "plain.py").write_text(scripts.PLAIN.format(package="pytorch_lightning"))
    other = "robust_train/attack@callbacks.adversarial_training.attack=fgsm_rs"
    assert names(started(monkeypatch, capsys, "app.py", "+robust_train/recipe=pgd_at", other)) == of("fgsm_rs")


def test_a_hydra_app_keeps_its_own_hydra_when_the_environment_names_a_recipe(folder, monkeypatch, capsys):
    (folder / "plain.py").write_text(scripts.PLAIN.format(package="pytorch_lightning"))
    monkeypatch.setenv("ROBUST_TRAIN", "recipe=pgd_at")
    assert names(started(monkeypatch, capsys, "app.py")) == of("pgd_at")  # which looks at its own job's name


def test_nothing_of_ours_is_seen_without_the_prefix(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["app.py", "--info", "searchpath"])
    (folder / "plain.py").write_text(scripts.PLAIN.format(package="pytorch_lightning"))
    runpy.run_path("app.py", run_name="__main__")
    said = capsys.readouterr().out
    assert "robust-train://robust_train" in said
    assert "robust-train://\n" not in said
    assert "robust-train:// " not in said


def test_without_the_variable_there_is_nothing(monkeypatch):
    monkeypatch.delenv("ROBUST_TRAIN", raising=False)
    assert attach.callbacks() == []
    monkeypatch.setenv("ROBUST_TRAIN", "  ")
    assert attach.callbacks() == []


@pytest.mark.parametrize("group", ["pytorch_lightning.callbacks_factory", "lightning.pytorch.callbacks_factory"])
def test_both_packages_find_it(group):
    assert [e.load() for e in entry_points(group=group) if e.name == "robust_train"] == [attach.callbacks]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("recipe=pgdat", "there is no 'pgdat' (did you mean 'pgd_at'?)"),
        ("threat.eps=1", "name one recipe"),
        ("recipe=pgd_at recipe=trades", "name one recipe"),
        ("recipe=pgd_at threat.epz=1", "did you mean 'threat.eps'?"),
        ("recipe=pgd_at threat.eps=-1", "threat.eps must be >= 0"),
        ("recipe=pgd_at threat._target_=os.system", "not below an allowed package"),
        ("recipe=pgd_at 'threat.eps=1", "No closing quotation"),
    ],
)
def test_a_bad_recipe_ends_the_script_before_it_trains(text, says, folder, monkeypatch):
    (folder / "plain.py").write_text(scripts.PLAIN.format(package="pytorch_lightning"))
    monkeypatch.setenv("ROBUST_TRAIN", text)
    monkeypatch.setattr(sys, "argv", ["plain.py"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path("plain.py", run_name="__main__")
    said = str(stopped.value)
    assert said.startswith("robust-train: ROBUST_TRAIN: ")
    assert says in said
    assert "\n" not in said
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError):  # noqa: PT011  (the whole error, for whoever asks for it)
        attach.callbacks()


def test_packages_may_be_allowed():
    assert attach.parsed(["recipe=a", "allow=[my_pkg,other]", "x=1"]) == ("a", ["x=1"], ["my_pkg", "other"])
    with pytest.raises(ConfigError, match="name one recipe"):
        attach.parsed([])


def test_the_command_refuses_a_second_source_of_callbacks(monkeypatch):
    from robust_train import cli

    monkeypatch.setenv("ROBUST_TRAIN", "recipe=pgd_at")
    monkeypatch.setattr(sys, "argv", ["robust-train", "recipe=pgd_at"])
    with pytest.raises(SystemExit, match="ROBUST_TRAIN is for scripts of yours"):
        cli.main()


def ran(*words: str) -> subprocess.CompletedProcess[str]:
    """``robust-train run …`` in a process of its own."""
    code = "import sys; from robust_train import cli; sys.argv = ['robust-train', 'run', *sys.argv[1:]]; cli.main()"
    environment = {k: v for k, v in os.environ.items() if k != "ROBUST_TRAIN"}
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env=environment)


def test_run_hardens_a_script_and_hands_on_its_exit_status(folder):
    (folder / "plain.py").write_text(scripts.PLAIN.format(package="pytorch_lightning"))
    done = ran("recipe=pgd_at", "threat.eps=2/255", "--", sys.executable, "plain.py")
    assert done.returncode == 0, done.stderr
    assert "AdversarialTraining: active. PGD(steps=10) within the Linf ball of radius 0.00784314" in done.stderr
    assert ran("recipe=pgd_at", "--", sys.executable, "-c", "raise SystemExit(7)").returncode == 7


def test_run_says_when_nothing_was_hardened(folder):
    done = ran("recipe=pgd_at", "--", sys.executable, "-c", "print('no trainer')")
    assert done.returncode == 1
    assert "made no Lightning Trainer" in done.stderr
    for words, says in (
        (("recipe=pgd_at",), "write -- before the command"),
        (("recipe=pgdat", "--", "true"), "did you mean 'pgd_at'?"),
        (("recipe=pgd_at", "--", "no-such-program"), "cannot start 'no-such-program'"),
    ):
        done = ran(*words)
        assert done.returncode == 1
        assert says in done.stderr
        assert "Traceback" not in done.stderr

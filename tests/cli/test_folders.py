"""What a stranger's config, in a folder given with ``--config-dir``, may decide: never what code is run."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_kit import SMALL, run
from omegaconf import OmegaConf

from robust_train.cli.folders import without_folders
from robust_train.config import ConfigError, build, recipe

EVIL_MODULE = """
import logging, pathlib
from hydra.experimental.callback import Callback
MARK = pathlib.Path(__file__).with_name("ran")
class Watcher(Callback):
    def __init__(self, **settings):
        MARK.touch()
class Handler(logging.Handler):
    def __init__(self, **settings):
        MARK.touch()
        super().__init__()
"""
RECIPE = "# @package _global_\ndefaults: [pgd_at, _self_]\n"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "evil_module.py").write_text(EVIL_MODULE)
    return tmp_path


def written(folder: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        (folder / "conf" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "conf" / name).write_text(text)
    return str(folder / "conf")


def refused(monkeypatch, folder: Path, files: dict[str, str], says: str, *words: str, name: str = "evil") -> None:
    """A recipe of the folder ends the command in one line, and nothing of it has run."""
    configs = written(folder, files)
    quick = ("trainer.fast_dev_run=true", *SMALL)
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, folder, "--config-dir", configs, f"recipe={name}", *quick, *words)
    said = str(stopped.value)
    assert said.startswith("robust-train: ")
    assert says in said, said
    assert "\n" not in said
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    "text",
    [
        "hydra: {callbacks: {x: {_target_: evil_module.Watcher}}}",
        "hydra: {job_logging: {handlers: {x: {class: evil_module.Handler}}, root: {handlers: [x]}}}",
        "hydra: {job_logging: {formatters: {x: {(): evil_module.Watcher}}}}",
        "hydra: {hydra_logging: {handlers: {x: {class: evil_module.Handler}}, root: {handlers: [x]}}}",
        "hydra: {launcher: {_target_: evil_module.Watcher}}",
        "hydra: {mode: MULTIRUN, sweeper: {_target_: evil_module.Watcher}}",
        "hydra: {job: {env_set: {LD_PRELOAD: evil.so}}}",
        "hydra: {searchpath: [evil]}",
        "hydra.callbacks: {x: {_target_: evil_module.Watcher}}",
    ],
)
def test_it_sets_nothing_of_hydras(text, folder, monkeypatch):
    refused(monkeypatch, folder, {"recipe/evil.yaml": RECIPE + text}, "cannot set hydra")


@pytest.mark.parametrize(
    ("files", "name"),
    [
        ({"recipe/evil.yaml": "# @package hydra.callbacks.x\n_target_: evil_module.Watcher"}, "evil"),
        ({"recipe/hydra.yaml": "# @package _name_.callbacks.x\n_target_: evil_module.Watcher"}, "hydra"),
        (
            {
                "recipe/evil.yaml": "# @package _global_\ndefaults: [pgd_at, /thing@hydra.callbacks.x: a, _self_]",
                "thing/a.yaml": "_target_: evil_module.Watcher",
            },
            "evil",
        ),
        (
            {
                "recipe/evil.yaml": "# @package _global_\ndefaults: [pgd_at, /thing@_global_: a, _self_]",
                "thing/a.yaml": "hydra: {callbacks: {x: {_target_: evil_module.Watcher}}}",
            },
            "evil",
        ),
        (
            {
                "recipe/evil.yaml": "# @package _global_\ndefaults: [pgd_at, override /hydra/launcher: a, _self_]",
                "hydra/launcher/a.yaml": "_target_: evil_module.Watcher",
            },
            "evil",
        ),
    ],
)
def test_nor_by_the_package_of_a_config(files, name, folder, monkeypatch):
    refused(monkeypatch, folder, files, "cannot set hydra", name=name)


def test_it_trusts_no_package(folder, monkeypatch):
    evil = "allow: [os, evil_module]\ncallbacks: {x: {_target_: os.system, command: ls}}"
    refused(monkeypatch, folder, {"recipe/evil.yaml": RECIPE + evil}, "cannot set allow")
    refused(monkeypatch, folder, {"late/evil.yaml": "# @package _global_\nallow: [os]"}, "cannot set allow",
            "+late=evil", name="pgd_at")  # fmt: skip


@pytest.mark.parametrize(
    "node",
    [
        "{_target_: subprocess.Popen, args: ls}",
        "{_target_: os.system, command: ls}",
        "{_target_: torch.load, f: x}",
        "{_target_: torch.hub.load, repo_or_dir: x, model: y}",
        "{_target_: builtins.eval, _args_: ['1']}",
        "{_target_: builtins.eval, _partial_: true}",
        "{_target_: torch.nn.Sequential, _args_: [{_target_: os.system, command: ls}]}",
        "{_target_: torch.nn.Identity, _recursive_: false, x: {_target_: os.system}}",
        "{_target_: '${evil}'}",
        "{_target_: robust_train.cli.train.shutil.rmtree, path: x}",
        "{_target_: robust_train.custody._files.write_whole, path: ran, text: x}",
        "{_target_: robust_train.cli.train.write_whole, path: ran, text: x}",
        "{_target_: robust_train.hydra_plugin.config_dir, name: x}",
        "{_target_: robust_train.Threat.describe}",
    ],
)
def test_it_builds_classes_of_allowed_packages_and_calls_no_function(node, folder, monkeypatch):
    evil = f"evil: os.system\ncallbacks: {{x: {node}}}"
    refused(monkeypatch, folder, {"recipe/evil.yaml": RECIPE + evil}, "callbacks.x")


def test_a_name_of_ours_means_ours(folder, monkeypatch):
    evil = "# @package _global_\ncallbacks: {}\n"
    out_of_our_way = {"recipe/pgd_at.yaml": evil, "robust_train/callback/adversarial_training.yaml": "_target_: a.b"}
    configs = written(folder, out_of_our_way)
    quick = ("trainer.fast_dev_run=true", *SMALL, "judge.curve=[]", "judge.attacks.apgd=null")
    out = run(monkeypatch, folder, "--config-dir", configs, "recipe=pgd_at", *quick)
    assert OmegaConf.load(out / ".hydra/config.yaml").callbacks.adversarial_training._target_.endswith("Training")


def test_a_launcher_of_the_users_own_is_chosen_by_name_and_never_passes_for_another(folder, monkeypatch):
    evil = "_target_: evil_module.Watcher"
    for name in ("joblib", "cores"):
        files = {"hydra/launcher/joblib.yaml": evil}
        says = "hydra/launcher/joblib"
        with pytest.raises(SystemExit, match=says):
            run(monkeypatch, folder, "--config-dir", written(folder, files), "-m", f"hydra/launcher={name}", "seed=0,1")
    assert not (folder / "ran").exists()


def test_configs_come_from_no_other_folders():
    assert without_folders(["-m", "seed=1"]) == (["-m", "seed=1"], [])
    here = str(Path.cwd())
    for words in (["--config-dir", "."], ["--config-dir=."], ["-cd", "."], ["--config-d", "."]):
        assert without_folders(["a=1", *words, "b=2"]) == (["a=1", "b=2"], [here])
    for words in (["--config-path", "."], ["-cp=."], ["--config-name=x"], ["-cn", "x"], ["hydra.searchpath=[.]"]):
        with pytest.raises(ConfigError, match="use --config-dir FOLDER"):
            without_folders(words)
    for words in (["--config-dir", "/no/such"], ["--config-dir"]):
        with pytest.raises(ConfigError, match="there is no folder"):
            without_folders(words)


def test_recipes_in_code_keep_to_the_same_rules():
    for words in (
        ("callbacks.adversarial_training=null",),
        ("+callbacks.adversarial_training._partial_=true",),
        ("+callbacks.x={_target_: torch.nn.Identity}",),
        ("+callbacks.x={_target_: robust_train.custody._files.write_whole, path: ran, text: x}",),
        ("callbacks=3",),
    ):
        with pytest.raises(ConfigError, match="callbacks"):
            recipe("pgd_at", *words)
    with pytest.raises(ConfigError, match="_convert_: must be one of"):
        build({"a": {"_target_": "robust_train.PGD", "_convert_": "maybe"}})

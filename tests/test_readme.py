"""The README's and CONTRIBUTING's code is run, so that it stays true."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from robust_train.hydra_plugin import config_dir

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
LINES = [line.split("#")[0].split() for line in re.findall(r"^(robust-train .*)$", README, re.MULTILINE)]
COMMANDS = [words for words in LINES if "=" in words[1]]
PLANS = [words for words in LINES if words[1] == "privacy"]


@pytest.mark.parametrize("code", BLOCKS, ids=range(len(BLOCKS)))
def test_python_blocks_run(code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shorter = code.replace("max_epochs=30,", "fast_dev_run=True,")
    exec(compile(shorter, "README.md", "exec"), {})  # noqa: S102


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands_compose(command, monkeypatch, tmp_path, capsys):
    from hydra.core.global_hydra import GlobalHydra

    from robust_train import cli

    GlobalHydra.instance().clear()
    monkeypatch.chdir(tmp_path)
    words = [word for word in command[1:] if word not in ("--cfg", "job")]
    monkeypatch.setattr(sys, "argv", ["robust-train", *words, "--cfg", "job", "--resolve"])
    cli.main()
    assert "_target_: robust_train." in capsys.readouterr().out


@pytest.mark.parametrize("command", PLANS, ids=" ".join)
def test_plans_are_printed(command, monkeypatch, capsys):
    from robust_train import cli

    monkeypatch.setattr(sys, "argv", command)
    cli.main()
    assert "noise multiplier" in capsys.readouterr().out


def test_the_recipes_are_all_in_the_table():
    for path in config_dir("recipes").glob("*.yaml"):
        assert f"| `{path.stem}` |" in README


@pytest.mark.slow
def test_contributing_adds_an_attack_with_two_files(tmp_path):
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    python, yaml = (
        re.sub(r"^   ", "", re.search(rf"   ```{kind}\n(.*?)   ```", text, re.DOTALL)[1], flags=re.MULTILINE)
        for kind in ("python", "yaml")
    )
    for name in ("robust_train", "conf", "recipes", "tests", "pyproject.toml"):
        source, target = ROOT / name, tmp_path / name
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    (tmp_path / "robust_train/evasion/attacks/grey.py").write_text(python)
    (tmp_path / "conf/attack/grey.yaml").write_text(yaml)
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/evasion/test_attack_contracts.py"]
    done = subprocess.run(
        [*run, "tests/test_conf.py", "-k", "grey"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 10

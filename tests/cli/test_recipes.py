"""What there is, printed at once."""

from __future__ import annotations

import subprocess
import sys

import pytest
from cli_kit import RECIPES, command
from omegaconf import OmegaConf

from robust_train.cli import COMMANDS
from robust_train.cli.recipes import described, overview


def test_help_needs_no_torch():
    code = (
        "import sys; sys.argv = ['robust-train', *sys.argv[1:]]\n"
        "from robust_train import cli\n"
        "cli.main()\n"
        "assert not {'torch', 'pytorch_lightning', 'lightning'} & set(sys.modules)"
    )
    for words in ([], ["--help"], ["recipes"], ["recipes", "show", "pgd_at"], ["run", "--help"]):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "pgd_at" in done.stdout or "usage" in done.stdout


def test_the_overview_has_a_line_for_every_command_and_recipe():
    lines = overview().splitlines()
    for name in (*COMMANDS, *RECIPES):
        assert sum(line.startswith(f"  {name} ") for line in lines) == 1
    assert [line for line in lines if line.startswith("  model ")][0].endswith("wavelet_linear")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_shown_with_what_it_defends_against(recipe, monkeypatch, tmp_path, capsys):
    command(monkeypatch, tmp_path, "recipes", "show", recipe, "threat.eps=3/255")
    said = capsys.readouterr().out
    about, against = described(recipe)
    assert f"# {recipe}: {about}\n# Defends against: {against}\n" in said
    assert min(len(about), len(against)) > 20
    shown = OmegaConf.create(said)
    assert shown.threat.eps == "3/255"
    assert "callbacks" in shown


def test_an_unknown_recipe_is_one_line_with_the_nearest_name(monkeypatch, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        command(monkeypatch, tmp_path, "recipes", "show", "pgdat")
    assert str(stopped.value).startswith(
        "robust-train: recipe: there is no 'pgdat' (did you mean 'pgd_at'?); available:"
    )


def test_whoever_stops_reading_sees_no_trace():
    code = "from robust_train import cli; import sys; sys.argv = ['robust-train']; cli.main()"
    shell = f'{sys.executable} -c "{code}" | head -1'
    done = subprocess.run(shell, shell=True, capture_output=True, text=True)  # noqa: S602
    assert done.stdout.startswith("robust-train: ")
    assert done.stderr == ""

"""What a wheel holds, compared with the checkout it was built from."""

import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel made from an sdist, as one that is published is."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)], check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def names(wheel) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_its_yaml_files_are_those_of_the_checkout(names):
    checkout = {
        f"robust_train/{path.relative_to(ROOT).as_posix()}"
        for folder in ("conf", "recipes")
        for path in (ROOT / folder).rglob("*.yaml")
    }
    assert {name for name in names if name.endswith((".yaml", ".yml"))} == checkout


def test_its_modules_are_those_of_the_checkout(names):
    checkout = {path.relative_to(ROOT).as_posix() for path in (ROOT / "robust_train").rglob("*.py")}
    stub = "hydra_plugins/robust_train_configs.py"
    assert {name for name in names if name.endswith(".py")} == checkout - {"robust_train/_hydra_discovery.py"} | {stub}


def test_hydra_can_find_the_stub_and_the_types_are_marked(names):
    assert "hydra_plugins/robust_train_configs.py" in names
    assert "hydra_plugins/__init__.py" not in names  # it is a namespace package, shared by all plugins
    assert "robust_train/py.typed" in names


def test_unpacked_it_finds_its_configs_and_hydra_finds_it(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)  # noqa: S202  (our own wheel)
    script = """
from pathlib import Path
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigSource
from robust_train.hydra_plugin import config_dir
here = Path.cwd().resolve()
assert config_dir("conf") == here / "robust_train/conf", config_dir("conf")
assert config_dir("recipes").is_dir()
import hydra_plugins.robust_train_configs as stub
assert Path(stub.__file__).resolve().is_relative_to(here), stub.__file__
assert "RobustTrainConfigs" in [source.__name__ for source in Plugins.instance().discover(ConfigSource)]
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)


def test_installed_in_a_fresh_environment_every_recipe_runs_everywhere(wheel, tmp_path):
    """Our command, scripts and other people's Hydra apps; the libraries are this environment's."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    install = [python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    (Path(own) / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    for name in ("tests", "pyproject.toml"):
        source, target = ROOT / name, tmp_path / name
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    where = "import robust_train; print(robust_train.__file__)"
    found = subprocess.run([python, "-c", where], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert Path(found.strip()).is_relative_to(own)
    tests = ["tests/cli/test_train.py", "tests/cli/test_attach.py", "tests/test_hydra_plugin.py"]
    run = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    chosen = "every_recipe or test_a_script or another_hydra or both_packages or config"
    done = subprocess.run([*run, "-k", chosen], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 5 * 11
    command = subprocess.run([str(Path(python).parent / "robust-train")], capture_output=True, text=True, check=True)
    assert "recipe=NAME" in command.stdout

"""The direction of imports: rooms know nothing of one another, and only the outer layers know Lightning and Hydra."""

import ast
from pathlib import Path

import pytest

import robust_train

PACKAGE = Path(robust_train.__file__).parent
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
ROOMS = ("evasion", "poisoning", "privacy", "extraction", "custody")
OUTER = ("callbacks", "config", "cli", "attach", "explain", "hydra_plugin", "starter", "report")
KNOWS_LIGHTNING = ("callbacks", "starter", "cli")
KNOWS_HYDRA = ("config", "explain", "hydra_plugin", "_hydra_discovery", "cli")


def layer(name: str) -> str:
    """``evasion/attacks/pgd.py`` and ``robust_train.evasion.attacks.pgd`` -> ``evasion``."""
    return name.removeprefix("robust_train.").removesuffix(".py").replace("/", ".").partition(".")[0]


def imports(file: str) -> set[str]:
    """The full names of the modules that a file imports, also within functions, unless for type checkers only."""
    tree = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ["robust_train", *file.split("/")][: -node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names}  # what is imported may be a module too
    return found


@pytest.mark.parametrize("file", [file for file in FILES if layer(file) in ROOMS])
def test_a_room_imports_no_other_room_and_nothing_outside(file):
    ours = {layer(name) for name in imports(file) if name.startswith("robust_train.")}
    assert not ours & {*ROOMS, *OUTER} - {layer(file)}


@pytest.mark.parametrize("file", [file for file in FILES if layer(file) == "callbacks"])
def test_callbacks_import_neither_configs_nor_commands(file):
    ours = {layer(name) for name in imports(file) if name.startswith("robust_train.")}
    assert not ours & {"config", "cli", "attach", "explain", "hydra_plugin", "starter"}


@pytest.mark.parametrize("file", [file for file in FILES if layer(file) == "report"])
def test_a_report_is_made_of_numbers_and_files(file):
    ours = {layer(name) for name in imports(file) if name.startswith("robust_train.")}
    assert not ours & {"callbacks", "config", "cli", "attach", "hydra_plugin", "starter"}


@pytest.mark.parametrize("file", FILES)
def test_only_the_outer_layers_know_lightning_and_hydra(file):
    roots = {name.partition(".")[0] for name in imports(file)}
    if layer(file) not in KNOWS_LIGHTNING:
        assert not roots & {"pytorch_lightning", "lightning", "lightning_fabric"}
    if layer(file) not in KNOWS_HYDRA:
        assert not roots & {"hydra", "omegaconf"}

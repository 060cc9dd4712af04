"""Importing the package costs nothing; every public name is there when it is asked for."""

import subprocess
import sys

import pytest

import robust_train

HEAVY = ("torch", "pytorch_lightning", "lightning", "hydra", "torchmetrics", "sklearn", "numpy")


def modules_after(code: str) -> set[str]:
    script = f"{code}\nimport sys; print(*sorted(name for name in sys.modules if '.' not in name))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_imports_nothing_heavy():
    assert not modules_after("import robust_train; dir(robust_train)") & set(HEAVY)


@pytest.mark.parametrize("module", ["hydra_plugin", "config"])
def test_the_hydra_modules_import_neither_torch_nor_lightning(module):
    assert not modules_after(f"import robust_train.{module}") & {"torch", "pytorch_lightning", "lightning"}


@pytest.mark.parametrize("name", robust_train.__all__)
def test_every_public_name_resolves_and_is_listed(name):
    assert getattr(robust_train, name) is not None
    assert name in dir(robust_train)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'PDG'"):
        _ = robust_train.PDG

"""Three defences that do not defend: the right flag is raised, and the adaptive number is far below the naive one."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "broken_defences.py"


@pytest.fixture(scope="module")
def broken():
    spec = importlib.util.spec_from_file_location("broken_defences", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["broken_defences"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["broken_defences"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["saturated scores", "random resizing", "quantised inputs"])
def test_the_flag_is_raised_and_the_adaptive_number_is_far_lower(name, broken):
    case = broken.CASES[name]
    naive, adaptive = broken.measured(case, broken.trained(case, seed=0), rows=200)
    assert case.flag in [flag.name for flag in naive.flags]
    assert adaptive.draws == case.draws
    assert naive.clean_acc > 0.75
    assert adaptive.robust_acc < naive.robust_acc - 0.3
    assert adaptive.rates["robust_acc"].high < naive.rates["robust_acc"].low

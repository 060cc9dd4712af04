"""What ``build`` makes, what it refuses to call, and how it says so; ``recipe`` in a notebook and in a Hydra app."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from robust_train import config
from robust_train.config import ConfigError, build, recipe

THREAT = {"_target_": "robust_train.Threat", "eps": "4/255"}


def refused(node, match: str, **kwargs) -> None:
    with pytest.raises(ConfigError, match=match) as caught:
        build(node, **kwargs)
    assert "\n" not in str(caught.value)


# What is built


def test_nested_targets_lists_and_plain_values():
    node = OmegaConf.create(
        {
            "threat": THREAT,
            "layers": [{"_target_": "torch.nn.Linear", "in_features": 2, "out_features": 3}, 7],
            "same": "${threat}",
        }
    )
    built = build(node)
    assert type(built) is dict
    assert type(built["layers"]) is list
    assert built["threat"].eps == pytest.approx(4 / 255)
    assert built["same"] == built["threat"]
    assert isinstance(built["layers"][0], torch.nn.Linear)
    assert built["layers"][1] == 7
    assert node.threat == THREAT


def test_plain_containers_and_lists_at_the_top_are_built_too():
    assert isinstance(build({"_target_": "torch.nn.ReLU"}), torch.nn.ReLU)
    assert isinstance(build([{"_target_": "torch.nn.ReLU"}])[0], torch.nn.ReLU)


def test_a_partial_waits_for_its_parameters():
    optimizer = build({"_target_": "torch.optim.SGD", "lr": 0.5, "_partial_": True})
    assert optimizer([torch.zeros(1, requires_grad=True)]).defaults["lr"] == 0.5


@pytest.mark.parametrize(
    "target",
    [
        "robust_train.Threat",
        "robust_train.evasion.threat.Threat",
        "torch.nn.CrossEntropyLoss",
        "torch.nn.modules.loss.CrossEntropyLoss",
        "torch.optim.lr_scheduler.StepLR",
        "torchmetrics.MeanMetric",
        "pytorch_lightning.callbacks.EarlyStopping",
        "lightning.pytorch.callbacks.EarlyStopping",
        "lightning.fabric.plugins.MixedPrecision",
    ],
)
def test_classes_of_the_allowed_packages_may_be_named(target):
    assert build({"_target_": target, "_partial_": True}) is not None


def test_lightning_names_work_where_only_pytorch_lightning_is_installed(monkeypatch):
    find_spec = config.importlib.util.find_spec
    monkeypatch.setattr(
        config.importlib.util, "find_spec", lambda name: None if name == "lightning" else find_spec(name)
    )
    stop = build({"_target_": "lightning.pytorch.callbacks.EarlyStopping", "monitor": "loss"})
    assert type(stop).__module__.startswith("pytorch_lightning.")


# What is refused


@pytest.mark.parametrize(
    "target",
    [
        "subprocess.Popen",
        "os.system",
        "builtins.eval",
        "builtins.exec",
        "torch.load",
        "torch.hub.load",
        "hydra.utils.get_class",
        "hydra.utils.instantiate",
        "torch.nn_of_a_stranger.Linear",
        "robust_train_of_a_stranger.PGD",
        "lightningx.Trainer",
    ],
)
def test_a_name_outside_the_allowed_packages(target):
    refused({"a": {"b": {"_target_": target, "args": "ls"}}}, r"^a\.b\._target_: .*allow=\[")


@pytest.mark.parametrize(
    "target",
    [
        "robust_train.import_module",
        "robust_train.config.importlib.import_module",
        "robust_train.hydra_plugin.Path",
        "robust_train.config.hydra.utils.get_class",
        "torch.nn.modules.module.torch.load",
        "torch.nn.modules.module.functools.partial",
        "torch.nn.Module.__class__",
        "torch.utils.data.dataloader.os.system",
        "torch.utils.data.dataloader.threading.Thread",
        "torchmetrics.metric.inspect.sys.modules",
        "pytorch_lightning.trainer.trainer.os.system",
    ],
)
def test_another_packages_object_reached_through_an_allowed_name(target):
    refused({"_target_": target}, "not below an allowed package|neither a class nor a function")


@pytest.mark.parametrize(
    "target",
    [
        "torch.nn.utils.clip_grad_norm_",
        "torch.nn.init.ones_",
        "torch.utils.data.random_split",
        "pytorch_lightning.seed_everything",
        "pytorch_lightning.LightningModule.load_from_checkpoint",
        "lightning.pytorch.LightningModule.load_from_checkpoint",
    ],
)
def test_a_function_or_method_of_another_package(target):
    refused({"_target_": target}, "is not a class|not below an allowed package")


@pytest.mark.parametrize(
    "target", ["robust_train.config.build", "robust_train.recipe", "pytorch_lightning.cli.LightningCLI"]
)
def test_what_would_call_other_targets_by_itself(target):
    refused({"_target_": target}, "would call other targets unchecked")


@pytest.mark.parametrize("target", [7, None, ["os.system"], "", "robust_train..PGD", "robust_train.cli:os.system"])
def test_a_target_that_is_not_a_dotted_name(target):
    refused({"_target_": target}, r"^_target_: must be a dotted name")


def test_a_target_that_is_not_a_string_even_if_it_may_be_called():
    refused({"_target_": torch.nn.ReLU}, r"^_target_: must be a dotted name")


def test_targets_are_found_wherever_they_hide():
    evil = {"_target_": "subprocess.Popen", "args": "ls"}
    refused({"x": [{"y": evil}]}, r"^x\[0\]\.y\._target_: 'subprocess.Popen'")
    refused({**THREAT, "norm": evil}, r"^norm\._target_: 'subprocess.Popen'")
    refused({"_target_": "torch.nn.Sequential", "_args_": [evil]}, r"^_args_\[0\]\._target_")
    refused({"_target_": "torch.nn.Identity", "_recursive_": False, "x": evil}, r"^x\._target_")


def test_targets_that_interpolations_bring_in():
    cfg = OmegaConf.create(
        {
            "name": "subprocess.Popen",
            "a": {"b": {"_target_": "${name}"}},
            "evil": {"_target_": "os.system"},
            "c": {"d": "${evil}"},
        }
    )
    refused(cfg.a, r"^a\.b\._target_: 'subprocess.Popen'")
    refused(cfg.c, r"^c\.d\._target_: 'os.system'")
    refused({"x": "${oc.create:'{_target_: os.system}'}"}, r"^x\._target_: 'os.system'")


def test_an_escaped_interpolation_is_not_resolved_behind_our_back():
    refused({"x": r"\${oc.create:'{_target_: os.system}'}"}, r"^x: .* still holds an interpolation")


def test_nothing_is_called_before_all_is_checked(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.nn.ReLU, "__init__", lambda self: calls.append(self))
    refused({"a": {"_target_": "torch.nn.ReLU"}, "b": {"_target_": "os.system"}}, "os.system")
    assert not calls


# Code of the user's


@pytest.fixture
def my_pkg(tmp_path, monkeypatch):
    (tmp_path / "my_pkg.py").write_text(
        textwrap.dedent("""
            from subprocess import Popen
            class Net: pass
            def make(): return Net()
            def fail(): raise ValueError("steps must be >= 1,\\n got 0")
        """)
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_pkg", None)


@pytest.mark.usefixtures("my_pkg")
def test_allow_admits_a_packages_classes_and_functions_but_not_what_it_imports():
    refused({"_target_": "my_pkg.Net"}, r"allow=\[my_pkg\]")
    assert type(build({"_target_": "my_pkg.Net"}, allow=["my_pkg"])).__name__ == "Net"
    assert type(build({"_target_": "my_pkg.make"}, allow=["my_pkg"])).__name__ == "Net"
    refused({"_target_": "my_pkg.Popen"}, r"defined in 'subprocess'.*allow=\[subprocess\]", allow=["my_pkg"])


@pytest.mark.parametrize("allow", ["my_pkg", [""], ["my_pkg."], [None]])
def test_allow_is_a_list_of_package_names(allow):
    refused({}, "allow must be a list", allow=allow)


# Readable errors


@pytest.mark.usefixtures("my_pkg")
def test_a_constructors_error_is_one_line_with_its_key_and_its_cause():
    cfg = OmegaConf.create({"callbacks": {"at": {"attack": {"_target_": "my_pkg.fail"}}}})
    with pytest.raises(ConfigError, match=r"^callbacks\.at\.attack: steps must be >= 1, got 0$") as caught:
        build(cfg.callbacks, allow=["my_pkg"])
    assert isinstance(caught.value.__cause__, ValueError)


def test_an_argument_that_the_constructor_does_not_have():
    refused({"threat": {**THREAT, "epz": 1}}, r"^threat\.epz: Threat has no such setting \(did you mean 'eps'\?\)")


def test_an_unknown_name_of_ours_comes_with_the_nearest_one():
    refused({"_target_": "robust_train.Thraet"}, r"did you mean 'robust_train\.Threat'")
    refused({"_target_": "robust_train.evasion.thraet.Threat"}, r"did you mean 'robust_train\.evasion\.threat'")
    refused({"_target_": "no_such_pkg.Net"}, "cannot import 'no_such_pkg.Net'", allow=["no_such_pkg"])


def test_missing_values_and_broken_interpolations():
    refused({"threat": {**THREAT, "eps": "???"}}, r"^threat\.eps: ")
    refused({"threat": {**THREAT, "eps": "${nowhere}"}}, r"^threat\.eps: .*nowhere")


# Recipes


def test_a_recipe_is_a_list_of_callbacks_twice_over():
    first, second = recipe("pgd_at"), recipe("pgd_at", "threat.eps=2/255")
    assert [type(callback).__name__ for callback in first] == [type(callback).__name__ for callback in second]
    assert "AdversarialTraining" in [type(callback).__name__ for callback in first]
    assert first[0].threat.eps == pytest.approx(8 / 255)
    assert second[0].threat.eps == pytest.approx(2 / 255)


def test_a_callback_set_to_null_is_left_out():
    names = [type(callback).__name__ for callback in recipe("pgd_at", "callbacks.robust_evaluation=null")]
    assert "RobustEvaluation" not in names
    assert names


def test_an_unknown_recipe_lists_those_there_are():
    with pytest.raises(
        ConfigError, match=r"recipe: there is no 'pgd_ta' \(did you mean 'pgd_at'\?\); available: .*pgd_at"
    ):
        recipe("pgd_ta")


def test_an_override_that_does_not_fit_is_one_line():
    with pytest.raises(ConfigError, match=r"^recipe 'pgd_at': .*epz") as caught:
        recipe("pgd_at", "threat.epz=1")
    assert "\n" not in str(caught.value)


def test_a_recipe_within_another_hydra_app_leaves_that_app_alone(tmp_path):
    script = tmp_path / "app.py"
    script.write_text(
        textwrap.dedent("""
            import hydra
            from hydra.core.global_hydra import GlobalHydra
            from hydra.core.hydra_config import HydraConfig
            from hydra.version import getbase
            from robust_train import recipe

            @hydra.main(config_path=None, version_base="1.2")
            def main(cfg):
                before = getbase(), HydraConfig.get().job.name, GlobalHydra.instance().is_initialized()
                assert recipe("pgd_at")
                assert before == (getbase(), HydraConfig.get().job.name, GlobalHydra.instance().is_initialized())
                print("left alone", cfg)

            main()
        """)
    )
    env = {**os.environ, "PYTHONPATH": str(Path(config.__file__).parents[1])}
    done = subprocess.run([sys.executable, str(script), "+a=1"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert "left alone {'a': 1}" in done.stdout, done.stderr

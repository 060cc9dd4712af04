"""The config source: Hydra's own suite for config sources, then what is particular to ours."""

from pathlib import Path

import pytest
from hydra import compose, initialize
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigLoadError, ConfigSource
from hydra.test_utils.config_source_common_tests import ConfigSourceTestSuite

from robust_train import hydra_plugin
from robust_train.hydra_plugin import RobustTrainConfigs, config_dir, register

SUITE_FILES = {
    "primary_config.yaml": "foo: bar\n",
    "primary_config_with_non_global_package.yaml": "# @package foo\nfoo: bar\n",
    "config_without_group.yaml": "group: false\n",
    "config_with_unicode.yaml": "group: 数据库\n",
    "config_with_defaults_list.yaml": "defaults:\n  - dataset: imagenet\nkey: value\n",
    "configs_with_defaults_list/global_package.yaml": "# @package _global_\ndefaults:\n  - foo: bar\nx: 10\n",
    "configs_with_defaults_list/group_package.yaml": "# @package _group_\ndefaults:\n  - foo: bar\nx: 10\n",
    "dataset.yaml": "dataset_yaml: true\n",
    "dataset/imagenet.yaml": "name: imagenet\npath: /datasets/imagenet\n",
    "dataset/cifar10.yaml": "name: cifar10\npath: /datasets/cifar10\n",
    "optimizer/adam.yaml": "type: adam\n",
    "optimizer/nesterov.yaml": "type: nesterov\n",
    "level1/level2/nested1.yaml": "l1_l2_n1: true\n",
    "level1/level2/nested2.yaml": "l1_l2_n2: true\n",
    "package_test/none.yaml": "foo: bar\n",
    "package_test/explicit.yaml": "# @package a.b\nfoo: bar\n",
    "package_test/global.yaml": "# @package _global_\nfoo: bar\n",
    "package_test/group.yaml": "# @package _group_\nfoo: bar\n",
    "package_test/group_name.yaml": "# @package foo._group_._name_\nfoo: bar\n",
    "package_test/name.yaml": "# @package _name_\nfoo: bar\n",
}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Folders ``conf`` and ``recipes`` that take the place of ours."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "conf").mkdir()
    monkeypatch.setattr(hydra_plugin, "config_dir", lambda name: tmp_path / name)
    return tmp_path


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


@pytest.mark.parametrize(("type_", "path"), [(RobustTrainConfigs, "robust-train://")])
class TestHydrasOwnSuite(ConfigSourceTestSuite):
    @pytest.fixture(autouse=True)
    def _files(self, folder):
        write(folder / "conf", SUITE_FILES)


@pytest.fixture
def two_groups(folder):
    write(
        folder,
        {
            "conf/attack/pgd.yaml": "steps: 10\n",
            "conf/train.yaml": "seed: 0\n",
            "recipes/fast.yaml": "# @package _global_\na: 1\n",
        },
    )


@pytest.mark.usefixtures("two_groups")
@pytest.mark.parametrize("mount", ["", "robust_train"])
def test_recipes_are_a_group_beside_the_groups_of_conf(mount):
    source = RobustTrainConfigs("test", f"robust-train://{mount}")
    assert source.available()
    assert source.list(mount, ObjectType.GROUP) == ["attack", "recipe"]
    assert source.list(mount, ObjectType.CONFIG) == ["train"]
    assert source.list(f"{mount}/recipe", None) == ["fast"]
    assert source.load_config(f"{mount}/recipe/fast").header["package"] == "_global_"
    assert source.is_config(f"{mount}/attack/pgd")
    assert not source.is_config(f"{mount}/attack/fast")


@pytest.mark.usefixtures("two_groups")
def test_nothing_but_the_mount_is_seen_beside_it():
    source = RobustTrainConfigs("test", "robust-train://robust_train")
    assert source.list("", None) == source.list("", ObjectType.GROUP) == ["robust_train"]
    assert source.list("", ObjectType.CONFIG) == []
    assert source.is_group("")
    assert source.is_group("robust_train")
    assert not source.is_group("attack")
    assert not source.is_group("robust_train_too")
    assert not source.is_config("train")
    with pytest.raises(ConfigLoadError, match="attack/pgd"):
        source.load_config("attack/pgd")


@pytest.mark.usefixtures("two_groups")
def test_both_mounts_compose_in_one_app():
    register()
    with initialize(config_path=None, version_base="1.3"):
        cfg = compose(
            overrides=[
                "hydra.searchpath=[robust-train://,robust-train://robust_train]",
                "+recipe=fast",
                "+robust_train/attack@here=pgd",
                "here.steps=3",
            ]
        )
    assert cfg == {"a": 1, "here": {"steps": 3}}


def test_registering_twice_leaves_one_source():
    register()
    register()
    assert Plugins.instance().discover(ConfigSource).count(RobustTrainConfigs) == 1


def test_the_checkouts_own_folders_are_found():
    assert config_dir("conf").is_dir()
    assert list(config_dir("recipes").glob("*.yaml"))


def test_the_stub_that_hydra_finds_offers_the_same_class():
    from robust_train import _hydra_discovery

    assert _hydra_discovery.RobustTrainConfigs is RobustTrainConfigs

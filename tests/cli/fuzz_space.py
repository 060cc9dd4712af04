"""Configurations that are wrong, or may be: every setting of every recipe, times values that it should not have."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from cli_kit import RECIPES
from omegaconf import OmegaConf

from robust_train.cli.compose import composed

# what keeps a sample cheap; a setting that is itself fuzzed comes after these
CHEAP = (
    "model=mlp",
    "model.network.hidden=[8]",
    "judge.curve=[]",
    "judge.attacks.pgd.steps=2",
    "judge.limit_batches=1",
    "trainer.accelerator=cpu",
    "trainer.enable_progress_bar=false",
    "+trainer.num_sanity_val_steps=0",
    "+trainer.enable_model_summary=false",
)
OWN_MODEL = ("dp_scatter", "embedding_pgd_at", "freelb")  # they are the same callbacks with another model
POISONED = {"filtered": "badnets", "filtered_trusted": "clean_label", "validated": "random_flips", "pgd_at": "wanet"}

TEXTS = ("abc", "'٣'", "'ünïcode ☃'", "''", "'" + "x" * 300 + "'", "1e", "0x10")
NOT_FINITE = ("nan", "inf", "-inf", "1e400")
WRONG_KIND = ("[]", "[1,a]", "{a: 1}")
HUGE = ("1" + "0" * 30, "-1" + "0" * 30)
NUMBERS = ("-1", "0", "3.7", "1e-320")
OTHERS = ("true", "null", "${nope}", "{}")
TARGETS = (
    "os.system",
    "subprocess.Popen",
    "builtins.eval",
    "torch.load",
    "torch.hub.load",
    "hydra.utils.instantiate",
    "robust_train.custody._files.write_whole",
    "robust_train.config.build",
    "robust_train.PDG",
    "robust_train.Threat",
    "robust_train.DPSGD",
    "torch.nn.Identity",
    "''",
    "3",
    "[]",
    "${nope}",
)
# where a wrong value is not the setting's fault (texts that may be anything), or where a right one starts processes
ANY_TEXT = ("name", "quarantine", "mask", "schema", "checkpoint", "manifest", "ckpt", "root")
NOT_FUZZED = ("trainer.devices", "trainer.strategy", "trainer.fast_dev_run", "trainer.deterministic")


@dataclass(frozen=True)
class Case:
    """Words for the command line, and what a refusal must speak of.

    Attributes:
        recipe: the recipe that they are given to.
        words: overrides.
        about: parts of keys, one of which the message must contain.
        value: what of the value the message must show, or "".
        sure: it must be refused.
    """

    recipe: str
    words: tuple[str, ...]
    about: tuple[str, ...]
    value: str = ""
    sure: bool = False


@functools.cache
def base(recipe: str) -> tuple[str, ...]:
    """The words that all cases of a recipe begin with."""
    return (f"recipe={recipe}", *([f"poison={POISONED[recipe]}"] if recipe in POISONED else []), *CHEAP)


def leaves(node: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """All settings below a config, groups of settings among them."""
    found: list[tuple[str, Any]] = []
    for name, value in node.items():
        found.append((f"{prefix}{name}", value))
        if isinstance(value, dict):
            found += leaves(value, f"{prefix}{name}.")
    return found


def cases() -> list[Case]:
    """All of them, always in the same order."""
    found: list[Case] = []
    for recipe in (name for name in RECIPES if name not in OWN_MODEL):
        config = OmegaConf.to_container(composed("train", base(recipe)))
        found += [case for key, value in leaves(config) if key not in NOT_FUZZED for case in _of(recipe, key, value)]
    return list(dict.fromkeys([*curated(), *found]))


def curated() -> list[Case]:
    """What is no value of one setting."""
    return [*_broken(), *conflicts()]


def _of(recipe: str, key: str, default: Any) -> list[Case]:
    last = key.rpartition(".")[2]
    # a default that is taken from elsewhere, such as ${task.eps}, is of that kind
    kinds = {"_target_": TARGETS, "_convert_": ("abc", "[]", "3", "null")}
    if last in kinds:
        return [Case(recipe, (f"{key}={value}",), (last, key.split(".")[-2])) for value in kinds[last]]
    known = len(last) > 4 and not isinstance(default, dict) and f"+{key}" not in {w.partition("=")[0] for w in CHEAP}
    found = [_typo(recipe, key, last)] if known else []
    if isinstance(default, dict):
        values = (*TEXTS[:4], *NOT_FINITE[:2], "[]", "3", "true", "null", "${nope}")
        return [*found, *(Case(recipe, (f"{key}={value}",), _parts(key)) for value in values), _gone(recipe, key)]
    sure: tuple[str, ...] = ()
    if isinstance(default, bool):
        sure = (*TEXTS, "3", *WRONG_KIND)
    elif isinstance(default, (int, float)):
        sure = (*TEXTS, "nan", *(() if last == "low" else ("-inf",)), *WRONG_KIND)  # inputs may have no lower bound
    elif isinstance(default, list):
        sure = ("3", "nan", "true")
    elif isinstance(default, str) and "${" not in default and last not in ANY_TEXT:
        sure = (*TEXTS[:5], "3", *WRONG_KIND)
    every = (*TEXTS, *NOT_FINITE, *WRONG_KIND, *HUGE, *NUMBERS, *OTHERS)
    found += [Case(recipe, (f"{key}={value}",), _parts(key), _shown(value), value in sure) for value in every]
    return [*found, Case(recipe, (f"~{key}",), _parts(key))]


def _typo(recipe: str, key: str, last: str) -> Case:
    """A setting with two letters exchanged: the nearest must be suggested."""
    wrong = f"{last[:-2]}{last[-1]}{last[-2]}" if last[-1] != last[-2] else f"{last}q"
    return Case(recipe, (f"{key[: -len(last)]}{wrong}=1",), (f"did you mean '{key}'",), sure=True)


def _gone(recipe: str, key: str) -> Case:
    return Case(recipe, (f"~{key}",), _parts(key))


def _parts(key: str) -> tuple[str, ...]:
    """The key's last part; of a part of a group, or of a list, that of the group will do."""
    parts = key.split(".")
    return (parts[-1], *(parts[-2:-1] if parts[-1].isdigit() else ()))


def _shown(value: str) -> str:
    """What of a value that was refused stands in the message: enough of it to be recognised."""
    text = value.strip("'")
    return "" if text in ("", "null", "true", "{}", "1e400", "1e-320") or text[0] in "[{$" or len(text) > 20 else text


def _broken() -> list[Case]:
    """No overrides, and choices that there are not."""
    words = {
        "=3": "=3",
        "+=3": "+=3",
        "threat.eps=1=2": "threat.eps",
        "threat.eps": "threat.eps",
        "threat..eps=1": "threat..eps",
        ".threat.eps=1": ".threat.eps",
        "threat.eps=[1": "threat.eps",
        "threat.eps={a": "threat.eps",
        "threat.eps='1": "threat.eps",
        "threat.eps=☃": "threat.eps",
        "schneemann☃=1": "schneemann",
        "recipe=pgdat": "did you mean 'pgd_at'",
        "recipe=[]": "recipe",
        "recipe=''": "recipe",
        "recipe=../standard": "recipe",
        "recipe=/etc/passwd": "recipe",
        "recipe=ünïcode": "recipe",
        "recipe={a: 1}": "recipe",
        "data=nothing": "data",
        "data=3": "data",
        "data=[1,2]": "data",
        "data=null": "data",
        "data=${nope}": "data",
        "model=small_cn": "did you mean 'small_cnn'",
        "poison=badnet": "did you mean 'badnets'",
        "poison=null": "poison",
        "trainer=defalt": "did you mean 'default'",
        "+attack@judge.attacks.x=pdg": "pdg",
        "hydra.callbacks.x._target_=os.system": "hydra.callbacks",
        "--config-dir=/no/such/folder": "config-dir",
        "--config-path=/tmp": "config-path",
        "--config-name=evaluate": "config-name",
        "hydra.searchpath=[/tmp]": "hydra.searchpath",
        "seed=${seed}": "seed",
        "seed=${threat.eps}": "seed",
        "threat.eps=${callbacks}": "threat",
        "~threat": "threat",
        "~model": "model",
        "~data": "data",
        "~trainer": "trainer",
        "~recipe": "callbacks",
        "~callbacks": "callbacks",
        "~judge": "judge",
        "~judge.attacks": "judge.attacks",
        "~threat._target_": "threat",
        "~model._target_": "model",
        "~trainer._target_": "trainer",
        "trainer.max_epochs=0": "max_epochs",
        "trainer.limit_train_batches=0": "limit_train_batches",
        "+trainer.max_steps=0": "max_steps",
        "+judge.limit=3": "judge.limit",
    }
    return [Case("pgd_at", (word,), (about,), sure=True) for word, about in words.items()]


def conflicts() -> list[Case]:
    """Settings that are right by themselves, and not together."""

    def case(recipe: str, about: str, *words: str) -> Case:
        return Case(recipe, words, (about,), sure=True)

    second = "+robust_train/callback@callbacks.second"
    return [
        case("pgd_at", "AdversarialTraining", f"{second}=adversarial_training"),
        case("trades", "AdversarialTraining", f"{second}=adversarial_training"),
        case("dp_sgd", "DPSGD", f"{second}=dp_sgd", "callbacks.second.target_epsilon=2"),
        case("filtered", "DataFilter", f"{second}=data_filter"),
        case("validated", "DataValidation", f"{second}=data_validation"),
        case("standard", "RobustEvaluation", f"{second}=robust_evaluation"),
        case("dp_sgd", "DataFilter", f"{second}=data_filter"),
        case("filtered", "DataFilter", f"{second}=dp_sgd", "callbacks.second.target_epsilon=2"),
        case("dp_sgd", "overfit_batches", "+trainer.overfit_batches=2"),
        case("dp_sgd", "reload_dataloaders", "+trainer.reload_dataloaders_every_n_epochs=1"),
        case(
            "dp_sgd",
            "GradientAccumulationScheduler",
            "+callbacks.x={_target_: pytorch_lightning.callbacks.GradientAccumulationScheduler, scheduling: {0: 2}}",
        ),
        case(
            "dp_sgd",
            "BatchNorm",
            "model.network._target_=robust_train.starter.SmallCNN",
            "~model.network.shape",
            "~model.network.hidden",
            "callbacks.dp_sgd.fix_modules=false",
        ),
        case("dp_sgd", "noise_multiplier", "callbacks.dp_sgd.noise_multiplier=0"),
        case("dp_sgd", "target_epsilon", "callbacks.dp_sgd.target_epsilon=null"),
        case("dp_sgd", "max_grad_norm", "callbacks.dp_sgd.max_grad_norm=inf"),
        case("dp_sgd", "augmentation_multiplicity", "callbacks.dp_sgd.augmentation_multiplicity=512"),
        case("trades", "TRADES", "callbacks.adversarial_training.attack.random_start=false"),
        case("trades", "TRADES", "callbacks.adversarial_training.attack.targeted=next"),
        case("pgd_at", "warmup_epochs", "callbacks.adversarial_training.warmup_epochs=30"),
        case(
            "fgsm_rs",
            "warmup",
            "callbacks.adversarial_training.warmup_epochs=2",
            "callbacks.adversarial_training.warmup=steps",
        ),
        case("pgd_at", "would train undefended", "callbacks.adversarial_training=null"),
        case("dp_sgd", "would train undefended", "~callbacks.dp_sgd"),
        case("filtered", "would train undefended", "callbacks.data_filter=null"),
        case("validated", "would train undefended", "~callbacks.data_validation"),
        case("pgd_at", "callbacks.adversarial_training", "+callbacks.adversarial_training._partial_=true"),
        case("pgd_at", "callbacks.x", "+callbacks.x=3"),
        case("pgd_at", "callbacks.x", "+callbacks.x={_target_: torch.nn.Identity}"),
        case("pgd_at", "threat.low", "threat.low=1", "threat.high=0"),
        case("pgd_at", "threat.mean", "threat.mean=0.5"),
        case("pgd_at", "threat.std", "threat.mean=0.5", "threat.std=0"),
        case("pgd_at", "judge", "judge.attacks.pgd=null", "judge.attacks.apgd=null"),
        case("pgd_at", "project", "+attack@judge.attacks.x=n_fgsm"),
        case("pgd_at", "momentum", "+model.momentum=0.5"),
        case("filtered", "trusted", "callbacks.data_filter.trusted_size=3"),
        case("filtered", "mask", "callbacks.data_filter.mask=nowhere.json"),
        case(
            "filtered", "warmup_epochs", "callbacks.data_filter.when=during", "callbacks.data_filter.warmup_epochs=30"
        ),
        case("validated", "nowhere.yaml", "callbacks.data_validation.schema=nowhere.yaml"),
        case(
            "validated",
            "trusted",
            "callbacks.data_validation.schema=nowhere.yaml",
            "callbacks.data_validation.trusted=[1]",
        ),
        case("pgd_at", "rate", "poison.rate=1e-9"),
        case("pgd_at", "target", "poison.target=10"),
    ]

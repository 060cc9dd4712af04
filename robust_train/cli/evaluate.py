"""``robust-train evaluate ckpt=… attack=pgd``: judge a checkpoint."""

from __future__ import annotations

import json
import re
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from robust_train.cli.beside import beside
from robust_train.cli.checks import check_settings
from robust_train.cli.compose import launch, typed_overrides
from robust_train.cli.train import RESULT_FILE, keep_what_was_asked, objective, versions
from robust_train.config import ConfigError, build
from robust_train.custody._files import write_whole
from robust_train.hydra_plugin import config_dir

# what a checkpoint's own run says of how to read it
ABOUT_THE_MODEL = ("model", "data", "task", "threat")
EXAMPLES_FILE = "adversarial_examples.safetensors"


def evaluate(argv: list[str]) -> None:
    """The command. What the checkpoint's own run was told of model, data, task and threat is taken from its folder."""
    words = [_spelled(word) for word in argv]
    launch("evaluate", run, [*told(words), *words])


def run(cfg: DictConfig, folder: Path) -> float | tuple[float, ...]:
    """Judge a checkpoint and print the table. The folder gets ``result.json``, ``result.csv``, ``figure.svg`` and, of a
    classification, ``adversarial_examples.safetensors``.

    Returns:
        What ``optimize`` names.

    Raises:
        ConfigError: there is no such checkpoint, it is of another model, or a setting is out of range.
    """
    from robust_train.cli.judge import judges, kept_pictures, load_weights, measured
    from robust_train.evasion.attacks.base import what_holds
    from robust_train.report import comparison

    if OmegaConf.is_missing(cfg, "ckpt") or cfg.ckpt is None:
        raise ConfigError("ckpt: missing; name the checkpoint to judge: robust-train evaluate ckpt=FILE attack=pgd")
    keep_what_was_asked(cfg, typed_overrides())
    check_settings(cfg, nodes=("model", "data", "trainer", "judge", "threat"))
    allow = list(cfg.allow)
    threat = build(cfg.threat, allow=allow)
    with open_dict(cfg):
        cfg.judge.attacks = {HydraConfig.get().runtime.choices["attack"]: cfg.attack, **cfg.judge.attacks}
    attacks = judges(cfg, threat)
    model, data = build(cfg.model, allow=allow), build(cfg.data, allow=allow)
    path = Path(hydra.utils.to_absolute_path(str(cfg.ckpt)))
    load_weights(model, path)
    found, examples = measured(cfg, model, data, threat, attacks, beside(cfg, path))
    results, pictures = {path.stem: found}, None
    files = [RESULT_FILE, "result.csv"]
    if examples is not None:
        examples.write(folder / EXAMPLES_FILE)
        pictures = kept_pictures(path.stem, examples, threat)
        files.append(EXAMPLES_FILE)
    within = what_holds(attacks.values(), threat, OmegaConf.select(cfg, "callbacks.robust_evaluation.layer"))
    summary = {
        "recipe": path.stem,
        "overrides": typed_overrides(),
        "ckpt": str(path),
        "threat": within,
        "seed": cfg.seed,
        "judged_on": "test set, worst case over the attacks that ran",
        "attacks": {name: str(attack) for name, attack in attacks.items()},
        "results": results,
        "versions": versions(),
        "config": OmegaConf.to_container(cfg, resolve=True),
    }
    (folder / "result.csv").write_text(comparison.as_csv(results), encoding="utf-8")
    write_whole(folder / RESULT_FILE, json.dumps(summary, indent=2, default=str) + "\n")
    if pictures or found["curve"] or "evaluation" in found:
        drawing = comparison.figure(results, threat=within, eps=threat.radius, rows=pictures)
        (folder / "figure.svg").write_text(drawing, encoding="utf-8")
        files.append("figure.svg")
    print("\n" + comparison.as_table(results, within))
    print(f"\nIn {folder}: {', '.join(files)}.")
    return objective(cfg, results[path.stem])


def told(argv: list[str]) -> list[str]:
    """What the run that made the checkpoint was told of model, data, task and threat, unless it is asked for anew."""
    named = [word.partition("=")[2] for word in argv if word.startswith("ckpt=")]
    folders = Path(named[-1]).absolute().parents if named and named[-1] else []
    kept = next((f / ".hydra/overrides.yaml" for f in folders if (f / ".hydra/overrides.yaml").is_file()), None)
    if kept is None:
        return []
    asked = {_root(word) for word in argv}
    words = [str(word) for word in OmegaConf.load(kept)]
    words = [word for word in words if "@" not in word.partition("=")[0]]  # whose value would land elsewhere
    told = [word for word in words if _root(word) in ABOUT_THE_MODEL and _root(word) not in asked]
    if told:
        print(f"from {kept}: {' '.join(told)}")
    return told


def _root(override: str) -> str:
    """The first part of its key: ``model`` of ``model.lr=1`` and ``+model.width=2``."""
    return override.lstrip("+~").partition("=")[0].partition(".")[0].partition("@")[0]


def _spelled(word: str) -> str:
    """``attack=AutoAttack`` and ``attack=autoattack`` as ``attack=auto_attack``: case and underscores do not matter."""
    key, equals, name = word.partition("=")
    if key.lstrip("+").partition("@")[0] != "attack" or not equals:
        return word
    plain = re.sub(r"[-_ ]", "", name).lower()
    stems = {path.stem.replace("_", ""): path.stem for path in (config_dir("conf") / "attack").glob("*.yaml")}
    return f"{key}={stems.get(plain, name)}"

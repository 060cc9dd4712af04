"""``robust-train recipe=…``: train with a recipe, judge the result, and show what it bought."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from robust_train.cli import INTERRUPTED
from robust_train.cli.checks import check_kind, check_seed, check_settings, check_that_it_trains
from robust_train.cli.compose import launch, typed_overrides
from robust_train.config import ConfigError, build, check_defences
from robust_train.custody._files import write_whole

RESULT_FILE = "result.json"
CHECKPOINTS = "checkpoints"


def train(argv: list[str]) -> None:
    """The command."""
    launch("train", run, argv)


def run(cfg: DictConfig, folder: Path) -> float | tuple[float, ...]:
    """One job: train and judge, unless that was done before in this folder of a sweep.

    Args:
        cfg: ``conf/train.yaml``, composed.
        folder: for everything that the run leaves.

    Returns:
        What ``optimize`` names.
    """
    settings = HydraConfig.get()
    keep_what_was_asked(cfg, typed_overrides())
    if settings.mode is RunMode.MULTIRUN and "LOCAL_RANK" not in os.environ:  # or processes of a job would part ways
        earlier = _finished(folder / RESULT_FILE, cfg)
        if earlier is not None:
            print(f"finished before, and left as it is: {folder}", flush=True)
            return objective(cfg, earlier)
    recipe = settings.runtime.choices.get("recipe") or "no_recipe"
    return train_and_judge(cfg, folder, recipe, overrides=typed_overrides())


def train_and_judge(
    cfg: DictConfig, folder: Path, recipe: str, *, overrides: list[str], resume: bool = False
) -> float | tuple[float, ...]:
    """Train, judge, write ``result.json`` and ``figure.svg`` into the run's folder, and print the table.

    Args:
        cfg: ``conf/train.yaml``, composed.
        folder: the run's.
        recipe: name of the hardened model.
        overrides: what the user asked for, for the record.
        resume: go on from the newest checkpoints in the folder.

    Returns:
        What ``optimize`` names, of the hardened model on the test set. In processes other than the first, NaN.

    Raises:
        ConfigError: a setting is missing, out of range or names what is not allowed: before anything is trained.
    """
    from robust_train.cli.judge import judged, judges, pictures, quiet
    from robust_train.evasion.attacks.base import what_holds
    from robust_train.report import comparison

    check_settings(cfg)
    threat = build(cfg.threat, allow=list(cfg.allow))
    attacks = judges(cfg, threat)
    names = (["standard"] if cfg.baseline else []) + [recipe]
    for name in names:
        _check_folder(folder / name, resume=resume)
        with quiet():  # what cannot be built is found before anything is trained
            *_, trainer = _parts(cfg, folder / name, defended=name == recipe)
        check_defences(name, trainer.callbacks)
    results, models, beside, data = {}, {}, {}, None
    for name in names:
        print(f"\n=== {name}: training ===", flush=True)
        start = time.perf_counter()
        models[name], data, beside[name] = _train(cfg, folder / name, defended=name == recipe, resume=resume)
        results[name] = {"train_seconds": round(time.perf_counter() - start, 1)}
    if not _first_process():
        return float("nan")
    for name in names:
        print(f"\n=== {name}: judging ===", flush=True)
        results[name] = {
            **judged(cfg, models[name], data, threat, attacks, beside[name]),  # type: ignore[arg-type]
            **_privacy(folder / name),
            **_poisoning(cfg, folder / name, models[name], data),
            **results[name],
        }
    within = what_holds(attacks.values(), threat, OmegaConf.select(cfg, "callbacks.robust_evaluation.layer"))
    summary = {
        "recipe": recipe,
        "overrides": overrides,
        "threat": within,
        "seed": cfg.seed,
        "judged_on": "test set, worst case over the attacks that ran",
        "attacks": {name: str(attack) for name, attack in attacks.items()},
        "results": results,
        "versions": versions(),
        "config": OmegaConf.to_container(cfg, resolve=True),
    }
    (folder / "result.csv").write_text(comparison.as_csv(results), encoding="utf-8")
    with ExitStack() as stack:
        for name in names:
            for callback in beside[name]:
                stack.enter_context(callback.serving(models[name]))
        rows = pictures(models, threat, attacks, cfg)
    (folder / "figure.svg").write_text(
        comparison.figure(results, threat=within, eps=threat.radius, rows=rows), encoding="utf-8"
    )
    write_whole(folder / RESULT_FILE, json.dumps(_as_json(summary), indent=2) + "\n")  # the last: it says all is there
    print("\n" + comparison.as_table(results, within))
    print(
        f"\nIn {folder}: result.json, result.csv, figure.svg; for each model metrics.csv and checkpoints/, "
        "and privacy_certificate.json where it was trained privately."
    )
    return objective(cfg, results[recipe])


def keep_what_was_asked(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Where the user names a class, as ``model._target_=my_pkg.Net``, drop settings that were for another one."""
    keys = [override.lstrip("+").partition("=")[0] for override in overrides]
    for node in ("model", "data"):
        if f"{node}._target_" in keys:
            asked = {key.split(".")[1] for key in keys if key.startswith(f"{node}.")}
            with open_dict(cfg):
                cfg[node] = {key: value for key, value in cfg[node].items_ex(resolve=False) if key in asked}


def _finished(path: Path, cfg: DictConfig) -> dict[str, Any] | None:
    """The hardened model's metrics, if the same configuration was run to its end before."""
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        same = earlier["config"] == _as_json(OmegaConf.to_container(cfg, resolve=True))
        return earlier["results"][earlier["recipe"]] if same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def objective(cfg: DictConfig, result: dict[str, Any]) -> float | tuple[float, ...]:
    """What ``optimize`` names, for Hydra's sweepers: a number, or several.

    A task without classes has no accuracy: minus its loss stands for ``robust_acc`` and ``clean_acc``.
    """

    def one(name: str) -> float:
        if name.endswith("_acc") and name not in result:
            return -float(result[name.replace("_acc", "_loss")])
        if (value := result.get(name)) is None:
            raise ConfigError(f"optimize: {name} was not measured in this run; measured: {', '.join(result)}")
        return float(value)

    if isinstance(cfg.optimize, str):
        return one(cfg.optimize)
    return tuple(one(name) for name in cfg.optimize)


def _parts(cfg: DictConfig, folder: Path, *, defended: bool) -> tuple[Any, Any, Any]:
    """Model, data and Trainer of one training run.

    The undefended twin gets the same seed and everything but the defences.
    """
    import pytorch_lightning as pl
    from pytorch_lightning.callbacks import LambdaCallback, ModelCheckpoint
    from pytorch_lightning.loggers import CSVLogger

    allow = list(cfg.allow)
    _seed(cfg.seed)
    data, model = build(cfg.data, allow=allow), build(cfg.model, allow=allow)
    check_kind("data", data, "LightningDataModule")
    check_kind("model", model, "LightningModule")
    if cfg.ckpt is not None:
        from robust_train.cli.judge import load_weights

        load_weights(model, Path(hydra.utils.to_absolute_path(cfg.ckpt)))
    built = build({"callbacks": OmegaConf.to_container(cfg.callbacks, resolve=True)}, allow=allow)["callbacks"]
    for name, callback in built.items():
        if callback is not None and not isinstance(callback, pl.Callback):
            raise ConfigError(f"callbacks.{name}: must be a Lightning callback with a _target_, got {callback!r:.80}")
    callbacks = [c for c in built.values() if c is not None and (defended or not getattr(c, "defends", False))]
    if (poison := poison_of(cfg)) is not None:
        from robust_train import PGD, PoisonSimulation

        # PGD makes clean-label poison work; other poisons have no use for it
        threat = build(cfg.threat, allow=allow)
        callbacks.append(PoisonSimulation(poison, cfg.task.classes, PGD(steps=20), threat))
    saved = folder / CHECKPOINTS
    callbacks.append(ModelCheckpoint(saved, filename="epoch{epoch}", auto_insert_metric_name=False))
    callbacks.append(LambdaCallback(on_exception=lambda trainer, *_: _save(trainer, saved)))
    again = len(list(folder.glob("resumed*")))
    trainer = build(
        {
            "trainer": {
                **OmegaConf.to_container(cfg.trainer, resolve=True),  # type: ignore[dict-item]
                "callbacks": callbacks,
                "logger": CSVLogger(folder, name="", version=f"resumed{again + 1}" if saved.is_dir() else ""),
                "default_root_dir": str(folder),
            }
        },
        allow=allow,
    )["trainer"]
    check_kind("trainer", trainer, "Trainer")
    check_that_it_trains(trainer)
    return model, data, trainer


def _check_folder(folder: Path, *, resume: bool) -> None:
    """What an interrupted job of a sweep left is removed; nothing else is ever overwritten."""
    if resume or not (folder / CHECKPOINTS).is_dir() or not _first_process():
        return
    if HydraConfig.get().mode is not RunMode.MULTIRUN:
        raise ConfigError(
            f"hydra.run.dir: {folder.parent} holds a run already: choose another, or go on with it: "
            f"robust-train resume {folder.parent}"
        )
    shutil.rmtree(folder)


def _seed(seed: Any) -> None:
    import pytorch_lightning as pl

    check_seed(seed)
    pl.seed_everything(seed, workers=True, verbose=False)


def _train(cfg: DictConfig, folder: Path, *, defended: bool, resume: bool) -> tuple[Any, Any, list[Any]]:
    """One training run in ``folder``; the trained module, the data module, and what judging needs beside them."""
    model, data, trainer = _parts(cfg, folder, defended=defended)
    begin = newest_checkpoint(folder / CHECKPOINTS) if resume else None
    if begin is not None:
        print(f"going on from {begin}", flush=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)  # Lightning's own affair
        try:
            trainer.fit(model, data, ckpt_path=begin)
        except (KeyboardInterrupt, SystemExit):
            if not trainer.interrupted:
                raise
            print(f"\ninterrupted; to go on: robust-train resume {folder.parent}", file=sys.stderr, flush=True)
            raise SystemExit(INTERRUPTED) from None
    _leave_group()
    return model, data, [c for c in trainer.callbacks if getattr(c, "at_test", False)]


def _save(trainer: Any, folder: Path) -> None:
    """So that an interrupted run can be resumed where it was."""
    if trainer.training and not trainer.fast_dev_run:
        trainer.save_checkpoint(folder / "interrupted.ckpt")


def newest_checkpoint(folder: Path) -> str | None:
    """The checkpoint with the most steps, or None where there is none."""
    import torch

    steps = {
        str(path): torch.load(path, map_location="cpu", weights_only=True)["global_step"]
        for path in sorted(folder.glob("*.ckpt"))
    }
    return max(steps, key=lambda path: steps[path]) if steps else None


def _first_process() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0" and os.environ.get("NODE_RANK", "0") == "0"


def _leave_group() -> None:
    """After training in several processes: judging is done by the first one alone."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def poison_of(cfg: DictConfig) -> Any:
    """The simulated poison that was asked for, or None."""
    return None if cfg.get("poison") is None else build(cfg.poison, allow=list(cfg.allow))


def _poisoning(cfg: DictConfig, folder: Path, model: Any, data: Any) -> dict[str, Any]:
    """What a simulated backdoor achieved on the test set, and what a filter left out."""
    from robust_train.poisoning.metrics import trigger_success
    from robust_train.poisoning.poisons.backdoor import Backdoor
    from robust_train.poisoning.records import REPORT_FILE, read_report

    found: dict[str, Any] = {}
    if isinstance(poison := poison_of(cfg), Backdoor):
        found["attack_success_rate"] = trigger_success(model, data.test_dataloader(), poison, cfg.task.classes)["asr"]
    if (folder / REPORT_FILE).is_file():
        report = read_report(folder / REPORT_FILE)
        found["filter_kept"] = report["kept"]
    return found


def _privacy(folder: Path) -> dict[str, Any]:
    """Epsilon and delta of a run that was trained privately, and epsilon over its steps as ``privacy_epsilon.svg``."""
    path = folder / "privacy_certificate.json"
    if not path.is_file():
        return {}
    from robust_train.privacy.certificate import Certificate
    from robust_train.report.privacy import epsilon_chart

    certificate = Certificate.read(path)
    chart = epsilon_chart(certificate)
    (folder / "privacy_epsilon.svg").write_text(chart, encoding="utf-8")
    return {"epsilon": certificate.epsilon, "delta": certificate.delta}


def versions() -> dict[str, str]:
    """Of what a result depends on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": sys.version.split()[0]}
    for name in ("robust-train", "torch", "pytorch-lightning", "hydra-core", "torchattacks"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _as_json(value: Any) -> Any:
    """As it is read back from a file."""
    return json.loads(json.dumps(value, default=str))

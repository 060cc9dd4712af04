"""The command ``robust-train``: train with a recipe, judge the result, and show what it bought."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.plugins import Plugins
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from robust_train.config import ConfigError, build
from robust_train.hydra_plugin import CommandLineSearchPath, config_dir, register

if TYPE_CHECKING:
    import pytorch_lightning as pl

CURVE_STEPS = 20
SCHEMA_ROWS = 1024  # that a manifest's schema is inferred from


def main() -> None:
    """Entry point; torch is imported only once a run begins, so that ``--help`` answers at once."""
    if sys.argv[1:2] and sys.argv[1] in COMMANDS:
        COMMANDS[sys.argv[1]](sys.argv[2:])
        return
    register()
    Plugins.instance().register(CommandLineSearchPath)
    if not getattr(sys.flags, "safe_path", False):  # a console script does not see the modules beside it
        sys.path.insert(0, os.getcwd())
    if len(sys.argv) == 1:
        sys.argv.append("--help")
    hydra.main(version_base="1.3", config_path=str(config_dir("conf")), config_name="train")(run)()


def _privacy_command(argv: list[str]) -> None:
    from robust_train.privacy import command
    from robust_train.report import epsilon_chart

    command.main(argv, draw=epsilon_chart)


def _manifest_command(argv: list[str]) -> None:
    from robust_train.custody import command

    command.manifest_main(argv, _training_data)


def _verify_command(argv: list[str]) -> None:
    from robust_train.custody import command

    command.verify_main(argv, _training_data)


def _quarantine_command(argv: list[str]) -> None:
    from robust_train.custody.digest import digest
    from robust_train.poisoning import command
    from robust_train.report._svg import png

    command.main(argv, load=_training_data, digest=digest, draw=png)


COMMANDS = {
    "privacy": _privacy_command,
    "manifest": _manifest_command,
    "verify": _verify_command,
    "quarantine": _quarantine_command,
}


@dataclass(frozen=True)
class _TrainingData:
    """What the commands on data work with."""

    dataset: Any
    label_of: Callable[[Any], Any] | None
    schema: dict[str, Any] | None


def _training_data(overrides: list[str]) -> _TrainingData:
    """The training set that overrides such as ``data=fashion_mnist`` name."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException

    from robust_train.callbacks._batch import find_input, get, label_candidates

    register()
    Plugins.instance().register(CommandLineSearchPath)
    try:
        with initialize_config_dir(str(config_dir("conf")), version_base="1.3"):
            cfg = compose("train", overrides=overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(" ".join(str(error).split())) from error
    data = build(cfg.data, allow=list(cfg.allow))
    data.prepare_data()
    data.setup("fit")
    dataset = data.train_dataloader().dataset
    if (poison := _poison(cfg)) is not None:
        from robust_train.poisoning.dataset import PoisonedDataset

        dataset = PoisonedDataset(dataset, poison, cfg.task.classes)
    sample = dataset[0]
    path = find_input(sample)
    places = label_candidates(sample, path)
    label_of = (lambda example: int(get(example, places[0]))) if places else None
    return _TrainingData(dataset, label_of, _schema(dataset, path, places))


def _schema(dataset: Any, path: Any, places: Any) -> dict[str, Any] | None:
    """What batches of the data look like, from rows that are spread evenly over them; None if they make up no batch."""
    import torch
    from torch.utils.data import default_collate

    from robust_train.callbacks._batch import get
    from robust_train.poisoning.infer import infer, observe

    rows = torch.linspace(0, len(dataset) - 1, min(len(dataset), SCHEMA_ROWS)).round().long().tolist()
    observed = []
    for start in range(0, len(rows), 64):
        try:
            batch = default_collate([dataset[row] for row in rows[start : start + 64]])
            observed.append(observe(get(batch, path), get(batch, places[0]) if places else None))
        except (TypeError, ValueError, RuntimeError) as error:
            print(f"no schema is recorded, because rows do not make up a batch: {' '.join(str(error).split())[:200]}")
            return None
    return infer(observed, source=f"{len(rows)} rows").to_dict()


def run(cfg: DictConfig) -> float:
    """Train, judge, write ``result.json`` and ``figure.svg`` into the run's folder, and print the table.

    Args:
        cfg: ``conf/train.yaml``, composed.

    Returns:
        The hardened model's worst-case accuracy on the test set (for a task without classes, minus its loss).
    """
    try:
        return _run(cfg)
    except ConfigError as error:
        raise SystemExit(f"robust-train: {error}") from None


def _run(cfg: DictConfig) -> float:
    from hydra.core.hydra_config import HydraConfig

    from robust_train.report import comparison

    folder = Path(HydraConfig.get().runtime.output_dir)
    recipe = HydraConfig.get().runtime.choices.get("recipe", "recipe")
    for node in ("model", "data", "trainer", "callbacks", "judge"):
        if cfg.get(node) is None:
            raise ConfigError(f"{node}: missing; name one, for example with recipe=… or {node}=…")
    threat = build(cfg.threat, allow=list(cfg.allow))
    attacks = _judges(cfg, threat)
    names = (["standard"] if cfg.baseline else []) + [recipe]
    results, models = {}, {}
    for name in names:
        print(f"\n=== {name}: training, then judging ===" if cfg.baseline else f"\n=== {name} ===", flush=True)
        start = time.perf_counter()
        models[name], data, privacy = _train(cfg, folder / name, defended=name == recipe)
        seconds = time.perf_counter() - start
        results[name] = {
            **_judge(cfg, models[name], data, threat, attacks),
            **privacy,
            **_poisoning(cfg, folder / name, models[name], data),
            "train_seconds": round(seconds, 1),
        }
    summary = {
        "recipe": recipe,
        "threat": threat.describe(),
        "seed": cfg.seed,
        "judged_on": "test set, worst case over the attacks that ran",
        "attacks": {name: str(attack) for name, attack in attacks.items()},
        "results": results,
        "versions": _versions(),
        "config": OmegaConf.to_container(cfg, resolve=True),
    }
    (folder / "result.json").write_text(json.dumps(summary, indent=2, default=str) + "\n", encoding="utf-8")
    (folder / "result.csv").write_text(comparison.as_csv(results), encoding="utf-8")
    rows = _pictures(models, threat, attacks, cfg)
    (folder / "figure.svg").write_text(
        comparison.figure(results, threat=threat.describe(), eps=threat.radius, rows=rows), encoding="utf-8"
    )
    print("\n" + comparison.as_table(results, threat.describe()))
    print(
        f"\nIn {folder}: result.json, result.csv, figure.svg; for each model metrics.csv and checkpoints/, "
        "and privacy_certificate.json where it was trained privately."
    )
    final = results[recipe]
    return final["robust_acc"] if "robust_acc" in final else -final["robust_loss"]


def _judges(cfg: DictConfig, threat: Any) -> dict[str, Any]:
    """The attacks that judge; says aloud which of them cannot run."""
    nodes: Any = OmegaConf.to_container(cfg.judge.attacks, resolve=True)
    if find_spec("torchattacks") is None:
        for name in [n for n, node in nodes.items() if node and str(node.get("_target_")).endswith("TorchAttack")]:
            del nodes[name]
            print(f"judge.attacks.{name} is not run: torchattacks is not installed (see README, Dependencies).")
    attacks = build({str(name): node for name, node in nodes.items() if node}, allow=list(cfg.allow))
    for name, attack in list(attacks.items()):
        try:
            attack.check(threat)
        except ValueError as error:
            del attacks[name]
            print(f"judge.attacks.{name} is not run: {error}.")
    if not attacks:
        raise ConfigError("judge.attacks: no attack is left to judge with; name at least one")
    return attacks


def _train(
    cfg: DictConfig, folder: Path, *, defended: bool
) -> tuple[pl.LightningModule, pl.LightningDataModule, dict[str, Any]]:
    """One training run in ``folder``; the undefended twin gets the same seed and everything but the defences.

    Returns:
        The trained module, the data module, and what the run's privacy certificate says (nothing without one).
    """
    import pytorch_lightning as pl
    from pytorch_lightning.callbacks import ModelCheckpoint
    from pytorch_lightning.loggers import CSVLogger

    allow = list(cfg.allow)
    pl.seed_everything(cfg.seed, workers=True)
    data, model = build(cfg.data, allow=allow), build(cfg.model, allow=allow)
    if cfg.ckpt is not None:
        _load_weights(model, Path(hydra.utils.to_absolute_path(cfg.ckpt)))
    callbacks = [c for c in build(cfg.callbacks, allow=allow).values() if c is not None]
    if not defended:
        callbacks = [c for c in callbacks if not getattr(c, "defends", False)]
    if (poison := _poison(cfg)) is not None:
        from robust_train import PGD, PoisonSimulation

        # PGD makes clean-label poison work; other poisons have no use for it
        threat = build(cfg.threat, allow=allow)
        callbacks.append(PoisonSimulation(poison, cfg.task.classes, PGD(steps=20), threat))
    callbacks.append(ModelCheckpoint(folder / "checkpoints", filename="epoch{epoch}", auto_insert_metric_name=False))
    logger = CSVLogger(folder, name="", version="")
    trainer = build(
        {
            **OmegaConf.to_container(cfg.trainer, resolve=True),  # type: ignore[dict-item]
            "callbacks": callbacks,
            "logger": logger,
            "default_root_dir": str(folder),
        },
        allow=allow,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)  # Lightning's own affair
        trainer.fit(model, data)
    return model, data, _privacy(folder)


def _poison(cfg: DictConfig) -> Any:
    return None if cfg.get("poison") is None else build(cfg.poison, allow=list(cfg.allow))


def _poisoning(cfg: DictConfig, folder: Path, model: Any, data: Any) -> dict[str, Any]:
    """What a simulated backdoor achieved on the test set, and what a filter left out."""
    from robust_train.poisoning.metrics import trigger_success
    from robust_train.poisoning.poisons.backdoor import Backdoor
    from robust_train.poisoning.records import REPORT_FILE, read_report

    found: dict[str, Any] = {}
    if isinstance(poison := _poison(cfg), Backdoor):
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


def _load_weights(model: pl.LightningModule, path: Path) -> None:
    """Weights of a checkpoint, and nothing else of it."""
    import torch

    if not path.is_file():
        raise ConfigError(f"ckpt: there is no file {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(checkpoint.get("state_dict", checkpoint))
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"ckpt: {path} does not fit model={type(model).__name__}: {reason}") from error


def _judge(
    cfg: DictConfig, model: pl.LightningModule, data: pl.LightningDataModule, threat: Any, attacks: dict[str, Any]
) -> dict[str, Any]:
    """Metrics of the test set under the judging attacks, and the curve over eps."""
    import pytorch_lightning as pl

    from robust_train import PGD, RobustEvaluation

    shared: dict[str, Any] = {"limit_batches": cfg.judge.limit_batches, "seed": cfg.seed}
    if settings := cfg.callbacks.get("robust_evaluation"):  # how the user's batch is read
        shared |= {key: settings.get(key) for key in ("inputs", "labels", "logits")}
    evaluations = [RobustEvaluation(attacks, threat, **shared)]
    factors = [float(f) for f in cfg.judge.curve]
    for i, factor in enumerate(factors):
        evaluations.append(
            RobustEvaluation({"pgd": PGD(steps=CURVE_STEPS)}, threat.scaled(factor), name=f"curve{i}", **shared)
        )
    keys = ("accelerator", "devices", "precision", "limit_test_batches", "fast_dev_run", "enable_progress_bar")
    with warnings.catch_warnings(), _quiet():
        trainer = pl.Trainer(
            **{key: cfg.trainer[key] for key in keys if key in cfg.trainer},
            callbacks=evaluations,  # type: ignore[arg-type]
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        measured = {k: float(v) for k, v in trainer.test(model, data, verbose=False)[0].items()}
    own = {k.removeprefix("test/"): v for k, v in measured.items() if k.startswith("test/") and "curve" not in k}
    kind = "acc" if "test/robust_acc" in measured else "loss"
    curve = [[0.0, own[f"clean_{kind}"]]]
    curve += [[f * threat.radius, measured[f"test/curve{i}/robust_{kind}"]] for i, f in enumerate(factors)]
    return {**own, "curve": curve if factors else []}


@contextmanager
def _quiet() -> Iterator[None]:
    """Judging makes several evaluations at once; what they announce is in ``result.json``."""
    loggers = [logging.getLogger(f"{root}.utilities.rank_zero") for root in ("lightning.pytorch", "pytorch_lightning")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _pictures(
    models: dict[str, Any], threat: Any, attacks: dict[str, Any], cfg: DictConfig
) -> list[dict[str, Any]] | None:
    """The first test image of up to eight classes, clean and attacked; None where the batch is no (image, class)."""
    import torch

    from robust_train import ClassifierVictim
    from robust_train.evasion.randomness import generator_for

    data = build(cfg.data, allow=list(cfg.allow))
    data.prepare_data()
    data.setup("test")
    batch = data.on_after_batch_transfer(next(iter(data.test_dataloader())), 0)
    if not isinstance(batch, (list, tuple)) or len(batch) != 2 or not all(isinstance(t, torch.Tensor) for t in batch):
        return None
    x, labels = batch
    if x.ndim != 4 or x.shape[1] not in (1, 3) or labels.ndim != 1 or labels.is_floating_point():
        return None
    first = [int((labels == label).nonzero()[0]) for label in labels.unique()[:8]]
    x, labels, attack = x[first], labels[first], next(iter(attacks.values()))
    rows = []
    for name, model in models.items():
        model = model.eval().cpu()
        victim = ClassifierVictim(model, labels, stop_when_fooled=True)
        x_adv = attack(victim, x, threat, generator_for(x.device, "pictures", cfg.seed))
        with torch.no_grad():
            clean, fooled = model(x).argmax(1), model(x_adv).argmax(1)
        rows.append(
            {
                "name": name,
                "labels": labels.tolist(),
                "clean": {"images": threat.to_pixels(x), "predicted": clean.tolist()},
                "attacked": {"images": threat.to_pixels(x_adv), "predicted": fooled.tolist()},
            }
        )
    return rows


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": sys.version.split()[0]}
    for name in ("robust-train", "torch", "pytorch-lightning", "hydra-core", "torchattacks"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


if __name__ == "__main__":
    main()

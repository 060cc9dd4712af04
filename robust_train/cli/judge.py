"""What a trained model withstands: metrics of the test set under attacks, and pictures of them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig, OmegaConf

from robust_train.config import ConfigError, build
from robust_train.explain import in_one_line

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from robust_train import AdversarialExamples

CURVE_STEPS = 20
PICTURES = 8  # classes of which an example is shown
BATCH_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def judges(cfg: DictConfig, threat: Any) -> dict[str, Any]:
    """The attacks that judge; says aloud which of them cannot run.

    Raises:
        ConfigError: there is none, or a setting is out of range.
    """
    from robust_train import Attack, Threat

    nodes: Any = OmegaConf.to_container(cfg.judge.attacks, resolve=True)
    for name, node in nodes.items():
        if node is not None and not isinstance(node, dict):
            raise ConfigError(f"judge.attacks.{name}: must be an attack with a _target_, or null, got {node!r}")
    if find_spec("torchattacks") is None:
        for name in [n for n, node in nodes.items() if node and str(node.get("_target_")).endswith("TorchAttack")]:
            del nodes[name]
            print(f"judge.attacks.{name} is not run: torchattacks is not installed (see README, Dependencies).")
    named = {str(name): node for name, node in nodes.items() if node is not None}
    attacks = build({"judge": {"attacks": named}}, allow=list(cfg.allow))["judge"]["attacks"]
    if not isinstance(threat, Threat):
        raise ConfigError(f"threat._target_: must name a robust_train Threat, got {threat!r:.80}")
    for name, attack in list(attacks.items()):
        if not isinstance(attack, Attack):
            raise ConfigError(f"judge.attacks.{name}._target_: must name a robust_train Attack, got {attack!r:.80}")
        try:
            attack.check(threat)
        except ValueError as error:
            del attacks[name]
            print(f"judge.attacks.{name} is not run: {error}.")
    if not attacks:
        raise ConfigError("judge.attacks: no attack is left to judge with; name at least one")
    try:
        _evaluations(cfg, threat, attacks)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"judge: {error}") from error
    return attacks


def load_weights(model: pl.LightningModule, path: Path) -> None:
    """Weights of a checkpoint, and nothing else of it.

    Raises:
        ConfigError: there is no such file, or it is of another model.
    """
    import torch

    try:
        found = path.is_file()
    except OSError as error:
        raise ConfigError(f"ckpt: {in_one_line(error)}") from error
    if not found:
        raise ConfigError(f"ckpt: there is no file {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        weights = checkpoint.get("state_dict", checkpoint)
        missing = model.state_dict().keys() - weights.keys()
        if missing and all(name.rpartition(".")[2] in BATCH_STATISTICS for name in missing):
            from robust_train.privacy.fix import fix_modules  # as DPSGD did before it trained these weights

            fix_modules(model)
        model.load_state_dict(weights)
    except Exception as error:
        raise ConfigError(
            f"ckpt: {path} does not fit model={type(model).__name__}: {in_one_line(error)[:300]}"
        ) from error


def judged(
    cfg: DictConfig,
    model: pl.LightningModule,
    data: pl.LightningDataModule,
    threat: Any,
    attacks: dict[str, Any],
    beside: Sequence[Any] = (),
) -> dict[str, Any]:
    """Metrics of the test set under the judging attacks; see ``measured``."""
    return measured(cfg, model, data, threat, attacks, beside)[0]


def measured(
    cfg: DictConfig,
    model: pl.LightningModule,
    data: pl.LightningDataModule,
    threat: Any,
    attacks: dict[str, Any],
    beside: Sequence[Any] = (),
) -> tuple[dict[str, Any], AdversarialExamples | None]:
    """Judge a model on the test set, on one device.

    Args:
        cfg: the run's.
        model: that was trained.
        data: its data.
        threat: what the attacks may do.
        attacks: by name.
        beside: callbacks that belong to the trained model or measure more of it.

    Returns:
        Metrics by name; the curve over eps as ``curve``; of a classification what ``Evaluation.as_dict()`` says as
        ``evaluation``. And adversarial examples, where ``judge.examples`` asks for some.
    """
    import pytorch_lightning as pl

    from robust_train import CertifiedEvaluation

    for callback in beside:
        if isinstance(callback, CertifiedEvaluation):  # the limits of judging, not those of validation
            callback.limit_batches = cfg.judge.limit_batches
    evaluations = _evaluations(cfg, threat, attacks)
    keys = ("accelerator", "precision", "limit_test_batches", "fast_dev_run", "enable_progress_bar")
    with warnings.catch_warnings(), quiet():
        trainer = pl.Trainer(
            **{key: cfg.trainer[key] for key in keys if key in cfg.trainer},
            devices=1,
            callbacks=[*beside, *evaluations],  # type: ignore[arg-type]
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        found = {k: float(v) for k, v in trainer.test(model, data, verbose=False)[0].items()}
    own = {k.removeprefix("test/"): v for k, v in found.items() if k.startswith("test/") and "curve" not in k}
    kind = "acc" if "test/robust_acc" in found else "loss"
    curve = [[0.0, own[f"clean_{kind}"]]]
    factors = [float(factor) for factor in cfg.judge.curve]
    curve += [[f * threat.radius, found[f"test/curve{i}/robust_{kind}"]] for i, f in enumerate(factors)]
    first, *points = evaluations
    result = {**own, "curve": curve if factors else []}
    if first.evaluation is None:
        return result, None
    rates = [point.evaluation.rates["robust_acc"] for point in points]
    at = [(factor * threat.radius, rate) for factor, rate in zip(factors, rates, strict=True)]
    clean = (0.0, first.evaluation.rates["clean_acc"])
    evaluation = replace(first.evaluation, curve=tuple([clean, *sorted(at, key=itemgetter(0))] if at else []))
    return {**result, "evaluation": evaluation.as_dict()}, first.adversarial_examples


def _evaluations(cfg: DictConfig, threat: Any, attacks: dict[str, Any]) -> list[Any]:
    """What judges: the attacks, and PGD for each point of the curve."""
    from robust_train import PGD, RobustEvaluation

    judge = cfg.judge
    shared: dict[str, Any] = {"limit_batches": judge.limit_batches, "seed": cfg.seed, "draws": judge.get("draws")}
    settings = (cfg.get("callbacks") or {}).get("robust_evaluation")
    if isinstance(settings, DictConfig):  # how the user's batch is read
        shared |= {key: settings.get(key) for key in ("inputs", "labels", "logits", "layer")}
    pgd = {"pgd": PGD(steps=CURVE_STEPS)}
    curve = [
        RobustEvaluation(
            pgd,
            threat.scaled(float(factor)),
            name=f"curve{i}",
            checks=False,
            shards=_shards(judge, f"curve{i}"),
            **shared,
        )
        for i, factor in enumerate(judge.curve)
    ]
    first = RobustEvaluation(
        attacks,
        threat,
        groups=judge.get("groups"),
        corruptions=_corruptions(judge.get("corruptions")),
        checks=judge.get("checks", True),
        shards=_shards(judge, "attacks"),
        examples=judge.get("examples", 0),
        **shared,
    )
    return [first, *curve]


def _corruptions(asked: Any) -> Any:
    """What ``judge.corruptions`` says: true for all, names of some, or none."""
    from robust_train import Corruptions

    if asked is None or asked is False:
        return None
    return Corruptions() if asked is True else Corruptions(kinds=tuple(asked))


def _shards(judge: DictConfig, part: str) -> str | None:
    """The folder of one of the evaluations, below the one that was asked for."""
    if judge.get("shards") is None:
        return None
    return str(Path(hydra.utils.to_absolute_path(str(judge.shards))) / part)


@contextmanager
def quiet() -> Iterator[None]:
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


def pictures(
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
    first = [int((labels == label).nonzero()[0]) for label in labels.unique()[:PICTURES]]
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


def kept_pictures(name: str, examples: AdversarialExamples, threat: Any) -> list[dict[str, Any]] | None:
    """The same of examples that were kept: what the first attack that succeeded made of them; None of what is no image.

    Args:
        name: of the model.
        examples: that were kept of it.
        threat: says how to make pixels of them.
    """
    x, labels = examples.inputs, examples.labels
    if x.ndim != 4 or x.shape[1] not in (1, 3) or len(labels) != len(x):
        return None
    first = [int((labels == label).nonzero()[0]) for label in labels.unique()[:PICTURES]]
    clean = {"images": threat.to_pixels(x[first]), "predicted": examples.clean_predictions[first].tolist()}
    attacked = {
        "images": threat.to_pixels(examples.adversarial[first]),
        "predicted": examples.predictions[first].tolist(),
    }
    return [{"name": name, "labels": labels[first].tolist(), "clean": clean, "attacked": attacked}]

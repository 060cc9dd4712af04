"""``robust-train certify ckpt=… sigma=0.25``: what is proved of a checkpoint, example by example."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig, OmegaConf

from robust_train.cli.checks import check_kind, check_settings
from robust_train.cli.compose import launch, typed_overrides
from robust_train.cli.evaluate import told
from robust_train.cli.train import RESULT_FILE, keep_what_was_asked, versions
from robust_train.config import ConfigError, build
from robust_train.custody._files import write_whole
from robust_train.explain import hint

if TYPE_CHECKING:
    from torch import Tensor, nn

METHODS = ("smoothing", "ibp", "crown_ibp")
POINTS = 8  # of the curve, beside radius 0
EXAMPLES_FILE = "certificates.csv"


def certify(argv: list[str]) -> None:
    """The command. What the checkpoint's own run was told of model, data, task and threat is taken from its folder."""
    launch("certify", run, [*told(argv), *argv])


def run(cfg: DictConfig, folder: Path) -> float:
    """Certify, write ``result.json``, ``result.csv`` and ``certificates.csv`` into the folder, and print the table.

    Returns:
        Certified accuracy at the middle one of the radii.

    Raises:
        ConfigError: there is no such checkpoint, it is of another model, or a setting is out of range.
    """
    import torch

    from robust_train import Threat
    from robust_train.cli.judge import load_weights
    from robust_train.evasion.threat_union import members_of

    if OmegaConf.is_missing(cfg, "ckpt") or cfg.ckpt is None:
        raise ConfigError("ckpt: missing; name the checkpoint to certify: robust-train certify ckpt=FILE sigma=0.25")
    keep_what_was_asked(cfg, typed_overrides())
    check_settings(cfg, nodes=("model", "data", "threat"))
    _check(cfg)
    allow = list(cfg.allow)
    threat = build(cfg.threat, allow=allow)
    if not isinstance(threat, Threat):
        raise ConfigError(f"threat._target_: must name a robust_train Threat, got {threat!r:.80}")
    if len(members_of(threat)) > 1:
        raise ConfigError("threat: certify tells radii of one norm, and this threat has several balls: give it one")
    method = _method(cfg)
    radii = _radii(cfg, method, threat)
    model, data = build(cfg.model, allow=allow), build(cfg.data, allow=allow)
    check_kind("model", model, "LightningModule")
    check_kind("data", data, "LightningDataModule")
    path = Path(hydra.utils.to_absolute_path(str(cfg.ckpt)))
    load_weights(model, path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval()
    examples = _examples(cfg, data, threat, device)
    rows, curve = method.certified(model, examples, threat, radii, cfg)
    summary = {
        "ckpt": str(path),
        "overrides": typed_overrides(),
        "method": cfg.method,
        "settings": method.settings(threat),
        "statement": method.statement(threat),
        "seed": cfg.seed,
        "n_examples": len(rows),
        "curve": curve,
        "versions": versions(),
        "config": OmegaConf.to_container(cfg, resolve=True),
    }
    write_whole(folder / "result.csv", _as_csv(curve))
    write_whole(folder / EXAMPLES_FILE, _as_csv(rows))
    write_whole(folder / RESULT_FILE, json.dumps(summary, indent=2, default=str) + "\n")
    print("\n" + as_table(curve, f"{path.stem}: {method.statement(threat)}", len(rows)))
    print(f"\nIn {folder}: {RESULT_FILE}, result.csv, {EXAMPLES_FILE}.")
    return float(curve[len(curve) // 2]["certified_acc"])


def as_table(curve: list[dict[str, Any]], statement: str, n: int) -> str:
    """Certified accuracy by radius, with its interval.

    Args:
        curve: rows with ``radius``, ``certified_acc``, ``low`` and ``high``.
        statement: what is certain.
        n: examples.
    """
    lines = [statement, f"{n} test examples; certified accuracy with its exact 95 % interval", "", "radius   certified"]
    for row in curve:
        share, low, high = (100 * row[key] for key in ("certified_acc", "low", "high"))
        lines.append(f"{row['radius']:<7.4g}  {share:5.1f} %  [{low:.1f}, {high:.1f}]")
    return "\n".join(lines)


class _Smoothed:
    """Randomized smoothing."""

    def __init__(self, cfg: DictConfig) -> None:
        from robust_train import Smoothing

        try:
            self.smoothing = Smoothing(cfg.sigma, cfg.n0, cfg.n, cfg.alpha, cfg.batch)
        except ValueError as error:
            raise ConfigError(str(error).removeprefix("smoothing.").replace(" must", ": must", 1)) from error

    def reach(self, threat: Any) -> float:
        return self.smoothing.largest_radius

    def settings(self, threat: Any) -> dict[str, Any]:
        s = self.smoothing
        return {"sigma": s.sigma, "n0": s.n0, "n": s.n, "alpha": s.alpha, "largest_radius": s.largest_radius}

    def statement(self, threat: Any) -> str:
        s = self.smoothing
        return (
            f"the smoothed model (noise {s.sigma:g}) is right within the L2 radius; wrong for an example with "
            f"probability <= {s.alpha:g}"
        )

    def certified(
        self, model: nn.Module, examples: Iterator[tuple[int, Tensor, int]], threat: Any, radii: list[float], cfg: Any
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        from robust_train.evasion.certified.smoothing import certified_at

        rows, certificates, labels = [], [], []
        for index, x, label in examples:
            found = self.smoothing.certify(model, x, threat, seed=cfg.seed, row=index)
            certificates.append(found)
            labels.append(label)
            rows.append(
                {
                    "row": index,
                    "label": label,
                    "predicted": "abstains" if found.predicted is None else found.predicted,
                    "radius": found.radius,
                    "share": found.share,
                }
            )
        return rows, [_point(r, certified_at(certificates, labels, r)) for r in radii]


class _Bounded:
    """Bounds of the logits."""

    def __init__(self, name: str) -> None:
        from robust_train import CROWNIBP, IBP

        self.verifier = IBP() if name == "ibp" else CROWNIBP()

    def reach(self, threat: Any) -> float:
        return threat.radius

    def settings(self, threat: Any) -> dict[str, Any]:
        return {"verifier": str(self.verifier), "norm": threat.norm, "threat": threat.describe()}

    def statement(self, threat: Any) -> str:
        norm = {"linf": "Linf", "l2": "L2", "l1": "L1", "l0": "L0"}[threat.norm]
        return f"the model is right within the {norm} radius, by bounds of its logits ({type(self.verifier).__name__})"

    def certified(
        self, model: nn.Module, examples: Iterator[tuple[int, Tensor, int]], threat: Any, radii: list[float], cfg: Any
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        from dataclasses import replace

        import torch

        from robust_train.evasion.certified.verifier import verified

        rows: list[dict[str, Any]] = []
        proved: list[list[bool]] = [[] for _ in radii]
        while part := list(islice(examples, cfg.batch)):
            x, y = torch.stack([x for _, x, _ in part]), torch.tensor([label for *_, label in part])
            y = y.to(x.device)
            for i, radius in enumerate(radii):
                proved[i] += verified(model, x, y, replace(threat, eps=radius), self.verifier).tolist()
            rows += [{"row": index, "label": label} for index, _, label in part]
        for i, radius in enumerate(radii):
            for row, sure in zip(rows, proved[i], strict=True):
                row[f"verified_{radius:.6g}"] = int(sure)
        return rows, [_point(r, sure) for r, sure in zip(radii, proved, strict=True)]


def _point(radius: float, sure: list[bool]) -> dict[str, Any]:
    from robust_train.intervals import rate_of

    rate = rate_of([float(one) for one in sure])
    return {"radius": radius, "certified_acc": rate.value, "low": rate.low, "high": rate.high, "n": rate.n}


def _method(cfg: DictConfig) -> Any:
    return _Smoothed(cfg) if cfg.method == "smoothing" else _Bounded(cfg.method)


def _radii(cfg: DictConfig, method: Any, threat: Any) -> list[float]:
    """Those asked for, or nine from 0 to what the method can reach, rounded down to three digits."""
    if cfg.radii is not None:
        return sorted(float(radius) for radius in cfg.radii)
    reach = method.reach(threat)
    return [float(f"{reach * i / POINTS:.3g}") for i in range(POINTS)] + [reach]


def _examples(cfg: DictConfig, data: Any, threat: Any, device: Any) -> Iterator[tuple[int, Tensor, int]]:
    """Row number, input and label of the test set's examples, ``limit`` of them at equal distances."""
    from robust_train.callbacks._batch import find_input, get, label_candidates

    data.prepare_data()
    data.setup("test")
    loader, row = data.test_dataloader(), 0
    size = sum(len(get(batch, find_input(batch, cfg.inputs))) for batch in loader) if cfg.limit is not None else 0
    step = max(1, size // cfg.limit) if cfg.limit is not None else 1
    given = 0
    for batch in loader:
        path = find_input(batch, cfg.inputs)
        x = get(batch, path)
        threat.check_input(x, "the test set")
        places = label_candidates(batch, path, cfg.labels)
        labels = get(batch, places[0]) if places else None
        if labels is None or labels.is_floating_point() or labels.numel() != len(x):
            raise ConfigError("labels: certify needs one class index an example; say where with labels=…")
        for one, label in zip(x.to(device), labels.flatten().tolist(), strict=True):
            if row % step == 0 and (cfg.limit is None or given < cfg.limit):
                given += 1
                yield row, one, label
            row += 1


def _check(cfg: DictConfig) -> None:
    if cfg.method not in METHODS:
        raise ConfigError(f"method: {cfg.method!r} is none of {', '.join(METHODS)}{hint(str(cfg.method), METHODS)}")
    for key in ("limit", "batch"):
        value = cfg[key]
        if value is None and key == "limit":
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{key}: must be a whole number >= 1{', or null' * (key == 'limit')}, got {value!r}")
    for key in ("inputs", "labels"):
        value = cfg[key]
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, str)) or value == ""):
            raise ConfigError(f"{key}: must be an index, a name or a dotted path, or null, got {value!r}")
    radii = OmegaConf.to_container(cfg)["radii"]  # type: ignore[index,call-overload]
    if radii is not None and not (isinstance(radii, list) and radii and all(_is_radius(r) for r in radii)):
        raise ConfigError(f"radii: must be a list of numbers >= 0, or null, got {radii!r}")


def _is_radius(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < float("inf")


def _as_csv(rows: list[dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()

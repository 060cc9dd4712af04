"""What membership inference finds on Fashion-MNIST, and what the audits of DP-SGD find and cost.

A small convolutional network learns 2,000 training images by heart, once plainly and once with DP-SGD at epsilon 8. The
audit that a user would run (``MembershipAudit``) looks at both, with 2,000 other images as non-members. Then the
planted faults of ``tests/callbacks/planted_faults.py`` are shown to ``audit_dp_sgd``, for both engines, and a run at
epsilon 3 to ``PrivacyAudit``, whose change of the accuracy is measured.

    python benchmarks/membership.py [--parts plain private faults canaries] [--seeds 0 1 2] [--references 1 4 16]
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from robust_train import DPSGD, MembershipAudit, PrivacyAudit, audit_dp_sgd
from robust_train.privacy.attacks.lira_offline import LiRAOffline
from robust_train.privacy.attacks.lira_online import LiRAOnline
from robust_train.privacy.attacks.loss_threshold import LossThreshold
from robust_train.privacy.attacks.rmia import RMIA
from robust_train.privacy.output.label_only import LabelOnly
from robust_train.privacy.output.rounding import Rounding
from robust_train.privacy.output.temperature import Temperature
from robust_train.privacy.output.top_k import TopK
from robust_train.starter import Classifier
from robust_train.starter.fashion_mnist import read_split

ROOT = "/usr/share/datasets/fashion-mnist"
MEMBERS, OTHERS, EPOCHS, BATCH = 2000, 2000, 40, 64
EPSILON, DELTA = 8.0, 1e-5
OUTPUTS = {
    "rounded to 2 decimals": Rounding(2),
    "rounded to 1 decimal": Rounding(1),
    "top 1": TopK(1),
    "temperature 5": Temperature(5.0),
    "label only": LabelOnly(),
}
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "limit_val_batches": 0,
}


def network() -> nn.Sequential:
    """About 105,000 weights."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 49, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


def images(seed: int) -> tuple[Any, Any, Any]:
    """Members, others, and the test set."""
    pool, test = read_split(ROOT, "train"), read_split(ROOT, "t10k")
    chosen = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[: MEMBERS + OTHERS]
    x, y = pool.tensors
    rows = [TensorDataset(x[part], y[part]) for part in (chosen[:MEMBERS], chosen[MEMBERS:])]
    return (*rows, test)


def accuracy(model: nn.Module, data: Any) -> float:
    x, y = data.tensors
    with torch.no_grad():
        return float((torch.cat([model(part) for part in x.split(500)]).argmax(1) == y).float().mean())


def train(seed: int, data: Any, *callbacks: Any, epochs: int = EPOCHS, lr: float = 2e-3) -> tuple[Any, float]:
    """One run; the trained module and its CPU seconds, those of an audit at its end included."""
    pl.seed_everything(seed)
    model = Classifier(network(), lr=lr)
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(max_epochs=epochs, callbacks=list(callbacks), default_root_dir=folder, **QUIET)
        loader = DataLoader(data[0], batch_size=BATCH, shuffle=True)
        trainer.fit(model, loader, DataLoader(data[1], batch_size=500))
    return model.eval(), time.process_time() - start


class Timed(MembershipAudit):
    """Says what the audit cost."""

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        start = time.process_time()
        super().teardown(trainer, pl_module, stage)
        assert self.result is not None
        self.result["cpu_seconds"] = time.process_time() - start


def attacked(seed: int, data: Any, counts: tuple[int, ...], cache: str, *callbacks: Any) -> list[dict[str, Any]]:
    """A run and its audits, with so many references each."""
    audits = []
    for references in counts:
        attacks: dict[str, Any] = {"loss_threshold": LossThreshold(), "rmia": RMIA()}
        if references >= 4:
            attacks |= {"lira_offline": LiRAOffline(), "lira_online": LiRAOnline()}
        outputs = OUTPUTS if references == 4 and not callbacks else None
        settings = {"references": references, "attacks": attacks, "outputs": outputs}
        audits.append(Timed(holdout=data[1], exposed=0, cache=cache, **settings))
    model, _ = train(seed, data, *audits, *callbacks)
    fit = {"seed": seed, "train_acc": accuracy(model, data[0]), "test_acc": accuracy(model, data[2])}
    return [{**fit, "references": audit.result["references"], "audit": audit.result} for audit in audits]


def plain(seeds: list[int], counts: tuple[int, ...], cache: str) -> list[dict[str, Any]]:
    """The model that learned by heart."""
    return [{"model": "plain", **run} for seed in seeds for run in attacked(seed, images(seed), counts, cache)]


def private(seeds: list[int], cache: str) -> list[dict[str, Any]]:
    """The same network under DP-SGD; the references are ordinary ones."""
    found = []
    for seed in seeds:
        dp = DPSGD(target_epsilon=EPSILON, target_delta=DELTA, sample_rate=0.1, max_grad_norm=1.0)
        runs = attacked(seed, images(seed), (4,), cache, dp)
        found += [{"model": f"DP-SGD, epsilon {EPSILON:g}", "epsilon": dp.epsilon(), **run} for run in runs]
    return found


def faults() -> list[dict[str, Any]]:
    """The correct engine and six planted faults, for both engines."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "callbacks"))
    from planted_faults import FAULTS  # pyright: ignore[reportMissingImports]

    found = []
    for engine in ("book_keeping", "hooks"):
        for name, make in {"none": DPSGD, **FAULTS}.items():
            start = time.process_time()
            audit = audit_dp_sgd(partial(make, engine=engine, physical_batch_size=300))
            row = {"engine": engine, "fault": name, **audit.to_dict(), "cpu_seconds": time.process_time() - start}
            found.append(row)
            print(row, flush=True)
    return found


def canaries(seeds: list[int]) -> list[dict[str, Any]]:
    """A run at epsilon 3 with canaries and the same run, by the same noise, without them."""
    found = []
    for seed in seeds:
        data = images(seed)
        dp = partial(DPSGD, target_epsilon=3.0, target_delta=DELTA, sample_rate=0.1, unsafe_seed=seed)
        without, seconds = train(seed, data, dp(), epochs=15)
        audit = PrivacyAudit(canaries=3000)
        audited, more = train(seed, data, dp(), audit, epochs=15)
        assert audit.result is not None
        found.append(
            {
                "seed": seed,
                "test_acc_without": accuracy(without, data[2]),
                "test_acc_with": accuracy(audited, data[2]),
                "cpu_seconds_without": seconds,
                "cpu_seconds_with": more,
                **audit.result,
            }
        )
        print(found[-1], flush=True)
    return found


def as_markdown(found: dict[str, Any]) -> str:
    """The tables that the README quotes."""
    lines = [
        f"Fashion-MNIST, {MEMBERS} members, {OTHERS} non-members, {EPOCHS} epochs, a CNN of 105 thousand weights; "
        "95 % intervals (AUC: DeLong; rates: Clopper-Pearson).",
        "",
        "| model | seed | train / test acc | references | attack | AUC | TPR at 1 % FPR | TPR at 0.1 % FPR |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in [*found.get("plain", []), *found.get("private", [])]:
        fit = f"{run['train_acc']:.3f} / {run['test_acc']:.3f}"
        head = f"| {run['model']} | {run['seed']} | {fit} | {run['references']} |"
        lines += [f"{head} {name} | {_cells(value)} |" for name, value in run["audit"]["attacks"].items()]
    if four := [run for run in found.get("plain", []) if run["references"] == 4]:
        lines += ["", "RMIA with 4 references, the plain model's answers as they are and perturbed:", ""]
        lines += ["| answers | seed | AUC | TPR at 1 % FPR | TPR at 0.1 % FPR |", "|---|---|---|---|---|"]
        for run in four:
            entries = {"as they are": run["audit"]["attacks"], **run["audit"]["outputs"]}
            lines += [f"| {name} | {run['seed']} | {_cells(value['rmia'])} |" for name, value in entries.items()]
    if runs := [run for run in found.get("plain", []) if "cpu_seconds" in run["audit"]]:
        lines += ["", "| references | seed | from the cache | CPU-s of the audit |", "|---|---|---|---|"]
        for run in runs:
            known, cost = run["audit"]["references_from_cache"], run["audit"]["cpu_seconds"]
            lines.append(f"| {run['references']} | {run['seed']} | {known} | {cost:.0f} |")
    if rows := found.get("faults"):
        lines += [
            "",
            "| engine | planted fault | verdict | epsilon at least | claimed | why | CPU-s |",
            "|---|---|---|---|---|---|---|",
        ]
        for r in rows:
            cells = f"{r['verdict']} | {r['bound']:.2f} | {r['claimed']:.2f} | {'; '.join(r['faults'])}"
            lines.append(f"| {r['engine']} | {r['fault']} | {cells} | {r['cpu_seconds']:.1f} |")
    if rows := found.get("canaries"):
        head = "claimed | shown | ceiling | verdict | test acc without / with | CPU-s without / with"
        lines += ["", f"| seed | canaries | {head} |", "|---|---|---|---|---|---|---|---|"]
        for r in rows:
            proof = f"{r['epsilon_claimed']:.2f} | {r['epsilon_lower_bound']:.2f} | {r['ceiling']:.2f} | {r['verdict']}"
            cost = f"{r['cpu_seconds_without']:.0f} / {r['cpu_seconds_with']:.0f}"
            acc = f"{r['test_acc_without']:.4f} / {r['test_acc_with']:.4f}"
            lines.append(f"| {r['seed']} | {r['canaries']} | {proof} | {acc} | {cost} |")
    return "\n".join(lines) + "\n"


def _cells(leakage: dict[str, Any]) -> str:
    def rate(value: dict[str, float] | None) -> str:
        return "n/a" if value is None else f"{value['value']:.4f} [{value['low']:.4f}, {value['high']:.4f}]"

    area = f"{leakage['auc']:.3f} [{leakage['low']:.3f}, {leakage['high']:.3f}]"
    return " | ".join([area, rate(leakage["tpr"]["0.01"]), rate(leakage["tpr"]["0.001"])])


def main() -> None:
    warnings.simplefilter("ignore")
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__)
    parts = ("plain", "private", "faults", "canaries")
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--references", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--cache", help="folder that keeps reference models")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "membership.json")
    options = parser.parse_args()
    out = options.out
    found: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {}
    with tempfile.TemporaryDirectory() as cache:
        for part in options.parts:
            made = {
                "plain": lambda: plain(options.seeds, tuple(options.references), options.cache or cache),
                "private": lambda: private(options.seeds, options.cache or cache),
                "faults": faults,
                "canaries": lambda: canaries(options.seeds),
            }[part]()
            found = {**found, part: made, "machine": f"{platform.machine()}, one thread, torch {torch.__version__}"}
            out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            out.with_suffix(".md").write_text(as_markdown(found), encoding="utf-8")
    print(as_markdown(found))


if __name__ == "__main__":
    main()

"""``robust-train privacy``: plan a private run, and check the certificate of one. Needs no torch."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from robust_train.privacy.accounting import ACCOUNTANTS
from robust_train.privacy.certificate import Certificate
from robust_train.privacy.plan import PrivacyPlan

Draw = Callable[[Certificate], str]

PLAN = """\
Steps an epoch are ceil(n / batch), the sample rate is batch / n. Every figure is for Poisson sampling: batches of a
shuffled dataset have no such guarantee.

example: robust-train privacy plan --epsilon 3 --delta 1e-5 --n 60000 --batch 2048 --epochs 40
"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; the usage is in ``--help``."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str], draw: Draw) -> None:
    """Run the command.

    Args:
        arguments: what stands after ``robust-train privacy``.
        draw: turns a certificate into an SVG document of epsilon over its steps.

    Raises:
        SystemExit: with code 2 and one line where the arguments cannot be used, with 1 where a certificate is wrong.
    """
    parser = _parser()
    settings = parser.parse_args(arguments)
    try:
        if settings.command == "plan":
            _plan(settings, draw)
        else:
            _show(settings)
    except (ValueError, OSError) as error:
        parser.exit(2, f"robust-train privacy {settings.command}: {error}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("robust-train privacy", description="Plan private training, check its certificate.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="plan | show")
    plan = commands.add_parser(
        "plan",
        help="noise, sample rate, steps and epsilon of a run",
        description="What a private run takes: noise, sample rate and steps for a budget, or epsilon for some noise.",
        epilog=PLAN,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    budget = plan.add_mutually_exclusive_group(required=True)
    budget.add_argument("--epsilon", type=float, help="the budget: the smallest noise that keeps to it is found")
    budget.add_argument("--noise-multiplier", type=float, metavar="S", help="the noise: its epsilon is found")
    plan.add_argument("--n", type=int, required=True, help="number of training examples")
    plan.add_argument("--batch", type=int, required=True, help="expected batch size (with accumulation)")
    length = plan.add_mutually_exclusive_group(required=True)
    length.add_argument("--epochs", type=float)
    length.add_argument("--steps", type=int)
    plan.add_argument("--delta", type=float, help="default: n ** -1.1")
    plan.add_argument("--max-grad-norm", type=float, default=1.0, metavar="C", help="clipping norm (default: 1)")
    plan.add_argument("--accountant", choices=tuple(ACCOUNTANTS), default="prv")
    plan.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw epsilon over the steps")
    plan.add_argument("--json", action="store_true", help="print the plan as JSON, without the table")
    show = commands.add_parser("show", help="print a certificate, and compute its epsilon again")
    show.add_argument("certificate", type=Path, metavar="CERTIFICATE.json")
    return parser


def _plan(settings: argparse.Namespace, draw: Draw) -> None:
    if settings.n < 1 or not 1 <= settings.batch <= settings.n:
        raise ValueError(f"--batch must lie between 1 and --n, got {settings.batch} of {settings.n}")
    an_epoch = math.ceil(settings.n / settings.batch)
    if settings.epochs is not None and not 0 < settings.epochs * an_epoch < 1e9:
        raise ValueError(f"--epochs must be > 0, got {settings.epochs:g}")
    fields = {
        "sample_rate": settings.batch / settings.n,
        "dataset_size": settings.n,
        "steps": settings.steps if settings.epochs is None else math.ceil(settings.epochs * an_epoch - 1e-9),
        "delta": settings.delta,
        "max_grad_norm": settings.max_grad_norm,
        "accountant": settings.accountant,
    }
    if settings.noise_multiplier is None:
        plan = PrivacyPlan.calibrated(settings.epsilon, **fields)
    else:
        plan = PrivacyPlan(noise_multiplier=settings.noise_multiplier, **fields)
    epsilon = plan.epsilon()
    if math.isinf(epsilon):
        raise ValueError("without noise there is no privacy: --noise-multiplier must be > 0")
    if settings.plot is not None:
        whole = Certificate.of(
            plan, plan.segments(0, plan.steps), clipping="", engine="", target_epsilon=settings.epsilon
        )
        settings.plot.write_text(draw(whole), encoding="utf-8")
    if settings.json:
        extra = {"epsilon": epsilon, "steps_per_epoch": an_epoch, "expected_batch_size": plan.expected_batch_size}
        print(json.dumps({**plan.to_dict(), **extra, "noise_of_mean": plan.noise_of_mean}, allow_nan=False, indent=2))
        return
    _print_pairs(
        {
            "epsilon": f"{_up(epsilon)} at delta {plan.delta:.3g}",
            "accountant": f"{plan.accountant} ({ACCOUNTANTS[plan.accountant]})",
            "noise multiplier": _up(plan.noise_multiplier, 4),
            "clipping norm": f"{plan.max_grad_norm:g}",
            "sample rate": f"{plan.sample_rate:.6g} ({plan.expected_batch_size:.4g} of {plan.dataset_size} examples)",
            "steps": f"{plan.steps} ({an_epoch} an epoch)",
            "noise of the mean": f"{plan.noise_of_mean:.3g} (standard deviation in each coordinate)",
        }
    )
    print()
    _print_table(plan.trade_offs())


def _show(settings: argparse.Namespace) -> None:
    certificate = Certificate.read(settings.certificate)
    epsilon = "none: the certificate is void" if certificate.epsilon is None else _up(certificate.epsilon)
    what = certificate.to_dict()
    _print_pairs(
        {
            "epsilon": epsilon,
            "delta": f"{certificate.delta:.3g}",
            "accountant": f"{certificate.accountant} ({what['epsilon_is']})",
            "target epsilon": "none" if certificate.target_epsilon is None else f"{certificate.target_epsilon:g}",
            "mechanism": what["mechanism"],
            "sampling": what["sampling"],
            "neighbours": what["neighbours"],
            "steps": "; ".join(f"{n} at noise {sigma:.6g}, q {q:.6g}" for sigma, q, n in certificate.history) or "0",
            "clipping": f"{certificate.clipping} to norm {certificate.max_grad_norm:g}",
            "examples": f"{certificate.dataset_size}, {what['expected_batch_size']:.4g} a step on average",
            "engine": certificate.engine,
            "created": certificate.created,
            "versions": ", ".join(f"{name} {number}" for name, number in certificate.versions.items()),
        }
    )
    parts = {"No guarantee": certificate.void, "Assumptions": certificate.assumptions}
    for heading, lines in {**parts, "Not covered": certificate.not_covered}.items():
        if lines:
            print(f"\n{heading}:", *lines, sep="\n  - ")
    verdict = certificate.verify()
    print(f"\n{'Checked' if verdict.right else 'WRONG'}: {verdict.says}.")
    if not verdict.right:
        raise SystemExit(1)


def _print_pairs(pairs: dict[str, str]) -> None:
    width = max(len(name) for name in pairs)
    for name, value in pairs.items():
        print(f"{name:<{width}}  {value}")


def _print_table(rows: list[tuple[str, float, PrivacyPlan]]) -> None:
    print(f"{'':<12}{'epsilon':>9}{'noise':>9}{'batch':>9}{'steps':>9}{'noise of the mean':>20}")
    for change, epsilon, plan in rows:
        print(
            f"{change:<12}{_up(epsilon):>9}{_up(plan.noise_multiplier):>9}{plan.expected_batch_size:>9.4g}"
            f"{plan.steps:>9}{plan.noise_of_mean:>20.3g}"
        )


def _up(value: float, digits: int = 3) -> str:
    """Rounded up: neither epsilon nor the noise that it takes may be shown smaller than it is."""
    return f"{math.ceil(value * 10**digits - 1e-9) / 10**digits:.{digits}f}"

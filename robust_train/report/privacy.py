"""Privacy loss over the steps of a run, as a chart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from robust_train.report.charts import Series, line_chart

if TYPE_CHECKING:
    from robust_train.privacy.certificate import Certificate

POINTS = 16


def epsilon_over_steps(
    steps: Sequence[int],
    epsilons: Sequence[float],
    *,
    target: float | None = None,
    title: str = "Privacy loss over steps",
    subtitle: str = "",
) -> str:
    """Epsilon after so many steps, and the budget as a level line.

    Args:
        steps: numbers of steps, in ascending order.
        epsilons: the privacy loss after each; points that are not finite are left out.
        target: the budget, or None.
        title: above the chart.
        subtitle: one or two lines beneath the title.

    Returns:
        An SVG document.

    Raises:
        ValueError: as many of ``steps`` as of ``epsilons`` are needed, and one finite point.
    """
    pairs = [(float(n), float(e)) for n, e in zip(steps, epsilons, strict=True) if math.isfinite(e)]
    if not pairs:
        raise ValueError("no finite epsilon to draw")
    xs, ys = zip(*pairs, strict=True)
    series = [Series("epsilon", xs, ys)]
    if target is not None:
        series.append(Series(f"budget: {target:g}", (min(xs), max(xs)), (target, target)))
    return line_chart(series, title=title, subtitle=subtitle, x_label="noisy steps", y_label="epsilon")


def epsilon_chart(certificate: Certificate) -> str:
    """Epsilon over all steps of a certificate's history.

    Args:
        certificate: of a run. Where it is void, the chart says so, and shows what the steps would have cost.

    Returns:
        An SVG document.
    """
    from robust_train.privacy.accounting import AccountingError, epsilon, merge, prefix

    history = list(certificate.history)
    points = sorted({round(certificate.steps * i / POINTS) for i in range(POINTS + 1)})
    costs = []
    for n in points:
        try:
            costs.append(epsilon(prefix(history, n), certificate.delta, certificate.accountant))
        except AccountingError:
            costs.append(math.inf)
    noise = ", ".join(f"{sigma:.4g}" for sigma in sorted({sigma for sigma, _, _ in merge(history)}))
    subtitle = f"delta {certificate.delta:.3g}, accountant {certificate.accountant}, noise multiplier {noise or 'none'}"
    if certificate.void:
        subtitle = f"No guarantee: {'; '.join(certificate.void)}"
    return epsilon_over_steps(points, costs, target=certificate.target_epsilon, subtitle=subtitle)

"""Statistics of a privacy audit: what canaries prove about an epsilon that somebody claims."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import logsumexp
from scipy.stats import beta, binom, chi2

LARGEST = 50.0  # epsilon that is looked for
REJECTED, CONSISTENT, TOO_WEAK = "rejected", "consistent", "too weak to tell"
GUESSED = (0.02, 0.05, 0.1, 0.2, 0.35, 0.55, 0.8, 1.0)  # shares of the canaries on which a guess is made


def verdict(bound: float, claimed: float, ceiling: float) -> str:
    """What a lower bound says of a claimed epsilon.

    Args:
        bound: epsilon is at least this, with the audit's confidence.
        claimed: what is said of it.
        ceiling: the largest bound that the audit could have found.

    Returns:
        ``"rejected"``: the claim is false; ``"too weak to tell"``: the audit could not have rejected it, whatever it
        found; ``"consistent"``: it could, and did not. That proves nothing.
    """
    if bound > claimed:
        return REJECTED
    return CONSISTENT if ceiling > claimed else TOO_WEAK


# --- many independent draws ---------------------------------------------------------------------------------------


def log_ratio(views: np.ndarray, noise_multiplier: float, sample_rate: float) -> np.ndarray:
    """What single steps say for a canary: the log-likelihood ratio of the Poisson-subsampled Gaussian mechanism.

    Args:
        views: the canary's coordinate in a noisy sum, divided by the clipping norm, of any shape.
        noise_multiplier: > 0.
        sample_rate: in (0, 1].

    Returns:
        Logarithm of the density with the canary minus that without it, of ``views``' shape. Steps add up.
    """
    with np.errstate(divide="ignore"):
        absent = np.log1p(-np.float64(sample_rate))
    return np.logaddexp(absent, math.log(sample_rate) + (2 * views - 1) / (2 * noise_multiplier**2))


def statistics(views: np.ndarray, noise_multiplier: float, sample_rate: float) -> np.ndarray:
    """Ways to look at what T steps show of a canary, of which an audit takes the one that tells most.

    Args:
        views: the canary's coordinate in each step's noisy sum, divided by the clipping norm, ``(N, T)``.
        noise_multiplier: as claimed, > 0.
        sample_rate: as claimed, in (0, 1].

    Returns:
        float ``(5, N)``, higher where the canary is there: the likelihood ratio of the claimed mechanism and that of
        one which uses each example in exactly one of the steps; the sum; the largest step; minus the distance of the
        sum from what is expected.
    """
    exponents = (2 * views - 1) / (2 * noise_multiplier**2)
    claimed = log_ratio(views, noise_multiplier, sample_rate).sum(1)
    once: Any = logsumexp(exponents, axis=1)
    total = views.sum(1)
    expected = -np.abs(total - sample_rate * views.shape[1])
    return np.stack([claimed, once, total, views.max(1), expected])


def two_sample_bound(absent: np.ndarray, present: np.ndarray, delta: float, confidence: float = 0.95) -> float:
    """Lower bound of epsilon from independent draws without and with a canary.

    Half of the draws choose a statistic, a threshold and a direction; the other half are counted, with exact binomial
    (Clopper-Pearson) bounds.

    Args:
        absent: statistics of draws without the canary, ``(S, n)``, higher where it is there.
        present: of draws with it, ``(S, n')``.
        delta: with which epsilon is claimed.
        confidence: that the bound is right, in (0, 1).

    Returns:
        The bound, >= 0.

    Guarantees:
        If the draws are independent and the mechanism is (epsilon, delta)-private, the bound exceeds epsilon with
        probability at most ``1 - confidence``.

    Reference:
        Jagielski, Ullman and Oprea, "Auditing Differentially Private Machine Learning: How Private is Private SGD?",
        2020, section 3.
    """
    first, second = (absent[:, ::2], present[:, ::2]), (absent[:, 1::2], present[:, 1::2])
    best = (-math.inf, 0, 0.0, 1)
    for row in range(len(absent)):
        thresholds = np.unique(np.quantile(np.concatenate([first[0][row], first[1][row]]), np.linspace(0, 1, 201)))
        for sign in (1, -1):
            bounds = _bounds(first[0][row], first[1][row], thresholds, sign, delta, confidence)
            at = int(np.argmax(bounds))
            if bounds[at] > best[0]:
                best = (float(bounds[at]), row, float(thresholds[at]), sign)
    _, row, threshold, sign = best
    found = _bounds(second[0][row], second[1][row], np.array([threshold]), sign, delta, confidence)
    return max(0.0, float(found[0]))


def two_sample_ceiling(absent: int, present: int, delta: float, confidence: float = 0.95) -> float:
    """The largest bound that ``two_sample_bound`` can find in so many draws: where no two are alike."""
    scores = np.zeros((1, absent)), np.ones((1, present))
    return two_sample_bound(*scores, delta, confidence)


def _bounds(
    absent: np.ndarray, present: np.ndarray, thresholds: np.ndarray, sign: int, delta: float, confidence: float
) -> np.ndarray:
    """Of epsilon for each threshold: by draws above it (sign 1: the canary is there) or not above it (-1)."""
    a = np.searchsorted(np.sort(absent), thresholds, side="right")  # how many are not above
    b = np.searchsorted(np.sort(present), thresholds, side="right")
    n, m = len(absent), len(present)
    hits, trials, alarms, falses = (m - b, m, n - a, n) if sign == 1 else (a, n, b, m)
    tail = (1 - confidence) / 2
    with np.errstate(invalid="ignore"):
        true = np.where(hits > 0, beta.ppf(tail, hits, trials - hits + 1), 0.0)
        false = np.where(alarms < falses, beta.ppf(1 - tail, alarms + 1, falses - alarms), 1.0)
    with np.errstate(divide="ignore"):
        return np.log(np.maximum(true - delta, 0.0)) - np.log(false)


def sampling_p_value(joined: np.ndarray, sample_rate: float) -> float:
    """Whether examples join steps by independent coin flips.

    Three tests, each at a third of the level: how often examples join at all; how often they join two steps in a row,
    which a shuffled loader never lets them within an epoch; how much the sizes of steps vary, which a loader with fixed
    batches does not.

    Args:
        joined: which of N examples joined which of T steps, bool ``(N, T)``.
        sample_rate: as claimed, in (0, 1).

    Returns:
        The probability of something as unusual under Poisson sampling, in [0, 1].
    """
    n, steps = joined.shape
    rate = _two_sided(int(joined.sum()), n * steps, sample_rate)
    pairs = joined[:, : steps // 2 * 2].reshape(n, -1, 2)
    again = _two_sided(int(pairs.all(2).sum()), n * pairs.shape[1], sample_rate**2)
    sizes = joined.sum(0)
    spread = float(((sizes - n * sample_rate) ** 2).sum() / (n * sample_rate * (1 - sample_rate)))
    varied = 2 * min(float(chi2.cdf(spread, steps)), float(chi2.sf(spread, steps)))
    return min(1.0, 3 * min(rate, again, varied))


def _two_sided(count: int, trials: int, probability: float) -> float:
    below, above = binom.cdf(count, trials, probability), binom.sf(count - 1, trials, probability)
    return min(1.0, 2 * float(min(below, above)))


# --- one run with many canaries -----------------------------------------------------------------------------------


def one_run_p_value(correct: int, guesses: int, canaries: int, epsilon: float, delta: float) -> float:
    """How likely an (epsilon, delta)-private run lets an auditor guess so well.

    Args:
        correct: guesses that were right.
        guesses: that were made, about canaries that a fair coin each had put in or left out.
        canaries: that there were, guessed about or not.
        epsilon: >= 0.
        delta: in [0, 1).

    Returns:
        An upper bound of the probability of ``correct`` or more right guesses.

    Reference:
        Steinke, Nasr and Jagielski, "Privacy Auditing with One (1) Training Run", 2023, the main theorem, whose second
        term is for delta.
    """
    right = 1 / (1 + math.exp(-epsilon))
    value = float(binom.sf(correct - 1, guesses, right))
    if delta > 0 and correct > 0:
        just_below = np.cumsum(binom.pmf(np.arange(correct - 1, -1, -1), guesses, right))
        value += 2 * canaries * delta * float((just_below / np.arange(1, correct + 1)).max())
    return min(1.0, value)


def one_run_bound(scores: np.ndarray, included: np.ndarray, delta: float, confidence: float = 0.95) -> float:
    """Lower bound of epsilon from one run with m canaries, each put in by a fair coin.

    The auditor guesses that the canaries with the highest scores are in and those with the lowest are out, for several
    numbers of guesses, between which the level is shared (Bonferroni).

    Args:
        scores: higher for canaries that seem to be in, float ``(m,)``.
        included: which are, bool ``(m,)``.
        delta: with which epsilon is claimed.
        confidence: that the bound is right, in (0, 1).

    Returns:
        The bound, >= 0.

    Reference:
        Steinke, Nasr and Jagielski, 2023, algorithm 1.
    """
    order = np.argsort(scores, kind="stable")
    best, m = 0.0, len(scores)
    counts = guess_counts(m)
    for guesses in counts:
        low = guesses // 2
        out, inside = order[:low], order[m - (guesses - low) :]
        correct = int((~included[out]).sum() + included[inside].sum())
        best = max(best, _one_run(correct, guesses, m, delta, 1 - (1 - confidence) / len(counts)))
    return best


def one_run_ceiling(canaries: int, delta: float, confidence: float = 0.95) -> float:
    """The largest bound that so many canaries can find: with every guess right.

    Args:
        canaries: how many, >= 1.
        delta: with which epsilon is claimed.
        confidence: of the bound.
    """
    counts = guess_counts(canaries)
    level = 1 - (1 - confidence) / len(counts)
    return max(_one_run(guesses, guesses, canaries, delta, level) for guesses in counts)


def guess_counts(canaries: int) -> Sequence[int]:
    """About how many canaries a guess is made, one after the other."""
    return sorted({max(1, round(share * canaries)) for share in GUESSED})


def _one_run(correct: int, guesses: int, canaries: int, delta: float, confidence: float) -> float:
    """The largest epsilon under which so many right guesses are less likely than ``1 - confidence``."""
    low, high = 0.0, LARGEST
    if one_run_p_value(correct, guesses, canaries, low, delta) > 1 - confidence:
        return 0.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        if one_run_p_value(correct, guesses, canaries, middle, delta) < 1 - confidence:
            low = middle
        else:
            high = middle
    return low

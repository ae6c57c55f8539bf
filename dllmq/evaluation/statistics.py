"""Means, paired differences, their errors, intervals and tests, over problems.

    x_i           score of problem i (0/1 or real); with several seeds the mean over them
    d_i           a_i - b_i, two runs on the same problem; with several seeds the mean over the matched pairs
    n             number of problems
    stderr(x)     sqrt( sum_i (x_i - mean)^2 / (n - 1) / n )

Two runs that answered the same problems are compared problem by problem: the standard error of mean(d)
leaves out the difficulty that both share, so it is smaller than that of two separate means.

Only the problems are counted as random. Seeds are not extra problems: a problem's seeds are averaged first,
which is the standard error clustered by problem (Miller 2024, "Adding error bars to evals",
arXiv:2411.00640) for equally many seeds each. Repeating a seed changes nothing.

Resampling uses a generator with a fixed seed: the same values give the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

Values = Sequence[float | int] | np.ndarray
RESAMPLES = 10_000
_FEW = 16  # distinct values; up to here resamples are drawn as counts of each value
_EXACT = 100_000  # outcomes of all sign flips; up to here they are enumerated
_NORMAL = NormalDist()


@dataclass(frozen=True)
class Estimate:
    """A mean over n problems; `stderr` is NaN when n == 1, for one problem says nothing about the spread."""

    value: float
    stderr: float
    n: int


@dataclass(frozen=True)
class Difference(Estimate):
    """A mean of a_i - b_i over the n problems that both answered; positive when a is larger."""


@dataclass(frozen=True)
class McNemar:
    """Problems only a solved, problems only b solved, and the two-sided exact p."""

    won: int
    lost: int
    p: float


# ---------------------------------------------------------------- means


def mean_stderr(x: Values) -> Estimate:
    """Mean of x with the standard error of that mean (sample variance, n - 1).

    Raises:
        ValueError: x is empty, not one-dimensional, or holds NaN or infinity.
    """
    values = _column(x, "x")
    return Estimate(*_mean_stderr(values), n=len(values))


def clustered_mean(x: Sequence[Sequence[float | int]] | np.ndarray) -> Estimate:
    """Mean of x [problems, seeds] with its standard error clustered by problem; n counts the problems.

    Raises:
        ValueError: x is not two-dimensional, is empty, or holds NaN or infinity.
    """
    matrix = np.asarray(x, dtype=np.float64)
    if matrix.ndim != 2 or matrix.size == 0:
        raise ValueError(f"x must be a non-empty table [problems, seeds], got shape {matrix.shape}.")
    return mean_stderr(matrix.mean(axis=1))


def paired_difference(a: Values, b: Values) -> Difference:
    """Mean of a_i - b_i with its standard error; a_i and b_i must be the same problem.

    Raises:
        ValueError: different lengths (the runs did not see the same problems), empty, NaN or infinity.
    """
    d = _differences(a, b)
    return Difference(*_mean_stderr(d), n=len(d))


# ---------------------------------------------------------------- tests


def mcnemar(a: Values, b: Values) -> McNemar:
    """Exact McNemar test of two runs with 0/1 scores on the same problems.

    won, lost = #(a_i > b_i), #(a_i < b_i);   p = min(1, 2 P[Binomial(won + lost, 1/2) <= min(won, lost)])

    p is 1 when no problem tells them apart. Source: McNemar 1947 (Psychometrika 12), the binomial form.

    Raises:
        ValueError: a score other than 0 and 1, or what `paired_difference` raises.
    """
    d = _differences(a, b)
    if not np.isin(np.concatenate([a, b]), (0, 1)).all():
        raise ValueError("McNemar's test takes scores of 0 and 1 only; use sign_flip_p for other scores.")
    won, lost = int((d > 0).sum()), int((d < 0).sum())
    tail = sum(math.comb(won + lost, k) for k in range(min(won, lost) + 1))
    return McNemar(won, lost, min(1.0, 2 * tail / 2 ** (won + lost)))


def sign_flip_p(d: Values, resamples: int = RESAMPLES, seed: int = 0) -> float:
    """Two-sided permutation p of the mean of paired differences d [n].

    Under the null hypothesis each d_i is as likely with the other sign (Fisher 1935). All sign flips are
    enumerated where they have at most 100,000 outcomes: equal |d_i| count as one value, so n may be in the
    hundreds when scores are 0/1, and with one seed that is McNemar's exact test. Otherwise
    p = (1 + #{|sum*| >= |sum|}) / (1 + resamples) (Phipson and Smyth 2010), which is never below 0.0001: a
    Holm correction over more than 500 such comparisons cannot go below 0.05.

    Raises:
        ValueError: d is empty, not one-dimensional, or holds NaN or infinity.
    """
    d = _column(d, "d")
    sizes, counts = np.unique(np.abs(d[d != 0]), return_counts=True)
    if not len(sizes):
        return 1.0
    least = abs(math.fsum(d)) - 1e-9 * float(sizes @ counts)  # sums in another order are still equal
    if math.prod(int(c) + 1 for c in counts) <= _EXACT:
        sums, chance = _all_flips(sizes, counts)
        return min(1.0, float(chance[np.abs(sums) >= least].sum()))
    # of c values of size v, k keep their sign: they add v (2k - c)
    rng = np.random.default_rng(seed)
    sums = np.zeros(resamples)
    for size, count in zip(sizes, counts, strict=True):
        sums += size * (2 * rng.binomial(count, 0.5, size=resamples) - count)
    return float(1 + (np.abs(sums) >= least).sum()) / (1 + resamples)


def t_test_p(d: Values) -> float:
    """Two-sided p of Student's one-sample t test, H0: the mean of d is 0; 1 where n = 1 or all d are 0.

    For few means of many problems, such as one difference per pair of runs: each is close to normal, and
    with 3 to 5 of them no permutation can reach p < .05.
    """
    from scipy.special import stdtr

    values = _column(d, "d")
    mean, stderr = _mean_stderr(values)
    if len(values) == 1 or mean == 0:
        return 1.0
    return float(2 * stdtr(len(values) - 1, -abs(mean) / stderr)) if stderr else 0.0


def _all_flips(sizes: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every value the sum can take under sign flips, and its chance."""
    sums, chance = np.zeros(1), np.ones(1)
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        kept = range(count + 1)
        sums = np.add.outer(sums, [size * (2 * k - count) for k in kept]).ravel()
        chance = np.multiply.outer(chance, [math.comb(count, k) / 2**count for k in kept]).ravel()
    return sums, chance


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction: p adjusted for all comparisons in the list, in the order given.

    Of m sorted p-values, p~_(i) = min(1, max_{j <= i} (m - j + 1) p_(j)); p~ <= 0.05 keeps the chance of
    any false claim in the list at 5 %, however the comparisons depend on each other (Holm 1979).

    Raises:
        ValueError: a value outside 0..1.
    """
    if any(not 0 <= x <= 1 for x in p):
        raise ValueError(f"p-values lie in 0..1, got {[x for x in p if not 0 <= x <= 1][:3]}.")
    order = sorted(range(len(p)), key=lambda i: p[i])
    adjusted, most = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        most = max(most, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = most
    return adjusted


# ---------------------------------------------------------------- intervals


def bootstrap_interval(
    d: Values, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """BCa bootstrap interval of the mean of d [n], problems resampled with replacement.

    Bias-corrected and accelerated (Efron 1987), as scipy.stats.bootstrap(method="BCa") of the mean:
    the quantiles Phi(z0 + (z0 + z) / (1 - a (z0 + z))) of the resampled means m*, at z = Phi^-1 of both
    tails, with z0 = Phi^-1(P[m* < m] + P[m* = m] / 2) and a = sum (d_i - m)^3 / (6 (sum (d_i - m)^2)^1.5).

    Both ends are the mean when all d_i are equal, and NaN when n == 1.

    Raises:
        ValueError: d is empty, not one-dimensional, or holds NaN or infinity.
    """
    d = _column(d, "d")
    if len(d) == 1:
        return math.nan, math.nan
    mean = float(d.mean())
    if np.ptp(d) == 0:
        return mean, mean
    means = _resampled_means(d, resamples, np.random.default_rng(seed))
    slack = 1e-12 * float(np.abs(d).max())  # a sum in another order is still the same mean
    below, equal = (means < mean - slack).mean(), (np.abs(means - mean) <= slack).mean()
    z0 = _NORMAL.inv_cdf(min(max(float(below + equal / 2), 0.5 / resamples), 1 - 0.5 / resamples))
    centred = d - mean
    skew = float((centred**3).sum() / (6 * (centred**2).sum() ** 1.5))
    tails = [z0 + _NORMAL.inv_cdf(q) for q in ((1 - level) / 2, (1 + level) / 2)]
    low, high = np.quantile(means, [_NORMAL.cdf(z0 + z / (1 - skew * z)) for z in tails])
    return float(low), float(high)


def _resampled_means(d: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Means of n values drawn from d with replacement, [resamples]."""
    values, counts = np.unique(d, return_counts=True)
    if len(values) <= _FEW:  # how often each value is drawn is multinomial: the same law, many times faster
        drawn = rng.multinomial(len(d), counts / len(d), size=resamples)
        return (drawn * values).sum(axis=1) / len(d)
    chunk = max(1, 2**20 // len(d))
    sizes = [min(chunk, resamples - start) for start in range(0, resamples, chunk)]
    return np.concatenate([d[rng.integers(len(d), size=(size, len(d)))].mean(axis=1) for size in sizes])


# ---------------------------------------------------------------- parts


def _differences(a: Values, b: Values) -> np.ndarray:
    left, right = _column(a, "a"), _column(b, "b")
    if len(left) != len(right):
        raise ValueError(
            f"A paired difference needs the same problems on both sides, got {len(left)} and {len(right)}; "
            "run both with the same tasks and limit."
        )
    return left - right


def _column(x: Values, name: str) -> np.ndarray:
    values = np.asarray(x, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"{name} must be a non-empty list of numbers, got shape {values.shape}.")
    if not np.isfinite(values).all():
        raise ValueError(
            f"{name} holds {int((~np.isfinite(values)).sum())} value(s) that are NaN or infinite; "
            "leave those problems out on both sides, or count them as wrong."
        )
    return values


def _mean_stderr(values: np.ndarray) -> tuple[float, float]:
    n = len(values)
    stderr = float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    return float(values.mean()), stderr

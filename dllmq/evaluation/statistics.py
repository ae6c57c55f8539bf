"""Means, paired differences and their standard errors, over problems.

    x_i           score of problem i (0/1 or real)
    n             number of problems
    stderr(x)     sqrt( sum_i (x_i - mean)^2 / (n - 1) / n )

Two runs that answered the same problems are compared problem by problem: the standard error of
mean(a_i - b_i) leaves out the difficulty that both share, so it is smaller than that of two separate
means. Only the problems are counted as random here; seeds are not extra problems.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A mean over n problems; `stderr` is NaN when n == 1, for one problem says nothing about the spread."""

    value: float
    stderr: float
    n: int


@dataclass(frozen=True)
class Difference(Estimate):
    """A mean of a_i - b_i over the n problems that both answered; positive when a is larger."""


def mean_stderr(x: Sequence[float | int] | np.ndarray) -> Estimate:
    """Mean of x with the standard error of that mean (sample variance, n - 1).

    Raises:
        ValueError: x is empty, not one-dimensional, or holds NaN or infinity.
    """
    values = _column(x, "x")
    return Estimate(*_mean_stderr(values), n=len(values))


def paired_difference(
    a: Sequence[float | int] | np.ndarray, b: Sequence[float | int] | np.ndarray
) -> Difference:
    """Mean of a_i - b_i with its standard error; a_i and b_i must be the same problem.

    Raises:
        ValueError: different lengths (the runs did not see the same problems), empty, NaN or infinity.
    """
    left, right = _column(a, "a"), _column(b, "b")
    if len(left) != len(right):
        raise ValueError(
            f"A paired difference needs the same problems on both sides, got {len(left)} and {len(right)}; "
            "run both with the same tasks and limit."
        )
    return Difference(*_mean_stderr(left - right), n=len(left))


def _column(x: Sequence[float | int] | np.ndarray, name: str) -> np.ndarray:
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

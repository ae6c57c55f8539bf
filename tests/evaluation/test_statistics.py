"""Means and paired differences against textbook formulas."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dllmq.evaluation.statistics import Difference, mean_stderr, paired_difference

scores = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=30)


def test_mean_and_error_of_a_worked_example():
    estimate = mean_stderr([1.0, 0.0, 1.0, 1.0])
    assert estimate.value == 0.75
    assert estimate.stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 3))  # p (1 - p) / (n - 1)
    assert estimate.n == 4


@given(scores)
def test_error_equals_scipys(x):
    assert mean_stderr(x).stderr == pytest.approx(float(stats.sem(x)), rel=1e-9, abs=1e-12)


def test_paired_error_is_that_of_the_differences():
    a, b = [1, 1, 1, 0, 1], [1, 0, 1, 0, 0]
    d = paired_difference(a, b)
    assert isinstance(d, Difference)
    assert (d.value, d.n) == (pytest.approx(0.4), 5)
    assert d.stderr == pytest.approx(np.std([0, 1, 0, 0, 1], ddof=1) / math.sqrt(5))


@given(scores)
def test_a_run_does_not_differ_from_itself_nor_from_itself_shifted(x):
    assert paired_difference(x, x) == Difference(0.0, 0.0, len(x))
    shifted = paired_difference(np.asarray(x) + 2.0, x)
    assert shifted.value == pytest.approx(2.0)
    assert shifted.stderr == pytest.approx(0.0, abs=1e-9)


def test_swapping_the_sides_changes_the_sign_only():
    a, b = [1, 0, 1, 1], [0, 0, 1, 0]
    assert paired_difference(a, b).value == -paired_difference(b, a).value
    assert paired_difference(a, b).stderr == paired_difference(b, a).stderr


def test_pairing_removes_the_difficulty_both_share():
    rng = np.random.default_rng(0)
    difficulty = rng.normal(size=400)
    a, b = difficulty + rng.normal(0, 0.1, 400), difficulty + rng.normal(0, 0.1, 400)
    unpaired = math.hypot(mean_stderr(a).stderr, mean_stderr(b).stderr)
    assert paired_difference(a, b).stderr < 0.2 * unpaired


def test_one_problem_has_no_error():
    assert math.isnan(paired_difference([1.0], [0.0]).stderr)


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        ([1, 0], [1], "same problems"),
        ([], [], "non-empty"),
        ([math.nan], [0.0], "NaN"),
        (np.ones((2, 2)), [1.0], "shape"),
    ],
)
def test_what_cannot_be_compared_is_said(a, b, words):
    with pytest.raises(ValueError, match=words):
        paired_difference(a, b)

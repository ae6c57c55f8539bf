"""Means, intervals and tests against textbook formulas, scipy and worked examples."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dllmq.evaluation.statistics import (
    Difference,
    McNemar,
    bootstrap_interval,
    clustered_mean,
    holm,
    mcnemar,
    mean_stderr,
    paired_difference,
    sign_flip_p,
    t_test_p,
)

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


# ---------------------------------------------------------------- seeds


def test_seeds_are_averaged_inside_a_problem():
    table = [[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]]
    estimate = clustered_mean(table)
    assert estimate == mean_stderr([2 / 3, 0, 1, 1 / 3])
    assert estimate.n == 4


@given(st.lists(st.sampled_from([0, 1]), min_size=2, max_size=40), st.integers(1, 5))
def test_repeating_a_seed_is_no_evidence(x, times):
    once, repeated = mean_stderr(x), clustered_mean(np.tile(np.array(x)[:, None], times))
    assert repeated.stderr == pytest.approx(once.stderr)
    assert (repeated.value, repeated.n) == (pytest.approx(once.value), once.n)


def test_independent_seeds_narrow_the_error_only_by_their_own_noise():
    """Problems differ (variance v), seeds add noise (variance w): stderr^2 = (v + w / seeds) / n."""
    rng = np.random.default_rng(0)
    table = rng.normal(0, 1, (4000, 1)) + rng.normal(0, 1, (4000, 4))
    assert clustered_mean(table).stderr == pytest.approx(math.sqrt((1 + 1 / 4) / 4000), rel=0.05)


def test_a_table_of_seeds_must_be_one():
    with pytest.raises(ValueError, match=r"\[problems, seeds\]"):
        clustered_mean(np.ones(3))


# ---------------------------------------------------------------- McNemar


def pairs(both: int, won: int, lost: int, neither: int) -> tuple[list[int], list[int]]:
    a = [1] * both + [1] * won + [0] * lost + [0] * neither
    b = [1] * both + [0] * won + [1] * lost + [0] * neither
    return a, b


def test_mcnemar_of_a_worked_example():
    # 25 won, 4 lost: 2 * (C(29,0) + ... + C(29,4)) / 2^29
    tail = 1 + 29 + 406 + 3654 + 23751
    assert mcnemar(*pairs(60, 25, 4, 11)) == McNemar(25, 4, 2 * tail / 2**29)
    assert mcnemar(*pairs(0, 1, 5, 0)).p == 0.21875


@pytest.mark.parametrize(("won", "lost"), [(0, 0), (3, 3), (1, 0), (0, 7), (12, 30), (400, 310)])
def test_mcnemar_is_the_binomial_test_of_the_discordant_problems(won, lost):
    expected = stats.binomtest(won, won + lost).pvalue if won + lost else 1.0
    assert mcnemar(*pairs(5, won, lost, 5)).p == pytest.approx(expected, rel=1e-9)


def test_mcnemar_takes_zeros_and_ones_only():
    with pytest.raises(ValueError, match="0 and 1 only"):
        mcnemar([0.5, 1.0], [0.0, 1.0])


# ---------------------------------------------------------------- sign flips


@given(st.integers(0, 30), st.integers(0, 30))
def test_sign_flips_of_zeros_and_ones_are_mcnemars_test(won, lost):
    a, b = pairs(3, won, lost, 3)
    assert sign_flip_p(np.array(a) - np.array(b)) == pytest.approx(mcnemar(a, b).p, rel=1e-9)


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=8))
def test_few_problems_are_enumerated_like_scipys(x):
    d = np.round(x, 3)
    if not d.any():
        assert sign_flip_p(d) == 1
        return
    expected = stats.permutation_test((d,), np.sum, permutation_type="samples", n_resamples=np.inf)
    assert sign_flip_p(d) == pytest.approx(expected.pvalue, abs=1e-9)


def test_many_problems_are_sampled_close_to_the_normal_limit():
    d = np.random.default_rng(1).normal(0.1, 1, 300)
    z = d.sum() / math.sqrt((d**2).sum())
    assert sign_flip_p(d) == pytest.approx(2 * stats.norm.sf(abs(z)), abs=0.01)
    assert sign_flip_p(d + 5) == pytest.approx(1 / 10_001)  # never 0
    assert sign_flip_p(d) == sign_flip_p(d)


def test_where_nothing_differs_the_false_alarms_are_as_rare_as_claimed():
    rng = np.random.default_rng(2)
    p = np.array([sign_flip_p(rng.integers(-1, 2, 60)) for _ in range(400)])
    assert (p < 0.05).mean() < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)


# ---------------------------------------------------------------- Holm


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=9).filter(lambda d: np.std(d) > 1e-6))
def test_a_t_test_is_scipys(d):
    assert t_test_p(d) == pytest.approx(stats.ttest_1samp(d, 0).pvalue, rel=1e-6)


def test_a_t_test_without_spread():
    assert t_test_p([0.3]) == t_test_p([0.0, 0.0]) == 1
    assert t_test_p([0.5, 0.5, 0.5]) == 0


def test_holm_of_worked_examples():
    assert holm([0.01, 0.02, 0.03, 0.04]) == pytest.approx([0.04, 0.06, 0.06, 0.06])
    assert holm([0.04, 0.01, 0.6]) == pytest.approx([0.08, 0.03, 0.6])
    assert holm([]) == []
    with pytest.raises(ValueError, match=r"0\.\.1"):
        holm([0.1, 1.5])


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_never_lowers_a_p_and_is_at_most_bonferronis(p):
    for raw, adjusted in zip(p, holm(p), strict=True):
        assert raw <= adjusted <= min(1.0, len(p) * raw) + 1e-12


# ---------------------------------------------------------------- bootstrap


@pytest.mark.parametrize("kind", ["zeros and ones", "three seeds", "skewed", "few"])
def test_the_interval_is_scipys_bca(kind):
    rng = np.random.default_rng(3)
    d = {
        "zeros and ones": rng.choice([-1.0, 0.0, 1.0], 200, p=[0.05, 0.8, 0.15]),
        "three seeds": rng.integers(-3, 4, 150) / 3,
        "skewed": rng.lognormal(0, 1, 60),
        "few": rng.normal(0, 1, 20),
    }[kind]
    ours = bootstrap_interval(d)
    theirs = stats.bootstrap((d,), np.mean, method="BCa", n_resamples=10_000, rng=rng).confidence_interval
    assert ours == pytest.approx(tuple(theirs), abs=0.12 * mean_stderr(d).stderr)


def test_the_interval_covers_the_truth_as_often_as_claimed():
    rng = np.random.default_rng(4)
    inside = 0
    for _ in range(300):
        low, high = bootstrap_interval(rng.choice([-1.0, 0.0, 1.0], 100, p=[0.1, 0.7, 0.2]), resamples=1000)
        inside += low <= 0.1 <= high
    assert inside / 300 == pytest.approx(0.95, abs=0.04)


def test_the_interval_is_the_same_every_time():
    d = np.random.default_rng(5).normal(size=50)
    assert bootstrap_interval(d) == bootstrap_interval(d)
    low, high = bootstrap_interval(d)
    assert low < d.mean() < high
    wide = bootstrap_interval(d, level=0.99)
    assert wide[0] < low and high < wide[1]


def test_intervals_without_spread():
    assert bootstrap_interval([0.5] * 10) == (0.5, 0.5)
    assert all(map(math.isnan, bootstrap_interval([1.0])))

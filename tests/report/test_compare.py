"""What is compared with what, and that the numbers of a comparison are those of the statistics."""

import dataclasses

import numpy as np
import pytest
from scipy import stats

from dllmq.evaluation.statistics import bootstrap_interval, holm, mcnemar, paired_difference, sign_flip_p
from dllmq.report.compare import delta, effects, fidelity_delta, main_effects
from dllmq.report.groups import fidelity, groups, score, twin
from dllmq.report.results import RunRecord, Sweep
from tests.report.records_factory import ablation, baseline, cells, record, with_prompts

TASK, METRIC = "t", "acc"


def run(values, seed: int = 0, kl=None, **axes) -> RunRecord:
    """A run with these per-problem scores, and KL per prompt."""
    values = [float(v) for v in values]
    fidelity_ = {"kl": {"value": float(np.mean(kl)), "stderr": 0.1, "n": 99}} if kl else {}
    return dataclasses.replace(
        record(),
        axes={"method": "gptq", "bits": "w3a4", **axes, "seed": seed},
        scores={TASK: {METRIC: {"value": float(np.mean(values)), "stderr": 0.05, "n": len(values)}}},
        per_problem={TASK: {METRIC: values}},
        fidelity=fidelity_,
        fidelity_per_prompt={"kl": list(kl)} if kl else {},
    )


def sweep_of(*runs: RunRecord, reference: RunRecord | None = None) -> Sweep:
    return Sweep("s", runs, reference, ())


def bits(count: int, share: float, key: int) -> np.ndarray:
    return (np.random.default_rng(key).random(count) < share).astype(float)


# ---------------------------------------------------------------- groups and twins


def test_a_group_is_the_runs_that_differ_in_the_seed_only():
    runs = [run([1, 0], seed=s, tmas=t) for t in (False, True) for s in (0, 1, 2)]
    found = groups(sweep_of(*runs))
    assert [g.axes for g in found] == [{"method": "gptq", "bits": "w3a4", "tmas": t} for t in (False, True)]
    assert [g.seeds for g in found] == [(0, 1, 2), (0, 1, 2)]


def test_two_runs_of_one_cell_and_seed_are_not_averaged():
    """They differ in something that is no axis."""
    found = groups(sweep_of(run([1, 0]), run([0, 0])))
    assert [len(g.records) for g in found] == [1, 1]


def test_a_twin_must_agree_in_every_other_axis():
    runs = [record(tmas=a, cgq=b, seed=s) for a in (False, True) for b in (False, True) for s in (0, 1)]
    sweep = sweep_of(*runs)
    both = next(g for g in groups(sweep) if g.axes["tmas"] and g.axes["cgq"])
    assert twin(sweep, both, "tmas").axes == {**both.axes, "tmas": False}
    assert twin(sweep, both, "cgq").axes == {**both.axes, "cgq": False}
    assert twin(sweep, both, "cgq").seeds == (0, 1)
    assert twin(sweep, groups(sweep)[0], "tmas") is None  # off already
    assert twin(sweep_of(*both.records), both, "tmas") is None  # missing
    assert twin(sweep_of(*runs, *runs), both, "tmas") is None  # not unique


def test_a_switch_that_an_older_record_lacks_is_off():
    old, new = run([1, 0]), run([1, 1], tmas=True, cgq=False)
    sweep = sweep_of(old, new)
    assert twin(sweep, groups(sweep)[1], "tmas").records == (old,)
    other = run([1, 0], group_size=0)  # an axis of its own, though 0 equals False in Python
    assert twin(sweep_of(other, new), groups(sweep)[1], "tmas") is None


# ---------------------------------------------------------------- one seed


def test_a_delta_is_the_paired_statistics_of_both_runs():
    a, b = bits(200, 0.7, 0), bits(200, 0.6, 1)
    d = delta(run(a), run(b), TASK, METRIC)
    expected = paired_difference(a, b)
    assert (d.value, d.stderr, d.n) == (expected.value, expected.stderr, 200)
    assert (d.low, d.high) == bootstrap_interval(a - b)
    test = mcnemar(a, b)
    assert (d.p, d.won, d.lost) == (test.p, test.won, test.lost)
    assert d.paired and d.seeds == 1 and d.p_holm is None


def test_scores_that_are_no_zeros_and_ones_are_tested_by_sign_flips():
    a, b = np.random.default_rng(0).random((2, 12))
    d = delta(run(a), run(b), TASK, METRIC)
    assert d.p == sign_flip_p(a - b)


def test_no_delta_to_a_full_precision_of_other_settings():
    reference, first = baseline(), cells()[0]
    own = dataclasses.replace(first, notes={"baseline": reference.fingerprint})
    other = dataclasses.replace(first, notes={"baseline": "of another model"})
    assert delta(own, reference, "mini_gsm", "exact_match") is not None
    assert delta(other, reference, "mini_gsm", "exact_match") is None
    assert delta(other, cells()[1], "mini_gsm", "exact_match") is not None  # a twin is a twin


def test_without_common_problems_the_errors_add_in_squares():
    bare = dataclasses.replace(run([1, 0]), per_problem={})
    for d in (
        delta(bare, run([1, 1]), TASK, METRIC),
        delta(run([1, 0, 1]), run([1, 1]), TASK, METRIC),
    ):
        assert not d.paired and d.low is d.high is d.p is None
        assert d.stderr == pytest.approx(0.05 * 2**0.5)


def test_what_is_undefined_on_one_side_is_left_out_on_both():
    a = run([1], kl=[0.5, 0.2, 0.4])
    b = dataclasses.replace(run([1], kl=[0.1, 0.1, 0.1]), fidelity_per_prompt={"kl": [0.1, None, 0.2]})
    d = fidelity_delta(a, b, "kl")
    assert (d.value, d.n) == (pytest.approx(0.3), 2)


# ---------------------------------------------------------------- several seeds


def test_seeds_are_matched_and_averaged_inside_a_problem():
    a = [bits(60, 0.7, key) for key in (0, 1, 2)]
    b = [bits(60, 0.6, key) for key in (3, 4, 5)]
    # stored in another order, and one seed of b is missing
    runs = [run(a[s], seed=s, tmas=True) for s in (2, 0, 1)] + [run(b[s], seed=s, tmas=False) for s in (0, 2)]
    on, off = groups(sweep_of(*runs))
    d = delta(on, off, TASK, METRIC)
    means = ((a[0] - b[0]) + (a[2] - b[2])) / 2
    assert d.value == pytest.approx(means.mean())
    assert d.stderr == pytest.approx(stats.sem(means))
    assert (d.n, d.seeds, d.p) == (60, 2, sign_flip_p(means))
    assert (d.low, d.high) == bootstrap_interval(means)


def test_full_precision_has_no_seeds_and_stands_against_each():
    a, fp = [bits(50, 0.7, key) for key in (0, 1)], bits(50, 0.9, 2)
    (group,) = groups(sweep_of(*(run(v, seed=s) for s, v in enumerate(a))))
    d = delta(group, run(fp, method="fp"), TASK, METRIC)
    assert d.value == pytest.approx(((a[0] + a[1]) / 2 - fp).mean())
    assert (d.n, d.seeds) == (50, 2)


def test_repeating_a_seed_is_no_evidence():
    a, b = bits(80, 0.7, 0), bits(80, 0.6, 1)
    once = delta(run(a, tmas=True), run(b, tmas=False), TASK, METRIC)
    runs = [run(v, seed=s, tmas=on) for s in range(5) for v, on in ((a, True), (b, False))]
    on, off = groups(sweep_of(*runs))
    repeated = delta(on, off, TASK, METRIC)
    names = ("value", "stderr", "low", "high", "p", "n")
    for name in names:
        assert getattr(repeated, name) == pytest.approx(getattr(once, name)), name
    assert score(on, TASK, METRIC).stderr == pytest.approx(stats.sem(a))


def test_no_seed_in_common_is_no_comparison():
    on, off = groups(sweep_of(run([1, 0], seed=0, tmas=True), run([0, 0], seed=1, tmas=False)))
    assert delta(on, off, TASK, METRIC) is None


def test_a_groups_mean_tells_each_seeds_value():
    a = [bits(40, 0.7, 0), bits(40, 0.7, 1)]
    (group,) = groups(sweep_of(*(run(v, seed=s, kl=[0.1 + s, 0.3 + s]) for s, v in enumerate(a))))
    found = score(group, TASK, METRIC)
    assert found.per_seed == (a[0].mean(), a[1].mean())
    assert found.value == pytest.approx((a[0].mean() + a[1].mean()) / 2)
    assert found.stderr == pytest.approx(stats.sem((a[0] + a[1]) / 2))
    assert fidelity(group, "kl").value == pytest.approx(0.7)
    assert fidelity(group, "kl").stderr == pytest.approx(stats.sem([0.6, 0.8]))
    (bare,) = groups(sweep_of(*(dataclasses.replace(r, per_problem={}) for r in group.records)))
    assert score(bare, TASK, METRIC).stderr == pytest.approx(0.05)  # not smaller than one seed's


# ---------------------------------------------------------------- effects


@pytest.fixture(scope="module")
def study() -> Sweep:
    reference, runs = ablation()
    return Sweep("study", tuple(map(with_prompts, runs)), reference, ())


def test_p_values_are_corrected_over_all_effects_and_tasks_and_kl_apart(study):
    found = effects(study)
    assert len(found) == 3 * 8
    raw = [d.p for e in found for d in e.deltas.values()]
    assert len(raw) == 48
    assert [d.p_holm for e in found for d in e.deltas.values()] == holm(raw)
    assert [e.kl.p_holm for e in found] == holm([e.kl.p for e in found])
    assert all(e.kl.n == 32 for e in found)


def test_an_average_effect_is_the_mean_over_twin_pairs_problem_by_problem(study):
    found = [e for e in main_effects(study) if e.toggle == "tmas" and e.task == "mini_gsm"]
    assert [(e.method, e.twins) for e in found] == [(None, 8), ("awq", 4), ("gptq", 4)]
    pairs = [e for e in effects(study) if e.toggle == "tmas"]
    assert found[0].delta.value == pytest.approx(np.mean([e.deltas["mini_gsm"].value for e in pairs]))
    assert found[0].delta.n == 200
    assert found[0].delta.stderr < min(e.deltas["mini_gsm"].stderr for e in pairs)


def test_pairs_without_effect_are_a_placebo_of_their_own(study):
    """The records call cgq inert where tmas is off."""
    found = [e for e in main_effects(study) if e.toggle == "cgq" and e.task == "mini_gsm"]
    assert [(e.method, e.twins, e.placebo) for e in found] == [
        (None, 4, False), ("awq", 2, False), ("gptq", 2, False), (None, 4, True)
    ]  # fmt: skip
    assert sum(e.inert for e in effects(study)) == 4
    assert found[-1].verdict == "placebo" and found[-1].delta.p_holm is None


def test_an_average_effect_also_has_the_spread_of_its_runs(study):
    found = next(e for e in main_effects(study) if e.toggle == "tmas" and e.task == "mini_gsm")
    pairs = [e for e in effects(study) if e.toggle == "tmas"]
    by_run = [
        delta(on, next(r for r in e.twin.records if r.seed == on.seed), "mini_gsm", "exact_match").value
        for e in pairs
        for on in e.group.records
    ]
    assert found.runs.n == len(by_run) == sum(len(e.group.records) for e in pairs)
    assert found.runs.value == pytest.approx(np.mean(by_run))
    assert found.runs.stderr == pytest.approx(np.std(by_run, ddof=1) / len(by_run) ** 0.5)
    assert found.runs_p == pytest.approx(stats.ttest_1samp(by_run, 0).pvalue)


def test_the_verdict_follows_the_corrected_p_and_the_runs(study):
    for e in main_effects(study):
        if e.placebo:
            continue
        better = (e.delta.value < 0) if e.task == "KL" else (e.delta.value > 0)
        shown = e.delta.p_holm < 0.05 and e.runs_p < 0.05
        assert e.verdict == (("helps" if better else "hurts") if shown else "no difference shown")
    assert {e.verdict for e in main_effects(study)} >= {"helps", "no difference shown"}
    sure = next(e for e in main_effects(study) if e.verdict == "helps")
    assert dataclasses.replace(sure, runs_p=0.2).verdict == "no difference shown"


def test_one_pair_has_no_average():
    runs = [run(bits(20, 0.5, on), tmas=bool(on)) for on in (0, 1)]
    assert len(effects(sweep_of(*runs))) == 1
    assert main_effects(sweep_of(*runs)) == []

"""Settings against their reference: which runs are paired, and that the numbers are those of the pairs."""

import dataclasses

import numpy as np
import pytest
from scipy import stats

from dllmq.report.build import summary
from dllmq.report.compare import delta
from dllmq.report.effect_tables import settings_table
from dllmq.report.groups import groups
from dllmq.report.results import RunRecord, Sweep
from dllmq.report.settings import levels, setting_axes, setting_effects
from dllmq.report.tables import sweep_tables
from tests.report.records_factory import record, with_prompts

SEEDS = range(3)


def sweep_of(*runs: RunRecord) -> Sweep:
    return Sweep("study", tuple(with_prompts(r) for r in runs), None, ())


def cell(method: str = "gptq", **axes) -> list[RunRecord]:
    shares = (0.7 + 0.05 * (axes.get("states") == "uniform"), 0.9, 0.75)
    axes = {"tmas": False, "iaaq": False, "states": "clean", "value_scale": "minmax"} | axes
    return [record(method, shares, seed=seed, **axes) for seed in SEEDS]


@pytest.fixture(scope="module")
def states() -> Sweep:
    runs = [
        run
        for method in ("gptq", "awq")
        for axes in ({}, {"tmas": True}, {"states": "uniform"}, {"tmas": True, "value_scale": "mse"})
        for run in cell(method, **axes)
    ]
    runs += cell("gptq", tmas=True, iaaq=True)
    return sweep_of(*runs)


def test_a_switch_is_a_level_of_the_axis_it_belongs_to():
    assert levels({"states": "clean", "tmas": True, "cgq": None, "seed": 1}) == {"states": "tmas"}
    assert levels({"value_scale": "mse", "iaaq": False}) == {"value_scale": "mse"}
    assert levels({"value_scale": "mse", "iaaq": True, "k": 3}) == {"value_scale": "iaaq", "k": 3}


def test_every_level_stands_against_the_usual_one_and_against_the_technique(states):
    found = {(f.axis, f.level, f.reference, f.effect.method) for f in setting_effects(states)}
    assert found == {
        *(("states", "uniform", r, m) for r in ("clean", "tmas") for m in (None, "gptq", "awq")),
        *(("value_scale", "mse", "minmax", m) for m in (None, "gptq", "awq")),
        ("value_scale", "mse", "iaaq", None),
    }


def test_a_setting_is_the_mean_over_its_pairs_and_runs(states):
    wanted = ("uniform", "tmas", "mini_gsm", None)
    found = next(
        f.effect
        for f in setting_effects(states)
        if (f.level, f.reference, f.effect.task, f.effect.method) == wanted
    )
    plain = [g for g in groups(states) if not g.axes["iaaq"] and g.axes["value_scale"] == "minmax"]
    of = {(g.axes["method"], levels(g.axes)["states"]): g for g in plain}
    pairs = [(of[m, "uniform"], of[m, "tmas"]) for m in ("gptq", "awq")]
    each = [delta(a, b, "mini_gsm", "exact_match").value for a, b in pairs]
    assert found.delta.value == pytest.approx(np.mean(each))
    by_run = [
        delta(x, y, "mini_gsm", "exact_match").value
        for a, b in pairs
        for x, y in zip(a.records, b.records, strict=True)
    ]
    assert found.runs.n == 6 and found.runs.value == pytest.approx(np.mean(by_run))
    assert found.runs_p == pytest.approx(stats.ttest_1samp(by_run, 0).pvalue)
    assert found.delta.p_holm > found.delta.p


def test_a_constant_at_its_default_is_told_from_the_config():
    plain = [dataclasses.replace(r, config=r.config | {"cgq_unmasked": 0.7}) for r in cell()]
    other = [run for value in (0.0, 1.0) for run in cell(cgq_unmasked=value)]
    sweep = sweep_of(*other, *plain)
    assert setting_axes(sweep) == ["cgq_unmasked"]
    # of equally frequent levels the first is the reference
    assert {(f.level, f.reference) for f in setting_effects(sweep)} == {("1.0", "0.0"), ("0.7", "0.0")}
    more = sweep_of(*other, *plain, *cell("awq"))
    assert {(f.level, f.reference) for f in setting_effects(more)} == {("0.0", "0.7"), ("1.0", "0.7")}


def test_one_pair_of_runs_has_no_verdict():
    found = setting_effects(sweep_of(cell()[0], cell(cgq_unmasked=0.0)[0]))
    assert {f.effect.verdict for f in found} == {"one run"} and {f.effect.runs.n for f in found} == {1}
    (first, *_) = summary(sweep_of(cell()[0], cell(cgq_unmasked=0.0)[0]))["settings"]
    assert first["runs"]["stderr"] is None and first["runs_p"] == 1


def test_only_cells_that_are_otherwise_equal_are_paired():
    sweep = sweep_of(*cell(group_size=-1), *cell(group_size=32, tmas=True))
    assert setting_effects(sweep) == []


def test_the_table_has_a_row_per_level_and_measure(states):
    table = settings_table(states)
    assert len(table.rows) == len(setting_effects(states)) == 10 * 4
    assert [c.text for c in table.rows[0].cells[:4]] == ["states", "uniform", "clean", "all methods"]
    assert table.title in [t.title for t in sweep_tables(states)]
    assert {(s["axis"], s["level"]) for s in summary(states)["settings"]} == {
        ("states", "uniform"),
        ("value_scale", "mse"),
    }
    assert settings_table(sweep_of(*cell(), *cell(tmas=True))).rows == ()

"""The figures: what is drawn, for which records, and that the files are stable and readable."""

import dataclasses
import re
import xml.etree.ElementTree as ET

import pytest

from dllmq.report.figures import draw, to_svg, write_png
from dllmq.report.groups import groups
from dllmq.report.plot_curves import points_of
from dllmq.report.plot_style import MAX_LINES, lines_of
from dllmq.report.results import Sweep
from tests.report.records_factory import ablation, baseline, cells, record


@pytest.fixture(scope="module")
def sweep() -> Sweep:
    return Sweep("s", tuple(cells()), baseline(), ())


@pytest.fixture(scope="module")
def large() -> Sweep:
    reference, runs = ablation(seeds=(0, 1))
    return Sweep("large", tuple(runs), reference, ())


@pytest.fixture(scope="module")
def drawn(large):
    return {d.name: d for d in draw(large)}


def named(sweep, name):
    return next(d for d in draw(sweep) if d.name == name)


def test_a_whole_evaluation_has_every_figure(drawn):
    assert list(drawn) == [
        *("score-0-mini-gsm", "score-1-mini-code"),
        *("effect-0-mini-gsm", "effect-1-mini-code", "effect-2-kl"),
        *("kl-by-step", "argmax-at-k-by-step", "hidden-error-by-step", "divergence-by-step"),
        "hidden-error-by-block",
        *("kl-by-mask-ratio", "top1-by-mask-ratio", "argmax-at-k-by-mask-ratio", "slots-at-k-by-mask-ratio"),
        *("cost-weights", "cost-seconds"),
    ]


def test_figures_are_left_out_where_nothing_was_measured():
    bare = dataclasses.replace(record(), curves={}, scores={}, per_problem={})
    assert draw(Sweep("s", (bare,), None, ())) == []


# ---------------------------------------------------------------- lines


def test_runs_that_differ_in_the_seed_are_one_line_with_the_range_of_its_seeds():
    runs = [
        dataclasses.replace(
            record("gptq", seed=s),
            seed=s,
            curves={"kl_by_step": {"step": [0, 1, 2], "value": [v, 2 * v, None]}},
        )
        for s, v in enumerate((0.1, 0.3, 0.8))
    ]
    sweep = Sweep("s", tuple(runs), None, ())
    assert len(lines_of(sweep)) == 1
    assert points_of(groups(sweep)[0], "kl_by_step") == {0: [0.1, 0.3, 0.8], 1: [0.2, 0.6, 1.6]}
    drawing = named(sweep, "kl-by-step")
    (axis,) = drawing.figure.axes
    assert list(axis.lines[0].get_ydata()) == pytest.approx([0.4, 0.8])
    low, high = axis.collections[0].get_paths()[0].get_extents().get_points()[:, 1]
    assert (low, high) == pytest.approx((0.1, 1.6))
    assert "Mean over 3 seeds; the band goes from the lowest to the highest." in drawing.caption


def test_a_single_seed_has_no_band(sweep):
    drawing = named(sweep, "kl-by-step")
    assert not drawing.figure.axes[0].collections
    assert "seeds" not in drawing.caption


def test_four_runs_share_one_axes_and_no_look(sweep):
    lines = lines_of(sweep)
    assert {line.panel for line in lines} == {""}
    assert len({(line.color, line.dashes) for line in lines}) == 4


def test_sixteen_cells_get_a_panel_per_method_and_a_look_each_within(large):
    lines = lines_of(large)
    assert [line.panel for line in lines] == ["awq"] * 8 + ["gptq"] * 8
    for panel in ("awq", "gptq"):
        own = [line for line in lines if line.panel == panel]
        assert len({(line.color, line.dashes) for line in own}) == 8
        assert [line.key for line in own][:2] == ["all off", "+iaaq"]
    assert {line.dashes for line in lines if not line.group.axes["tmas"]} == {(4, 2)}
    assert {line.dashes for line in lines if line.group.axes["tmas"]} == {()}


def test_a_switch_that_an_older_record_does_not_have_counts_as_off():
    runs = [record(m, **a) for m in ("awq", "gptq", "rtn") for a in ({}, {"cgq": True}, {"iaaq": True})]
    lines = lines_of(Sweep("s", tuple(runs), None, ()))
    assert [line.key for line in lines] == ["all off", "+cgq", "+iaaq"] * 3


def test_lines_beyond_the_limit_are_said_to_be_in_the_table():
    runs = [record(group_size=g, tmas=t) for g in range(15) for t in (False, True)]
    assert {line.panel for line in lines_of(Sweep("s", tuple(runs), None, ()))} == {"tmas off", "tmas on"}
    sweep = Sweep("s", tuple(runs), None, ())
    assert len(lines_of(sweep)) == MAX_LINES
    assert f"The first {MAX_LINES} lines; 6 more are in the table." in named(sweep, "kl-by-step").caption


def test_figures_show_every_run_by_name(sweep):
    step = to_svg(named(sweep, "kl-by-step"))
    for name in ("awq", "awq +tmas", "gptq", "gptq +tmas"):
        assert f">{name}<" in step


# ---------------------------------------------------------------- axes


def test_the_mask_ratio_is_the_second_x_axis_of_steps(drawn):
    svg = to_svg(drawn["kl-by-step"])
    assert ">response still masked, %<" in svg and ">denoising step<" in svg
    ticks = [t.get_text() for t in drawn["kl-by-step"].figure.axes[0].child_axes[0].get_xticklabels()]
    assert ticks == ["100", "81", "62", "41", "22", "3"]  # 1 - step / 32 at steps 0, 6, 12, 19, 25, 31
    assert "response still masked" not in to_svg(drawn["hidden-error-by-block"])


def test_without_recorded_mask_ratios_there_is_one_x_axis(sweep):
    assert not named(sweep, "kl-by-step").figure.axes[0].child_axes


def test_a_log_axis_has_plain_labels():
    """Mathtext is off (text from records is never interpreted), so a label must not need it."""
    steep = dataclasses.replace(
        cells()[0], curves={"kl_by_step": {"step": [0, 1, 2], "value": [0.5, 0.01, 0.0001]}}
    )
    svg = to_svg(named(Sweep("s", (steep,), None, ()), "kl-by-step"))
    assert "log scale" in svg and "mathdefault" not in svg
    assert ">0.01<" in svg


def test_long_curves_are_averaged_over_neighbouring_steps():
    values = [float(s) for s in range(1, 257)]
    run = dataclasses.replace(cells()[0], curves={"kl_by_step": {"step": list(range(256)), "value": values}})
    drawing = named(Sweep("s", (run,), None, ()), "kl-by-step")
    line = drawing.figure.axes[0].lines[0]
    assert list(line.get_xdata()) == list(range(0, 256, 4))
    assert list(line.get_ydata())[:2] == [2.5, 6.5]
    assert "Each point is the mean of 4 steps." in drawing.caption


# ---------------------------------------------------------------- effects and cost


def test_effects_have_a_row_per_switch_and_method_and_a_zero_line(drawn):
    axis = drawn["effect-0-mini-gsm"].figure.axes[0]
    rows = [t.get_text() for t in axis.get_yticklabels()]
    own = [f"{s}: {m}" for s in ("tmas", "cgq", "iaaq") for m in ("all methods", "awq", "gptq")]
    assert rows == [*own[:6], "cgq: placebo", *own[6:]]
    assert list(axis.lines[0].get_xdata()) == [0, 0]
    assert axis.get_xlabel() == "points, right of zero is better"
    assert drawn["effect-2-kl"].figure.axes[0].get_xlabel() == "nats, left of zero is better"


def test_two_methods_with_one_pair_each_have_their_own_rows(sweep):
    axis = named(sweep, "effect-0-mini-gsm").figure.axes[0]
    rows = [t.get_text() for t in axis.get_yticklabels()]
    assert rows == ["tmas: all methods", "tmas: awq", "tmas: gptq"]


def test_an_effect_without_paired_values_says_that_its_interval_is_another(sweep):
    bare = [dataclasses.replace(r, per_problem={}) for r in sweep.records]
    drawing = named(Sweep("s", tuple(bare), None, ()), "effect-0-mini-gsm")
    assert "Dotted: two standard errors" in drawing.caption


def test_cost_names_methods_by_shape_and_switches_by_colour(drawn):
    svg = to_svg(drawn["cost-weights"])
    for name in ("awq", "gptq", "all off", "+tmas +cgq +iaaq"):
        assert f">{name}<" in svg
    assert ">KL, nats<" in svg


def test_cost_without_fidelity_stands_against_the_score():
    runs = [
        dataclasses.replace(r, fidelity={}, cost=r.cost | {"weight_bytes": 1_000_000 * (i + 1)})
        for i, r in enumerate(cells())
    ]
    drawing = named(Sweep("s", tuple(runs), None, ()), "cost-weights")
    assert drawing.figure.axes[0].get_ylabel() == "mini_gsm %"
    assert drawing.caption.startswith("Upper left is better")


def test_runs_of_equal_size_have_no_figure_of_it(sweep):
    assert "cost-weights" not in {d.name for d in draw(sweep)}


# ---------------------------------------------------------------- files


def test_figures_are_deterministic_valid_svg(sweep):
    first, second = ([to_svg(d) for d in draw(sweep)] for _ in range(2))
    assert first == second
    for svg in first:
        ET.fromstring(svg)
        assert "<metadata" not in svg
        assert "var(--" not in svg


def test_coordinates_have_two_decimals_and_texts_stay_whole():
    run = dataclasses.replace(cells()[0], axes={"method": "eps=0.123456"})
    svg = to_svg(named(Sweep("s", (run,), None, ()), "kl-by-step"))
    assert "eps=0.123456" in svg
    assert not re.search(r' d="[^"]*\.\d{3}', svg)


def test_themed_colours_fall_back_to_the_same_colour(sweep):
    svg = to_svg(named(sweep, "kl-by-step"), themed=True)
    assert "var(--s0, #0072b2)" in svg and "var(--ink, #1b1f24)" in svg


def test_png_for_a_readme(sweep, tmp_path):
    path = write_png(named(sweep, "kl-by-step"), tmp_path, dpi=60)
    assert path.read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------- names


@pytest.fixture(scope="module")
def decoding() -> Sweep:
    """Full precision and gptq, each with a threshold, a cache, and both."""
    ways = [{"cache": c, "threshold": t} for c in (None, "dual", "prefix") for t in (None, 0.9)]
    widths = {"fp": "w16a16", "gptq": "w4a4"}
    runs = [
        dataclasses.replace(r, cost=r.cost | {"weight_bytes": 7_000_000 if m == "fp" else 2_000_000})
        for m in widths
        for r in (record(m, **({k: v for k, v in way.items() if v} | {"bits": widths[m]})) for way in ways)
    ]
    return Sweep("decoding", tuple(runs), None, ())


def test_what_is_the_same_in_a_panel_is_in_its_name_and_looks_are_shared(decoding):
    lines = lines_of(decoding)
    assert list(dict.fromkeys(line.panel for line in lines)) == ["fp w16a16", "gptq w4a4"]
    assert [line.key for line in lines][1:3] == ["threshold=0.9", "cache=dual"]
    assert [line.color for line in lines[:6]] == [line.color for line in lines[6:]]
    assert len({line.color for line in lines}) == 6


def test_names_of_rows_are_whole_and_told_apart(decoding):
    drawing = named(decoding, "score-0-mini-gsm")
    (axis,) = drawing.figure.axes
    names = [label.get_text() for label in axis.get_yticklabels()]
    assert len(set(names)) == 12 and "fp w16a16 threshold=0.9\ncache=dual" in names
    assert max(len(line) for name in names for line in name.split("\n")) <= 26
    assert "…" not in to_svg(drawing)


def test_a_figure_is_named_from_its_left_edge_and_says_n(decoding):
    drawing = named(decoding, "score-0-mini-gsm")
    assert drawing.title == "mini_gsm" and drawing.figure._suptitle.get_position()[0] < 0.05
    assert drawing.figure.axes[0].get_xlabel() == "exact_match %"
    assert "over problems (n = 200)" in drawing.caption
    assert 'aria-label="mini_gsm. ± one' in to_svg(drawing)


def test_a_point_below_another_one_is_a_ring_around_it(decoding):
    same = tuple(
        dataclasses.replace(r, scores={"t": {"acc": {"value": 0.5, "stderr": 0.1, "n": 9}}}, fidelity={})
        for r in decoding.records
    )
    (axis,) = named(Sweep("s", same, None, ()), "cost-weights").figure.axes
    sizes = [line.get_markersize() for line in axis.lines if line.get_linestyle() == "None"]
    assert sizes[:6] == [14.5, 14.5, 12.0, 9.5, 7.0, 4.5]


def test_what_is_off_is_not_in_a_legend():
    ways = [{"states": s, "tmas": t} for s in ("clean", "uniform") for t in (False, True)]
    sweep = Sweep("s", tuple(record(m, **way) for m in ("rtn", "awq", "gptq") for way in ways), None, ())
    keys = [line.key for line in lines_of(sweep)]
    assert keys[:4] == ["all off", "+tmas", "states=uniform", "states=uniform +tmas"]


def test_the_names_of_a_legend_are_folded_and_not_cut():
    models = [f"/projects/quantization/checkpoints/{name}/LLaDA-8B-Instruct" for name in ("first", "second")]
    sweep = Sweep("s", tuple(record(model=m) for m in models), None, ())
    (legend,) = named(sweep, "kl-by-step").figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert [text.replace("\n", "") for text in texts] == [f"gptq model={m}" for m in models]
    assert all("\n" in text for text in texts)

"""Which numbers stand in which cell, and that no rendering changes or hides one silently."""

import dataclasses
import io
from html import unescape

import pytest
from rich.console import Console

from dllmq.report.__main__ import main
from dllmq.report.build import markdown, summary, write_report
from dllmq.report.cells import delta_cell, kl_text, p_text
from dllmq.report.compare import Delta, delta, effects
from dllmq.report.effect_tables import effects_table, main_effects_table
from dllmq.report.groups import label, metric_title, primary_metric, varying_axes
from dllmq.report.html import headline
from dllmq.report.results import Sweep, load_sweep
from dllmq.report.table import Cell, Column, Row, Table, fit, to_html, to_markdown, to_rich
from dllmq.report.tables import cost_table, first_line, results_table, sweep_tables
from dllmq.report.words import folded
from tests.report.records_factory import ablation, baseline, cells, record, with_prompts, write_sweep


@pytest.fixture
def sweep(tmp_path) -> Sweep:
    return load_sweep(write_sweep(tmp_path, failed=True))


def column(table: Table, title: str) -> list[str]:
    index = [c.title for c in table.columns].index(title)
    return [row.cells[index].full if index < len(row.cells) else "" for row in table.rows]


def render(table: Table, width: int) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(to_rich(table, width))
    return console.file.getvalue()


def without(run, task: str):
    scores, per_problem = ({t: v for t, v in d.items() if t != task} for d in (run.scores, run.per_problem))
    return dataclasses.replace(run, scores=scores, per_problem=per_problem)


def test_full_precision_comes_first_and_failed_runs_last(sweep):
    methods = column(results_table(sweep), "method")
    assert methods == ["full precision", "awq", "awq", "gptq", "gptq", "rtn"]


def test_scores_are_shown_with_error_and_n(sweep):
    estimate = sweep.records[0].scores["mini_gsm"]["exact_match"]
    expected = f"{100 * estimate['value']:.1f} ± {100 * estimate['stderr']:.1f} (200)"
    assert column(results_table(sweep), "mini_gsm\nexact_match %")[1] == expected


def test_both_filters_of_gsm8k_are_shown_and_those_of_mini_tasks_are_not(sweep):
    """A chat model's strict-match can be 0 where flexible-extract is 70."""

    def gsm8k(run, task="gsm8k"):
        solved = run.per_problem["mini_gsm"]["exact_match"]
        score = run.scores["mini_gsm"]["exact_match"]
        strict, flexible = "exact_match,strict-match", "exact_match,flexible-extract"
        nothing = {"value": 0.0, "stderr": 0.0, "n": 200}
        return dataclasses.replace(
            run,
            scores={task: {strict: nothing, flexible: score}},
            per_problem={task: {strict: [0.0] * 200, flexible: solved}},
        )

    own = [gsm8k(run) for run in sweep.records]
    found = Sweep(**{**vars(sweep), "records": tuple(own), "baseline": gsm8k(sweep.baseline)})
    table = next(t for t in sweep_tables(found) if t.title == "Other metrics of the same answers")
    assert column(results_table(found), "gsm8k\nexact_match,\nstrict-match %")[1] == "0.0 ± 0.0 (200)"
    flexible = column(results_table(sweep), "mini_gsm\nexact_match %")
    assert column(table, "gsm8k\nexact_match,\nflexible-extract %") == flexible[: len(own) + 1]
    deltas = column(results_table(sweep), "mini_gsm\nΔ fp [95 %]")
    assert column(table, "gsm8k\nΔ fp [95 %]") == deltas[: len(own) + 1]
    mini = Sweep(**{**vars(sweep), "records": tuple(gsm8k(run, "mini_gsm") for run in sweep.records)})
    assert "Other metrics of the same answers" not in [t.title for t in sweep_tables(mini)]


def test_delta_to_full_precision_is_shown_with_interval_and_p(sweep):
    d = delta(sweep.records[0], sweep.baseline, "mini_gsm", "exact_match")
    shown = column(results_table(sweep), "mini_gsm\nΔ fp [95 %]")
    assert shown[0] == "–"
    assert shown[1] == f"−{-100 * d.value:.1f} [−{-100 * d.low:.1f}, −{-100 * d.high:.1f}]"
    assert column(results_table(sweep), "mini_gsm\np")[:2] == ["–", "<.001"]


def test_the_effect_of_a_switch_is_the_difference_to_its_twin(sweep):
    table = effects_table(sweep)
    assert column(table, "switch") == ["tmas", "tmas"]
    assert column(table, "added to") == ["awq", "gptq"]
    on, off = sweep.records[1], sweep.records[0]
    d = effects(sweep)[0].deltas["mini_gsm"]
    assert d.value == pytest.approx(
        on.scores["mini_gsm"]["exact_match"]["value"] - off.scores["mini_gsm"]["exact_match"]["value"]
    )
    assert column(table, "mini_gsm\nexact_match, points")[0].startswith(f"{100 * d.value:+.1f} [")
    assert column(table, "mini_gsm\np (Holm)")[0] == f"{p_text(d.p)} ({p_text(d.p_holm)})"
    assert any("Holm's correction for the 6 comparisons" in note for note in table.footnotes)
    kl = on.fidelity["kl"]["value"] / off.fidelity["kl"]["value"] - 1
    assert column(table, "KL\nchange %")[0] == f"{100 * kl:+.1f}".replace("-", "−")
    assert column(table, "KL\nnats")[0].endswith(" u")  # these records have no KL per prompt
    assert any(note.startswith("u: KL was not recorded per prompt") for note in table.footnotes)


def test_a_difference_that_is_not_paired_is_marked(sweep):
    a = dataclasses.replace(sweep.records[0], per_problem={})
    changed = dataclasses.replace(sweep, records=(a, *sweep.records[1:]))
    table = results_table(changed)
    assert column(table, "mini_gsm\nΔ fp [95 %]")[1].endswith(" u")
    assert column(table, "mini_gsm\np")[1] == "–"
    assert any(note.startswith("u: not paired") for note in table.footnotes)


@pytest.mark.parametrize(
    ("p", "p_holm", "value", "tone"),
    [
        (0.04, None, -0.1, "worse"),
        (0.04, None, 0.1, "better"),
        (0.05, None, 0.1, "muted"),
        (0.01, 0.06, 0.1, "muted"),  # the corrected p decides
    ],
)
def test_a_delta_is_coloured_by_its_p(p, p_holm, value, tone):
    assert delta_cell(Delta(value, 0.01, p=p, p_holm=p_holm), "acc").tone == tone


def test_an_interval_that_few_problems_make_is_doubted():
    """Four problems lost and none won: the interval leaves out 0, but p is 1/8."""
    run, reference = record("gptq", (0.7, 0.9, 0.75)), baseline()
    values = {"mini_gsm": {"exact_match": [0.0] * 4 + [1.0] * 196}}
    scores = {"mini_gsm": {"exact_match": {"value": 0.98, "stderr": 0.01, "n": 200}}}
    run = dataclasses.replace(run, per_problem=values, scores=scores)
    reference = dataclasses.replace(
        reference, per_problem={"mini_gsm": {"exact_match": [1.0] * 200}}, scores=scores
    )
    table = results_table(Sweep("s", (run,), reference, ()))
    assert column(table, "mini_gsm\np") == ["–", ".125"]
    assert any("p decides" in note for note in table.footnotes)


def test_only_axes_that_vary_and_bits_are_columns(sweep):
    assert [c.title for c in results_table(sweep).columns[:3]] == ["method", "bits", "tmas"]
    one = dataclasses.replace(sweep, records=sweep.records[:1], failed=())
    assert [c.title for c in results_table(one).columns[:2]] == ["method", "bits"]
    assert varying_axes(one) == []


def test_a_switch_without_effect_gets_a_footnote():
    inert = record("rtn", cgq=True)
    inert = dataclasses.replace(inert, inert=["cgq: rounding to nearest has no error to weigh"])
    table = results_table(Sweep("s", (record("rtn", cgq=False), inert), None, ()))
    assert column(table, "cgq") == ["off", "on¹"]
    assert any(
        n == "¹ cgq has no effect in this combination: rounding to nearest has no error to weigh."
        for n in table.footnotes
    )


def test_what_was_not_measured_is_a_dash():
    bare = dataclasses.replace(
        record(), fidelity={}, cost={}, scores={"t": {"acc": {"value": None, "stderr": None, "n": None}}}
    )
    table = results_table(Sweep("s", (bare,), None, ()))
    assert column(table, "t\nacc %") == column(table, "time\ns") == ["–"]
    assert not {"KL\nnats", "top-1\n%"} & {c.title for c in table.columns}  # no run measured them
    measured = results_table(Sweep("s", (bare, record("rtn")), None, ()))
    assert column(measured, "KL\nnats")[0] == column(measured, "top-1\n%")[0] == "–"


def test_a_metric_that_is_no_share_keeps_its_unit_and_direction():
    def run(value):
        scores = {"wiki": {"word_perplexity": {"value": value, "stderr": 0.1, "n": 9}}}
        return dataclasses.replace(record(), scores=scores, per_problem={})

    sweep = Sweep("s", (run(12.5),), run(10.0), ())
    table = results_table(sweep)
    assert column(table, "wiki\nword_perplexity") == ["10.000 ± 0.100 (9)", "12.500 ± 0.100 (9)"]
    assert table.rows[1].cells[3].tone == "worse"


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        (["exact_match,flexible-extract", "exact_match,strict-match"], "exact_match,strict-match"),
        (["acc,none", "acc_norm,none"], "acc_norm,none"),
        (["something", "pass@1"], "pass@1"),
        (["first", "second"], "first"),
        ([], None),
    ],
)
def test_primary_metric(metrics, expected):
    assert primary_metric(metrics) == expected


def test_labels_name_what_varies():
    axes = {"method": "gptq", "bits": "w4a4", "tmas": True, "cgq": False, "seed": 1}
    assert label(axes, ["tmas", "cgq"]) == "gptq +tmas"
    assert label(axes, ["bits", "tmas", "seed"]) == "gptq w4a4 seed=1 +tmas"
    assert label(axes, ["bits", "tmas"], without="tmas") == "gptq w4a4"
    for states, shown in (("clean", "gptq"), ("uniform", "gptq states=uniform")):
        assert label(axes | {"states": states, "tmas": False}, ["states", "tmas"]) == shown


# ---------------------------------------------------------------- seeds


@pytest.fixture(scope="module")
def seeds() -> Sweep:
    reference, runs = ablation(methods=("awq", "gptq"), seeds=(0, 1, 2))
    runs = [r for r in map(with_prompts, runs) if not r.axes["cgq"]]
    runs = [dataclasses.replace(r, cost=r.cost | {"truncated_share": 0.02}) for r in runs]
    return Sweep("seeds", tuple(runs), reference, ())


def test_runs_that_differ_in_the_seed_share_a_row(seeds):
    table = results_table(seeds)
    assert len(seeds.records) == 24
    assert len(table.rows) == 1 + 8
    assert "seed" not in [c.title for c in table.columns]
    shown = column(table, "mini_gsm\nexact_match %")
    values = [r.scores["mini_gsm"]["exact_match"]["value"] for r in seeds.records[:3]]
    assert shown[0].endswith("(200)") and shown[1].endswith("(200 x 3 seeds)")
    assert shown[1].startswith(f"{100 * sum(values) / 3:.1f} ± ")
    assert any(note.startswith("x seeds:") for note in table.footnotes)
    assert len(cost_table(seeds).rows) == 1 + 8


def test_every_measured_figure_has_its_column(seeds):
    table = results_table(seeds)
    assert column(table, "truncated\n% answers")[1] == "2.0"
    assert column(table, "final\nagreement %")[1] != "–"
    assert column(table, "argmax@k\n%")[1] != "–"


def test_the_kl_of_a_switch_has_its_own_interval_and_correction(seeds):
    table = effects_table(seeds)
    assert column(table, "KL\nnats")[0].startswith("−0.0") and "[−0.0" in column(table, "KL\nnats")[0]
    assert any("Holm's correction for the 16 comparisons of scores" in n for n in table.footnotes)
    assert any("its own 8 comparisons" in n for n in table.footnotes)


def test_reading_states_from_the_cache_is_not_what_calibration_costs():
    made, read = ({"notes": {"shared": {kind: ["states"]}}} for kind in ("made", "read"))
    runs = [dataclasses.replace(record(seed=i), **notes) for i, notes in enumerate((made, read))]
    alone = dataclasses.replace(record("awq"), **read)
    table = cost_table(Sweep("s", (*runs, alone), None, ()))
    assert column(table, "calibrate\ns") == [f"{runs[0].cost['calibrate_s']:.1f}", "cached"]
    assert any(note.startswith("cached:") for note in table.footnotes)


def test_average_effects_are_told_in_words(seeds):
    table = main_effects_table(seeds)
    shown = list(zip(*(column(table, c.title) for c in table.columns), strict=True))
    assert [row[:4] for row in shown[:3]] == [
        ("tmas", "all methods", "4", "mini_gsm, points"),
        ("tmas", "all methods", "4", "mini_code, points"),
        ("tmas", "all methods", "4", "KL, nats"),
    ]
    for *_, p, _, by_run, verdict in shown:
        if verdict != "placebo":
            sure = all(x.startswith("<") or float(x) < 0.05 for x in (p, by_run))
            assert (verdict == "no difference shown") == (not sure)
    assert shown[2][-1] == "helps"  # a lower KL


def test_no_average_over_one_pair(sweep):
    one = dataclasses.replace(sweep, records=sweep.records[:2])
    assert main_effects_table(one).rows == ()
    assert [t.title for t in sweep_tables(one)] == ["Results", "Effect of each switch"]


def test_the_seed_of_a_failed_run_is_named(seeds):
    axes = {**seeds.records[0].axes, "seed": 3}
    failed = ({"run_name": "x", "axes": axes, "error": "out of memory"},)
    assert (
        results_table(dataclasses.replace(seeds, failed=failed)).rows[-1].message == "seed 3: out of memory"
    )


@pytest.mark.parametrize(("p", "text"), [(0.00099, "<.001"), (0.0391, ".039"), (0.9996, "1"), (0.5, ".500")])
def test_a_p_has_three_digits(p, text):
    assert p_text(p) == text


# ---------------------------------------------------------------- renderings


@pytest.mark.parametrize("width", [200, 120, 80])
def test_the_terminal_never_cuts_or_wraps_a_cell(sweep, width):
    text = render(results_table(sweep), width)
    body = text.split("failed: rtn")[0]
    assert "…" not in body
    assert max(map(len, text.splitlines())) <= width
    rows = [
        line
        for line in body.splitlines()
        if line.strip().startswith(("fp ", "full precision", "awq", "gptq", "rtn"))
    ]
    assert len(rows) == 6


def test_at_120_columns_the_demo_keeps_scores_intervals_and_kl(sweep):
    two = dataclasses.replace(
        sweep,
        baseline=without(sweep.baseline, "mini_choice"),
        records=tuple(without(r, "mini_choice") for r in sweep.records),
    )
    text = render(results_table(two), 120)
    assert "Left out to fit 120 columns: quantized % params, time s." in text
    assert text.count("Δ fp [95 %]") == 2
    assert "0.0823" in text
    assert "failed: rtn w3a4 +tmas: SingularHessianError" in text


def test_columns_left_out_are_named(sweep):
    assert "Left out to fit 80 columns" in render(results_table(sweep), 80).replace("\n", " ")


def test_every_rendering_shows_the_same_cells(sweep):
    table = results_table(sweep)
    md, html, wide = unescape(to_markdown(table)), unescape(to_html(table)), render(table, 250)
    for cell in (cell for row in table.rows for cell in row.cells):
        assert cell.full in md
        assert cell.text in html
        assert cell.full in wide


def test_markdown_cells_cannot_break_the_table():
    table = Table("t", (Column("a|b"),), (Row((Cell("x | y\n<b>`"),)),))
    assert to_markdown(table).splitlines()[2:] == ["| a\\|b |", "|---:|", "| x \\| y &lt;b&gt;\\` |"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.08, "0.0800"), (1.234, "1.23"), (123.4, "123"), (2.1e-5, "2.10e-05"), (0.0, "0.00")],
)
def test_a_kl_has_three_digits(value, text):
    assert kl_text(value) == text


def test_first_line_of_an_error():
    assert first_line("ValueError: bad\n more") == "ValueError: bad"
    assert first_line('Traceback (most recent call last):\n  File "x"\nKeyError: 1\n') == "KeyError: 1"
    assert first_line("") == "no error was recorded"


# ---------------------------------------------------------------- the files of a sweep


def test_the_same_records_give_the_same_bytes(tmp_path):
    names = ("summary.json", "table.md", "report.html")
    write_report(write_sweep(tmp_path))
    first = [(tmp_path / name).read_bytes() for name in names]
    write_report(tmp_path)
    assert first == [(tmp_path / name).read_bytes() for name in names]


def test_summary_has_the_differences(sweep):
    found = summary(sweep)
    runs = found["runs"]
    assert runs[1]["delta_to_twin"]["tmas"]["mini_gsm"]["paired"] is True
    assert runs[0]["delta_to_twin"] == {}
    assert runs[0]["delta_to_full_precision"]["mini_gsm"]["value"] < 0
    assert runs[0]["results"] == "0/results.json"
    keys = {"metric", "value", "stderr", "low", "high", "p", "p_holm", "n", "seeds"}
    assert keys <= found["groups"][0]["delta_to_full_precision"]["mini_gsm"].keys()
    assert keys <= found["effects"][0]["deltas"]["mini_gsm"].keys()
    assert found["effects"][0]["deltas"]["mini_gsm"]["p_holm"] is not None
    assert keys | {"toggle", "verdict"} <= found["main_effects"][0].keys()


def test_a_single_run_without_reference_is_still_a_report(tmp_path):
    sweep = Sweep("one", (cells()[0],), None, ())
    assert "No full-precision reference was recorded" in markdown(sweep)
    assert markdown(Sweep("fp", (), baseline(), ())).startswith("# fp")


def test_the_command_writes_and_prints(tmp_path, capsys):
    assert main([str(write_sweep(tmp_path)), "--png"]) == 0
    out = capsys.readouterr().out
    assert "Effect of each switch" in out
    assert "kl-by-mask-ratio.png" in [p.name for p in (tmp_path / "figures").iterdir()]


def test_the_command_fails_in_one_sentence(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere")]) == 2
    (tmp_path / "results.json").write_text("{")
    assert main([str(tmp_path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "nowhere" in lines[0]
    assert "results.json is not valid JSON" in lines[1]


def test_long_names_are_folded_at_separators_where_a_terminal_is_narrow():
    model = "/projects/quantization/checkpoints/LLaDA-8B-Instruct"
    runs = [record(m, model=f"{model}-{s}", states=s) for m in ("rtn", "gptq") for s in ("clean", "uniform")]
    table = results_table(Sweep("s", tuple(runs), baseline(), ()))
    console = Console(width=60, record=True, file=io.StringIO())
    console.print(to_rich(table, 60))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 60 and not any("…" in line for line in lines)
    names = [row.cells[2].shown(True).split("\n") for row in fit(table, 60)[0].rows[1:]]
    assert ["".join(name) for name in names] == [r.axes["model"] for r in runs]
    assert all(line[-1] in "/-" for name in names for line in name[:-1])


@pytest.mark.parametrize(
    ("text", "width", "lines"),
    [
        ("gptq w4a4 threshold=0.9 cache=dual", 26, "gptq w4a4 threshold=0.9\ncache=dual"),
        ("gptq", 4, "gptq"),
        ("a=/one/two_three", 8, "a=/one/\ntwo_\nthree"),
        ("abcdefghij", 4, "abcd\nefgh\nij"),
    ],
)
def test_folding(text, width, lines):
    assert folded(text, width) == lines


def test_a_long_name_is_folded_on_the_page(tmp_path):
    names = ("m" * 41, "m" * 40)
    html = to_html(Table("t", (Column("run", numeric=False),), tuple(Row((Cell(name),)) for name in names)))
    assert html.count('class="long"') == 1


def test_sizes_of_large_models_are_in_gibibytes():
    def cost(factor):
        runs = [dataclasses.replace(c, cost={"weight_bytes": factor * 2**30}) for c in cells()]
        return cost_table(Sweep("s", tuple(runs), None, ()))

    assert column(cost(16), "weights\nGiB")[0] == "16.00"
    assert column(cost(1), "weights\nMiB")[0] == "1024.00"


def test_a_filter_of_a_metric_has_a_line_of_its_own():
    assert [metric_title(m) for m in ("exact_match,strict-match", "acc,none", "pass@1")] == [
        "exact_match,\nstrict-match",
        "acc",
        "pass@1",
    ]


def test_fidelity_is_explained_with_its_number_of_prompts():
    run = dataclasses.replace(record(), fidelity_per_prompt={"kl": [0.1] * 32})
    notes = " ".join(results_table(Sweep("s", (run,), None, ())).footnotes)
    assert "trajectory; ± is over their 32 prompts." in notes and "same most likely token" in notes
    assert "the same," not in notes and "argmax@k" not in notes  # not measured


def test_full_precision_is_not_called_quantized_nor_compared_with_itself():
    alone = Sweep("s", (baseline(),), baseline(), ())
    assert "against" not in headline(alone)
    assert "against the same model" in headline(Sweep("s", (baseline(), cells()[0]), baseline(), ()))
    (weights,) = (note for note in cost_table(alone).footnotes if note.startswith("Weights"))
    assert "full precision's, at 16 bits" in weights

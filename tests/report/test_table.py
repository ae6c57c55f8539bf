"""Which numbers stand in which cell, and that no rendering changes or hides one silently."""

import dataclasses
import io

import pytest
from rich.console import Console

from dllmq.evaluation.statistics import paired_difference
from dllmq.report.__main__ import main
from dllmq.report.build import markdown, summary, write_report
from dllmq.report.compare import delta, label, primary_metric, twin, varying_axes
from dllmq.report.results import Sweep, load_sweep
from dllmq.report.table import Cell, Column, Row, Table, to_html, to_markdown, to_rich
from dllmq.report.tables import effects_table, first_line, kl_text, results_table
from tests.report.records_factory import baseline, cells, record, write_sweep


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


def test_full_precision_comes_first_and_failed_runs_last(sweep):
    methods = column(results_table(sweep), "method")
    assert methods == ["full precision", "awq", "awq", "gptq", "gptq", "rtn"]


def test_scores_are_shown_with_error_and_n(sweep):
    estimate = sweep.records[0].scores["mini_gsm"]["exact_match"]
    expected = f"{100 * estimate['value']:.1f} ± {100 * estimate['stderr']:.1f} (200)"
    assert column(results_table(sweep), "mini_gsm\nexact_match %")[1] == expected


def test_no_delta_to_a_full_precision_of_other_settings(sweep):
    own = dataclasses.replace(sweep.records[0], notes={"baseline": sweep.baseline.fingerprint})
    other = dataclasses.replace(sweep.records[0], notes={"baseline": "of another model"})
    assert delta(own, sweep.baseline, "mini_gsm", "exact_match") is not None
    assert delta(other, sweep.baseline, "mini_gsm", "exact_match") is None
    assert delta(other, sweep.records[1], "mini_gsm", "exact_match") is not None  # a twin is a twin


def test_delta_to_full_precision_is_paired(sweep):
    a, b = (r.per_problem["mini_gsm"]["exact_match"] for r in (sweep.records[0], sweep.baseline))
    d = paired_difference(a, b)
    shown = column(results_table(sweep), "mini_gsm\nΔ fp")
    assert shown[0] == "–"
    assert shown[1] == f"−{-100 * d.value:.1f} ± {100 * d.stderr:.1f}"


def test_the_effect_of_a_switch_is_the_difference_to_its_twin(sweep):
    table = effects_table(sweep)
    assert column(table, "switch") == ["tmas", "tmas"]
    assert column(table, "added to") == ["awq", "gptq"]
    on, off = sweep.records[1], sweep.records[0]
    d = paired_difference(*(r.per_problem["mini_gsm"]["exact_match"] for r in (on, off)))
    assert column(table, "mini_gsm\nexact_match, points")[0] == f"{100 * d.value:+.1f} ± {100 * d.stderr:.1f}"
    kl = on.fidelity["kl"]["value"] / off.fidelity["kl"]["value"] - 1
    assert column(table, "KL\nchange %")[0] == f"{100 * kl:+.1f}".replace("-", "−")


def test_a_twin_must_agree_in_every_other_axis():
    runs = [record(tmas=a, cgq=b, seed=s) for a in (False, True) for b in (False, True) for s in (0, 1)]
    sweep = Sweep("s", tuple(runs), None, ())
    both = next(r for r in runs if r.axes["tmas"] and r.axes["cgq"] and r.axes["seed"] == 1)
    assert twin(sweep, both, "tmas").axes == {**both.axes, "tmas": False}
    assert twin(sweep, both, "cgq").axes == {**both.axes, "cgq": False}
    assert twin(sweep, runs[0], "tmas") is None  # off already
    assert twin(Sweep("s", (both,), None, ()), both, "tmas") is None  # missing
    assert twin(Sweep("s", (*runs, *runs), None, ()), both, "tmas") is None  # not unique


def test_without_common_problems_the_errors_add_in_squares(sweep):
    a = dataclasses.replace(sweep.records[0], per_problem={})
    d = delta(a, sweep.baseline, "mini_gsm", "exact_match")
    errors = [r.scores["mini_gsm"]["exact_match"]["stderr"] for r in (a, sweep.baseline)]
    assert not d.paired
    assert d.stderr == pytest.approx((errors[0] ** 2 + errors[1] ** 2) ** 0.5)
    changed = dataclasses.replace(sweep, records=(a, *sweep.records[1:]))
    table = results_table(changed)
    assert column(table, "mini_gsm\nΔ fp")[1].endswith(" u")
    assert any(note.startswith("u: not paired") for note in table.footnotes)


def test_a_delta_is_coloured_only_beyond_two_standard_errors(sweep):
    rows = results_table(sweep).rows
    index = [c.title for c in results_table(sweep).columns].index("mini_choice\nΔ fp")
    for record_, row in zip(sweep.records, rows[1:], strict=False):
        d = delta(record_, sweep.baseline, "mini_choice", "acc")
        assert (row.cells[index].tone == "worse") == (d.value < -2 * d.stderr)


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
    assert column(table, "t\nacc %") == ["–"]
    assert column(table, "KL\nnats") == column(table, "time\ns") == ["–"]


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


def test_at_120_columns_the_demo_keeps_every_column(sweep):
    text = render(results_table(sweep), 120)
    assert "Left out" not in text
    assert "0.0823" in text
    assert "failed: rtn w3a4 +tmas: SingularHessianError" in text


def test_columns_left_out_are_named(sweep):
    assert "Left out to fit 80 columns" in render(results_table(sweep), 80).replace("\n", " ")


def test_every_rendering_shows_the_same_cells(sweep):
    table = results_table(sweep)
    md, html, wide = to_markdown(table), to_html(table), render(table, 250)
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
    runs = summary(sweep)["runs"]
    assert runs[1]["delta_to_twin"]["tmas"]["mini_gsm"]["paired"] is True
    assert runs[0]["delta_to_twin"] == {}
    assert runs[0]["delta_to_full_precision"]["mini_gsm"]["value"] < 0
    assert runs[0]["results"] == "0/results.json"


def test_a_single_run_without_reference_is_still_a_report(tmp_path):
    sweep = Sweep("one", (cells()[0],), None, ())
    assert "No full-precision reference was recorded" in markdown(sweep)
    assert markdown(Sweep("fp", (), baseline(), ())).startswith("# fp")


def test_the_command_writes_and_prints(tmp_path, capsys):
    assert main([str(write_sweep(tmp_path)), "--png"]) == 0
    out = capsys.readouterr().out
    assert "Effect of each switch" in out
    assert sorted(p.name for p in (tmp_path / "figures").iterdir())[0] == "kl-by-mask-ratio.png"


def test_the_command_fails_in_one_sentence(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere")]) == 2
    (tmp_path / "results.json").write_text("{")
    assert main([str(tmp_path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "nowhere" in lines[0]
    assert "results.json is not valid JSON" in lines[1]

"""Approximate decoding in the report: which runs are twins, what is subtracted; other sweeps stay as is."""

import dataclasses
from io import StringIO

import pytest
from rich.console import Console

from dllmq.report.build import markdown, summary
from dllmq.report.compare import delta
from dllmq.report.decoding import approximate, decoding_effects, decoding_table
from dllmq.report.groups import as_group
from dllmq.report.html import headline, render
from dllmq.report.results import RunRecord, Sweep
from dllmq.report.settings import setting_effects
from dllmq.report.table import to_rich
from tests.report.records_factory import baseline, cells, record


def run(method: str = "gptq", share: float = 0.7, forwards: float = 40.0, **axes) -> RunRecord:
    made = record(method, (share, 0.9, 0.75), None if method == "fp" else 0.03, **axes)
    cost = made.cost | {"forwards_per_answer": forwards, "positions_per_answer": 100 * forwards}
    return dataclasses.replace(made, cost=cost)


@pytest.fixture(scope="module")
def sweep() -> Sweep:
    fp = dataclasses.replace(run("fp", 0.86, 48.0), fingerprint="exact")
    own = {"baseline": "exact"}
    runs = [
        run("fp", 0.8, 12.0, cache="dual", threshold=0.9),
        run(forwards=40.0, tmas=False),
        run(share=0.5, forwards=10.0, tmas=False, threshold=0.9),
        run(share=0.6, forwards=40.0, tmas=False, cache="prefix"),
        run(forwards=8.0, tmas=True, threshold=0.9),  # nothing to compare it with
    ]
    return Sweep("s", tuple(dataclasses.replace(r, notes=own) for r in runs), fp, ())


def test_twins_differ_in_cache_and_threshold_only(sweep: Sweep) -> None:
    found = decoding_effects(sweep)
    assert [(e.group.axes.get("cache"), e.group.axes.get("threshold")) for e in found] == [
        ("dual", 0.9),
        (None, 0.9),
        ("prefix", None),
    ]
    assert found[0].twin.records == (sweep.baseline,)  # full precision's is the sweep's reference
    assert found[1].twin.records == found[2].twin.records == (sweep.records[1],)
    assert [e.saved["forwards_per_answer"] for e in found] == [4.0, 4.0, 1.0]


def test_differences_are_paired_and_corrected_together(sweep: Sweep) -> None:
    found = decoding_effects(sweep)
    plain = delta(as_group(sweep.records[2]), as_group(sweep.records[1]), "mini_gsm", "exact_match")
    assert plain is not None and plain.paired and plain.value < -0.1
    assert dataclasses.replace(found[1].deltas["mini_gsm"], p_holm=None) == plain
    own = [d for e in found for d in e.deltas.values()]
    assert len(own) == 9 and all(d.p_holm is not None and d.p_holm >= d.p for d in own)


def test_a_reference_of_other_settings_is_no_twin(sweep: Sweep) -> None:
    other = dataclasses.replace(sweep.baseline, fingerprint="another")
    assert len(decoding_effects(dataclasses.replace(sweep, baseline=other))) == 2


def test_the_report_says_approximate_decoding(sweep: Sweep) -> None:
    assert "Approximate decoding (cache, threshold) in 4 of the runs." in headline(sweep)
    names = [row.cells[0].text for row in decoding_table(sweep).rows]
    assert names[0] == "fp, exact" and names[2].endswith(", exact") and names[3].endswith("threshold=0.9")
    text = markdown(sweep)
    assert "## Approximate decoding" in text and "| 4.00 |" in text
    assert "Approximate decoding</h2>" in render(sweep, [])
    (first, *_) = summary(sweep)["approximate_decoding"]
    assert first["axes"]["cache"] == "dual" and first["deltas"]["mini_gsm"]["n"] == 200
    assert not setting_effects(sweep)  # the two axes have a table of their own


def test_a_terminal_parts_each_exact_twin_from_the_rows_above_it(sweep: Sweep) -> None:
    console = Console(width=120, record=True, file=StringIO())
    console.print(to_rich(decoding_table(sweep), 120))
    lines = console.export_text().splitlines()
    second = [i for i, line in enumerate(lines) if ", exact" in line][1]
    assert not lines[second - 1].strip() and not lines[second + 1].strip()


def test_other_sweeps_show_nothing_of_it() -> None:
    plain = Sweep("s", tuple(cells()), baseline(), ())
    assert not decoding_table(plain).rows and "pproximate" not in markdown(plain)
    assert "approximate_decoding" not in summary(plain) and "pproximate" not in headline(plain)


def test_off_states_are_not_approximate() -> None:
    assert not approximate({"cache": "none", "threshold": None}) and not approximate({})
    assert approximate({"cache": "dual"}) and approximate({"threshold": 0.0})

"""report.html: complete, self-contained, escaped, and plain about what is no measurement."""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from bench.rows_factory import MACHINE, row, section

from dllmq.bench import page
from dllmq.bench.page import headline, render
from dllmq.bench.rows import write_section
from dllmq.bench.study import write_tables

VOID = {"meta", "br", "path", "use", "rect"}


class Balanced(HTMLParser):
    """Every element that is opened is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def test_the_page_has_tables_figures_and_how_they_were_made() -> None:
    text = render([section(row()), section(row(unit="B"), section="memory")])
    assert text.count("<table>") == text.count("<svg") == 2
    assert "<td>plain loop 3 s</td>" in text and '<td class="num">3.00 x</td>' in text
    command = "<code>python -m dllmq.bench generate --shape llada_1b_shape</code>"
    versions = "dllmq 0.1, python 3.12.1, torch 2.11"
    for fact in ("a processor, 2 threads (avx512_vnni)", versions, "<dd>abc</dd>", "Linux x86_64", command):
        assert text.count(fact) == 2, fact
    assert text.count("<li>Not measured, this: for that reason.</li>") == 2
    assert "2 comparisons, each of two things measured in the same run." in text
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []


def test_nothing_is_loaded_and_the_same_results_give_the_same_bytes() -> None:
    sections = [section(row())]
    text = render(sections)
    assert text == render(sections)
    assert "default-src 'none'" in text and "<script" not in text
    assert re.findall(r'(?:src|href)="(?!#)[^"]*"', text) == []
    assert "prefers-color-scheme: dark" in text and "var(--s0, #0072b2)" in text


def test_texts_of_a_file_are_escaped() -> None:
    bad = "<script>alert(1)</script>"
    machine = MACHINE | {"processor": bad, "git": bad, "system": bad, "versions": {"torch": bad}}
    hostile = section(
        row(what=bad, shape=bad, baseline=bad, ours=bad, note=bad, equal=False),
        section=bad, shape=bad, command=bad, date=bad, machine=machine, left_out=(bad,),
    )  # fmt: skip
    text = render([hostile])
    assert "<script" not in text and "&lt;script&gt;" in text


def test_trials_and_what_was_stopped_stand_out() -> None:
    trial, cut = section(row(), quick=True), section(row(), section="memory", finished=False)
    assert headline([trial]) == "Everything here is a trial of the program at toy sizes, and no measurement."
    both = headline([trial, cut])
    assert (
        both.startswith("One comparison of two things")
        and "generate, llada_1b_shape bfloat16: a trial of the program" in both
    )
    assert "Stopped before the end: memory, llada_1b_shape bfloat16." in both
    text = render([trial, cut])
    assert "<span>A trial of the program, no measurement.</span>" in text
    assert "<span>Stopped after 1 row.</span>" in text
    assert "no measurement" not in render([section(row())])


def test_outputs_that_differ_stand_out() -> None:
    text = render([section(row(equal=False, share=None))])
    assert '<td class="worse"><span>NO</span></td>' in text
    assert "Outputs that must be equal are NOT in: exact generation." in text


def test_without_rows_there_is_a_sentence() -> None:
    assert "<p>No row.</p>" in render([section()])


def test_a_machine_without_matplotlib_and_rich_has_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dllmq.bench.study.find_spec", lambda name: None)
    monkeypatch.setattr(page, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "rich", None)
    write_section(tmp_path / "results.json", section(row()))
    assert write_tables(tmp_path) == ["report.html", "table.md", "results.json"]
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<table>" in text and "<svg" not in text


def test_a_folder_without_results_gets_nothing(tmp_path: Path) -> None:
    assert write_tables(tmp_path) == [] == list(tmp_path.iterdir())

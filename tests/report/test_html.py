"""The page: complete, self-contained, safe against what records may hold."""

import dataclasses
import random
import re
from html.parser import HTMLParser

import pytest

from dllmq.report.figures import draw
from dllmq.report.html import headline, render
from dllmq.report.results import Sweep, load_sweep
from tests.report.records_factory import (
    ablation,
    baseline,
    cells,
    record,
    write_samples,
    write_sweep,
)

EVIL = '<script>alert("x")</script>\'"&</pre></style>'
VOID = {"meta", "br", "path", "use", "rect"}


class Page(HTMLParser):
    """Checks nesting, and collects tags and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [v for k, v in attrs if k == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [v for k, v in attrs if k == "id"]

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Sweep:
    return load_sweep(write_sweep(tmp_path_factory.mktemp("sweep"), failed=True))


@pytest.fixture(scope="module")
def page(sweep) -> str:
    return render(sweep)


def test_the_page_is_well_formed_and_has_its_parts(sweep, page):
    parsed = Page(page)
    assert parsed.open == []
    assert parsed.tags.count("svg") == len(draw(sweep)) == 10  # 3 scores, 4 effects, 3 curves
    assert parsed.tags.count("table") == 5
    for title in (
        "Results",
        "What each switch changes",
        "Where the error arises",
        "Calibration",
        "Cost",
        "Failed runs",
        "Reproduce",
    ):
        assert f"<h2>{title}</h2>" in page
        assert f'href="#part-{title.lower().replace(" ", "-")}"' in page
    assert "Answers that changed" not in page  # no samples lie beside these records
    assert "python -m dllmq.run method=gptq tmas=true" in page
    assert "transformers 5.23.0" in page


def test_the_page_loads_nothing_and_is_small(page):
    assert len(page.encode()) < 2_000_000
    for name, value in Page(page).attributes:
        if name in ("src", "href", "xlink:href", "action"):
            assert value.startswith("#")
    assert not re.search(r"@import|url\((?!#)", page)


def test_everything_from_a_record_or_a_sample_is_escaped(tmp_path):
    evil = dataclasses.replace(
        record("gptq", tmas=True),
        run_name=EVIL,
        config={EVIL: EVIL},
        command=EVIL,
        inert=[f"tmas: {EVIL}"],
        versions={EVIL: EVIL},
        git={"commit": EVIL},
        device=EVIL,
        fingerprint=EVIL,
        axes={"method": EVIL, "bits": EVIL, "tmas": True, EVIL: EVIL},
        calibration={EVIL: [EVIL]},
        notes={EVIL: {EVIL: EVIL}},
        scores={EVIL: {EVIL: {"value": 0.5, "stderr": 0.1, "n": 3}}},
        per_problem={},
        curves={"kl_by_step": {"step": [0, 1], "value": [0.1, 0.2]}, EVIL: {"step": [0], "value": [1]}},
    )
    other = record("awq", tmas=False)
    for place, run in ((tmp_path, baseline()), (tmp_path / "awq", other)):
        place.mkdir(exist_ok=True)
        write_samples(place, run, text=EVIL)
    status = {"run_name": EVIL, "axes": {"method": EVIL}, "error": EVIL, "status": "failed"}
    paths = ("evil/results.json", "awq/results.json")
    page = render(Sweep(EVIL, (evil, other), baseline(), (status,), paths), folder=tmp_path)
    parsed = Page(page)
    assert parsed.tags.count("article") > 0
    assert parsed.open == []
    assert parsed.tags.count("script") == 1  # ours
    assert "<script>alert" not in page


def test_a_key_in_the_configuration_is_not_shown():
    run = dataclasses.replace(record(), config={"tracker": {"api_key": "0123456789abcdef"}})
    assert "0123456789abcdef" not in render(Sweep("s", (run,), None, ()))


def test_ids_are_unique_and_references_resolve(page):
    ids = Page(page).ids
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(|xlink:href=")#([^")]+)', page)) <= set(ids)


@pytest.mark.slow
def test_the_page_of_48_runs_and_three_tasks_stays_under_the_limit(tmp_path):
    """Long curves, a line of notes per linear, answers longer than the page shows."""
    reference, runs = ablation(tasks=("mini_gsm", "mini_code", "mini_choice"))
    curve = {"step": list(range(512)), "value": [random.Random(s).random() for s in range(512)]}
    notes = {"method": {f"blocks.{b}.{g}": {"dead_channels": 0.0} for b in range(32) for g in "qogd"}}
    long = {f"{name}_by_step": curve for name in ("kl", "argmax_at_k", "hidden_error", "divergence")}
    runs = [dataclasses.replace(r, notes=notes, curves=r.curves | long) for r in runs]
    for place, run in ((tmp_path, reference), *((tmp_path / r.run_name, r) for r in runs)):
        place.mkdir(exist_ok=True)
        if run.seed == 0:
            write_samples(place, run, text=" and so on" * 130)
    paths = tuple(f"{r.run_name}/results.json" for r in runs)
    page = render(Sweep("large", tuple(runs), reference, (), paths), folder=tmp_path)
    assert len(page.encode()) < 2_000_000
    assert page.count("<article>") > 40
    assert "won: the run did." in page and "this run: " in page and "the quantized model" not in page
    assert "Each point is the mean of 8 steps." in page


def test_the_headline_says_what_was_run_without_a_verdict(sweep):
    assert headline(sweep).startswith("4 runs and 1 failed: awq and gptq at w3a4, with tmas on and off.")
    assert headline(Sweep("s", tuple(cells()[:1]), None, ())).startswith("1 run: awq at w3a4.")
    _, runs = ablation(methods=("gptq",), seeds=(0, 1))
    assert headline(Sweep("s", tuple(runs), None, ())).startswith(
        "16 runs: gptq at w3a4, with tmas, cgq and iaaq on and off, 2 seeds each."
    )


def test_what_all_runs_share_is_printed_once_and_nothing_is_left_out():
    runs = [
        dataclasses.replace(r, config={"a": {"b": 1}, "c": [2, 3], "tmas": i}) for i, r in enumerate(cells())
    ]
    page = render(Sweep("s", tuple(runs), None, ()))
    assert page.count("a.b: 1\nc: [2, 3]") == 1
    for i, run in enumerate(runs):
        assert page.count(f"tmas: {i}</pre>") == 1
        assert page.count(f'<pre class="wrap">{run.command}</pre>') == 1


def test_a_single_run_shows_its_whole_configuration():
    run = dataclasses.replace(record(), config={"a": {"b": 1}})
    assert "<pre>a.b: 1</pre>" in render(Sweep("s", (run,), None, ()))

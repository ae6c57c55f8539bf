"""The page: complete, self-contained, safe against what records may hold."""

import dataclasses
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from dllmq.report.figures import draw, to_svg, write_png
from dllmq.report.html import headline, render
from dllmq.report.results import Sweep, load_sweep
from tests.report.records_factory import baseline, cells, record, write_sweep

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


def test_the_page_is_well_formed_and_has_its_parts(page):
    parsed = Page(page)
    assert parsed.open == []
    assert parsed.tags.count("svg") == 5  # two curves, three tasks
    assert parsed.tags.count("table") == 4
    for title in (
        "Results",
        "Effect of each switch",
        "Figures",
        "Calibration",
        "Cost",
        "Failed runs",
        "Reproduce",
    ):
        assert f"<h2>{title}</h2>" in page
    assert "python -m dllmq.run method=gptq tmas=true" in page
    assert "transformers 5.23.0" in page


def test_the_page_loads_nothing_and_is_small(page):
    assert len(page.encode()) < 2_000_000
    for name, value in Page(page).attributes:
        if name in ("src", "href", "xlink:href", "action"):
            assert value.startswith("#")
    assert not re.search(r"@import|url\((?!#)", page)


def test_everything_from_a_record_is_escaped():
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
        curves={f"kl_{EVIL}": {"step": [0, 1], "value": [0.1, 0.2]}},
    )
    status = {"run_name": EVIL, "axes": {"method": EVIL}, "error": EVIL, "status": "failed"}
    page = render(Sweep(EVIL, (evil, record("awq", tmas=False)), baseline(), (status,)))
    parsed = Page(page)
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


def test_a_log_axis_has_plain_labels(tmp_path):
    """Mathtext is off (text from records is never interpreted), so a label must not need it."""
    steep = dataclasses.replace(
        cells()[0], curves={"kl_by_step": {"step": [0, 1, 2], "value": [0.5, 0.01, 0.0001]}}
    )
    (step,) = (d for d in draw(Sweep("s", (steep,), None, ())) if d.name == "kl-by-step")
    svg = to_svg(step)
    assert "log scale" in svg and "mathdefault" not in svg
    assert ">0.01<" in svg


def test_figures_are_deterministic_valid_svg(sweep):
    first, second = ([to_svg(d) for d in draw(sweep)] for _ in range(2))
    assert first == second
    for svg in first:
        ET.fromstring(svg)
        assert "<metadata" not in svg
        assert "var(--" not in svg


def test_figures_show_every_run_by_name(sweep):
    step = to_svg(next(d for d in draw(sweep) if d.name == "kl-by-step"))
    for name in ("awq", "awq +tmas", "gptq", "gptq +tmas"):
        assert f">{name}<" in step


def test_figures_are_left_out_where_nothing_was_measured():
    bare = dataclasses.replace(record(), curves={}, scores={}, per_problem={})
    assert draw(Sweep("s", (bare,), None, ())) == []


def test_a_large_sweep_stays_under_the_limit():
    runs = [record(m, tmas=a, cgq=b, iaaq=c, seed=s) for m in ("awq", "gptq") for a in (False, True)
            for b in (False, True) for c in (False, True) for s in (0, 1, 2)]  # fmt: skip
    page = render(Sweep("large", tuple(runs), baseline(), ()))
    assert len(page.encode()) < 2_000_000
    assert "The first 24 runs; 24 more are in the table." in page


def test_png_for_a_readme(sweep, tmp_path):
    path = write_png(draw(sweep)[0], tmp_path, dpi=60)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_headline_says_what_was_run_without_a_verdict(sweep):
    assert headline(sweep).startswith("4 runs and 1 failed: awq and gptq at w3a4, with tmas on and off.")
    assert headline(Sweep("s", tuple(cells()[:1]), None, ())).startswith("1 run: awq at w3a4.")

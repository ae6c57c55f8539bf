"""The page in a real browser: no console message, sorting works, text stays text, nothing sticks out."""

import base64
import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
from html import unescape

import pytest

from dllmq.report.html import render
from dllmq.report.page import SCRIPT_HASH
from dllmq.report.results import Sweep
from tests.report.records_factory import ablation, write_samples

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
EVIL = '<img src=x onerror="document.title=1"><script>document.body.remove()</script>'

browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
missing = f"no browser: none of {', '.join(BROWSERS)} is installed"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(browser is None, reason=missing)]


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    """Eight cells, one with markup in its name, and samples with markup in every text."""
    folder = tmp_path_factory.mktemp("page")
    reference, runs = ablation(methods=("gptq",), seeds=(0,))
    runs[0] = dataclasses.replace(runs[0], run_name=EVIL, command=EVIL, notes={EVIL: EVIL}, inert=[EVIL])
    for i, run in enumerate((reference, *runs)):
        place = folder / str(i) if i else folder
        place.mkdir(exist_ok=True)
        write_samples(place, run, text=EVIL)
    paths = tuple(f"{i + 1}/results.json" for i in range(len(runs)))
    return render(Sweep(f"s {EVIL}", tuple(runs), reference, (), paths), folder=folder)


def opened(page: str, folder, width: int = 1280, script: str = "") -> tuple[str, list[str]]:
    """(the document after its scripts ran, console messages); `script` is added and allowed by its hash."""
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        page = page.replace(SCRIPT_HASH, f"{SCRIPT_HASH}' 'sha256-{digest}", 1)
        page = page.replace("</body>", f"<script>{script}</script></body>")
    path = folder / "page.html"
    path.write_text(page, encoding="utf-8")
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
               f"--user-data-dir={folder / 'profile'}", f"--window-size={width},900",
               "--enable-logging=stderr", "--v=0", "--dump-dom", path.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


@pytest.fixture(scope="module")
def document(page, tmp_path_factory) -> str:
    dom, console = opened(page, tmp_path_factory.mktemp("browser"))
    assert console == []
    return dom


def test_a_blocked_script_would_be_seen_on_the_console(tmp_path):
    """The check of the other tests can fail, and the policy stops a script that is not the page's own."""
    policy = f"default-src 'none'; script-src '{SCRIPT_HASH}'"
    meta = f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    dom, console = opened(
        f"<html><head>{meta}</head><body><script>document.title=1</script></body></html>", tmp_path
    )
    assert len(console) == 1 and "Content Security Policy" in console[0]
    assert "<title>" not in dom


def test_tables_and_figures_are_there(document):
    assert document.count("<table") == 5 == document.count('class="sortable"')
    assert document.count("<figure>") == document.count("<svg ") >= 14
    assert document.count("<article>") > 20


def test_markup_in_records_and_samples_stays_text(document):
    assert document.count("<script>") == 1
    assert "<img" not in document
    assert "<body><main>" in document  # not removed
    assert re.findall(r"<title>(.*?)</title>", document) == [f"s {escaped(EVIL)} – dllmq report"]
    assert document.count(escaped(EVIL)) > 100


def escaped(text: str) -> str:
    """As the browser writes text content."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def test_a_click_on_a_head_sorts_and_another_turns_it(page, tmp_path):
    """The first click is largest first, of text A; full precision stays on top, what is missing goes last."""
    script = """
    const table = document.querySelector("table"), heads = [...table.tHead.rows[0].cells];
    const column = heads.findIndex(head => head.textContent.includes("exact_match"));
    const values = () => [...table.tBodies[0].rows].map(row => parseFloat(row.cells[column].textContent));
    const seen = [values()];
    heads[column].click(); seen.push(values());
    heads[column].dispatchEvent(new KeyboardEvent("keydown", {key: "Enter"})); seen.push(values());
    document.body.dataset.seen = JSON.stringify(seen);
    const texts = i => [...table.tBodies[0].rows].slice(1).map(row => row.cells[i].textContent);
    heads[2].click(); document.body.dataset.switched = JSON.stringify(texts(2));
    [...table.tBodies[0].rows].slice(1, 3).forEach(row => {
      row.cells[column].textContent = "–"; delete row.cells[column].dataset.v;
    });
    const gone = [1, 2].map(() => { heads[column].click(); return texts(column).lastIndexOf("–"); });
    document.body.dataset.gone = JSON.stringify([...gone, table.tBodies[0].rows.length - 2]);
    """
    dom, console = opened(page, tmp_path, script=script)
    assert console == []
    switched, (down_last, up_last, last) = json_of(dom, "switched"), json_of(dom, "gone")
    assert switched == ["off"] * 4 + ["on"] * 4  # switches sort as 0 and 1
    assert down_last == up_last == last
    before, down, up = json_of(dom, "seen")
    assert before not in (down, up)
    assert down == [before[0], *sorted(before[1:], reverse=True)]
    assert up == [before[0], *sorted(before[1:])]


def test_nothing_sticks_out_of_a_phone(page, tmp_path):
    """Tables scroll inside their frame. Windows are at least 500 px wide, so the body is set to 360."""
    script = """
    document.querySelectorAll("details").forEach(block => block.open = true);
    document.body.style.width = "360px";
    const main = document.querySelector("main");
    document.body.dataset.seen = JSON.stringify([main.clientWidth, main.scrollWidth]);
    """
    dom, console = opened(page, tmp_path, 500, script)
    assert json_of(dom, "seen") == [360, 360]
    assert console == []


def json_of(dom: str, name: str):
    (found,) = re.findall(rf'data-{name}="([^"]*)"', dom)
    return json.loads(unescape(found))

"""report.html: one page with everything in it, nothing loaded from anywhere.

Every text that comes from a record passes `escape`; the content security policy allows no request and no
script but the sort function, by its hash.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape
from pathlib import Path

from dllmq.report.decoding import approximate, decoding_table
from dllmq.report.effect_tables import effects_table, main_effects_table, settings_table
from dllmq.report.figures import draw, to_svg
from dllmq.report.groups import all_records, groups, label, tasks, varying_axes, varying_toggles
from dllmq.report.html_details import changes_html, flatten, reproduce_html
from dllmq.report.page import CSS, MEANING, SCRIPT, SCRIPT_HASH
from dllmq.report.plot_style import Drawing
from dllmq.report.results import Sweep
from dllmq.report.samples import changed_answers
from dllmq.report.table import EMPTY, Cell, Column, Row, Table, to_html
from dllmq.report.tables import cost_table, first_line, results_table

_POLICY = f"default-src 'none'; style-src 'unsafe-inline'; script-src '{SCRIPT_HASH}'; base-uri 'none'"


def render(sweep: Sweep, drawings: list[Drawing] | None = None, folder: str | Path | None = None) -> str:
    """The whole page as text; the same records give the same bytes.

    Args:
        drawings: the figures; None draws them.
        folder: the sweep's folder, for the answers that changed; None leaves that section out.
    """
    drawings = draw(sweep) if drawings is None else drawings
    changes = changed_answers(sweep, folder) if folder is not None else []
    sections = {
        "Results": _tables([results_table(sweep)]) + _figures(drawings, "scores"),
        "Approximate decoding": _tables([decoding_table(sweep)]),
        "What each switch changes": _tables([main_effects_table(sweep)], titled=True)
        + _figures(drawings, "effects")
        + _tables([effects_table(sweep)], titled=True),
        "What each setting changes": _tables([settings_table(sweep)]),
        "Where the error arises": _figures(drawings, "curves"),
        "Cost": _cost(sweep) + _figures(drawings, "cost"),
        "Answers that changed": changes_html(sweep, changes),
        "What the switches mean": _meanings(sweep),
        "Calibration": _calibration(sweep),
        "Failed runs": _failures(sweep),
        "Reproduce": reproduce_html(sweep),
    }
    sections = {title: body for title, body in sections.items() if body}
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{escape(sweep.name)} – dllmq report</title><style>{CSS}</style></head>\n<body><main>\n"
        f'<header><p class="eyebrow">dllmq report</p><h1>{escape(sweep.name)}</h1>'
        f'<p class="summary">{escape(headline(sweep))}</p>{_contents(list(sections))}</header>\n'
        + "\n".join(_section(title, body) for title, body in sections.items())
        + f"\n{_footer(sweep)}</main>\n<script>{SCRIPT}</script></body></html>\n"
    )


def headline(sweep: Sweep) -> str:
    """What was run, in one or two sentences, without a verdict."""
    count = len(sweep.records)
    parts = [f"{count} run{'s' * (count != 1)}"]
    if sweep.failed:
        parts.append(f"{len(sweep.failed)} failed")
    methods = sorted({str(r.axes.get("method")) for r in sweep.records})
    widths = sorted({str(r.axes["bits"]) for r in sweep.records if "bits" in r.axes})
    toggles = varying_toggles(sweep)
    text = " and ".join(parts)
    if methods:
        text += f": {_and(methods)}" + (f" at {_and(widths)}" if widths else "")
    if toggles:
        text += f", with {_and(toggles)} on and off"
    seeds = {len(group.records) for group in groups(sweep)}
    if seeds and max(seeds) > 1:
        text += f", {' to '.join(map(str, sorted({min(seeds), max(seeds)})))} seeds each"
    text += "."
    if task_metrics := tasks(sweep):
        text += f" Measured on {_and([_task_n(sweep, t, m) for t, m in task_metrics.items()])}"
        other = any(approximate(r.axes) or r.axes.get("method") != "fp" for r in sweep.records)
        text += ", against the same model in full precision." if sweep.baseline and other else "."
    if fast := sum(approximate(r.axes) for r in sweep.records):
        which = f"{fast} of the runs" if fast < count else "every run" if count > 1 else "the run"
        text += f" Approximate decoding (cache, threshold) in {which}."
    return text


def _task_n(sweep: Sweep, task: str, metric: str) -> str:
    counts = {s["n"] for r in all_records(sweep) if (s := r.scores.get(task, {}).get(metric)) and s["n"]}
    return f"{task} (n = {' / '.join(str(int(n)) for n in sorted(counts))})" if counts else task


def _and(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


# ---------------------------------------------------------------- sections


def _contents(titles: list[str]) -> str:
    links = "".join(f'<a href="#{_anchor(title)}">{title}</a>' for title in titles)
    return f'<nav aria-label="Contents">{links}</nav>' if links else ""


def _anchor(title: str) -> str:
    return "part-" + title.lower().replace(" ", "-")


def _section(title: str, body: str) -> str:
    return f'<section id="{_anchor(title)}"><h2>{title}</h2>{body}</section>'


def _tables(tables: list[Table], titled: bool = False) -> str:
    """The tables that have rows, with a heading each if `titled`."""
    heading = "<h3>{}</h3>" if titled else ""
    return "".join(heading.format(escape(table.title)) + to_html(table) for table in tables if table.rows)


def _figures(drawings: Iterable[Drawing], part: str) -> str:
    body = "".join(
        f"<figure>{to_svg(d, themed=True)}<figcaption>{escape(d.caption)}</figcaption></figure>"
        for d in drawings
        if d.part == part
    )
    small = " small" if part in ("scores", "effects") else ""
    return f'<div class="figures{small}">{body}</div>' if body else ""


def _cost(sweep: Sweep) -> str:
    return _tables([cost_table(sweep)]) if all_records(sweep) else ""


def _meanings(sweep: Sweep) -> str:
    known = list(dict.fromkeys(name for r in sweep.records for name in r.axes))
    items = "".join(
        f"<dt><code>{escape(name)}</code></dt><dd>{escape(MEANING[name])}</dd>"
        for name in known
        if name in MEANING
    )
    return f"<dl>{items}</dl>" if items else ""


def _calibration(sweep: Sweep) -> str:
    """One row per run that was calibrated, one column per fact about what was drawn."""
    varying = varying_axes(sweep)
    runs = [(label(r.axes, varying), dict(flatten(r.calibration))) for r in sweep.records if r.calibration]
    keys = list(dict.fromkeys(key for _, values in runs for key in values))
    rows = [Row((Cell(name), *(_fact(values.get(key)) for key in keys))) for name, values in runs]
    columns = (Column("run", numeric=False), *(Column(key.replace("_", " ")) for key in keys))
    table = Table("Calibration", columns, tuple(rows))
    return "<p>What each run's statistics were computed from.</p>" + to_html(table) if keys else ""


def _fact(text: str | None) -> Cell:
    if text is None:
        return EMPTY
    try:
        number = float(text)
    except ValueError:
        return Cell(text)
    return Cell(text, sort=number if math.isfinite(number) else None)


def _failures(sweep: Sweep) -> str:
    blocks = []
    for status in sweep.failed:
        name = escape(f"{status['run_name']}: {first_line(status['error'])}")
        details = status.get("traceback") or status["error"]
        blocks.append(
            f'<details><summary>{name}</summary><div><pre class="wrap">{escape(str(details))}</pre>'
            "</div></details>"
        )
    return "".join(blocks)


def _footer(sweep: Sweep) -> str:
    if not (records := all_records(sweep)):
        return ""
    versions = records[0].versions
    commit = str(records[0].git.get("commit") or "")[:12]
    facts = [f"{k} {versions[k]}" for k in ("dllmq", "torch", "transformers", "lm_eval") if k in versions]
    facts += [f"commit {commit}"] if commit else []
    return f"<footer>{escape(' · '.join(facts))}</footer>"

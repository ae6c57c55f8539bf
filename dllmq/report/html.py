"""report.html: one page with everything in it, nothing loaded from anywhere.

Every text that comes from a record passes `escape`; the content security policy allows no request and no
script but the sort function, by its hash.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from html import escape
from typing import Any

from dllmq.report.compare import all_records, label, tasks, varying_axes, varying_toggles
from dllmq.report.figures import Drawing, draw, to_svg
from dllmq.report.page import CSS, MEANING, SCRIPT, SCRIPT_HASH
from dllmq.report.results import RunRecord, Sweep, redact
from dllmq.report.table import EMPTY, Cell, Column, Row, Table, to_html
from dllmq.report.tables import cost_table, effects_table, first_line, results_table

_POLICY = f"default-src 'none'; style-src 'unsafe-inline'; script-src '{SCRIPT_HASH}'; base-uri 'none'"


def render(sweep: Sweep, drawings: list[Drawing] | None = None) -> str:
    """The whole page as text; the same records give the same bytes."""
    drawings = draw(sweep) if drawings is None else drawings
    sections = [
        _section("Results", to_html(results_table(sweep))),
        _effects(sweep),
        _figures(drawings),
        _meanings(sweep),
        _calibration(sweep),
        _section("Cost", to_html(cost_table(sweep))) if all_records(sweep) else "",
        _failures(sweep),
        _configurations(sweep),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{escape(sweep.name)} – dllmq report</title><style>{CSS}</style></head>\n<body><main>\n"
        f'<header><p class="eyebrow">dllmq report</p><h1>{escape(sweep.name)}</h1>'
        f'<p class="summary">{escape(headline(sweep))}</p></header>\n'
        + "\n".join(section for section in sections if section)
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
    text += "."
    if task_metrics := tasks(sweep):
        text += f" Measured on {_and([_task_n(sweep, t, m) for t, m in task_metrics.items()])}"
        text += ", against the same model in full precision." if sweep.baseline else "."
    return text


def _task_n(sweep: Sweep, task: str, metric: str) -> str:
    counts = {s["n"] for r in all_records(sweep) if (s := r.scores.get(task, {}).get(metric)) and s["n"]}
    return f"{task} (n = {' / '.join(str(int(n)) for n in sorted(counts))})" if counts else task


def _and(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


# ---------------------------------------------------------------- sections


def _section(title: str, body: str, lead: str = "") -> str:
    text = f"<p>{escape(lead)}</p>" if lead else ""
    return f"<section><h2>{escape(title)}</h2>{text}{body}</section>"


def _effects(sweep: Sweep) -> str:
    table = effects_table(sweep)
    return _section(table.title, to_html(table)) if table.rows else ""


def _figures(drawings: Iterable[Drawing]) -> str:
    grids = {"figures": "", "figures small": ""}
    for d in drawings:
        figure = f"<figure>{to_svg(d, themed=True)}<figcaption>{escape(d.caption)}</figcaption></figure>"
        grids["figures small" if d.name.startswith("score-") else "figures"] += figure
    body = "".join(f'<div class="{name}">{figures}</div>' for name, figures in grids.items() if figures)
    return _section("Figures", body) if body else ""


def _meanings(sweep: Sweep) -> str:
    known = list(dict.fromkeys(name for r in sweep.records for name in r.axes))
    items = "".join(
        f"<dt><code>{escape(name)}</code></dt><dd>{escape(MEANING[name])}</dd>"
        for name in known
        if name in MEANING
    )
    return _section("What the switches mean", f"<dl>{items}</dl>") if items else ""


def _calibration(sweep: Sweep) -> str:
    runs = [(label(r.axes, varying_axes(sweep)), dict(flatten(r.calibration))) for r in sweep.records]
    keys = list(dict.fromkeys(key for _, values in runs for key in values))
    if not keys:
        return ""
    rows = [Row((Cell(k), *(Cell(v[k]) if k in v else EMPTY for _, v in runs))) for k in keys]
    columns = [Column("drawn", numeric=False), *(Column(name) for name, _ in runs)]
    table = Table("Calibration", tuple(columns), tuple(rows))
    return _section("Calibration", to_html(table), "What each run's statistics were computed from.")


def flatten(values: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested mappings as ("a.b", text) pairs; lists of plain values on one line, shortened after 12."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(values, list) and values and isinstance(values[0], (dict, list)):
        for i, value in enumerate(values):
            yield from flatten(value, f"{prefix}[{i}]")
    elif isinstance(values, list):
        yield prefix, ", ".join(_short(v) for v in values[:12]) + (" …" if len(values) > 12 else "")
    else:
        yield prefix, _short(values)


def _short(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _failures(sweep: Sweep) -> str:
    blocks = []
    for status in sweep.failed:
        name = escape(f"{status['run_name']}: {first_line(status['error'])}")
        details = status.get("traceback") or status["error"]
        blocks.append(
            f'<details><summary>{name}</summary><div><pre class="wrap">{escape(str(details))}</pre>'
            "</div></details>"
        )
    return _section("Failed runs", "".join(blocks)) if blocks else ""


def _configurations(sweep: Sweep) -> str:
    varying = varying_axes(sweep)
    named = [("full precision", sweep.baseline)] if sweep.baseline else []
    named += [(label(r.axes, varying), r) for r in sweep.records]
    blocks = "".join(_configuration(name, record) for name, record in named)
    lead = "Each run's command, environment and full configuration, as recorded."
    return _section("Reproduce", blocks, lead) if blocks else ""


def _configuration(name: str, r: RunRecord) -> str:
    facts = [
        ("run", r.run_name),
        ("device", r.device if isinstance(r.device, str) else _join(r.device)),
        ("git", _join(r.git) or "not recorded"),
        ("seed", str(r.seed)),
        ("versions", _join(r.versions)),
        ("without effect", ", ".join(map(str, r.inert))),
        ("fingerprint", r.fingerprint),
        *((f"notes: {key}", value) for key, value in flatten(r.notes)),
    ]
    items = "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in facts if v)
    config = json.dumps(redact(r.config), indent=2, ensure_ascii=False)
    return (
        f'<details><summary>{escape(name)}</summary><div><pre class="wrap">{escape(r.command)}</pre>'
        f'<dl style="margin-top:.8rem">{items}</dl><pre>{escape(config)}</pre></div></details>'
    )


def _join(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {text}".strip() for key, text in flatten(values))


def _footer(sweep: Sweep) -> str:
    if not (records := all_records(sweep)):
        return ""
    versions = records[0].versions
    commit = str(records[0].git.get("commit") or "")[:12]
    facts = [f"{k} {versions[k]}" for k in ("dllmq", "torch", "transformers", "lm_eval") if k in versions]
    facts += [f"commit {commit}"] if commit else []
    return f"<footer>{escape(' · '.join(facts))}</footer>"

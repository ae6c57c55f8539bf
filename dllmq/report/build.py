"""Writes a sweep's summary.json, table.md and report.html from the records in its folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from dllmq.report.compare import Delta, delta, tasks, twin, varying_toggles
from dllmq.report.figures import draw, write_png
from dllmq.report.html import headline, render
from dllmq.report.results import RunRecord, Sweep, load_sweep, write_json_atomic, write_text_atomic
from dllmq.report.table import to_markdown
from dllmq.report.tables import cost_table, sweep_tables

SUMMARY, TABLE, PAGE = "summary.json", "table.md", "report.html"


def write_report(folder: str | Path, png: bool = False) -> Sweep:
    """Read the records under folder and write the three files there; the same records, the same bytes.

    With `png`, the figures are also written to <folder>/figures/*.png.

    Raises:
        ValueError: the folder is missing, has no records, or one cannot be read.
    """
    folder = Path(folder)
    sweep = load_sweep(folder)
    drawings = draw(sweep)
    write_json_atomic(folder / SUMMARY, summary(sweep))
    write_text_atomic(folder / TABLE, markdown(sweep))
    write_text_atomic(folder / PAGE, render(sweep, drawings))
    for drawing in drawings if png else ():
        write_png(drawing, folder / "figures")
    return sweep


def markdown(sweep: Sweep) -> str:
    """table.md: the headline, the results, the effect of each switch, the cost."""
    tables = [*sweep_tables(sweep), cost_table(sweep)]
    return f"# {sweep.name}\n\n{headline(sweep)}\n\n" + "\n".join(to_markdown(table) for table in tables)


def summary(sweep: Sweep) -> dict[str, Any]:
    """summary.json: each run's axes, scores, fidelity and cost, with its differences."""
    return {
        "sweep": sweep.name,
        "headline": headline(sweep),
        "baseline": _outline(sweep.baseline) if sweep.baseline else None,
        "runs": [
            {**_outline(record), "results": path, **_differences(sweep, record)}
            for record, path in zip(sweep.records, sweep.paths or [None] * len(sweep.records), strict=True)
        ],
        "failed": [{k: s[k] for k in ("run_name", "axes", "error")} for s in sweep.failed],
    }


def _outline(r: RunRecord) -> dict[str, Any]:
    names = ("run_name", "axes", "scores", "fidelity", "cost", "inert", "seed", "fingerprint", "command")
    return {name: getattr(r, name) for name in names}


def _differences(sweep: Sweep, record: RunRecord) -> dict[str, Any]:
    twins = {toggle: twin(sweep, record, toggle) for toggle in varying_toggles(sweep)}
    return {
        "delta_to_full_precision": _deltas(sweep, record, sweep.baseline),
        "delta_to_twin": {toggle: _deltas(sweep, record, off) for toggle, off in twins.items() if off},
    }


def _deltas(sweep: Sweep, record: RunRecord, reference: RunRecord | None) -> dict[str, Any]:
    found: dict[str, Delta | None] = {t: delta(record, reference, t, m) for t, m in tasks(sweep).items()}
    return {
        task: {"metric": tasks(sweep)[task], **dataclasses.asdict(d)}
        for task, d in found.items()
        if d is not None
    }

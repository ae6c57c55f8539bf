"""Writes a sweep's summary.json, table.md and report.html from the records in its folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from dllmq.report.compare import Delta, Effect, MainEffect, delta, effects, main_effects
from dllmq.report.decoding import DecodingEffect, decoding_effects
from dllmq.report.figures import draw, write_png
from dllmq.report.groups import Group, as_group, fidelity, finite, groups, score, tasks, twin, varying_toggles
from dllmq.report.html import headline, render
from dllmq.report.results import RunRecord, Sweep, load_sweep, write_json_atomic, write_text_atomic
from dllmq.report.settings import SettingEffect, setting_effects
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
    write_text_atomic(folder / PAGE, render(sweep, drawings, folder))
    for drawing in drawings if png else ():
        write_png(drawing, folder / "figures")
    return sweep


def markdown(sweep: Sweep) -> str:
    """table.md: the headline, the results, what each switch changed, the cost."""
    tables = [*sweep_tables(sweep), cost_table(sweep)]
    return f"# {sweep.name}\n\n{headline(sweep)}\n\n" + "\n".join(to_markdown(table) for table in tables)


def summary(sweep: Sweep) -> dict[str, Any]:
    """summary.json: every run, the groups of runs that differ in the seed only, and what each switch changed.

    A run's own differences are uncorrected; those under "effects" and "main_effects" carry Holm's p.
    """
    decoding = [_decoding(sweep, effect) for effect in decoding_effects(sweep)]
    return {
        "sweep": sweep.name,
        "headline": headline(sweep),
        "baseline": _outline(sweep.baseline) if sweep.baseline else None,
        "groups": [_group(sweep, group) for group in groups(sweep)],
        "effects": [_effect(sweep, effect) for effect in effects(sweep)],
        "main_effects": [_main_effect(effect) for effect in main_effects(sweep)],
        "settings": [_setting(found) for found in setting_effects(sweep)],
        "runs": [
            {**_outline(record), "results": path, **_differences(sweep, record)}
            for record, path in zip(sweep.records, sweep.paths or [None] * len(sweep.records), strict=True)
        ],
        "failed": [{k: s[k] for k in ("run_name", "axes", "error")} for s in sweep.failed],
    } | ({"approximate_decoding": decoding} if decoding else {})


def _outline(r: RunRecord) -> dict[str, Any]:
    names = ("run_name", "axes", "scores", "fidelity", "cost", "inert", "seed", "fingerprint", "command")
    return {name: getattr(r, name) for name in names}


def _group(sweep: Sweep, group: Group) -> dict[str, Any]:
    figures = list(dict.fromkeys(name for r in group.records for name in r.fidelity))
    return {
        "axes": group.axes,
        "seeds": group.seeds,
        "runs": [r.run_name for r in group.records],
        "scores": {t: {"metric": m, **_plain(score(group, t, m))} for t, m in tasks(sweep).items()},
        "fidelity": {name: _plain(fidelity(group, name)) for name in figures},
        "delta_to_full_precision": _deltas(sweep, group, sweep.baseline),
    }


def _effect(sweep: Sweep, effect: Effect) -> dict[str, Any]:
    return {
        "toggle": effect.toggle,
        "axes": effect.group.axes,
        "inert": effect.inert,
        "deltas": {t: {"metric": tasks(sweep)[t], **_plain(d)} for t, d in effect.deltas.items()},
        "kl": _plain(effect.kl),
    }


def _decoding(sweep: Sweep, effect: DecodingEffect) -> dict[str, Any]:
    return {
        "axes": effect.group.axes,
        "instead_of": effect.twin.axes,
        "deltas": {t: {"metric": tasks(sweep)[t], **_plain(d)} for t, d in effect.deltas.items()},
        "times_fewer": effect.saved,
    }


def _main_effect(effect: MainEffect) -> dict[str, Any]:
    names = ("toggle", "method", "placebo", "task", "metric", "twins", "verdict", "runs_p")
    runs = _plain(effect.runs) | {"stderr": finite(effect.runs.stderr)}
    own = {name: getattr(effect, name) for name in names} | {"runs": runs}
    return own | _plain(effect.delta)


def _setting(found: SettingEffect) -> dict[str, Any]:
    own = _main_effect(found.effect)
    del own["toggle"], own["placebo"]
    return {"axis": found.axis, "level": found.level, "instead_of": found.reference} | own


def _plain(value: Any) -> dict[str, Any]:
    return {} if value is None else dataclasses.asdict(value)


def _differences(sweep: Sweep, record: RunRecord) -> dict[str, Any]:
    own = as_group(record)
    twins = {toggle: twin(sweep, own, toggle) for toggle in varying_toggles(sweep)}
    return {
        "delta_to_full_precision": _deltas(sweep, own, sweep.baseline),
        "delta_to_twin": {toggle: _deltas(sweep, own, off) for toggle, off in twins.items() if off},
    }


def _deltas(sweep: Sweep, group: Group, reference: Group | RunRecord | None) -> dict[str, Any]:
    found: dict[str, Delta | None] = {t: delta(group, reference, t, m) for t, m in tasks(sweep).items()}
    return {t: {"metric": tasks(sweep)[t], **_plain(d)} for t, d in found.items() if d is not None}

"""The tables of a sweep: results, the effect of each switch, cost.

value ± stderr (n)    a score; ± is one standard error over problems
Δ fp                  run - full precision, paired by problem
effect of a switch    run - its twin (same cell, only that switch off), paired by problem
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from dllmq.report.compare import (
    Delta,
    delta,
    is_share,
    label,
    lower_is_better,
    relative_change,
    tasks,
    twin,
    varying_axes,
    varying_toggles,
)
from dllmq.report.results import RunRecord, Sweep
from dllmq.report.table import EMPTY, KEEP, Cell, Column, Row, Table, Tone

_MARKS = "¹²³⁴⁵⁶⁷⁸⁹"


def sweep_tables(sweep: Sweep) -> list[Table]:
    """What a sweep prints: the results and, where a switch varies, what each switch changed."""
    effects = effects_table(sweep)
    return [results_table(sweep)] + ([effects] if effects.rows else [])


# ---------------------------------------------------------------- results


def results_table(sweep: Sweep) -> Table:
    """One row per run, full precision first, failed runs last."""
    axes, task_metrics = _axes_shown(sweep), tasks(sweep)
    notes = _InertNotes()
    rows = []
    if sweep.baseline:
        name = Cell("full precision", compact="fp")
        rows.append(
            Row(
                (name, *[EMPTY] * (len(axes) - 1), *_measured(sweep, sweep.baseline, task_metrics)),
                "reference",
            )
        )
    for record in sweep.records:
        cells = [_axis_cell(record.axes.get(name), notes.mark(record, name)) for name in axes]
        rows.append(Row((*cells, *_measured(sweep, record, task_metrics))))
    for status in sweep.failed:
        known = tuple(_axis_cell(status["axes"].get(name)) for name in axes)
        rows.append(Row(known, "failed", message=first_line(status["error"])))
    columns = [Column(name, KEEP, numeric=False) for name in axes]
    return Table(
        title="Results",
        columns=(*columns, *_score_columns(sweep, task_metrics), *_tail_columns()),
        rows=tuple(rows),
        footnotes=(*_legend(sweep, task_metrics), *notes.sentences()),
    )


def _axes_shown(sweep: Sweep) -> list[str]:
    names = list(dict.fromkeys(["method", "bits", *varying_axes(sweep)]))
    known = [r.axes for r in sweep.records] + [s["axes"] for s in sweep.failed]
    return [name for name in names if name == "method" or any(name in axes for axes in known)]


def _axis_cell(value: Any, mark: str = "") -> Cell:
    if isinstance(value, bool):
        return Cell(("on" if value else "off") + mark, "on" if value else "off", sort=float(value))
    return EMPTY if value is None else Cell(str(value) + mark)


def _score_columns(sweep: Sweep, task_metrics: dict[str, str]) -> Iterator[Column]:
    for i, (task, metric) in enumerate(task_metrics.items()):
        unit = " %" if is_share(metric) else ""
        n = _common_n(sweep, task, metric)
        short = f"{task}\n{_unit_n(unit, n)}"
        title = f"{task}\n{metric.removesuffix(',none')}{unit}"
        yield Column(title, 10 + i if i else KEEP, compact=short, note=f"n = {n}" if n else "")
        yield Column(f"{task}\nΔ fp", 30 + i, compact="\nΔ fp")


def _unit_n(unit: str, n: int | None) -> str:
    return ", ".join(part for part in (unit.strip(), f"n={n}" if n else "") if part)


def _common_n(sweep: Sweep, task: str, metric: str) -> int | None:
    counts = {s["n"] for r in sweep.records if (s := r.scores.get(task, {}).get(metric))}
    return int(counts.pop()) if len(counts) == 1 and None not in counts else None


def _tail_columns() -> tuple[Column, ...]:
    return (
        Column("KL\nnats", 20),
        Column("top-1\n%", 40),
        Column("quantized\n% params", 50, compact="quant.\n%"),
        Column("time\ns", 60),
    )


def _measured(sweep: Sweep, record: RunRecord, task_metrics: dict[str, str]) -> Iterator[Cell]:
    reference = None if record is sweep.baseline else sweep.baseline
    for task, metric in task_metrics.items():
        yield score_cell(record.scores.get(task, {}).get(metric), is_share(metric))
        yield delta_cell(delta(record, reference, task, metric), metric)
    yield _kl_cell(record.fidelity.get("kl"))
    yield replace(score_cell(record.fidelity.get("top1"), share=True), note="")
    yield number_cell(record.cost.get("quantized_share"), "{:.1f}", 100)
    yield number_cell(seconds(record), "{:.1f}" if (seconds(record) or 0) < 10 else "{:.0f}")


def seconds(record: RunRecord) -> float | int | None:
    """Calibration, quantization and evaluation together."""
    parts = [record.cost.get(k) for k in ("calibrate_s", "quantize_s", "evaluate_s")]
    known = [p for p in parts if p is not None]
    return sum(known) if known else None


class _InertNotes:
    """Footnote marks for switches without effect in a run."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def mark(self, record: RunRecord, axis: str) -> str:
        text = next((str(s) for s in record.inert if str(s).split(":")[0].strip() == axis), None)
        if text is None:
            return ""
        reason = text.split(":", 1)[1].strip() if ":" in text else "it is recorded as inert"
        sentence = f"{axis} has no effect in this combination: {reason}"
        if sentence not in self.texts:
            self.texts.append(sentence)
        index = self.texts.index(sentence)
        return _MARKS[index] if index < len(_MARKS) else f"[{index + 1}]"

    def sentences(self) -> list[str]:
        return [
            f"{_MARKS[i] if i < len(_MARKS) else f'[{i + 1}]'} {t.rstrip('.')}."
            for i, t in enumerate(self.texts)
        ]


def _legend(sweep: Sweep, task_metrics: dict[str, str]) -> Iterator[str]:
    if task_metrics:
        yield "± is one standard error over problems, (n) their number."
    if sweep.baseline and task_metrics:
        pairs = [delta(r, sweep.baseline, t, m) for r in sweep.records for t, m in task_metrics.items()]
        yield "Δ fp: run − full precision, paired over the same problems; coloured beyond 2 standard errors."
        if any(d and not d.paired for d in pairs):
            yield "u: not paired (no common per-problem results), so its error is an upper estimate."
    elif task_metrics:
        yield "No full-precision reference was recorded, so there are no differences to it."
    if any(r.fidelity for r in sweep.records):
        yield "KL, top-1: against full precision at masked positions of held-out trajectory states."


# ---------------------------------------------------------------- effects


def effects_table(sweep: Sweep) -> Table:
    """One row per run and switch that is on and has a twin: run - twin."""
    task_metrics, varying = tasks(sweep), varying_axes(sweep)
    rows = []
    for toggle in varying_toggles(sweep):
        for record in sweep.records:
            if off := twin(sweep, record, toggle):
                rows.append(Row(tuple(_effect_cells(record, off, toggle, task_metrics, varying))))
    columns = [Column("switch", KEEP, numeric=False), Column("added to", KEEP, numeric=False)]
    columns += [
        Column(
            f"{task}\n{m.removesuffix(',none')}{', points' if is_share(m) else ''}",
            KEEP,
            compact=f"{task}\nΔ",
        )
        for task, m in task_metrics.items()
    ]
    columns += [Column("KL\nchange %", 10, compact="KL\nΔ %"), Column("top-1\npoints", 20)]
    note = "Each row: the run with the switch on minus its twin with only that switch off, paired by problem."
    return Table(
        "Effect of each switch", tuple(columns), tuple(rows), (note, *_effect_notes(sweep)) if rows else ()
    )


def _effect_cells(
    record: RunRecord, off: RunRecord, toggle: str, task_metrics: dict[str, str], varying: list[str]
) -> Iterator[Cell]:
    inert = any(str(s).split(":")[0].strip() == toggle for s in record.inert)
    yield Cell(toggle + (" (inert)" if inert else ""))
    yield Cell(label(off.axes, varying, without=toggle))
    for task, metric in task_metrics.items():
        yield delta_cell(delta(record, off, task, metric), metric)
    change = relative_change(record, off, "kl")
    yield EMPTY if change is None else Cell(_signed(100 * change, 1), sort=change)
    ours, theirs = (r.fidelity.get("top1", {}).get("value") for r in (record, off))
    if ours is None or theirs is None:
        yield EMPTY
    else:
        yield Cell(_signed(100 * (ours - theirs), 2), sort=ours - theirs)


def _effect_notes(sweep: Sweep) -> Iterator[str]:
    if any(r.fidelity for r in sweep.records):
        yield "KL and top-1 changes carry no error here; lower KL, higher top-1: closer to full precision."


# ---------------------------------------------------------------- cost


def cost_table(sweep: Sweep) -> Table:
    """Seconds, bytes and speed of each run."""
    varying = varying_axes(sweep)
    records = [("full precision", sweep.baseline)] if sweep.baseline else []
    records += [(label(r.axes, varying), r) for r in sweep.records]
    rows = []
    for name, record in records:
        c = record.cost
        cells = (
            Cell(name),
            *(number_cell(c.get(k), "{:.1f}") for k in ("calibrate_s", "quantize_s", "evaluate_s")),
            number_cell(c.get("peak_memory_bytes"), "{:.1f}", 2**-20),
            number_cell(c.get("weight_bytes"), "{:.2f}", 2**-20),
            number_cell(c.get("quantized_share"), "{:.1f}", 100),
            number_cell(c.get("tokens_per_second"), "{:.1f}"),
            number_cell(c.get("forwards"), "{:,.0f}"),
        )
        rows.append(Row(cells, "reference" if record is sweep.baseline else "run"))
    titles = ["run", "calibrate\ns", "quantize\ns", "evaluate\ns", "peak memory\nMiB", "weights\nMiB"]
    titles += ["quantized\n% params", "speed\ntokens/s", "forwards\n "]
    columns = tuple(Column(title, KEEP, numeric=title != "run") for title in titles)
    return Table(
        "Cost",
        columns,
        tuple(rows),
        ("Weights are counted at their true bit width, scales and zeros included.",),
    )


# ---------------------------------------------------------------- cells


def score_cell(estimate: dict[str, Any] | None, share: bool) -> Cell:
    """`value ± stderr (n)`, shares in percent."""
    if not estimate or estimate["value"] is None:
        return EMPTY
    value, error, n = _number(estimate["value"], share), estimate["stderr"], estimate["n"]
    pm = None if error is None else _number(error, share)
    return Cell(
        value if pm is None else f"{value} ± {pm}",
        compact=value if pm is None else f"{value}±{pm}",
        sort=estimate["value"],
        note="" if n is None else f"({n:,.0f})".replace(",", " "),
    )


def delta_cell(d: Delta | None, metric: str) -> Cell:
    """`+value ± stderr`; toned only where it is beyond two standard errors."""
    if d is None:
        return EMPTY
    share = is_share(metric)
    value = _signed(100 * d.value, 1) if share else _signed(d.value, 3)
    tone: Tone = "muted"
    if d.clear:
        tone = "better" if (d.value > 0) != lower_is_better(metric) else "worse"
    mark = "" if d.paired else " u"
    if d.stderr is None:
        return Cell(value + mark, "muted", sort=d.value)
    error = _number(d.stderr, share)
    return Cell(f"{value} ± {error}{mark}", tone, compact=f"{value}±{error}{mark.strip()}", sort=d.value)


def number_cell(value: float | int | None, form: str, scale: float | int = 1) -> Cell:
    """A plain number, scaled; "–" when it was not measured."""
    return EMPTY if value is None else Cell(form.format(value * scale).replace(",", " "), sort=value)


def _kl_cell(estimate: dict[str, Any] | None) -> Cell:
    if not estimate or estimate["value"] is None:
        return EMPTY
    value = kl_text(estimate["value"])
    error = "" if estimate["stderr"] is None else f" ± {kl_text(estimate['stderr'], 1)}"
    return Cell(value + error, compact=value, sort=estimate["value"])


def kl_text(value: float | int, digits: int = 3) -> str:
    """A KL in nats with `digits` significant digits: 0.0952, 1.23, 2.1e-05."""
    return f"{value:#.{digits}g}".rstrip(".")


def _number(value: float | int, share: bool) -> str:
    return f"{100 * value:.1f}" if share else f"{value:.3f}"


def _signed(value: float | int, digits: int) -> str:
    text = f"{value:+.{digits}f}"
    return text.replace("-", "−") if float(text) else f"{0:.{digits}f}"


def first_line(error: Any) -> str:
    """The first line that says something, of an error text or traceback's last line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].startswith("Traceback"):
        return lines[-1]
    return lines[0] if lines else "no error was recorded"

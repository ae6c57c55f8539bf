"""The tables of a sweep: results and cost; with those of effect_tables.py, what a sweep prints.

value ± stderr (n)    a score; ± is one standard error over problems; runs that differ in the seed share a row
Δ fp [low, high]      run - full precision, paired by problem, with its 95 % interval
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from dllmq.report.cells import delta_cell, doubtful, kl_cell, number_cell, p_cell, score_cell, tests_used
from dllmq.report.compare import delta
from dllmq.report.decoding import decoding_table
from dllmq.report.effect_tables import effects_table, main_effects_table, settings_table
from dllmq.report.groups import (
    Group,
    all_records,
    as_group,
    fidelity,
    groups,
    held_out_prompts,
    inert_reason,
    is_share,
    label,
    metric_title,
    most_seeds,
    score,
    tasks,
    varying_axes,
)
from dllmq.report.results import Sweep
from dllmq.report.table import EMPTY, KEEP, Cell, Column, Row, Table
from dllmq.report.words import byte_unit

CACHED = "cached"
_MARKS = "¹²³⁴⁵⁶⁷⁸⁹"


def sweep_tables(sweep: Sweep) -> list[Table]:
    """What a sweep prints: the results and, where a switch varies, its effect in each cell and on average."""
    tables = [
        results_table(sweep),
        other_metrics_table(sweep),
        decoding_table(sweep),
        effects_table(sweep),
        main_effects_table(sweep),
        settings_table(sweep),
    ]
    return tables[:1] + [table for table in tables[1:] if table.rows]


# ---------------------------------------------------------------- results

# fidelity figures in percent: name -> title, compact title, rank
_SHARES = {
    "final_agreement": ("final\nagreement %", "final\n%", 41),
    "top1": ("top-1\n%", "top-1\n%", 62),
    "argmax_at_k": ("argmax@k\n%", "argm@k\n%", 64),
}


def results_table(sweep: Sweep) -> Table:
    """One row per group of runs, full precision first, failed runs last."""
    axes, task_metrics = _axes_shown(sweep), tasks(sweep)
    rows, notes = [], _InertNotes()
    if sweep.baseline:
        known = (Cell("full precision", compact="fp"), *[EMPTY] * (len(axes) - 1))
        rows.append(Row((*known, *_measured(sweep, as_group(sweep.baseline), task_metrics)), "reference"))
    for group in groups(sweep):
        cells = [_axis_cell(group.axes.get(name), notes.mark(group, name)) for name in axes]
        rows.append(Row((*cells, *_measured(sweep, group, task_metrics))))
    for status in sweep.failed:
        known = tuple(_axis_cell(status["axes"].get(name)) for name in axes)
        seed = f"seed {status['axes'].get('seed')}: " if "seed" in varying_axes(sweep) else ""
        rows.append(Row(known, "failed", message=seed + first_line(status["error"])))
    columns = [Column(name, KEEP, numeric=False) for name in axes]
    return Table(
        title="Results",
        columns=(*columns, *_score_columns(sweep, task_metrics), *_tail_columns(sweep)),
        rows=tuple(rows),
        footnotes=(*_legend(sweep, task_metrics), *notes.sentences()),
    )


def _axes_shown(sweep: Sweep) -> list[str]:
    names = list(dict.fromkeys(["method", "bits", *varying_axes(sweep)]))
    known = [r.axes for r in sweep.records] + [s["axes"] for s in sweep.failed]
    return [n for n in names if n == "method" or (n != "seed" and any(n in axes for axes in known))]


def _axis_cell(value: Any, mark: str = "") -> Cell:
    if isinstance(value, bool):
        return Cell(("on" if value else "off") + mark, "on" if value else "off", sort=float(value))
    return EMPTY if value is None else Cell(str(value) + mark)


def _score_columns(sweep: Sweep, task_metrics: dict[str, str]) -> Iterator[Column]:
    seeds = most_seeds(sweep)
    for i, (task, metric) in enumerate(task_metrics.items()):
        unit = " %" if is_share(metric) else ""
        n = _common_n(sweep, task, metric)
        count = "" if n is None else f"n={n}" if seeds == 1 else f"n={n} x {seeds}"
        short = f"{task}\n{', '.join(part for part in (unit.strip(), count) if part)}"
        title = f"{task}\n{metric_title(metric)}{unit}"
        note = f"n = {n}" if n and seeds == 1 else ""
        yield Column(title, 10 + i if i else KEEP, compact=short, note=note)
        if sweep.baseline:
            yield Column(f"{task}\nΔ fp [95 %]", 30 + i, compact="\nΔ fp [95 %]")
            yield Column(f"{task}\np", 45 + i, compact="\np")


def _common_n(sweep: Sweep, task: str, metric: str) -> int | None:
    counts = {s.n for g in groups(sweep) if (s := score(g, task, metric))}
    return int(n) if len(counts) == 1 and (n := counts.pop()) is not None else None


def _tail_columns(sweep: Sweep) -> Iterator[Column]:
    if _known(sweep, "kl"):
        yield Column("KL\nnats", 25)
    for name in _shares_shown(sweep):
        title, compact, rank = _SHARES[name]
        yield Column(title, rank, compact=compact)
    if _truncation_known(sweep):
        yield Column("truncated\n% answers", 42, compact="trunc.\n%")
    yield Column("quantized\n% params", 70, compact="quant.\n%")
    yield Column("time\ns", 80)


def _shares_shown(sweep: Sweep) -> list[str]:
    return [name for name in _SHARES if _known(sweep, name)]


def _known(sweep: Sweep, figure: str) -> bool:
    return any(figure in r.fidelity for r in sweep.records)


def _truncation_known(sweep: Sweep) -> bool:
    return any(r.cost.get("truncated_share") is not None for r in sweep.records)


def _measured(sweep: Sweep, group: Group, task_metrics: dict[str, str]) -> Iterator[Cell]:
    reference = None if group.records[0] is sweep.baseline else sweep.baseline
    for task, metric in task_metrics.items():
        yield score_cell(score(group, task, metric), is_share(metric))
        if sweep.baseline:
            difference = delta(group, reference, task, metric)
            yield delta_cell(difference, metric)
            yield p_cell(difference)
    if _known(sweep, "kl"):
        yield kl_cell(fidelity(group, "kl"))
    for name in _shares_shown(sweep):
        yield replace(score_cell(fidelity(group, name), share=True), note="")
    if _truncation_known(sweep):
        yield number_cell(_cost(group, "truncated_share"), "{:.1f}", 100)
    yield number_cell(_cost(group, "quantized_share"), "{:.1f}", 100)
    time = _seconds(group)
    yield number_cell(time, "{:.1f}" if (time or 0) < 10 else "{:.0f}")


def _seconds(group: Group) -> float | int | None:
    """Calibration, quantization and evaluation of one run together."""
    known = [s for k in ("calibrate_s", "quantize_s", "evaluate_s") if (s := _cost(group, k)) is not None]
    return sum(known) if known else None


def _cost(group: Group, key: str) -> float | int | None:
    """A cost, mean over the group's seeds; None when no run recorded it."""
    known = [value for r in group.records if (value := r.cost.get(key)) is not None]
    return sum(known) / len(known) if known else None


class _InertNotes:
    """Footnote marks for switches without effect in a run."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def mark(self, group: Group, axis: str) -> str:
        reasons = [reason for r in group.records if (reason := inert_reason(r, axis))]
        if not reasons:
            return ""
        sentence = f"{axis} has no effect in this combination: {reasons[0]}"
        if sentence not in self.texts:
            self.texts.append(sentence)
        return self._sign(self.texts.index(sentence))

    def sentences(self) -> list[str]:
        return [f"{self._sign(i)} {text.rstrip('.')}." for i, text in enumerate(self.texts)]

    def _sign(self, index: int) -> str:
        return _MARKS[index] if index < len(_MARKS) else f"[{index + 1}]"


def _legend(sweep: Sweep, task_metrics: dict[str, str]) -> Iterator[str]:
    if task_metrics:
        yield "± is one standard error over the n problems; n stands in the column's title or in brackets."
    if most_seeds(sweep) > 1:
        yield (
            "x seeds: runs that differ in the seed only share a row. A problem's seeds are averaged first, "
            "so they add no problems; errors, intervals and p are about other problems, not other seeds."
        )
    if sweep.baseline and task_metrics:
        deltas = [delta(g, sweep.baseline, t, m) for g in groups(sweep) for t, m in task_metrics.items()]
        yield (
            "Δ fp: run − full precision on the same problems, [95 % bootstrap interval]. p: "
            + tests_used(sweep)
            + ", two-sided, not corrected for the number of runs; coloured where p < .05."
        )
        yield from doubtful(deltas)
        if any(d and not d.paired for d in deltas):
            yield "u: not paired (no common per-problem results), so its error is an upper estimate."
    elif task_metrics:
        yield "No full-precision reference was recorded, so there are no differences to it."
    yield from _fidelity_legend(sweep)
    if _truncation_known(sweep):
        yield "truncated: answers that filled the generated length without ending."


def other_metrics_table(sweep: Sweep) -> Table:
    """What published tasks report beside the metric they are judged by: GSM8K's second filter, acc beside
    acc_norm. Published scores seldom say which they are; chat models often answer without GSM8K's "#### n",
    which strict-match asks for. The embedded model's tasks have one form of answer and are left out."""
    others = [
        (task, metric)
        for task, judged_by in tasks(sweep).items()
        if not task.startswith("mini_")
        for metric in dict.fromkeys(m for r in all_records(sweep) for m in r.scores.get(task, {}))
        if metric != judged_by and is_share(metric)
    ]
    named = [("full precision", as_group(sweep.baseline))] if sweep.baseline else []
    named += [(label(g.axes, varying_axes(sweep)), g) for g in groups(sweep)]
    rows = []
    for name, group in named if others else []:
        reference = None if group.records[0] is sweep.baseline else sweep.baseline
        cells = [Cell(name)]
        for task, metric in others:
            cells += [score_cell(score(group, task, metric), share=True)]
            cells += [delta_cell(delta(group, reference, task, metric), metric)] if sweep.baseline else []
        rows.append(Row(tuple(cells), "reference" if group.records[0] is sweep.baseline else "run"))
    columns = [Column("run", KEEP, numeric=False)]
    for task, metric in others:
        columns += [Column(f"{task}\n{metric_title(metric)} %", KEEP)]
        columns += [Column(f"{task}\nΔ fp [95 %]", 30)] if sweep.baseline else []
    return Table("Other metrics of the same answers", tuple(columns), tuple(rows))


def _fidelity_legend(sweep: Sweep) -> Iterator[str]:
    prompts = f"; ± is over their {n} prompts" if (n := held_out_prompts(sweep)) else ""
    if _known(sweep, "kl"):
        yield (
            "KL: divergence of the run's token distributions from full precision's, at the masked positions "
            f"of held-out states of full precision's trajectory{prompts}."
        )
    if _known(sweep, "top1"):
        yield "top-1: share of those positions where both models have the same most likely token."
    if _known(sweep, "argmax_at_k"):
        yield (
            "argmax@k: the same share, of the k positions alone that full precision commits next in each of "
            "these states."
        )
    if _known(sweep, "final_agreement"):
        yield "final agreement: response positions with full precision's token, each model running freely."


# ---------------------------------------------------------------- cost


def cost_table(sweep: Sweep) -> Table:
    """Seconds, bytes and speed of one run of each group, means over its seeds."""
    varying = varying_axes(sweep)
    named = [("full precision", as_group(sweep.baseline))] if sweep.baseline else []
    named += [(label(g.axes, varying), g) for g in groups(sweep)]
    peak, weights = (
        byte_unit(_cost(group, key) for _, group in named) for key in ("peak_memory_bytes", "weight_bytes")
    )
    rows = []
    for name, group in named:
        cells = (
            Cell(name),
            _calibration_cell(group),
            *(number_cell(_cost(group, k), "{:.1f}") for k in ("quantize_s", "evaluate_s")),
            number_cell(_cost(group, "peak_memory_bytes"), "{:.1f}", 1 / peak[1]),
            number_cell(_cost(group, "weight_bytes"), "{:.2f}", 1 / weights[1]),
            number_cell(_cost(group, "quantized_share"), "{:.1f}", 100),
            number_cell(_cost(group, "tokens_per_second"), "{:.1f}"),
            number_cell(_cost(group, "forwards"), "{:,.0f}"),
        )
        rows.append(Row(cells, "reference" if group.records[0] is sweep.baseline else "run"))
    titles = ["run", "calibrate\ns", "quantize\ns", "evaluate\ns", f"peak memory\n{peak[0]}"]
    titles += [f"weights\n{weights[0]}", "quantized\n% params", "speed\ntokens/s", "forwards\n "]
    columns = tuple(Column(title, KEEP, numeric=title != "run") for title in titles)
    notes = [
        "Weights: as stored, quantized ones at their bit width with scales and zeros, all others, and full "
        "precision's, at 16 bits, also where the computation is in float32."
    ]
    notes += ["Each row is one run: the mean over its seeds."] if most_seeds(sweep) > 1 else []
    if any(cell.text == CACHED for row in rows for cell in row.cells):
        notes.append(
            f"{CACHED}: another run had computed the same calibration states; its time is what they cost."
        )
    return Table("Cost", columns, tuple(rows), tuple(notes))


def _calibration_cell(group: Group) -> Cell:
    """Seconds of the runs that computed their calibration states themselves, which is what they cost."""
    kept = [r for r in group.records if "states" not in r.notes.get("shared", {}).get("read", ())]
    if not kept:
        return Cell(CACHED, sort=0.0)
    return number_cell(_cost(as_group(*kept), "calibrate_s"), "{:.1f}")


def first_line(error: Any) -> str:
    """The first line that says something, of an error text or traceback's last line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].startswith("Traceback"):
        return lines[-1]
    return lines[0] if lines else "no error was recorded"

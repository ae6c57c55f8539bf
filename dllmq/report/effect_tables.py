"""The tables of differences: each switch in each cell, each switch on average, each setting.

effect of a switch    run - its twin (same cell, only that switch off), paired by problem and seed
effect of a setting   run - the run with the setting at its reference
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from dllmq.report.cells import delta_cell, doubtful, p_cell, p_text, runs_cell, signed, tests_used
from dllmq.report.compare import (
    Effect,
    MainEffect,
    effects,
    fidelity_delta,
    main_effects,
    relative_change,
)
from dllmq.report.groups import is_share, label, metric_title, most_seeds, tasks, varying_axes
from dllmq.report.results import Sweep
from dllmq.report.settings import setting_effects
from dllmq.report.table import EMPTY, KEEP, Cell, Column, Row, Table


def effects_table(sweep: Sweep) -> Table:
    """One row per group and switch that is on and has a twin: group - twin."""
    found, task_metrics = effects(sweep), tasks(sweep)
    columns = [Column("switch", KEEP, numeric=False), Column("added to", KEEP, numeric=False)]
    for i, (task, metric) in enumerate(task_metrics.items()):
        unit = ", points" if is_share(metric) else ""
        title = f"{task}\n{metric_title(metric)}{unit}"
        columns.append(Column(title, 10 + 2 * i if i else KEEP, compact=f"{task}\nΔ [95 %]"))
        columns.append(Column(f"{task}\np (Holm)", 11 + 2 * i, compact="Holm\np"))
    kl_p = any(e.kl and e.kl.p is not None for e in found)
    columns += [
        Column("KL\nnats", 30, compact="KL\nΔ nats"),
        *([Column("KL\np (Holm)", 40, compact="Holm\np")] if kl_p else []),
        Column("KL\nchange %", 50, compact="KL\nΔ %"),
        Column("top-1\npoints", 51),
    ]
    rows = tuple(Row(tuple(_effect_cells(sweep, e, task_metrics, kl_p))) for e in found)
    return Table("Effect of each switch", tuple(columns), rows, tuple(_effect_notes(sweep, found)))


def _effect_cells(sweep: Sweep, effect: Effect, task_metrics: dict[str, str], kl_p: bool) -> Iterator[Cell]:
    yield Cell(effect.toggle + (" (inert)" if effect.inert else ""))
    yield Cell(label(effect.twin.axes, varying_axes(sweep), without=effect.toggle))
    for task, metric in task_metrics.items():
        yield delta_cell(effect.deltas.get(task), metric)
        yield p_cell(effect.deltas.get(task))
    yield delta_cell(effect.kl, "kl")
    if kl_p:
        yield p_cell(effect.kl)
    change = relative_change(effect.group, effect.twin, "kl")
    yield EMPTY if change is None else Cell(signed(100 * change, 1), sort=change)
    top1 = fidelity_delta(effect.group, effect.twin, "top1")
    yield EMPTY if top1 is None else Cell(signed(100 * top1.value, 2), sort=top1.value)


def _effect_notes(sweep: Sweep, found: Sequence[Effect]) -> Iterator[str]:
    if not found:
        return
    matched = "problem and seed" if most_seeds(sweep) > 1 else "problem"
    yield f"Each row: the run with the switch on − its twin with only that switch off, paired by {matched}."
    p_scores = [d.p for e in found for d in e.deltas.values() if d.p is not None]
    p_kls = [e.kl.p for e in found if e.kl and e.kl.p is not None]
    if p_scores:
        yield (
            f"[95 % bootstrap interval], not corrected; p: {tests_used(sweep)}; in brackets after Holm's "
            f"correction for the {len(p_scores)} comparisons of scores in this table. Coloured where Holm's "
            "p < .05."
        )
    yield from doubtful([d for e in found for d in (*e.deltas.values(), e.kl)])
    if p_kls:
        yield (
            "KL: lower is closer to full precision; paired by held-out prompt, p by sign-flip permutation, "
            f"Holm's correction for its own {len(p_kls)} comparisons."
        )
    elif any(e.kl for e in found):
        yield "u: KL was not recorded per prompt, so it is not paired and its error is an upper estimate."


def main_effects_table(sweep: Sweep) -> Table:
    """What each switch changed on average over its twin pairs; no rows where no switch has two pairs."""
    found = main_effects(sweep)
    rows = tuple(Row(tuple(_main_effect_cells(e))) for e in found)
    columns = [Column("switch", KEEP, numeric=False), *_average_columns()]
    notes = (
        "A problem's differences (on − off) are averaged over the twin pairs and their seeds, then tested by "
        "sign-flip permutation: pairs add no problems.",
        "Over runs: mean ± standard error over the matched pairs of runs (in brackets), p by Student's t "
        "test over them. Low-bit quantization is chaotic: a weight's last digit moves scores, and "
        "problems alone cannot tell that from an effect.",
        "Placebo: pairs in which the switch has no effect (its weights are one constant), so what they show "
        "is that noise.",
        "Verdict: helps or hurts where p < .05 both over problems, after Holm's correction for all scores in "
        "this table (KL: for its own rows), and over runs; otherwise no difference shown, which is not the "
        "same as no difference.",
    )
    return Table("Effect of each switch on average", tuple(columns), rows, notes if rows else ())


def _main_effect_cells(effect: MainEffect) -> Iterator[Cell]:
    yield Cell(effect.toggle)
    yield from _average_cells(effect)


def settings_table(sweep: Sweep) -> Table:
    """What each setting changed against its reference; no rows where no setting varies."""
    found = setting_effects(sweep)
    rows = tuple(
        Row((Cell(e.axis), Cell(e.level), Cell(e.reference), *_average_cells(e.effect))) for e in found
    )
    columns = [
        Column("setting", KEEP, numeric=False),
        Column("value", KEEP, numeric=False),
        Column("instead of", KEEP, numeric=False, compact="for"),
        *_average_columns(),
    ]
    notes = (
        "value − what it replaces, everything else equal; statistics as for the switches.",
        "With few runs only a large difference can be shown: read the interval and the ± over runs. One run: "
        "a single pair, and nothing is known about another.",
    )
    return Table("Effect of each setting", tuple(columns), rows, notes if rows else ())


def _average_columns() -> list[Column]:
    return [
        Column("averaged over", KEEP, numeric=False, compact="over"),
        Column("pairs", 20),
        Column("measured on", KEEP, numeric=False),
        Column("Δ [95 %]", KEEP),
        Column("Holm p", 10),
        Column("over runs", 12),
        Column("runs p", 14),
        Column("verdict", KEEP, numeric=False),
    ]


def _average_cells(effect: MainEffect) -> Iterator[Cell]:
    unit = "nats" if effect.task == "KL" else "points" if is_share(effect.metric) else effect.metric
    shown = effect.verdict in ("helps", "hurts")
    over = "its inert pairs" if effect.placebo else effect.method or "all methods"
    yield Cell(over, compact="inert" if effect.placebo else effect.method or "all")
    yield Cell(str(effect.twins), sort=effect.twins)
    yield Cell(f"{effect.task}, {unit}")
    difference = delta_cell(effect.delta, effect.metric)
    yield difference if shown and not effect.placebo else replace(difference, tone="muted")
    p = effect.delta.p_holm
    yield EMPTY if p is None else Cell(p_text(p), sort=p)
    yield runs_cell(effect.runs, effect.metric)
    yield EMPTY if effect.runs.n == 1 else Cell(p_text(effect.runs_p), sort=effect.runs_p)
    compact = "not shown" if effect.verdict == "no difference shown" else effect.verdict
    yield Cell(effect.verdict, "" if shown or effect.placebo else "muted", compact=compact)

"""Approximate decoding: what a cache or a threshold saves, and what it costs against the exact process.

twin        of a group decoded with a cache or a threshold: the group that differs in these two only, or for
            full precision the sweep's reference
forwards    per answer, as if it had been decoded alone; a cached forward, over a slice of the canvas, is one
            (not Fast-dLLM's nfe, which counts more: diffusion/cache.py)
positions   per answer: token positions that all forwards computed, pads of the batch included
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dllmq.report.cells import delta_cell, doubtful, number_cell, p_cell, score_cell, tests_used
from dllmq.report.compare import Delta, delta, holm_corrected, matched
from dllmq.report.groups import (
    Group,
    as_group,
    groups,
    is_share,
    label,
    metric_title,
    score,
    tasks,
    varying_axes,
)
from dllmq.report.results import Sweep
from dllmq.report.table import EMPTY, KEEP, Cell, Column, Row, Table

AXES = ("cache", "threshold")
COSTS = ("forwards_per_answer", "positions_per_answer")


@dataclass(frozen=True)
class DecodingEffect:
    """A group minus its exactly decoded twin; p-values are Holm-corrected over all rows and tasks.

    Attributes:
        saved: cost -> how many times less of it than the twin; without those that were not recorded.
    """

    group: Group
    twin: Group
    deltas: dict[str, Delta]
    saved: dict[str, float]


def approximate(axes: dict[str, Any]) -> bool:
    """Whether a run's answers were decoded with a cache or a threshold."""
    return any(axes.get(name) not in (None, "none") for name in AXES)


def decoding_effects(sweep: Sweep) -> list[DecodingEffect]:
    """Every approximately decoded group that has a twin."""
    found = []
    for group in groups(sweep):
        if approximate(group.axes) and (twin := exact_twin(sweep, group)):
            deltas = {t: d for t, m in tasks(sweep).items() if (d := delta(group, _side(sweep, twin), t, m))}
            found.append(DecodingEffect(group, twin, deltas, _saved(group, twin)))
    corrected = iter(holm_corrected([d for e in found for d in e.deltas.values()]))
    return [replace(e, deltas={t: next(corrected) for t in e.deltas}) for e in found]


def exact_twin(sweep: Sweep, group: Group) -> Group | None:
    """The group with cache and threshold off and everything else equal; None when there is none.

    Of full precision it is the sweep's reference, where this is the runs' own.
    """
    reference = sweep.baseline
    if group.axes.get("method") == "fp" and reference is not None:
        return as_group(reference) if matched(group, reference) else None
    wanted = _without(group.axes)
    matches = [g for g in groups(sweep) if not approximate(g.axes) and _without(g.axes) == wanted]
    return matches[0] if len(matches) == 1 else None


def _side(sweep: Sweep, twin: Group) -> Any:
    """What `delta` subtracts: full precision stands against every seed."""
    return sweep.baseline if twin.records[0] is sweep.baseline else twin


def _without(axes: dict[str, Any]) -> dict[str, Any]:
    off = (None, False)
    return {k: v for k, v in axes.items() if k not in AXES and v not in off}


def _saved(group: Group, twin: Group) -> dict[str, float]:
    pairs = {name: (_cost(group, name), _cost(twin, name)) for name in COSTS}
    return {name: exact / own for name, (own, exact) in pairs.items() if own and exact}


def _cost(group: Group, name: str) -> float | None:
    """Mean over the group's runs; None unless all recorded it."""
    values = [r.cost.get(name) for r in group.records]
    known = [float(v) for v in values if v is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(values) else None


# ---------------------------------------------------------------- table


def decoding_table(sweep: Sweep) -> Table:
    """Each exact twin, below it the runs that approximate it; no rows where nothing is approximate."""
    found, task_metrics = decoding_effects(sweep), tasks(sweep)
    columns = [Column("decoding", KEEP, numeric=False)]
    for i, (task, metric) in enumerate(task_metrics.items()):
        unit = " %" if is_share(metric) else ""
        columns.append(Column(f"{task}\n{metric_title(metric)}{unit}", 20 + i, compact=task))
        columns.append(Column(f"{task}\nΔ exact [95 %]", 10 + i if i else KEEP, compact="\nΔ exact"))
        columns.append(Column(f"{task}\np (Holm)", 30 + i, compact="Holm\np"))
    columns += [
        Column("forwards\nper answer", KEEP),
        Column("times\nfewer", KEEP),
        Column("positions\nper answer", 40),
        Column("times\nfewer", 41),
    ]
    rows = tuple(_rows(sweep, found, task_metrics))
    return Table("Approximate decoding", tuple(columns), rows, tuple(_notes(sweep, found)))


def _rows(sweep: Sweep, found: Sequence[DecodingEffect], task_metrics: dict[str, str]) -> Iterator[Row]:
    shown: list[Group] = []
    varying = [*(name for name in varying_axes(sweep) if name not in AXES), *AXES]
    for effect in found:
        if effect.twin not in shown:
            shown.append(effect.twin)
            same = [e for e in found if e.twin == effect.twin]
            name = label(effect.twin.axes, varying)
            yield Row((Cell(f"{name}, exact"), *_cells(effect.twin, None, task_metrics)), "reference")
            for own in same:
                name = label(own.group.axes, varying)
                yield Row((Cell(name), *_cells(own.group, own, task_metrics)))


def _cells(group: Group, effect: DecodingEffect | None, task_metrics: dict[str, str]) -> Iterator[Cell]:
    for task, metric in task_metrics.items():
        yield score_cell(score(group, task, metric), is_share(metric))
        yield delta_cell(effect.deltas.get(task) if effect else None, metric)
        yield p_cell(effect.deltas.get(task) if effect else None)
    for name in COSTS:
        yield number_cell(_cost(group, name), "{:,.1f}" if name == COSTS[0] else "{:,.0f}")
        saved = effect.saved.get(name) if effect else None
        yield EMPTY if saved is None else Cell(f"{saved:.2f}", sort=saved)


def _notes(sweep: Sweep, found: Sequence[DecodingEffect]) -> Iterator[str]:
    if not found:
        return
    yield (
        "Δ exact: run − the run that differs in cache and threshold only, on the same problems, "
        f"[95 % bootstrap interval]; p: {tests_used(sweep)}, in brackets after Holm's correction for all "
        "comparisons in this table. Coloured where Holm's p < .05. Calibration, KL and the other fidelity "
        "figures are of the exact process in every row."
    )
    yield from doubtful([d for e in found for d in e.deltas.values()])
    yield (
        "forwards per answer: denoising steps the answer took part in, as if decoded alone; with a cache "
        "most of them compute a slice of the canvas. positions: what all forwards computed, pads included."
    )

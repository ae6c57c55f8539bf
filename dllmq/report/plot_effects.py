"""What each switch changed, as a difference with its 95 % interval against zero."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from matplotlib.axes import Axes

from dllmq.report.compare import Delta, Effect, MainEffect, effects, main_effects
from dllmq.report.groups import is_share, lower_is_better, tasks
from dllmq.report.plot_points import headed, row_figure
from dllmq.report.plot_style import INK, PALETTE, PAPER, Drawing, short, slug
from dllmq.report.results import Sweep

Rows = list[tuple[str, str, Delta]]  # switch, method ("all methods": the mean over them), difference


def effect_figures(sweep: Sweep) -> Iterator[Drawing]:
    """One figure per task and one for KL: a row per switch and method."""
    averaged, single = main_effects(sweep), [e for e in effects(sweep) if not e.inert]
    for i, (task, metric) in enumerate((*tasks(sweep).items(), ("KL", "kl"))):
        if rows := _rows(averaged, single, task):
            figure, axis = row_figure([f"{toggle}: {method}" for toggle, method, _ in rows], 0.6)
            _draw(axis, rows, 100 if is_share(metric) else 1)
            headed(figure, f"Δ {task}" if metric != "kl" else "Δ KL to full precision")
            unit = "points" if is_share(metric) else "nats" if metric == "kl" else short(metric, 20)
            axis.set_xlabel(f"{unit}, {'left' if lower_is_better(metric) else 'right'} of zero is better")
            yield Drawing(f"effect-{i}-{slug(task)}", _caption(metric, rows), figure, "effects")


def _rows(main: list[MainEffect], single: list[Effect], task: str) -> Rows:
    """Main effects; a method with a single twin pair has that pair's effect as its row."""
    rows: Rows = []
    for toggle in dict.fromkeys(e.toggle for e in single):
        of_toggle = [e for e in main if (e.toggle, e.task) == (toggle, task)]
        averaged = {e.method: _shown(e) for e in of_toggle if not e.placebo}
        own: dict[str, list[Delta | None]] = {}
        for e in single:
            if e.toggle == toggle:
                found = e.kl if task == "KL" else e.deltas.get(task)
                own.setdefault(str(e.group.axes.get("method")), []).append(found)
        if None in averaged:
            rows.append((toggle, "all methods" if len(own) > 1 else next(iter(own)), averaged[None]))
        for method, deltas in own.items():
            delta = averaged.get(method) or (deltas[0] if len(deltas) == 1 else None)
            if delta is not None:
                rows.append((toggle, method, delta))
        rows += [(toggle, "placebo", _shown(e)) for e in of_toggle if e.placebo]
    return rows


def _shown(effect: MainEffect) -> Delta:
    """The difference, its p that of the verdict."""
    return effect.delta if effect.verdict in ("helps", "hurts") else replace(effect.delta, p_holm=1.0)


def _draw(axis: Axes, rows: Rows, scale: int) -> None:
    colors = {toggle: PALETTE[i % len(PALETTE)] for i, toggle in enumerate(dict.fromkeys(r[0] for r in rows))}
    axis.axvline(0, color=INK, linewidth=1.1)
    for y, (toggle, method, d) in enumerate(rows):
        color = colors[toggle]
        width = 2.4 if method == "all methods" else 1.4
        if d.low is not None and d.high is not None:
            axis.hlines(y, scale * d.low, scale * d.high, color=color, linewidth=width)
        elif d.stderr is not None:
            low, high = d.value - 2 * d.stderr, d.value + 2 * d.stderr
            axis.hlines(y, scale * low, scale * high, color=color, linewidth=width, linestyle=":")
        axis.plot(
            scale * d.value, y, marker="o", markersize=5, markeredgecolor=color,
            markerfacecolor=color if d.clear else PAPER,
        )  # fmt: skip


def _caption(metric: str, rows: Rows) -> str:
    what = "prompt" if metric == "kl" else "problem"
    text = f"Switch on − off, paired by {what}, with the 95 % bootstrap interval over {what}s."
    if any(d.low is None for _, _, d in rows):
        text += f" Dotted: two standard errors where no values per {what} were recorded."
    if any(method == "placebo" for _, method, _ in rows):
        text += " Placebo: pairs in which the switch is inert."
    return text + " Filled: p < 0.05 after Holm's correction, and over runs where there are several."

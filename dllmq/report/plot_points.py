"""Figures with one point per group of runs: task scores, and what quality costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from dllmq.report.groups import Group, Mean, as_group, fidelity, groups, is_share, metric_title, score, tasks
from dllmq.report.plot_style import (
    FAINT,
    INK,
    NARROW,
    Drawing,
    Line,
    cut_note,
    figure_with,
    legend,
    lines_of,
    seeds_note,
    short,
    slug,
    value_axis,
)
from dllmq.report.results import RunRecord, Sweep
from dllmq.report.words import byte_unit, folded


@dataclass(frozen=True)
class Point:
    """Mean over seeds of a number, its range over seeds, and one standard error over problems or prompts."""

    value: float | int
    low: float | int
    high: float | int
    stderr: float | int = 0.0


def _point(mean: Mean | None, scale: float | int = 1) -> Point | None:
    if mean is None:
        return None
    low, high = min(mean.per_seed), max(mean.per_seed)
    return Point(scale * mean.value, scale * low, scale * high, scale * (mean.stderr or 0.0))


def _score(group: Group, task: str, metric: str) -> Point | None:
    """In percent where the metric is a share."""
    return _point(score(group, task, metric), 100 if is_share(metric) else 1)


# ---------------------------------------------------------------- scores


def score_figures(sweep: Sweep) -> Iterator[Drawing]:
    """One figure per task: every group's score, full precision as a line."""
    lines = lines_of(sweep)
    note = seeds_note(sweep, "the thick bar goes") + cut_note(sweep)
    for i, (task, metric) in enumerate(tasks(sweep).items()):
        data = [(line, p) for line in lines if (p := _score(line.group, task, metric))]
        if data:
            figure, axis = row_figure([line.label for line, _ in data])
            reference = _score(as_group(sweep.baseline), task, metric) if sweep.baseline else None
            _draw_scores(axis, data, reference)
            headed(figure, task)
            axis.set_xlabel(short(metric_title(metric, ", "), 30) + " %" * is_share(metric))
            counts = {s.n for line, _ in data if (s := score(line.group, task, metric)) and s.n}
            n = f" (n = {counts.pop():,.0f})".replace(",", " ") if len(counts) == 1 else ""
            caption = f"± one standard error over problems{n}; the line and its band are full precision."
            yield Drawing(f"score-{i}-{slug(task)}", caption + note, figure, "scores")


def _draw_scores(axis: Axes, data: list[tuple[Line, Point]], reference: Point | None) -> None:
    for y, (line, p) in enumerate(data):
        if p.low != p.high:
            axis.hlines(y, p.low, p.high, color=line.color, alpha=0.3, linewidth=7)
        axis.errorbar(
            p.value, y, xerr=p.stderr, ecolor=line.color, elinewidth=1.5, capsize=2.5, **line.marker()
        )
    if reference is None:
        return
    value, error = reference.value, reference.stderr
    axis.axvspan(value - error, value + error, color=FAINT, alpha=0.45, linewidth=0)
    axis.axvline(value, color=INK, linewidth=1.1)
    low, high = axis.get_xlim()
    side = ("right", -4) if value > (low + high) / 2 else ("left", 4)
    axis.annotate(
        "full precision", (value, -0.75), xytext=(side[1], 0), textcoords="offset points", fontsize=8,
        ha=side[0], va="center",
    )  # fmt: skip


def row_figure(names: list[str], top: float = 1.2) -> tuple[Figure, Axes]:
    """A narrow figure with one named row per point, `top` rows of room above the first; no name is cut."""
    names = [folded(name, 26) for name in names]
    row = 0.1 + 0.14 * max(name.count("\n") + 1 for name in names)
    figure, (axis,) = figure_with(1, 0.95 + row * (len(names) + top - 0.2), NARROW)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -top)
    axis.grid(False, axis="y")
    axis.tick_params(axis="y", length=0)
    axis.xaxis.set_major_locator(MaxNLocator(5))
    return figure, axis


def headed(figure: Figure, text: str) -> None:
    """From the figure's left edge on: names left of the axes leave it little room."""
    figure.suptitle(short(text, 42), x=0.01, ha="left")


# ---------------------------------------------------------------- cost


def cost_figures(sweep: Sweep) -> Iterator[Drawing]:
    """Quality (KL, else the first task's score) against bytes and seconds that vary by more than 5 %."""
    lines = lines_of(sweep)
    what, share, quality = _quality(sweep)
    unit, size = byte_unit(_weight_bytes(line.group.records[0]) for line in lines)
    for name, of, title, cost, scale in (
        (
            "cost-weights",
            f"weights at their true bit width, {unit}",
            "Quality and size",
            _weight_bytes,
            1 / size,
        ),
        ("cost-seconds", "calibration and quantization, s", "Quality and time", _seconds, 1),
    ):
        found = [(line, _over_seeds(line.group, cost, scale), quality(line.group)) for line in lines]
        data = [(line, x, y) for line, x, y in found if x and y]
        sizes = [x.value for _, x, _ in data]
        if data and max(sizes) > 1.05 * min(sizes):
            figure, (axis,) = figure_with(1, 3.0)
            _draw_cost(axis, data)
            axis.set_title(title)
            axis.set_xlabel(of)
            if share:
                axis.set_ylabel(what)
            else:
                value_axis(axis, [y.value for _, _, y in data], what, log=True)
            legend(figure, _cost_handles([line for line, _, _ in data]), 1.0)
            best = "Upper" if share else "Lower"
            note = seeds_note(sweep, "the bars go") + cut_note(sweep)
            yield Drawing(
                name, f"{best} left is better: closer to full precision for less.{note}", figure, "cost"
            )


def _draw_cost(axis: Axes, data: list[tuple[Line, Point, Point]]) -> None:
    """A point that others lie upon is drawn larger, as a ring around them."""
    spots = [(f"{x.value:.3g}", f"{y.value:.3g}") for _, x, y in data]
    for i, (line, x, y) in enumerate(data):
        axis.plot([x.low, x.high], [y.value] * 2, color=line.color, linewidth=1.2, alpha=0.6)
        axis.plot([x.value] * 2, [y.low, y.high], color=line.color, linewidth=1.2, alpha=0.6)
        above = min(spots[i + 1 :].count(spots[i]), 4)
        looks = line.marker(line.shape) | {"markersize": 4.5 + 2.5 * above}
        axis.plot(x.value, y.value, linestyle="none", **looks)
    axis.xaxis.set_major_locator(MaxNLocator(6))


def _cost_handles(lines: list[Line]) -> list[Line2D]:
    """One entry per line; where lines have panels elsewhere, one per key and one per panel's shape."""
    handles = {line.key: Line2D([], [], label=line.key, linestyle="none", **line.marker()) for line in lines}
    for line in lines:
        if line.panel:
            handles[f"panel {line.panel}"] = Line2D(
                [], [], label=line.panel, marker=line.shape, markersize=4.5, color=INK,
                linestyle="none",
            )  # fmt: skip
    return list(handles.values())


def _weight_bytes(record: RunRecord) -> float | int | None:
    return record.cost.get("weight_bytes")


def _seconds(record: RunRecord) -> float | int | None:
    parts = [s for k in ("calibrate_s", "quantize_s") if (s := record.cost.get(k)) is not None]
    return sum(parts) if parts else None


def _over_seeds(
    group: Group, number: Callable[[RunRecord], float | int | None], scale: float | int
) -> Point | None:
    known = [scale * x for record in group.records if (x := number(record)) is not None]
    return Point(fmean(known), min(known), max(known)) if known else None


def _quality(sweep: Sweep) -> tuple[str, bool, Callable[[Group], Point | None]]:
    """(name of the y axis, whether more is better, a group's value): KL, else the first task's score."""
    if any(fidelity(g, "kl") for g in groups(sweep)) or not tasks(sweep):
        return "KL, nats", False, lambda group: _point(fidelity(group, "kl"))
    task, metric = next(iter(tasks(sweep).items()))
    unit = " %" if is_share(metric) else ""
    return f"{short(task, 24)}{unit}", True, lambda group: _score(group, task, metric)

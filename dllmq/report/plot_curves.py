"""Where the error arises: along the denoising trajectory, by mask ratio, by transformer block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from dllmq.report.groups import Group, held_out_prompts
from dllmq.report.plot_style import (
    Drawing,
    Line,
    cut_note,
    figure_with,
    legend,
    lines_of,
    percent,
    seeds_note,
    short,
    value_axis,
)
from dllmq.report.results import Sweep

MAX_POINTS = 64  # of a line; a longer curve is averaged over neighbouring steps
Points = dict[float | int, list[float | int]]  # x -> one value per seed


@dataclass(frozen=True)
class _Curve:
    """A recorded curve and how it is drawn. `share` values are shown in percent."""

    name: str  # in RunRecord.curves
    title: str
    unit: str
    caption: str
    share: bool = False
    log: bool = False  # allowed


_FORCED = " Teacher-forced on held-out states of full precision's trajectory."
_CURVES = (
    _Curve("kl_by_step", "KL per denoising step", "KL, nats",
           "KL divergence of the masked positions' distributions from full precision's." + _FORCED, log=True),
    _Curve("argmax_at_k_by_step", "argmax@k per denoising step", "same token, %",
           "Positions about to be committed: same token as full precision." + _FORCED, share=True),
    _Curve("hidden_error_by_step", "Hidden-state error per denoising step", "relative L2",
           "Relative L2 error of the block outputs, mean over blocks." + _FORCED),
    _Curve("divergence_by_step", "Free-running divergence per step", "differing positions, %",
           "Response positions that differ from full precision's own trajectory after that step; both models "
           "run freely, so errors add up.", share=True),
    _Curve("hidden_error_by_block", "Hidden-state error by block", "relative L2",
           "Relative L2 error of each transformer block's output, mean over states." + _FORCED),
    _Curve("kl_by_mask_ratio", "KL by mask ratio", "KL, nats",
           "KL divergence by how much of the response is still masked." + _FORCED),
    _Curve("top1_by_mask_ratio", "Top-1 agreement by mask ratio", "same token, %",
           "Masked positions whose most likely token is full precision's." + _FORCED, share=True),
    _Curve("argmax_at_k_by_mask_ratio", "argmax@k by mask ratio", "same token, %",
           "Positions about to be committed: same token as full precision." + _FORCED, share=True),
    _Curve("slots_at_k_by_mask_ratio", "slots@k by mask ratio", "same positions, %",
           "Positions about to be committed that full precision would commit too." + _FORCED, share=True),
)  # fmt: skip


def curve_figures(sweep: Sweep) -> Iterator[Drawing]:
    """One figure per recorded curve; runs without it are not in the figure."""
    lines = lines_of(sweep)
    prompts = f" n = {n} prompts." if (n := held_out_prompts(sweep)) else ""
    note = prompts + seeds_note(sweep, "the band goes") + cut_note(sweep)
    for curve in _CURVES:
        data = [(line, points) for line in lines if (points := points_of(line.group, curve.name))]
        if data:
            width = -(-max(len(points) for _, points in data) // MAX_POINTS)
            what = f" Each point is the mean of {width} steps." if width > 1 else ""
            data = [(line, _binned(points, width)) for line, points in data]
            name = curve.name.replace("_", "-")
            yield Drawing(name, curve.caption + what + note, _draw(curve, data), "curves")


def points_of(group: Group, name: str) -> Points:
    """A curve's points with the values of all seeds, nulls left out; empty where it was not recorded."""
    points: Points = {}
    for record in group.records:
        curve = record.curves.get(name, {"step": [], "value": []})
        for step, value in zip(curve["step"], curve["value"], strict=True):
            if step is not None and value is not None:
                points.setdefault(step, []).append(value)
    return dict(sorted(points.items()))


def _binned(points: Points, width: int) -> Points:
    """Every seed's mean over `width` neighbouring steps, at the first of them; nulls make bins uneven."""
    if width == 1:
        return points
    steps = list(points)
    bins = [steps[i : i + width] for i in range(0, len(steps), width)]
    return {b[0]: [fmean(seed) for seed in zip(*(points[step] for step in b), strict=False)] for b in bins}


def _draw(curve: _Curve, data: list[tuple[Line, Points]]) -> Figure:
    panels = list(dict.fromkeys(line.panel for line, _ in data))
    figure, axes = figure_with(len(panels), 2.9 if len(panels) == 1 else 2.1)
    for axis, panel in zip(axes, panels, strict=True):
        for line, points in data:
            if line.panel == panel:
                _plot(axis, line, points, marks=len(data) / len(panels) <= 8)
        if panel:
            axis.set_title(short(panel, 24), loc="right", fontweight="normal")
    axes[0].set_title(curve.title, loc="left")
    _x_axis(axes, curve, data)
    values = [v for _, points in data for seeds in points.values() for v in seeds]
    for axis in axes:
        _y_axis(axis, curve, values)
    handles = {line.key: Line2D([], [], label=line.key, **line.line()) for line, _ in data}
    legend(figure, list(handles.values()))
    return figure


def _plot(axis: Axes, line: Line, points: Points, marks: bool) -> None:
    x, mean = list(points), [fmean(seeds) for seeds in points.values()]
    every = max(1, len(x) // 8) if marks else len(x)
    axis.plot(x, mean, markevery=every, **line.line())
    low, high = ([f(seeds) for seeds in points.values()] for f in (min, max))
    if low != high:
        axis.fill_between(x, low, high, color=line.color, alpha=0.16, linewidth=0)


def _y_axis(axis: Axes, curve: _Curve, values: list[float | int]) -> None:
    if not curve.share:
        value_axis(axis, values, curve.unit, curve.log)
        return
    axis.set_ylabel(curve.unit)
    axis.yaxis.set_major_formatter(percent)
    axis.yaxis.set_major_locator(MaxNLocator(5))
    if curve.name == "divergence_by_step":
        axis.set_ylim(bottom=0)


# ---------------------------------------------------------------- x axes


def _x_axis(axes: list[Axes], curve: _Curve, data: list[tuple[Line, Points]]) -> None:
    last, steps = axes[-1], sorted({step for _, points in data for step in points})
    if curve.name.endswith("_by_mask_ratio"):
        last.set_xticks(steps, _block_names(steps))
        last.set_xlabel("share of the response still masked")
        last.set_xlim(steps[0] - 0.2, steps[-1] + 0.2)
        return
    last.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    if curve.name.endswith("_by_block"):
        last.set_xlabel("transformer block")
        return
    ratios = _mask_ratios(data)
    last.set_xlabel("denoising step" if ratios else "denoising step (early: almost all masked)")
    if ratios:
        _second_axis(axes[0], ratios)


def _mask_ratios(data: list[tuple[Line, Points]]) -> dict[float | int, float]:
    """Step -> mean mask ratio of full precision's trajectory; empty where lines differ in their steps."""
    recorded = [points_of(line.group, "divergence_mask_ratio_by_step") for line, _ in data]
    if not all(points.keys() == recorded[0].keys() for points in recorded):
        return {}
    return {step: fmean(seeds) for step, seeds in recorded[0].items()}


def _second_axis(axis: Axes, ratios: dict[float | int, float]) -> None:
    """The mask ratio along the top, at up to six of the steps."""
    steps = list(ratios)
    ticks = [steps[round(i * (len(steps) - 1) / 5)] for i in range(6)] if len(steps) > 6 else steps
    top = axis.secondary_xaxis("top")
    top.set_xticks(ticks, [f"{100 * ratios[t]:.0f}" for t in ticks])
    top.set_xlabel("response still masked, %", fontsize=8.5)


def _block_names(blocks: list[float | int]) -> list[str]:
    """Whole numbers are equal blocks of the mask ratio, 0 = most masked; others are the ratio itself."""
    if any(float(b) != int(b) for b in blocks):
        return [f"{100 * b:.0f} %" for b in blocks]
    count = int(max(blocks)) + 1
    return [f"{100 * (1 - b / count):.0f}–{100 * (1 - (b + 1) / count):.0f} %" for b in blocks]

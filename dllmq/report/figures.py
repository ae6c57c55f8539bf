"""The figures of a sweep, drawn with matplotlib and no display.

Figures are at most 4.8 inches wide, so their 9-point text is still readable when a phone scales them. A run
keeps its colour, marker and dash in every figure. Colours are Okabe and Ito's, which colour-blind readers
tell apart; the dash and the filling of the marker say the same thing again.

SVG output is deterministic (fixed hash salt, no date) and its ids carry the figure's name, so that several
figures can share a page. With `themed=True` the colours become CSS variables with the same colour as the
fallback, and the page's dark mode reaches into the figure.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullFormatter

from dllmq.report.compare import curve, is_share, label, tasks, varying_axes, varying_toggles
from dllmq.report.results import RunRecord, Sweep

WIDTH, NARROW = 4.8, 3.8  # inches
MAX_RUNS = 24  # beyond this a figure shows the first ones and says so
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#8c8c00")
INK, FAINT, PAPER = "#1b1f24", "#c9ced6", "#fefefe"
DASHES: tuple[tuple[float | int, ...], ...] = ((), (4, 2), (1.2, 1.5), (6, 1.5, 1.2, 1.5))
_RC: dict[Any, Any] = {
    "svg.hashsalt": "dllmq",
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "savefig.facecolor": PAPER,
}


@dataclass(frozen=True)
class Drawing:
    """A figure with its name (file stem and id prefix) and the sentence that says what it shows."""

    name: str
    caption: str
    figure: Figure


@dataclass(frozen=True)
class _Style:
    label: str
    color: str
    dashes: tuple[float | int, ...]
    filled: bool

    def line(self) -> dict:
        return {"color": self.color, "dashes": self.dashes, "linewidth": 1.6, **self.marker()}

    def marker(self) -> dict:
        face = self.color if self.filled else PAPER
        return {"marker": "o", "markersize": 4.5, "markerfacecolor": face, "markeredgecolor": self.color}


def draw(sweep: Sweep) -> list[Drawing]:
    """Every figure the sweep has data for."""
    with matplotlib.rc_context(_RC):
        drawings = [_kl_by_step(sweep), _kl_by_mask_ratio(sweep), *_scores(sweep)]
    return [drawing for drawing in drawings if drawing]


def _styles(sweep: Sweep) -> list[tuple[RunRecord, _Style]]:
    """What there is more of (cells, or combinations of switches) gets the colours, the other the dashes."""
    toggles, varying = varying_toggles(sweep), varying_axes(sweep)
    plain = [k for k in varying if k not in toggles]
    cells = [tuple(str(r.axes.get(k)) for k in ["method", *plain]) for r in sweep.records]
    switches = [tuple(r.axes.get(k) is True for k in toggles) for r in sweep.records]
    by_color, by_dash = (cells, switches) if len(set(cells)) >= len(set(switches)) else (switches, cells)
    colors, dashes = _index(by_color), _index(by_dash)
    styles = []
    for record, color_key, dash_key, on in zip(sweep.records, by_color, by_dash, switches, strict=True):
        color = PALETTE[colors[color_key] % len(PALETTE)]
        # the runs with switches on are drawn solid, so the plain baseline of a colour is the dashed one
        dash = DASHES[(len(dashes) - 1 - dashes[dash_key]) % len(DASHES)]
        styles.append(
            (record, _Style(_short(label(record.axes, varying), 36), color, dash, any(on) or not toggles))
        )
    return styles[:MAX_RUNS]


def _index(keys: list) -> dict:
    return {key: i for i, key in enumerate(dict.fromkeys(keys))}


# ---------------------------------------------------------------- the figures


def _kl_by_step(sweep: Sweep) -> Drawing | None:
    lines = [(s, c) for r, s in _styles(sweep) if (c := curve(r, "kl", by_mask_ratio=False))]
    if not lines:
        return None
    figure, ax = _figure("KL to full precision per denoising step", 3.3)
    for style, (steps, values) in lines:
        marks: list[int] | int = [] if len(lines) > 8 else max(1, len(steps) // 12)
        ax.plot(steps, values, markevery=marks, **style.line())
    ax.set_xlabel("denoising step (early: almost all masked)")
    _kl_axis(ax, [v for _, (_, values) in lines for v in values])
    _legend(figure, ax, [style for style, _ in lines])
    return Drawing(
        "kl-by-step", "Where along the denoising trajectory the error arises." + _cut(sweep), figure
    )


def _kl_by_mask_ratio(sweep: Sweep) -> Drawing | None:
    groups = [(s, c) for r, s in _styles(sweep) if (c := curve(r, "kl", by_mask_ratio=True))]
    if not groups:
        return None
    figure, ax = _figure("KL to full precision by share of masked tokens", 3.3)
    blocks = sorted({step for _, (steps, _) in groups for step in steps})
    for i, (style, (steps, values)) in enumerate(groups):
        offset = 0.72 * ((i + 0.5) / len(groups) - 0.5)
        x = [blocks.index(step) + offset for step in steps]
        ax.vlines(x, 0, values, color=style.color, linewidth=1.6)
        ax.plot(x, values, linestyle="none", **style.marker())
    ax.set_xticks(range(len(blocks)), _block_names(blocks))
    ax.grid(False, axis="x")
    ax.set_xlabel("share of the response still masked")
    _kl_axis(ax, [v for _, (_, values) in groups for v in values], log=False)
    _legend(figure, ax, [style for style, _ in groups], dashes=False)
    return Drawing(
        "kl-by-mask-ratio", "Error by how much of the response is still masked." + _cut(sweep), figure
    )


def _block_names(blocks: list[float | int]) -> list[str]:
    """Whole numbers are equal blocks of the mask ratio, 0 = most masked; others are the ratio itself."""
    if any(float(b) != int(b) for b in blocks):
        return [f"{100 * b:.0f} %" for b in blocks]
    count = int(max(blocks)) + 1
    return [f"{100 * (1 - b / count):.0f}–{100 * (1 - (b + 1) / count):.0f} %" for b in blocks]


def _scores(sweep: Sweep) -> Iterator[Drawing]:
    for i, (task, metric) in enumerate(tasks(sweep).items()):
        runs = [(s, e) for r, s in _styles(sweep) if (e := _score(r, task, metric))]
        if runs:
            yield _score_figure(sweep, f"score-{i}-{_slug(task)}", task, metric, runs)


def _score(record: RunRecord | None, task: str, metric: str) -> tuple[float | int, float | int] | None:
    estimate = record.scores.get(task, {}).get(metric) if record else None
    if not estimate or estimate["value"] is None:
        return None
    scale = 100 if is_share(metric) else 1
    return scale * estimate["value"], scale * (estimate["stderr"] or 0.0)


def _score_figure(sweep: Sweep, name: str, task: str, metric: str, runs: list) -> Drawing:
    figure, ax = _figure(f"{task}: {metric.removesuffix(',none')}", 0.95 + 0.25 * (len(runs) + 1), NARROW)
    for y, (style, (value, error)) in enumerate(runs):
        ax.errorbar(value, y, xerr=error, ecolor=style.color, elinewidth=1.6, capsize=2.5, **style.marker())
    ax.set_yticks(range(len(runs)), [_short(style.label, 24) for style, _ in runs])
    ax.set_ylim(len(runs) - 0.5, -0.9)
    ax.grid(False, axis="y")
    ax.tick_params(axis="y", length=0)
    if reference := _score(sweep.baseline, task, metric):
        value, error = reference
        ax.axvspan(value - error, value + error, color=FAINT, alpha=0.45, linewidth=0)
        ax.axvline(value, color=INK, linewidth=1.1)
        low, high = ax.get_xlim()
        side = ("right", -4) if value > (low + high) / 2 else ("left", 4)
        ax.annotate(
            "full precision", (value, -0.6), xytext=(side[1], 0), textcoords="offset points", fontsize=8,
            ha=side[0], va="center",
        )  # fmt: skip
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.set_xlabel("%" if is_share(metric) else _short(metric, 30))
    caption = "± one standard error; the line and its band are full precision." + _cut(sweep)
    return Drawing(name, caption, figure)


# ---------------------------------------------------------------- parts


def _figure(title: str, height: float, width: float = WIDTH) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.add_subplot()
    ax.set_title(_short(title, 52 if width == WIDTH else 38))
    return figure, ax


def _kl_axis(ax: Axes, values: list[float | int], log: bool = True) -> None:
    positive = [v for v in values if v > 0]
    if log and positive and len(positive) == len(values) and max(positive) > 50 * min(positive):
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")  # powers of ten would need mathtext
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.set_ylabel("KL, nats (log scale)")
    else:
        ax.set_ylim(bottom=0)
        ax.set_ylabel("KL, nats")


def _legend(figure: Figure, ax: Axes, styles: list[_Style], dashes: bool = True) -> None:
    """Below the axes, where it covers no data."""
    handles = [
        Line2D([], [], label=s.label, **(s.line() if dashes else {"linestyle": "none", **s.marker()}))
        for s in styles
    ]
    columns = 2 if max(len(s.label) for s in styles) <= 26 else 1
    figure.legend(
        handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=8.5,
        handlelength=2.6 if dashes else 1.0,
    )  # fmt: skip
    height = figure.get_figheight() + 0.19 * -(-len(styles) // columns)
    figure.set_figheight(height)


def _cut(sweep: Sweep) -> str:
    more = len(sweep.records) - MAX_RUNS
    return f" The first {MAX_RUNS} runs; {more} more are in the table." if more > 0 else ""


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "figure"


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


# ---------------------------------------------------------------- output


def to_svg(drawing: Drawing, themed: bool = False) -> str:
    """One <svg> element, no XML prologue; ids prefixed by the drawing's name, the same bytes every time."""
    buffer = io.StringIO()
    with matplotlib.rc_context(_RC):
        drawing.figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{drawing.name}-\1"', svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{drawing.name}-", svg)
    head = f'<svg role="img" aria-label="{escape(drawing.caption)}"'
    svg = svg.replace("<svg", head, 1)
    return _themed(svg) if themed else svg


def _themed(svg: str) -> str:
    names = {INK: "ink", FAINT: "line", PAPER: "paper", **{c: f"s{i}" for i, c in enumerate(PALETTE)}}
    pattern = re.compile("|".join(names))
    return pattern.sub(lambda m: f"var(--{names[m.group()]}, {m.group()})", svg)


def write_png(drawing: Drawing, folder: str | Path, dpi: int = 200) -> Path:
    """Write the drawing as <folder>/<name>.png (light colours), for a README."""
    path = Path(folder) / f"{drawing.name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(_RC):
        drawing.figure.savefig(path, format="png", dpi=dpi, metadata={"Software": None})
    return path

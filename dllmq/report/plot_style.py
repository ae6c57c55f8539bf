"""How a sweep's runs look in its figures, and the parts that all figures share.

Figures are at most 4.8 inches wide, so their 9-point text is still readable when a phone scales them. Runs
that differ in their seed only are one line. A line keeps its colour, marker and dash in every figure.
Colours are Okabe and Ito's, which colour-blind readers tell apart; dash and marker say the same thing again.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter

from dllmq.report.groups import OFF, Group, groups, label, varying_axes, varying_toggles
from dllmq.report.results import Sweep
from dllmq.report.words import folded

WIDTH, NARROW = 4.8, 3.8  # inches
MAX_LINES = 24  # beyond this a figure shows the first ones and says so
ONE_PANEL, MAX_PANELS = 8, 6  # more lines than this are spread over panels, if that makes a few panels
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#8c8c00")
INK, FAINT, PAPER = "#1b1f24", "#c9ced6", "#fefefe"
DASHES: tuple[tuple[float | int, ...], ...] = ((), (4, 2), (1.2, 1.5), (6, 1.5, 1.2, 1.5))
MARKERS = "osD^vP"
RC: dict[Any, Any] = {
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
    "figure.titlesize": 9.5,
    "figure.titleweight": "bold",
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
    """A figure, its name (file stem and id prefix), what it shows, and the part of the page it is for."""

    name: str
    caption: str
    figure: Figure
    part: str  # "scores", "effects", "curves" or "cost"

    @property
    def title(self) -> str:
        return self.figure.get_suptitle() or self.figure.axes[0].get_title(loc="left")


@dataclass(frozen=True)
class Line:
    """How a group of runs is drawn; `panel` is the axes it goes to, "" where all lines share one."""

    group: Group
    label: str  # of the group
    key: str  # what the legend calls it inside its panel
    panel: str
    color: str
    dashes: tuple[float | int, ...]
    filled: bool
    shape: str  # of the marker, where panels share one axes

    def line(self) -> dict[str, Any]:
        return {"color": self.color, "dashes": self.dashes, "linewidth": 1.5, **self.marker()}

    def marker(self, shape: str = "o") -> dict[str, Any]:
        face = self.color if self.filled else PAPER
        return {"marker": shape, "markersize": 4.5, "markerfacecolor": face, "markeredgecolor": self.color}


# ---------------------------------------------------------------- lines


def lines_of(sweep: Sweep) -> list[Line]:
    """The groups of a sweep with their looks, MAX_LINES at most.

    Up to ONE_PANEL of them share one axes. More get a panel per method (or per value of the first axis with
    two to MAX_PANELS of them); inside a panel the first switch is the dash and everything else the colour.
    What is the same in a whole panel (full precision's width) stands in the panel's name.
    """
    found = groups(sweep)[:MAX_LINES]
    toggles, varying = varying_toggles(sweep), [k for k in varying_axes(sweep) if k != "seed"]
    plain = [k for k in varying if k not in toggles]
    axis = next((k for k in (*plain, *toggles) if 1 < len({_at(g, [k]) for g in found}) <= MAX_PANELS), None)
    shared: list[str] = []  # what tells panels apart
    if len(found) > ONE_PANEL and axis is not None:
        panels = {_at(g, [axis]) for g in found}
        shared = [k for k in varying if k == axis or len({_at(g, [axis, k]) for g in found}) == len(panels)]
        dashed, colored = toggles[:1], [k for k in varying if k not in (*shared, *toggles[:1])]
    else:
        axis, more_cells = None, len({_at(g, plain) for g in found}) >= len({_at(g, toggles) for g in found})
        # what there is more of gets the colours, the other the dashes
        dashed, colored = (toggles, plain) if more_cells else (plain, toggles)
    colors, dashes = (_index(_at(g, names) for g in found) for names in (colored, dashed))
    shapes = _index(_at(g, shared) for g in found)
    lines = []
    for group in found:
        color = colors[_at(group, colored)]
        # the runs with switches on are drawn solid, so the plain baseline of a colour is the dashed one
        dash = len(dashes) - 1 - dashes[_at(group, dashed)] + color // len(PALETTE)
        name = label(group.axes, varying)
        lines.append(
            Line(
                group=group,
                label=name,
                key=_words(group.axes, [k for k in varying if k not in shared]) if axis else name,
                panel=" ".join(_value(k, group.axes.get(k)) for k in shared),
                color=PALETTE[color % len(PALETTE)],
                dashes=DASHES[dash % len(DASHES)],
                filled=not toggles or any(group.axes.get(k) is True for k in (dashed if axis else toggles)),
                shape=MARKERS[shapes[_at(group, shared)] % len(MARKERS)],
            )
        )
    return lines


def _at(group: Group, names: list[str]) -> str:
    """Where a group stands on some axes; one that an older record does not have counts as off."""
    return repr([group.axes.get(k, False) for k in names])


def _index(keys: Iterable[Hashable]) -> dict[Hashable, int]:
    return {key: i for i, key in enumerate(dict.fromkeys(keys))}


def _words(axes: dict[str, Any], names: list[str]) -> str:
    here = {k: axes[k] for k in names if axes.get(k, False) is not False and axes[k] != OFF.get(k)}
    words = [f"+{k}" if value is True else _value(k, value) for k, value in here.items()]
    return " ".join(words) or "all off"


def _value(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return f"{name} {'on' if value else 'off'}"
    return str(value) if name in ("method", "bits", "model") else f"{name}={value}"


def cut_note(sweep: Sweep) -> str:
    more = len(groups(sweep)) - MAX_LINES
    return f" The first {MAX_LINES} lines; {more} more are in the table." if more > 0 else ""


def seeds_note(sweep: Sweep, what: str) -> str:
    """One sentence on `what` shows the range over seeds, where there are several."""
    counts = {len(g.records) for g in groups(sweep)}
    if counts <= {1}:
        return ""
    number = str(counts.pop()) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    return f" Mean over {number} seeds; {what} from the lowest to the highest."


# ---------------------------------------------------------------- parts


def figure_with(panels: int, height: float, width: float = WIDTH) -> tuple[Figure, list[Axes]]:
    """`panels` axes one below the other, `height` inches each, with common axes."""
    figure = Figure(figsize=(width, height * panels), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(panels, 1, sharex=True, sharey=True, squeeze=False)
    return figure, list(grid[:, 0])


def legend(figure: Figure, handles: list[Line2D], length: float = 2.6) -> None:
    """Below the axes, where it covers no data; the figure grows by its height. Long names are folded."""
    for handle in handles:
        handle.set_label(folded(str(handle.get_label()), 46))
    longest = max(len(str(h.get_label())) for h in handles)
    columns = 3 if longest <= 14 else 2 if longest <= 26 else 1
    rows = -(-len(handles) // columns)
    columns = -(-len(handles) // rows)  # as even as that many rows allow
    figure.legend(
        handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=8.5,
        handlelength=length, columnspacing=1.4,
    )  # fmt: skip
    folds = sum(str(h.get_label()).count("\n") for h in handles)  # none where there are several columns
    figure.set_figheight(figure.get_figheight() + 0.19 * rows + 0.14 * folds)


def value_axis(axis: Axes, values: list[float | int], name: str, log: bool) -> None:
    """The y axis of an error: from zero; logarithmic, if allowed, where it spans more than a factor of 50."""
    if log and min(values) > 0 and max(values) > 50 * min(values):
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")  # powers of ten would need mathtext
        axis.yaxis.set_minor_formatter(NullFormatter())
        name += " (log scale)"
    else:
        axis.set_ylim(bottom=0)
    axis.set_ylabel(name)


def percent(value: float | int, _: Any = None) -> str:
    return f"{100 * value:g}"


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "figure"


def short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"

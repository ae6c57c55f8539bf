"""The ratios of a section as a figure: a point for the median, a bar from the lowest to the highest round."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dllmq.bench.rows import Row, Section
from dllmq.bench.table import mark

if TYPE_CHECKING:
    from dllmq.report.plot_style import Drawing

CAPTION = (
    "Baseline / ours: a point for the median of the rounds, a bar from the lowest to the highest. "
    "Hollow: approximate."
)


def write_figures(sections: Sequence[Section], folder: Path) -> list[Path]:
    """One PNG a section, <section>-<shape>-<device>.png; sections without a ratio have none."""
    from dllmq.report.figures import write_png

    return [write_png(made, folder) for section in sections if (made := drawing(section)) is not None]


def drawing(section: Section) -> Drawing | None:
    """The section's figure, None where it has no ratio; needs matplotlib."""
    import matplotlib

    from dllmq.report.plot_style import RC, Drawing

    rows = [row for row in section.rows if row.ratio is not None]
    if not rows:
        return None
    with matplotlib.rc_context(RC):
        return Drawing(name_of(section), CAPTION, _draw(rows, section), "cost")


def name_of(section: Section) -> str:
    """The figure's file without its ending."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(section.identity).lower())


def _draw(rows: Sequence[Row], section: Section):  # matplotlib is imported late
    from matplotlib.ticker import LogLocator, NullFormatter

    from dllmq.report.plot_style import INK, PALETTE, PAPER, WIDTH, figure_with

    figure, (axis,) = figure_with(1, 0.9 + 0.24 * len(rows), WIDTH)
    for i, row in enumerate(rows):
        assert row.ratio is not None and row.low is not None and row.high is not None
        color = PALETTE[0] if row.ratio >= 1 else PALETTE[1]
        axis.plot([row.low, row.high], [i, i], color=color, linewidth=1.5)
        filled = "approximate" not in row.note
        axis.plot(row.ratio, i, "o", color=color, markersize=5, markerfacecolor=color if filled else PAPER)
        text = f"{row.ratio:.2f}"
        axis.annotate(
            text,
            (row.high, i),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            bbox={"boxstyle": "square,pad=0.1", "facecolor": PAPER, "edgecolor": "none"},
        )
    axis.axvline(1, color=INK, linewidth=0.8)
    axis.set_xscale("log")
    axis.set_xlim(min(0.8, *(r.low * 0.85 for r in rows)), max(1.4, *(r.high * 1.5 for r in rows)))  # type: ignore[operator]
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_yticks(range(len(rows)), [label(row, rows) for row in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    unit = "smaller" if rows[0].unit == "B" else "faster"
    axis.set_xlabel(f"baseline / ours (above 1 is {unit})")
    why = mark(section)
    axis.set_title(f"{section.section}, {section.shape}" + (f"\n{why}" if why else ""))
    return figure


def label(row: Row, rows: Sequence[Row]) -> str:
    """What was compared; with its size where the figure has several."""
    same = [r for r in rows if r.what == row.what]
    if len(same) == 1:
        return row.what
    size = row.shape.partition(", ")[0]
    if len({(r.what, r.shape) for r in same}) < len(same):
        return f"{row.what} over {row.baseline}"
    return f"{row.what}, {size}"

"""The figures of a sweep, drawn with matplotlib and no display, as SVG for the page and PNG for a README.

SVG output is deterministic (fixed hash salt, no date) and its ids carry the figure's name, so that several
figures can share a page. With `themed=True` the colours become CSS variables with the same colour as the
fallback, and the page's dark mode reaches into the figure.
"""

from __future__ import annotations

import io
import re
from html import escape
from pathlib import Path

import matplotlib

from dllmq.report.plot_curves import curve_figures
from dllmq.report.plot_effects import effect_figures
from dllmq.report.plot_points import cost_figures, score_figures
from dllmq.report.plot_style import FAINT, INK, PALETTE, PAPER, RC, Drawing
from dllmq.report.results import Sweep

_DECIMALS = re.compile(r"(\d\.\d\d)\d+")  # a hundredth of a point is enough, and halves the size


def draw(sweep: Sweep) -> list[Drawing]:
    """Every figure the sweep has data for."""
    with matplotlib.rc_context(RC):
        parts = (score_figures, effect_figures, curve_figures, cost_figures)
        return [drawing for part in parts for drawing in part(sweep)]


def to_svg(drawing: Drawing, themed: bool = False) -> str:
    """One <svg> element, no XML prologue; ids prefixed by the drawing's name, the same bytes every time."""
    buffer = io.StringIO()
    with matplotlib.rc_context(RC):
        drawing.figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{drawing.name}-\1"', svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{drawing.name}-", svg)
    svg = re.sub(r' (?:d|x|y|transform)="[^"]*"', lambda m: _DECIMALS.sub(r"\1", m[0]), svg)
    said = escape(f"{drawing.title}. {drawing.caption}")
    head = f'<svg role="img" aria-label="{said}"'
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
    with matplotlib.rc_context(RC):
        drawing.figure.savefig(path, format="png", dpi=dpi, metadata={"Software": None})
    return path

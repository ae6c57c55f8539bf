"""Tables as data, and their three renderings: terminal (rich), Markdown, HTML. All show the same cells.

A cell has its full text and, where that is long, a compact one. Markdown and HTML print every column in
full. The terminal takes compact texts when the full ones do not fit, then leaves out columns from the least
important on and says which. Names that still do not fit are folded, at separators where there are any; no
cell is cut.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from dllmq.report.words import folded

Tone = Literal["", "better", "worse", "muted", "failed", "on", "off"]
KEEP = 0  # a column of this rank is never left out
LONG = 40  # letters from which HTML folds a cell
LEAST = 10  # columns that a folded name keeps


@dataclass(frozen=True)
class Cell:
    """`note` follows the text: "(200)"; `sort` is the number behind the text."""

    text: str
    tone: Tone = ""
    compact: str | None = None
    sort: float | int | None = None
    note: str = ""

    @property
    def full(self) -> str:
        return f"{self.text} {self.note}".strip()

    def shown(self, compact: bool) -> str:
        return self.compact if compact and self.compact is not None else self.full


EMPTY = Cell("–", "muted")


@dataclass(frozen=True)
class Column:
    """`title` may have two lines; `rank` orders what the terminal leaves out, the highest first.

    `note` says once what the notes of all its cells say ("n = 200"): HTML prints it instead of them.
    """

    title: str
    rank: int = KEEP
    numeric: bool = True
    compact: str | None = None
    note: str = ""

    def shown(self, compact: bool) -> str:
        return self.compact if compact and self.compact is not None else self.title


@dataclass(frozen=True)
class Row:
    """`message` takes the place of everything right of the given cells (a failed run)."""

    cells: tuple[Cell, ...]
    kind: Literal["run", "reference", "failed"] = "run"
    message: str | None = None


@dataclass(frozen=True)
class Table:
    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    footnotes: tuple[str, ...] = ()


# ---------------------------------------------------------------- terminal

_STYLES: dict[str, str] = {
    "better": "green",
    "worse": "red",
    "muted": "dim",
    "failed": "bold red",
    "on": "bold",
    "off": "dim",
}


def to_rich(table: Table, width: int) -> RenderableType:
    """The table for a terminal of `width` columns, its footnotes below."""
    table, compact, hidden = fit(table, width)
    grid = RichTable(
        title=table.title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for column in table.columns:
        title = Text(column.shown(compact), style="bold")
        grid.add_column(
            title, justify="right" if column.numeric else "left", no_wrap=True, overflow="ellipsis"
        )
    for row in table.rows:
        if row.kind == "reference" and grid.row_count:
            grid.add_section()
        cells = [Text(c.shown(compact), style=_STYLES.get(c.tone, "")) for c in row.cells]
        if row.message is not None:
            cells += [Text("failed", style=_STYLES["failed"])]
        grid.add_row(*cells, end_section=row.kind == "reference")
    notes = [
        Text(f"failed: {_name(row, table)}: {row.message}", style=_STYLES["worse"])
        for row in table.rows
        if row.message is not None
    ]
    if hidden:
        notes.append(Text(f"Left out to fit {width} columns: {', '.join(hidden)}.", style="dim"))
    return Group(grid, *notes, *(Text(note, style="dim") for note in table.footnotes))


def _name(row: Row, table: Table) -> str:
    """A row in words: its texts, and the titles of the switches that are on."""
    named = [(c.tone, c.text, column.title) for c, column in zip(row.cells, table.columns, strict=False)]
    return " ".join(
        f"+{title}" if tone == "on" else text for tone, text, title in named if tone in ("", "on")
    )


def fit(table: Table, width: int) -> tuple[Table, bool, list[str]]:
    """Shorten the table to `width`: (table, whether cells are compact, titles of columns left out)."""
    if _width(table, compact=False) <= width:
        return table, False, []
    hidden: list[str] = []
    while _width(table, compact=True) > width:
        last = max(range(len(table.columns)), key=lambda i: (table.columns[i].rank, i))
        if table.columns[last].rank == KEEP:
            return _narrowed(table, width), True, hidden
        hidden.insert(0, " ".join(table.columns[last].title.split()))
        table = _without(table, last)
    return table, True, hidden


def _narrowed(table: Table, width: int) -> Table:
    """The compact table with its widest columns of text folded until it fits, to LEAST at the narrowest."""
    widths = _widths(table, compact=True)
    texts = {i for i, column in enumerate(table.columns) if not column.numeric}
    while _boxed(widths) > width:
        widest = max(texts, key=lambda i: widths[i], default=None)
        if widest is None or widths[widest] <= LEAST:
            break
        widths[widest] -= 1

    def fold(i: int, cell: Cell) -> Cell:
        return replace(cell, compact=folded(cell.shown(True), widths[i])) if i in texts else cell

    rows = (replace(row, cells=tuple(fold(i, c) for i, c in enumerate(row.cells))) for row in table.rows)
    return replace(table, rows=tuple(rows))


def _without(table: Table, index: int) -> Table:
    def cut(items: tuple) -> tuple:
        return items[:index] + items[index + 1 :]

    rows = tuple(replace(row, cells=cut(row.cells)) for row in table.rows)
    return replace(table, columns=cut(table.columns), rows=rows)


def _width(table: Table, compact: bool) -> int:
    return _boxed(_widths(table, compact))


def _boxed(widths: Sequence[int]) -> int:
    """With the space right of each column, what stands between columns, and both edges of the box."""
    return sum(widths) + len(widths) + len(widths) - 1 + 2


def _widths(table: Table, compact: bool) -> list[int]:
    found = []
    for i, column in enumerate(table.columns):
        texts = [
            column.shown(compact),
            *(row.cells[i].shown(compact) for row in table.rows if i < len(row.cells)),
        ]
        found.append(max(cell_len(line) for text in texts for line in text.split("\n")))
    return found


def print_tables(tables: Sequence[Table], console: Console | None = None) -> None:
    """Print tables to the terminal; a pipe gets 120 columns, for it has no width of its own."""
    console = console or Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 120
    for table in tables:
        console.print(to_rich(table, console.width))
        console.print()


# ---------------------------------------------------------------- Markdown


def to_markdown(table: Table) -> str:
    """The table as GitHub Markdown with a heading; the same records give the same bytes."""
    columns = table.columns
    lines = [f"## {_md(table.title)}", ""]
    lines.append("| " + " | ".join(_md(c.title) for c in columns) + " |")
    lines.append("|" + "|".join("---:" if c.numeric else "---" for c in columns) + "|")
    for row in table.rows:
        texts = [_md(c.full) for c in row.cells]
        if row.message is not None:
            texts.append(_md(f"failed: {row.message}"))
        texts += [""] * (len(columns) - len(texts))
        lines.append(
            "| " + " | ".join(f"**{t}**" if _strong(row, i, t) else t for i, t in enumerate(texts)) + " |"
        )
    lines += [""] + [f"- {_md(note)}" for note in table.footnotes]
    return "\n".join(lines).rstrip() + "\n"


def _strong(row: Row, index: int, text: str) -> bool:
    return row.kind == "reference" and index == 0 and bool(text)


def _md(text: str) -> str:
    text = " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("`", "\\`")
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


# ---------------------------------------------------------------- HTML


def to_html(table: Table) -> str:
    """A <table> in a container of its own that scrolls sideways; every text escaped."""
    head = "".join(
        f'<th scope="col"{_class("num" if c.numeric else "")}>{_lines(c.title)}{_small(c.note, "<br>")}</th>'
        for c in table.columns
    )
    body = "".join(_html_row(row, table.columns) for row in table.rows)
    notes = "".join(f"<li>{escape(note)}</li>" for note in table.footnotes)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(table.title)}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        + (f'<ul class="notes">{notes}</ul>' if notes else "")
    )


def _html_row(row: Row, columns: tuple[Column, ...]) -> str:
    cells = []
    for i, (cell, column) in enumerate(zip(row.cells, columns, strict=False)):
        tag = 'th scope="row"' if i == 0 else "td"
        sort = "" if cell.sort is None else f' data-v="{cell.sort:.12g}"'
        body = _lines(cell.text)
        if cell.tone in ("on", "better", "worse"):
            body = f"<span>{body}</span>"
        if not column.note:
            body += _small(cell.note, " ")
        long = "long" if len(cell.text) > LONG else ""
        classes = _class("num" if column.numeric else "", cell.tone, long)
        cells.append(f"<{tag}{classes}{sort}>{body}</{tag.split()[0]}>")
    if row.message is not None:
        span = max(1, len(columns) - len(row.cells))
        cells.append(f'<td class="failed" colspan="{span}">failed: {escape(row.message)}</td>')
    return f"<tr{_class(row.kind if row.kind != 'run' else '')}>{''.join(cells)}</tr>"


def _class(*names: str) -> str:
    joined = " ".join(name for name in names if name)
    return f' class="{joined}"' if joined else ""


def _lines(text: str) -> str:
    return "<br>".join(escape(line) for line in text.split("\n"))


def _small(note: str, before: str) -> str:
    return f"{before}<small>{escape(note)}</small>" if note else ""

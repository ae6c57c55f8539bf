"""report.html beside a results.json: its tables and figures on one page, nothing loaded from anywhere.

Style, dark mode and the content security policy are those of a sweep's report (dllmq.report.html). Every text
that comes from results.json is escaped; the same results give the same bytes. Tables are written here, for
those of dllmq.report need rich, which a GPU machine may lack.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.util import find_spec

from dllmq.bench.figure import drawing, name_of
from dllmq.bench.rows import Row, Section
from dllmq.bench.table import COLUMNS, LEGEND, cells, machine_facts, mark, remarks, title
from dllmq.report.page import CSS

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'"
NUMERIC = ("ratio", "lowest - highest")
LONG = 30  # letters from which a cell is folded
NAME = "Speed and memory"


def render(sections: Sequence[Section]) -> str:
    """The whole page as text; without matplotlib it has no figures."""
    links = "".join(f'<a href="#{name_of(s)}">{escape(f"{s.section}, {s.shape}")}</a>' for s in sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{NAME} – dllmq bench</title><style>{CSS}</style></head>\n<body><main>\n"
        f'<header><p class="eyebrow">dllmq bench</p><h1>{NAME}</h1>'
        f'<p class="summary">{escape(headline(sections))}</p>'
        f'<nav aria-label="Contents">{links}</nav></header>\n'
        f'<p class="lead">{escape(LEGEND.replace("*", ""))}</p>\n'
        + "\n".join(map(_section, sections))
        + "\n</main></body></html>\n"
    )


def headline(sections: Sequence[Section]) -> str:
    """What was measured; that nothing was, of trials; what was stopped; which outputs are not equal."""
    measured, trials = ([s for s in sections if s.quick is quick] for quick in (False, True))
    count = sum(len(s.rows) for s in measured)
    many = f"{count} comparisons, each" if count != 1 else "One comparison"
    parts = [f"{many} of two things measured in the same run."] if measured else []
    if trials:
        which = "Everything here is" if not measured else f"{_names(trials)}:"
        parts.append(f"{which} a trial of the program at toy sizes, and no measurement.")
    if stopped := [s for s in sections if not s.finished]:
        parts.append(f"Stopped before the end: {_names(stopped)}.")
    if unequal := [row.what for s in sections for row in s.unequal]:
        parts.append(f"Outputs that must be equal are NOT in: {', '.join(unequal)}.")
    return " ".join(parts)


def _names(sections: Sequence[Section]) -> str:
    return "; ".join(f"{s.section}, {s.shape}" for s in sections)


def _section(section: Section) -> str:
    why = mark(section)
    lead = f'<p class="lead worse"><span>{escape(f"{why[0].upper()}{why[1:]}.")}</span></p>' if why else ""
    notes = "".join(f"<li>{escape(sentence)}</li>" for sentence in [*remarks(section), *section.left_out])
    return (
        f'<section id="{name_of(section)}"><h2>{escape(f"{section.section}, {section.shape}")}</h2>{lead}'
        + (_table(section) if section.rows else "<p>No row.</p>")
        + (f'<ul class="notes">{notes}</ul>' if notes else "")
        + _figure(section)
        + f"{_facts(section)}</section>"
    )


def _table(section: Section) -> str:
    head = "".join(f'<th scope="col"{_numeric(name)}>{escape(name)}</th>' for name in COLUMNS)
    body = "".join(map(_row, section.rows))
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(title(section))}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _row(row: Row) -> str:
    first, *others = map(escape, cells(row))
    found = "".join(_cell(name, text, row) for name, text in zip(COLUMNS[1:], others, strict=True))
    return f'<tr><th scope="row">{first}</th>{found}</tr>'


def _cell(name: str, text: str, row: Row) -> str:
    if name == "equal" and row.equal is False:
        return f'<td class="worse"><span>{text}</span></td>'
    return f"<td{_numeric(name) or _folded(text)}>{text}</td>"


def _numeric(name: str) -> str:
    return ' class="num"' if name in NUMERIC else ""


def _folded(text: str) -> str:
    return ' class="long"' if len(text) > LONG else ""


def _figure(section: Section) -> str:
    if find_spec("matplotlib") is None or (made := drawing(section)) is None:
        return ""
    from dllmq.report.figures import to_svg

    return (
        f'<div class="figures"><figure>{to_svg(made, themed=True)}'
        f"<figcaption>{escape(made.caption)}</figcaption></figure></div>"
    )


def _facts(section: Section) -> str:
    """Device, versions, commit, date and command."""
    facts = {name: escape(text) for name, text in machine_facts(section).items()}
    facts["command"] = f"<code>{facts['command']}</code>"
    items = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in facts.items())
    return f"<h3>Measured with</h3><dl>{items}</dl>"

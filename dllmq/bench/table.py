"""The rows as tables: Markdown from results.json, and the same cells for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from dllmq.bench.rows import Row, Section

COLUMNS = ("what", "size", "baseline", "ours", "ratio", "lowest - highest", "equal", "note")
LEGEND = (
    "A ratio is baseline / ours, per round of interleaved repeats: the median, and the lowest and highest. "
    "Above 1, ours is faster, or smaller. *equal* says whether outputs are as equal as they must be; a "
    "percentage is the share of tokens, answers or codes that are equal."
)
TRIAL = "a trial of the program, no measurement"
TOYS = "Toy sizes: these numbers show that the program runs, and measure nothing."
STOPPED = "This section was stopped before its end: rows that would come after these are missing."
REMARKS = {
    "generate": (
        "Equal tokens are claimed in float32. In bfloat16 many confidences are equal; rounding orders them.",
        "Packed widths are rounded to nearest, inputs by token; the attention product is in full precision.",
    ),
    "quantize": (
        "Equal, GPTQ: 99 % of the codes, the objective within 0.2 %. Sums in another order move a few codes.",
        "Equal, others: within 0.001 (factor) or 0.01 (Hessian) of the largest entry; AWQ's exponent "
        "(attn_out and down: or one whose loss is within 0.2 % of the least).",
    ),
    "linear": ("Equal: the output is the definition's in float64, up to the rounding to bfloat16.",),
    "evaluate": ("Equal: every answer, cut at its first end of text.",),
    "memory": (
        "Weights are all tensors the model holds, embedding and head included.",
        "The peak is the process's resident memory, libraries included, or the GPU allocator's.",
    ),
}


def cells(row: Row) -> tuple[str, ...]:
    """One row under COLUMNS."""
    base = f"{row.baseline} {amount(row.baseline_value, row.unit)}" if row.baseline_value else "-"
    found = f"{row.ratio:.2f} x" if row.ratio is not None else "-"
    span = f"{row.low:.2f} - {row.high:.2f}" if row.low is not None and row.repeats > 1 else "-"
    ours = f"{row.ours} {amount(row.ours_value, row.unit)}"
    return row.what, row.shape, base, ours, found, span, equality(row), note(row)


def equality(row: Row) -> str:
    """yes, NO, or the share of equal tokens or codes."""
    share = "" if row.share is None else f"{100 * row.share:.2f}".rstrip("0").rstrip(".") + " %"
    if row.equal is None:
        return share or "-"
    if row.equal:
        return "yes" if row.share in (None, 1.0) else f"yes ({share})"
    return f"NO ({share})" if share else "NO"


def note(row: Row) -> str:
    """The note, and those numbers that a reader wants beside it."""
    parts = [row.note] if row.note else []
    n = row.numbers
    if "forwards" in n:
        same = n["forwards"] == n["baseline_forwards"]
        parts.append(f"{n['forwards']:g} forwards" + ("" if same else f" for {n['baseline_forwards']:g}"))
    if "fake_s" in n:
        parts.append(f"fake {amount(n['fake_s'], 's')}")
    if "score" in n:
        parts.append(f"scores {n['score']:.3f} and {n['baseline_score']:.3f}")
    if "quantize_s" in n:
        parts.append(f"quantizing alone {amount(n['quantize_s'], 's')}")
    return "; ".join(parts)


def amount(value: float | int | None, unit: str) -> str:
    """Seconds or bytes with three digits."""
    if value is None:
        return ""
    scales = {"s": ((1, "s"), (1e-3, "ms"), (1e-6, "µs")), "B": ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))}[unit]
    scale, name = next(((s, n) for s, n in scales if value >= s), scales[-1])
    return f"{value / scale:.3g} {name}" if value / scale < 1000 else f"{value / scale:.0f} {name}"


def title(section: Section) -> str:
    """Name and shape, and in brackets why its rows are not what they seem to be."""
    why = mark(section)
    return f"{section.section}, {section.shape}" + (f" ({why})" if why else "")


def mark(section: Section) -> str:
    """That the section is a trial, or was stopped; "" for a measurement that came to its end."""
    marks = [TRIAL] if section.quick else []
    if not section.finished:
        count = len(section.rows)
        marks.append(f"stopped after {count} row{'s' * (count != 1)}")
    return "; ".join(marks)


def remarks(section: Section) -> tuple[str, ...]:
    """What a reader of the section must know."""
    marks = (STOPPED,) * (not section.finished) + (TOYS,) * section.quick
    return marks + (REMARKS.get(section.section, ()) if section.rows else ())


def machine_line(section: Section) -> str:
    """One sentence: on what, with what, when, by which command."""
    m = section.machine
    versions = ", ".join(
        f"{name} {v}" for name, v in m["versions"].items() if name in ("python", "torch", "triton")
    )
    commit = f", commit {m['git']}" if m["git"] else ""
    return f"{device(section)}; {versions}{commit}; {section.date}; `{section.command}`"


def machine_facts(section: Section) -> dict[str, str]:
    """The same fact by fact, with all versions."""
    m = section.machine
    versions = ", ".join(f"{name} {v}" for name, v in m["versions"].items())
    facts = {"device": device(section), "system": m["system"], "versions": versions}
    return facts | {"commit": m["git"] or "unknown", "date": section.date, "command": section.command}


def device(section: Section) -> str:
    """The GPU, or the processor with its threads and instructions."""
    m = section.machine
    if m["accelerator"]:
        return str(m["accelerator"])
    threads = f"{m['threads']} thread{'s' * (m['threads'] != 1)}"
    return f"{m['processor']}, {threads} ({', '.join(m['instructions'])})"


def markdown(sections: Sequence[Section]) -> str:
    """table.md: every section with its machine and what was left out."""
    parts = [LEGEND]
    for section in sections:
        lines = ["| " + " | ".join(COLUMNS) + " |", "|---|---|---|---|---:|---:|---|---|"]
        lines += [
            "| " + " | ".join(cell.replace("|", "/") for cell in cells(row)) + " |" for row in section.rows
        ]
        rows = "\n".join(lines) if section.rows else "No row."
        left_out = "\n".join(f"- {sentence}" for sentence in [*remarks(section), *section.left_out])
        parts += [f"## {title(section)}", machine_line(section), rows, *([left_out] if left_out else [])]
    return "\n\n".join(parts) + "\n"

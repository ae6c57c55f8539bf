"""The sections by name, and how one is run: results.json is whole after every row."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from dllmq.bench import evaluate, generate, linear, machine, memory, quantize
from dllmq.bench.rows import RESULTS, Section, Sheet, write_section
from dllmq.bench.shapes import Setup
from dllmq.bench.table import cells

SECTIONS: dict[str, Callable[[Setup, Sheet], None]] = {
    "generate": generate.measure,
    "quantize": quantize.measure,
    "linear": linear.measure,
    "evaluate": evaluate.measure,
    "memory": memory.measure,
}
SHAPELESS = {"linear": "linears of LLaDA-8B", "quantize": "matrices of LLaDA-8B"}  # sizes of their own


def run_section(
    name: str, setup: Setup, command: str, out: Path | None, log: Callable[[str], None]
) -> Section:
    """Measures a section; results.json is written after every row, so that what is measured stays."""

    def section(sheet: Sheet) -> Section:
        shape = SHAPELESS.get(name, f"{setup.shape} {setup.dtype_name}")
        date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        rows, left_out = tuple(sheet.rows), tuple(sheet.left_out)
        about = machine.describe(setup.device)
        return Section(name, shape, setup.quick, command, date, about, rows, left_out)

    def changed(sheet: Sheet) -> None:
        if out is not None:
            write_section(out / RESULTS, section(sheet))
        if sheet.rows:
            log(" | ".join(cells(sheet.rows[-1])[:6]))

    sheet = Sheet(changed)
    log(f"{name}, {setup.shape} ...")
    SECTIONS[name](setup, sheet)
    return section(sheet)

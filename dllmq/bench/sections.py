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
TOYS = "toy sizes"  # theirs with --quick


def run_section(name: str, setup: Setup, command: str, out: Path, log: Callable[[str], None]) -> Section:
    """Measures a section into a folder.

    results.json is written after every row, so that what is measured stays, and again after the last one:
    only then does the section say that it is finished.
    """

    def section(sheet: Sheet, finished: bool) -> Section:
        shape = f"{setup.shape} {setup.dtype_name}"
        if name in SHAPELESS:
            shape = TOYS if setup.quick else SHAPELESS[name]
        date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        rows, left_out = tuple(sheet.rows), tuple(sheet.left_out)
        about = machine.describe(setup.device)
        return Section(name, shape, setup.quick, command, date, about, rows, left_out, finished)

    def changed(sheet: Sheet) -> None:
        write_section(out / RESULTS, section(sheet, finished=False))
        if sheet.rows:
            log(" | ".join(cells(sheet.rows[-1])[:6]))

    sheet = Sheet(changed)
    log(f"{name}, {setup.shape} ...")
    SECTIONS[name](setup, sheet)
    done = section(sheet, finished=True)
    write_section(out / RESULTS, done)
    return done

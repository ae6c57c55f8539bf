"""`python -m dllmq.bench`: what dllmq claims about speed and memory, measured here, as ratios.

    python -m dllmq.bench                         every section on the embedded model
    python -m dllmq.bench --quick                 the same at toy sizes, in seconds: does everything run?
    python -m dllmq.bench linear quantize         some sections: generate quantize linear evaluate memory
    python -m dllmq.bench generate --shape llada_1b_shape --repeats 5 --out outputs/speed
    python -m dllmq.bench --report outputs/speed  its tables, figures and pages again; nothing is measured

Baseline and ours run interleaved in the same process; a ratio above 1 is faster, or smaller. Results, tables,
figures and report.html go to outputs/bench, or to --out. Exit code 1 where outputs that must be equal are
not.
"""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dllmq.bench.rows import RESULTS, Section, check_folder, read_sections, to_plain
from dllmq.bench.sections import SECTIONS, SHAPELESS, run_section
from dllmq.bench.shapes import DTYPES, SHAPES, Setup, check_room, default_dtype, device_of
from dllmq.bench.study import write_study, write_tables
from dllmq.bench.table import LEGEND, amount, cells, machine_line, remarks, title

OUT = Path("outputs/bench")


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The parsed command line; sections in the order they run in."""
    parser = argparse.ArgumentParser(
        prog="python -m dllmq.bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("sections", nargs="*", metavar="SECTION", help=f"{', '.join(SECTIONS)} (all of them)")
    add("--shape", default="mini", help=f"the model, several with commas: {', '.join(SHAPES)}")
    add("--repeats", type=int, help="rounds of each comparison (5; quick: 1)")
    add("--device", default="auto", help="auto (cuda where there is one), cpu, cuda, cuda:1 ...")
    add("--dtype", default="auto", help="auto (mini: float32, others: bfloat16), float32, bfloat16")
    add("--threads", type=int, help="CPU threads (torch's own choice)")
    add(
        "--out",
        type=Path,
        default=OUT,
        help=f"folder for results and report.html ({OUT}); adds to what it has",
    )
    add("--json", action="store_true", help="print JSON instead of tables")
    add("--quick", action="store_true", help="toy sizes: a trial of the program, and no measurement")
    add("--report", type=Path, metavar="FOLDER", help="write a folder's tables and page again")
    args = parser.parse_args(argv)
    args.command = " ".join(["python -m dllmq.bench", *map(shlex.quote, argv)])
    return args


def setups(args: argparse.Namespace) -> list[tuple[str, Setup]]:
    """(section, what it is told), everything checked before anything is measured.

    Raises:
        ValueError: one sentence.
    """
    for name in args.sections:
        if name not in SECTIONS:
            raise ValueError(f"unknown section {name!r}: use {', '.join(SECTIONS)}, or none for all.")
    shapes = args.shape.split(",")
    for shape in shapes:
        if shape not in SHAPES:
            raise ValueError(f"unknown --shape {shape!r}: use {', '.join(SHAPES)}.")
    if args.dtype not in ("auto", *DTYPES):
        raise ValueError(f"unknown --dtype {args.dtype!r}: use auto, {' or '.join(DTYPES)}.")
    if args.repeats is not None and args.repeats < 1:
        raise ValueError(f"--repeats must be an integer >= 1; got {args.repeats}.")
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"--threads must be an integer >= 1; got {args.threads}.")
    device = device_of(args.device)
    repeats = args.repeats or (1 if args.quick else 5)
    found = []
    for name in args.sections or SECTIONS:
        for shape in shapes_of(name, shapes):
            dtype = DTYPES[default_dtype(shape) if args.dtype == "auto" else args.dtype]
            if name in (*SHAPELESS, "memory") and args.dtype == "auto":
                dtype = torch.bfloat16
            if name not in SHAPELESS:
                check_room(shape, device, dtype)
            found.append((name, Setup(shape, device, dtype, repeats, args.quick)))
    return found


def shapes_of(section: str, shapes: list[str]) -> list[str]:
    """Those of the shapes that a section is measured at."""
    if section in SHAPELESS:
        return shapes[:1]
    return ["mini"] if section == "evaluate" and "mini" in shapes else shapes


def draw(console: Console, section: Section) -> None:
    """A section on the terminal, readable at 80 columns: sizes and names below what was compared."""
    table = Table(title=title(section), title_justify="left", title_style="bold")
    table.add_column("what", ratio=1)
    for name in ("baseline", "ours", "ratio", "equal"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in section.rows:
        what, size, _, _, found, span, equal, note = cells(row)
        against = f"{row.baseline} : {row.ours}" if row.baseline else row.ours
        small = "\n".join(filter(None, [size, against, note]))
        text = Text(what, style="bold").append(f"\n{small}", style="not bold dim")
        figures = [amount(row.baseline_value, row.unit), amount(row.ours_value, row.unit)]
        spread = found if span == "-" else f"{found}\n{span}"
        style = "red" if row.equal is False else None
        table.add_row(text, *figures, spread, equal.replace(" (", "\n("), style=style)
    if section.rows:
        console.print(table)
    else:
        console.print(title(section), style="bold", markup=False)
    for sentence in [*remarks(section), *section.left_out]:
        console.print(f"- {sentence}", markup=False, highlight=False)
    console.print(machine_line(section), markup=False, highlight=False, style="dim")


def run(args: argparse.Namespace, console: Console, errors: Console) -> int:
    """Measures what is asked for; 1 where a claim of equality failed."""
    if args.report is not None:
        console.print(write_study(args.report), markup=False, highlight=False, soft_wrap=True)
        return int(any(section.unequal for section in read_sections(args.report / RESULTS)))
    plan = setups(args)
    check_folder(args.out)
    if args.threads is not None:
        torch.set_num_threads(args.threads)

    def log(line: str) -> None:
        if errors.is_terminal:
            errors.print(line, markup=False, highlight=False, style="dim")

    sections: list[Section] = []
    try:
        for name, setup in plan:
            sections.append(run_section(name, setup, args.command, args.out, log))
    finally:  # also of what was stopped
        made = write_tables(args.out)
    if args.json:
        print(json.dumps(to_plain(sections), indent=1))
    else:
        for section in sections:
            draw(console, section)
        console.print(LEGEND.replace("*", ""), markup=False, highlight=False, style="dim")
    where = f"In {args.out}: {', '.join(made)}."
    (errors if args.json else console).print(where, markup=False, highlight=False, soft_wrap=True)
    return int(any(section.unequal for section in sections))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: 0; 1 after one sentence on stderr, or where outputs differ that must not; 2 for usage."""
    args = arguments(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        return run(args, Console(), Console(stderr=True))
    except (ValueError, OSError) as error:
        print(f"dllmq.bench: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())

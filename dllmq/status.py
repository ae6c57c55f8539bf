"""python -m dllmq.status outputs/<sweep>: which cells are done, running, failed or missing, and what is left.

Read from the sweep's folder alone, while it runs, on any machine that shares it:

    sweep.json               the planned cells (report/callback.py)
    <cell>/results.json      done
    <cell>/heartbeat.json    running, while it is young (report/heartbeat.py)
    <cell>/status.json       failed

How old a heartbeat is, is told by the file system: its time of change against that of a file made now. No
clock of another machine enters, and no process is looked for.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from dllmq.report.callback import SWEEP
from dllmq.report.heartbeat import HEARTBEAT, LOG
from dllmq.report.results import BASELINE, RESULTS, STATUS, files_named, read_json, read_status

SILENT_AFTER = 90.0  # seconds; NFS may show a file's time of change a minute late
_BETWEEN = re.compile(
    r",(?=[+~]*[A-Za-z_][\w./@]*=)"
)  # overrides in a folder's name; not the commas of a list
_WIDE = 120  # columns, from which running cells are a table
QUIET_AFTER = 30.0  # seconds without progress, after which the log's last line is shown
DONE, RUNNING, FAILED, SILENT, INTERRUPTED, WAITING = (
    "done", "running", "failed", "no sign of life", "interrupted", "not started",
)  # fmt: skip


@dataclass(frozen=True)
class CellState:
    """A cell; of the fields behind `state`, those that are known.

    Attributes:
        name: its folder in the sweep's; label: what tells it from the other cells.
        seconds: it took (done), or has taken.
        stage, done, total, left_s, since_progress_s, host, pid: as in heartbeat.json.
        age_s: of the heartbeat.
        error: its first line; log: file.
        expected_s: what it will still take, from the cells that are done.
    """

    name: str
    state: str
    overrides: tuple[str, ...] = ()
    label: str = ""
    seconds: float | None = None
    stage: str = ""
    done: int = 0
    total: int = 0
    left_s: float | None = None
    since_progress_s: float | None = None
    host: str = ""
    pid: int | None = None
    age_s: float | None = None
    error: str = ""
    log: str = ""
    said: str = ""
    expected_s: float | None = None


@dataclass(frozen=True)
class SweepState:
    """A sweep. `remaining_s` is the sum over its cells, None while none is done."""

    folder: str
    command: str
    cells: tuple[CellState, ...]
    full_precision: bool
    remaining_s: float | None
    counts: dict[str, int] = field(default_factory=dict)

    def of(self, *states: str) -> list[CellState]:
        return [cell for cell in self.cells if cell.state in states]


# ------------------------------------------------------------------ reading


def read_sweep(folder: Path) -> SweepState:
    """The state of the sweep (or single run) in a folder.

    Raises:
        ValueError: no such folder, nothing of a sweep in it, or its sweep.json cannot be read.
    """
    if not folder.is_dir():
        raise ValueError(f"No folder {folder}; give the folder of a sweep, such as outputs/<sweep>.")
    plan = read_json(folder / SWEEP) if (folder / SWEEP).is_file() else {}
    try:
        planned = {str(cell["name"]): tuple(cell["overrides"]) for cell in plan.get("cells", [])}
    except (AttributeError, KeyError, TypeError):
        raise ValueError(
            f"{folder / SWEEP} is damaged: delete it; cells that have not begun are not listed then."
        ) from None
    found = {path.parent for name in (RESULTS, STATUS, HEARTBEAT) for path in files_named(name, folder)}
    names = [*planned, *sorted({_name(folder, path) for path in found} - planned.keys())]
    if not names:
        raise ValueError(f"No cells under {folder}: neither {SWEEP} nor a record; give a sweep's folder.")
    now = file_system_time(folder)
    cells = [read_cell(folder, name, planned.get(name, ()), now) for name in names]
    cells = expect(label(cells))
    known = [cell.expected_s for cell in cells if cell.expected_s is not None]
    return SweepState(
        folder=str(folder),
        command=str(plan.get("command", "")),
        cells=tuple(cells),
        full_precision=(folder / BASELINE).is_file(),
        remaining_s=sum(known) if known else None,
        counts={s: n for s in _ORDER if (n := sum(cell.state == s for cell in cells))},
    )


_ORDER = (DONE, RUNNING, FAILED, SILENT, INTERRUPTED, WAITING)


def _name(folder: Path, cell: Path) -> str:
    return cell.relative_to(folder).as_posix()


def file_system_time(folder: Path) -> float:
    """Now by the clock that stamps the folder's files; by this machine's where nothing can be written."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".now-") as file:
            return Path(file.name).stat().st_mtime
    except OSError:
        return time.time()


def read_cell(sweep: Path, name: str, overrides: tuple[str, ...], now: float) -> CellState:
    """A cell's state; a young heartbeat wins over what an earlier attempt left."""
    folder, cell = sweep / name, CellState(name, WAITING, overrides)
    if (folder / LOG).is_file():
        cell = replace(cell, log=str(folder / LOG))
    beat, age = _heartbeat(folder / HEARTBEAT, now)
    if beat and "ended" not in beat and age < SILENT_AFTER:
        return replace(_beating(cell, beat, age), state=RUNNING)
    if (folder / RESULTS).is_file():
        return _finished(cell, folder / RESULTS)
    if beat:
        return replace(_beating(cell, beat, age), state=INTERRUPTED if "ended" in beat else SILENT)
    if (folder / STATUS).is_file():
        try:
            error = str(read_status(folder / STATUS)["error"])
        except ValueError as problem:
            error = str(problem)
        return replace(cell, state=FAILED, error=_line(error), log=cell.log or str(folder / STATUS))
    return cell


def _heartbeat(file: Path, now: float) -> tuple[dict[str, Any], float]:
    """Its content and age in seconds; empty where there is none."""
    try:
        age = now - file.stat().st_mtime
        beat = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # it goes when the cell ends
        return {}, 0.0
    return (beat, max(0.0, age)) if isinstance(beat, dict) else ({}, 0.0)


def _beating(cell: CellState, beat: Mapping[str, Any], age: float) -> CellState:
    pid, left, quiet = beat.get("pid"), beat.get("left_s"), beat.get("since_progress_s")
    return replace(
        cell,
        stage=_line(str(beat.get("stage", ""))),
        done=int(beat.get("done") or 0),
        total=int(beat.get("total") or 0),
        left_s=None if left is None else float(left),
        since_progress_s=None if quiet is None else float(quiet) + age,
        seconds=float(beat.get("elapsed_s") or 0.0),
        host=_line(str(beat.get("host", ""))),
        pid=None if pid is None else int(pid),
        age_s=age,
        said=_last_line(cell.log),
    )


def _finished(cell: CellState, file: Path) -> CellState:
    try:
        cost = read_json(file)["cost"]
        spent = sum(v for k, v in cost.items() if k.endswith("_s") and isinstance(v, int | float))
        return replace(cell, state=DONE, seconds=spent)
    except (ValueError, KeyError, TypeError, AttributeError):
        return replace(cell, state=FAILED, error=f"{file} cannot be read; the cell will run again")


def _last_line(log: str, tail: int = 2000) -> str:
    """Of a log file, without its time."""
    if not log:
        return ""
    with Path(log).open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - tail))
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    return _line(lines[-1][24:]) if lines else ""


def _line(text: str) -> str:
    """The first line, without what a terminal would obey."""
    first = text.strip().splitlines()[0] if text.strip() else ""
    return "".join(c if c.isprintable() else " " for c in first)


def label(cells: Sequence[CellState]) -> list[CellState]:
    """Each cell with the overrides that not every cell has; its folder's name where there are none.

    Without a plan the folder's name is split into its overrides at the commas between them.
    """
    words = [cell.overrides or tuple(_BETWEEN.split(_line(cell.name))) for cell in cells]
    every = set.intersection(*map(set, words))
    return [
        replace(cell, label=_line(" ".join(o for o in own if o not in every)) or _line(cell.name))
        for cell, own in zip(cells, words, strict=True)
    ]


def expect(cells: Sequence[CellState]) -> list[CellState]:
    """Each cell that is not done with the mean seconds of those that are, of its method where possible."""
    spent: dict[str, list[float]] = {}
    for cell in cells:
        if cell.state == DONE and cell.seconds is not None:
            for key in ("", _method(cell)):
                spent.setdefault(key, []).append(cell.seconds)

    def left(cell: CellState) -> float | None:
        known = spent.get(_method(cell)) or spent.get("")
        if cell.state == DONE or not known:
            return None
        own = fmean(known)
        return max(own - (cell.seconds or 0.0), cell.left_s or 0.0) if cell.state == RUNNING else own

    return [replace(cell, expected_s=left(cell)) for cell in cells]


def _method(cell: CellState) -> str:
    return next((o for o in cell.overrides if o.startswith("method=")), "")


# ------------------------------------------------------------------ showing


def show(sweep: SweepState, width: int, copied: bool = False) -> RenderableType:
    """What a terminal of so many columns gets; nothing of a cell is read as markup.

    Args:
        copied: folders, logs and commands are one line each, however long, so that a terminal that wraps
            them still copies them whole; print it with crop=False. Otherwise they are folded at the edge.
    """
    line = _whole if copied else _folded
    counts = ", ".join(f"{n} {state}" for state, n in sweep.counts.items())
    parts: list[RenderableType] = [
        line(sweep.folder, style="bold"),
        Text(f"{len(sweep.cells)} cell{'s' * (len(sweep.cells) != 1)}: {counts}"),
    ]
    if running := sweep.of(RUNNING):
        rows = [running_table(running)] if width >= _WIDE else _running_lines(running)
        parts += ["", *rows, *_quiet(running)]
    for state in (SILENT, INTERRUPTED):
        parts += [row for cell in sweep.of(state) for row in _stopped(cell, line)]
    for cell in sweep.of(FAILED):
        parts += ["", line(f"failed: {cell.label}", style="red"), _folded(f"  {cell.error}")]
        parts += [line(f"  log: {cell.log}")] if cell.log else []
    parts += ["", line(remaining(sweep))]
    if sweep.command and not running and sweep.counts.get(DONE, 0) < len(sweep.cells):
        parts += [Text("continue with"), line(f"  {sweep.command}")]
    return Group(*parts)


def running_table(cells: Sequence[CellState]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("running", overflow="fold", ratio=3)
    table.add_column("stage", overflow="fold", ratio=3)
    for name in ("done", "stage left", "so far", "last sign"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("on", overflow="fold", ratio=2)
    for cell in cells:
        done = f"{100 * cell.done // cell.total} %" if cell.total else "–"
        table.add_row(
            Text(cell.label), Text(cell.stage), done, span(cell.left_s), span(cell.seconds),
            f"{span(cell.age_s)} ago", Text(f"{cell.host} {cell.pid}"),
        )  # fmt: skip
    return table


def _running_lines(cells: Sequence[CellState]) -> Iterator[RenderableType]:
    """The same for a narrow terminal."""
    for cell in cells:
        done = f", {cell.done} of {cell.total}, {span(cell.left_s)} left" if cell.total else ""
        yield Text(f"running for {span(cell.seconds)}: {cell.label}")
        yield _folded(f"  {cell.stage}{done}")
        yield _folded(f"  on {cell.host}, process {cell.pid}, last sign {span(cell.age_s)} ago")


def _quiet(cells: Sequence[CellState]) -> Iterator[RenderableType]:
    """What the cells that made no progress lately said last: they may wait for another one's work."""
    for cell in cells:
        if cell.said and (cell.since_progress_s or 0.0) > QUIET_AFTER:
            yield Text(f"{cell.label}: no progress for {span(cell.since_progress_s)}; last said")
            yield _folded(f"  {cell.said}")


def _stopped(cell: CellState, line: Callable[..., RenderableType]) -> Iterator[RenderableType]:
    what = "interrupted" if cell.state == INTERRUPTED else "no sign of life for"
    ago = " ago" if cell.state == INTERRUPTED else ""
    yield ""
    yield line(f"{what} {span(cell.age_s)}{ago}: {cell.label}", style="yellow")
    at = f"{cell.stage}, {cell.done} of {cell.total}" if cell.total else cell.stage
    yield _folded(f"  {at}, on {cell.host}, process {cell.pid}; the same command continues it")
    if cell.log:
        yield line(f"  log: {cell.log}")


def _whole(text: str, style: str = "") -> RenderableType:
    """One line, however long."""
    return Text(text, style=style, no_wrap=True, overflow="ignore")


def _folded(text: str, style: str = "") -> RenderableType:
    """Folded at the edge, further lines indented as far as the first one."""
    indent = len(text) - len(text.lstrip())
    return Padding(Text(text[indent:], style=style, overflow="fold"), (0, 0, 0, indent), expand=False)


def remaining(sweep: SweepState) -> str:
    """What the cells that are not done will cost."""
    open_, running = len(sweep.cells) - sweep.counts.get(DONE, 0), sweep.counts.get(RUNNING, 0)
    if not open_:
        return f"all done; python -m dllmq.report {sweep.folder} shows the results"
    if sweep.remaining_s is None:
        return f"{open_} to go; what they will take is known when the first one is done"
    text = f"{open_} to go, about {span(sweep.remaining_s)} of computing"
    if running > 1:
        text += f", {span(sweep.remaining_s / running)} with {running} at once"
    return text + ("" if sweep.full_precision else " (full precision is not measured yet)")


def span(seconds: float | int | None) -> str:
    """45 s, 3 min, 2 h 05 min, 3 d 04 h; – for None."""
    if seconds is None:
        return "–"
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    if hours < 48:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{hours // 24} d {hours % 24:02} h"


def watch(folder: Path, every: float, console: Console) -> None:
    """Shows the sweep again and again, until every cell is done or the user has seen enough."""
    with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
        while True:
            sweep = read_sweep(folder)
            live.update(show(sweep, console.width), refresh=True)
            if sweep.counts.get(DONE, 0) == len(sweep.cells):
                return
            time.sleep(every)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dllmq.status", description=__doc__.partition(":")[2])
    parser.add_argument("folder", type=Path, help="a sweep's folder, such as outputs/<sweep>")
    parser.add_argument(
        "--watch",
        nargs="?",
        type=float,
        const=5.0,
        metavar="SECONDS",
        help="show it again every so often (5)",
    )
    parser.add_argument("--json", action="store_true", help="all cells as JSON")
    args = parser.parse_args(argv)
    try:
        if args.json:
            print(json.dumps(asdict(read_sweep(args.folder)), indent=2))
        elif args.watch is not None:
            watch(args.folder, max(0.5, args.watch), Console(highlight=False))
        else:
            console = Console(highlight=False)
            console.print(show(read_sweep(args.folder), console.width, copied=True), crop=False)
    except ValueError as error:
        print(f"dllmq.status: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())

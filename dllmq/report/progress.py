"""A progress bar with an ETA for the entry points; the library only calls back (done, total, what)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


@contextmanager
def progress_bar(
    console: Console, name: str, shown: bool = True
) -> Iterator[Callable[[int, int, str], None]]:
    """Yields the callback; one bar, its label changes with the stage. Silent where output is no terminal.

    Args:
        shown: false where several cells write to the terminal at once.
    """
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not (shown and console.is_terminal)
    ) as progress:
        task = progress.add_task(name)
        last = ""

        def callback(done: int, total: int, what: str) -> None:
            nonlocal last
            if what != last:
                progress.reset(task, total=total, description=f"{name}  {what}")
                last = what
            progress.update(task, completed=done, total=total)

        yield callback

"""A running cell's sign of life, <cell>/heartbeat.json, every few seconds; and its log, <cell>/run.log.

    run_name, host, pid, stage, done, total, left_s, elapsed_s, since_progress_s, every_s, ended (if it has)

A thread writes it, so that one long step does not look like a dead process. It is removed when the cell has
finished or failed (results.json or status.json tell); after an interruption it stays with "ended", and what a
killed process leaves grows old. Durations are of the process's monotonic clock, which no clock change moves;
how old the file is, its reader measures with the file system's own clock (dllmq/status.py).
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dllmq.report.results import write_json_atomic

log = logging.getLogger(__name__)
Progress = Callable[[int, int, str], None]
HEARTBEAT, LOG = "heartbeat.json", "run.log"
EVERY = 5.0  # seconds


def host() -> str:
    """This machine's name: DLLMQ_HOST, or what the system calls it (of a container, often an id)."""
    return os.environ.get("DLLMQ_HOST") or socket.gethostname()


class Pulse:
    """How far a cell is; `tell` is a progress callback, and passes on what it is told.

    Args:
        name: the cell's.
        progress: told as well.
        clock: seconds, monotonic.
    """

    def __init__(
        self, name: str, progress: Progress | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.name, self.progress, self.clock = name, progress, clock
        self._lock = threading.Lock()
        self.started = self.stage_started = self.progressed = clock()
        self.stage, self.done, self.total, self.first = "starting", 0, 0, 0

    def tell(self, done: int, total: int, what: str) -> None:
        with self._lock:
            self.progressed = self.clock()
            if what != self.stage or done < self.done:
                self.stage, self.stage_started, self.first = what, self.progressed, done
            self.done, self.total = done, total
        if self.progress is not None:
            self.progress(done, total, what)

    def state(self) -> dict[str, Any]:
        """What is written; left_s is the stage's, null until two of its steps are known."""
        with self._lock:
            now = self.clock()
            since, advanced = now - self.progressed, self.done - self.first
            left = None
            if advanced > 0:
                pace = (self.progressed - self.stage_started) / advanced
                left = max(0.0, pace * (self.total - self.done) - since)
            return {
                "run_name": self.name,
                "host": host(),
                "pid": os.getpid(),
                "stage": self.stage,
                "done": self.done,
                "total": self.total,
                "left_s": left,
                "elapsed_s": now - self.started,
                "since_progress_s": since,
                "every_s": EVERY,
            }


@contextmanager
def heartbeat(folder: Path, pulse: Pulse, every: float = EVERY) -> Iterator[None]:
    """Writes `pulse` to the folder while the body runs. A folder that cannot be written fails no run."""
    file, stop = folder / HEARTBEAT, threading.Event()

    def beat() -> None:
        told = False
        while not stop.is_set():
            try:
                write_json_atomic(file, pulse.state())
            except OSError as error:
                if not told:
                    log.warning("%s cannot be written (%s); the run goes on", file, error)
                told = True
            stop.wait(every)

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()

    def finish() -> None:
        stop.set()
        thread.join()

    try:
        yield
    except BaseException as error:
        finish()
        with suppress(OSError):
            if isinstance(error, Exception):
                file.unlink(missing_ok=True)
            else:
                write_json_atomic(file, pulse.state() | {"ended": "interrupted"})
        raise
    finish()
    with suppress(OSError):
        file.unlink(missing_ok=True)


@contextmanager
def cell_log(folder: Path) -> Iterator[None]:
    """What is logged also goes to <folder>/run.log, behind what earlier attempts wrote."""
    try:
        handler = logging.FileHandler(folder / LOG, encoding="utf-8")
    except OSError as error:
        log.warning("%s cannot be written (%s); the run goes on", folder / LOG, error)
        yield
        return
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()

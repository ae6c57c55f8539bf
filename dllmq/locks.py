"""A file's lock, held by one process at a time; it ends with the process that holds it, even a killed one."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from dllmq import interrupt

log = logging.getLogger(__name__)


@contextmanager
def locked(file: Path, waiting: str) -> Iterator[Exception | None]:
    """Holds the lock of `file`, waiting for it; or yields why there can be none, and holds nothing.

    The empty file stays: if it were removed, two processes could hold a lock of the same name.

    Args:
        waiting: said once, where another process holds the lock.

    Raises:
        Interrupted: a signal came while waiting.
    """
    problem: Exception | None = None
    lock = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(file)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info(waiting)
            _wait(lock)
    except (OSError, NotImplementedError) as error:  # the second: a file system without locks
        problem = error
    try:
        yield problem
    finally:
        if lock is not None:
            lock.release()


def _wait(lock: FileLock) -> None:
    while True:
        try:
            lock.acquire(timeout=0.5)
            return
        except Timeout:
            interrupt.check()

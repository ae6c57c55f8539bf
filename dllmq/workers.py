"""Where a cell runs when a launcher put it there: its folder, and its GPU."""

from __future__ import annotations

import itertools
import os
import socket
import tempfile
from pathlib import Path

from filelock import FileLock, Timeout

_held: list[FileLock] = []  # until the process ends, even if it is killed


def enter(folder: str) -> None:
    """Goes to the folder that the sweep was started in: relative paths mean the same everywhere.

    Raises:
        ValueError: this machine has no such folder.
    """
    try:
        os.chdir(folder)
    except OSError as error:
        raise ValueError(
            f"{folder}, where the sweep was started, is not on {socket.gethostname()} ({error.strerror}): "
            "start sweeps over several machines in a folder of a file system that they share."
        ) from error


def pin_gpu(count: int, locks: Path | None = None) -> str | None:
    """Takes one of `count` GPUs for this process, the least taken one first; returns what it is left to see.

    Workers of one machine agree by locks, which end with the processes: no worker needs to know its number.
    To be called before CUDA starts; again in the same process, nothing changes.

    Args:
        count: GPUs that this process sees; none or one: nothing to choose.
        locks: their folder, of this machine alone.
    """
    if count < 2 or _held:
        return os.environ.get("CUDA_VISIBLE_DEVICES")
    seen = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    folder = locks or Path(tempfile.gettempdir()) / f"dllmq-gpus-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    for turn, name in itertools.product(itertools.count(), seen.split(",")):
        lock = FileLock(folder / f"{name}.{turn}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        _held.append(lock)
        os.environ["CUDA_VISIBLE_DEVICES"] = name
        break
    return os.environ["CUDA_VISIBLE_DEVICES"]

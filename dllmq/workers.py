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
    folder = locks or Path(tempfile.gettempdir()) / f"dllmq-gpus-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    for turn, name in itertools.product(range(2**20), visible_gpus(count)):
        lock = FileLock(folder / f"{name}.{turn}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        _held.append(lock)
        os.environ["CUDA_VISIBLE_DEVICES"] = name
        break
    return os.environ["CUDA_VISIBLE_DEVICES"]


def pin_rank(count: int) -> None:
    """Takes the GPU of this process's number on this machine, as torchrun gives it.

    Raises:
        ValueError: it gives none.
    """
    if count > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible_gpus(count)[number_of("LOCAL_RANK") % count]


def number_of(name: str) -> int:
    """A variable that torchrun sets.

    Raises:
        ValueError: it is not there, or no whole number.
    """
    value = os.environ.get(name, "")
    if not value.strip().isdecimal():
        raise ValueError(
            f"{name}={value!r} is no whole number: start several processes with torchrun "
            "--nproc-per-node=<n> -m dllmq.run, which sets it, or unset WORLD_SIZE."
        )
    return int(value)


def visible_gpus(count: int) -> list[str]:
    """What CUDA_VISIBLE_DEVICES names, or 0 to count - 1."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return seen.split(",") if seen else [str(i) for i in range(count)]

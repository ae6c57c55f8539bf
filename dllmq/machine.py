"""What a run took of the machine, and what the machine is: for the record."""

from __future__ import annotations

import platform
import resource
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dllmq import __version__, interrupt


class Stages:
    """Seconds and peak memory of each stage, for the record; a run that was asked to stop stops between two.

    Attributes:
        current: the stage at hand, or the one that failed.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.cost: dict[str, float | int | None] = {}
        self.current = ""

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        reset_peak_memory(self.device)
        start, self.current = time.perf_counter(), name
        yield
        self.cost[f"{name}_s"] = self.cost.get(f"{name}_s", 0.0) + time.perf_counter() - start  # type: ignore[operator]
        peak = peak_memory(self.device)
        self.cost[f"{name}_peak_bytes"] = peak
        self.cost["peak_memory_bytes"] = max(peak, self.cost.get("peak_memory_bytes", 0) or 0)
        interrupt.check()


def reset_peak_memory(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # elsewhere the peak is the process's own
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: str) -> int:
    """Bytes: of the GPU's allocator, or the process's peak resident set since the last reset."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
    except (OSError, StopIteration):
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def versions() -> dict[str, str]:
    """Of Python, dllmq, and the packages that numbers come from."""
    names = ("torch", "transformers", "lm-eval", "datasets", "hydra-core", "wandb", "numpy")
    return {"dllmq": __version__, "python": platform.python_version()} | {n: version(n) for n in names}


def git_state() -> dict[str, Any]:
    """Commit of the code, and whether it was changed since; empty outside a checkout."""
    here = Path(__file__).parent

    def ask(*words: str) -> str:
        command = ["git", "-C", str(here), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        ask("ls-files", "--error-unmatch", __file__)
        return {
            "commit": ask("rev-parse", "HEAD"),
            "dirty": bool(ask("status", "--porcelain", "--", str(here))),
        }
    except (OSError, subprocess.CalledProcessError):
        return {}


def describe_device(device: str) -> dict[str, Any]:
    """Type and name of the device, threads of a CPU."""
    if device.startswith("cuda"):
        return {"type": "cuda", "name": torch.cuda.get_device_name(device)}
    return {"type": "cpu", "name": processor(), "threads": torch.get_num_threads()}


def processor() -> str:
    """The processor's name, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
    except (OSError, StopIteration):
        model = platform.processor()
    return f"{model} ({platform.machine()})" if model else platform.machine()

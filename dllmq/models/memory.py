"""What of a model is held in memory while it is quantized and measured.

    whole     every weight is loaded; a quantized linear keeps its dequantized weight beside its codes
    compact   every weight is loaded; a quantized linear keeps its codes alone, packed at their width
    stream    blocks are read from the checkpoint one at a time; quantized ones are kept compact

All three give the same numbers bit for bit. `auto` takes the first that fits in 80 % of what is free: whole
needs the weights at the model's dtype and a byte a parameter for the codes, compact the weights. A linear of
the packed backend holds less than either: its kernel's operand alone (models/linear.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dllmq.models.linear import QuantLinear

MEMORY = ("auto", "whole", "stream")
SHARE = 0.8  # of free memory that the weights may take; the rest is for activations and statistics


@dataclass(frozen=True)
class MemoryPlan:
    """What was chosen, and from which figures.

    Attributes:
        mode: "whole", "compact" or "stream".
        weight_bytes: of the whole checkpoint at the model's dtype.
        free_bytes: of the device, None where unknown.
    """

    mode: str
    weight_bytes: int
    free_bytes: int | None

    @property
    def stream(self) -> bool:
        return self.mode == "stream"

    @property
    def compact(self) -> bool:
        """Whether quantized linears keep their codes alone."""
        return self.mode != "whole"

    def __str__(self) -> str:
        free = "unknown" if self.free_bytes is None else in_bytes(self.free_bytes)
        return f"{self.mode} (weights {in_bytes(self.weight_bytes)}, free {free})"


def plan_memory(
    memory: str,
    parameters: int,
    dtype: torch.dtype,
    device: str,
    free: int | None = None,
) -> MemoryPlan:
    """What to hold: `memory` is auto, whole or stream, a choice of MEMORY.

    Args:
        parameters: of the checkpoint; dtype: of the loaded weights.
        free: bytes that are free on the device; measured when None.
    """
    free = free_memory(device) if free is None else free
    weights = parameters * dtype.itemsize
    if memory != "auto" or free is None:
        return MemoryPlan("stream" if memory == "stream" else "whole", weights, free)
    room = SHARE * free
    mode = "whole" if weights + parameters <= room else "compact" if weights <= room else "stream"
    return MemoryPlan(mode, weights, free)


def in_bytes(count: int | float) -> str:
    """A size as a person reads it, in powers of ten: "16.0 GB", "7.2 MB", "512 bytes"."""
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= 0.9995 * scale:  # 999.6 MB would be printed as 1000 MB
            value = count / scale
            return f"{value:.1f} {unit}" if value < 99.95 else f"{value:.0f} {unit}"
    return f"{count:.0f} bytes"


def resident_bytes(model: nn.Module) -> int:
    """Bytes of memory that a model's weights take now, in whatever form they are held; a tensor that several
    modules share counts once, and what lies on the meta device does not."""
    inside = {id(p) for m in model.modules() if isinstance(m, QuantLinear) for p in m.parameters()}
    plain = {id(x): x for x in (*model.parameters(), *model.buffers()) if id(x) not in inside}
    held = sum(m.resident_bytes for m in model.modules() if isinstance(m, QuantLinear))
    return held + sum(x.nbytes for x in plain.values() if not x.is_meta)


def free_memory(device: str) -> int | None:
    """Bytes that can still be taken on a device without swapping; None where the system does not tell.

    On the CPU the least of what the machine has and what the process's control group allows (a container).
    """
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    machine = _available(Path("/proc/meminfo"))
    group = _left_in_group(Path("/sys/fs/cgroup"))
    known = [n for n in (machine, group) if n is not None]
    return min(known) if known else None


def total_memory(device: str) -> int | None:
    """Bytes a device has, used or not; None where the system does not tell."""
    if device.startswith("cuda"):
        return int(torch.cuda.get_device_properties(device).total_memory)
    known = [n for n in (_meminfo(Path("/proc/meminfo"), "MemTotal"), _limit(Path("/sys/fs/cgroup"))) if n]
    return min(known) if known else None


def rounded(memory: int | None) -> int | None:
    """Bytes that stay the same when a kernel's update or a container takes a little: whole GiB, or 64 MiB.

    What eval.batch_size=auto settles depends on these alone, so they are enough for a fingerprint.
    """
    unit = 2**30 if memory is not None and memory >= 2**30 else 2**26
    return None if memory is None else memory // unit * unit


def _available(meminfo: Path) -> int | None:
    """MemAvailable of /proc/meminfo."""
    return _meminfo(meminfo, "MemAvailable")


def _limit(folder: Path) -> int | None:
    """Limit of the control group (version 2), None where there is none."""
    try:
        return int((folder / "memory.max").read_text())
    except (OSError, ValueError):
        return None


def _meminfo(meminfo: Path, field: str) -> int | None:
    try:
        lines = meminfo.read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])
    except (OSError, StopIteration, ValueError):
        return None


def _left_in_group(folder: Path) -> int | None:
    """Limit of the control group (version 2) minus what it uses; file pages it could drop count as free."""
    try:
        limit = int((folder / "memory.max").read_text())  # "max" where there is none
        used = int((folder / "memory.current").read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return max(0, limit - used + int(stat["inactive_file"]) + int(stat["active_file"]))
    except (OSError, KeyError, ValueError):
        return None

"""The machine, the versions and the memory a measurement was made with."""

from __future__ import annotations

import ctypes
import gc
import platform
import subprocess
import sys
from contextlib import suppress
from dataclasses import fields, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dllmq import __version__

FLAGS = (
    "amx_int8",
    "amx_bf16",
    "avx512_bf16",
    "avx512_vnni",
    "avx_vnni",
)  # of low-bit products


def describe(device: torch.device) -> dict[str, Any]:
    """Device, processor, threads, versions and git commit."""
    return {
        "device": device.type,
        "accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "processor": processor()[0],
        "instructions": processor()[1],
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions(),
        "git": git_commit(),
    }


def versions() -> dict[str, str]:
    """Of dllmq, Python, and what the numbers hang on."""
    found = {"dllmq": __version__, "python": platform.python_version()}
    for name in ("torch", "triton", "transformers", "lm-eval", "numpy"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def processor() -> tuple[str, list[str]]:
    """Its name, and which instructions of FLAGS it has."""
    name, flags = platform.processor() or "unknown", set[str]()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() == "flags":
                flags = set(value.split())
    return name, [flag for flag in FLAGS if flag in flags]


def git_commit() -> str:
    """The checkout's commit, with + where files differ from it; "" where there is none."""
    here = str(Path(__file__).parent)

    def ask(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", here, *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        dirty = ask("status", "--porcelain", "--untracked-files=no", "--", "dllmq")
        return ask("rev-parse", "--short=10", "HEAD") + ("+" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


# ------------------------------------------------------------------ memory


def held_bytes(module: nn.Module) -> int:
    """Bytes of all tensors that a module and what hangs on it hold, each storage once.

    Found by walking attributes: parameters, buffers, codes, scales and whatever a backend keeps ready.
    """
    storages: dict[int, int] = {}
    seen: set[int] = set()
    stack: list[Any] = [module]
    while stack:
        item = stack.pop()
        if id(item) in seen or item is None or isinstance(item, str | int | float | torch.dtype | type):
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            address, size = _storage(item)
            storages[address] = max(size, storages.get(address, 0))
        elif isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, list | tuple | set | frozenset):
            stack.extend(item)
        elif is_dataclass(item):
            stack.extend(getattr(item, f.name) for f in fields(item))
        elif isinstance(item, nn.Module) or type(item).__module__.startswith("dllmq."):
            stack.extend(vars(item).values() if hasattr(item, "__dict__") else ())
    return sum(storages.values())


def _storage(t: Tensor) -> tuple[int, int]:
    """Address and bytes; of a tensor in a library's own layout, its elements' bytes."""
    try:
        storage = t.untyped_storage()
        return storage.data_ptr(), storage.nbytes()
    except (RuntimeError, NotImplementedError):
        return id(t), t.numel() * t.element_size()


def reset_peak(device: torch.device) -> None:
    """Starts `peak_bytes` over."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    _trim()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int | None:
    """The most memory since `reset_peak`: of the GPU's allocator, or resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM")


def _status(name: str) -> int | None:
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(name + ":")).split()[1])
    return None


def _trim() -> None:
    """Gives freed memory back to the system, as far as the C library can."""
    gc.collect()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)

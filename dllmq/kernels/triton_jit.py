"""Triton kernels in modules that import without triton.

A function under `@kernel` stays a plain function until it, or another one of its module, is launched. Then
triton is imported, the module gets `tl` (triton.language) and its kernels are handed to `triton.jit`; with
TRITON_INTERPRET=1 in the environment they run interpreted, on the CPU. So a module reads like any file of
Triton kernels, except for the import on top.

On rounding, in every kernel: `/` of two fp32 numbers is approximate on a GPU, `tl.div_rn` is exact; a product
and a sum become one fused operation unless the launch says `enable_fp_fusion=False`.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch

Tiles = TypeVar("Tiles")
_CHOSEN: dict[Hashable, Any] = {}


class Kernel:
    """A Triton kernel, or a device function that kernels call; `kernel[grid](...)` launches it."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = inspect.unwrap(fn)
        self._compiled: Any = None

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return self.compiled()[grid]

    def compiled(self) -> Any:
        """What `triton.jit` made of it."""
        if self._compiled is None:
            _load(self.fn.__globals__)
            self._compiled = self.fn.__globals__[self.fn.__name__]
        return self._compiled


def kernel(fn: Callable[..., Any]) -> Any:
    """Decorates a kernel; its parameters annotated `tl.constexpr` are known when it is compiled."""
    return Kernel(fn)


def _load(module: dict[str, Any]) -> None:
    """Replaces the kernels among a module's names, its own and imported ones."""
    import triton
    import triton.language

    module["tl"] = triton.language
    for name, value in list(module.items()):
        if isinstance(value, Kernel):
            own = value.fn.__globals__ is module
            module[name] = triton.jit(value.fn) if own else value.compiled()


def is_interpreted() -> bool:
    """Whether kernels run on the CPU, without being compiled."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def fastest(key: Hashable, candidates: Sequence[Tiles], run: Callable[[Tiles], Any]) -> Tiles:
    """The candidate whose `run` takes the least time on the GPU, measured once for each key.

    The first one, untimed, in the interpreter and while a CUDA graph is captured. Candidates that do not fit
    into the GPU's shared memory or registers are passed over.
    """
    if key in _CHOSEN:
        return _CHOSEN[key]
    if len(candidates) == 1 or is_interpreted() or torch.cuda.is_current_stream_capturing():
        return candidates[0]
    times = [_milliseconds(run, candidate) for candidate in candidates]
    _CHOSEN[key] = candidates[times.index(min(times))]
    return _CHOSEN[key]


def _milliseconds(run: Callable[[Tiles], Any], candidate: Tiles, repeats: int = 10) -> float:
    """Of one run, after two to warm up; infinite where the candidate does not fit."""
    from triton.runtime.errors import OutOfResources

    try:
        for _ in range(2):
            run(candidate)
    except OutOfResources:
        return float("inf")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        run(candidate)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats


def power_of_2(n: int) -> int:
    """The least power of 2 that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


@kernel
def round_half_even(x):
    """To the nearest integer as torch.round does, for |x| < 2^22: beside 1.5 * 2^23 no fraction has room."""
    return (x + 12582912.0) - 12582912.0

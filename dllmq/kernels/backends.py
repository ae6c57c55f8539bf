"""Which low-bit kernel computes a linear: the first of the device's that takes its grids and works here.

A kernel is a module (cpu_int8.py describes the CPU's) with

    supports(weight grid, input grid or None, O, I)     whether it takes these grids and sizes
    prepare(quantized weight, input grid)               the weight as it wants it, the only form that is kept
    quant_linear(x, operand, input grid, bias)          the linear, in x's dtype
    quantize_for(rows of x, operand, input grid)        its first half, shared by operands of one `layout`
    integer_linear(its result, operand, bias, dtype)    its second half

Weights can be had back from an operand: `steps()` gives q - z [O, I], `scale` their scales [G, O].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from dllmq.kernels import cpu_int4, cpu_int8, cpu_onednn, cpu_weight_only
from dllmq.kernels.cpu_inputs import segment
from dllmq.numerics import Grid, QuantizedTensor

PAYS = 64  # columns of a segment, in fp32: scaling a shorter one is taken to cost more than int8 saves


@runtime_checkable
class Kernel(Protocol):
    """A module of this package; its operands and quantized inputs are its own affair."""

    def supports(self, weight: Grid, inputs: Grid | None, O: int, I: int) -> bool: ...
    def prepare(self, quantized: QuantizedTensor, inputs: Grid | None) -> Any: ...
    def quant_linear(self, x: Tensor, operand: Any, inputs: Grid | None, bias: Tensor | None) -> Tensor: ...
    def quantize_for(self, x: Tensor, operand: Any, inputs: Grid) -> Any: ...
    def integer_linear(self, x: Any, w: Any, bias: Tensor | None, dtype: torch.dtype) -> Tensor: ...


@dataclass(frozen=True)
class Backend:
    """A kernel, its name in results, and whether it computes rightly on this machine.

    Attributes:
        quantize_normed: (rows of x, operand, input grid, weight, eps) -> `quantize_for` of x's RMSNorm in one
            pass, where the kernel has it.
    """

    name: str
    kernel: Kernel
    works: Callable[[], bool]
    quantize_normed: Callable[[Tensor, Any, Grid, Tensor, float], Any] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Backend:
        """Itself: modules cannot be copied."""
        return self


ONEDNN = Backend("onednn", cpu_onednn, lambda: cpu_onednn.works())
INT_MM = Backend("int_mm", cpu_int8, lambda: cpu_int8.is_exact())
INT4 = Backend("int4", cpu_int4, lambda: cpu_int8.is_exact())
WEIGHT_ONLY = Backend("weight_only", cpu_weight_only, lambda: True)


def backends(device: str, small: bool) -> tuple[Backend, ...]:
    """A device's kernels in order of preference: by time, or (`small`) by memory.

    Args:
        device: its type, "cpu" or "cuda".
    """
    if device == "cuda":
        return _triton()
    if device != "cpu":
        return ()
    return ((INT4,) if small else ()) + (ONEDNN, INT_MM, WEIGHT_ONLY)


def find_backend(
    device: str, weight: Grid, inputs: Grid | None, O: int, I: int, small: bool = False
) -> Backend | None:
    """The first that takes a weight [O, I] and works; None where there is none."""
    for backend in backends(device, small):
        if backend.kernel.supports(weight, inputs, O, I) and backend.works():
            return backend
    return None


def pays(device: str, weight: Grid, inputs: Grid | None, I: int, dtype: torch.dtype) -> bool:
    """Whether `auto` takes an integer product in place of the one of dequantized values.

    A rule, no measurement of this machine. On CPU with instructions for it: always with one scale per token
    and output channel (1.5 times as fast as bf16 and more, at LLaDA-8B's shapes and all batches that
    experiments/speed has; fp32 was not measured); with groups against fp32 only, in segments of `PAYS`
    columns and more (not measured there either). On CUDA always (nothing has been run on one). With
    full-precision inputs never: packed codes save memory, not time.
    """
    if inputs is None or device != "cpu":
        return inputs is not None
    S = segment(weight, inputs, I)
    return cpu_int8.is_fast() and (S == I or (dtype == torch.float32 and S >= PAYS))


def _triton() -> tuple[Backend, ...]:
    if find_spec("triton") is None:
        return ()
    from dllmq.kernels import triton_linear

    return (Backend("triton", triton_linear, lambda: True, triton_linear.quantize_normed),)

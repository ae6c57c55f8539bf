"""RMSNorms that are computed by the kernel which quantizes their output.

In front of {q, k, v} and of {gate, up} stands an RMSNorm, and nothing else reads what it gives. As torch
computes it, a row passes through memory half a dozen times, in fp32; the kernel that quantizes rows reads
them anyway (kernels/triton_inputs.py). So, where a backend has such a kernel, the norm moves into the input
quantizer that the group's linears share: the norm's module passes x on as it is, and the quantizer does both
in one pass, once for the group. Scales that a method has folded into the norm's weight move along.

What moves is the place: every backend of a linear with such a quantizer applies the norm, the fake one too.
Values are those of norm and quantization apart, up to the order of the sum in the mean.
"""

from __future__ import annotations

from typing import Any

from dllmq.models.linear import InputQuantizer, QuantLinear
from dllmq.models.llada import RMSNorm


def place_norms(model: Any) -> int:
    """Moves every norm where it is computed best for the linears' backends; how many are in quantizers.

    None in linears without blocks around them, as a benchmark has them.
    """
    moved = 0
    blocks = getattr(model, "blocks", None)
    for block in () if blocks is None else blocks.children():  # iterating over streamed ones would read them
        for row in model.topology.groups:
            norm = getattr(block, row.absorber)
            if isinstance(norm, RMSNorm):
                moved += _place(norm, [getattr(block, name) for name in row.linears])
    return moved


def _place(norm: RMSNorm, linears: list[Any]) -> bool:
    quantizer = _quantizer(linears)
    for linear in linears:
        if isinstance(linear, QuantLinear):
            linear.inputs.take_norm(None)
    if quantizer is not None:
        quantizer.take_norm(norm)
    norm.is_moved = quantizer is not None
    return norm.is_moved


def _quantizer(linears: list[Any]) -> InputQuantizer | None:
    """What all linears of a group share, where one call quantizes the norm's output for all of them."""
    if not all(isinstance(x, QuantLinear) and x.prepared is not None for x in linears):
        return None
    first = linears[0]
    inputs, backend = first.inputs, first.prepared.backend
    if inputs.grid is None or backend.quantize_normed is None or any(x.inputs is not inputs for x in linears):
        return None
    kinds = {(x.prepared.backend.name, x.prepared.operand.layout) for x in linears}
    return inputs if len(kinds) == 1 else None

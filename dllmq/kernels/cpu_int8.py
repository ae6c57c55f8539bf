"""Integer linears on CPU: int8 codes times int8 codes, accumulated in int32.

    y = s_x s_w sum_i (q_x,i - z_x) (q_w,i - z_w) + b

s_x, z_x of each token (dynamic), s_w, z_w of each output channel. Up to 7 bits q - z fits int8 and is the
product's operand. At 8 bits codes are moved by 128 and the rest is added in integers: with q = c + 128,
a = 128 - z_x, d = 128 - z_w,

    sum (q_x - z_x)(q_w - z_w) = sum c_x c_w + d sum c_x + a (sum c_w + I d)

The accumulators are exact for 2 to 33,025 inputs; the output differs from the definition (dequantize, then
multiply in floating point) only by the rounding to fp32: of the accumulator, its two scalings and the bias.
What it costs depends on the processor: with VNNI the product is 5 to 9 times as fast as in fp32.

Legend: T tokens, I inputs, O outputs; q codes, z zero, s scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor

from dllmq.numerics import Grid, Params, QuantizedTensor, fit, quantize

MOVED = 128
INPUTS = range(2, 33_026)  # more could overflow: 33,025 * 255^2 < 2^31; torch._int_mm is wrong for one


@dataclass(frozen=True)
class Operand:
    """One side of the product: int8 codes [N, I], and a [N, 1] with q - z = codes + a (None: a is 0)."""

    codes: Int8[Tensor, "N I"]
    scale: Float[Tensor, "N 1"]
    offset: Int[Tensor, "N 1"] | None


def operand(codes: Tensor, params: Params, grid: Grid) -> Operand:
    """Codes under a grid with one scale per row, ready for the product."""
    if grid.symmetric:
        return Operand(codes, params.scale, None)
    if grid.bits < 8:
        return Operand(
            (codes.to(torch.int16) - params.zero.to(torch.int16)).to(torch.int8), params.scale, None
        )
    moved = (codes.to(torch.int16) - MOVED).to(torch.int8)
    return Operand(moved, params.scale, MOVED - params.zero.to(torch.int32))


def input_operand(x: Float[Tensor, "T I"], grid: Grid) -> Operand:
    """A linear's input under a dynamic grid with one scale per token."""
    params = fit(x, grid)
    if grid.symmetric or grid.bits == 8:
        return operand(quantize(x, params, grid), params, grid)
    q = torch.div(x.float(), params.scale).round_().add_(params.zero).clamp_(0, grid.high)
    return Operand(q.sub_(params.zero).to(torch.int8), params.scale, None)


def weight_operand(weight: QuantizedTensor) -> Operand:
    """A weight under a grid with one scale per output channel or per tensor."""
    rows = (len(weight.codes), 1)
    params = Params(weight.scale.expand(rows).contiguous(), weight.zero.expand(rows).contiguous())
    return operand(weight.codes, params, weight.grid)


def accumulate(x: Operand, w: Operand) -> Int[Tensor, "T O"]:
    """sum_i (q_x - z_x)(q_w - z_w) for every token and output, exact in int32."""
    acc = torch._int_mm(x.codes, w.codes.T)
    if w.offset is not None:
        acc += x.codes.sum(1, dtype=torch.int32)[:, None] * w.offset.T
    if x.offset is not None:
        columns = w.codes.sum(1, dtype=torch.int32)[:, None]
        columns = columns if w.offset is None else columns + w.codes.shape[1] * w.offset
        acc += x.offset * columns.T
    return acc


def int8_linear(x: Operand, w: Operand, bias: Tensor | None = None) -> Float[Tensor, "T O"]:
    """The linear in fp32."""
    y = torch.mul(accumulate(x, w), x.scale).mul_(w.scale.T)
    return y if bias is None else y.add_(bias)


def supports(weight: Grid, inputs: Grid | None, I: int) -> bool:
    """One scale per token and per output channel (or weight tensor); both sides quantized."""
    by_row = inputs is not None and inputs.group_size == -1 and weight.group_size in (-1, 0)
    return by_row and I in INPUTS


@cache
def is_exact() -> bool:
    """Whether the int8 product is exact at the extremes (old processors saturate sums of two products)."""
    x = torch.full((16, 64), -128, dtype=torch.int8)
    x[::2] = 127
    w = torch.full((32, 64), 127, dtype=torch.int8)
    w[::3] = -128
    return bool((torch._int_mm(x, w.T) == (x.long() @ w.long().T)).all())


@cache
def is_fast() -> bool:
    """Whether the processor has instructions for it."""
    return torch.cpu._is_vnni_supported() if hasattr(torch.cpu, "_is_vnni_supported") else False

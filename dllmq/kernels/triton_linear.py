"""Low-bit linears on the GPU: integer tensor cores, or packed weights widened in the kernel.

    y = Q_a(x) Deq(Q_w)^T + b,      sum over segments n of  s_x s_w sum_i (q_x - z_x)(q_w - z_w)

A segment is what lies between two changes of a scale: the whole row, or a group of the weight or the input.
Its sum is an integer and exact in int32. With codes c and offsets (q_x - z_x = c_x + a, q_w - z_w = c_w + d)

    sum (c_x + a)(c_w + d) = sum c_x c_w + d sum c_x + a sum (c_w + d)

the tensor cores multiply the codes as they lie, and two products of vectors do the rest; of packed weights in
groups d is added to the widened codes instead. What is stored:

    weight of 2, 3, 4 bits    two codes a byte, the first one low (numerics/packed.py's 4 bits); d = low - z
    5, 6, 7 bits              q - z in int8
    8 bits                    q in int8 (symmetric), or q - 128 and d = 128 - z

With a full-precision input (W4A16) codes are dequantized in the kernel, rounded to the input's type and
multiplied there: memory, not speed. Weights are the left operand of the product: widened codes go to the
tensor cores from registers, and a few tokens do not fill up its 64 rows.

A segment of 128 columns is expected to cost as much in scaling as in multiplying, one of 32 several times as
much (not measured on a GPU yet). The numbers do not depend on the tiles: segments are summed in order.

Legend: T tokens, I inputs, O outputs, G groups, N segments of S columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from dllmq.kernels.triton_inputs import Inputs, Layout, Norm, quantize_inputs
from dllmq.kernels.triton_jit import fastest, is_interpreted, power_of_2
from dllmq.kernels.triton_products import integer_kernel, weight_only_kernel
from dllmq.numerics import Grid, QuantizedTensor
from dllmq.numerics.packed import pack, unpack

INPUTS = range(32, 33_025)  # columns; more could overflow: 33,025 * 255^2 < 2^31
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST = 2**31  # elements of an input that a kernel can address; more tokens are multiplied in pieces
_NIBBLES = Grid(4)


@dataclass(frozen=True)
class Operand:
    """A weight, ready for the product with inputs under one grid.

    Attributes:
        codes: c_w, [O, I] int8; or [O, I / 2] uint8, two a byte.
        scale, offset: of each group, group by group; offset is d, None where it is 0.
        sums: sum (c_w + d) of each segment, None where the input has no offset.
        shape: (O, I).
        group: columns that share a scale.
        layout: how it wants its input; None for a full-precision input.
    """

    codes: Integer[Tensor, "O n"]
    scale: Float[Tensor, "G O"]
    offset: Int[Tensor, "G O"] | None
    sums: Int[Tensor, "N O"] | None
    shape: tuple[int, int]
    group: int
    layout: Layout | None

    @property
    def is_packed(self) -> bool:
        return self.codes.dtype == torch.uint8

    def steps(self) -> Int[Tensor, "O I"]:
        """q - z."""
        c = unpack(self.codes, self.shape[1], _NIBBLES) if self.is_packed else self.codes
        if self.offset is None:
            return c.to(torch.int16)
        groups = c.to(torch.int16).unflatten(1, (len(self.offset), -1))
        return (groups + self.offset.T[..., None].to(torch.int16)).flatten(1)


def supports(weight: Grid, inputs: Grid | None, O: int, I: int) -> bool:
    """Whether the kernels take these grids: row lengths and segments in multiples of 32 columns; any weight,
    an input quantized per token or per group, or not at all."""
    if I not in INPUTS or I % 32 or not 0 < O * I < 2**31 or (inputs is not None and inputs.group_size == 0):
        return False
    widths = [_width(grid, I) for grid in (weight, inputs) if grid is not None]
    return all(I % width == 0 for width in widths) and gcd(*widths) % 32 == 0


def prepare(quantized: QuantizedTensor, inputs: Grid | None) -> Operand:
    """A weight's operand for inputs under a grid (None: full precision)."""
    grid, (O, I) = quantized.grid, quantized.shape
    assert supports(grid, inputs, O, I) and quantized.group_index is None, f"no kernel for {grid}, {inputs}"
    width = _width(grid, I)
    layout = None if inputs is None else _layout(grid, gcd(width, _width(inputs, I)))
    rows = (O, I // width)
    scale, zero = quantized.scale.expand(rows), quantized.zero.expand(rows).to(torch.int32)
    codes, offset = _codes(quantized.codes, zero, grid, width)
    sums = None
    if inputs is not None and layout is not None and inputs.bits == 8 and not inputs.symmetric:
        steps = quantized.codes.to(torch.int32) - zero.repeat_interleave(width, 1)
        sums = steps.unflatten(1, (-1, layout.segment)).sum(-1, dtype=torch.int32).T.contiguous()
    offset = None if offset is None else offset.T.contiguous()
    return Operand(codes, scale.T.contiguous(), offset, sums, (O, I), width, layout)


def quant_linear(
    x: Float[Tensor, "*rows I"],
    operand: Operand,
    inputs: Grid | None,
    bias: Float[Tensor, " O"] | None = None,
    norm: Norm | None = None,
) -> Float[Tensor, "*rows O"]:
    """The linear, in x's dtype.

    Args:
        inputs: the grid that the operand was prepared for.
        norm: an RMSNorm between x and the linear, where it is not done yet.
    """
    rows = x.reshape(-1, x.shape[-1])
    if inputs is None:
        assert norm is None, "a norm is fused with the quantization of its output"
        y = weight_only_linear(rows, operand, bias)
    else:
        y = integer_linear(quantize_for(rows, operand, inputs, norm), operand, bias, x.dtype)
    return y.reshape(*x.shape[:-1], operand.shape[0])


def quantize_for(x: Float[Tensor, "T I"], operand: Operand, inputs: Grid, norm: Norm | None = None) -> Inputs:
    """x as this operand wants it; all operands with the same `layout` can share it."""
    assert operand.layout is not None, "the operand was prepared for a full-precision input"
    return quantize_inputs(x, inputs, operand.layout, norm)


def quantize_normed(
    x: Float[Tensor, "T I"], operand: Operand, inputs: Grid, weight: Float[Tensor, " I"], eps: float
) -> Inputs:
    """`quantize_for` of the RMSNorm of x; the normed values never reach memory."""
    return quantize_for(x, operand, inputs, Norm(weight, eps))


class Tiles(NamedTuple):
    """Outputs and tokens of a program's tile, columns a step, and how Triton runs it.

    `stages` are steps in flight; `registers` a thread's at most, None leaves it to the compiler.
    """

    outputs: int
    tokens: int
    columns: int
    warps: int
    stages: int
    registers: int | None = None


def integer_linear(
    x: Inputs, w: Operand, bias: Float[Tensor, " O"] | None, dtype: torch.dtype
) -> Float[Tensor, "T O"]:
    """From quantized inputs, in fp32 up to the rounding to `dtype`."""
    assert x.layout == w.layout, f"the input was quantized for {x.layout}, the weight wants {w.layout}"
    T, (O, I), S = len(x.codes), w.shape, x.layout.segment
    if len(parts := addressable(T, I)) > 1:
        return torch.cat([integer_linear(x.tokens(part), w, bias, dtype) for part in parts])
    y = torch.empty(T, O, dtype=dtype, device=x.codes.device)

    def run(tiles: Tiles) -> None:
        grid = (-(-O // tiles.outputs) * -(-T // tiles.tokens),)
        integer_kernel[grid](
            x.codes, x.scale, x.offset, x.sums, w.codes, w.scale, w.offset, w.sums, bias, y, T, O,
            I=I, S=S, W_GROUP=w.group, X_GROUP=I // len(x.scale), PACKED=w.is_packed, PLANES=x.layout.planes,
            INTERPRETED=is_interpreted(),
            BLOCK_O=tiles.outputs, BLOCK_T=tiles.tokens, BLOCK_I=tiles.columns, STAGES=tiles.stages,
            num_warps=tiles.warps, maxnreg=tiles.registers,
        )  # fmt: skip

    if T:
        key = ("integer", power_of_2(T), O, I, S, w.is_packed, dtype, y.device)
        with torch.cuda.device_of(y):
            run(fastest(key, candidates(T, O, _step(S), S < I), run))
    return y


def weight_only_linear(
    x: Float[Tensor, "T I"], w: Operand, bias: Float[Tensor, " O"] | None
) -> Float[Tensor, "T O"]:
    """From a full-precision input, in its dtype; sums in fp32."""
    assert w.layout is None, "the operand was prepared for a quantized input"
    T, (O, I) = len(x), w.shape
    if len(parts := addressable(T, I)) > 1:
        return torch.cat([weight_only_linear(x[part], w, bias) for part in parts])
    x = x.contiguous()
    y = torch.empty(T, O, dtype=x.dtype, device=x.device)

    def run(tiles: Tiles) -> None:
        grid = (-(-O // tiles.outputs) * -(-T // tiles.tokens),)
        weight_only_kernel[grid](
            x, w.codes, w.scale, w.offset, bias, y, T, O,
            I=I, W_GROUP=w.group, PACKED=w.is_packed, INTERPRETED=is_interpreted(),
            BLOCK_O=tiles.outputs, BLOCK_T=tiles.tokens, BLOCK_I=tiles.columns, STAGES=tiles.stages,
            num_warps=tiles.warps, maxnreg=tiles.registers,
        )  # fmt: skip

    if T:
        key = ("weight only", power_of_2(T), O, I, w.group, w.is_packed, x.dtype, y.device)
        with torch.cuda.device_of(y):
            run(fastest(key, candidates(T, O, min(64, _step(w.group)), False), run))
    return y


def addressable(T: int, I: int) -> list[slice]:
    """T tokens of I inputs in as few pieces as a kernel's 32-bit offsets allow."""
    rows = (MOST - 1) // I
    return [slice(start, min(start + rows, T)) for start in range(0, T, rows)]


def candidates(T: int, O: int, step: int, grouped: bool) -> list[Tiles]:
    """Tiles worth trying for T tokens, the most promising first; `step` columns at a time.

    Few tokens: time goes into reading the weight, so narrow tiles keep all multiprocessors busy. Many: time
    goes into the product, and a large tile reads least for what it multiplies; groups hold a second sum of
    the tile in registers, which large tiles do not have. Triton waits for each integer product to end, so two
    programs shall fit a multiprocessor and work in turn: with 256 threads, 128 registers.
    """
    if is_interpreted():
        return [Tiles(power_of_2(min(O, 64)), power_of_2(min(T, 64)), step, 4, 2)]
    tiles: list[tuple[int, ...]]
    few = max(16, min(power_of_2(T), 64))
    if T <= 64:
        tiles = [(64, few, 4, 4), (32, few, 4, 4), (128, few, 4, 4), (64, few, 4, 6)]
    elif grouped:
        tiles = [(128, 64, 8, 4), (128, 128, 8, 3), (64, 128, 4, 4), (128, 64, 4, 4)]
    elif T <= 512:
        tiles = [(128, 64, 4, 4), (128, 128, 8, 3, 128), (64, 128, 4, 4), (128, 64, 8, 4)]
    else:
        tiles = [(128, 128, 8, 3, 128), (128, 256, 8, 3), (128, 128, 4, 3), (256, 128, 8, 3)]
    return [Tiles(o, t, step, *how) for o, t, *how in tiles]


def _width(grid: Grid, I: int) -> int:
    """Columns that share a scale."""
    return grid.group_size if grid.group_size > 0 else I


def _step(S: int) -> int:
    """Columns a program multiplies at a time: a power of 2 that divides a segment."""
    return min(S & -S, 128)


def _layout(grid: Grid, segment: int) -> Layout:
    """Two codes a byte are multiplied a plane at a time, and the tensor cores take 32 columns or more."""
    return Layout(segment, planes=grid.bits <= 4 and segment % 64 == 0)


def _codes(codes: Tensor, zero: Tensor, grid: Grid, width: int) -> tuple[Tensor, Tensor | None]:
    """c_w and d [O, G] (None: 0) of a weight's codes q, see the top of this file."""
    if grid.bits <= 4:
        moved = (codes.to(torch.int16) - grid.low).to(torch.uint8)
        return pack(moved, _NIBBLES), grid.low - zero
    if grid.symmetric:
        return codes, None
    if grid.bits == 8:
        return (codes.to(torch.int16) - 128).to(torch.int8), 128 - zero
    return (codes.to(torch.int16) - zero.repeat_interleave(width, 1)).to(torch.int8), None

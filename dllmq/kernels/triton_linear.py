"""Low-bit linears on the GPU: integer tensor cores, or packed weights widened in the kernel.

    y = Q_a(x) Deq(Q_w)^T + b,      sum over segments n of  s_x s_w sum_i (q_x - z_x)(q_w - z_w)

A segment is what lies between two changes of a scale: the whole row, or a group of the weight or the input.
Its sum is an integer and exact in int32. With codes c and offsets (q_x - z_x = c_x + a, q_w - z_w = c_w + d)

    sum (c_x + a)(c_w + d) = sum c_x c_w + d sum c_x + a sum (c_w + d)

the tensor cores multiply the codes as they lie, and two products of vectors do the rest. What is stored:

    weight of 2, 3, 4 bits    two codes a byte, the first one low (numerics/packed.py's 4 bits); d = low - z
    5, 6, 7 bits              q - z in int8
    8 bits                    q in int8 (symmetric), or q - 128 and d = 128 - z

With a full-precision input (W4A16) codes are dequantized in the kernel, rounded to the input's type and
multiplied there: memory, not speed. Weights are the left operand of the product: widened codes go to the
tensor cores from registers, and a few tokens do not fill up its 64 rows.

A segment of 128 columns costs as much in scaling as in multiplying, one of 32 several times as much. The
numbers do not depend on the tiles: segments are summed in order.

Legend: T tokens, I inputs, O outputs, G groups, N segments of S columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from dllmq.kernels.triton_inputs import Inputs, Layout, Norm, quantize_inputs
from dllmq.kernels.triton_jit import fastest, is_interpreted, kernel, power_of_2
from dllmq.numerics import Grid, QuantizedTensor
from dllmq.numerics.packed import pack, unpack

tl: Any  # triton.language, set by the first launch
INPUTS = range(32, 33_025)  # columns; more could overflow: 33,025 * 255^2 < 2^31
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
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


class Tiles(NamedTuple):
    """Outputs and tokens of a program's tile, columns a step, and how Triton runs it."""

    outputs: int
    tokens: int
    columns: int
    warps: int
    stages: int


def integer_linear(
    x: Inputs, w: Operand, bias: Float[Tensor, " O"] | None, dtype: torch.dtype
) -> Float[Tensor, "T O"]:
    """From quantized inputs, in fp32 up to the rounding to `dtype`."""
    assert x.layout == w.layout, f"the input was quantized for {x.layout}, the weight wants {w.layout}"
    T, (O, I), S = len(x.codes), w.shape, x.layout.segment
    y = torch.empty(T, O, dtype=dtype, device=x.codes.device)

    def run(tiles: Tiles) -> None:
        grid = (-(-O // tiles.outputs) * -(-T // tiles.tokens),)
        integer_kernel[grid](
            x.codes, x.scale, x.offset, x.sums, w.codes, w.scale, w.offset, w.sums, bias, y, T, O,
            I=I, S=S, W_GROUP=w.group, X_GROUP=I // len(x.scale), PACKED=w.is_packed, PLANES=x.layout.planes,
            INTERPRETED=is_interpreted(),
            BLOCK_O=tiles.outputs, BLOCK_T=tiles.tokens, BLOCK_I=tiles.columns, STAGES=tiles.stages,
            num_warps=tiles.warps,
        )  # fmt: skip

    assert T * I < 2**31, f"{T} tokens of {I} inputs are more than a kernel can address: split them"
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
    x = x.contiguous()
    y = torch.empty(T, O, dtype=x.dtype, device=x.device)

    def run(tiles: Tiles) -> None:
        grid = (-(-O // tiles.outputs) * -(-T // tiles.tokens),)
        weight_only_kernel[grid](
            x, w.codes, w.scale, w.offset, bias, y, T, O,
            I=I, W_GROUP=w.group, PACKED=w.is_packed, INTERPRETED=is_interpreted(),
            BLOCK_O=tiles.outputs, BLOCK_T=tiles.tokens, BLOCK_I=tiles.columns, STAGES=tiles.stages,
            num_warps=tiles.warps,
        )  # fmt: skip

    if T:
        key = ("weight only", power_of_2(T), O, I, w.group, w.is_packed, x.dtype, y.device)
        with torch.cuda.device_of(y):
            run(fastest(key, candidates(T, O, min(64, _step(w.group)), False), run))
    return y


def candidates(T: int, O: int, step: int, grouped: bool) -> list[Tiles]:
    """Tiles worth trying for T tokens, the most promising first; `step` columns at a time.

    Few tokens: time goes into reading the weight, so narrow tiles keep all multiprocessors busy. Many: time
    goes into the product, and a large tile reads least for what it multiplies; groups hold a second sum of
    the tile in registers, which large tiles do not have.
    """
    if is_interpreted():
        return [Tiles(power_of_2(min(O, 64)), power_of_2(min(T, 64)), step, 4, 2)]
    few = max(16, min(power_of_2(T), 64))
    if T <= 64:
        shapes = [(64, few, 4, 4), (32, few, 4, 4), (128, few, 4, 4), (64, few, 4, 6)]
    elif grouped or T <= 512:
        shapes = [(128, 64, 4, 4), (128, 128, 8, 3), (64, 128, 4, 4), (128, 64, 8, 4)]
    else:
        shapes = [(128, 128, 8, 3), (128, 256, 8, 3), (128, 64, 4, 4), (256, 128, 8, 3)]
    return [Tiles(o, t, step, warps, stages) for o, t, warps, stages in shapes]


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


@kernel
def tile_of(T, O, BLOCK_O: tl.constexpr, BLOCK_T: tl.constexpr):
    """First output and token of this program: 8 rows of tiles at a time, so that neighbours in time share
    weights and inputs in the L2 cache."""
    pid = tl.program_id(0)
    rows = tl.cdiv(O, BLOCK_O)
    columns = tl.cdiv(T, BLOCK_T)
    first = pid // (8 * columns) * 8
    height = min(rows - first, 8)
    within = pid % (8 * columns)
    return (first + within % height) * BLOCK_O, within // height * BLOCK_T


@kernel
def multiply(
    acc,
    w_ptr,
    x_ptr,
    o,
    t,
    start,
    I: tl.constexpr,
    PACKED: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK_I: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """acc + the product over the columns start ... start + BLOCK_I: [outputs, tokens] int32."""
    i = tl.arange(0, BLOCK_I)
    if not PACKED:
        w = tl.load(w_ptr + o[:, None] * I + (start + i)[None, :])
        x = tl.load(x_ptr + t[None, :] * I + (start + i)[:, None])
        return tl.dot(w, x, acc, out_dtype=tl.int32)
    h = tl.arange(0, BLOCK_I // 2)
    p = tl.load(w_ptr + o[:, None] * (I // 2) + (start // 2 + h)[None, :])
    low = (p & 15).to(tl.int8)
    if INTERPRETED:
        high = (p >> 4).to(tl.int8)
    else:  # four at once; a shift of bytes is compiled to 15 instructions
        high = tl.inline_asm_elementwise(
            "{ shr.b32 $0, $1, 4; and.b32 $0, $0, 0x0f0f0f0f; }", "=r,r", [p], tl.int8, is_pure=True, pack=4
        )
    if PLANES:
        x_ptrs = x_ptr + t[None, :] * I + (start // 2 + h)[:, None]
        acc = tl.dot(low, tl.load(x_ptrs), acc, out_dtype=tl.int32)
        return tl.dot(high, tl.load(x_ptrs + I // 2), acc, out_dtype=tl.int32)
    x = tl.load(x_ptr + t[None, :] * I + (start + i)[:, None])
    return tl.dot(tl.interleave(low, high), x, acc, out_dtype=tl.int32)


@kernel
def corrected(
    acc, x_offset_ptr, x_sums_ptr, w_offset_ptr, w_sums_ptr, n, o, t, T, O,
    S: tl.constexpr, W_GROUP: tl.constexpr, X_GROUP: tl.constexpr,
):  # fmt: skip
    """sum (c_x + a)(c_w + d) of segment n from acc = sum c_x c_w."""
    if w_offset_ptr is not None:
        d = tl.load(w_offset_ptr + n * S // W_GROUP * O + o)
        acc += d[:, None] * tl.load(x_sums_ptr + n * T + t)[None, :]
    if x_offset_ptr is not None:
        a = tl.load(x_offset_ptr + n * S // X_GROUP * T + t)
        acc += tl.load(w_sums_ptr + n * O + o)[:, None] * a[None, :]
    return acc


@kernel
def integer_kernel(
    x_ptr, x_scale_ptr, x_offset_ptr, x_sums_ptr, w_ptr, w_scale_ptr, w_offset_ptr, w_sums_ptr,
    bias_ptr, y_ptr, T, O,
    I: tl.constexpr, S: tl.constexpr, W_GROUP: tl.constexpr, X_GROUP: tl.constexpr,
    PACKED: tl.constexpr, PLANES: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A tile [outputs, tokens] of y^T."""
    first_o, first_t = tile_of(T, O, BLOCK_O, BLOCK_T)
    o_all = first_o + tl.arange(0, BLOCK_O)
    t_all = first_t + tl.arange(0, BLOCK_T)
    o = o_all % O  # beyond the end: some row, not stored
    t = t_all % T
    if S == I:
        acc = tl.zeros((BLOCK_O, BLOCK_T), tl.int32)
        for start in tl.range(0, I, BLOCK_I, num_stages=STAGES):
            acc = multiply(acc, w_ptr, x_ptr, o, t, start, I, PACKED, PLANES, BLOCK_I, INTERPRETED)
        acc = corrected(
            acc, x_offset_ptr, x_sums_ptr, w_offset_ptr, w_sums_ptr, 0, o, t, T, O, S, W_GROUP, X_GROUP
        )
        y = acc.to(tl.float32) * tl.load(x_scale_ptr + t)[None, :] * tl.load(w_scale_ptr + o)[:, None]
    else:
        y = tl.zeros((BLOCK_O, BLOCK_T), tl.float32)
        for n in tl.range(0, I // S, num_stages=STAGES):
            acc = tl.zeros((BLOCK_O, BLOCK_T), tl.int32)
            for k in tl.static_range(0, S, BLOCK_I):
                acc = multiply(acc, w_ptr, x_ptr, o, t, n * S + k, I, PACKED, PLANES, BLOCK_I, INTERPRETED)
            acc = corrected(
                acc, x_offset_ptr, x_sums_ptr, w_offset_ptr, w_sums_ptr, n, o, t, T, O, S, W_GROUP, X_GROUP
            )
            part = acc.to(tl.float32)
            if X_GROUP < I:
                part *= tl.load(x_scale_ptr + n * S // X_GROUP * T + t)[None, :]
            if W_GROUP < I:
                part *= tl.load(w_scale_ptr + n * S // W_GROUP * O + o)[:, None]
            y += part
        if X_GROUP == I:
            y *= tl.load(x_scale_ptr + t)[None, :]
        if W_GROUP == I:
            y *= tl.load(w_scale_ptr + o)[:, None]
    store(y, bias_ptr, y_ptr, o_all, t_all, T, O)


@kernel
def weight_only_kernel(
    x_ptr, w_ptr, w_scale_ptr, w_offset_ptr, bias_ptr, y_ptr, T, O,
    I: tl.constexpr, W_GROUP: tl.constexpr, PACKED: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A tile [outputs, tokens] of y^T, the weight dequantized on the way."""
    first_o, first_t = tile_of(T, O, BLOCK_O, BLOCK_T)
    o_all = first_o + tl.arange(0, BLOCK_O)
    t_all = first_t + tl.arange(0, BLOCK_T)
    o = o_all % O
    t = t_all % T
    i = tl.arange(0, BLOCK_I)
    h = tl.arange(0, BLOCK_I // 2)
    y = tl.zeros((BLOCK_O, BLOCK_T), tl.float32)
    for start in tl.range(0, I, BLOCK_I, num_stages=STAGES):
        x = tl.load(x_ptr + t[None, :] * I + (start + i)[:, None])
        if PACKED:
            p = tl.load(w_ptr + o[:, None] * (I // 2) + (start // 2 + h)[None, :])
            c = tl.interleave((p & 15).to(tl.int8), (p >> 4).to(tl.int8)).to(tl.float32)
        else:
            c = tl.load(w_ptr + o[:, None] * I + (start + i)[None, :]).to(tl.float32)
        if w_offset_ptr is not None:
            c += tl.load(w_offset_ptr + start // W_GROUP * O + o).to(tl.float32)[:, None]
        w = (c * tl.load(w_scale_ptr + start // W_GROUP * O + o)[:, None]).to(x.dtype)
        if INTERPRETED:  # the interpreter multiplies no bf16
            y = tl.dot(w.to(tl.float32), x.to(tl.float32), y, input_precision="ieee")
        else:
            y = tl.dot(w, x, y, input_precision="ieee")
    store(y, bias_ptr, y_ptr, o_all, t_all, T, O)


@kernel
def store(y, bias_ptr, y_ptr, o, t, T, O):
    """y^T + b, where there is a bias, to y [tokens, outputs]."""
    if bias_ptr is not None:
        y += tl.load(bias_ptr + o, mask=o < O, other=0.0).to(tl.float32)[:, None]
    at = y_ptr + t[None, :].to(tl.int64) * O + o[:, None]
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=(o < O)[:, None] & (t < T)[None, :])

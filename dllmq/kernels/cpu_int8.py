"""Integer linears on CPU: int8 codes times int8 codes, accumulated in int32.

    y = sum over segments n of  s_x s_w sum_i (q_x,i - z_x)(q_w,i - z_w)  + b

s_x, z_x of each token or group of its channels (dynamic), s_w, z_w of each output channel or group. A segment
is what lies between two changes of a scale (cpu_inputs.py); with one scale per token and output channel it is
the whole row. Up to 7 bits q - z fits int8 and is the product's operand. At 8 bits codes are moved by m = 128
(an unsigned input by an m of its own): with q = c + m, a = m - z_x, d = 128 - z_w

    sum (q_x - z_x)(q_w - z_w) = sum c_x c_w + d sum c_x + a sum (c_w + d)

The sum is exact in int32 for segments of 2 to 33,025 columns and then becomes fp32, rounded once where it
passes 2^24. Its terms are added as integers (in fp32 where all of them stay below 2^24): they cancel where a
token is nearly all zeros, and what fp32 would lose of them may be all that is left. Sums are scaled and added
segment by segment in fp32, in order: the output differs from the definition by the rounding of these steps.

The kernels differ in how a weight lies in memory, and in nothing else: their outputs are equal bit for bit.

    onednn   cpu_onednn.py   int8, in oneDNN's order, one byte a weight: the fastest
    int_mm   here            int8, one byte a weight: torch's product puts it in order each time
    int4     cpu_int4.py     up to 4 bits, two weights a byte, widened in each product

Legend: T tokens, I inputs, O outputs; N segments of S columns; G groups; q codes, z zero, s scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int8, Integer
from torch import Tensor

from dllmq.kernels.cpu_inputs import MOVED, Inputs, Layout, max_abs, quantize_inputs, segment
from dllmq.numerics import Grid, QuantizedTensor

COLUMNS = range(2, 33_026)  # more could overflow: 33,025 * 255^2 < 2^31; torch._int_mm is wrong for one
OUTPUTS = (4096, 2048)  # of a chunk: rows of one segment, of more (256 tokens' fp32 outputs take 2 MB)
EXACT = 2**24  # integers up to here are exact in fp32
ROWS = 128  # rows of weights that are widened together
SCALED = 3 * 2**19  # sums that are scaled together: they stay in cache
TOKENS = 256  # that pass through a chunk's segments together


@runtime_checkable
class Codes(Protocol):
    """c of a chunk of outputs, in some order in memory."""

    def opened(self) -> Codes:
        """Ready for products: itself, or widened."""

    def add(self, n: int, x: Tensor, scale: Tensor | None, total: Tensor | None) -> Tensor:
        """total + scale * sum c_x c_w over segment n in fp32 [T, o]; a `total` that is given is changed."""

    def product(self, n: int, x: Tensor, middle: int) -> Tensor:
        """sum c_x c_w over segment n: int32, or fp32 that is rounded; `middle` as in `Inputs`."""

    def exact(self, n: int, x: Tensor, middle: int, sums: Tensor, added: float) -> Tensor:
        """A product's rows without rounding: int32, or fp32 that stays exact with up to `added` added."""

    def plain(self) -> Int8[Tensor, "o I"]:
        """c itself."""


@dataclass(frozen=True)
class Operand:
    """A weight, ready for the product with inputs under one grid.

    Attributes:
        chunks: c of `outputs` outputs each, the last one of what is left.
        scale: s of each group.
        offset: d of each group, integers; None where all are 0.
        sums: sum (c + d) of each segment, integers; None where the input has no offset.
        shape: (O, I); layout: how it wants its input.
        largest: the largest |d|, |sum (c + d)| and norm of c, over a segment.
    """

    chunks: tuple[Codes, ...]
    scale: Float[Tensor, "G O"]
    offset: Float[Tensor, "G O"] | None
    sums: Float[Tensor, "N O"] | None
    shape: tuple[int, int]
    layout: Layout
    outputs: int
    largest: tuple[float, float, float]

    @property
    def has_offsets(self) -> bool:
        """Whether a or d is added to the product of codes."""
        return self.offset is not None or self.sums is not None

    def steps(self) -> Integer[Tensor, "O I"]:
        """q - z of every weight."""
        c = torch.cat([chunk.plain() for chunk in self.chunks])
        if self.offset is None:
            return c
        width = self.shape[1] // len(self.offset)
        return c.to(torch.int16) + self.offset.T.to(torch.int16).repeat_interleave(width, 1)


@dataclass(frozen=True)
class Bytes:
    """c as it is, segment by segment."""

    codes: Int8[Tensor, "N o S"]

    def opened(self) -> Codes:
        return self

    def add(self, n: int, x: Tensor, scale: Tensor | None, total: Tensor | None) -> Tensor:
        part = torch._int_mm(x, self.codes[n].T).float()
        part = part if scale is None else part.mul_(scale)
        return part if total is None else total.add_(part)

    def product(self, n: int, x: Tensor, middle: int) -> Tensor:
        return torch._int_mm(x, self.codes[n].T)

    def exact(self, n: int, x: Tensor, middle: int, sums: Tensor, added: float) -> Tensor:
        return sums

    def plain(self) -> Int8[Tensor, "o I"]:
        return self.codes.transpose(0, 1).flatten(1)


def supports(weight: Grid, inputs: Grid | None, O: int, I: int) -> bool:
    """Whether these grids have an integer product: quantized inputs, per token or per group of channels."""
    if inputs is None or inputs.group_size == 0 or any(I % max(1, g.group_size) for g in (weight, inputs)):
        return False
    return segment(weight, inputs, I) in COLUMNS


def prepare(quantized: QuantizedTensor, inputs: Grid | None) -> Operand:
    """A weight's operand for inputs under a grid."""
    return prepare_as(quantized, inputs, lambda codes, base: Bytes(codes), unsigned=False)


def prepare_as(
    quantized: QuantizedTensor,
    inputs: Grid | None,
    make: Callable[[Tensor, Tensor], Codes],
    unsigned: bool,
    outputs: int | None = None,
) -> Operand:
    """An operand with its chunks in some order.

    Args:
        make: given c, int8 [N, o, S], and what is between it and codes from 0 on, z - low, int16 [N, o].
        unsigned: whether the product takes inputs moved by 128.
        outputs: of a chunk; None: OUTPUTS.
    """
    grid, (O, I) = quantized.grid, quantized.shape
    assert inputs is not None and supports(grid, inputs, O, I) and quantized.group_index is None
    S, G = segment(grid, inputs, I), grid.groups(I)
    step, zero = outputs or OUTPUTS[S < I], quantized.zero.expand(O, G).to(torch.int16)
    chunks, parts, norm = [], [], 0.0
    for start in range(0, O, step):
        at = slice(start, start + step)
        c = _codes(quantized.codes[at], zero[at], grid).view(-1, I // S, S)
        parts.append(c.sum(-1, dtype=torch.int32))
        for some in c.split(ROWS):
            norm = max(norm, max_abs(torch.linalg.vector_norm(some.float(), 2, -1)))
        base = (zero[at] - grid.low).repeat_interleave(I // S // G, 1)
        chunks.append(make(c.transpose(0, 1).contiguous(), base.T))
    offset = (MOVED - zero).T.float().contiguous() if grid.bits == 8 and not grid.symmetric else None
    total = torch.cat(parts).T.float().contiguous()
    if offset is not None:
        total += S * offset.repeat_interleave(len(total) // G, 0)
    needs = inputs.bits == 8 and not inputs.symmetric
    scale = quantized.scale.expand(O, G).T.contiguous()
    sums, layout = total if needs else None, Layout(S, unsigned)
    largest = (max_abs(offset), max_abs(sums), norm)
    return Operand(tuple(chunks), scale, offset, sums, (O, I), layout, step, largest)


def quantize_for(x: Float[Tensor, "T I"], operand: Operand, inputs: Grid) -> Inputs:
    """x as this operand wants it; all operands with the same `layout` can share it."""
    return quantize_inputs(x, inputs, operand.layout)


def quant_linear(
    x: Float[Tensor, "*rows I"], operand: Operand, inputs: Grid | None, bias: Tensor | None = None
) -> Float[Tensor, "*rows O"]:
    """The linear, in x's dtype."""
    assert inputs is not None, "the operand was prepared for a quantized input"
    rows = quantize_for(x.reshape(-1, x.shape[-1]), operand, inputs)
    y = integer_linear(rows, operand, bias, x.dtype)
    return y.reshape(*x.shape[:-1], operand.shape[0])


def integer_linear(x: Inputs, w: Operand, bias: Tensor | None, dtype: torch.dtype) -> Float[Tensor, "T O"]:
    """From quantized inputs, in fp32 up to the rounding to `dtype`."""
    T, (O, _) = x.codes.shape[1], w.shape
    y = torch.empty(T, O, dtype=dtype)
    for i, chunk in enumerate(w.chunks):
        at, codes = slice(w.outputs * i, min(w.outputs * (i + 1), O)), chunk.opened()
        if len(x.codes) == 1:
            _one_segment(x, w, codes, at, y[:, at], bias)
            continue
        for start in range(0, T, TOKENS):
            rows = slice(start, start + TOKENS)
            y[rows, at] = _segments(_tokens(x, rows), w, codes, at, bias)
    return y


def _one_segment(x: Inputs, w: Operand, codes: Codes, at: slice, y: Tensor, bias: Tensor | None) -> None:
    """Into y [T, o]. Both sides have one scale a row: the whole sum in integers, then the scales."""
    product = codes.product(0, x.codes[0], x.middle)
    step = max(1, SCALED // y.shape[1])
    for start in range(0, len(y), step):
        rows = slice(start, start + step)
        part = x if step >= len(y) else _tokens(x, rows)
        sums = _with_offsets(part, w, codes, at, 0, product[rows]).mul_(part.scale)
        if bias is None:
            torch.mul(sums, w.scale[0, at], out=y[rows])
        else:
            y[rows] = sums.mul_(w.scale[0, at]).add_(bias[at])


def exact_sums(x: Inputs, w: Operand, codes: Codes, at: slice, n: int) -> Float[Tensor, "T o"]:
    """sum (q_x - z_x)(q_w - z_w) over segment n: an integer, rounded to fp32 once."""
    return _with_offsets(x, w, codes, at, n, codes.product(n, x.codes[n], x.middle))


def _with_offsets(
    x: Inputs, w: Operand, codes: Codes, at: slice, n: int, sums: Tensor
) -> Float[Tensor, "T o"]:
    """`exact_sums` from the product of codes, which it changes."""
    N, terms = len(x.codes), [ours * theirs for ours, theirs in zip(x.largest, w.largest, strict=True)]
    if w.has_offsets and not 1.01 * sum(terms) <= EXACT:  # a sum is at most the product of norms; or NaN
        sums = codes.exact(n, x.codes[n], x.middle, sums, terms[0] + terms[1])
    if w.offset is not None:
        sums.addcmul_(x.sums[:, n, None].to(sums.dtype), w.offset[_group(n, w.offset, N), at].to(sums.dtype))
    if x.offset is not None:
        assert w.sums is not None, "the operand was prepared for inputs without an offset"
        a = x.offset[:, _group(n, x.offset.T, N), None]
        sums.addcmul_(a.to(sums.dtype), w.sums[n, at].to(sums.dtype))
    return sums.float()


def _segments(x: Inputs, w: Operand, codes: Codes, at: slice, bias: Tensor | None) -> Float[Tensor, "T o"]:
    """Segment by segment, combined in fp32."""
    combine = _exact_segments if w.has_offsets else _plain_segments
    y = combine(x, w, codes, at)
    if x.scale.shape[1] == 1:
        y.mul_(x.scale)
    return y if bias is None else y.add_(bias[at])


def _plain_segments(x: Inputs, w: Operand, codes: Codes, at: slice) -> Float[Tensor, "T o"]:
    """The product scales, and adds where a token has one scale; that one is left out."""
    N, by_token = len(x.codes), x.scale.shape[1] == 1
    scale = [w.scale[_group(n, w.scale, N), at] for n in range(N)]
    y = codes.add(0, x.codes[0], scale[0], None)
    if not by_token:
        y.mul_(x.scale[:, :1])
    for n in range(1, N):
        if by_token:
            y = codes.add(n, x.codes[n], scale[n], y)
        else:
            m = _group(n, x.scale.T, N)
            y.addcmul_(codes.add(n, x.codes[n], scale[n], None), x.scale[:, m : m + 1])
    return y


def _exact_segments(x: Inputs, w: Operand, codes: Codes, at: slice) -> Float[Tensor, "T o"]:
    """With a and d added to each sum before it is scaled; a token's only scale is left out."""
    N, by_token = len(x.codes), x.scale.shape[1] == 1
    y = torch.zeros(x.codes.shape[1], w.scale[0, at].numel())
    for n in range(N):
        sums, m = exact_sums(x, w, codes, at, n), _group(n, x.scale.T, N)
        if not by_token:
            sums.mul_(x.scale[:, m : m + 1])
        y.addcmul_(sums, w.scale[_group(n, w.scale, N), at])
    return y


def _group(n: int, groups: Tensor, N: int) -> int:
    """Which of the groups segment n of N lies in."""
    return n * len(groups) // N


def _tokens(x: Inputs, rows: slice) -> Inputs:
    offset = None if x.offset is None else x.offset[rows]
    return replace(x, codes=x.codes[:, rows], scale=x.scale[rows], offset=offset, sums=x.sums[rows])


def _codes(codes: Tensor, zero: Tensor, grid: Grid) -> Int8[Tensor, "o I"]:
    """c of some outputs; zero [o, G] int16."""
    if grid.symmetric:
        return codes.contiguous()
    if grid.bits == 8:
        return (codes ^ MOVED).view(torch.int8)
    groups = codes.view(torch.int8).reshape(len(codes), zero.shape[1], -1)  # codes below 128
    return (groups - zero.to(torch.int8)[..., None]).flatten(1)


def works() -> bool:
    """Whether the product is exact here."""
    return is_exact()


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

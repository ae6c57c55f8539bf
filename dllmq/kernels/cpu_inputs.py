"""A linear's input as the integer products on CPU want it: codes of one byte, segment by segment.

A segment is what lies between two changes of a scale, of the weight or of the input: S columns, N = I / S of
them. With z of each token (or of each group of its channels) codes are written q - z = c + a:

    up to 7 bits, and symmetric    c = q - z,    a = 0
    8 bits                         c = q - m,    a = m - z

With m = 128 c fits int8. oneDNN's product takes unsigned inputs, u = c + m, and takes m off again in integers
(m = 128 up to 7 bits too); at 8 bits m is the median of a batch's z there, which keeps a and all sums small
where an outlier of one sign leaves the other values of many tokens at one end of their grids.

What it costs: nine passes over the input in a core's cache, 1 ms for 256 tokens of 4,096 channels (one core,
AMD Zen 5), a thirtieth of the product with 12,288 outputs. Fusing the norm before it could save one of them,
which is not worth a kernel: sharing one quantization among the linears of a group (models/linear.py) is all
that pays on CPU.

Legend: T tokens, I inputs, N segments of S columns, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from dllmq.numerics import Grid, fit

MOVED = 128
BLOCK = 1 << 18  # values that are quantized at a time: their fp32 stays in a core's cache


@dataclass(frozen=True)
class Layout:
    """How an operand wants its input: columns of a segment, and whether codes are moved by 128."""

    segment: int
    unsigned: bool


@dataclass(frozen=True)
class Inputs:
    """Quantized tokens.

    Attributes:
        codes: c (int8), or c + m (uint8), segment by segment.
        scale: s of each token and group.
        offset: a of each token and group, integers; None where all are 0.
        sums: sum of c over each segment, integers.
        middle: m; 128 where codes are int8.
        largest: the largest |sum of c|, |a| and norm of c, over a segment; at least these.
    """

    codes: Integer[Tensor, "N T S"]
    scale: Float[Tensor, "T G"]
    offset: Float[Tensor, "T G"] | None
    sums: Float[Tensor, "T N"]
    middle: int
    largest: tuple[float, float, float]


def segment(weight: Grid, inputs: Grid, I: int) -> int:
    """S: the largest number of columns that no change of a scale divides."""
    return gcd(_width(weight, I), _width(inputs, I))


def quantize_inputs(x: Float[Tensor, "T I"], grid: Grid, layout: Layout) -> Inputs:
    """Codes and scales under a dynamic grid: those of `numerics.fit` and `numerics.quantize`, bit for bit."""
    (T, I), S, G = x.shape, layout.segment, grid.groups(x.shape[1])
    codes = torch.empty(I // S, T, S, dtype=torch.int8)
    scale, zero, sums, norm = (torch.empty(T, n) for n in (G, G, I // S, I // S))
    rows = max(1, BLOCK // I)
    for start in range(0, T, rows):
        at = slice(start, start + rows)
        c, scale[at], zero[at] = _quantize(x[at].float(), grid)
        by_segment = c.view(-1, I // S, S)
        torch.sum(by_segment, -1, out=sums[at])
        if _is_moved(grid):
            torch.linalg.vector_norm(by_segment, 2, -1, out=norm[at])
        codes[:, at] = by_segment.transpose(0, 1).to(torch.int8)
    if layout.unsigned:
        codes = codes.view(torch.uint8).bitwise_xor_(MOVED)
    if not _is_moved(grid):
        most = 2.0**grid.bits  # |c| is less
        return Inputs(codes, scale, None, sums, MOVED, (S * most, 0.0, S**0.5 * most))
    middle = _middle(zero) if layout.unsigned else MOVED
    by = MOVED - middle
    norm = (norm.square_() + by * (2 * sums + by * S)).clamp_(min=0).sqrt_()
    offset, sums = middle - zero, sums.add_(S * by)
    return Inputs(codes, scale, offset, sums, middle, (max_abs(sums), max_abs(offset), max_abs(norm)))


def max_abs(x: Tensor | None) -> float:
    """The largest |x|, 0 where there is none."""
    return 0.0 if x is None or not x.numel() else float(x.abs().max())


def _middle(zero: Float[Tensor, "T G"]) -> int:
    """The median; a token that is not finite has no zero."""
    middle = zero.nanmedian() if zero.numel() else torch.tensor(torch.nan)
    return int(middle) if middle.isfinite() else MOVED


def _quantize(x: Float[Tensor, "T I"], grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """c in fp32, and scale and zero."""
    scale, zero = fit(x, grid)
    G = scale.shape[1]
    groups = x.reshape(len(x), G, -1)
    q = torch.div(groups, scale[..., None]).round_()
    if not grid.symmetric:
        q.add_(zero[..., None])
    q.clamp_(grid.low, grid.high)
    if _is_moved(grid):
        q.sub_(MOVED)
    elif not grid.symmetric:
        q.sub_(zero[..., None])
    return q, scale, zero


def _is_moved(grid: Grid) -> bool:
    """Whether q - z does not fit int8."""
    return grid.bits == 8 and not grid.symmetric


def _width(grid: Grid, I: int) -> int:
    return grid.group_size if grid.group_size > 0 else I

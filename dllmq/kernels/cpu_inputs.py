"""A linear's input as the integer products on CPU want it: codes of one byte, segment by segment.

A segment is what lies between two changes of a scale, of the weight or of the input: S columns, N = I / S of
them. With z of each token (or of each group of its channels) codes are written q - z = c + a:

    up to 7 bits, and symmetric    c = q - z,    a = 0
    8 bits                         c = q - 128,  a = 128 - z

c fits int8. oneDNN's product takes unsigned inputs, u = c + 128, and takes the 128 off again in integers.

What it costs: eight passes over the input in a core's cache, 1 ms for 256 tokens of 4,096 channels (one core,
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
        codes: c (int8) or c + 128 (uint8), segment by segment.
        scale: s of each token and group.
        offset: a of each token and group, integers; None where all are 0.
        sums: sum of c over each segment, integers.
    """

    codes: Integer[Tensor, "N T S"]
    scale: Float[Tensor, "T G"]
    offset: Float[Tensor, "T G"] | None
    sums: Float[Tensor, "T N"]


def segment(weight: Grid, inputs: Grid, I: int) -> int:
    """S: the largest number of columns that no change of a scale divides."""
    return gcd(_width(weight, I), _width(inputs, I))


def quantize_inputs(x: Float[Tensor, "T I"], grid: Grid, layout: Layout) -> Inputs:
    """Codes and scales under a dynamic grid: those of `numerics.fit` and `numerics.quantize`, bit for bit."""
    (T, I), S, G = x.shape, layout.segment, grid.groups(x.shape[1])
    codes = torch.empty(I // S, T, S, dtype=torch.int8)
    scale, zero, sums = torch.empty(T, G), torch.empty(T, G), torch.empty(T, I // S)
    rows = max(1, BLOCK // I)
    for start in range(0, T, rows):
        at = slice(start, start + rows)
        c, scale[at], zero[at] = _quantize(x[at].float(), grid)
        by_segment = c.view(-1, I // S, S)
        torch.sum(by_segment, -1, out=sums[at])
        codes[:, at] = by_segment.transpose(0, 1).to(torch.int8)
    if layout.unsigned:
        codes = codes.view(torch.uint8).bitwise_xor_(MOVED)
    return Inputs(codes, scale, MOVED - zero if _is_moved(grid) else None, sums)


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

"""A linear's input as int8 operand, in one pass over it: range, scale, zero, codes and their sums.

The numbers are those of `numerics.fit` and `numerics.quantize` on the CPU, bit for bit (on CUDA torch divides
by a constant through its reciprocal, which moves some scales by one unit in the last place). With the
published LLaDA's RMSNorm in front, the normed values never reach memory.

What the product multiplies are `codes` c with q - z = c + a:

    symmetric            c = q          a = 0
    2 to 7 bits          c = q - z      a = 0        fits int8
    8 bits               c = q - 128    a = 128 - z

`sums` are sum c over each segment of the row: the columns between two changes of a scale, of the weight or
of the input. 4-bit weights lie two a byte, columns 2j and 2j + 1 together; their product wants the even
columns of the input first, then the odd ones (`planes`).

Legend: T tokens, I inputs, S columns of a segment, G groups, R segments of a group, a offset.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor

from dllmq.kernels.triton_jit import kernel, power_of_2, round_half_even
from dllmq.numerics import Grid

tl: Any  # triton.language, set by the first launch


@dataclass(frozen=True)
class Layout:
    """How a weight wants its input.

    Attributes:
        segment: S; divides I.
        planes: even columns first, then the odd ones.
    """

    segment: int
    planes: bool


@dataclass(frozen=True)
class Inputs:
    """A quantized input; G = 1 with one scale per token. `offset` a is None where it is 0.

    What belongs to groups is stored group by group: a product reads one group of many tokens.
    """

    codes: Int8[Tensor, "T I"]
    scale: Float[Tensor, "G T"]
    offset: Int[Tensor, "G T"] | None
    sums: Int[Tensor, "N T"]
    layout: Layout

    def tokens(self, part: slice) -> Inputs:
        """Some of the tokens."""
        offset = None if self.offset is None else self.offset[:, part].contiguous()
        scale, sums = self.scale[:, part].contiguous(), self.sums[:, part].contiguous()
        return Inputs(self.codes[part], scale, offset, sums, self.layout)


@dataclass(frozen=True)
class Norm:
    """An RMSNorm in front of the linear: x -> weight * (x / sqrt(mean x^2 + eps)), rounded as in LLaDA."""

    weight: Float[Tensor, " I"]
    eps: float


def quantize_inputs(x: Float[Tensor, "T I"], grid: Grid, layout: Layout, norm: Norm | None = None) -> Inputs:
    """x (or norm(x)) under a dynamic grid: one scale per token, or per group of whole segments.

    Args:
        x: fp32, bf16 or fp16.
    """
    T, I = x.shape
    G, S = grid.groups(I), layout.segment
    R = I // G // S
    assert G * R * S == I and grid.group_size != 0, f"segments of {S} do not fill the groups of {grid}"
    x = x if x.stride(1) == 1 else x.contiguous()
    codes = torch.empty(T, I, dtype=torch.int8, device=x.device)
    scale = torch.empty(G, T, dtype=torch.float32, device=x.device)
    has_offset = grid.bits == 8 and not grid.symmetric
    offset = torch.empty(G, T, dtype=torch.int32, device=x.device) if has_offset else None
    sums = torch.empty(G * R, T, dtype=torch.int32, device=x.device)
    blocks = tuple(map(power_of_2, (G, R, S)))
    if not T:
        return Inputs(codes, scale, offset, sums, layout)
    with torch.cuda.device_of(x):
        quantize_kernel[(T,)](
            x, codes, scale, offset, sums, None if norm is None else norm.weight,
            0.0 if norm is None else norm.eps, x.stride(0), T,
            I=I, G=G, R=R, S=S, BLOCK_G=blocks[0], BLOCK_R=blocks[1], BLOCK_S=blocks[2],
            LEVELS=2**grid.bits - 1, LOW=grid.low, HIGH=grid.high, SYMMETRIC=grid.symmetric,
            PLANES=layout.planes, num_warps=4 if I <= 4096 else 8, enable_fp_fusion=False,
        )  # fmt: skip
    return Inputs(codes, scale, offset, sums, layout)


@kernel
def quantize_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    offset_ptr,
    sums_ptr,
    norm_ptr,
    eps,
    stride,
    T,
    I: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    LEVELS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    PLANES: tl.constexpr,
):
    """One token: a [groups, segments, columns] tile."""
    token = tl.program_id(0).to(tl.int64)
    g = tl.arange(0, BLOCK_G)
    r = tl.arange(0, BLOCK_R)
    s = tl.arange(0, BLOCK_S)
    segment = g[:, None] * R + r[None, :]
    inside = (g < G)[:, None] & (r < R)[None, :]
    column = segment[:, :, None] * S + s[None, None, :]
    mask = inside[:, :, None] & (s < S)[None, None, :]
    raw = tl.load(x_ptr + token * stride + column, mask=mask, other=0.0)
    x = raw.to(tl.float32)
    if norm_ptr is not None:
        mean = tl.div_rn(tl.sum(tl.sum(tl.sum(x * x, 2), 1), 0), I * 1.0)
        normed = (x * tl.rsqrt(mean + eps)).to(raw.dtype)
        weight = tl.load(norm_ptr + column, mask=mask, other=0.0)
        x = (weight.to(tl.float32) * normed.to(tl.float32)).to(raw.dtype).to(tl.float32)

    # scale and zero of each group; tl.max passes over NaN, so it is put back at the end
    broken = tl.max(tl.max((x != x).to(tl.int32), 2), 1) > 0
    if SYMMETRIC:
        span = 2 * tl.max(tl.max(tl.abs(x), 2), 1)
    else:
        low = tl.minimum(tl.min(tl.min(x, 2), 1), 0.0)
        span = tl.maximum(tl.max(tl.max(x, 2), 1), 0.0) - low
    scale = tl.div_rn(span, LEVELS * 1.0)
    scale = tl.where(scale < 1.1754943508222875e-38, 1.0, scale)
    scale = tl.where(broken, float("nan"), scale)
    tl.store(scale_ptr + g * T + token, scale, mask=g < G)

    steps = round_half_even(tl.div_rn(x, scale[:, None, None]))
    if SYMMETRIC:
        c = tl.minimum(tl.maximum(steps, LOW), HIGH)
    else:
        zero = round_half_even(tl.div_rn(0.0 - low, scale))
        q = tl.minimum(tl.maximum(steps + zero[:, None, None], LOW), HIGH)
        if offset_ptr is not None:
            c = q - 128.0
            tl.store(offset_ptr + g * T + token, (128.0 - zero).to(tl.int32), mask=g < G)
        else:
            c = q - zero[:, None, None]
    c = tl.where(mask, c, 0.0).to(tl.int32)
    tl.store(sums_ptr + segment * T + token, tl.sum(c, 2), mask=inside)
    if PLANES:
        even, odd = tl.split(c.to(tl.int8).reshape(BLOCK_G, BLOCK_R, BLOCK_S // 2, 2))
        h = tl.arange(0, BLOCK_S // 2)
        half = segment[:, :, None] * (S // 2) + h[None, None, :]
        there = inside[:, :, None] & (h < S // 2)[None, None, :]
        tl.store(codes_ptr + token * I + half, even, mask=there)
        tl.store(codes_ptr + token * I + I // 2 + half, odd, mask=there)
    else:
        tl.store(codes_ptr + token * I + column, c.to(tl.int8), mask=mask)

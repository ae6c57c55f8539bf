"""Uniform integer grids: fit scales and zeros, round to codes, go back.

Asymmetric, for a group of values with its range widened to contain 0 (so that 0 is a grid point):

    s = (max - min) / (2^b - 1),   z = round(-min / s),   q = clamp(round(x / s) + z, 0, 2^b - 1)

Symmetric, the compressed-tensors convention (codes are two's complement, the step is that of 2^b levels):

    s = 2 max|x| / (2^b - 1),      z = 0,                 q = clamp(round(x / s), -2^(b-1), 2^(b-1) - 1)

In both, x_hat = (q - z) s and |x - x_hat| <= s / 2 for every x the group was fitted on. `round` is to the
nearest even, as in every framework. All arithmetic is in fp32. Not the convention of the GPTQ authors' code
for `sym`, which moves a symmetric range to unsigned codes with z = 2^(b-1); values and steps are the same.

Legend: x values [..., I], q codes, s scale and z zero [..., G], b bits, g group size, G groups in a row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

PER_ROW = -1
PER_TENSOR = 0


@dataclass(frozen=True)
class Grid:
    """Which integers there are and how many values share a scale.

    Attributes:
        bits: code width b, 2 to 8.
        group_size: -1 one scale per row (output channel of W, token of X), 0 one for the tensor, g > 0 one
            per g neighbours along the last axis, whose length g must divide.
        symmetric: zero fixed at 0, signed codes; otherwise unsigned codes and a zero of their own.

    Raises:
        ValueError: a field is out of its range.
    """

    bits: int
    group_size: int = PER_ROW
    symmetric: bool = False

    def __post_init__(self) -> None:
        if not _is_int(self.bits) or not 2 <= self.bits <= 8:
            raise ValueError(
                f"bits is {self.bits!r}, but a grid has an integer of 2 to 8 bits: choose one of those, "
                "or leave the tensor unquantized for 16."
            )
        if not _is_int(self.group_size) or self.group_size < -1:
            raise ValueError(
                f"group_size is {self.group_size!r}, but it must be an integer: use -1 (one scale per row), "
                "0 (one per tensor) or a positive number of neighbouring channels."
            )
        if not isinstance(self.symmetric, bool):
            raise ValueError(
                f"symmetric is {self.symmetric!r}, but it must be a boolean: write true or false."
            )

    @property
    def low(self) -> int:
        """Smallest code."""
        return -(1 << self.bits - 1) if self.symmetric else 0

    @property
    def high(self) -> int:
        """Largest code."""
        return (1 << self.bits - self.symmetric) - 1

    @property
    def dtype(self) -> torch.dtype:
        """Of the codes: int8 (symmetric) or uint8."""
        return torch.int8 if self.symmetric else torch.uint8

    def groups(self, I: int) -> int:
        """Number of scales G in a row of I values.

        Raises:
            ValueError: the group size does not divide I.
        """
        if self.group_size <= 0:
            return 1
        if I % self.group_size:
            raise ValueError(
                f"group_size {self.group_size} does not divide a row of {I} values: use a divisor of {I}, "
                "-1 (one scale per row) or 0 (one per tensor)."
            )
        return I // self.group_size


class Params(NamedTuple):
    """Scale and zero of each group: [..., G], G = 1 per row; one element in as many dimensions per tensor."""

    scale: Float[Tensor, "*#rows G"]
    zero: Float[Tensor, "*#rows G"]  # integers, held in fp32


def fit(x: Float[Tensor, "*rows I"], grid: Grid, shrink: float = 1.0) -> Params:
    """Scale and zero from the range of each group (equations on top of this file).

    A group that holds nothing but zeros (or so little that s is subnormal) gets s = 1: nothing divides by 0.

    Args:
        x: values.
        shrink: both ends of the range are multiplied by it, in (0, 1]; values beyond saturate.
    """
    assert 0 < shrink <= 1, f"shrink must lie in (0, 1], got {shrink}"
    low, high = _range(x.float(), grid)
    if grid.symmetric:
        span = 2 * shrink * torch.maximum(high, -low)
    else:
        low, high = shrink * low.clamp(max=0), shrink * high.clamp(min=0)
        span = high - low
    scale = span / torch.full_like(span, 2**grid.bits - 1)  # a number: CUDA would multiply by its reciprocal
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)
    zero = torch.zeros_like(scale) if grid.symmetric else torch.round((0.0 - low) / scale)
    return Params(scale, zero)


def quantize(x: Float[Tensor, "*rows I"], params: Params, grid: Grid) -> Integer[Tensor, "*rows I"]:
    """Codes q of the nearest grid points; uint8 (asymmetric) or int8 (symmetric)."""
    scale, zero = _like_groups(params, x, grid)
    return _round(_grouped(x.float(), grid), scale, zero, grid).to(grid.dtype).reshape(x.shape)


def dequantize(codes: Integer[Tensor, "*rows I"], params: Params, grid: Grid) -> Float[Tensor, "*rows I"]:
    """x_hat = (q - z) s in fp32."""
    scale, zero = _like_groups(params, codes, grid)
    return (_grouped(codes.float(), grid) - zero).mul_(scale).reshape(codes.shape)


def fake_quant(
    x: Float[Tensor, "*rows I"], grid: Grid, params: Params | None = None
) -> Float[Tensor, "*rows I"]:
    """dequantize(quantize(x)), bit for bit, without the codes; computed in fp32, returned in x's dtype.

    Args:
        params: fitted on x when None (dynamic quantization).
    """
    params = fit(x, grid) if params is None else params
    scale, zero = _like_groups(params, x, grid)
    x_hat = _round(_grouped(x.float(), grid), scale, zero, grid).sub_(zero).mul_(scale)
    return x_hat.reshape(x.shape).to(x.dtype)


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight as it would be stored: codes, and the scale and zero of each group.

    Attributes:
        codes: [O, I], uint8 (asymmetric) or int8 (symmetric), one code a byte here whatever the width.
        scale, zero: [O, G] fp32; [1, 1] when the grid is per tensor.
        grid: what the codes mean.
        group_index: [I] group of each column where that is not i // g: GPTQ, act_order, dynamic groups.
    """

    codes: Integer[Tensor, "O I"]
    scale: Float[Tensor, "#O G"]
    zero: Float[Tensor, "#O G"]
    grid: Grid
    group_index: Int[Tensor, " I"] | None = None

    def dequantize(self) -> Float[Tensor, "O I"]:
        """W_hat = (q - z) s in fp32; fake_quant(W, grid) bit for bit when the codes came from rounding W."""
        if self.group_index is None:
            return dequantize(self.codes, Params(self.scale, self.zero), self.grid)
        return (self.codes.float() - self.zero[:, self.group_index]) * self.scale[:, self.group_index]

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.codes.shape[0], self.codes.shape[1]

    def unpacked(self) -> QuantizedTensor:
        """Itself: its codes lie one a byte already (numerics/packed.py has them packed)."""
        return self

    def to(self, device: torch.device) -> QuantizedTensor:
        """The same on another device."""
        index = None if self.group_index is None else self.group_index.to(device)
        codes, scale, zero = self.codes.to(device), self.scale.to(device), self.zero.to(device)
        return replace(self, codes=codes, scale=scale, zero=zero, group_index=index)

    @property
    def nbytes(self) -> int:
        """Bytes that store this exactly, see `stored_bytes`."""
        return stored_bytes(self.shape, self.scale, self.zero, self.grid, self.group_index)


def stored_bytes(
    shape: tuple[int, int], scale: Tensor, zero: Tensor, grid: Grid, group_index: Tensor | None
) -> int:
    """Bytes of a quantized weight [O, I] as it would be stored: codes and zeros packed at `bits` each (no
    zeros on symmetric grids), scales and group_index at four bytes."""
    packed = shape[0] * shape[1] + (0 if grid.symmetric else zero.numel())
    whole = scale.numel() + (0 if group_index is None else group_index.numel())
    return -(-packed * grid.bits // 8) + 4 * whole


def _grouped(x: Tensor, grid: Grid) -> Tensor:
    """x as [..., G, g]: values that share a scale on the last axis; x itself where a row has one scale."""
    G = grid.groups(x.shape[-1])
    return x if G == 1 else x.reshape(*x.shape[:-1], G, grid.group_size)


def _range(x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each group, [..., G]; [1, ..., 1] per tensor."""
    if grid.group_size == PER_TENSOR:
        axes = list(range(x.dim()))
        return x.amin(axes, keepdim=True), x.amax(axes, keepdim=True)
    one = grid.groups(x.shape[-1]) == 1
    x = _grouped(x, grid)
    return x.amin(-1, keepdim=one), x.amax(-1, keepdim=one)  # not aminmax: ten times slower on CPU


def _like_groups(params: Params, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and zero shaped to broadcast over `_grouped(x)`."""
    G = grid.groups(x.shape[-1])
    assert params.scale.shape[-1] == G, f"params hold {params.scale.shape[-1]} groups, x has {G}"
    return (params.scale, params.zero) if G == 1 else (params.scale[..., None], params.zero[..., None])


def _round(x: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """q as fp32 integers. Division, not a product with 1 / s: the reciprocal's rounding moves ties."""
    return torch.div(x, scale).round_().add_(zero).clamp_(grid.low, grid.high)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)

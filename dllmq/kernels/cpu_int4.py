"""Integer linears on CPU with weights of up to 4 bits, two a byte in memory: `cpu_int8`'s arithmetic.

A byte holds columns j and j + S/2 of a segment, the first one low, so that a chunk of outputs is widened to
int8 by three passes without a gap between codes: b & 15, b >> 4, and both minus (z - low).

Outputs lie side by side (a weight's transpose): torch's product reads them like that twice as fast at 32
tokens as row by row, though two to three times as slowly at one, which a diffusion model never has. Widening
costs a third of all at 32 tokens and a tenth at 256 (one core, AMD Zen 5); it saves half the memory of int8.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int8, UInt8
from torch import Tensor

from dllmq.kernels import cpu_int8
from dllmq.kernels.cpu_inputs import segment
from dllmq.kernels.cpu_int8 import (
    Codes,
    Operand,
    integer_linear,
    prepare_as,
    quant_linear,
    quantize_for,
    works,
)
from dllmq.numerics import Grid, QuantizedTensor

__all__ = ["integer_linear", "prepare", "quant_linear", "quantize_for", "supports", "works"]
OUTPUTS = 1024  # that are widened at a time


@dataclass(frozen=True)
class Columns:
    """c of o outputs, segment by segment, outputs side by side."""

    codes: Int8[Tensor, "N S o"]

    def opened(self) -> Codes:
        return self

    def add(self, n: int, x: Tensor, scale: Tensor | None, total: Tensor | None) -> Tensor:
        part = torch._int_mm(x, self.codes[n]).float()
        part = part if scale is None else part.mul_(scale)
        return part if total is None else total.add_(part)

    def plain(self) -> Int8[Tensor, "o I"]:
        return self.codes.flatten(0, 1).T.contiguous()


@dataclass(frozen=True)
class Nibbles:
    """c of o outputs as codes from 0 on, two a byte.

    Attributes:
        packed: the bytes; base: z - low of each segment and output.
    """

    packed: UInt8[Tensor, "N half o"]
    base: Int8[Tensor, "N o"]

    @classmethod
    def of(cls, codes: Int8[Tensor, "N o S"], base: Tensor) -> Nibbles:
        small = base.to(torch.int8)
        low, high = (codes + small[..., None]).mT.contiguous().view(torch.uint8).chunk(2, 1)
        return cls(low | high << 4, small.contiguous())

    def opened(self) -> Codes:
        N, half, o = self.packed.shape
        wide = torch.empty(N, 2 * half, o, dtype=torch.uint8)
        torch.bitwise_and(self.packed, 15, out=wide[:, :half])
        torch.bitwise_right_shift(self.packed, 4, out=wide[:, half:])
        return Columns(wide.view(torch.int8).sub_(self.base[:, None]))

    def add(self, n: int, x: Tensor, scale: Tensor | None, total: Tensor | None) -> Tensor:
        return self.opened().add(n, x, scale, total)

    def plain(self) -> Int8[Tensor, "o I"]:
        return self.opened().plain()


def supports(weight: Grid, inputs: Grid | None, O: int, I: int) -> bool:
    """As cpu_int8's, for up to 4 bits and segments of an even number of columns."""
    if inputs is None or weight.bits > 4 or not cpu_int8.supports(weight, inputs, O, I):
        return False
    return segment(weight, inputs, I) % 2 == 0


def prepare(quantized: QuantizedTensor, inputs: Grid | None) -> Operand:
    """A weight's operand for inputs under a grid."""
    return prepare_as(quantized, inputs, Nibbles.of, unsigned=False, outputs=OUTPUTS)

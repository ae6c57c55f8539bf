"""Integer linears on CPU with weights of up to 4 bits, two a byte in memory: `cpu_int8`'s arithmetic.

A byte holds columns j and j + S/2 of a segment, the first one low, so that a chunk of outputs is widened to
int8 by three passes without a gap between codes: b & 15, b >> 4, and both minus (z - low). Widening costs
a quarter of the product at 256 tokens and half of it at 32 (AMD Zen 5); it saves half the memory of int8.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int8, UInt8
from torch import Tensor

from dllmq.kernels import cpu_int8
from dllmq.kernels.cpu_inputs import segment
from dllmq.kernels.cpu_int8 import (
    Bytes,
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
class Nibbles:
    """c of o outputs as codes from 0 on, two a byte.

    Attributes:
        packed: the bytes; base: z - low of each segment and output.
    """

    packed: UInt8[Tensor, "N o half"]
    base: Int8[Tensor, "N o"]

    @classmethod
    def of(cls, codes: Int8[Tensor, "N o S"], base: Tensor) -> Nibbles:
        small = base.to(torch.int8)
        low, high = (codes + small[..., None]).view(torch.uint8).chunk(2, -1)
        return cls(low | high << 4, small.contiguous())

    def opened(self) -> Codes:
        half = self.packed.shape[2]
        wide = torch.empty(*self.packed.shape[:2], 2 * half, dtype=torch.uint8)
        torch.bitwise_and(self.packed, 15, out=wide[..., :half])
        torch.bitwise_right_shift(self.packed, 4, out=wide[..., half:])
        return Bytes(wide.view(torch.int8).sub_(self.base[..., None]))

    def add(self, n: int, x: Tensor, scale: Tensor | None, total: Tensor | None) -> Tensor:
        return self.opened().add(n, x, scale, total)

    def product(self, n: int, x: Tensor, middle: int) -> Tensor:
        return self.opened().product(n, x, middle)

    def exact(self, n: int, x: Tensor, middle: int, sums: Tensor, added: float) -> Tensor:
        return sums

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

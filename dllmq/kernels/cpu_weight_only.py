"""Linears with full-precision inputs on CPU: codes packed at their width, dequantized block by block.

    y = x Deq(Q_w)^T + b

The product of `fake`, some outputs at a time: beside the codes a block of 2^20 values is held
(numerics/packed.py) instead of a whole weight. For memory, not for speed: at 256 tokens it takes twice the
time of the bf16 product (AMD Zen 5).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from dllmq.kernels.cpu_linear import linear
from dllmq.numerics import Grid, QuantizedTensor
from dllmq.numerics.packed import PackedTensor


@dataclass(frozen=True)
class Operand:
    """The codes of a weight, packed."""

    codes: PackedTensor

    @property
    def layout(self) -> None:
        """Its inputs are not quantized."""

    @property
    def scale(self) -> Float[Tensor, "G O"]:
        """Of each group."""
        return self.codes.scale.T

    def steps(self) -> Integer[Tensor, "O I"]:
        """q - z of every weight."""
        q = self.codes.unpacked()
        zero = q.zero.to(torch.int16)
        return q.codes.to(torch.int16) - zero.repeat_interleave(q.shape[1] // zero.shape[1], 1)


def supports(weight: Grid, inputs: Grid | None, O: int, I: int) -> bool:
    """Any weight, with an input that is not quantized."""
    return inputs is None and I % max(1, weight.group_size) == 0


def prepare(quantized: QuantizedTensor, inputs: Grid | None) -> Operand:
    """A weight's operand."""
    return Operand(PackedTensor.of(quantized))


def quant_linear(
    x: Float[Tensor, "*rows I"], operand: Operand, inputs: Grid | None, bias: Tensor | None = None
) -> Float[Tensor, "*rows O"]:
    """The linear, in x's dtype."""
    y = torch.empty(*x.shape[:-1], operand.codes.shape[0], dtype=x.dtype)
    for at, block in operand.codes.blocks():
        W = block.dequantize().to(x.dtype)
        y[..., at] = linear(x, W, None if bias is None else bias[at])
    return y


def quantize_for(x: Tensor, operand: Operand, inputs: Grid) -> None:
    """Never called: there is no grid of the input."""
    raise AssertionError("the operand was prepared for a full-precision input")


def integer_linear(x: None, w: Operand, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Never called."""
    raise AssertionError("the operand was prepared for a full-precision input")


def works() -> bool:
    return True

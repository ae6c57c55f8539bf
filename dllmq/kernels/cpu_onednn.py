"""Integer linears on CPU, weights prepacked in oneDNN's order: `cpu_int8`'s arithmetic at its fastest.

    acc = sum (u - m) c_w,    y = acc s_w (+ y)          u = c_x + m, unsigned

s_w is fused into the product, and so is the sum over segments, where nothing is added to acc. acc leaves
oneDNN as fp32, rounded beyond 2^24. Where that would be felt, such tokens are multiplied once more, by the
last digit of their codes: its sums are small enough to be exact, and are acc modulo the digit's base, which
is more than rounding took. Few tokens need it: those at another end of their grid than most of their batch.

Inputs are unsigned because oneDNN has a fast product of signed ones only with AMX: with VNNI alone it falls
to a reference one, 10,000 times as slow (2.1 s against 0.2 ms for 64 x 1024 x 1024, oneDNN 3.12, AMD Zen 5),
and says nothing.

The operators are private to torch (`torch.ops.onednn`): `works` tries them once, for their numbers and their
time; where it says no, `cpu_int8` does the same more slowly. A prepacked weight takes one byte a weight, and
its codes can be had back.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from jaxtyping import Int, Int8, UInt8
from torch import Tensor

from dllmq.kernels.cpu_inputs import MOVED
from dllmq.kernels.cpu_int8 import (
    EXACT,
    Bytes,
    Codes,
    Operand,
    integer_linear,
    prepare_as,
    quant_linear,
    quantize_for,
    supports,
)
from dllmq.numerics import Grid, QuantizedTensor

__all__ = ["integer_linear", "prepare", "quant_linear", "quantize_for", "supports", "works"]
SLOWER = 30  # than torch._int_mm: no kernel made for it; a good one takes less time than that


@dataclass(frozen=True)
class Prepacked:
    """c of o outputs in oneDNN's order, one opaque [S, o] tensor a segment.

    Attributes:
        ones, zeros: [o], the scales of a product that is not scaled, and oneDNN's zeros.
    """

    parts: tuple[Tensor, ...]
    ones: Tensor
    zeros: Tensor

    @classmethod
    def of(cls, codes: Int8[Tensor, "N o S"]) -> Prepacked:
        """From c, segment by segment."""
        o = codes.shape[1]
        parts = tuple(torch.ops.onednn.qlinear_prepack(part, None) for part in codes)
        return cls(parts, torch.ones(o), torch.zeros(o, dtype=torch.int32))

    def opened(self) -> Codes:
        return self

    def add(self, n: int, x: Tensor, scale: Tensor | None, total: Tensor | None) -> Tensor:
        """As `Codes.add`; x is unsigned."""
        scale = self.ones if scale is None else scale
        if total is None:
            return self._times(n, x, MOVED, scale)
        weight = (self.parts[n], scale, self.zeros)
        return torch.ops.onednn.qlinear_pointwise.binary(
            x, 1.0, MOVED, *weight, total, None, 1.0, 0, torch.float32, 1.0, 0, "sum", 1.0, "none", [], ""
        )

    def product(self, n: int, x: Tensor, middle: int) -> Tensor:
        return self._times(n, x, middle, self.ones)

    def _times(self, n: int, x: Tensor, middle: int, scale: Tensor) -> Tensor:
        weight = (self.parts[n], scale, self.zeros)
        return torch.ops.onednn.qlinear_pointwise(
            x, 1.0, middle, *weight, None, 1.0, 0, torch.float32, "none", [], ""
        )

    def exact(self, n: int, x: Tensor, middle: int, sums: Tensor, added: float) -> Tensor:
        largest = torch.maximum(sums.amax(1), sums.amin(1).neg_())
        most = float(largest.max()) if len(x) else 0.0
        if most + added <= EXACT:
            return sums
        whole, rounded = sums.to(torch.int32), torch.nonzero(largest > EXACT).flatten()
        if len(rounded):
            whole[rounded] = self._mended(n, x[rounded], middle, whole[rounded], most / EXACT)
        return whole

    def _mended(
        self, n: int, x: UInt8[Tensor, "T S"], middle: int, near: Int[Tensor, "T o"], error: float
    ) -> Int[Tensor, "T o"]:
        """The exact sums, from some that are within `error` of them: modulo as much as tells them apart.

        c = sum over k of digit_k base^k, digits from -base / 2 to base / 2 - 1, small enough for exact sums.
        """
        half = 1 << (EXACT // (MOVED * x.shape[1])).bit_length() - 1
        rest, sums, modulus = x.to(torch.int16) - middle, torch.zeros_like(near), 1
        while modulus <= 2 * error:
            digit = (rest + half & 2 * half - 1) - half
            rest = (rest - digit) // (2 * half)
            part = self.product(n, (digit + MOVED).to(torch.uint8), MOVED)
            sums.add_(part.to(torch.int32), alpha=modulus)
            modulus *= 2 * half
        return near + ((sums - near + modulus // 2 & modulus - 1) - modulus // 2)

    def plain(self) -> Int8[Tensor, "o I"]:
        return torch.cat([part.to_dense().T for part in self.parts], 1)

    def __deepcopy__(self, memo: dict[int, Any]) -> Prepacked:
        """Opaque tensors cannot be copied, but they never change."""
        return self


def prepare(quantized: QuantizedTensor, inputs: Grid | None) -> Operand:
    """A weight's operand for inputs under a grid."""
    return prepare_as(quantized, inputs, lambda codes, base: Prepacked.of(codes), unsigned=True)


@cache
def works() -> bool:
    """Whether torch has the operators, their sums are exact at the extremes, they scale and add as
    `cpu_int8.Bytes` does bit for bit, give the codes back, and are no reference implementation."""
    try:
        return _is_right() and _is_fast()
    except (RuntimeError, AttributeError, TypeError):
        return False


def _is_right() -> bool:
    c = torch.full((2, 48, 66), 127, dtype=torch.int8)
    c[:, ::3], c[1, :, ::5] = -128, -77
    u = torch.full((17, 66), 255, dtype=torch.uint8)
    u[::2], u[:, ::7] = 0, 200
    x, scale = (u ^ MOVED).view(torch.int8), torch.linspace(0.1, 3.0, 48)
    ours, plain = Prepacked.of(c), Bytes(c)
    exact = all(torch.equal(ours.add(n, u, None, None), _sums(x, c[n])) for n in range(2))
    exact &= all(torch.equal(ours.product(0, u, m), _sums(u.long() - m, c[0])) for m in (0, 77, 255))
    y, z = ours.add(0, u, scale, None), _sums(x, c[0]) * scale
    added = torch.equal(y, z) and torch.equal(ours.add(1, u, scale, y), z + _sums(x, c[1]) * scale)
    return exact and added and torch.equal(ours.plain(), plain.plain())


def _sums(x: Tensor, w: Tensor) -> Tensor:
    return (x.long() @ w.long().T).float()


def _is_fast() -> bool:
    c = torch.ones(1, 256, 256, dtype=torch.int8)
    x = torch.ones(32, 256, dtype=torch.int8)
    ours, plain = Prepacked.of(c), Bytes(c)
    return _least(ours, x.view(torch.uint8)) < SLOWER * _least(plain, x)


def _least(codes: Codes, x: Tensor) -> float:
    """Seconds of the fastest of five products, after one that is not counted."""
    times = []
    for _ in range(6):
        start = time.perf_counter()
        codes.add(0, x, None, None)
        times.append(time.perf_counter() - start)
    return min(times[1:])

"""Linears with full-precision inputs on CPU: codes packed at their width, dequantized block by block.

    y = x Deq(Q_w)^T + b

The product of `fake`, some outputs at a time: the dequantized weight is fake's bit for bit, and a block is
all that is held of it beside the codes. A block is made in fp32 in parts of CACHED values, which stay in a
core's cache: widened to bytes, minus z, times s, rounded to the input's type. Outputs lie side by side (a
weight's transpose), so that each pass reads and writes long runs however short a group is. Where n = 8 / b
codes fill a byte, a byte holds rows of a tile that lie apart, so that a pass over bytes writes neighbours:

    byte_j = sum_k q_(j + k w / n) 2^(b k)      j < w / n,    w rows of a tile

Other widths are packed along the outputs as in numerics/packing.py, which takes more passes. It is for
memory, not for speed: one core (AMD Zen 5) dequantizes 4096 x 12288 values of 4 bits in 25 to 30 ms, whatever
their groups; the bf16 product itself takes 13 ms of 32 tokens and 70 of 256.

Legend: I inputs, O outputs, o of a block; G groups, N tiles of w inputs (a group, or an even part of one).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Integer, Shaped, UInt8
from torch import Tensor

from dllmq.kernels.cpu_linear import linear
from dllmq.numerics import Grid, QuantizedTensor
from dllmq.numerics.packing import from_bytes, to_bytes

OUTPUTS = 256  # of a block at least; more where rows are short
CACHED = 1 << 20  # values of a part


@dataclass(frozen=True)
class Operand:
    """The codes of a weight, packed.

    Attributes:
        packed: codes from 0 on of `outputs` outputs each, the last one of what is left.
        scale: s of each group; zero: z - low.
        shape: (O, I); bits: of a code; tile: w; outputs: of a block.
    """

    packed: tuple[UInt8[Tensor, "N n _"], ...]
    scale: Float[Tensor, "G O"]
    zero: UInt8[Tensor, "G O"]
    shape: tuple[int, int]
    bits: int
    tile: int
    outputs: int

    @classmethod
    def of(cls, q: QuantizedTensor) -> Operand:
        (O, I), G, low, bits = q.shape, q.scale.shape[1], q.grid.low, q.grid.bits
        outputs = max(OUTPUTS, CACHED // I)
        tile = _tile(I // G, outputs)
        tiles = q.codes.to(torch.int16).sub_(low).to(torch.uint8).T.unflatten(0, (-1, tile))
        packed = tuple(_pack(block, bits) for block in tiles.split(outputs, 2))
        scale, zero = q.scale.expand(O, G).T.contiguous(), (q.zero - low).expand(O, G).T
        return cls(packed, scale, zero.to(torch.uint8).contiguous(), (O, I), bits, tile, outputs)

    @property
    def layout(self) -> None:
        """Its inputs are not quantized."""

    def steps(self) -> Integer[Tensor, "O I"]:
        """q - z of every weight."""
        blocks = []
        for packed, at in self.blocks():
            codes = torch.empty(len(packed), self.tile, at.stop - at.start, dtype=torch.uint8)
            _widen(packed, self.bits, codes)
            blocks.append(codes.to(torch.int16) - self.by_tile(self.zero[:, at]))
        return torch.cat(blocks, 2).flatten(0, 1).T.contiguous()

    def dequantized(self, dtype: torch.dtype) -> Iterator[tuple[slice, Float[Tensor, "I o"]]]:
        """Blocks of Deq(Q)^T: `QuantizedTensor.dequantize` in another type, bit for bit; each is gone with
        the next, which takes its place in memory."""
        I, O = self.shape[1], min(self.outputs, self.shape[0])
        tiles = min(I // self.tile, max(1, CACHED // (self.tile * O)))
        codes = torch.empty(tiles * self.tile * O, dtype=torch.uint8)
        values, W = torch.empty(len(codes)), torch.empty(I * O, dtype=dtype)
        for packed, at in self.blocks():
            o = at.stop - at.start
            scale, zero = self.by_tile(self.scale[:, at]), self.by_tile(self.zero[:, at].float())
            out = W[: I * o].view(-1, self.tile, o)
            for start in range(0, len(out), tiles):
                part = slice(start, start + tiles)
                here = out[part]
                c, v = (room[: here.numel()].view(here.shape) for room in (codes, values))
                _widen(packed[part], self.bits, c)
                here.copy_(v.copy_(c).sub_(zero[part]).mul_(scale[part]))
            yield at, out.flatten(0, 1)

    def blocks(self) -> Iterator[tuple[UInt8[Tensor, "N n m"], slice]]:
        """Codes of each block, and which outputs it holds."""
        for i, packed in enumerate(self.packed):
            yield packed, slice(self.outputs * i, min(self.outputs * (i + 1), self.shape[0]))

    def by_tile(self, groups: Shaped[Tensor, "G o"]) -> Shaped[Tensor, "N 1 o"]:
        """A group's numbers at each of its tiles."""
        times = self.shape[1] // self.tile // len(groups)
        return (groups.repeat_interleave(times, 0) if times > 1 else groups)[:, None]


def supports(weight: Grid, inputs: Grid | None, O: int, I: int) -> bool:
    """Any weight, with an input that is not quantized."""
    return inputs is None and I % max(1, weight.group_size) == 0


def prepare(quantized: QuantizedTensor, inputs: Grid | None) -> Operand:
    """A weight's operand."""
    return Operand.of(quantized)


def quant_linear(
    x: Float[Tensor, "*rows I"], operand: Operand, inputs: Grid | None, bias: Tensor | None = None
) -> Float[Tensor, "*rows O"]:
    """The linear, in x's dtype."""
    y = torch.empty(*x.shape[:-1], operand.shape[0], dtype=x.dtype)
    for at, W in operand.dequantized(x.dtype):
        y[..., at] = linear(x, W.T, None if bias is None else bias[at])
    return y


def quantize_for(x: Tensor, operand: Operand, inputs: Grid) -> None:
    """Never called: there is no grid of the input."""
    raise AssertionError("the operand was prepared for a full-precision input")


def integer_linear(x: None, w: Operand, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Never called."""
    raise AssertionError("the operand was prepared for a full-precision input")


def works() -> bool:
    return True


def _tile(group: int, outputs: int) -> int:
    """w: a group of inputs, halved while a block of it is more than a part."""
    while group % 2 == 0 and group * outputs > CACHED:
        group //= 2
    return group


def _is_even(w: int, bits: int) -> bool:
    """Whether a tile's codes fill bytes without a rest, each code whole in one."""
    return 8 % bits == 0 and w % (8 // bits) == 0


def _pack(codes: UInt8[Tensor, "N w o"], bits: int) -> UInt8[Tensor, "N n m"]:
    if not _is_even(codes.shape[1], bits):
        return to_bytes(codes.flatten(0, 1), bits).unflatten(0, codes.shape[:2])
    first, *others = codes.chunk(8 // bits, 1)
    packed = first.contiguous()
    for k, part in enumerate(others, 1):
        packed |= part << bits * k
    return packed


def _widen(packed: UInt8[Tensor, "N n m"], bits: int, out: UInt8[Tensor, "N w o"]) -> None:
    """The exact inverse of `_pack`, into `out`."""
    if not _is_even(out.shape[1], bits):
        out.copy_(from_bytes(packed.flatten(0, 1), bits, out.shape[2]).view(out.shape))
        return
    n, mask = packed.shape[1], 2**bits - 1
    torch.bitwise_and(packed, mask, out=out[:, :n])
    for k in range(1, 8 // bits):
        part = out[:, n * k : n * (k + 1)]
        torch.bitwise_right_shift(packed, bits * k, out=part)
        if k < 8 // bits - 1:
            part.bitwise_and_(mask)

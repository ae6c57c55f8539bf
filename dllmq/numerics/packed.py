"""Codes at their own width: how a quantized weight stays in memory when every byte counts.

Codes of a row, moved to 0 .. 2^b - 1, as the bytes of numerics/packing.py. Exact for every width from 2 to 8.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int, Integer, UInt8
from torch import Tensor

from dllmq.numerics.grid import Grid, QuantizedTensor, stored_bytes
from dllmq.numerics.packing import from_bytes, to_bytes

BLOCK = 1 << 20  # values that are dequantized at a time


def pack(codes: Integer[Tensor, "O I"], grid: Grid) -> UInt8[Tensor, "O n"]:
    """Codes [O, I] of a grid as bytes."""
    return to_bytes(codes.to(torch.int16).sub_(grid.low), grid.bits)


def unpack(packed: UInt8[Tensor, "O n"], columns: int, grid: Grid) -> Integer[Tensor, "O I"]:
    """The exact inverse of `pack`; `columns` is I."""
    codes = from_bytes(packed, grid.bits, columns)
    return codes.to(torch.int16).add_(grid.low).to(grid.dtype) if grid.symmetric else codes


@dataclass(frozen=True)
class PackedTensor:
    """A `QuantizedTensor` with its codes packed; scale, zero and group_index as there.

    Attributes:
        packed: [O, n] bytes; columns: I.
    """

    packed: UInt8[Tensor, "O n"]
    columns: int
    scale: Tensor
    zero: Tensor
    grid: Grid
    group_index: Int[Tensor, " I"] | None = None

    @classmethod
    def of(cls, q: QuantizedTensor) -> PackedTensor:
        return cls(pack(q.codes, q.grid), q.codes.shape[1], q.scale, q.zero, q.grid, q.group_index)

    def unpacked(self) -> QuantizedTensor:
        """The tensor this was made of, bit for bit."""
        codes = unpack(self.packed, self.columns, self.grid)
        return QuantizedTensor(codes, self.scale, self.zero, self.grid, self.group_index)

    def rows(self, start: int, stop: int) -> QuantizedTensor:
        """Rows start to stop of the tensor this was made of."""
        here = slice(start, stop) if len(self.scale) == len(self.packed) else slice(None)
        codes = unpack(self.packed[start:stop], self.columns, self.grid)
        return QuantizedTensor(codes, self.scale[here], self.zero[here], self.grid, self.group_index)

    def blocks(self, outputs: int | None = None) -> Iterator[tuple[slice, QuantizedTensor]]:
        """All rows, `outputs` at a time (as many as BLOCK values have, when None)."""
        O, step = len(self.packed), max(1, BLOCK // self.columns) if outputs is None else outputs
        for start in range(0, O, step):
            stop = min(start + step, O)
            yield slice(start, stop), self.rows(start, stop)

    def dequantize(self, dtype: torch.dtype) -> Float[Tensor, "O I"]:
        """`QuantizedTensor.dequantize` in another type bit for bit; little is held beside the result."""
        out = torch.empty(self.shape, dtype=dtype, device=self.packed.device)
        for at, block in self.blocks():
            out[at] = block.dequantize()
        return out

    def to(self, device: torch.device) -> PackedTensor:
        """The same on another device."""
        index = None if self.group_index is None else self.group_index.to(device)
        return replace(
            self,
            packed=self.packed.to(device),
            scale=self.scale.to(device),
            zero=self.zero.to(device),
            group_index=index,
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return len(self.packed), self.columns

    @property
    def nbytes(self) -> int:
        """As `QuantizedTensor.nbytes`."""
        return stored_bytes(self.shape, self.scale, self.zero, self.grid, self.group_index)

"""Codes at their own width: how a quantized weight stays in memory when every byte counts.

Codes of a row, moved to 0 .. 2^b - 1, are laid into bytes from the lowest bit on, without gaps:
n = 8 / gcd(b, 8) codes fill m = b / gcd(b, 8) bytes,

    word = sum_k code_k 2^(b k),   byte_j = (word >> 8 j) mod 256        4 bits: two a byte, the first one low

A row is filled up with zeros to a whole number of words. Exact for every width from 2 to 8.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int, Integer, UInt8
from torch import Tensor

from dllmq.numerics.grid import Grid, QuantizedTensor, stored_bytes


def word_layout(bits: int) -> tuple[int, int, torch.dtype]:
    """Codes and bytes of a word, and an integer type that holds one."""
    shared = math.gcd(bits, 8)
    size = bits // shared
    return 8 // shared, size, torch.uint8 if size == 1 else torch.int32 if size < 4 else torch.int64


def pack(codes: Integer[Tensor, "O I"], grid: Grid) -> UInt8[Tensor, "O n"]:
    """Codes [O, I] as bytes [O, ceil(I / codes a word) * bytes a word]."""
    per_word, size, dtype = word_layout(grid.bits)
    moved = codes.to(torch.int16).sub_(grid.low).to(torch.uint8)
    padded = torch.nn.functional.pad(moved, (0, -codes.shape[1] % per_word))
    groups = padded.unflatten(1, (-1, per_word))  # [O, words, codes a word]
    words = torch.zeros(groups.shape[:2], dtype=dtype, device=codes.device)
    for k in range(per_word):
        words |= groups[..., k].to(dtype) << grid.bits * k
    if size == 1:
        return words
    return torch.stack([(words >> 8 * j & 255).to(torch.uint8) for j in range(size)], -1).flatten(1)


def unpack(packed: UInt8[Tensor, "O n"], columns: int, grid: Grid) -> Integer[Tensor, "O I"]:
    """The exact inverse of `pack`; `columns` is I."""
    per_word, size, dtype = word_layout(grid.bits)
    words = packed
    if size > 1:
        pieces = packed.unflatten(1, (-1, size))
        words = torch.zeros(pieces.shape[:2], dtype=dtype, device=packed.device)
        for j in range(size):
            words |= pieces[..., j].to(dtype) << 8 * j
    mask = 2**grid.bits - 1
    codes = torch.stack([(words >> grid.bits * k & mask).to(torch.uint8) for k in range(per_word)], -1)
    codes = codes.flatten(1)[:, :columns]
    return codes.to(torch.int16).add_(grid.low).to(grid.dtype) if grid.symmetric else codes.contiguous()


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

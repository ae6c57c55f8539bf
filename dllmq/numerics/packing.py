"""Bit packing: codes of 2 to 8 bits as one stream of bits a row, without a gap.

Code i of a row occupies the bits b i to b i + b - 1, counted from the lowest bit of its first byte:

    row = sum_i q_i 2^(b i),     byte_j = (row // 2^(8 j)) mod 256,     word_w = (row // 2^(32 w)) mod 2^32

At b = 4 that is two codes a byte, the first one low. In memory rows are bytes (numerics/packed.py); in files
they are int32 words, the same bytes four by four, the first one lowest. compressed-tensors (0.20; older
versions left gaps at 3, 5, 6 and 7 bits) and GPTQ (which has 2, 3, 4 and 8 bits) pack like this; they differ
in the axis.

n = 8 / gcd(b, 8) codes fill m = b / gcd(b, 8) bytes exactly, a period; rows end with a whole one.

Legend: q codes [R, N], words [R, W], b bits.
"""

from __future__ import annotations

import math
import sys

import torch
from jaxtyping import Int32, Integer, UInt8
from torch import Tensor

WORD = 32
assert sys.byteorder == "little", "a word's first byte is taken to be its lowest"


def words(count: int, bits: int) -> int:
    """W: int32 words that hold `count` codes."""
    return -(-count * bits // WORD)


def period(bits: int) -> tuple[int, int]:
    """Codes and bytes of a period."""
    shared = math.gcd(bits, 8)
    return 8 // shared, bits // shared


def pack(codes: Integer[Tensor, "R N"], bits: int) -> Int32[Tensor, "R W"]:
    """Rows of unsigned codes as int32 words.

    Args:
        codes: in 0 ... 2^bits - 1.
        bits: 1 to 8.
    """
    stream, W = to_bytes(codes, bits), words(codes.shape[1], bits)
    whole = torch.nn.functional.pad(stream, (0, 4 * W - stream.shape[1]))  # may be negative
    return whole.flatten().view(torch.int32).reshape(len(codes), W)


def unpack(packed: Int32[Tensor, "R W"], bits: int, count: int) -> UInt8[Tensor, "R N"]:
    """The first `count` codes of each row: unpack(pack(q, b), b, N) == q."""
    W = packed.shape[1]
    assert words(count, bits) == W, f"{count} codes of {bits} bits fill {words(count, bits)} words, not {W}"
    per, size = period(bits)
    stream = packed.contiguous().view(torch.uint8)
    whole = torch.nn.functional.pad(stream, (0, -(-count // per) * size - 4 * W))  # may be negative
    return from_bytes(whole, bits, count)


def to_bytes(codes: Integer[Tensor, "R N"], bits: int) -> UInt8[Tensor, "R n"]:
    """Rows of codes 0 ... 2^bits - 1 as bytes, in whole periods."""
    assert 1 <= bits <= 8, f"a code has 1 to 8 bits, got {bits}"
    per, size = period(bits)
    padded = torch.nn.functional.pad(codes.to(torch.uint8), (0, -codes.shape[1] % per))
    groups = padded.unflatten(1, (-1, per))  # [R, periods, codes a period]
    whole = torch.zeros(groups.shape[:2], dtype=_holds(size), device=codes.device)
    for k in range(per):
        whole |= groups[..., k].to(whole.dtype) << bits * k
    if size == 1:
        return whole
    return torch.stack([(whole >> 8 * j & 255).to(torch.uint8) for j in range(size)], -1).flatten(1)


def from_bytes(stream: UInt8[Tensor, "R n"], bits: int, count: int) -> UInt8[Tensor, "R N"]:
    """The exact inverse of `to_bytes`; `count` is N."""
    per, size = period(bits)
    whole = stream
    if size > 1:
        pieces = stream.unflatten(1, (-1, size))
        whole = torch.zeros(pieces.shape[:2], dtype=_holds(size), device=stream.device)
        for j in range(size):
            whole |= pieces[..., j].to(whole.dtype) << 8 * j
    mask = 2**bits - 1
    codes = torch.stack([(whole >> bits * k & mask).to(torch.uint8) for k in range(per)], -1)
    return codes.flatten(1)[:, :count].contiguous()


def _holds(size: int) -> torch.dtype:
    """An integer type for a period of `size` bytes."""
    return torch.uint8 if size == 1 else torch.int32 if size < 4 else torch.int64

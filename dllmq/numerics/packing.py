"""Bit packing: codes of 2 to 8 bits in int32 words, without a gap.

Code i of a row occupies the bits b i to b i + b - 1 of the row, counted from the lowest bit of its first
word; where b does not divide 32 a code may lie in two words, and 32 codes always fill b words exactly:

    row = sum_i q_i 2^(b i),     word_w = (row // 2^(32 w)) mod 2^32

At b = 4 that is eight codes a word, lowest nibble first. compressed-tensors (0.20; older versions left gaps
at 3, 5, 6 and 7 bits) and GPTQ (which has 2, 3, 4 and 8 bits) pack like this; they differ in the axis.

Legend: q codes [R, N], words [R, W], b bits.
"""

from __future__ import annotations

import torch
from jaxtyping import Int32, Integer, UInt8
from torch import Tensor

WORD = 32


def words(count: int, bits: int) -> int:
    """W: int32 words that hold `count` codes."""
    return -(-count * bits // WORD)


def pack(codes: Integer[Tensor, "R N"], bits: int) -> Int32[Tensor, "R W"]:
    """Rows of unsigned codes as int32 words.

    Args:
        codes: in 0 ... 2^bits - 1.
        bits: 1 to 8.
    """
    assert 1 <= bits <= 8, f"a code has 1 to 8 bits, got {bits}"
    R, N = codes.shape
    periods = -(-N // WORD)
    padded = torch.nn.functional.pad(codes, (0, periods * WORD - N)).reshape(R, periods, WORD)
    packed = torch.zeros(R, periods, bits, dtype=torch.int32, device=codes.device)
    for i in range(WORD):
        word, start = divmod(i * bits, WORD)
        code = padded[..., i].to(torch.int32)
        packed[..., word] |= code << start  # what lies above the word drops out
        if start + bits > WORD:
            packed[..., word + 1] |= code >> (WORD - start)
    return packed.reshape(R, periods * bits)[:, : words(N, bits)].contiguous()


def unpack(packed: Int32[Tensor, "R W"], bits: int, count: int) -> UInt8[Tensor, "R N"]:
    """The first `count` codes of each row: unpack(pack(q, b), b, N) == q."""
    R, W = packed.shape
    assert words(count, bits) == W, f"{count} codes of {bits} bits fill {words(count, bits)} words, not {W}"
    periods = -(-count // WORD)
    whole = torch.nn.functional.pad(packed, (0, periods * bits - W)).reshape(R, periods, bits)
    codes = torch.empty(R, periods, WORD, dtype=torch.uint8, device=packed.device)
    for i in range(WORD):
        word, start = divmod(i * bits, WORD)
        code = whole[..., word] >> start
        if start + bits > WORD:  # the shift has filled the bits above with the sign
            code = (code & (1 << WORD - start) - 1) | whole[..., word + 1] << (WORD - start)
        codes[..., i] = (code & (1 << bits) - 1).to(torch.uint8)
    return codes.reshape(R, periods * WORD)[:, :count].contiguous()

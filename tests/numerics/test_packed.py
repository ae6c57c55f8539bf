"""Packed codes: the layout by hand, the bytes they take, and that nothing is lost at any width."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllmq.methods.rtn import round_to_nearest
from dllmq.numerics import Grid
from dllmq.numerics.packed import PackedTensor, pack, unpack


def test_four_bits_by_hand() -> None:
    """Two codes a byte, the first one low; the odd one out stands alone."""
    packed = pack(torch.tensor([[1, 2, 15]], dtype=torch.uint8), Grid(4))
    assert packed.tolist() == [[0x21, 0x0F]]


def test_three_bits_signed_by_hand() -> None:
    """Codes -4 .. 3 are moved to 0 .. 7; eight of them fill three bytes, the lowest bits first."""
    codes = torch.tensor([[-4, -3, -2, -1, 0, 1, 2, 3]], dtype=torch.int8)
    word = sum(k << 3 * k for k in range(8))
    assert pack(codes, Grid(3, symmetric=True)).tolist() == [list(word.to_bytes(3, "little"))]


@given(
    bits=st.integers(2, 8), symmetric=st.booleans(), rows=st.integers(1, 4), columns=st.integers(1, 35),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_unpack_is_the_inverse(bits: int, symmetric: bool, rows: int, columns: int, seed: int) -> None:
    grid = Grid(bits, symmetric=symmetric)
    rng = torch.Generator().manual_seed(seed)
    codes = torch.randint(grid.low, grid.high + 1, (rows, columns), generator=rng).to(grid.dtype)
    codes[0, :1], codes[-1, -1:] = grid.low, grid.high
    packed = pack(codes, grid)
    again = unpack(packed, columns, grid)
    assert torch.equal(again, codes) and again.dtype == codes.dtype


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_take_their_width(bits: int) -> None:
    codes = torch.zeros(3, 64, dtype=torch.uint8)
    assert pack(codes, Grid(bits)).numel() == 3 * 64 * bits // 8


@pytest.mark.parametrize("grid", [Grid(3, 8), Grid(4, 0), Grid(5, symmetric=True)], ids=str)
def test_a_weight_comes_back_whole(grid: Grid) -> None:
    weight = round_to_nearest(torch.randn(6, 24), grid)
    kept = PackedTensor.of(weight)
    again = kept.unpacked()
    assert kept.shape == (6, 24)
    assert torch.equal(again.codes, weight.codes) and torch.equal(again.dequantize(), weight.dequantize())
    assert (again.scale is weight.scale, again.zero is weight.zero, again.grid) == (True, True, grid)

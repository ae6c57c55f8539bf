"""The grids: golden numbers by hand, and what holds for every input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dllmq.numerics import Grid, Params, QuantizedTensor, dequantize, fake_quant, fit, quantize

GRIDS = st.builds(
    Grid, bits=st.integers(2, 8), group_size=st.sampled_from([-1, 0, 4, 8]), symmetric=st.booleans()
)


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """[O, 8] normal values times a magnitude, rows shifted, some of them to one side of zero."""
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(draw(st.integers(1, 5)), 8, generator=rng)
    shift = draw(st.sampled_from([0.0, 3.0, -3.0]))
    magnitude = draw(st.sampled_from([1e-30, 1e-3, 1.0, 1e6, 1e30]))
    return (x + shift) * magnitude


def by_value(params: Params, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and zero of every single value, [O, I]."""
    width = x.shape[-1] // params.scale.shape[-1]
    scale, zero = (p.repeat_interleave(width, -1).expand_as(x) for p in params)
    return scale, zero


def test_asymmetric_by_hand() -> None:
    """b = 2 over [-1, 2]: s = 3/3 = 1, z = round(1) = 1, codes 0..3."""
    x, grid = torch.tensor([[-1.0, -0.4, 0.6, 2.0]]), Grid(2)
    params = fit(x, grid)
    assert params.scale.tolist() == [[1.0]] and params.zero.tolist() == [[1.0]]
    codes = quantize(x, params, grid)
    assert codes.tolist() == [[0, 1, 2, 3]] and codes.dtype == torch.uint8
    assert dequantize(codes, params, grid).tolist() == [[-1.0, 0.0, 1.0, 2.0]]


def test_symmetric_by_hand() -> None:
    """b = 4, max|x| = 7.5: s = 15/15 = 1; 7.5 rounds to 8 and saturates at 7, -7.5 reaches -8."""
    x, grid = torch.tensor([[7.5, -7.5, 0.4, 3.6]]), Grid(4, symmetric=True)
    params = fit(x, grid)
    assert params.scale.tolist() == [[1.0]] and params.zero.tolist() == [[0.0]]
    codes = quantize(x, params, grid)
    assert codes.tolist() == [[7, -8, 0, 4]] and codes.dtype == torch.int8


@pytest.mark.parametrize(("sign", "zero"), [(1.0, 0.0), (-1.0, 15.0)])
def test_one_sided_range_is_widened_to_zero(sign: float, zero: float) -> None:
    """Values in [1, 3] use the range [0, 3], not [1, 3]."""
    params = fit(sign * torch.tensor([[1.0, 2.0, 3.0]]), Grid(4))
    assert params.scale.item() == pytest.approx(3 / 15) and params.zero.item() == zero


@pytest.mark.parametrize("symmetric", [True, False])
def test_all_zero_group_is_exact_and_finite(symmetric: bool) -> None:
    grid = Grid(3, symmetric=symmetric)
    params = fit(torch.zeros(2, 4), grid)
    assert params.scale.tolist() == [[1.0], [1.0]]
    assert torch.equal(fake_quant(torch.zeros(2, 4), grid), torch.zeros(2, 4))


@pytest.mark.parametrize("symmetric", [True, False])
def test_shrink_moves_both_ends(symmetric: bool) -> None:
    """The range of 0.5-shrunk params is the range of the halved values; values beyond it saturate."""
    x, grid = torch.tensor([[-2.0, 0.3, 6.0]]), Grid(4, symmetric=symmetric)
    shrunk = fit(x, grid, shrink=0.5)
    assert torch.equal(shrunk.scale, fit(0.5 * x, grid).scale)
    assert torch.equal(shrunk.zero, fit(0.5 * x, grid).zero)
    assert quantize(x, shrunk, grid)[0, 2] == grid.high


@pytest.mark.parametrize(("group_size", "shape"), [(-1, (2, 1)), (0, (1, 1)), (2, (2, 2)), (4, (2, 1))])
def test_group_size_says_what_shares_a_scale(group_size: int, shape: tuple[int, int]) -> None:
    """Each group of values is quantized as if it were alone."""
    x = torch.tensor([[1.0, 2.0, 30.0, 40.0], [-5.0, 6.0, 0.1, 0.2]])
    grid = Grid(3, group_size)
    assert fit(x, grid).scale.shape == shape
    pieces = [x.flatten()] if group_size == 0 else list(x.reshape(shape[0] * shape[1], -1))
    alone = torch.cat([fake_quant(piece[None], Grid(3))[0] for piece in pieces]).reshape(2, 4)
    assert torch.equal(fake_quant(x, grid), alone)


def test_leading_axes_are_rows() -> None:
    """[B, L, I] is quantized like [B * L, I]: per token, or per group of channels of a token."""
    x = torch.randn(2, 3, 8)
    for group_size in (-1, 0, 4):
        grid = Grid(4, group_size)
        assert torch.equal(fake_quant(x, grid).flatten(0, 1), fake_quant(x.flatten(0, 1), grid))


@given(x=matrices(), grid=GRIDS)
def test_error_is_at_most_half_a_step(x: Tensor, grid: Grid) -> None:
    params = fit(x, grid)
    scale, _ = by_value(params, x, grid)
    assert ((fake_quant(x, grid) - x).abs() <= scale * (0.5 + 1e-4)).all()


@given(x=matrices(), grid=GRIDS)
def test_fake_quant_is_idempotent_under_the_same_params(x: Tensor, grid: Grid) -> None:
    params = fit(x, grid)
    once = fake_quant(x, grid, params)
    assert torch.equal(fake_quant(once, grid, params), once)


@given(x=matrices(), grid=GRIDS)
def test_codes_and_fake_quant_agree_bit_for_bit(x: Tensor, grid: Grid) -> None:
    params = fit(x, grid)
    codes = quantize(x, params, grid)
    assert int(codes.min()) >= grid.low and int(codes.max()) <= grid.high
    stored = QuantizedTensor(codes, params.scale, params.zero, grid).dequantize()
    assert torch.equal(dequantize(codes, params, grid), fake_quant(x, grid))
    assert torch.equal(stored, fake_quant(x, grid))


@given(x=matrices(), grid=GRIDS)
def test_zero_is_a_grid_point(x: Tensor, grid: Grid) -> None:
    params = fit(x, grid)
    assert torch.equal(fake_quant(torch.zeros_like(x), grid, params), torch.zeros_like(x))
    assert torch.equal(params.zero, params.zero.round())
    assert (params.zero >= 0).all() and (params.zero <= 2**grid.bits - 1).all()


@given(x=matrices(), bits=st.integers(2, 8))
@settings(max_examples=20)
def test_symmetric_scale_convention(x: Tensor, bits: int) -> None:
    """s = 2 max|x| / (2^b - 1) and z = 0."""
    params = fit(x, Grid(bits, symmetric=True))
    torch.testing.assert_close(params.scale, 2 * x.abs().amax(-1, keepdim=True) / (2**bits - 1))
    assert not params.zero.any()


def test_bfloat16_is_computed_in_fp32() -> None:
    x = torch.randn(4, 8).bfloat16()
    assert torch.equal(fake_quant(x, Grid(4)), fake_quant(x.float(), Grid(4)).bfloat16())


def test_nothing_is_changed_in_place() -> None:
    x, grid = torch.randn(3, 8), Grid(4, 4)
    before = x.clone()
    params = fit(x, grid)
    codes = quantize(x, params, grid)
    kept = codes.clone()
    dequantize(codes, params, grid), fake_quant(x, grid, params)
    assert torch.equal(x, before) and torch.equal(codes, kept)


def test_group_index_sends_columns_to_their_group() -> None:
    """Columns 0 and 2 belong to group 1 (scale 10), 1 and 3 to group 0 (scale 1)."""
    q = QuantizedTensor(
        codes=torch.tensor([[1, 2, 3, 0]], dtype=torch.uint8),
        scale=torch.tensor([[1.0, 10.0]]),
        zero=torch.tensor([[1.0, 0.0]]),
        grid=Grid(2, 2),
        group_index=torch.tensor([1, 0, 1, 0]),
    )
    assert q.dequantize().tolist() == [[10.0, 1.0, 30.0, -1.0]]


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        (Grid(4, 4), 16 + 4 + 4 * 8),  # 32 codes of 4 bits, 8 zeros of 4 bits, 8 fp32 scales
        (Grid(4, 4, symmetric=True), 16 + 4 * 8),  # no zeros
        (Grid(3), 14 + 4 * 4),  # (32 + 4) * 3 = 108 bits, 4 fp32 scales
    ],
)
def test_nbytes_counts_true_bits(grid: Grid, expected: int) -> None:
    x = torch.randn(4, 8)
    params = fit(x, grid)
    assert QuantizedTensor(quantize(x, params, grid), params.scale, params.zero, grid).nbytes == expected


@pytest.mark.parametrize("bits", [1, 0, 9, 16, 4.0, True, "4"])
def test_bits_out_of_range(bits: object) -> None:
    with pytest.raises(Exception, match=r"bits is .*2 to 8|type") as caught:
        Grid(bits)  # type: ignore[arg-type]
    assert isinstance(caught.value, ValueError) or not isinstance(bits, int)


@pytest.mark.parametrize("group_size", [-2, -128])
def test_group_size_out_of_range(group_size: int) -> None:
    with pytest.raises(ValueError, match=rf"group_size is {group_size}, .* -1 .* 0 "):
        Grid(4, group_size)


def test_group_size_must_divide() -> None:
    with pytest.raises(
        ValueError, match="group_size 3 does not divide a row of 8 values: use a divisor of 8"
    ):
        fit(torch.ones(2, 8), Grid(4, 3))

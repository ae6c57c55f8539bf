"""The integer product: exact sums, and an output that is the definition up to its rounding to fp32."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dllmq.kernels import cpu_int8
from dllmq.kernels.cpu_int8 import INPUTS, accumulate, input_operand, int8_linear, supports, weight_operand
from dllmq.methods.rtn import round_to_nearest
from dllmq.numerics import Grid, Params, fit, quantize

pytestmark = pytest.mark.skipif(not cpu_int8.is_exact(), reason="this processor saturates int8 products")

KINDS = ("normal", "ties", "equal", "zero", "subnormal", "ends", "positive", "negative", "outlier")


def row(kind: str, I: int, bits: int) -> Tensor:
    """A token or a row of weights: `ties` lie on grid points and half-way between two of them, `ends` holds
    the two ends of its range only."""
    top = 2**bits - 1
    halves = torch.randint(-top, top + 1, (I,))
    halves[:2] = torch.tensor([-top, top])
    return {
        "normal": torch.randn(I),
        "ties": halves / 2 * torch.rand(1),
        "equal": torch.randn(1).expand(I),
        "zero": torch.zeros(I),
        "subnormal": torch.full((I,), -1e-42),
        "ends": torch.randint(0, 2, (I,)) * 2.5 - 1,
        "positive": torch.rand(I) + 7,
        "negative": -torch.rand(I) * 1e-4 - 1e-2,
        "outlier": torch.randn(I) * (1 + 300 * (torch.arange(I) == I // 2)),
    }[kind]


class Problem(NamedTuple):
    x: Tensor
    W: Tensor
    inputs: Grid
    weights: Grid


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    torch.manual_seed(draw(st.integers(0, 2**20)))
    I, kinds = draw(st.integers(2, 70)), st.lists(st.sampled_from(KINDS), min_size=1, max_size=5)
    inputs = Grid(draw(st.integers(2, 8)), -1, draw(st.booleans()))
    weights = Grid(draw(st.integers(2, 8)), draw(st.sampled_from([-1, 0])), draw(st.booleans()))
    x, W = (torch.stack([row(kind, I, grid.bits) for kind in draw(kinds)]) for grid in (inputs, weights))
    return Problem(x, W, inputs, weights)


def steps(x: Tensor, grid: Grid) -> tuple[Tensor, Params]:
    """q - z in int64, and the scales and zeros."""
    params = fit(x, grid)
    return quantize(x, params, grid).long() - params.zero.long(), params


@given(problems())
def test_sums_are_exact(p: Problem) -> None:
    sums = accumulate(input_operand(p.x, p.inputs), weight_operand(round_to_nearest(p.W, p.weights)))
    assert torch.equal(sums.long(), steps(p.x, p.inputs)[0] @ steps(p.W, p.weights)[0].T)


@given(problems(), st.booleans())
def test_the_output_is_the_definition_rounded_to_fp32(p: Problem, biased: bool) -> None:
    """Three roundings of the product, one of the sum with the bias; against dequantized values in fp64."""
    bias = torch.randn(len(p.W)) if biased else None
    y = int8_linear(input_operand(p.x, p.inputs), weight_operand(round_to_nearest(p.W, p.weights)), bias)
    (x_steps, x_params), (W_steps, W_params) = steps(p.x, p.inputs), steps(p.W, p.weights)
    product = (x_steps * x_params.scale.double()) @ (W_steps * W_params.scale.double()).T
    expected = product if bias is None else product + bias.double()
    half_ulp = 2.0**-24
    assert y.dtype == torch.float32
    assert bool(((y - expected).abs() <= half_ulp * (3.01 * product.abs() + 1.01 * expected.abs())).all())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [7, 8])
def test_the_longest_row_at_the_ends_of_its_grid(bits: int, symmetric: bool) -> None:
    """All codes at one end, of one sign and of both: the largest sums there are, and they fit int32."""
    I, grid = INPUTS[-1], Grid(bits, -1, symmetric)
    x = torch.tensor([[1.0], [-1.0]]).expand(2, I)
    expected = steps(x, grid)[0] @ steps(x, grid)[0].T
    assert int(expected.abs().max()) < 2**31
    assert torch.equal(
        accumulate(input_operand(x, grid), weight_operand(round_to_nearest(x, grid))).long(), expected
    )
    if (bits, symmetric) == (8, False):
        assert expected.tolist() == [[I * 255**2, -I * 255**2], [-I * 255**2, I * 255**2]]


@pytest.mark.parametrize("layout", ["columns first", "every other", "repeated", "no tokens"])
def test_memory_layout_does_not_matter(layout: str) -> None:
    x = {
        "columns first": torch.randn(20, 5).T,
        "every other": torch.randn(5, 40)[:, ::2],
        "repeated": torch.randn(1, 20).expand(5, 20),
        "no tokens": torch.randn(0, 20),
    }[layout]
    for grid in (Grid(4), Grid(8), Grid(8, symmetric=True)):
        w = weight_operand(round_to_nearest(torch.randn(3, 20), Grid(4)))
        plain = int8_linear(input_operand(x.clone(memory_format=torch.contiguous_format), grid), w)
        assert plain.shape == (len(x), 3) and torch.equal(int8_linear(input_operand(x, grid), w), plain)


@pytest.mark.parametrize("grid", [Grid(4), Grid(8), Grid(8, symmetric=True)], ids=str)
def test_bf16_inputs_are_read_in_fp32(grid: Grid) -> None:
    x = torch.randn(5, 24).bfloat16()
    for a, b in zip(
        vars(input_operand(x, grid)).values(), vars(input_operand(x.float(), grid)).values(), strict=True
    ):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_so_in_its_token(bad: float) -> None:
    """So that a broken model is noticed, as in floating point."""
    x, w = torch.randn(3, 24), weight_operand(round_to_nearest(torch.randn(5, 24), Grid(4)))
    clean = int8_linear(input_operand(x, Grid(4)), w)
    x[1, 7] = bad
    y = int8_linear(input_operand(x, Grid(4)), w)
    assert not bool(y[1].isfinite().any()) and torch.equal(y[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize(
    ("weight", "inputs", "I", "fits"),
    [
        (Grid(4), Grid(8), 64, True),
        (Grid(3, 0), Grid(4, symmetric=True), 64, True),
        (Grid(4, 16), Grid(4), 64, False),
        (Grid(4), Grid(4, 16), 64, False),
        (Grid(4), Grid(4, 0), 64, False),
        (Grid(4), None, 64, False),
        (Grid(4), Grid(4), 1, False),
        (Grid(4), Grid(4), 33_025, True),
        (Grid(4), Grid(4), 33_026, False),
    ],
)
def test_which_grids_it_takes(weight: Grid, inputs: Grid | None, I: int, fits: bool) -> None:
    assert supports(weight, inputs, I) is fits


def test_a_processor_that_saturates_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of two products kept in 16 bits, as without VNNI."""

    def saturating(x: Tensor, w: Tensor) -> Tensor:
        pairs = torch.stack([x[:, i : i + 2].long() @ w[i : i + 2].long() for i in range(0, x.shape[1], 2)])
        return pairs.clamp(-(2**15), 2**15 - 1).sum(0).int()

    uncached = cpu_int8.is_exact.__wrapped__
    assert uncached()
    monkeypatch.setattr(torch, "_int_mm", saturating)
    assert not uncached()

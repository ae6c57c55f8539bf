"""Low-bit products: sums of integers are exact, outputs are the definition up to their rounding."""

from collections.abc import Iterator
from math import gcd

import pytest
import torch
from kernel_cases import DEVICE, needs_triton, rows
from torch import Tensor

from dllmq.kernels import triton_jit, triton_linear
from dllmq.kernels.triton_linear import Tiles, integer_linear, prepare, quant_linear, quantize_for, supports
from dllmq.methods.rtn import round_to_nearest
from dllmq.numerics import Grid, fit, quantize
from dllmq.numerics.packed import PackedTensor

pytestmark = needs_triton
O, I = 20, 128
# relative to the number; Triton's interpreter cuts bf16 off instead of rounding it
HALF_ULP = {
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8 if DEVICE.type == "cuda" else 2.0**-7,
}


def segments(x: Tensor, W: Tensor, inputs: Grid, weights: Grid) -> Iterator[tuple[Tensor, Tensor]]:
    """(integer sum, what it contributes to the output in fp64), between two changes of a scale."""
    sides = [(x, fit(x, inputs), inputs), (W, fit(W, weights), weights)]
    codes = [quantize(v, params, grid).long() for v, params, grid in sides]
    width = gcd(*(grid.group_size if grid.group_size > 0 else x.shape[1] for grid in (inputs, weights)))
    for start in range(0, x.shape[1], width):
        steps, scales = [], []
        for q, (_, params, grid) in zip(codes, sides, strict=True):
            group = start // grid.group_size if grid.group_size > 0 else 0
            steps.append(q[:, start : start + width] - params.zero[:, group : group + 1].long())
            scales.append(params.scale[:, group].double())
        total = steps[0] @ steps[1].T
        yield total, total * scales[0][:, None] * scales[1].expand(len(W))


def check(x: Tensor, W: Tensor, inputs: Grid, weights: Grid, bias: Tensor | None = None) -> None:
    """Three roundings of each segment, one of each sum and of the type."""
    operand = prepare(round_to_nearest(W.to(DEVICE), weights), inputs)
    y = quant_linear(x.to(DEVICE), operand, inputs, None if bias is None else bias.to(DEVICE)).cpu()
    parts = [part for _, part in segments(x, W, inputs, weights)]
    expected = sum(parts) + (0 if bias is None else bias.double())
    size = sum(part.abs() for part in parts) + (0 if bias is None else bias.double().abs())
    bound = HALF_ULP[torch.float32] * (4 + len(parts)) * size
    if x.dtype != torch.float32:
        bound = bound + 1.01 * HALF_ULP[x.dtype] * expected.abs()
    assert y.dtype == x.dtype and bool(((y.double() - expected).abs() <= bound).all())


WEIGHTS = [
    *(Grid(bits) for bits in range(2, 9)),
    *(Grid(bits, -1, symmetric=True) for bits in (3, 4, 8)),
    *(Grid(4, 0), Grid(4, 32), Grid(4, 64, symmetric=True), Grid(8, 64), Grid(6, 32)),
]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_the_output_is_the_definition(weights: Grid) -> None:
    """Against every kind of input grid: with and without offsets, per token, in groups that nest."""
    for inputs in (Grid(4), Grid(8), Grid(8, 64)):
        check(torch.randn(2, I), torch.randn(O, I), inputs, weights, torch.randn(O))


@pytest.mark.parametrize(
    ("weights", "inputs"), [(Grid(4), Grid(8)), (Grid(8), Grid(4)), (Grid(4, 32), Grid(4, 128))]
)
def test_numbers_that_are_hard_to_round(weights: Grid, inputs: Grid) -> None:
    check(rows(I, inputs.bits), rows(I, weights.bits), inputs, weights)


@pytest.mark.parametrize("weights", [Grid(4), Grid(8), Grid(4, 64)], ids=str)
def test_sums_are_integers_and_exact(weights: Grid) -> None:
    """With scales of 1 the output is the sum itself; it lies below 2^24, so fp32 holds it."""
    quantized = round_to_nearest(torch.randn(O, I), weights)
    quantized.scale.fill_(1.0)
    for inputs in (Grid(4), Grid(8)):
        x = torch.randint(0, 2**inputs.bits, (2, I)) - 2.0 ** (inputs.bits - 1)
        x[:, 0], x[:, 1] = -(2.0 ** (inputs.bits - 1)), 2.0 ** (inputs.bits - 1) - 1  # so that s = 1
        assert bool((fit(x, inputs).scale == 1).all())
        y = quant_linear(x.to(DEVICE), prepare(quantized.to(DEVICE), inputs), inputs)
        assert torch.equal(y.cpu().long(), x.long() @ quantized.dequantize().long().T)


@pytest.mark.slow
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_longest_row_at_the_ends_of_its_grid(symmetric: bool) -> None:
    """The largest sums there are, of both signs, fit int32. Slow: seconds in the interpreter."""
    long, grid = 33_024, Grid(8, -1, symmetric)
    x = torch.tensor([[1.0], [-1.0]]).expand(2, long)
    y = quant_linear(x.to(DEVICE), prepare(round_to_nearest(x.to(DEVICE), grid), grid), grid).cpu()
    step = fit(x, grid).scale[0].item()
    ends = quantize(x, fit(x, grid), grid)[:, 0].double() - fit(x, grid).zero[:, 0]
    torch.testing.assert_close(y.double(), ends[:, None] * ends * long * step**2, rtol=3e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    for weights in (Grid(4, 64), Grid(8)):
        check(torch.randn(2, I).to(dtype), torch.randn(O, I), Grid(8), weights, torch.randn(O).to(dtype))


@pytest.mark.parametrize(
    "weights", [Grid(4), Grid(4, 32), Grid(3, 64, True), Grid(8), Grid(6, 64, True)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_full_precision_inputs(weights: Grid, dtype: torch.dtype) -> None:
    """Weights as they would be dequantized: the same values, summed in another order."""
    quantized, x = round_to_nearest(torch.randn(O, I), weights), torch.randn(3, I).to(dtype)
    y = quant_linear(x.to(DEVICE), prepare(quantized.to(DEVICE), None), None).cpu()
    W = quantized.dequantize().to(dtype).double()
    expected = x.double() @ W.T
    bound = 2.0**-24 * I * (x.double().abs() @ W.abs().T) + 1.01 * HALF_ULP[dtype] * expected.abs()
    assert y.dtype == dtype and bool(((y.double() - expected).abs() <= bound).all())


def test_groups_of_either_side_that_do_not_nest() -> None:
    check(torch.randn(2, 192), torch.randn(O, 192), Grid(8, 96), Grid(4, 64))


@pytest.mark.parametrize(
    "weights", [Grid(3, 32), Grid(4, 0), Grid(8, 64), Grid(6), Grid(4, -1, True)], ids=str
)
def test_codes_come_back(weights: Grid) -> None:
    quantized = round_to_nearest(torch.randn(O, I), weights)
    steps = prepare(quantized, Grid(8)).steps()
    zero = quantized.zero.repeat_interleave(I // quantized.zero.shape[1], 1)
    assert torch.equal(steps.float(), quantized.codes.float() - zero)


def test_leading_dimensions_and_no_tokens() -> None:
    operand = prepare(round_to_nearest(torch.randn(O, I), Grid(4)).to(DEVICE), Grid(8))
    x = torch.randn(2, 3, I, device=DEVICE)
    y = quant_linear(x, operand, Grid(8))
    assert torch.equal(y.flatten(0, 1), quant_linear(x.flatten(0, 1), operand, Grid(8)))
    assert quant_linear(x[:, :0], operand, Grid(8)).shape == (2, 0, O)


def test_packed_weights_are_the_bytes_they_are_stored_in() -> None:
    """At 4 bits the codes lie as in numerics/packed.py; narrower ones take two a byte too."""
    quantized = round_to_nearest(torch.randn(O, I), Grid(4, 32))
    operand = prepare(quantized, Grid(8))
    assert torch.equal(operand.codes, PackedTensor.of(quantized).packed)
    for weights, size in ((Grid(2), I // 2), (Grid(5), I), (Grid(8), I)):
        assert prepare(round_to_nearest(torch.randn(O, I), weights), Grid(8)).codes.shape == (O, size)


@pytest.mark.parametrize("weights", [Grid(4, 64), Grid(8)], ids=str)
def test_numbers_do_not_depend_on_the_tiles(monkeypatch: pytest.MonkeyPatch, weights: Grid) -> None:
    """One tile for everything, or several with a rest of tokens and of outputs."""
    operand = prepare(round_to_nearest(torch.randn(20, I), weights).to(DEVICE), Grid(4))
    x = torch.randn(17, I, device=DEVICE)
    found = []
    for tiles in (Tiles(32, 32, 64, 4, 2), Tiles(16, 16, 32 if weights.bits == 8 else 64, 4, 3)):
        monkeypatch.setattr("dllmq.kernels.triton_linear.candidates", lambda *_, tiles=tiles: [tiles])
        triton_jit._CHOSEN.clear()
        found.append(quant_linear(x, operand, Grid(4)))
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("weights", "inputs", "O", "I", "fits"),
    [
        (Grid(4), Grid(8), 4096, 12288, True),
        (Grid(4, 128), Grid(4), 126464, 4096, True),
        (Grid(3, 0), Grid(4, 64), 7, 64, True),
        (Grid(2, 96), None, 8, 192, True),
        (Grid(4, 64), Grid(8, 96), 8, 192, True),
        (Grid(4, 64), Grid(8, 48), 8, 192, False),  # segments of 16
        (Grid(4, 16), Grid(8), 8, 64, False),
        (Grid(4), Grid(8, 0), 8, 64, False),
        (Grid(4), Grid(8), 8, 40, False),
        (Grid(4), Grid(8), 8, 33_056, False),  # int32 could overflow
        (Grid(4, 64), Grid(8), 8, 96, False),
    ],
)
def test_which_grids_it_takes(weights: Grid, inputs: Grid | None, O: int, I: int, fits: bool) -> None:
    assert supports(weights, inputs, O, I) is fits


def test_an_input_of_another_layout_is_refused() -> None:
    a, b = (prepare(round_to_nearest(torch.randn(O, I), g).to(DEVICE), Grid(8)) for g in (Grid(4), Grid(8)))
    with pytest.raises(AssertionError, match="the weight wants"):
        integer_linear(quantize_for(torch.randn(2, I).to(DEVICE), a, Grid(8)), b, None, torch.float32)


@pytest.mark.parametrize("inputs", [None, Grid(8), Grid(4), Grid(8, 64)], ids=str)
def test_more_tokens_than_a_kernel_can_address_are_multiplied_in_pieces(
    inputs: Grid | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offsets are 32 bits wide: 64 rows of 3,000 tokens with 12,288 inputs are beyond them."""
    assert len(triton_linear.addressable(64 * 3000, 12288)) == 2
    x = torch.randn(7, I, device=DEVICE)
    operand = prepare(round_to_nearest(torch.randn(O, I, device=DEVICE), Grid(8)), inputs)
    whole = quant_linear(x, operand, inputs)
    monkeypatch.setattr(triton_linear, "MOST", 3 * I + 1)
    pieces = triton_linear.addressable(7, I)
    assert [(p.start, p.stop) for p in pieces] == [(0, 3), (3, 6), (6, 7)]
    found = quant_linear(x, operand, inputs)
    if inputs is None:  # sums of floating-point numbers: their order is the processor's
        torch.testing.assert_close(found, whole)
    else:
        assert torch.equal(found, whole)

"""The integer products on CPU: exact sums, and outputs that are the definition up to their rounding to fp32.

The kernels differ in how a weight lies in memory; all tests hold for each of them.
"""

import copy
from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import KINDS, row, sparse_rows
from torch import Tensor

from dllmq.kernels import cpu_int4, cpu_int8, cpu_onednn
from dllmq.kernels.cpu_inputs import MOVED, Layout, quantize_inputs
from dllmq.kernels.cpu_int8 import COLUMNS, Operand, exact_sums
from dllmq.kernels.reference import integer_sums, reference_linear
from dllmq.methods.rtn import round_to_nearest
from dllmq.numerics import Grid, QuantizedTensor, fit, quantize

pytestmark = pytest.mark.skipif(not cpu_int8.is_exact(), reason="this processor saturates int8 products")

KERNELS: list[Any] = [cpu_int8, cpu_int4] + ([cpu_onednn] if cpu_onednn.works() else [])
kernels = pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.__name__.split("_")[-1])


class Problem(NamedTuple):
    x: Tensor
    W: Tensor
    inputs: Grid
    weights: Grid


@st.composite
def problems(draw: st.DrawFn, grouped: bool) -> Problem:
    torch.manual_seed(draw(st.integers(0, 2**20)))
    I, groups, by = draw(st.integers(2, 70)), [[-1], [-1, 0]], [-1, -1]
    if grouped:
        I, groups = 12 * draw(st.integers(1, 4)), [[-1, 4, 6, 12], [-1, 0, 2, 6, 12]]
    by = [draw(st.sampled_from(sizes)) for sizes in groups]
    inputs, weights = (Grid(draw(st.integers(2, 8)), g, draw(st.booleans())) for g in by)
    kinds = st.lists(st.sampled_from(KINDS), min_size=1, max_size=5)
    x, W = (torch.stack([row(kind, I, grid.bits) for kind in draw(kinds)]) for grid in (inputs, weights))
    return Problem(x, W, inputs, weights)


def fits(kernel: Any, p: Problem) -> bool:
    return kernel.supports(p.weights, p.inputs, *p.W.shape)


def sums_of(kernel: Any, p: Problem) -> Tensor:
    """As `integer_sums`, from the kernel's operands (one chunk of outputs)."""
    w: Operand = kernel.prepare(round_to_nearest(p.W, p.weights), p.inputs)
    x, at = kernel.quantize_for(p.x, w, p.inputs), slice(0, len(p.W))
    opened = w.chunks[0].opened()
    return torch.stack([exact_sums(x, w, opened, at, n) for n in range(len(x.codes))])


@kernels
@pytest.mark.parametrize("grouped", [False, True])
def test_sums_are_exact(kernel: Any, grouped: bool) -> None:
    @given(problems(grouped))
    @settings(max_examples=15)
    def check(p: Problem) -> None:
        if fits(kernel, p):
            expected = integer_sums(p.x, round_to_nearest(p.W, p.weights), p.inputs)
            assert torch.equal(sums_of(kernel, p).double(), expected.double())

    check()


@kernels
def test_a_row_of_one_scale_is_the_definition_rounded_to_fp32(kernel: Any) -> None:
    """Three roundings of the product, one of the sum with the bias."""

    @given(problems(False), st.booleans())
    @settings(max_examples=15)
    def check(p: Problem, biased: bool) -> None:
        if not fits(kernel, p):
            return
        bias, W = torch.randn(len(p.W)) if biased else None, round_to_nearest(p.W, p.weights)
        y = kernel.quant_linear(p.x, kernel.prepare(W, p.inputs), p.inputs, bias)
        scaled, expected = (reference_linear(p.x, W, p.inputs, b) for b in (None, bias))
        half_ulp = 2.0**-24
        assert y.dtype == torch.float32
        assert bool(((y - expected).abs() <= half_ulp * (3.01 * scaled.abs() + 1.01 * expected.abs())).all())

    check()


@kernels
def test_groups_are_the_definition_combined_in_fp32(kernel: Any) -> None:
    """As exact sums of segments, scaled and added one after the other: a rounding of each, and a few more."""

    @given(problems(True), st.booleans())
    @settings(max_examples=15)
    def check(p: Problem, biased: bool) -> None:
        if not fits(kernel, p):
            return
        bias, W = torch.randn(len(p.W)) if biased else None, round_to_nearest(p.W, p.weights)
        y = kernel.quant_linear(p.x, kernel.prepare(W, p.inputs), p.inputs, bias)
        expected = reference_linear(p.x, W, p.inputs, bias)
        assert bool(((y - expected).abs() <= rounding(p, W) + 2.0**-24 * 1.01 * expected.abs()).all())

    check()


def rounding(p: Problem, W: QuantizedTensor) -> Tensor:
    """What fp32 may lose where the definition's segments are scaled and added one after the other [T, O]."""
    sums = integer_sums(p.x, W, p.inputs).double().abs()
    N = len(sums)
    s_x, s_w = (
        s.expand(n, -1).double().repeat_interleave(N // s.shape[1], 1)
        for n, s in ((len(p.x), fit(p.x, p.inputs).scale), (len(p.W), W.scale))
    )
    return 2.0**-24 * 1.01 * (N + 3) * torch.einsum("tn,on,nto->to", s_x, s_w, sums)


@kernels
@pytest.mark.parametrize("one_sign", [False, True])
@pytest.mark.parametrize("grids", [(-1, -1), (-1, 384), (384, -1), (384, 384), (6144, -1)], ids=str)
def test_zeros_and_spikes_are_the_definition(kernel: Any, grids: tuple[int, int], one_sign: bool) -> None:
    """In rows as long as LLaDA's longest: sums of codes pass 2^24 and cancel, what is left is exact."""
    torch.manual_seed(0)
    W, x = torch.randn(5, 12_288), sparse_rows(12_288)
    W = W.abs() if one_sign else W
    for bits in (4, 8):
        p = Problem(x, W, Grid(8, grids[1]), Grid(bits, grids[0]))
        if fits(kernel, p):
            quantized = round_to_nearest(W, p.weights)
            y = kernel.quant_linear(x, kernel.prepare(quantized, p.inputs), p.inputs)
            error = (y - reference_linear(x, quantized, p.inputs)).abs()
            assert bool((error <= rounding(p, quantized)).all())
            assert not bool(y[0].any())


@kernels
def test_a_token_does_not_depend_on_its_batch(kernel: Any) -> None:
    """Though offsets move with the batch's zeros, and products are mended only where they are rounded."""
    x, W = sparse_rows(12_288), round_to_nearest(torch.rand(5, 12_288), Grid(4 if kernel is cpu_int4 else 8))
    operand = kernel.prepare(W, Grid(8))
    whole = kernel.quant_linear(x, operand, Grid(8))
    alone = torch.cat([kernel.quant_linear(token[None], operand, Grid(8)) for token in x])
    assert torch.equal(whole, alone)


def test_kernels_are_equal_bit_for_bit() -> None:
    """So that what is held in memory changes no number."""

    @given(st.one_of(problems(False), problems(True)), st.booleans())
    @settings(max_examples=15)
    def check(p: Problem, biased: bool) -> None:
        bias, W = torch.randn(len(p.W)) if biased else None, round_to_nearest(p.W, p.weights)
        usable = [kernel for kernel in KERNELS if fits(kernel, p)]
        outputs = [k.quant_linear(p.x, k.prepare(W, p.inputs), p.inputs, bias) for k in usable]
        assert all(torch.equal(y, outputs[0]) for y in outputs)

    check()


@kernels
@pytest.mark.parametrize("grids", [(Grid(4), Grid(8)), (Grid(3, 32), Grid(8)), (Grid(4, 32), Grid(4, 64))])
def test_outputs_in_chunks(kernel: Any, grids: tuple[Grid, Grid], monkeypatch: pytest.MonkeyPatch) -> None:
    """And tokens; neither moves a number."""
    weight, inputs = grids
    x, W, bias = torch.randn(11, 64), round_to_nearest(torch.randn(37, 64), weight), torch.randn(37)
    whole = kernel.quant_linear(x, kernel.prepare(W, inputs), inputs, bias)
    monkeypatch.setattr(cpu_int8, "OUTPUTS", (16, 16))
    monkeypatch.setattr(cpu_int4, "OUTPUTS", 16)
    monkeypatch.setattr(cpu_int8, "TOKENS", 4)
    operand = kernel.prepare(W, inputs)
    assert len(operand.chunks) == 3
    assert torch.equal(kernel.quant_linear(x, operand, inputs, bias), whole)
    assert torch.equal(operand.steps().long(), _steps(W))


def _steps(W: Any) -> Tensor:
    zero = W.zero.long().expand(len(W.codes), -1).repeat_interleave(W.shape[1] // W.zero.shape[1], 1)
    return W.codes.long() - zero


@kernels
def test_weights_come_back_from_an_operand(kernel: Any) -> None:
    for bits, group, symmetric in product(range(2, 9), (-1, 0, 8), (False, True)):
        W = round_to_nearest(torch.randn(6, 16), Grid(bits, group, symmetric))
        if kernel.supports(W.grid, Grid(8), 6, 16):
            assert torch.equal(kernel.prepare(W, Grid(8)).steps().long(), _steps(W))


@kernels
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 7, 8])
def test_the_longest_row_at_the_ends_of_its_grid(kernel: Any, bits: int, symmetric: bool) -> None:
    """All codes at one end, of one sign and of both: the largest sums there are do not overflow, and are
    rounded once."""
    I = COLUMNS[-1] - COLUMNS[-1] % 2 * (kernel is cpu_int4)
    grid, x = Grid(bits, -1, symmetric), torch.tensor([[1.0], [-1.0]]).expand(2, I)
    p = Problem(x, x, grid, grid)
    if not fits(kernel, p):
        assert kernel is cpu_int4 and bits > 4
        return
    expected = integer_sums(x, round_to_nearest(x, grid), grid)
    assert int(expected.abs().max()) < 2**31
    assert torch.equal(sums_of(kernel, p), expected.float())
    if (bits, symmetric) == (8, False):
        assert expected.tolist() == [[[I * 255**2, -I * 255**2], [-I * 255**2, I * 255**2]]]


@kernels
@pytest.mark.parametrize("layout", ["columns first", "every other", "repeated", "no tokens"])
def test_memory_layout_does_not_matter(kernel: Any, layout: str) -> None:
    x = {
        "columns first": torch.randn(20, 5).T,
        "every other": torch.randn(5, 40)[:, ::2],
        "repeated": torch.randn(1, 20).expand(5, 20),
        "no tokens": torch.randn(0, 20),
    }[layout]
    for grid, weight in product(
        (Grid(4), Grid(8), Grid(8, symmetric=True), Grid(8, 10)), (Grid(4), Grid(4, 4))
    ):
        w = kernel.prepare(round_to_nearest(torch.randn(3, 20), weight), grid)
        plain = kernel.quant_linear(x.clone(memory_format=torch.contiguous_format), w, grid)
        assert plain.shape == (len(x), 3) and torch.equal(kernel.quant_linear(x, w, grid), plain)


@kernels
def test_shapes_and_types_follow_the_input(kernel: Any) -> None:
    w = kernel.prepare(round_to_nearest(torch.randn(3, 20), Grid(4)), Grid(8))
    x = torch.randn(2, 5, 20)
    flat = kernel.quant_linear(x.view(10, 20), w, Grid(8))
    assert torch.equal(kernel.quant_linear(x, w, Grid(8)), flat.view(2, 5, 3))
    half = kernel.quant_linear(x.bfloat16(), w, Grid(8))
    read = kernel.quant_linear(x.bfloat16().float(), w, Grid(8))
    assert half.dtype == torch.bfloat16 and torch.equal(half, read.bfloat16())  # rounded once


@kernels
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("group", [-1, 8])
def test_what_is_not_finite_stays_so_in_its_token(kernel: Any, bad: float, group: int) -> None:
    """So that a broken model is noticed, as in floating point."""
    for weight, inputs in product((Grid(4), Grid(4, 12)), (Grid(4, group), Grid(8, group))):
        x, w = torch.randn(3, 24), kernel.prepare(round_to_nearest(torch.randn(5, 24), weight), inputs)
        clean = kernel.quant_linear(x, w, inputs)
        x[1, 7] = bad
        y = kernel.quant_linear(x, w, inputs)
        assert not bool(y[1].isfinite().any()) and torch.equal(y[[0, 2]], clean[[0, 2]])


# Inputs -------------------------------------------------------------------------------------------


@given(problems(True), st.booleans(), st.sampled_from([1, 2, 40, 10**6]))
@settings(max_examples=15)
def test_inputs_are_quantized_as_by_their_definition(p: Problem, unsigned: bool, block: int) -> None:
    """Codes, scales, offsets and sums, however many rows are quantized at a time."""
    G = p.inputs.groups(p.x.shape[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dllmq.kernels.cpu_inputs.BLOCK", block)
        found = quantize_inputs(p.x, p.inputs, Layout(2, unsigned))
    params = fit(p.x, p.inputs)
    a = torch.zeros(len(p.x), G) if found.offset is None else found.offset
    c = found.codes.long().transpose(0, 1).flatten(1) - found.middle * unsigned
    assert found.codes.dtype == (torch.uint8 if unsigned else torch.int8) and torch.equal(
        found.scale, params.scale
    )
    assert torch.equal(found.sums, c.unflatten(1, (-1, 2)).sum(-1).float())
    steps = c.unflatten(1, (G, -1)) + a.long()[..., None]
    expected = quantize(p.x, params, p.inputs).long().unflatten(1, (G, -1)) - params.zero.long()[..., None]
    assert torch.equal(steps, expected)


# What is taken, and the tries ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "inputs", "I", "takes"),
    [
        (Grid(4), Grid(8), 64, "int8 int4 onednn"),
        (Grid(3, 0), Grid(4, symmetric=True), 64, "int8 int4 onednn"),
        (Grid(5), Grid(8), 64, "int8 onednn"),
        (Grid(4, 16), Grid(4), 64, "int8 int4 onednn"),
        (Grid(4, 16), Grid(4, 24), 48, "int8 int4 onednn"),
        (Grid(4, 16), Grid(4, 9), 144, ""),  # segments of one column
        (Grid(4, 15), Grid(4, 9), 45, "int8 onednn"),  # of three: two a byte leaves one
        (Grid(4, 16), Grid(4), 40, ""),
        (Grid(4), Grid(4, 0), 64, ""),
        (Grid(4), None, 64, ""),
        (Grid(4), Grid(4), 1, ""),
        (Grid(4), Grid(4), 33_024, "int8 int4 onednn"),
        (Grid(4), Grid(4), 33_026, ""),
        (Grid(4, 13), Grid(4), 33_02 * 13, "int8 onednn"),
    ],
)
def test_which_grids_they_take(weight: Grid, inputs: Grid | None, I: int, takes: str) -> None:
    found = [
        k.__name__.split("_")[-1]
        for k in (cpu_int8, cpu_int4, cpu_onednn)
        if k.supports(weight, inputs, 6, I)
    ]
    assert found == takes.split()


def test_a_processor_that_saturates_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of two products kept in 16 bits, as without VNNI."""

    def saturating(x: Tensor, w: Tensor) -> Tensor:
        pairs = torch.stack([x[:, i : i + 2].long() @ w[i : i + 2].long() for i in range(0, x.shape[1], 2)])
        return pairs.clamp(-(2**15), 2**15 - 1).sum(0).int()

    uncached = cpu_int8.is_exact.__wrapped__
    assert uncached()
    monkeypatch.setattr(torch, "_int_mm", saturating)
    assert not uncached()


def _wrong(self: Any, n: int, x: Tensor, scale: Tensor | None, total: Tensor | None) -> Tensor:
    part = (x.float() - MOVED) @ self.parts[n].to_dense().float()
    part = part if scale is None else part * scale * (1 + 2**-20)
    return part if total is None else total.add_(part)


def _absent(self: Any, n: int, x: Tensor, scale: Tensor | None, total: Tensor | None) -> Tensor:
    raise RuntimeError("could not create a primitive descriptor")


@pytest.mark.skipif(not cpu_onednn.works(), reason="torch has no prepacked int8 product here")
@pytest.mark.parametrize("add", [_wrong, _absent])
def test_a_private_operator_that_changed_is_noticed(
    add: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_onednn.Prepacked, "add", add)
    assert not cpu_onednn.works.__wrapped__()


@pytest.mark.skipif(not cpu_onednn.works(), reason="torch has no prepacked int8 product here")
def test_a_slow_reference_product_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """10,000 times as slow was measured; a thousand are enough."""
    times = {cpu_onednn.Prepacked: 1.0, cpu_int8.Bytes: 1e-3}
    monkeypatch.setattr(cpu_onednn, "_least", lambda codes, x: times[type(codes)])
    assert not cpu_onednn.works.__wrapped__()


@pytest.mark.skipif(not cpu_onednn.works(), reason="torch has no prepacked int8 product here")
def test_a_model_with_prepacked_weights_can_be_copied() -> None:
    """Opaque tensors cannot: `copy.deepcopy` of one raises."""
    operand, x = (
        cpu_onednn.prepare(round_to_nearest(torch.randn(3, 20), Grid(4)), Grid(8)),
        torch.randn(2, 20),
    )
    again = copy.deepcopy(operand)
    assert torch.equal(*(cpu_onednn.quant_linear(x, w, Grid(8)) for w in (operand, again)))

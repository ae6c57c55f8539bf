"""Inputs are quantized as numerics/grid.py does it, bit for bit, in the layouts that the products read."""

import pytest
import torch
from kernel_cases import DEVICE, needs_triton, rows
from torch import Tensor

from dllmq.kernels.triton_inputs import Inputs, Layout, Norm, quantize_inputs
from dllmq.models.llada import RMSNorm
from dllmq.numerics import Grid, fit, quantize

pytestmark = needs_triton
I = 96


def codes_and_offsets(x: Inputs, grid: Grid) -> tuple[Tensor, Tensor]:
    """c in the order of the columns, and a for each of them; both int32 on the CPU."""
    c = x.codes.cpu().int()
    if x.layout.planes:
        c = torch.stack(c.chunk(2, dim=1), -1).flatten(1)
    G = grid.groups(c.shape[1])
    a = torch.zeros(len(c), G) if x.offset is None else x.offset.cpu().T
    return c, a.int().repeat_interleave(c.shape[1] // G, 1)


def check(x: Tensor, grid: Grid, layout: Layout) -> None:
    """q, s, z and the sums of the codes."""
    params = fit(x, grid)  # on the CPU: CUDA's division by a constant is a product with its reciprocal
    found = quantize_inputs(x.to(DEVICE), grid, layout)
    assert torch.equal(found.scale.cpu().T, params.scale)
    c, a = codes_and_offsets(found, grid)
    z = params.zero.repeat_interleave(x.shape[1] // params.zero.shape[1], 1)
    assert torch.equal(c + a, (quantize(x, params, grid).float() - z).int())
    assert (found.offset is not None) is (grid.bits == 8 and not grid.symmetric)
    segments = c.unflatten(1, (-1, layout.segment)).sum(-1).int()
    assert torch.equal(found.sums.cpu().T, segments)


@pytest.mark.parametrize(
    ("bits", "symmetric"), [*((b, False) for b in range(2, 9)), (2, True), (4, True), (7, True), (8, True)]
)
def test_every_width_on_numbers_that_are_hard_to_round(bits: int, symmetric: bool) -> None:
    check(rows(I, bits), Grid(bits, -1, symmetric), Layout(I, planes=bits % 2 == 0))


@pytest.mark.parametrize(
    ("group", "segment", "planes"),
    [(-1, 32, True), (-1, 24, False), (96, 48, True), (48, 48, False), (48, 16, True), (24, 12, False)],
)
def test_groups_and_segments(group: int, segment: int, planes: bool) -> None:
    for grid in (Grid(4, group), Grid(8, group)):
        check(torch.randn(2, I), grid, Layout(segment, planes))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_in_fp32(dtype: torch.dtype) -> None:
    x = torch.randn(3, I).to(dtype)
    half, full = (quantize_inputs(t.to(DEVICE), Grid(4), Layout(I, False)) for t in (x, x.float()))
    assert torch.equal(half.codes, full.codes) and torch.equal(half.scale, full.scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the interpreter does not round bf16
def test_the_norm_in_front_is_lladas(dtype: torch.dtype) -> None:
    """Codes of the same normed values, but for the last bit of a mean taken in another order."""
    norm = RMSNorm(I, 1e-5).to(dtype)
    norm.weight.data = (torch.rand(I) + 0.5).to(dtype)
    x = (3 * torch.randn(8, I)).to(dtype)
    apart = norm(x).detach()
    expected = quantize(apart, fit(apart, Grid(8)), Grid(8)).int()
    found = quantize_inputs(
        x.to(DEVICE), Grid(8), Layout(I, False), Norm(norm.weight.detach().to(DEVICE), norm.eps)
    )
    assert found.offset is not None
    codes = found.codes.cpu().int() + 128
    assert float((codes == expected).float().mean()) > 0.99 and int((codes - expected).abs().max()) <= 1
    torch.testing.assert_close(found.scale.cpu().T, fit(apart, Grid(8)).scale, rtol=1e-2, atol=0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_shows_in_its_tokens_scale_alone(bad: float) -> None:
    x = torch.randn(3, I)
    clean = quantize_inputs(x.to(DEVICE), Grid(4), Layout(I, False))
    x[1, 7] = bad
    found = quantize_inputs(x.to(DEVICE), Grid(4), Layout(I, False))
    assert not bool(found.scale[0, 1].isfinite())
    assert torch.equal(found.codes[[0, 2]], clean.codes[[0, 2]])
    assert torch.equal(found.scale[:, [0, 2]], clean.scale[:, [0, 2]])


@pytest.mark.parametrize("layout", ["columns first", "every other", "rows apart", "no tokens"])
def test_memory_layout_does_not_matter(layout: str) -> None:
    x = {
        "columns first": torch.randn(I, 3).T,
        "every other": torch.randn(3, 2 * I)[:, ::2],
        "rows apart": torch.randn(6, I)[::2],
        "no tokens": torch.randn(0, I),
    }[layout].to(DEVICE)
    plain = quantize_inputs(x.contiguous().clone(), Grid(4), Layout(I, True))
    found = quantize_inputs(x, Grid(4), Layout(I, True))
    assert found.codes.shape == (len(x), I) and torch.equal(found.codes, plain.codes)
    assert torch.equal(found.scale, plain.scale)

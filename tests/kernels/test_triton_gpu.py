"""Triton's kernels on a GPU at the shapes of LLaDA-8B: integers exact, outputs the definition's.

References are made of exact integers in fp64 (sums stay below 2^53) and, where torch on CUDA rounds otherwise
than on the CPU (a division by a constant), on the CPU.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed (pip install triton; Linux on x86-64)")

from dllmq.kernels import triton_jit, triton_linear
from dllmq.kernels.triton_confidence import argmax_confidence
from dllmq.kernels.triton_gptq import solve_block
from dllmq.kernels.triton_inputs import Layout, Norm, quantize_inputs
from dllmq.kernels.triton_linear import prepare, quant_linear
from dllmq.methods.gptq import gptq_solve
from dllmq.methods.rtn import round_to_nearest
from dllmq.models.llada import RMSNorm
from dllmq.numerics import Grid, Params, dequantize, fake_quant, fit, quantize

pytestmark = pytest.mark.gpu
HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.fixture
def untuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first tile of each kind: compiling all of them takes minutes."""
    found = triton_linear.candidates
    monkeypatch.setattr(triton_linear, "candidates", lambda *args: found(*args)[:1])
    monkeypatch.setattr(triton_jit, "_CHOSEN", {})


def weight(O: int, I: int, grid: Grid) -> Any:
    return round_to_nearest(torch.randn(O, I) / I**0.5, grid).to(torch.device("cuda"))


def definition(x: Tensor, quantized: Any, inputs: Grid | None) -> tuple[Tensor, Tensor]:
    """Q_a(x) Deq(Q_w)^T in fp64, and the sum of the sizes of its terms."""
    x_hat = x.double() if inputs is None else fake_quant(x.float().cpu(), inputs).double().cuda()
    W_hat = quantized.dequantize().double()
    return x_hat @ W_hat.T, x_hat.abs() @ W_hat.abs().T


def agrees(y: Tensor, expected: Tensor, size: Tensor) -> bool:
    """To the rounding of the type, and to fp32's of the scaling and of a sum over segments.

    Dequantized values are rounded to fp32 themselves, hence `size`.
    """
    bound = 1.01 * HALF_ULP[y.dtype] * expected.abs() + 8 * HALF_ULP[torch.float32] * size
    return bool(((y.double() - expected).abs() <= bound).all())


W8A8, W4A8, W4A4 = (Grid(8, symmetric=True), Grid(8, symmetric=True)), (Grid(4), Grid(8)), (Grid(4), Grid(4))
GROUPED = (Grid(4, 128), Grid(4))
OTHERS = [
    *((Grid(8), Grid(8)), (Grid(6), Grid(8)), (Grid(3, 128), Grid(8)), (Grid(4, 32), Grid(8))),
    *((Grid(4, 64), Grid(8)), (Grid(4, 128, True), Grid(4, 128)), (Grid(4, 128), Grid(4, 64))),
]


@pytest.mark.parametrize(
    ("O", "I", "grid", "inputs"),
    [
        *((4096, 4096, *grids) for grids in (W8A8, W4A8, W4A4, GROUPED, *OTHERS)),
        *((O, I, *grids) for O, I in ((12288, 4096), (4096, 12288)) for grids in (W8A8, W4A8, GROUPED)),
        (126464, 4096, *W4A8),
        (525, 4128, *W4A8),
    ],
)
def test_linears_of_the_8b_model(untuned: None, O: int, I: int, grid: Grid, inputs: Grid) -> None:
    """And of a shape that no tile divides; from one token to more than fit a tile."""
    quantized, bias = weight(O, I, grid), torch.randn(O, device="cuda")
    operand = prepare(quantized, inputs)
    for T in (1, 37, 300, 1100) if O < 100_000 else (16,):
        x = torch.randn(T, I, device="cuda", dtype=torch.bfloat16)
        expected, size = definition(x, quantized, inputs)
        y = quant_linear(x, operand, inputs, bias)
        assert agrees(y, expected + bias.double(), size + bias.abs()), f"{T} tokens"
        if T == 37:
            assert agrees(quant_linear(x.float(), operand, inputs), expected, size), "fp32"


@pytest.mark.parametrize(("grid", "inputs"), [W8A8, W4A8, GROUPED, (Grid(4, 128), None)])
def test_every_tile_to_choose_from_fits_and_agrees(grid: Grid, inputs: Grid | None) -> None:
    """What `fastest` tries; none may need more shared memory or registers than there are."""
    quantized = weight(4096, 4096, grid)
    operand = prepare(quantized, inputs)
    for T in (16, 256, 2048):
        x = torch.randn(T, 4096, device="cuda", dtype=torch.bfloat16)
        expected, size = definition(x, quantized, inputs)
        if inputs is None:
            size = size * 2.0**14  # dequantized weights are rounded to bf16
        for tiles in triton_linear.candidates(T, 4096, 64 if inputs is None else 128, grid.group_size > 0):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(triton_linear, "candidates", lambda *_, tiles=tiles: [tiles])
                triton_jit._CHOSEN.clear()
                assert agrees(quant_linear(x, operand, inputs), expected, size), f"{T} tokens, {tiles}"


@pytest.mark.parametrize(
    ("grid", "inputs"), [(Grid(8), Grid(8)), (Grid(4), Grid(8)), (Grid(4, 128), Grid(4))]
)
def test_sums_are_integers_and_exact(grid: Grid, inputs: Grid) -> None:
    """With scales of 1 and 2^24 above every sum, fp32 holds the integers themselves."""
    O, I = 4096, 512
    quantized = round_to_nearest(torch.randn(O, I), grid).to(torch.device("cuda"))
    quantized.scale.fill_(1.0)
    half = 2.0 ** (inputs.bits - 1)
    x = torch.randint(0, 2**inputs.bits, (130, I), device="cuda") - half
    x[:, 0], x[:, 1] = -half, half - 1  # so that the input's scale is 1
    y = quant_linear(x, prepare(quantized, inputs), inputs)
    assert torch.equal(y.double(), x.double() @ quantized.dequantize().double().T)


@pytest.mark.parametrize("T", [1, 16, 300])
@pytest.mark.parametrize("grid", [Grid(4), Grid(4, 128), Grid(4, 32, True), Grid(8), Grid(3, 128)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_full_precision_inputs(untuned: None, T: int, grid: Grid, dtype: torch.dtype) -> None:
    """The weight is rounded to the input's type, as the dequantized one is."""
    quantized = weight(4096, 4096, grid)
    x = torch.randn(T, 4096, device="cuda", dtype=dtype)
    W = quantized.dequantize().to(dtype).double()
    y = quant_linear(x, prepare(quantized, None), None)
    bound = 1.01 * HALF_ULP[dtype] * (x.double() @ W.T).abs() + 2.0**-20 * (x.double().abs() @ W.abs().T)
    assert y.dtype == dtype and bool(((y.double() - x.double() @ W.T).abs() <= bound).all())


@pytest.mark.parametrize("I", [4096, 12288])
@pytest.mark.parametrize(
    ("grid", "segment"),
    [(Grid(4), 0), (Grid(8), 128), (Grid(8, symmetric=True), 0), (Grid(4, 128), 128), (Grid(2, 64), 32)],
    ids=str,
)
def test_inputs_bit_for_bit(I: int, grid: Grid, segment: int) -> None:
    x = torch.randn(200, I) * torch.rand(200, 1) * 10
    x[::7, 5] *= 100
    found = quantize_inputs(x.cuda(), grid, Layout(segment or I, planes=False))
    params = fit(x, grid)
    codes = found.codes.cpu().int()
    if found.offset is not None:
        codes += found.offset.cpu().T.repeat_interleave(I // found.offset.shape[0], 1)
    zero = params.zero.repeat_interleave(I // params.zero.shape[1], 1)
    assert torch.equal(found.scale.cpu().T, params.scale)
    assert torch.equal(codes.float(), quantize(x, params, grid).float() - zero)
    sums = found.codes.cpu().int().unflatten(1, (-1, segment or I)).sum(-1)
    assert torch.equal(found.sums.cpu().T.long(), sums)


def test_the_norm_in_front() -> None:
    """bf16 as LLaDA rounds; a mean taken in another order may move a value by its last bit."""
    norm = RMSNorm(4096, 1e-5).to("cuda", torch.bfloat16)
    norm.weight.data = torch.rand(4096, device="cuda", dtype=torch.bfloat16) + 0.5
    x = 3 * torch.randn(64, 4096, device="cuda", dtype=torch.bfloat16)
    layout = Layout(4096, planes=False)
    fused = quantize_inputs(x, Grid(8), layout, Norm(norm.weight.data, norm.eps))
    apart = quantize_inputs(norm(x).detach(), Grid(8), layout)
    assert float((fused.codes == apart.codes).float().mean()) > 0.99


@pytest.mark.parametrize("grid", [Grid(4), Grid(3, symmetric=True)], ids=str)
def test_a_gptq_block_is_the_column_loop_bit_for_bit(grid: Grid) -> None:
    O, B = 4096, 128
    U = torch.triu(torch.randn(B, B) * 0.1)
    U += torch.diag(1 - U.diagonal() + torch.rand(B))
    W = torch.randn(O, B)
    params, column = fit(W, grid), Grid(grid.bits, -1, grid.symmetric)
    found, errors = solve_block(
        W.T.contiguous().cuda(), U.cuda(), *(t.T.cuda().expand(B, O) for t in params), grid.low, grid.high,
        grid.symmetric,
    )  # fmt: skip
    for i in range(B):
        q = quantize(W[:, i : i + 1], params, column)
        e = (W[:, i : i + 1] - dequantize(q, params, column)) / U[i, i]
        W[:, i + 1 :] -= e * U[i, i + 1 :]
        assert torch.equal(found[i].cpu(), q[:, 0]) and torch.equal(errors[i].cpu(), e[:, 0]), f"column {i}"


@pytest.mark.parametrize("grid", [Grid(4), Grid(4, 128)], ids=str)
def test_gptq_is_the_same_solution_on_both_devices(grid: Grid) -> None:
    """Another order of sums moves codes at ties, and what follows from them; not the error it minimises."""
    X = torch.randn(600, 512) @ torch.randn(512, 512) / 20
    W, H = torch.randn(256, 512), 2 * X.T @ X
    here, there = gptq_solve(W, H, grid), gptq_solve(W.cuda(), H.cuda(), grid)
    errors = [torch.linalg.norm((W - q.dequantize().cpu()) @ X.T) for q in (here, there)]
    assert float((here.codes == there.codes.cpu()).float().mean()) > 0.95
    torch.testing.assert_close(errors[1], errors[0], rtol=1e-2, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_confidence_over_the_vocabulary(dtype: torch.dtype) -> None:
    logits = (5 * torch.randn(130, 126464, device="cuda")).to(dtype)
    logits[3, 100:] = float("-inf")
    logits[4, [7, 126463]] = 50.0
    x0, p = argmax_confidence(logits)
    best, lowest = logits.float().max(-1).values, torch.arange(126464, device="cuda")
    first = torch.where(logits.float() == best[:, None], lowest, 126464).amin(-1)
    assert torch.equal(x0, first)
    expected = torch.softmax(logits.double(), -1).gather(1, first[:, None])[:, 0]
    torch.testing.assert_close(p.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("grid", "inputs"), [(Grid(4), Grid(8)), (Grid(4, 128), Grid(4)), (Grid(4), None)])
def test_a_captured_graph_gives_the_same_numbers(grid: Grid, inputs: Grid | None) -> None:
    operand = prepare(weight(4096, 4096, grid), inputs)
    x = torch.randn(32, 4096, device="cuda", dtype=torch.bfloat16)
    call: Callable[[], Tensor] = lambda: quant_linear(x, operand, inputs)  # noqa: E731
    expected = call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert not torch.equal(y, expected) and torch.equal(y, call())


def test_parameters_of_a_column_may_be_views() -> None:
    """Scales of groups, as the solver hands them over: not contiguous."""
    O, B, grid = 300, 64, Grid(4, 32)
    W = torch.randn(O, B)
    fitted = fit(W, grid)
    index = torch.arange(B) // 32
    views = [t.cuda().T[index.cuda()] for t in fitted]
    whole = [t.repeat_interleave(32, 1).T.contiguous().cuda() for t in fitted]
    U = torch.eye(B, device="cuda")
    results = [solve_block(W.T.contiguous().cuda(), U, *given, 0, 15, False)[0] for given in (views, whole)]
    expected = quantize(W, Params(*fitted), grid)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0].cpu().T, expected)

"""GPTQ against OBQ as the paper defines it, and what must not change its result."""

import gc
import importlib
import weakref

import pytest
import torch
from torch import Tensor

from dllmq.calibration.stats import GroupStats
from dllmq.methods import GPTQ, Method
from dllmq.methods import gptq as solver
from dllmq.methods.gptq import gptq, gptq_solve, solve_block, solve_columns
from dllmq.methods.rtn import rtn
from dllmq.models.base import LinearGroup
from dllmq.numerics import Grid, Params, fit
from dllmq.numerics.linalg import SingularHessianError, damped_inverse_cholesky, weighted_gram

I = 24
GROUP_SIZES = [-1, 0, 4, 6, 12]


def problem(seed: int = 0, rows: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    """W, correlated inputs X and their H."""
    rng = torch.Generator().manual_seed(seed)
    mixing = torch.randn(6, I, generator=rng)
    X = torch.randn(300, 6, generator=rng) @ mixing + 0.3 * torch.randn(300, I, generator=rng)
    X = X * torch.logspace(-0.5, 0.5, I)[torch.randperm(I, generator=rng)]
    return torch.randn(rows, I, generator=rng), X, weighted_gram(X)


def layer_error(W: Tensor, Q: Tensor, X: Tensor) -> float:
    return float((X @ (Q - W).T).square().sum())


def textbook(
    W: Tensor, H: Tensor, grid: Grid, damp: float, act_order: bool, static: bool
) -> tuple[Tensor, Tensor]:
    """OBQ in a fixed order, in double precision: round a column, move the others by eq. 2, eliminate it from
    the inverse by eq. 3. No Cholesky, no blocks; the grid is spelled out again.

    Returns:
        W_hat, and the rows that met no tie. A symmetric range's own end is one if it is negative (-max / s is
        half-way between two codes): rounding noise decides it, and the columns behind follow.
    """
    W, H = W.double().clone(), H.double().clone()
    dead = H.diagonal() == 0
    W[:, dead] = 0
    H[dead, dead] = H.diagonal()[~dead].mean()
    order = torch.argsort(H.diagonal(), descending=True, stable=True) if act_order else torch.arange(I)
    Hinv = torch.linalg.inv(H + damp * H.diagonal().mean() * torch.eye(I))
    levels = 2**grid.bits - 1
    half = (levels + 1) // 2

    def range_to_grid(values: Tensor) -> tuple[Tensor, Tensor]:
        if grid.group_size == 0:
            values = values.reshape(1, -1)
        if grid.symmetric:
            return 2 * values.abs().amax(1) / levels, torch.zeros(())
        low, high = values.amin(1).clamp(max=0), values.amax(1).clamp(min=0)
        return (high - low) / levels, torch.round(-low / ((high - low) / levels))

    original, Q, sure = W.clone(), torch.empty_like(W), torch.ones(len(W), dtype=torch.bool)
    for n, i in enumerate(order.tolist()):
        if grid.group_size <= 0:
            s, z = range_to_grid(original)
        elif static:
            first = i // grid.group_size * grid.group_size
            s, z = range_to_grid(original[:, first : first + grid.group_size])
        elif n % grid.group_size == 0:
            s, z = range_to_grid(W[:, order[n : n + grid.group_size]])
        low, high = (-half, half - 1) if grid.symmetric else (0, levels)
        code = W[:, i] / s + z
        sure &= ((code - code.floor() - 0.5).abs() > 1e-4) | (code > high)
        Q[:, i] = (code.round().clamp(low, high) - z) * s
        W -= torch.outer((W[:, i] - Q[:, i]) / Hinv[i, i], Hinv[i])
        Hinv -= torch.outer(Hinv[:, i], Hinv[i]) / Hinv[i, i]
        Hinv[i, i] = 1.0  # eliminated: never read again
        W[:, i] = Q[:, i]
    return Q.float(), sure


@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("act_order", [False, True], ids=["in_order", "act_order"])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_equals_the_textbook(group_size: int, act_order: bool, static: bool, symmetric: bool) -> None:
    """Also where groups straddle blocks: blocks of 5 meet groups of 4, 6 or 12 at most once, at column 20."""
    W, _, H = problem(rows=40)
    grid = Grid(3, group_size, symmetric)
    ours = gptq(W, H, grid, block_size=5, damp=0.01, act_order=act_order, static_groups=static)
    theirs, sure = textbook(W, H, grid, 0.01, act_order, static)
    assert sure.sum() >= 10
    torch.testing.assert_close(ours[sure], theirs[sure], rtol=1e-3, atol=1e-4)


def column_by_column(
    W: Tensor, U: Tensor, params: Params, group_of: Tensor, grid: Grid
) -> tuple[Tensor, Tensor]:
    """Codes and errors of Algorithm 1 without blocks, in W's own precision: a column, then all behind it."""
    W, codes, E = W.clone(), torch.empty_like(W), torch.empty_like(W)
    for i in range(W.shape[1]):
        at = 0 if params.scale.shape[1] == 1 else int(group_of[i])
        s, z = params.scale[:, at], params.zero[:, at]
        codes[:, i] = ((W[:, i] / s).round() + z).clamp(grid.low, grid.high)
        E[:, i] = (W[:, i] - (codes[:, i] - z) * s) / U[i, i]
        W[:, i + 1 :] -= torch.outer(E[:, i], U[i, i + 1 :])
    return codes, E


def authors_loop(W: Tensor, U: Tensor, params: Params, grid: Grid, block: int = 128) -> Tensor:
    """The published algorithm as usually written: blocks of columns, each error to the rest of its block at
    once, a block's errors to the columns behind it in one product. Codes; one scale per row."""
    W, codes = W.clone(), torch.empty_like(W)
    for start in range(0, W.shape[1], block):
        stop = min(start + block, W.shape[1])
        part, U_block = W[:, start:stop].clone(), U[start:stop, start:stop]
        E = torch.zeros_like(part)
        for i in range(stop - start):
            w = part[:, i : i + 1]
            q = torch.clamp(torch.round(w / params.scale) + params.zero, grid.low, grid.high)
            e = (w - params.scale * (q - params.zero)) / U_block[i, i]
            part[:, i:] -= e.matmul(U_block[i : i + 1, i:])
            codes[:, start + i : start + i + 1], E[:, i : i + 1] = q, e
        W[:, stop:] -= E.matmul(U[start:stop, stop:])
    return codes


@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize("group_size", [-1, 0, 16])
@pytest.mark.parametrize("block_size", [1, 5, 128])
def test_recursion_equals_column_by_column_in_double(
    block_size: int, group_size: int, symmetric: bool
) -> None:
    """Well-conditioned, wide enough for every kind of product: the codes are equal, the errors to 1e-12."""
    rng = torch.Generator().manual_seed(7)
    X = torch.randn(600, 208, generator=rng, dtype=torch.float64)
    X += X[:, :1]
    W = torch.randn(70, 208, generator=rng, dtype=torch.float64)
    U = torch.linalg.cholesky(torch.linalg.inv(X.T @ X + 6 * torch.eye(208)), upper=True)
    grid = Grid(4, group_size, symmetric)
    params = fit(
        0.99 * W, grid
    )  # no value half-way between two codes: the range's own end is, on symmetric grids
    group_of = torch.randperm(208, generator=rng) // 16  # as act_order with static groups has it
    codes, E = column_by_column(W, U, params, group_of, grid)
    Wt = W.T.contiguous()
    ours, _ = solve_columns(Wt, U, grid, params, group_of, block_size)
    assert torch.equal(ours.T.double(), codes)
    torch.testing.assert_close(Wt.T, E, rtol=0, atol=1e-12)


@pytest.mark.parametrize("block_size", [1, 3, 8, 100])
def test_recursion_is_exact_where_the_arithmetic_is(block_size: int) -> None:
    """Steps of 1, weights in eighths, a factor of 0 and +-1: nothing is ever rounded in fp32, so that any
    order of sums gives the same codes and errors, bit for bit."""
    rng = torch.Generator().manual_seed(8)
    I, O, grid = 150, 80, Grid(3)
    W = torch.randint(-24, 25, (O, I), generator=rng) / 8
    U = torch.eye(I)
    for i in range(I - 1):  # two entries a row, far enough apart to reach other blocks
        behind = torch.randint(i + 1, I, (2,), generator=rng)
        U[i, behind] = torch.tensor([1.0, -1.0])[torch.randint(0, 2, (2,), generator=rng)]
    params = Params(torch.ones(O, 1), torch.full((O, 1), 3.0))
    group_of = torch.zeros(I, dtype=torch.long)
    codes, E = column_by_column(W, U, params, group_of, grid)
    assert codes.unique().tolist() == list(range(8)) and E.abs().max() < 2**18
    Wt = W.T.contiguous()
    ours, _ = solve_columns(Wt, U, grid, params, group_of, block_size)
    assert torch.equal(ours.T.float(), codes) and torch.equal(Wt.T, E)


def test_codes_in_fp32_differ_from_double_only_after_ties() -> None:
    """A row's first code that differs was, in double precision, within rounding noise of half-way."""
    rng = torch.Generator().manual_seed(9)
    X = torch.randn(500, 256, generator=rng) @ (torch.eye(256) + 0.3 * torch.randn(256, 256, generator=rng))
    W, H, grid = torch.randn(300, 256, generator=rng), weighted_gram(X), Grid(4)
    params, group_of = fit(W, grid), torch.zeros(256, dtype=torch.long)
    U = damped_inverse_cholesky(H, 0.01)
    ours, _ = solve_columns(W.T.contiguous(), U, grid, params, group_of, 128)
    exact, E = column_by_column(W.double(), U.double(), Params(*(t.double() for t in params)), group_of, grid)
    differs = ours.T.double() != exact
    first = differs.long().argmax(1)[differs.any(1)]
    rows = differs.any(1).nonzero()[:, 0]
    assert len(rows) < 0.1 * len(W)
    code_error = E[rows, first] * U.diagonal()[first] / params.scale[rows, 0]  # in steps, before rounding
    torch.testing.assert_close(code_error.abs(), torch.full_like(code_error, 0.5), rtol=0, atol=1e-3)


def test_authors_loop_gives_the_same_codes() -> None:
    """The baseline of the speed ratio solves the same problem."""
    W, _, H = problem(rows=40)
    grid = Grid(4)
    params, U = fit(W, grid), damped_inverse_cholesky(H, 0.01)
    theirs = authors_loop(W, U, params, grid, block=5)
    assert torch.equal(gptq_solve(W, H, grid, block_size=5).codes.float(), theirs)


def test_a_fused_solver_takes_whole_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU kernel is handed: contiguous columns of at most block_size, never more than a dynamic group,
    its scales and zeros in every row; and that its codes and errors are used."""
    W, _, H = problem(rows=40)
    seen: list[int] = []

    def fused(Wt: Tensor, U: Tensor, scale: Tensor, zero: Tensor, *rest: int) -> tuple[Tensor, Tensor]:
        assert Wt.is_contiguous() and U.shape == (len(Wt), len(Wt)) and scale.shape == zero.shape == Wt.shape
        seen.append(len(Wt))
        return solve_block(Wt, U, scale, zero, *rest)  # type: ignore[arg-type]

    for grid, widths in ((Grid(3), [9, 9, 6]), (Grid(3, 12), [9, 3] * 2), (Grid(3, 6), [6] * 4)):
        with monkeypatch.context() as patch:
            patch.setattr(solver, "block_solver", lambda device, block_size: (fused, block_size))
            seen.clear()
            whole = gptq_solve(W, H, grid, block_size=9)
        assert seen == widths
        assert torch.equal(whole.codes, gptq_solve(W, H, grid, block_size=9).codes)


def test_block_solver_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def fused(*_: object) -> tuple[Tensor, Tensor]:
        raise AssertionError("not called")

    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(solver, "fused_solve_block", lambda: fused)
    assert [solver.block_solver(cpu, size)[1] for size in (128, 5)] == [8, 5]
    assert solver.block_solver(cuda, 256) == (fused, 128) and solver.block_solver(cuda, 32) == (fused, 32)
    monkeypatch.setattr(solver, "fused_solve_block", lambda: None)
    assert solver.block_solver(cuda, 128)[1] == 8


def test_a_room_remembers_nothing() -> None:
    """Blocks solved in one room, one after the other, come out as each does in a room of its own."""
    rng = torch.Generator().manual_seed(12)
    shared, _ = solver.block_solver(torch.device("cpu"), 128)
    for width in (8, 8, 3, 8):
        Wt, zero = torch.randn(width, 33, generator=rng), torch.randint(0, 8, (width, 33), generator=rng)
        U = torch.rand(width, width, generator=rng).triu() + torch.eye(width)
        given = (Wt, U, torch.rand(width, 33, generator=rng) + 0.1, zero.float(), 0, 7, False)
        for found, alone in zip(shared(*given), solve_block(*given), strict=True):
            assert torch.equal(found, alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounds_to_the_nearest_even_and_clamps(dtype: torch.dtype) -> None:
    """+ 1.5 / eps - 1.5 / eps is torch.round wherever a code can lie; beyond, the range's end counts."""
    halves = torch.arange(-300, 301, dtype=dtype) / 2
    near = torch.cat([torch.nextafter(halves, halves + way) for way in (-1, 0, 1)])
    far = torch.tensor([1e4, 2.0**22, 2.0**24 + 2, 1e17, 1e30, float("inf")], dtype=dtype)
    w = torch.cat([near, far, -far])
    one, zero = torch.ones(1, len(w), dtype=dtype), torch.full((1, len(w)), 100.0, dtype=dtype)
    codes, _ = solve_block(w[None], torch.ones(1, 1, dtype=dtype), one, zero, 0, 255, False)
    assert torch.equal(codes[0].to(dtype), (w.round() + 100).clamp(0, 255))


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("act_order", [False, True], ids=["in_order", "act_order"])
def test_block_size_changes_nothing(group_size: int, act_order: bool) -> None:
    W, _, H = problem(1)
    grid = Grid(4, group_size)
    solved = [gptq_solve(W, H, grid, block, act_order=act_order) for block in (1, 5, 7, 128)]
    for other in solved[1:]:
        assert torch.equal(other.codes, solved[0].codes)
        torch.testing.assert_close(other.dequantize(), solved[0].dequantize(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group_size", [-1, 0, 4])
def test_diagonal_hessian_is_rtn(group_size: int, act_order: bool, static: bool) -> None:
    """Without correlations nothing is compensated. (Dynamic groups in another order are other groups.)"""
    W, _, H = problem(2)
    grid = Grid(3, group_size)
    Q = gptq(W, torch.diag(H.diagonal()), grid, act_order=act_order, static_groups=static)
    if group_size == 4 and act_order and not static:
        assert not torch.equal(Q, rtn(W, grid))
    else:
        assert torch.equal(Q, rtn(W, grid))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("act_order", [False, True], ids=["in_order", "act_order"])
def test_beats_rtn(bits: int, group_size: int, act_order: bool) -> None:
    grid = Grid(bits, group_size)
    for seed in range(3):
        W, X, H = problem(seed)
        ours = layer_error(W, gptq(W, H, grid, act_order=act_order), X)
        assert ours < 0.9 * layer_error(W, rtn(W, grid), X)


@pytest.mark.parametrize("act_order", [False, True])
def test_a_constant_times_the_hessian_changes_nothing(act_order: bool) -> None:
    """With dead channels too: their stand-in is the live mean, not 1."""
    W, X, _ = problem(3)
    X[:, [2, 11]] = 0
    H = weighted_gram(X)
    for group_size in (-1, 4):
        one, seven = (gptq_solve(W, k * H, Grid(3, group_size), act_order=act_order) for k in (1.0, 7.0))
        assert torch.equal(one.codes, seven.codes)
        torch.testing.assert_close(one.dequantize(), seven.dequantize(), rtol=1e-5, atol=1e-5)


def test_dead_channels_become_zero_and_matter_no_more() -> None:
    W, X, _ = problem(4)
    X[:, [0, 7]] = 0
    huge = W.clone()
    huge[:, [0, 7]] = 1e6
    Q = gptq(huge, weighted_gram(X), Grid(4))
    assert not Q[:, [0, 7]].any()
    assert torch.equal(Q, gptq(W, weighted_gram(X), Grid(4)))


def test_weight_one_is_plain_gptq_bit_for_bit() -> None:
    W, X, H = problem(5)
    ones = weighted_gram(X, torch.ones(len(X)))
    assert torch.equal(gptq(W, H, Grid(3)), gptq(W, ones, Grid(3)))


def test_weighted_tokens_are_quantized_better() -> None:
    """Weight 100 on half of the tokens lowers the error on that half."""
    W, X, _ = problem(6)
    X[150:] = X[150:].roll(5, dims=1)  # the halves must differ for a choice to exist
    c = torch.cat([torch.full((150,), 100.0), torch.ones(150)])
    plain, weighted = (gptq(W, weighted_gram(X, k), Grid(3)) for k in (None, c))
    assert layer_error(W, weighted, X[:150]) < layer_error(W, plain, X[:150])


def test_group_index_only_where_needed() -> None:
    W, _, H = problem()
    order = torch.argsort(H.diagonal(), descending=True, stable=True)
    solved = gptq_solve(W, H, Grid(3, 4), act_order=True)
    assert solved.group_index is not None
    assert solved.group_index[order].tolist() == [i // 4 for i in range(I)]
    assert gptq_solve(W, H, Grid(3, 4), act_order=True, static_groups=True).group_index is None
    assert gptq_solve(W, H, Grid(3, -1), act_order=True).group_index is None
    assert gptq_solve(W, H, Grid(3, 4)).group_index is None


def test_arguments_are_not_changed_and_runs_repeat() -> None:
    W, _, H = problem()
    H[:, 3] = H[3, :] = 0
    W = W.T.contiguous().T  # held as the solver holds it
    kept_W, kept_H = W.clone(), H.clone()
    first = gptq(W, H, Grid(2, 4), act_order=True)
    assert torch.equal(W, kept_W) and torch.equal(H, kept_H)
    assert torch.equal(first, gptq(W, H, Grid(2, 4), act_order=True))


# the method ---------------------------------------------------------------------------------------


def group(**weights: Tensor) -> LinearGroup:
    def inspect(*_: object) -> Tensor:
        raise AssertionError("GPTQ looks at no output")

    return LinearGroup("blocks.0.qkv", weights, can_scale=True, inspect=inspect, clip=frozenset())


@pytest.mark.parametrize("group_size", [-1, 0, 6])
def test_stacking_a_group_equals_one_by_one(group_size: int) -> None:
    (q, _, H), (k, _, _) = problem(0), problem(1, rows=4)
    grid, method = Grid(3, group_size), GPTQ(block_size=7, damp=0.02, act_order=True)
    update = method(group(q_proj=q, k_proj=k), GroupStats(gram=H), grid)
    for name, W in {"q_proj": q, "k_proj": k}.items():
        alone = gptq_solve(W, H, grid, block_size=7, damp=0.02, act_order=True)
        assert torch.equal(update.weights[name].codes, alone.codes)
        torch.testing.assert_close(update.weights[name].dequantize(), alone.dequantize())
    assert update.scale is None and isinstance(method, Method) and method.needs == {"gram"}


def test_failed_cholesky_names_the_layer() -> None:
    W, _, H = problem()
    with pytest.raises(SingularHessianError, match=r"blocks\.0\.qkv: .*raise method\.damp"):
        GPTQ()(group(q_proj=W), GroupStats(gram=H - 1e3 * torch.eye(I)), Grid(4))


def test_no_token_at_all_names_the_layer() -> None:
    W, _, H = problem()
    with pytest.raises(
        SingularHessianError, match=r"blocks\.0\.qkv: no calibration token reached this layer"
    ):
        GPTQ()(group(q_proj=W), GroupStats(gram=torch.zeros_like(H)), Grid(4))


def test_hessian_of_another_layer_is_refused() -> None:
    W, _, H = problem()
    with pytest.raises(ValueError, match=r"\[8, 8\], but a weight with 24 input channels needs \[24, 24\]"):
        gptq(W, H[:8, :8], Grid(4))


@pytest.mark.parametrize("knob", [{"damp": 0.0}, {"damp": -0.1}, {"damp": float("nan")}, {"block_size": 0}])
def test_knobs_out_of_range(knob: dict[str, float]) -> None:
    W, _, H = problem()
    (name,) = knob
    with pytest.raises(ValueError, match=f"{name} is .*, but it must be"):
        GPTQ(**knob)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"{name} is .*, but it must be"):
        gptq(W, H, Grid(4), **knob)  # type: ignore[arg-type]


def test_nan_weight_is_named() -> None:
    W, _, H = problem()
    broken = W.clone()
    broken[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"blocks\.0\.qkv\.k_proj: the weight holds NaN or Inf"):
        GPTQ()(group(q_proj=W, k_proj=broken), GroupStats(gram=H), Grid(4))


def test_a_solved_layer_leaves_nothing_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a garbage collection too: between two of them blocks of gigabytes would stay."""
    factors = []

    def factor(H: Tensor, damp: float) -> Tensor:
        U = damped_inverse_cholesky(H, damp)
        factors.append(weakref.ref(U))
        return U

    monkeypatch.setattr(importlib.import_module("dllmq.methods.gptq"), "damped_inverse_cholesky", factor)
    W, H = torch.randn(6, 40), weighted_gram(torch.randn(100, 40))
    gc.disable()
    try:
        for grid in (Grid(4), Grid(4, group_size=8)):
            gptq_solve(W, H, grid)
    finally:
        gc.enable()
    assert [factor() for factor in factors] == [None, None]

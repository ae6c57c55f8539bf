"""The kernel of a GPTQ block against the column loop in methods/gptq.py: the same numbers bit for bit."""

import pytest
import torch
from kernel_cases import DEVICE, needs_triton
from torch import Tensor

from dllmq.kernels.triton_gptq import solve_block
from dllmq.numerics import Grid, Params, dequantize, fit, quantize

pytestmark = needs_triton


def factor(B: int) -> Tensor:
    """An upper triangular U as GPTQ's: positive on the diagonal."""
    U = torch.triu(torch.randn(B, B) * 0.3)
    return U + torch.diag(1 - U.diagonal() + torch.rand(B))


def column_loop(W: Tensor, U: Tensor, params: Params, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, errors and columns when their turn came, [O, B] each; scales of each column."""
    W, E, codes = W.clone(), torch.empty_like(W), torch.empty(W.shape, dtype=grid.dtype)
    column = Grid(grid.bits, -1, grid.symmetric)
    for i in range(W.shape[1]):
        s_z = Params(params.scale[:, i : i + 1], params.zero[:, i : i + 1])
        q = quantize(W[:, i : i + 1], s_z, column)
        E[:, i : i + 1] = (W[:, i : i + 1] - dequantize(q, s_z, column)) / U[i, i]
        W[:, i + 1 :] -= E[:, i : i + 1] * U[i, i + 1 :]
        codes[:, i : i + 1] = q
    return codes, E, W


@pytest.mark.parametrize(
    ("grid", "B", "O"),
    [(Grid(4), 11, 130), (Grid(3, 8), 16, 20), (Grid(4, symmetric=True), 8, 20), (Grid(8), 1, 3)],
)
def test_codes_errors_and_columns_are_the_loops(grid: Grid, B: int, O: int) -> None:
    W, U = torch.randn(O, B), factor(B)
    group = 8 if grid.group_size > 0 and B % 8 == 0 else -1
    fitted = fit(W, Grid(grid.bits, group, grid.symmetric))
    width = B // fitted.scale.shape[1]
    params = Params(*(t.repeat_interleave(width, 1) for t in fitted))
    codes, E, columns = column_loop(W, U, params, grid)
    Wt = W.T.contiguous().to(DEVICE)
    scale, zero = (t.T.contiguous().to(DEVICE) for t in params)
    found, errors = solve_block(Wt, U.to(DEVICE), scale, zero, grid.low, grid.high, grid.symmetric)
    assert found.dtype == grid.dtype and torch.equal(found.cpu().T, codes)
    assert torch.equal(errors.cpu().T, E) and torch.equal(Wt.cpu().T, columns)


def test_scales_may_be_expanded_and_saturate() -> None:
    """One scale for all columns, much too small for what errors make of them."""
    grid, O, B = Grid(2), 5, 12
    W, U = 10 * torch.randn(O, B), factor(B)
    params = Params(torch.full((O, B), 0.5), torch.ones(O, B))
    codes, E, _ = column_loop(W, U, params, grid)
    scale, zero = (t[:, :1].T.to(DEVICE).expand(B, O) for t in params)
    found, errors = solve_block(W.T.contiguous().to(DEVICE), U.to(DEVICE), scale, zero, 0, 3, False)
    assert torch.equal(found.cpu().T, codes) and torch.equal(errors.cpu().T, E)
    assert bool((codes[:, 1:] == 0).any()) and bool((codes[:, 1:] == 3).any())


def test_what_does_not_fit_into_registers_is_refused() -> None:
    with pytest.raises(AssertionError, match="1 to 128"):
        solve_block(torch.zeros(129, 4), torch.eye(129), torch.ones(129, 4), torch.zeros(129, 4), 0, 3, False)

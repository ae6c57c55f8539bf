"""The textbook solver is Algorithm 1, and ours gives its codes."""

import pytest
import torch
from torch import Tensor

from dllmq.bench import textbook_gptq
from dllmq.methods.gptq import gptq_solve
from dllmq.numerics import Grid, fit, quantize
from dllmq.numerics.linalg import damped_inverse_cholesky

GRID = Grid(4)


def problem(O: int = 24, I: int = 40, N: int = 160) -> tuple[Tensor, Tensor]:
    W, X = torch.randn(O, I), torch.randn(N, I)
    return W, X + X.roll(1, dims=1)


@pytest.mark.parametrize("block_size", [1, 7, 40, 128])
def test_codes_are_ours(block_size: int) -> None:
    W, X = problem()
    H = textbook_gptq.running_gram([X])
    codes, params = textbook_gptq.solve(W, textbook_gptq.inverse_factor(H), GRID, block_size)
    ours = gptq_solve(W, H, GRID)
    assert torch.equal(codes, ours.codes)
    assert torch.equal(params.scale, ours.scale) and torch.equal(params.zero, ours.zero)


def test_the_weight_stays() -> None:
    W, X = problem()
    before = W.clone()
    textbook_gptq.solve(W, textbook_gptq.inverse_factor(textbook_gptq.running_gram([X])), GRID)
    assert torch.equal(W, before)


def test_diagonal_hessian_is_rounding() -> None:
    W, H = torch.randn(6, 10), torch.diag(torch.rand(10) + 0.5)
    codes, params = textbook_gptq.solve(W, textbook_gptq.inverse_factor(H), GRID)
    assert torch.equal(codes, quantize(W, params, GRID)) and torch.equal(params.scale, fit(W, GRID).scale)


def test_factor_is_upper_and_of_the_damped_inverse() -> None:
    _, X = problem()
    H = textbook_gptq.running_gram([X])
    U = textbook_gptq.inverse_factor(H, damp=0.02)
    inverse = torch.linalg.inv(H.double() + 0.02 * H.diagonal().mean() * torch.eye(len(H)))
    assert torch.equal(U, U.triu())
    assert torch.allclose((U.T @ U).double(), inverse, rtol=1e-3, atol=1e-5 * float(inverse.abs().max()))
    assert torch.allclose(U, damped_inverse_cholesky(H, 0.02), rtol=1e-3, atol=1e-4)


def test_running_gram_is_the_mean_over_all_batches() -> None:
    _, X = problem()
    H = textbook_gptq.running_gram([X[:10], X[10:100], X[100:]])
    assert torch.allclose(H, 2 / len(X) * X.T @ X, atol=1e-4)

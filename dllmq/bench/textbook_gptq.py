"""The GPTQ solver as published (Frantar et al., arXiv 2210.17323, Algorithm 1), to compare ours with.

The inverse's factor as the authors make it: Cholesky of H, inverse from the factor, Cholesky of the inverse.
The loop as they run it: a block of 128 columns at a time, one column after the other, each error spread over
the rest of the block as an outer product; then over the columns behind the block in one product. W is stored
by rows. One scale per output channel, fitted beforehand.

Legend: W [O, I], H [I, I], U upper triangular with U^T U = (H + damping)^-1, E errors of a block.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from dllmq.numerics import Grid, Params, fit


def inverse_factor(H: Float[Tensor, "I I"], damp: float = 0.01) -> Float[Tensor, "I I"]:
    """U, by two Cholesky factorizations and an inverse."""
    damped = H.clone()
    damped.diagonal().add_(damp * H.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)


def solve(
    W: Float[Tensor, "O I"], U: Float[Tensor, "I I"], grid: Grid, block_size: int = 128
) -> tuple[Integer[Tensor, "O I"], Params]:
    """Algorithm 1: codes and scales. W is left as it is."""
    W, codes = W.clone(), torch.empty(W.shape, dtype=grid.dtype, device=W.device)
    params = fit(W, grid)
    scale, zero = params.scale[:, 0], params.zero[:, 0]
    for start in range(0, W.shape[1], block_size):
        stop = min(start + block_size, W.shape[1])
        block, E = W[:, start:stop].clone(), torch.zeros_like(W[:, start:stop])
        factor = U[start:stop, start:stop]
        for i in range(stop - start):
            w = block[:, i]
            q = torch.clamp(torch.round(w / scale) + zero, grid.low, grid.high)
            error = (w - (q - zero) * scale) / factor[i, i]
            block[:, i:] -= error[:, None] @ factor[i, i:][None]
            codes[:, start + i] = q.to(grid.dtype)
            E[:, i] = error
        W[:, stop:] -= E @ U[start:stop, stop:]
    return codes, params


def running_gram(batches: list[Float[Tensor, "_ I"]]) -> Float[Tensor, "I I"]:
    """H = 2 / n sum_j x_j x_j^T as a running mean over batches, in fp32, one product a batch."""
    H = batches[0].new_zeros(batches[0].shape[1], batches[0].shape[1], dtype=torch.float32)
    seen = 0
    for X in batches:
        H *= seen / (seen + len(X))
        seen += len(X)
        A = ((2 / seen) ** 0.5 * X.float()).t()
        H += A @ A.t()
    return H

"""GPTQ (Frantar et al., arXiv 2210.17323): round column by column, spread each error over the columns behind.

Minimises ||W X - W_hat X||^2 (eq. 1; with token weights c_j on the squared errors, in H alone). With
U^T U = (H + damping)^-1, U upper triangular, column i is

    q_i = quant(w_i),   e = (w_i - q_i) / U_ii,   w_j <- w_j - e U_ij  for j > i     (eq. 2, 3, Algorithm 1)

Blocks of B columns are finished before their errors reach the columns behind them, all at once (step 2); that
changes the speed, not the result.

Where the paper is silent, and where we differ from the authors' code (IST-DASLab/gptq):
- dead channels (H_ii = 0): W[:, i] = 0 before any scale is fitted (they: after the per-channel fit), and
  H_ii = mean over live channels (they: 1), so a positive constant times H changes nothing.
- dynamic groups: scale and zero are fitted when the group's first column is reached, on columns that carry
  *every* error made so far. Their code reads columns that miss the errors of the current block, so there the
  result depends on the block size unless every group begins with a block.
- static groups: fitted on the original columns.
- act_order: descending diag(H), stable, so ties keep their order.
- a failed Cholesky factorization raises with remedies; it never falls back to rounding.

Legend: W [O, I], H = 2 sum_j c_j x_j x_j^T [I, I], U as above, E errors of a block [O, B], g group size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from dllmq.calibration.stats import GroupStats
from dllmq.methods.base import GroupUpdate, check_weight, naming
from dllmq.models.base import LinearGroup
from dllmq.numerics import Grid, Params, QuantizedTensor, dequantize, fit, quantize
from dllmq.numerics.linalg import damped_inverse_cholesky, fill_dead_channels


def gptq(
    W: Float[Tensor, "O I"],
    H: Float[Tensor, "J J"],
    grid: Grid,
    block_size: int = 128,
    damp: float = 0.01,
    act_order: bool = False,
    static_groups: bool = False,
) -> Float[Tensor, "O I"]:
    """`gptq_solve`, dequantized, in W's dtype."""
    return gptq_solve(W, H, grid, block_size, damp, act_order, static_groups).dequantize().to(W.dtype)


def gptq_solve(
    W: Float[Tensor, "O I"],
    H: Float[Tensor, "J J"],
    grid: Grid,
    block_size: int = 128,
    damp: float = 0.01,
    act_order: bool = False,
    static_groups: bool = False,
) -> QuantizedTensor:
    """W quantized column by column with error compensation, in fp32 (equations on top of this file).

    Args:
        W: weight.
        H: Hessian of the layer's squared error, any positive multiple of it; J = I.
        grid: of the codes; one scale per row, tensor or group of columns.
        block_size: columns whose errors reach the rest of W at once; speed only.
        damp: share of the mean diagonal of H (over live channels) added to the diagonal.
        act_order: quantize columns by descending diag(H).
        static_groups: fit the groups' scales on the original W instead of when their turn comes. Only matters
            with a positive group size.

    Returns:
        Codes in W's column order. With act_order and dynamic groups a group holds columns that were
        neighbours in processing order, and group_index says which.

    Raises:
        ValueError: W or H not finite, shapes that do not fit, a knob out of range.
        SingularHessianError: H + damping cannot be factored, or no input is ever non-zero.
    """
    check_knobs(block_size, damp)
    check_weight(W, grid)
    I = W.shape[1]
    if tuple(H.shape) != (I, I):
        raise ValueError(
            f"the Hessian has shape {list(H.shape)}, but a weight with {I} input channels needs [{I}, {I}]: "
            "collect it on this layer's own inputs."
        )
    H, dead = fill_dead_channels(H)
    W = W.float().masked_fill(dead, 0.0)
    order = torch.arange(I, device=W.device)
    if act_order:
        order = torch.argsort(H.diagonal(), descending=True, stable=True)
    U = damped_inverse_cholesky(H[order][:, order], damp)

    dynamic = grid.group_size > 0 and not static_groups
    params = None if dynamic else fit(W, grid)
    width = grid.group_size if grid.group_size > 0 else I
    group_of = (torch.arange(I, device=W.device) if dynamic else order) // width  # [I], in processing order
    codes, params = solve_columns(W[:, order], U, grid, params, group_of, block_size)

    back = torch.argsort(order)
    group_index = group_of[back] if dynamic and act_order else None
    return QuantizedTensor(codes[:, back], params.scale, params.zero, grid, group_index)


def solve_columns(
    W: Float[Tensor, "O I"],
    U: Float[Tensor, "I I"],
    grid: Grid,
    params: Params | None,
    group_of: Int[Tensor, " I"],
    block_size: int,
) -> tuple[Integer[Tensor, "O I"], Params]:
    """GPTQ's loop (Algorithm 1) over columns that are already in processing order. Destroys W.

    Args:
        params: scales [O, G], fitted beforehand; None fits group i // g when column i starts it.
        group_of: group of each column.

    Returns:
        Codes and the scales they belong to.
    """
    O, I = W.shape
    column = replace(grid, group_size=-1)  # of one column, or of one group's columns
    dynamic = params is None
    if params is None:
        params = Params(W.new_ones(O, grid.groups(I)), W.new_zeros(O, grid.groups(I)))
    scale, zero, groups = params.scale, params.zero, group_of.tolist()
    codes = torch.empty(O, I, dtype=grid.dtype, device=W.device)
    for start in range(0, I, block_size):
        stop = min(start + block_size, I)
        block = W[:, start:stop].clone()
        E = torch.zeros_like(block)
        for i in range(start, stop):
            k, group = i - start, slice(groups[i], groups[i] + 1)
            if dynamic and i % grid.group_size == 0:
                end = i + grid.group_size
                behind = W[:, stop:end] - E[:, :k] @ U[start:i, stop:end]  # beyond the block, often empty
                fitted = fit(torch.cat([block[:, k : k + grid.group_size], behind], dim=1), column)
                scale[:, group], zero[:, group] = fitted.scale, fitted.zero
            w, s_z = block[:, k : k + 1], Params(scale[:, group], zero[:, group])
            q = quantize(w, s_z, column)
            e = (w - dequantize(q, s_z, column)) / U[i, i]
            block[:, k + 1 :] -= e * U[i, i + 1 : stop]
            codes[:, i : i + 1], E[:, k : k + 1] = q, e
        W[:, stop:] -= E @ U[start:stop, stop:]
    return codes, params


def solve_group(
    weights: dict[str, Tensor], H: Float[Tensor, "I I"], grid: Grid, knobs: GPTQ
) -> dict[str, QuantizedTensor]:
    """`gptq_solve` for weights that read the same input.

    Rows of W do not interact and H is shared, so the weights are stacked and solved at once; one
    factorization, one pass. With a single scale per tensor they do interact, and are solved one by one.
    """

    def solve(W: Tensor) -> QuantizedTensor:
        return gptq_solve(W, H, grid, knobs.block_size, knobs.damp, knobs.act_order, knobs.static_groups)

    if grid.group_size == 0:
        return {name: solve(W) for name, W in weights.items()}
    stacked = solve(torch.cat(list(weights.values())))
    rows = [W.shape[0] for W in weights.values()]
    parts = zip(*(torch.split(t, rows) for t in (stacked.codes, stacked.scale, stacked.zero)), strict=True)
    return {
        name: replace(stacked, codes=codes.clone(), scale=scale.clone(), zero=zero.clone())
        for name, (codes, scale, zero) in zip(weights, parts, strict=True)
    }


def check_knobs(block_size: int, damp: float) -> None:
    """Raises ValueError for a block size below 1 or a damping that is not positive."""
    if not isinstance(block_size, int) or block_size < 1:
        raise ValueError(f"block_size is {block_size!r}, but it must be a positive integer: use 128.")
    if not isinstance(damp, (int, float)) or not 0 < damp < math.inf:
        raise ValueError(f"damp is {damp!r}, but it must be positive and finite: use 0.01.")


@dataclass(frozen=True)
class GPTQ:
    """GPTQ with the authors' defaults. Token weights act through H.

    Attributes: see `gptq_solve`.

    Raises:
        ValueError: block_size or damp out of range.
    """

    block_size: int = 128
    damp: float = 0.01
    act_order: bool = False
    static_groups: bool = False

    def __post_init__(self) -> None:
        check_knobs(self.block_size, self.damp)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"gram"})

    @torch.no_grad()
    def __call__(self, group: LinearGroup, stats: GroupStats, grid: Grid) -> GroupUpdate:
        """Quantizes the group's weights under their shared Hessian.

        Raises:
            ValueError, SingularHessianError: as `gptq_solve`, with the group's name in front.
        """
        assert stats.gram is not None, "GPTQ asked for the Gram matrix"
        for name, W in group.weights.items():
            with naming(f"{group.name}.{name}"):
                check_weight(W, grid)
        with naming(group.name):
            weights = solve_group(group.weights, stats.gram, grid, self)
        return GroupUpdate(weights, notes={"dead_channels": float((stats.gram.diagonal() == 0).sum())})

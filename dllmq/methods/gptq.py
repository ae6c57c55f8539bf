"""GPTQ (Frantar et al., arXiv 2210.17323): round column by column, spread each error over the columns behind.

Minimises ||W X - W_hat X||^2 (eq. 1; with token weights c_j on the squared errors, in H alone). With
U^T U = (H + damping)^-1, U upper triangular, column i is

    q_i = quant(w_i),   e_i = (w_i - q_i) / U_ii,   w_j <- w_j - e_i U_ij  for j > i   (eq. 2, 3, Algorithm 1)

Errors reach the columns behind them late, many at once (step 2 of the paper); that changes the speed, not the
result. The paper does it block by block. Here it is recursive: the first half of the columns is solved, all
its errors reach the second half in one matrix product, the second half is solved. Halves end at a few
columns, which are solved one by one. Weights are held transposed: a column of W is a row in memory.

Where the paper is silent, and where we differ from the authors' code (IST-DASLab/gptq):
- dead channels (H_ii = 0): W[:, i] = 0 before any scale is fitted (they: after the per-channel fit), and
  H_ii = mean over live channels (they: 1), so a positive constant times H changes nothing.
- dynamic groups: scale and zero are fitted when the group's first column is reached, on columns that carry
  *every* error made so far. Their code reads columns that miss the errors of the current block, so there the
  result depends on the block size unless every group begins with a block.
- static groups: fitted on the original columns.
- act_order: descending diag(H), stable, so ties keep their order.
- a failed Cholesky factorization raises with remedies; it never falls back to rounding.

Legend: W [O, I], Wt its transpose, H = 2 sum_j c_j x_j x_j^T [I, I], U as above, q codes, s scale, z zero,
E errors e_i [B, O] of B columns, g group size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from itertools import repeat
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from dllmq.calibration.stats import GroupStats
from dllmq.methods.base import GroupUpdate, check_weight, naming
from dllmq.models.base import LinearGroup
from dllmq.numerics import Grid, Params, QuantizedTensor, fit
from dllmq.numerics.grid import PER_ROW
from dllmq.numerics.linalg import add_product, damped_inverse_cholesky, fill_dead_channels

LEAF = 8  # columns solved one by one: fewer cost more products, more cost slower rank-1 updates
FUSED = 128  # at most, by one kernel on a GPU
BlockSolver = Callable[[Tensor, Tensor, Tensor, Tensor, int, int, bool], tuple[Tensor, Tensor]]


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
        block_size: at most so many columns are solved one after another (on a CPU, 8); speed only.
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
    Wt = W.detach().float().T.clone(memory_format=torch.contiguous_format)  # [I, O]
    Wt[dead] = 0.0
    dynamic = grid.group_size > 0 and not static_groups
    params = None if dynamic else fit(Wt.T, grid)
    order = torch.arange(I, device=W.device)
    if act_order:
        order = torch.argsort(H.diagonal(), descending=True, stable=True)
        Wt, H = Wt[order], H[order][:, order]
    U = damped_inverse_cholesky(H, damp)

    width = grid.group_size if grid.group_size > 0 else I
    group_of = (torch.arange(I, device=W.device) if dynamic else order) // width  # [I], in processing order
    codes, params = solve_columns(Wt, U, grid, params, group_of, block_size)

    group_index = None
    if act_order:
        back = torch.argsort(order)
        codes, group_index = codes[back], group_of[back] if dynamic else None
    return QuantizedTensor(codes.T.contiguous(), params.scale, params.zero, grid, group_index)


def solve_columns(
    Wt: Float[Tensor, "I O"],
    U: Float[Tensor, "I I"],
    grid: Grid,
    params: Params | None,
    group_of: Int[Tensor, " I"],
    block_size: int,
) -> tuple[Integer[Tensor, "I O"], Params]:
    """Algorithm 1 over columns that are already in processing order. Wt ends as the errors E of all columns.

    Args:
        params: scales [O, G], fitted beforehand; None fits group i // g when column i starts it.
        group_of: group of each column.

    Returns:
        Codes and the scales they belong to.
    """
    I, O = Wt.shape
    dynamic = params is None
    if params is None:
        params = Params(Wt.new_ones(O, grid.groups(I)), Wt.new_zeros(O, grid.groups(I)))
    codes = torch.empty(I, O, dtype=grid.dtype, device=Wt.device)
    width = min(block_size, grid.group_size) if dynamic else block_size
    solve, width = block_solver(Wt.device, width)
    _Columns(Wt, U, grid, params, group_of, codes, solve, width, dynamic).solve(0, I)
    return codes, params


@dataclass(frozen=True)
class _Columns:
    """The recursion of `solve_columns`, by its names.

    Attributes:
        solve_leaf: solves up to `width` columns.
        dynamic: scales are fitted when a group's turn comes.
    """

    Wt: Float[Tensor, "I O"]
    U: Float[Tensor, "I I"]
    grid: Grid
    params: Params
    group_of: Int[Tensor, " I"]
    codes: Integer[Tensor, "I O"]
    solve_leaf: BlockSolver
    width: int
    dynamic: bool

    def solve(self, first: int, last: int) -> None:
        """Solves columns [first, last), which carry every error made before `first`."""
        now, size, grid = slice(first, last), last - first, self.grid
        if self.dynamic and size == grid.group_size:
            self.fit_group(now)
        if size <= self.width:
            s, z = (of_columns(t, self.group_of[now], self.Wt.shape[1]) for t in self.params)
            self.codes[now], self.Wt[now] = self.solve_leaf(
                self.Wt[now], self.U[now, now], s, z, grid.low, grid.high, grid.symmetric
            )
            return
        # a group is never cut before it is fitted
        unit = grid.group_size if self.dynamic and size > grid.group_size else self.width
        half = first + unit * -(-size // (2 * unit))
        self.solve(first, half)
        add_product(self.Wt[half:last], self.U[first:half, half:last].T, self.Wt[first:half], -1.0)
        self.solve(half, last)

    def fit_group(self, columns: slice) -> None:
        """Scale and zero of the group that these columns are."""
        scale, zero = fit(self.Wt[columns].T, replace(self.grid, group_size=PER_ROW))
        group = columns.start // self.grid.group_size
        self.params.scale[:, group], self.params.zero[:, group] = scale[:, 0], zero[:, 0]


def of_columns(t: Float[Tensor, "#O G"], group_of: Int[Tensor, " B"], O: int) -> Float[Tensor, "B O"]:
    """Scale or zero of each of B columns, in all rows."""
    return t.T.expand(len(group_of), O) if t.shape[1] == 1 else t.T[group_of]


class Room(NamedTuple):
    """Where blocks of B columns are solved, one block after the other. Its rows are views made once: of rows
    this short, a view costs as much as the arithmetic.

    Attributes:
        rounder: c in round(x) = x + c - c, to the nearest even: c + x has no bits behind the point. True for
            |x| < c / 3, far beyond any code. torch.round would wake all threads for each column.
        rows: of each column i: w_i, then e_i; E[:i]^T; U_ki of all k < i; U_ii; q_i.
    """

    E: Float[Tensor, "B O"]
    q: Float[Tensor, "B O"]
    Ut: Float[Tensor, "B B"]
    rounder: Float[Tensor, ""]
    rows: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]


def make_room(B: int, O: int, dtype: torch.dtype, device: torch.device) -> Room:
    """Of a block [B, O]; uninitialized."""
    E, q = torch.empty(2, B, O, dtype=dtype, device=device)
    Ut = torch.empty(B, B, dtype=dtype, device=device)
    rounder = torch.tensor(1.5 / torch.finfo(dtype).eps, dtype=dtype, device=device)
    return Room(E, q, Ut, rounder, [(E[i], E[:i].T, Ut[i, :i], Ut[i, i], q[i]) for i in range(B)])


def solve_block(
    Wt: Float[Tensor, "B O"],
    U: Float[Tensor, "B B"],
    scale: Float[Tensor, "B O"],
    zero: Float[Tensor, "B O"],
    low: int,
    high: int,
    symmetric: bool,
    room: Callable[..., Room] = make_room,
) -> tuple[Integer[Tensor, "B O"], Float[Tensor, "B O"]]:
    """Algorithm 1's inner loop: column i is compensated for the errors of the block's columns before it,
    w_i - sum_k<i e_k U_ki, and rounded.

    Args:
        low, high: smallest and largest code.
        symmetric: signed codes (int8), all zeros 0; otherwise uint8.
        room: may give the same one for every block; the errors lie in it until the next block.

    Returns:
        Codes q and errors e.
    """
    E, q, Ut, c, rows = room(*Wt.shape, Wt.dtype, Wt.device)
    E.copy_(Wt)
    Ut.copy_(U.T)
    z = zero[:1] if zero.stride(0) == 0 else zero
    limits = map(each_column, (scale, low - z, high - z))  # of q without its zero
    for (w, errors, u, u_ii, code), s, least, most in zip(rows, *limits, strict=False):
        w.addmv_(errors, u, alpha=-1)
        torch.addcdiv(c, w, s, out=code).sub_(c).clamp_(least, most)
        torch.addcmul(w, code, s, value=-1, out=w).div_(u_ii)
    return q.add_(zero).to(torch.int8 if symmetric else torch.uint8), E


def each_column(t: Float[Tensor, "#B O"]) -> Iterable[Float[Tensor, " O"]]:
    """The rows of t; one that stands for all, again and again."""
    return repeat(t[0]) if t.stride(0) == 0 or len(t) == 1 else t.unbind()


def block_solver(device: torch.device, block_size: int) -> tuple[BlockSolver, int]:
    """How a block is solved on a device, and its width: fused in one kernel on a GPU, else `solve_block`."""
    fused = fused_solve_block() if device.type == "cuda" else None
    if fused is not None:
        return fused, min(block_size, FUSED)
    return partial(solve_block, room=cache(make_room)), min(block_size, LEAF)


@cache
def fused_solve_block() -> BlockSolver | None:
    """`solve_block` as one Triton kernel; None where there is no Triton."""
    if find_spec("triton") is None or find_spec("dllmq.kernels.triton_gptq") is None:
        return None
    solver: BlockSolver = import_module("dllmq.kernels.triton_gptq").solve_block
    return solver


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

    Attributes: see `gptq_solve`. damp is at most 1, where it weighs as much as all that was measured: more is
        a slip of the finger, and in the end rounding to nearest.

    Raises:
        ValueError: block_size or damp out of range.
    """

    block_size: int = 128
    damp: float = 0.01
    act_order: bool = False
    static_groups: bool = False

    def __post_init__(self) -> None:
        check_knobs(self.block_size, self.damp)
        if self.damp > 1:
            raise ValueError(
                f"damp is {self.damp!r}, but it must be at most 1, the whole mean of diag(H): use 0.01."
            )

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

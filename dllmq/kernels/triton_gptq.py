"""GPTQ's column loop inside a block, one kernel: columns in turn, rows of W in parallel.

    q_i = quant(w_i),   e_i = (w_i - q_i) / U_ii,   w_j <- w_j - e_i U_ij  for i < j < B

A program keeps [B columns, some rows of W] in registers from the first column to the last; nothing but U is
read in between. Errors are spread one column after the other (right-looking), each operation rounded on its
own; `methods.gptq.solve_columns` sums them per half (left-looking), so codes are equal up to rounding ties.
Everything is transposed: a column of W is a row here, contiguous in memory.

Legend: O rows of W, B columns of the block, U its upper triangular factor, e errors.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from dllmq.kernels.triton_jit import is_interpreted, kernel, power_of_2, round_half_even

tl: Any  # triton.language, set by the first launch
COLUMNS = 128  # of a block at most: they lie in registers


def solve_block(
    Wt: Float[Tensor, "B O"],
    U: Float[Tensor, "B B"],
    scale: Float[Tensor, "B O"],
    zero: Float[Tensor, "B O"],
    low: int,
    high: int,
    symmetric: bool,
) -> tuple[Integer[Tensor, "B O"], Float[Tensor, "B O"]]:
    """Codes and errors e of a block whose scales and zeros are known.

    Args:
        Wt: columns of W, fp32, contiguous; each is overwritten by what it was when its turn came.
        U: the factor's rows and columns of this block.
        scale, zero: of each column; `expand`ed ones need no memory.
        low, high: smallest and largest code.
        symmetric: codes are int8, otherwise uint8.

    Returns:
        codes [B, O], E [B, O].
    """
    B, O = Wt.shape
    assert 1 <= B <= COLUMNS and Wt.is_contiguous(), f"a block has 1 to {COLUMNS} contiguous columns, not {B}"
    codes = torch.empty(B, O, dtype=torch.int8 if symmetric else torch.uint8, device=Wt.device)
    E = torch.empty_like(Wt)
    U = U.contiguous()
    rows = 128 if is_interpreted() else 32  # of W: one to a thread
    with torch.cuda.device_of(Wt):
        solve_kernel[(-(-O // rows),)](
            Wt, U, scale, zero, codes, E, O, *scale.stride(), *zero.stride(),
            B=B, BLOCK_B=power_of_2(B), BLOCK_O=rows, LOW=low, HIGH=high, num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip
    return codes, E


@kernel
def solve_kernel(
    w_ptr, u_ptr, scale_ptr, zero_ptr, codes_ptr, e_ptr, O, scale_i, scale_o, zero_i, zero_o,
    B: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_O: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
):  # fmt: skip
    """All columns for BLOCK_O rows of W."""
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    j = tl.arange(0, BLOCK_B)
    inside = o < O
    W = tl.load(w_ptr + j[:, None] * O + o[None, :], mask=(j < B)[:, None] & inside[None, :], other=0.0)
    for i in range(B):
        w = tl.sum(tl.where(j[:, None] == i, W, 0.0), 0)
        s = tl.load(scale_ptr + i * scale_i + o * scale_o, mask=inside, other=1.0)
        z = tl.load(zero_ptr + i * zero_i + o * zero_o, mask=inside, other=0.0)
        u = tl.load(u_ptr + i * B + j, mask=(j > i) & (j < B), other=0.0)  # 0 leaves the columns before it
        q = tl.minimum(tl.maximum(round_half_even(tl.div_rn(w, s)) + z, LOW), HIGH)
        e = tl.div_rn(w - (q - z) * s, tl.load(u_ptr + i * B + i))
        W -= e[None, :] * u[:, None]
        tl.store(w_ptr + i * O + o, w, mask=inside)
        tl.store(codes_ptr + i * O + o, q.to(codes_ptr.dtype.element_ty), mask=inside)
        tl.store(e_ptr + i * O + o, e, mask=inside)

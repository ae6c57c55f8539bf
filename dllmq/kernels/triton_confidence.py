"""The sampler's confidence in one pass over the logits: the best token and its probability.

    x0 = argmax_e l_e,     p = softmax(l)_x0 = 1 / sum_e exp(l_e - l_x0)

Each row is read once, a chunk at a time, with a running maximum m and a running sum of exp(l - m) in fp32; a
new maximum rescales the sum. Nothing of the size of the vocabulary is written.

Legend: n positions, E vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dllmq.kernels.triton_jit import kernel, power_of_2

tl: Any  # triton.language, set by the first launch
CHUNK = 8192  # logits at a time


def argmax_confidence(logits: Float[Tensor, "n E"]) -> tuple[Int64[Tensor, " n"], Float[Tensor, " n"]]:
    """x0 (the lowest id among equals) and p in fp32; p is NaN where a logit is NaN or all are -inf.

    Args:
        logits: fp32, bf16 or fp16; rows may lie apart, a row is contiguous.
    """
    n, E = logits.shape
    x0 = torch.empty(n, dtype=torch.int64, device=logits.device)
    p = torch.empty(n, dtype=torch.float32, device=logits.device)
    if n:
        logits = logits if logits.stride(1) == 1 else logits.contiguous()
        with torch.cuda.device_of(logits):
            confidence_kernel[(n,)](
                logits, x0, p, logits.stride(0), E=E, CHUNK=min(CHUNK, power_of_2(E)), num_warps=8
            )
    return x0, p


@kernel
def confidence_kernel(
    logits_ptr, x0_ptr, p_ptr, stride, E: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One position."""
    row = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, CHUNK)
    best = tl.full((CHUNK,), float("-inf"), tl.float32)  # and where it was: of each column of the chunks
    where = e
    m = float("-inf")
    total = tl.zeros((CHUNK,), tl.float32)
    for start in range(0, E, CHUNK):
        at = start + e
        l = tl.load(logits_ptr + row * stride + at, mask=at < E, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(m, tl.max(l, 0))
        finite = tl.where(higher == float("-inf"), 0.0, higher)  # no -inf - -inf
        total = total * tl.exp(m - finite) + tl.exp(l - finite)
        m = higher
        where = tl.where(l > best, at, where)
        best = tl.maximum(best, l)
    x0 = tl.min(tl.where(best == m, where, E - 1), 0)
    tl.store(x0_ptr + row, x0.to(tl.int64))
    tl.store(p_ptr + row, tl.div_rn(1.0, tl.sum(total, 0)) + 0.0 * m)

"""The attention product softmax(Q K^T) V, in full precision or with P and V quantized.

P is the softmax output [B, heads, Q, L], V the values [B, heads, L, head_dim]. "W4A4" in DLLMQuant
(arXiv 2508.14090) quantizes this product as well as the linears' inputs: P per query, dynamically; V with one
static scale per layer and granularity group, fitted on the calibration states. Q and K can be quantized too,
per token and head, dynamically, after RoPE.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dllmq.numerics import Grid, Params, fake_quant

MAX_MAP = 2**24  # elements of an attention map held at once: 64 MiB in fp32


def repeat_kv(x: Float[Tensor, "B kv L h"], heads: int) -> Float[Tensor, "B heads L h"]:
    """Grouped-query attention: each key/value head serves heads / kv consecutive query heads."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def attention_map(Q: Tensor, K: Tensor, bias: Tensor | None) -> Float[Tensor, "B heads Q L"]:
    """P = softmax(Q K^T / sqrt(head_dim) + bias), in fp32 inside and the inputs' dtype outside."""
    scores = (Q @ K.transpose(-1, -2)).div_(math.sqrt(Q.shape[-1]))
    if bias is not None:
        scores += bias
    return torch.softmax(scores.float(), dim=-1).to(Q.dtype)


class AttentionProduct:
    """Full precision: torch's scaled dot product attention."""

    passes_values = True  # V reaches the output unquantized, so a scale of V can be moved through the product

    def __call__(self, Q: Tensor, K: Tensor, V: Tensor, bias: Tensor | None) -> Float[Tensor, "B heads Q h"]:
        """Q [B, heads, Q, h], K and V [B, kv_heads, L, h], bias [B, 1, 1, L] or None."""
        K, V = repeat_kv(K, Q.shape[1]), repeat_kv(V, Q.shape[1])
        return F.scaled_dot_product_attention(Q, K, V, attn_mask=bias)


@dataclass
class QuantizedProduct(AttentionProduct):
    """Deq(Q(P)) Deq(Q(V)), with P of Deq(Q(Q)) Deq(Q(K))^T.

    Attributes:
        p_grid: grid of P (one scale per query row), None leaves P in full precision.
        v_grid: grid of V, None leaves V in full precision.
        v_params: static scale and zero of V, broadcastable to [kv_heads, 1, head_dim] (one per head:
            [kv_heads, 1, 1]).
    """

    p_grid: Grid | None
    v_grid: Grid | None
    v_params: Params | None
    qk_grid: Grid | None = None  # of Q and K: one scale per token and head

    @property
    def passes_values(self) -> bool:  # type: ignore[override]
        return self.v_grid is None

    def __call__(self, Q: Tensor, K: Tensor, V: Tensor, bias: Tensor | None) -> Tensor:
        Q, K = quantize_queries_keys(Q, K, self.qk_grid)
        V = quantize_values(V, self.v_grid, self.v_params)
        if self.p_grid is None:
            return super().__call__(Q, K, V, bias)
        V = repeat_kv(V, Q.shape[1])
        mixed = [quantize_map(P, self.p_grid) @ V for P in attention_maps(Q, K, bias)]
        return mixed[0] if len(mixed) == 1 else torch.cat(mixed, dim=2)


def attention_maps(Q: Tensor, K: Tensor, bias: Tensor | None) -> Iterator[Float[Tensor, "B heads q L"]]:
    """The attention map in pieces of consecutive queries, at most MAX_MAP elements each (one query at least).

    Args:
        Q: [B, heads, Q, h]; K: [B, kv_heads, L, h].
    """
    K = repeat_kv(K, Q.shape[1])
    queries = max(1, MAX_MAP // (Q.shape[0] * Q.shape[1] * K.shape[2]))
    for piece in Q.split(queries, dim=2):
        yield attention_map(piece, K, bias)


def quantize_queries_keys(Q: Tensor, K: Tensor, grid: Grid | None) -> tuple[Tensor, Tensor]:
    """Deq(Q(Q)), Deq(Q(K)): one scale per token and head."""
    return (Q, K) if grid is None else (fake_quant(Q, grid), fake_quant(K, grid))


def quantize_map(P: Float[Tensor, "B heads Q L"], grid: Grid) -> Float[Tensor, "B heads Q L"]:
    """fake_quant(P, grid), bit for bit, in half the passes.

    P >= 0 and its rows sum to 1, so on an asymmetric grid with one scale per row the range is [0, max], z = 0
    and no code leaves the grid.
    """
    if grid.symmetric or grid.group_size != -1:
        return fake_quant(P, grid)
    x = P.float()
    scale = x.amax(-1, keepdim=True) / grid.high
    return torch.div(x, scale).round_().mul_(scale).to(P.dtype)


def quantize_values(V: Float[Tensor, "B kv L h"], grid: Grid | None, params: Params | None) -> Tensor:
    """Deq(Q(V)) under static parameters that broadcast over batch and tokens."""
    if grid is None:
        return V
    assert params is not None
    s, z = params.scale, params.zero
    codes = torch.clamp(torch.round(V.float() / s) + z, grid.low, grid.high)
    return ((codes - z) * s).to(V.dtype)

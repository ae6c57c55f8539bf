"""Reading a block's insides: the input of a group of linears, and V (and P) of the attention product."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from dllmq.models.attention import AttentionProduct, attention_map, quantize_queries_keys, repeat_kv
from dllmq.models.base import Block, BlockContext
from dllmq.numerics import Grid


class _Seen(Exception):
    """Ends a block's forward once what was wanted has been seen."""


def _see_and_stop(see: Callable[[Tensor], None], _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    see(inputs[0])
    raise _Seen


@contextmanager
def _stopping_hook(module: nn.Module, see: Callable[[Tensor], None]) -> Iterator[None]:
    handle = module.register_forward_pre_hook(partial(_see_and_stop, see))
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def group_input(block: Block, linear: str, x: Tensor, ctx: BlockContext) -> Tensor:
    """The input of one linear when the block runs on x [B, L, d]; nothing after it is computed."""
    seen: list[Tensor] = []
    with _stopping_hook(getattr(block, linear), seen.append), suppress(_Seen):
        block(x, ctx)
    return seen[0]


@dataclass
class _ObservedProduct(AttentionProduct):
    """Hands V, and P if wanted, to a callback and stops."""

    see: Callable[[Tensor, Tensor | None], None]
    wants_maps: bool
    qk_grid: Grid | None

    def __call__(self, Q: Tensor, K: Tensor, V: Tensor, bias: Tensor | None) -> Tensor:
        P = None
        if self.wants_maps:
            Q, K = quantize_queries_keys(Q, K, self.qk_grid)
            P = attention_map(Q, repeat_kv(K, Q.shape[1]), bias)
        self.see(V, P)
        raise _Seen


@torch.no_grad()
def attention_product(
    block: Block, x: Tensor, ctx: BlockContext, maps: bool, qk_grid: Grid | None = None
) -> tuple[Tensor, Tensor | None]:
    """V [B, kv, L, h] and, if asked for, P [B, heads, Q, L] when the block runs on x [B, L, d].

    P is that of Q and K under `qk_grid`.
    """
    seen: list[tuple[Tensor, Tensor | None]] = []
    kept = block.product
    block.product = _ObservedProduct(lambda V, P: seen.append((V, P)), maps, qk_grid)
    try:
        with suppress(_Seen):
            block(x, ctx)
    finally:
        block.product = kept
    return seen[0]

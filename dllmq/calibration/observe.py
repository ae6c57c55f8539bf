"""Reading a block's insides: the input of a group of linears, and V (and P) of the attention product."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from dllmq.models.attention import AttentionProduct, attention_map, repeat_kv
from dllmq.models.base import Block, BlockContext


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

    def __call__(self, Q: Tensor, K: Tensor, V: Tensor, bias: Tensor | None) -> Tensor:
        P = attention_map(Q, repeat_kv(K, Q.shape[1]), bias) if self.wants_maps else None
        self.see(V, P)
        raise _Seen


@torch.no_grad()
def attention_product(block: Block, x: Tensor, ctx: BlockContext, maps: bool) -> tuple[Tensor, Tensor | None]:
    """V [B, kv, L, h] and, if asked for, P [B, heads, Q, L] when the block runs on x [B, L, d]."""
    seen: list[tuple[Tensor, Tensor | None]] = []
    kept = block.product
    block.product = _ObservedProduct(lambda V, P: seen.append((V, P)), maps)
    try:
        with suppress(_Seen):
            block(x, ctx)
    finally:
        block.product = kept
    return seen[0]

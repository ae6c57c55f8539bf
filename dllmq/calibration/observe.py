"""Reading a block's insides: the input of a group of linears, and Q, K and V of the attention product."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dllmq.models.attention import AttentionProduct
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


class AttentionInputs(NamedTuple):
    """What the attention product of a block reads, after RoPE; kv heads for K and V."""

    Q: Float[Tensor, "B heads L h"]
    K: Float[Tensor, "B kv L h"]
    V: Float[Tensor, "B kv L h"]
    bias: Tensor | None


@dataclass
class _ReadProduct(AttentionProduct):
    """Hands its inputs to a callback and stops."""

    see: Callable[[AttentionInputs], None]

    def __call__(self, Q: Tensor, K: Tensor, V: Tensor, bias: Tensor | None) -> Tensor:
        self.see(AttentionInputs(Q, K, V, bias))
        raise _Seen


@torch.no_grad()
def attention_inputs(block: Block, x: Tensor, ctx: BlockContext) -> AttentionInputs:
    """The inputs of the attention product when the block runs on x [B, L, d]; no map is computed."""
    seen: list[AttentionInputs] = []
    kept = block.product
    block.product = _ReadProduct(seen.append)
    try:
        with suppress(_Seen):
            block(x, ctx)
    finally:
        block.product = kept
    return seen[0]

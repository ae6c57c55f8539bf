"""Recorded forwards: the memory that a recording reads and writes, and how a forward's inputs get there.

A recording knows addresses, not tensors. So it has inputs of its own, into which each call copies, and one
that reads a cache of keys and values has memory of its own for these (`Memory`): a cache moves in when it is
used for the first time, and lies there until another one is. Positions are inputs as well: the columns that a
cached forward replaces are a tensor, so one recording serves every block of a canvas.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from dllmq.models.base import BlockContext
from dllmq.models.kv import KeysValues, KVCache

# A function without arguments -> the tensor it returns, and what computes this tensor anew.
Capture = Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], None]]]
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


@dataclass(frozen=True)
class Recorded:
    """A recorded forward: its own inputs, its output, and what runs it."""

    input_ids: Int[Tensor, "B L"]
    context: BlockContext
    output: Float[Tensor, "B L d"]
    replay: Callable[[], None]

    def __call__(self, input_ids: Int[Tensor, "B L"], context: BlockContext) -> Float[Tensor, "B L d"]:
        """The hidden states, in memory that the next replay leaves alone."""
        self.input_ids.copy_(input_ids)
        for own, given in zip(self.context[:3], context[:3], strict=True):  # bias, sin, cos
            if own is not None and given is not None:
                own.copy_(given)
        self.replay()
        return self.output.clone()


def record(
    run: Callable[[Tensor, BlockContext], Tensor], input_ids: Tensor, context: BlockContext, capture: Capture
) -> Recorded:
    """A recording of run(input_ids, context), which reads copies of both."""
    ids = input_ids.clone()
    bias = None if context.bias is None else context.bias.clone()
    own = context._replace(bias=bias, sin=context.sin.clone(), cos=context.cos.clone())
    output, replay = capture(lambda: run(ids, own))
    return Recorded(ids, own, output, replay)


class Memory:
    """Where recordings find the keys and values of all blocks; one cache at a time lies in it.

    Args:
        cache: the first one. Its tensors become the memory: a recording must not allocate them, as graphs
            share their pool.
    """

    def __init__(self, cache: KVCache) -> None:
        assert not cache.is_empty, "nothing to take over"
        self.layers = [KeysValues(None, layer.K, layer.V) for layer in cache.layers]
        self._inside = weakref.ref(cache)

    def hold(self, cache: KVCache) -> None:
        """Moves a cache in, or makes room for an empty one; the one that was here gets its own memory."""
        before = self._inside()
        if before is cache:
            return
        if before is not None:
            for layer in before.layers:
                layer.K, layer.V = (None if x is None else x.clone() for x in (layer.K, layer.V))
        for own, layer in zip(self.layers, cache.layers, strict=True):
            for here, given in ((own.K, layer.K), (own.V, layer.V)):
                if here is not None and given is not None:
                    here.copy_(given)
            layer.K, layer.V = own.K, own.V
        self._inside = weakref.ref(cache)


@dataclass(frozen=True)
class RecordedSlice:
    """A recorded forward over n columns of a canvas, any n neighbours, with a cache of all.

    Attributes:
        at: which columns.
    """

    forward: Recorded
    at: Int[Tensor, " n"]
    memory: Memory

    def __call__(self, input_ids: Int[Tensor, "R n"], start: int, cache: KVCache) -> Float[Tensor, "R n d"]:
        stop = start + len(self.at)
        self.memory.hold(cache)
        torch.arange(start, stop, out=self.at)
        return self.forward(input_ids, cache.context.columns(start, stop))


@dataclass
class PaddedCache:
    """A cache of as many rows as are recorded, for a caller who knows of the first `rows` only."""

    cache: KVCache
    rows: int

    @classmethod
    def of(cls, cache: KVCache, rows: int) -> PaddedCache:
        """A cache of `rows` rows, with copies of its last one; the cache itself is given up."""
        if round_up(rows) == rows:
            return cls(cache, rows)
        return cls(cache.take(pad_rows(torch.arange(rows, device=cache.context.sin.device))), rows)

    def take(self, stay: Bool[Tensor, " B"]) -> PaddedCache:
        """These rows; this one is empty afterwards."""
        rows = stay.nonzero()[:, 0]
        return PaddedCache(self.cache.take(pad_rows(rows)), len(rows))


def round_up(rows: int) -> int:
    """The next of ROWS; more than the last of them stay as they are."""
    return next((n for n in ROWS if n >= rows), rows)


def pad_rows(x: Shaped[Tensor, "B *rest"]) -> Shaped[Tensor, "R *rest"]:
    """x with copies of its last row up to the next of ROWS."""
    missing = round_up(len(x)) - len(x) if len(x) else 0  # nobody may stay while rows wait outside
    return torch.cat([x, x[-1:].expand(missing, *x.shape[1:])]) if missing else x

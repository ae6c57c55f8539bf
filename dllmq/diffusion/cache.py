"""Prefix and dual KV cache of block-wise decoding: approximate forwards, opt-in.

    first step of a block    the whole canvas; every column's keys and values are kept
    its other steps          prefix: the columns from the block's start on, against the kept ones before it
                             dual: the block's columns alone, against all kept ones, left and right

The kept columns are stale: attention is bidirectional, so they would change with every token of the block.
Predictions differ from those of a full forward, and so do the answers. A block of one step is exact.

Semantics are Fast-dLLM's (arXiv 2505.22618, `generate_with_prefix_cache`, `generate_with_dual_cache`):

- The cache is filled anew at the start of every block.
- Only the block's columns can be committed, except in its first step, where masks of the prompt compete.
- No guidance (cfg_scale = 0).

Differences: rows are batched, with pads on the left hidden as keys; a block of one step is allowed
(Fast-dLLM: IndexError); a block ends with the last of its steps (Fast-dLLM goes on while the model predicts
mask ids, and past the end of its schedule). A block without masks gets no forward: Fast-dLLM makes one more
after every full pass, also where that has completed the block (every mask at or above the threshold), which
commits nothing. Tokens are the same; its `nfe` is higher than our forwards by one for each such block.

Legend: as in sampler.py; P prompt columns, n columns of a block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from dllmq.diffusion.predict import MaskPredictor, aligned
from dllmq.diffusion.settings import SamplerConfig


class BlockCache(ABC):
    """A `Forward` that recomputes the whole canvas in a block's first step, and a slice of it in the others.

    Args:
        model: with start_cache(x, mask) -> (hidden states, cache) and use_cache(slice of x, start, cache) ->
            hidden states of the slice, as models.base.BlockStack has them.
        attention_mask: of the whole canvas, 0 at pads.
        prompt_length: P; block_length: n.

    Raises:
        ValueError: the model keeps no keys and values.
    """

    def __init__(
        self,
        model: MaskPredictor,
        attention_mask: Shaped[Tensor, "B L"] | None,
        prompt_length: int,
        block_length: int,
    ) -> None:
        if not hasattr(model, "start_cache"):
            raise ValueError("This model keeps no keys and values: set cache=none.")
        self.model: Any = model
        self.attention_mask = attention_mask
        self.prompt_length, self.block_length = prompt_length, block_length
        self._kept: tuple[Tensor, Any] | None = None  # hidden states [B, L, d] and the model's cache

    @abstractmethod
    def stop(self, start: int, length: int) -> int:
        """Where the slice that starts with a block ends, in a canvas of this length."""

    def __call__(self, x: Int[Tensor, "B L"], block: int, step: int) -> tuple[Float[Tensor, "B L d"], ...]:
        if step == 0 or self._kept is None:
            self._kept = self.model.start_cache(x, self.attention_mask)
        else:
            hidden, cache = self._kept
            start = self.start(block)
            stop = self.stop(start, x.shape[1])
            hidden[:, start:stop] = self.model.use_cache(x[:, start:stop], start, cache)
        return (aligned(self.model, self._kept[0], self.attention_mask),)

    def start(self, block: int) -> int:
        """The first column of a block."""
        return self.prompt_length + block * self.block_length

    def window(self, block: int, step: int, end: int) -> tuple[int, int]:
        """The columns a step can commit, from and up to: the first step sees the whole canvas.

        A model with shifted logits has no left neighbour of a block's first column in the steps after the
        first, which therefore commits this column alone (Fast-dLLM's Dream).
        """
        start = self.start(block)
        if step:
            return start, end
        return (start, start + 1) if getattr(self.model.config, "shifted_logits", False) else (0, end)

    def keep(self, stay: Bool[Tensor, " B"]) -> BlockCache:
        """The same for the rows that stay in the batch; what is kept moves there."""
        mask = None if self.attention_mask is None else self.attention_mask[stay]
        new = type(self)(self.model, mask, self.prompt_length, self.block_length)
        if self._kept is not None:
            (hidden, cache), self._kept = self._kept, None
            new._kept = hidden[stay], cache.take(stay)
        return new


class PrefixCache(BlockCache):
    """Keeps what is left of the block."""

    def stop(self, start: int, length: int) -> int:
        return length


class DualCache(BlockCache):
    """Keeps what is left and right of the block."""

    def stop(self, start: int, length: int) -> int:
        return start + self.block_length


def cached_forward(
    model: MaskPredictor,
    config: SamplerConfig,
    attention_mask: Shaped[Tensor, "B L"] | None,
    prompt_length: int,
) -> BlockCache:
    """The cache that `config.cache` names."""
    kind = {"prefix": PrefixCache, "dual": DualCache}[config.cache]
    return kind(model, attention_mask, prompt_length, config.block_length)

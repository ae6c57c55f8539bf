"""Keys and values that outlive a forward: what block-wise decoding reuses between two steps.

A forward over the whole canvas fills the cache; later ones run over a slice of its columns, replace that
slice's keys and values, and attend to all of the canvas, so the columns outside the slice are as they were
when the cache was filled (stale, as attention is bidirectional). Keys are kept rotated: a column's position
never changes, so rotating them again in every forward (Fast-dLLM) gives the same numbers.

Quantization applies to cached keys and values as to fresh ones: they are kept as the projections give them,
and the attention product quantizes what it reads in every forward. V's static scale and the scales per token
and head of Q and K do not depend on other columns, so a cached column has the codes it had when it was fresh.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass
class KeysValues:
    """One block's rotated keys and its values over the whole canvas, None before the first forward.

    Attributes:
        at: the columns of the forward in progress, as a slice or one by one.
    """

    at: slice | Int[Tensor, " n"] | None = None
    K: Float[Tensor, "B kv L h"] | None = None
    V: Float[Tensor, "B kv L h"] | None = None

    def replace(
        self, K: Float[Tensor, "B kv n h"], V: Float[Tensor, "B kv n h"]
    ) -> tuple[Float[Tensor, "B kv L h"], Float[Tensor, "B kv L h"]]:
        """Writes the columns `at`; all columns' keys and values."""
        if self.K is None or self.V is None:
            self.K, self.V = K, V
        else:
            self.K[:, :, self.at] = K
            self.V[:, :, self.at] = V
        return self.K, self.V

    def take(self, rows: Bool[Tensor, " B"] | Int[Tensor, " R"]) -> KeysValues:
        """These rows; the memory of all is given up."""
        assert self.K is not None and self.V is not None
        K, V, self.K, self.V = self.K[rows], self.V[rows], None, None
        return KeysValues(self.at, K, V)


@dataclass
class KVCache:
    """All blocks' keys and values, and the context of the whole canvas; a model makes one (`start_cache`)."""

    layers: list[KeysValues]
    context: Any  # base.BlockContext

    @property
    def is_empty(self) -> bool:
        """Whether no forward has filled it, or its keys and values have moved (`take`)."""
        return self.layers[0].K is None

    def take(self, rows: Bool[Tensor, " B"] | Int[Tensor, " R"]) -> KVCache:
        """A cache of these rows; this one is empty afterwards, one layer at a time."""
        layers = [layer.take(rows) for layer in self.layers]
        return KVCache(layers, self.context.take(rows))

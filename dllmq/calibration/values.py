"""The static scale of the attention values V: range over the calibration states, then a choice of scale.

Two streaming passes, so attention maps are never all held: `range` sees V, `accumulate` sees V and P where a
scale needs them. One scale per layer and granularity group: the whole tensor, each head, or each channel of
each head.

Legend: V [N, kv, h] values of N valid tokens, kv heads of width h; s scale, z zero.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from dllmq.numerics import Grid, Params

GRANULARITIES = ("tensor", "head", "channel")


@runtime_checkable
class ValueScale(Protocol):
    """Settles V's parameters for one layer; a fresh one is made for each."""

    needs: frozenset[
        str
    ]  # "maps" when accumulate wants V and P, "values" when it wants V; else it is not called

    def range(self, V: Float[Tensor, "N kv h"]) -> None: ...
    def accumulate(self, V: Tensor, P: Tensor | None) -> None: ...
    def result(self) -> Params: ...
    def notes(self) -> dict[str, float]: ...


@dataclass
class MinMax:
    """s = (max - min) / (2^b - 1), z = round(-min / s), range widened to contain 0. IA-AQ off: alpha = 1."""

    grid: Grid
    granularity: str = "head"
    low: Tensor | None = field(default=None, repr=False)
    high: Tensor | None = field(default=None, repr=False)
    needs: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.granularity not in GRANULARITIES:
            raise ValueError(
                f"value_granularity is {self.granularity!r}; it must be one of {', '.join(GRANULARITIES)}."
            )
        assert not self.grid.symmetric, "V's grid is asymmetric"

    def range(self, V: Float[Tensor, "N kv h"]) -> None:
        axes = {"tensor": (0, 1, 2), "head": (0, 2), "channel": (0,)}[self.granularity]
        low, high = (
            V.float().amin(axes, keepdim=True)[0],
            V.float().amax(axes, keepdim=True)[0],
        )  # [kv|1, h|1]
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)

    def accumulate(self, V: Tensor, P: Tensor | None) -> None:
        """Min-max needs no second pass."""

    def notes(self) -> dict[str, float]:
        """For the record."""
        return {}

    def result(self) -> Params:
        """Broadcastable to V [B, kv, L, h]: [kv|1, 1, h|1]."""
        assert self.low is not None and self.high is not None, "no value was observed"
        low, high = self.low.clamp(max=0)[:, None, :], self.high.clamp(min=0)[:, None, :]
        s = (high - low) / (2**self.grid.bits - 1)
        s = torch.where(s > 0, s, torch.ones_like(s))
        return Params(s, torch.round(-low / s))

"""Statistics of a group's input over the calibration states, streamed: only sums are held, not the inputs.

Legend: x_j input of token j [I], c_j its weight (the token weight, 0 at pads), H = 2 sum_j c_j x_j x_j^T.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dllmq.numerics.linalg import weighted_gram

BUFFER_ELEMENTS = 2**24  # of the inputs that wait for their place in the Gram matrix: 64 MiB in fp32


@dataclass(frozen=True)
class GroupInput:
    """The raw input of a group in one batch of states, for losses that need it."""

    X: Float[Tensor, "B L I"]
    weight: Float[Tensor, "B L"]  # c_j, 0 at pads
    valid: Bool[Tensor, "B L"]


@dataclass(frozen=True)
class GroupStats:
    """What a method asked for in `needs`; the rest is None."""

    gram: Float[Tensor, "I I"] | None = None  # H
    mean_abs: Float[Tensor, " I"] | None = None  # sum_j c_j |x_j| / sum_j c_j
    inputs: tuple[GroupInput, ...] | None = None


@dataclass
class StatsCollector:
    """Adds up the statistics in `needs` ("gram", "mean_abs", "inputs") batch by batch.

    One collector serves all linears that read the same input. The Gram matrix grows by the tokens of several
    batches at once: the fewer products, the larger and the faster.
    """

    needs: frozenset[str]
    gram: Tensor | None = None
    abs_sum: Tensor | None = None
    weight_sum: Tensor | None = None
    inputs: list[GroupInput] = field(default_factory=list)
    waiting: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # x_j [N, I] and c_j not yet in `gram`

    def add(
        self, X: Float[Tensor, "B L I"], weight: Float[Tensor, "B L"], valid: Bool[Tensor, "B L"]
    ) -> None:
        """One batch of group inputs; pads carry weight 0 and are left out of every sum."""
        flat, c = X[valid], weight[valid]  # [N, I], [N]
        if "gram" in self.needs:
            self.waiting.append((flat, c))
            if sum(rows.numel() for rows, _ in self.waiting) >= BUFFER_ELEMENTS:
                self._flush()
        if "mean_abs" in self.needs:
            self.abs_sum = _sum(self.abs_sum, (flat.float().abs() * c[:, None]).sum(0))
            self.weight_sum = _sum(self.weight_sum, c.sum().double())
        if "inputs" in self.needs:
            self.inputs.append(GroupInput(X, weight, valid))

    def result(self) -> GroupStats:
        self._flush()
        mean_abs = None
        if self.abs_sum is not None and self.weight_sum is not None:
            mean_abs = self.abs_sum / self.weight_sum.clamp(min=1e-12)
        return GroupStats(
            gram=self.gram,
            mean_abs=mean_abs,
            inputs=tuple(self.inputs) if "inputs" in self.needs else None,
        )

    def _flush(self) -> None:
        """Moves the tokens that wait into the Gram matrix."""
        if self.waiting:
            X, c = (torch.cat(parts) for parts in zip(*self.waiting, strict=True))
            self.waiting.clear()
            self.gram = _sum(self.gram, weighted_gram(X, c))


def _sum(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)


def collect(needs: frozenset[str], batches: list[GroupInput]) -> GroupStats:
    """Statistics over batches that are already in memory."""
    collector = StatsCollector(needs)
    for batch in batches:
        collector.add(batch.X, batch.weight, batch.valid)
    return collector.result()


__all__ = ["GroupInput", "GroupStats", "StatsCollector", "collect"]

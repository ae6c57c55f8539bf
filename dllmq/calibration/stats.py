"""Statistics of a group's input over the calibration states, streamed: only sums are held, not the inputs.

Legend: x_j input of token j [I], c_j its weight (the token weight, 0 at pads), H = 2 sum_j c_j x_j x_j^T.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxtyping import Bool, Float
from torch import Tensor

from dllmq.numerics.linalg import weighted_gram


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
    """Adds up the statistics in `needs` ("gram", "mean_abs", "inputs") batch by batch."""

    needs: frozenset[str]
    gram: Tensor | None = None
    abs_sum: Tensor | None = None
    weight_sum: float = 0.0
    inputs: list[GroupInput] = field(default_factory=list)

    def add(
        self, X: Float[Tensor, "B L I"], weight: Float[Tensor, "B L"], valid: Bool[Tensor, "B L"]
    ) -> None:
        """One batch of group inputs; pads carry weight 0 and are left out of every sum."""
        flat, c = X[valid].float(), weight[valid]  # [N, I], [N]
        if "gram" in self.needs:
            H = weighted_gram(flat, c)
            self.gram = H if self.gram is None else self.gram.add_(H)
        if "mean_abs" in self.needs:
            total = (flat.abs() * c[:, None]).sum(0)
            self.abs_sum = total if self.abs_sum is None else self.abs_sum.add_(total)
            self.weight_sum += float(c.sum())
        if "inputs" in self.needs:
            self.inputs.append(GroupInput(X, weight, valid))

    def result(self) -> GroupStats:
        mean_abs = None if self.abs_sum is None else self.abs_sum / max(self.weight_sum, 1e-12)
        return GroupStats(
            gram=self.gram,
            mean_abs=mean_abs,
            inputs=tuple(self.inputs) if "inputs" in self.needs else None,
        )


def collect(needs: frozenset[str], batches: list[GroupInput]) -> GroupStats:
    """Statistics over batches that are already in memory."""
    collector = StatsCollector(needs)
    for batch in batches:
        collector.add(batch.X, batch.weight, batch.valid)
    return collector.result()


__all__ = ["GroupInput", "GroupStats", "StatsCollector", "collect"]

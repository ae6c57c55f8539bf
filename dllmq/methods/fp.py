"""Full precision: the method that changes nothing, so that the reference runs through the same pipeline."""

from __future__ import annotations

from dataclasses import dataclass

from dllmq.calibration.stats import GroupStats
from dllmq.methods.base import GroupUpdate
from dllmq.models.base import LinearGroup
from dllmq.numerics import Grid


@dataclass(frozen=True)
class FP:
    """Leaves every group as it is."""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()

    def __call__(self, group: LinearGroup, stats: GroupStats, grid: Grid) -> GroupUpdate:
        """No update; the grid is unused."""
        return GroupUpdate(weights={})

"""Round to nearest: each weight to its closest grid point, the grid fitted on the range of its group.

    W_hat = argmin_{w_hat on the grid} |W - w_hat|     elementwise; needs no data

The floor every other method is measured against. Equations of the grid: dllmq/numerics/grid.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dllmq.calibration.stats import GroupStats
from dllmq.methods.base import GroupUpdate, check_weight, naming
from dllmq.models.base import LinearGroup
from dllmq.numerics import Grid, QuantizedTensor, fit, quantize


def round_to_nearest(W: Float[Tensor, "O I"], grid: Grid) -> QuantizedTensor:
    """W rounded to the grid fitted on W.

    Raises:
        ValueError: W has NaN or Inf, or the group size does not divide I.
    """
    check_weight(W, grid)
    params = fit(W, grid)
    return QuantizedTensor(quantize(W, params, grid), params.scale, params.zero, grid)


def rtn(W: Float[Tensor, "O I"], grid: Grid) -> Float[Tensor, "O I"]:
    """`round_to_nearest`, dequantized, in W's dtype."""
    return round_to_nearest(W, grid).dequantize().to(W.dtype)


@dataclass(frozen=True)
class RTN:
    """Round to nearest. Reads no statistics, so token weights (CGQ) have no effect on it."""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()

    @torch.no_grad()
    def __call__(self, group: LinearGroup, stats: GroupStats, grid: Grid) -> GroupUpdate:
        """Rounds each of the group's weights.

        Raises:
            ValueError: as `round_to_nearest`, with the layer's name in front.
        """
        weights = {}
        for name, W in group.weights.items():
            with naming(f"{group.name}.{name}"):
                weights[name] = round_to_nearest(W, grid)
        return GroupUpdate(weights)

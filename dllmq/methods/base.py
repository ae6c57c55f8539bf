"""The seam of a method: a group of linears, the statistics it asked for and a grid in; quantized weights out.

A method is a function-preserving transform of the group's input (a scale per channel) followed by a solver
(rounding, GPTQ). It sees no module, config or device; the pipeline applies what it returns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from dllmq.calibration.stats import GroupStats
from dllmq.models.base import LinearGroup
from dllmq.numerics import Grid, QuantizedTensor
from dllmq.numerics.linalg import all_finite


@dataclass(frozen=True)
class GroupUpdate:
    """What a method decided for a group.

    Attributes:
        weights: linear name -> quantized weight; a linear that is missing stays as it is.
        scale: s [I] by which the op before the group must divide its output: the weights are quantized for
            inputs x / s. None: inputs stay as they are.
        notes: numbers for the record, such as the ratio AWQ chose.
    """

    weights: dict[str, QuantizedTensor]
    scale: Float[Tensor, " I"] | None = None
    notes: dict[str, float] = field(default_factory=dict)


@runtime_checkable
class Method(Protocol):
    """A baseline. Its implementations are frozen dataclasses whose fields are the YAML's keys."""

    @property
    def needs(self) -> frozenset[str]:
        """Statistics to collect for each group: a subset of {"gram", "mean_abs", "inputs"}."""
        ...

    def __call__(self, group: LinearGroup, stats: GroupStats, grid: Grid) -> GroupUpdate: ...


def check_weight(W: Tensor, grid: Grid) -> None:
    """Refuses a weight that cannot be quantized.

    Raises:
        ValueError: W is not a matrix, has NaN or Inf, or the grid's group size does not divide its columns.
    """
    if W.dim() != 2:
        raise ValueError(f"the weight has shape {list(W.shape)}, but it must be [O, I]: pass one matrix.")
    if not all_finite(W):
        raise ValueError("the weight holds NaN or Inf, but it must be finite: check the checkpoint.")
    grid.groups(W.shape[1])


@contextmanager
def naming(layer: str) -> Iterator[None]:
    """Puts the layer's name in front of a ValueError raised inside, keeping its type."""
    try:
        yield
    except ValueError as error:
        raise type(error)(f"{layer}: {error}") from error

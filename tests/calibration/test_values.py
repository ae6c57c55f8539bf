"""MinMax: the range of V over all states, widened to contain 0."""

import pytest
import torch

from dllmq.calibration.values import MinMax, ValueScale
from dllmq.numerics import Grid

AXES = {"tensor": (0, 1, 2), "head": (0, 2), "channel": (0,)}
SHAPE = {"tensor": (1, 1, 1), "head": (3, 1, 1), "channel": (3, 1, 4)}


@pytest.mark.parametrize("granularity", AXES)
@pytest.mark.parametrize("shift", [0.0, 20.0, -20.0])
def test_min_max_equals_its_formula_however_it_is_streamed(granularity: str, shift: float) -> None:
    V = torch.randn(30, 3, 4) * torch.tensor([1.0, 5.0, 0.2])[:, None] + shift
    low = V.amin(AXES[granularity], keepdim=True).clamp(max=0)
    high = V.amax(AXES[granularity], keepdim=True).clamp(min=0)
    s = ((high - low) / 15).reshape(SHAPE[granularity])
    z = torch.round(-low.reshape(SHAPE[granularity]) / s)
    for parts in ([V], V.split(7), V.flip(0).split(1)):
        scale: ValueScale = MinMax(Grid(4), granularity)
        for part in parts:
            scale.range(part)
        found = scale.result()
        assert torch.equal(found.scale, s) and torch.equal(found.zero, z)
        assert bool(((z >= 0) & (z <= 15)).all())


def test_nothing_but_zeros_divides_by_nothing() -> None:
    scale = MinMax(Grid(4))
    scale.range(torch.zeros(5, 2, 4))
    assert scale.result().scale.flatten().tolist() == [1, 1] and not scale.result().zero.any()


def test_it_asks_for_no_attention_maps() -> None:
    assert MinMax(Grid(4)).needs == frozenset()


def test_unknown_granularity() -> None:
    with pytest.raises(ValueError, match="'row'; it must be one of tensor, head, channel"):
        MinMax(Grid(4), "row")

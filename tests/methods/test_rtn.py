"""Round to nearest, and full precision."""

import pytest
import torch

from dllmq.calibration.stats import GroupStats
from dllmq.methods import FP, RTN, Method
from dllmq.methods.rtn import round_to_nearest, rtn
from dllmq.models.base import LinearGroup
from dllmq.numerics import Grid, fake_quant

GRIDS = [Grid(4), Grid(2, 4), Grid(3, 0), Grid(8, 4, symmetric=True), Grid(3, symmetric=True)]


def group(**weights: torch.Tensor) -> LinearGroup:
    def inspect(*_: object) -> torch.Tensor:
        raise AssertionError("RTN looks at no output")

    return LinearGroup("blocks.3.qkv", weights, can_scale=True, inspect=inspect, clip=frozenset())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_rtn_is_fake_quant_bit_for_bit(grid: Grid) -> None:
    W = torch.randn(6, 8)
    assert torch.equal(rtn(W, grid), fake_quant(W, grid))
    assert torch.equal(round_to_nearest(W, grid).dequantize(), fake_quant(W, grid))


def test_no_other_grid_point_is_closer() -> None:
    """Against the exhaustive search over all 16 points of each row."""
    W, grid = torch.randn(6, 8), Grid(4)
    q = round_to_nearest(W, grid)
    points = (torch.arange(16.0) - q.zero) * q.scale  # [O, 16]
    nearest = (W[:, :, None] - points[:, None, :]).abs().amin(-1)
    torch.testing.assert_close((W - q.dequantize()).abs(), nearest)


def test_rtn_returns_the_weights_dtype() -> None:
    assert rtn(torch.randn(2, 4).bfloat16(), Grid(4)).dtype == torch.bfloat16


def test_method_rounds_every_weight_and_scales_nothing() -> None:
    q, k = torch.randn(6, 8), torch.randn(3, 8)
    update = RTN()(group(q_proj=q, k_proj=k), GroupStats(), Grid(3))
    assert update.scale is None and list(update.weights) == ["q_proj", "k_proj"]
    assert torch.equal(update.weights["k_proj"].dequantize(), rtn(k, Grid(3)))


def test_full_precision_changes_nothing() -> None:
    update = FP()(group(q_proj=torch.randn(6, 8)), GroupStats(), Grid(2))
    assert update.weights == {} and update.scale is None


@pytest.mark.parametrize("method", [FP(), RTN()], ids=str)
def test_needs_no_statistics(method: Method) -> None:
    assert isinstance(method, Method) and method.needs == frozenset()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_weight_is_named(bad: float) -> None:
    W = torch.ones(2, 4)
    W[1, 2] = bad
    with pytest.raises(ValueError, match=r"blocks\.3\.qkv\.v_proj: the weight holds NaN or Inf"):
        RTN()(group(q_proj=torch.ones(2, 4), v_proj=W), GroupStats(), Grid(4))


def test_group_size_that_does_not_divide_is_named() -> None:
    with pytest.raises(ValueError, match=r"q_proj: group_size 3 does not divide a row of 4 values"):
        RTN()(group(q_proj=torch.ones(2, 4)), GroupStats(), Grid(4, 3))

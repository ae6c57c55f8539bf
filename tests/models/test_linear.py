"""QuantLinear is its definition, and moving a scale into the op before a group changes no function."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_llada import tiny_model
from torch import Tensor, nn

from dllmq.methods.rtn import round_to_nearest
from dllmq.models.attention import QuantizedProduct
from dllmq.models.base import (
    Block,
    GroupRow,
    _can_absorb,
    absorb_scale,
    linear_group,
    swapped_weights,
)
from dllmq.models.linear import QuantLinear
from dllmq.models.llada import TOPOLOGY
from dllmq.numerics import Grid, Params

O, I = 6, 16
ROWS = {row.name: row for row in TOPOLOGY.groups}


def quant_linear(grid: Grid, act_grid: Grid | None = None, bias: Tensor | None = None) -> QuantLinear:
    return QuantLinear(round_to_nearest(torch.randn(O, I), grid), bias, act_grid, torch.float32)


def dequantized(q: Any) -> Tensor:
    """(code - z) s, entry by entry."""
    groups = q.scale.shape[1]
    return torch.tensor(
        [
            [
                (float(q.codes[o, i]) - float(q.zero[o, i * groups // I]))
                * float(q.scale[o, i * groups // I])
                for i in range(I)
            ]
            for o in range(O)
        ]
    )


def per_token(x: Tensor, bits: int, group: int = -1) -> Tensor:
    """Dynamic asymmetric quantization of each token, or of each group of its channels."""
    width, out = group if group > 0 else x.shape[-1], x.clone()
    for row in out.view(-1, width):
        low, high = min(float(row.min()), 0.0), max(float(row.max()), 0.0)
        s = (high - low) / (2**bits - 1)
        z = round(-low / s)
        row.copy_(((row / s).round().add(z).clamp(0, 2**bits - 1) - z) * s)
    return out


@pytest.mark.parametrize("grid", [Grid(4), Grid(3, 4), Grid(4, 8, symmetric=True)], ids=str)
@pytest.mark.parametrize("act", [None, Grid(8), Grid(4, 4)], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_quant_linear_equals_its_definition(grid: Grid, act: Grid | None, biased: bool) -> None:
    bias = torch.randn(O) if biased else None
    linear, x = quant_linear(grid, act, bias), torch.randn(2, 5, I)
    x_hat = x if act is None else per_token(x, act.bits, act.group_size)
    expected = x_hat @ dequantized(linear.quantized).T + (0 if bias is None else bias)
    torch.testing.assert_close(linear(x), expected, atol=1e-5, rtol=1e-5)


def test_inputs_are_quantized_token_by_token() -> None:
    linear, x = quant_linear(Grid(4), Grid(4)), torch.randn(3, I)
    x[1] *= 100
    torch.testing.assert_close(linear(x)[[0, 2]], linear(x[[0, 2]]))


@pytest.mark.parametrize("grid", [Grid(4), Grid(3, 4), Grid(4, symmetric=True)], ids=str)
def test_scale_rows_is_exact(grid: Grid) -> None:
    """By powers of two bit for bit; by anything to an ulp; and the codes stay."""
    linear, x = quant_linear(grid, bias=torch.randn(O)), torch.randn(5, I)
    before, codes = linear(x), linear.quantized.codes.clone()
    linear.scale_rows(torch.tensor([0.5, 2.0, 1.0, 4.0, 0.25, 8.0]))
    assert torch.equal(linear(x), before * torch.tensor([0.5, 2.0, 1.0, 4.0, 0.25, 8.0]))
    assert torch.equal(linear.quantized.codes, codes)
    assert torch.equal(linear.weight, linear.quantized.dequantize())
    f = torch.rand(O) + 0.1
    before = linear(x)
    linear.scale_rows(f)
    torch.testing.assert_close(linear(x), before * f, atol=1e-5, rtol=1e-5)


# Scales -------------------------------------------------------------------------------------------


def rescale(block: Block, row: GroupRow, s: Tensor) -> None:
    """W -> W s and x -> x / s, what a method's update with a scale amounts to without rounding."""
    for name in row.linears:
        getattr(block, name).weight.data *= s
    absorb_scale(block, row, s)


@pytest.mark.parametrize(
    ("name", "quantized"),
    [*((name, False) for name in ROWS), ("attn_out", True), ("down", True)],  # norms are not quantized
)
def test_absorbing_a_scale_preserves_the_function(name: str, quantized: bool) -> None:
    """Also where the absorber was quantized before: v_proj is before attn_out, up_proj before ff_out."""
    model, ids = tiny_model(), torch.randint(0, 38, (2, 9))
    block, row = model.blocks[1], ROWS[name]
    if quantized:
        weight = getattr(block, row.absorber).weight
        setattr(
            block, row.absorber, QuantLinear(round_to_nearest(weight, Grid(4, 8)), None, None, torch.float32)
        )
    before, weight = model(ids), getattr(block, row.absorber).weight.clone()
    rescale(block, row, torch.rand(getattr(block, row.linears[0]).weight.shape[1]) * 3 + 0.2)
    torch.testing.assert_close(model(ids), before, atol=2e-4, rtol=0)
    assert not torch.allclose(getattr(block, row.absorber).weight, weight)  # something did move


def test_absorbing_divides_a_bias_too() -> None:
    block = tiny_model().blocks[0]
    block.v_proj.bias = nn.Parameter(torch.randn(32))
    h, s = torch.randn(3, 32), torch.rand(32) + 0.5
    before = block.v_proj(h)
    absorb_scale(block, ROWS["attn_out"], s)
    torch.testing.assert_close(block.v_proj(h), before / s)


def test_what_can_absorb() -> None:
    mha, gqa = tiny_model(), tiny_model(n_kv_heads=2)
    assert all(linear_group(mha, 0, row).can_scale for row in ROWS.values())
    assert [linear_group(gqa, 0, row).can_scale for row in ROWS.values()] == [True, False, True, True]


def test_a_quantizer_on_the_path_blocks_a_scale() -> None:
    block, grid = tiny_model().blocks[0], Grid(4)
    block.product = QuantizedProduct(grid, None, None)
    assert _can_absorb(block, ROWS["attn_out"])
    block.product = QuantizedProduct(None, grid, Params(torch.ones(1, 1, 1), torch.zeros(1, 1, 1)))
    assert not _can_absorb(block, ROWS["attn_out"])
    assert _can_absorb(block, ROWS["down"])


def test_one_scale_for_a_whole_weight_cannot_take_row_scales() -> None:
    block = tiny_model().blocks[0]
    for grid, absorbs in ((Grid(4, 0), False), (Grid(4), True), (Grid(4, 8), True)):
        quantized = round_to_nearest(tiny_model().blocks[0].up_proj.weight, grid)
        block.up_proj = QuantLinear(quantized, None, None, torch.float32)
        assert _can_absorb(block, ROWS["down"]) is absorbs


# LinearGroup --------------------------------------------------------------------------------------


def test_swapped_weights_act_inside_and_come_back() -> None:
    block, x = tiny_model().blocks[0], torch.randn(4, 32)
    kept, W = block.q_proj.weight.data, torch.randn(32, 32)
    before = kept.clone()
    with swapped_weights(block, {"q_proj": W}):
        assert torch.equal(block.q_proj(x), F.linear(x, W))
    assert block.q_proj.weight.data.data_ptr() == kept.data_ptr() and torch.equal(kept, before)


def test_swapped_weights_come_back_after_an_error() -> None:
    block = tiny_model().blocks[0]
    before = {name: getattr(block, name).weight.clone() for name in ("q_proj", "k_proj")}
    with (
        pytest.raises(RuntimeError, match="inside"),
        swapped_weights(block, {name: torch.zeros(32, 32) for name in before}),
    ):
        raise RuntimeError("inside")
    with (
        pytest.raises(AttributeError),
        swapped_weights(block, {"q_proj": torch.zeros(32, 32), "nothing": torch.zeros(1)}),
    ):
        pass
    assert all(torch.equal(getattr(block, name).weight, W) for name, W in before.items())


@pytest.mark.parametrize("name", ROWS)
def test_inspect_is_the_module_with_other_weights(name: str) -> None:
    """The group's own weights give the model's values; others give what a model with them would."""
    model, row = tiny_model(), ROWS[name]
    group, block = linear_group(model, 1, row), model.blocks[1]
    X = torch.randn(2, 6, getattr(block, row.linears[0]).weight.shape[1])
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[0, :2] = False
    module = {
        "qkv": lambda: block.attention(X, model.context(6, valid)),
        "attn_out": lambda: block.attn_out(X),
        "gate_up": lambda: block.mlp(X),
        "down": lambda: block.ff_out(X),
    }[name]
    assert torch.equal(group.inspect(group.weights, X, valid), module())
    others = {linear: W + torch.randn_like(W) for linear, W in group.weights.items()}
    found = group.inspect(others, X, valid)
    for linear, W in others.items():
        getattr(block, linear).weight.data = W
    assert torch.equal(found, module())


def test_group_weights_are_named_and_in_execution_order() -> None:
    group = linear_group(tiny_model(), 1, ROWS["qkv"])
    assert group.name == "blocks.1.qkv" and list(group.weights) == ["q_proj", "k_proj", "v_proj"]
    assert group.clip == {"v_proj"}

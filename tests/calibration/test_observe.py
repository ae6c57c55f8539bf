"""What is observed inside a block is what a plain hook sees in a forward of the whole model."""

import pytest
import torch
from tiny_llada import EOS, tiny_model
from torch import Tensor

from dllmq.calibration.observe import attention_product, group_input
from dllmq.models.attention import AttentionProduct, QuantizedProduct, attention_map, repeat_kv
from dllmq.models.base import BlockContext
from dllmq.models.llada import LLaDA
from dllmq.numerics import Grid, Params


def padded() -> tuple[Tensor, Tensor]:
    ids, keep = torch.randint(0, 38, (3, 9)), torch.ones(3, 9, dtype=torch.bool)
    keep[1, :4] = False
    return ids.masked_fill(~keep, EOS), keep


def into_second_block(model: LLaDA, ids: Tensor, keep: Tensor) -> tuple[Tensor, BlockContext]:
    ctx = model.context(ids.shape[1], keep)
    return model.blocks[0](model.embed(ids), ctx), ctx


@pytest.mark.parametrize("linear", ["q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out"])
def test_group_input_equals_a_hook_on_the_full_model(linear: str) -> None:
    model, (ids, keep) = tiny_model(n_kv_heads=2), padded()
    seen: list[Tensor] = []
    handle = getattr(model.blocks[1], linear).register_forward_hook(lambda _m, x, _y: seen.append(x[0]))
    model(ids, keep)
    handle.remove()
    x, ctx = into_second_block(model, ids, keep)
    assert torch.equal(group_input(model.blocks[1], linear, x, ctx), seen[0])
    assert not getattr(model.blocks[1], linear)._forward_pre_hooks


def test_group_input_stops_before_the_linear() -> None:
    model, (ids, keep) = tiny_model(), padded()
    ran: list[str] = []
    for name in ("q_proj", "attn_out", "ff_out"):
        getattr(model.blocks[1], name).register_forward_hook(lambda _m, _x, _y, name=name: ran.append(name))
    group_input(model.blocks[1], "attn_out", *into_second_block(model, ids, keep))
    assert ran == ["q_proj"]


@pytest.mark.parametrize("maps", [False, True])
def test_values_and_maps_are_those_the_block_multiplies(maps: bool) -> None:
    model, (ids, keep) = tiny_model(n_kv_heads=2), padded()
    block = model.blocks[1]
    product = block.product
    x, ctx = into_second_block(model, ids, keep)
    V, P = attention_product(block, x, ctx, maps)
    assert block.product is product
    h = block.attn_norm(x)
    Q, K, values = block.project(h, ctx)
    assert torch.equal(V, values)
    if not maps:
        assert P is None
        return
    assert P is not None and torch.equal(P, attention_map(Q, repeat_kv(K, 4), ctx.bias))
    mixed = (P @ repeat_kv(V, 4)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(block.attn_out(mixed), block.attention(h, ctx), atol=1e-5, rtol=0)


def test_the_product_comes_back_after_an_error() -> None:
    model = tiny_model()
    product = QuantizedProduct(Grid(4), Grid(4), Params(torch.ones(1, 1, 1), torch.zeros(1, 1, 1)))
    block = model.blocks[0]
    block.product = product
    with pytest.raises(RuntimeError):
        attention_product(block, torch.zeros(1, 5, 31), model.context(5), maps=False)
    assert block.product is product and isinstance(product, AttentionProduct)

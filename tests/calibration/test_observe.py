"""What is observed inside a block is what a plain hook sees in a forward of the whole model."""

import pytest
import torch
from tiny_llada import EOS, tiny_model
from torch import Tensor

from dllmq.calibration.observe import attention_inputs, group_input
from dllmq.models.attention import QuantizedProduct
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


class Watched(QuantizedProduct):
    """Keeps what the block gives it."""

    def __call__(self, Q: Tensor, K: Tensor, V: Tensor, bias: Tensor | None) -> Tensor:
        self.given = (Q, K, V, bias)
        return super().__call__(Q, K, V, bias)


def watched() -> Watched:
    ones = torch.ones(1, 1, 1)
    return Watched(Grid(4), Grid(4), Params(ones, 8 * ones), Grid(4))


@pytest.mark.parametrize("pads", [False, True])
def test_attention_inputs_are_those_the_block_gives_its_product(pads: bool) -> None:
    """Rotated, one K and V per value head, and not yet quantized whatever the product does to them."""
    model, (ids, keep) = tiny_model(n_kv_heads=2), padded()
    keep = keep if pads else torch.ones_like(keep)
    block, product = model.blocks[1], watched()
    block.product = product
    model(ids, keep)
    given = product.given
    found = attention_inputs(block, *into_second_block(model, ids, keep))
    assert block.product is product and product.given is given  # it did not run again
    assert [x.shape[1] for x in found[:3]] == [4, 2, 2]
    assert all(torch.equal(a, b) for a, b in zip(found[:3], given[:3], strict=True))
    assert (found.bias is None) is not pads
    assert found.bias is None or torch.equal(found.bias, given[3])


def test_reading_the_attention_inputs_stops_before_the_product() -> None:
    model, (ids, keep) = tiny_model(), padded()
    ran: list[str] = []
    for name in ("q_proj", "attn_out"):
        getattr(model.blocks[1], name).register_forward_hook(lambda _m, _x, _y, name=name: ran.append(name))
    attention_inputs(model.blocks[1], *into_second_block(model, ids, keep))
    assert ran == ["q_proj"]


def test_the_product_comes_back_after_an_error() -> None:
    model, product = tiny_model(), watched()
    model.blocks[0].product = product
    with pytest.raises(RuntimeError):
        attention_inputs(model.blocks[0], torch.zeros(1, 5, 31), model.context(5))
    assert model.blocks[0].product is product

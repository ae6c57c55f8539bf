"""LLaDA against its published architecture, restated here in formulas and loops (no dllmq in it)."""

import math

import pytest
import torch
import torch.nn.functional as F
from reference_layers import reference_norm, reference_rope
from tiny_llada import EOS, MASK, VOCAB, tiny_config, tiny_model
from torch import Tensor

from dllmq.models.llada import LLaDA, RMSNorm, rope_tables, rotate

SHAPES = {
    "mha": {},
    "gqa": {"n_kv_heads": 2},
    "tied": {"weight_tying": True},
    "wide embedding": {"embedding_size": 48, "n_kv_heads": 1},
}


def reference_logits(model: LLaDA, ids: Tensor, keep: Tensor | None = None) -> Tensor:
    """Logits [L, E] of one row in float64; `keep` is 0 at pads."""
    c, weights = model.config, {name: p.double() for name, p in model.state_dict().items()}
    kv_heads, h = c.n_kv_heads or c.n_heads, c.d_model // c.n_heads
    x = weights["model.transformer.wte.weight"][ids]
    for block in range(c.n_layers):
        W = {
            name.removeprefix(f"model.transformer.blocks.{block}.").removesuffix(".weight"): p
            for name, p in weights.items()
        }
        n = reference_norm(x, W["attn_norm"], c.rms_norm_eps)
        q, k, v = n @ W["q_proj"].T, n @ W["k_proj"].T, n @ W["v_proj"].T
        mixed = []
        for head in range(c.n_heads):
            kv = head * kv_heads // c.n_heads
            Q = reference_rope(q[:, head * h : (head + 1) * h], c.rope_theta)
            K = reference_rope(k[:, kv * h : (kv + 1) * h], c.rope_theta)
            scores = Q @ K.T / math.sqrt(h)
            if keep is not None:
                scores[:, keep == 0] = torch.finfo(torch.float32).min
            exp = (scores - scores.amax(1, keepdim=True)).exp()
            mixed.append(exp / exp.sum(1, keepdim=True) @ v[:, kv * h : (kv + 1) * h])
        x = x + torch.cat(mixed, 1) @ W["attn_out"].T
        n = reference_norm(x, W["ff_norm"], c.rms_norm_eps)
        gate = n @ W["ff_proj"].T
        x = x + (gate / (1 + (-gate).exp()) * (n @ W["up_proj"].T)) @ W["ff_out"].T
    x = reference_norm(x, weights["model.transformer.ln_f.weight"], c.rms_norm_eps)
    head_name = "wte" if c.weight_tying else "ff_out"
    return x @ weights[f"model.transformer.{head_name}.weight"].T


def some_ids(batch: int, length: int) -> Tensor:
    ids = torch.randint(0, VOCAB, (batch, length))
    ids[:, length // 2] = MASK
    return ids


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_logits_equal_the_published_architecture(shape: dict[str, int]) -> None:
    model, ids = tiny_model(**shape), some_ids(2, 9)
    logits = model(ids)
    assert logits.shape == (2, 9, shape.get("embedding_size", VOCAB))
    for row in range(2):
        torch.testing.assert_close(logits[row].double(), reference_logits(model, ids[row]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [SHAPES["mha"], SHAPES["gqa"]], ids=["mha", "gqa"])
def test_padding_is_invisible_and_equals_the_reference(shape: dict[str, int]) -> None:
    model, ids = tiny_model(**shape), some_ids(1, 7)
    padded = torch.cat([torch.full((1, 4), EOS), ids], 1)
    keep = (torch.arange(11) >= 4).long()[None]
    logits = model(padded, keep)
    torch.testing.assert_close(logits[:, 4:], model(ids), atol=1e-4, rtol=0)
    torch.testing.assert_close(
        logits[0].double(), reference_logits(model, padded[0], keep[0]), atol=1e-4, rtol=0
    )
    assert not torch.allclose(model(padded)[:, 4:], logits[:, 4:], atol=1e-2)  # the mask is not ignored


def test_a_mask_without_pads_changes_no_bit() -> None:
    model, ids = tiny_model(), some_ids(2, 6)
    assert torch.equal(model(ids, torch.ones_like(ids)), model(ids))
    assert torch.equal(model(ids, torch.ones_like(ids).bool()), model(ids))


def test_rows_of_a_batch_have_their_own_padding() -> None:
    model, ids = tiny_model(), some_ids(2, 8)
    keep = torch.ones(2, 8)
    keep[1, :3] = 0
    logits = model(ids, keep)
    torch.testing.assert_close(logits[0], model(ids[:1])[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(logits[1, 3:], model(ids[1:, 3:])[0], atol=1e-4, rtol=0)


def test_positions_are_relative_and_go_beyond_max_sequence_length() -> None:
    model, ids = tiny_model(), some_ids(1, 40)
    assert model.config.max_sequence_length < 40
    torch.testing.assert_close(model(ids)[0].double(), reference_logits(model, ids[0]), atol=1e-4, rtol=0)


def test_head_and_hidden_states_compose_to_the_logits() -> None:
    model, ids = tiny_model(), some_ids(2, 6)
    h = model.hidden_states(ids)
    assert torch.equal(model.head(h), model(ids))
    torch.testing.assert_close(model.head(h[0, 2:4]), model(ids)[0, 2:4], atol=1e-6, rtol=0)


def test_parameter_names_are_the_published_ones() -> None:
    names = set(tiny_model().state_dict())
    block = ("attn_norm", "ff_norm", "q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")
    published = {f"model.transformer.blocks.{i}.{name}.weight" for i in range(2) for name in block}
    published |= {f"model.transformer.{name}.weight" for name in ("wte", "ln_f", "ff_out")}
    assert names == published
    assert "model.transformer.ff_out.weight" not in tiny_model(weight_tying=True).state_dict()


# bfloat16 -----------------------------------------------------------------------------------------


def test_norm_in_bf16_is_cast_before_the_weight() -> None:
    x, norm = (8 * torch.randn(64, 32)).bfloat16(), RMSNorm(32, 1e-5)
    norm.weight.data = torch.randn(32).bfloat16()
    x32 = x.float()
    unit = x32 * torch.rsqrt((x32**2).mean(1, keepdim=True) + 1e-5)
    assert torch.equal(norm(x), unit.bfloat16() * norm.weight)
    assert not torch.equal(norm(x), (unit * norm.weight.float()).bfloat16())


@pytest.mark.parametrize("full_precision", [True, False])
def test_rope_in_bf16(full_precision: bool) -> None:
    """Full precision: q in fp32, fp32 tables, cast back. Otherwise everything in bf16, tables included."""
    x = torch.randn(1, 2, 50, 8).bfloat16()
    inv_freq = 1.0 / 10000.0 ** (torch.arange(0, 8, 2).float() / 8)
    angle = torch.arange(50).float()[:, None] * inv_freq  # [L, h/2]
    y, sin, cos = (
        (t.float() if full_precision else t.bfloat16())
        for t in (x, angle.sin().repeat(1, 2), angle.cos().repeat(1, 2))
    )
    turned = torch.cat([-y[..., 4:], y[..., :4]], -1)
    expected = (y * cos + turned * sin).bfloat16()
    sin_table, cos_table = rope_tables(50, 8, 10000.0, torch.device("cpu"))
    assert torch.equal(rotate(x, sin_table, cos_table, full_precision), expected)
    assert not torch.equal(rotate(x, sin_table, cos_table, not full_precision), expected)


@pytest.mark.parametrize("full_precision", [True, False])
def test_model_in_bf16_stays_near_fp32(full_precision: bool) -> None:
    model, ids = tiny_model(rope_full_precision=full_precision), some_ids(2, 12)
    exact = model(ids)
    rounded = model.to(torch.bfloat16)(ids)
    assert rounded.dtype == torch.bfloat16
    error = (rounded.float() - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.03


def test_the_config_chooses_the_precision_of_rope() -> None:
    """Queries as the block sees them, bit for bit."""
    for full_precision in (True, False):
        model = tiny_model(rope_full_precision=full_precision).to(torch.bfloat16)
        block, h = model.blocks[0], torch.randn(1, 30, 32).bfloat16()
        ctx = model.context(30)
        Q, _, V = block.project(h, ctx)
        flat = F.linear(h, block.q_proj.weight).view(1, 30, 4, 8).transpose(1, 2)
        assert torch.equal(Q, rotate(flat, ctx.sin, ctx.cos, full_precision))
        assert torch.equal(V, F.linear(h, block.v_proj.weight).view(1, 30, 4, 8).transpose(1, 2))


def test_logit_size_is_the_embeddings() -> None:
    assert tiny_config(embedding_size=48).logit_size == 48
    assert tiny_config().logit_size == VOCAB

"""Dream against its published architecture, restated here in formulas and loops, and against Qwen2."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_layers import reference_norm, reference_rope
from safetensors.torch import save_file
from torch import Tensor, nn

from dllmq.calibration.states import record_trajectories
from dllmq.diffusion import SamplerConfig, log_likelihood
from dllmq.diffusion.process import bernoulli_masks
from dllmq.evaluation import fidelity
from dllmq.evaluation.divergence import measure_divergence
from dllmq.methods import AWQ, GPTQ
from dllmq.models import MaskPredictor, load_model
from dllmq.models.base import absorb_scale, linear_group
from dllmq.models.dream import Dream, DreamConfig, positions
from dllmq.models.linear import QuantLinear
from dllmq.numerics import Grid
from dllmq.pipeline import quantize, quantized_linears
from dllmq.recipe import AttentionGrids, Recipe
from dllmq.techniques.cgq import CGQ
from dllmq.techniques.iaaq import IAAQ
from dllmq.techniques.tmas import TMAS

VOCAB, EOT, MASK, EOS = 40, 37, 38, 39
# The published config.json's fields, with the dimensions of the tiny model.
CONFIG: dict[str, Any] = {
    "architectures": ["DreamModel"],
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
    "bos_token_id": 39,
    "eos_token_id": EOS,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "mask_token_id": MASK,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "Dream",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 39,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": VOCAB,
}
SHAPES = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "one kv head": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
}
LINEARS = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
SAMPLER = SamplerConfig(gen_length=8, steps=12, remasking="entropy")


def tiny_dream(seed: int = 0, **changes: Any) -> Dream:
    """Random weights, norms and biases included; it never predicts the mask (its row of the head is 0)."""
    model = Dream(DreamConfig.from_dict(CONFIG | changes))
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.copy_((0 if name.endswith("bias") else 1) + 0.3 * torch.randn(p.shape, generator=rng))
            else:
                std = 0.5 if "embed" in name else 1.2 / math.sqrt(p.shape[1])
                p.normal_(0, std, generator=rng)
        if not model.config.tie_word_embeddings:
            model.lm_head.weight[MASK] = 0
    return model.requires_grad_(False).eval()


def some_ids(batch: int, length: int) -> Tensor:
    ids = torch.randint(0, EOT, (batch, length))
    ids[:, length // 2] = MASK
    return ids


def prompts() -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [torch.randint(0, EOT, (n,), generator=rng) for n in (5, 3, 6)]


def reference_logits(model: Dream, ids: Tensor) -> Tensor:
    """Logits [L, E] of one unpadded row in float64."""
    c, weights = model.config, {name: p.double() for name, p in model.state_dict().items()}
    heads, kv_heads, h = c.num_attention_heads, c.kv_heads, c.hidden_size // c.num_attention_heads
    x = weights["model.embed_tokens.weight"][ids]
    for layer in range(c.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        W = {name.removeprefix(prefix): p for name, p in weights.items() if name.startswith(prefix)}
        n = reference_norm(x, W["input_layernorm.weight"], c.rms_norm_eps)
        q, k, v = (n @ W[f"self_attn.{a}_proj.weight"].T + W[f"self_attn.{a}_proj.bias"] for a in "qkv")
        mixed = []
        for head in range(heads):
            kv = head * kv_heads // heads
            Q = reference_rope(q[:, head * h : (head + 1) * h], c.rope_theta)
            K = reference_rope(k[:, kv * h : (kv + 1) * h], c.rope_theta)
            P = (Q @ K.T / math.sqrt(h)).softmax(1)
            mixed.append(P @ v[:, kv * h : (kv + 1) * h])
        x = x + torch.cat(mixed, 1) @ W["self_attn.o_proj.weight"].T
        n = reference_norm(x, W["post_attention_layernorm.weight"], c.rms_norm_eps)
        gate = n @ W["mlp.gate_proj.weight"].T
        up = n @ W["mlp.up_proj.weight"].T
        x = x + (gate / (1 + (-gate).exp()) * up) @ W["mlp.down_proj.weight"].T
    x = reference_norm(x, weights["model.norm.weight"], c.rms_norm_eps)
    return x @ weights["model.embed_tokens.weight" if c.tie_word_embeddings else "lm_head.weight"].T


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_logits_equal_the_published_architecture(shape: dict[str, Any]) -> None:
    model, ids = tiny_dream(**shape), some_ids(2, 9)
    logits = model(ids)
    for row in range(2):
        torch.testing.assert_close(logits[row].double(), reference_logits(model, ids[row]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [SHAPES["gqa"], SHAPES["tied"]], ids=["gqa", "tied"])
def test_logits_equal_qwen2_under_a_full_attention_mask(shape: dict[str, Any]) -> None:
    """transformers' own Qwen2 loads the state dict by its names."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
    same = {name: CONFIG[name] for name in (*names, "num_key_value_heads", "rms_norm_eps")}
    config = Qwen2Config(
        **same,
        tie_word_embeddings=shape.get("tie_word_embeddings", False),
        rope_parameters={"rope_type": "default", "rope_theta": CONFIG["rope_theta"]},
        attn_implementation="eager",
    )
    model, ids = tiny_dream(**shape), some_ids(2, 11)
    qwen = Qwen2ForCausalLM(config).eval()
    missing = qwen.load_state_dict(model.state_dict(), strict=False)
    assert missing.unexpected_keys == [] and set(missing.missing_keys) <= {"lm_head.weight"}
    full = torch.zeros(2, 1, 11, 11)
    with torch.no_grad():
        expected = qwen(input_ids=ids, attention_mask=full, use_cache=False).logits
    torch.testing.assert_close(model(ids), expected, atol=1e-4, rtol=0)


def test_left_padding_changes_nothing() -> None:
    """RoPE tables are those of the row alone, bit for bit; logits agree up to the order of sums."""
    model, ids = tiny_dream(), some_ids(2, 8)
    keep = torch.ones(2, 8)
    keep[1, :3] = 0
    logits = model(ids, keep)
    torch.testing.assert_close(logits[0], model(ids[:1])[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(logits[1, 3:], model(ids[1:, 3:])[0], atol=1e-5, rtol=0)
    padded, alone = model.context(8, keep), model.context(5)
    assert torch.equal(padded.sin[1, 0, 3:], alone.sin) and torch.equal(padded.cos[1, 0, 3:], alone.cos)
    ids[1, :3] = EOS
    assert torch.equal(model(ids, keep)[:, 3:], logits[:, 3:])  # what stands under a pad is never seen
    assert not torch.allclose(model(ids)[1, 3:], logits[1, 3:], atol=1e-2)  # the mask is not ignored


def test_positions_count_the_tokens_of_a_row() -> None:
    keep = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]])
    assert positions(keep).tolist() == [[0, 1, 2, 3], [0, 0, 0, 1], [0, 0, 0, 0]]


def test_a_mask_without_pads_changes_no_bit() -> None:
    model, ids = tiny_dream(), some_ids(2, 6)
    assert torch.equal(model(ids, torch.ones_like(ids)), model(ids))


def test_head_and_hidden_states_compose_to_the_logits() -> None:
    model, ids = tiny_dream(), some_ids(2, 6)
    assert isinstance(model, MaskPredictor)
    assert torch.equal(model.head(model.hidden_states(ids)), model(ids))


def test_rope_in_bf16_rotates_in_bf16() -> None:
    """Tables are rounded to the activations' dtype, as published."""
    model = tiny_dream().bfloat16()
    block, ctx, h = model.blocks[0], model.context(9), torch.randn(1, 9, 32).bfloat16()
    inv_freq = 1.0 / 1000000.0 ** (torch.arange(0, 8, 2).float() / 8)
    angle = (torch.arange(9).float()[:, None] * inv_freq).repeat(1, 2)
    q = block.q_proj(h).unflatten(-1, (4, 8)).transpose(1, 2)
    turned = torch.cat((-q[..., 4:], q[..., :4]), -1)
    expected = q * angle.cos().bfloat16() + turned * angle.sin().bfloat16()
    assert torch.equal(block.project(h, ctx)[0], expected)


# Names --------------------------------------------------------------------------------------------


def test_parameter_names_are_the_published_ones() -> None:
    published = {f"model.layers.{i}.{name}.weight" for i in range(2) for name in LINEARS}
    published |= {f"model.layers.{i}.self_attn.{n}_proj.bias" for i in range(2) for n in "qkv"}
    norms = ("input_layernorm", "post_attention_layernorm")
    published |= {f"model.layers.{i}.{name}.weight" for i in range(2) for name in norms}
    published |= {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert set(tiny_dream().state_dict()) == published == set(dict(tiny_dream().named_parameters()))
    assert "lm_head.weight" not in tiny_dream(tie_word_embeddings=True).state_dict()


def test_a_block_reads_and_replaces_its_linears_by_their_last_name() -> None:
    block = tiny_dream().blocks[0]
    for dotted in LINEARS:
        name, new = dotted.split(".")[1], nn.Identity()
        assert getattr(block, name) is block.get_submodule(dotted)
        setattr(block, name, new)
        assert getattr(block, name) is block.get_submodule(dotted) is new
    assert set(dict(block.named_children())) == {
        "input_layernorm", "post_attention_layernorm", "self_attn", "mlp",
    }  # fmt: skip
    with pytest.raises(AttributeError):
        _ = block.attn_out


def test_topology_names_what_is_there() -> None:
    model = tiny_dream()
    for row in model.topology.groups:
        for name in (*row.linears, row.absorber, *row.clip):
            assert isinstance(getattr(model.blocks[1], name).weight, Tensor)
    assert model.get_submodule(model.topology.head).weight is model.lm_head.weight
    assert model.get_submodule(model.topology.embedding).weight.shape == (VOCAB, 32)
    assert model.topology.product_before in [row.name for row in model.topology.groups]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [("gqa", [True, False, True, True]), ("mha", [True, True, True, True])],
)
def test_moving_a_scale_leaves_the_logits(shape: str, expected: list[bool]) -> None:
    """x -> x / s in the absorber, W -> W s in the group; the biases of q, k and v included."""
    model, ids = tiny_dream(**SHAPES[shape]), some_ids(1, 7)
    before = model(ids)
    groups = [linear_group(model, 0, row) for row in model.topology.groups]
    assert [group.can_scale for group in groups] == expected
    for row, group in zip(model.topology.groups, groups, strict=True):
        if group.can_scale:
            s = 0.5 + torch.rand(group.weights[row.linears[0]].shape[1])
            absorb_scale(model.blocks[0], row, s)
            for name in row.linears:
                linear = getattr(model.blocks[0], name)
                linear.weight.data = linear.weight * s
    torch.testing.assert_close(model(ids), before, atol=1e-4, rtol=0)


# Loading ------------------------------------------------------------------------------------------


def save(folder: Path, config: dict[str, Any], state: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: p.contiguous() for name, p in state.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("shape", [SHAPES["gqa"], SHAPES["tied"]], ids=["gqa", "tied"])
def test_a_published_folder_loads_by_its_architecture(tmp_path: Path, shape: dict[str, Any]) -> None:
    model, ids = tiny_dream(**shape), some_ids(2, 6)
    loaded = load_model(save(tmp_path, CONFIG | shape, model.state_dict()))
    assert isinstance(loaded, Dream) and loaded.config.shifted_logits
    assert torch.equal(loaded(ids), model(ids))


def test_the_published_7b_knows_its_end_of_turn() -> None:
    published = CONFIG | {
        "vocab_size": 152064, "mask_token_id": 151666, "eos_token_id": 151643, "hidden_size": 3584,
        "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944,
    }  # fmt: skip
    config = DreamConfig.from_dict(published)
    assert (config.eot_token_id, config.head_dim, config.logit_size) == (151645, 128, 152064)
    assert DreamConfig.from_dict(CONFIG).eot_token_id is None


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"hidden_act": "gelu"},
            "hidden_act = 'gelu'; Dream checkpoints are supported with hidden_act = 'silu'",
        ),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling = {'type': 'yarn'}"),
        ({"use_sliding_window": True}, "use_sliding_window = True"),
        ({"rope_theta": None}, "config.json lacks rope_theta, which a Dream model needs"),
        ({"mask_token_id": None, "vocab_size": None}, "lacks vocab_size, mask_token_id"),
        ({"hidden_size": "32"}, "hidden_size = '32'; it must be an integer >= 1"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings = 'no'; it must be true or false"),
        ({"eos_token_id": -1}, "eos_token_id = -1; it must be an integer >= 0"),
        ({"rope_theta": True}, "rope_theta = True; it must be a number >= 0"),
        ({"num_attention_heads": 3}, "hidden_size / num_attention_heads must be an even number"),
        ({"num_key_value_heads": 3}, "key/value heads must divide heads"),
        ({"mask_token_id": 40}, "mask_token_id = 40, but the embedding has 40 rows"),
    ],
)
def test_a_wrong_config_is_one_clear_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        DreamConfig.from_dict(CONFIG | changes)
    assert sentence in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model.layers.1.self_attn.k_proj.bias": None}, "lacks model.layers.1.self_attn.k_proj.bias"),
        ({"model.layers.0.self_attn.o_proj.bias": torch.zeros(32)}, "which its config.json does not imply"),
        ({"model.layers.0.mlp.up_proj.weight": torch.zeros(48, 31)}, r"has shape \(48, 31\)"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    tmp_path: Path, change: dict[str, Tensor | None], sentence: str
) -> None:
    state = {name: p for name, p in (tiny_dream().state_dict() | change).items() if p is not None}
    with pytest.raises(ValueError, match=sentence):
        load_model(save(tmp_path, CONFIG, state))


# Quantization -------------------------------------------------------------------------------------

PLAIN = Recipe(GPTQ(), weights=Grid(8), states=TMAS(), num_states=6, batch_size=3, sampler=SAMPLER)
W4A4 = Recipe(
    GPTQ(), weights=Grid(4), inputs=Grid(4), attention=AttentionGrids(Grid(4), Grid(4)), states=TMAS(),
    token_weight=CGQ(), value_scale=IAAQ, value_scale_name="iaaq", num_states=6, batch_size=3,
    sampler=SAMPLER,
)  # fmt: skip


@pytest.mark.parametrize("shape", ["gqa", "mha"])
@pytest.mark.parametrize("method", [GPTQ(), AWQ(n_grid=4)], ids=repr)
def test_the_block_linears_are_quantized_under_published_names(method: Any, shape: str) -> None:
    model, untouched, ids = tiny_dream(**SHAPES[shape]), tiny_dream(**SHAPES[shape]), some_ids(2, 9)
    report = quantize(model, prompts(), Recipe(**(vars(PLAIN) | {"method": method})))
    names = {f"model.layers.{i}.{name}" for i in range(2) for name in LINEARS}
    assert set(quantized_linears(model)) == names
    share = sum(p.numel() for n, p in model.named_parameters() if n.removesuffix(".weight") in names)
    assert report.quantized_share == pytest.approx(share / sum(p.numel() for p in model.parameters()))
    relative = (model(ids) - untouched(ids)).norm() / untouched(ids).norm()
    assert 0 < relative < 0.1  # 8 bits
    biases = [
        m.bias is not None for n, m in quantized_linears(model).items() if "q_proj" in n or "o_proj" in n
    ]
    assert biases == [True, False] * 2


def test_gptq_keeps_the_biases() -> None:
    model, untouched = tiny_dream(), tiny_dream()
    quantize(model, prompts(), PLAIN)
    for dotted, linear in quantized_linears(model).items():
        assert isinstance(linear, QuantLinear)
        if linear.bias is not None:
            assert torch.equal(linear.bias, untouched.get_submodule(dotted).bias)


def test_the_whole_of_dllmquant_runs_and_is_measured() -> None:
    """TMAS, CGQ, IA-AQ at W4A4 with quantized attention; fidelity and divergence on Dream's own process."""
    full, model = tiny_dream(), tiny_dream()
    trajectories = record_trajectories(full, prompts(), SAMPLER, batch_size=3)
    reference = fidelity.reference(full, trajectories, SAMPLER, count=12, batch_size=4)
    same = fidelity.measure(full, reference)
    assert {name: figure["value"] for name, figure in same.values.items()} == {
        "kl": 0, "top1": 1, "argmax_at_k": 1, "slots_at_k": 1, "hidden_error": 0,
    }  # fmt: skip
    assert (
        measure_divergence(full, trajectories, prompts(), SAMPLER, 3).values["final_agreement"]["value"] == 1
    )
    report = quantize(model, prompts(), W4A4, trajectories)
    assert report.states["sampler"] == "tmas" and report.states["sequences"] == 6
    found = fidelity.measure(model, reference)
    assert 0 < found.values["kl"]["value"] < 20 and 0 < found.values["hidden_error"]["value"] < 2
    agreement = measure_divergence(model, trajectories, prompts(), SAMPLER, 3).values["final_agreement"][
        "value"
    ]
    assert 0 <= agreement <= 1


def test_the_committed_tokens_of_fidelity_are_read_one_column_earlier() -> None:
    """Its log p of token i is the raw model's at column i - 1."""
    model = tiny_dream()
    trajectories = record_trajectories(model, prompts(), SAMPLER, batch_size=1)
    reference = fidelity.reference(model, trajectories, SAMPLER, count=5, batch_size=1)
    for state, at, log_probs in zip(reference.states, reference.positions, reference.log_probs, strict=True):
        raw = model(state.tokens).log_softmax(-1)[0]
        torch.testing.assert_close(log_probs, raw[at[0].nonzero()[:, 0] - 1], atol=1e-5, rtol=0)


def test_a_likelihood_reads_one_column_earlier() -> None:
    """A one-token answer has one mask, then an end of text: its log-probability times the drawn weight."""
    model, prompt = tiny_dream(), prompts()[0]
    masked = torch.cat([prompt, torch.tensor([MASK, model.config.eos_token_id])])[None]
    draws = torch.Generator().manual_seed(5)
    at, p = bernoulli_masks(1, masked.shape[1], 4, 1e-3, draws)
    weight = float((at[:, 0] / p).sum()) / 4
    assert weight > 0
    for token in (3, 17):
        expected = weight * float(model(masked).log_softmax(-1)[0, -3, token])
        rng = torch.Generator().manual_seed(5)
        found = log_likelihood(model, prompt, torch.tensor([token]), 4, 4, generator=rng)
        assert found == pytest.approx(expected, abs=1e-4)


def test_config_survives_asdict() -> None:
    config = DreamConfig.from_dict(CONFIG)
    assert DreamConfig(**asdict(config)) == config

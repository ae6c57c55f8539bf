"""A quantized model that is saved and loaded gives the same logits, bit for bit in fp32."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_folders import CONFIGS, HEADS, logits, quantized, save_source, source, states

from dllmq.checkpoint import (
    ShardWriter,
    block_settings,
    describe,
    load_quantized,
    save_quantized,
    stored_tensors,
    write_companions,
)
from dllmq.methods import AWQ, GPTQ, RTN
from dllmq.models import load_model
from dllmq.models.attention import QuantizedProduct
from dllmq.models.linear import InputQuantLinear
from dllmq.models.stored import RECORD
from dllmq.numerics import Grid
from dllmq.pipeline import quantize, quantized_linears, set_backend, weight_bytes
from dllmq.recipe import AttentionGrids, Recipe

CT, GPTQ_FORMAT, DENSE = "compressed_tensors", "gptq", "dequantized"
ATTENTION = AttentionGrids(P=Grid(8), V=Grid(4), QK=Grid(8))
ORDERED = GPTQ(act_order=True)
CASES: list[tuple[str, str, dict[str, Any]]] = [
    *[("llada", CT, {"weights": Grid(b, symmetric=s)}) for b in range(2, 9) for s in (False, True)],
    *[("llada", CT, {"weights": Grid(b, 32, s)}) for b in (3, 4) for s in (False, True)],
    *[("dream", CT, {"weights": Grid(8, g), "inputs": Grid(8)}) for g in (-1, 0, 16)],
    ("llada", CT, {"weights": Grid(8, symmetric=True), "inputs": Grid(8, symmetric=True)}),
    ("llada", CT, {"weights": Grid(4), "inputs": Grid(4, 16), "attention": ATTENTION}),
    ("dream", CT, {"weights": Grid(4), "inputs": Grid(8), "attention": AttentionGrids(V=Grid(6))}),
    ("dream", CT, {"weights": Grid(3, 0)}),
    ("dream", CT, {"weights": Grid(4, 16), "method": AWQ(n_grid=4)}),
    ("llada", CT, {"weights": Grid(2), "method": ORDERED}),
    ("llada", CT, {"weights": Grid(4, 16), "method": GPTQ(act_order=True, static_groups=True)}),
    *[("dream", GPTQ_FORMAT, {"weights": Grid(b, 32, s)}) for b in (2, 3, 4, 8) for s in (False, True)],
    ("llada", GPTQ_FORMAT, {"weights": Grid(4), "method": AWQ(n_grid=4), "attention": ATTENTION}),
    ("llada", GPTQ_FORMAT, {"weights": Grid(4, 16), "method": ORDERED}),
    ("dream", GPTQ_FORMAT, {"weights": Grid(3, 16, True), "method": ORDERED}),
    ("dream", DENSE, {"weights": Grid(5)}),
    ("llada", DENSE, {"weights": Grid(4, 0), "inputs": Grid(4), "attention": ATTENTION}),
    ("dream", DENSE, {"weights": Grid(4, 16), "inputs": Grid(8), "method": ORDERED}),
]


@pytest.mark.parametrize(("architecture", "format", "how"), CASES, ids=str)
def test_logits_are_the_same(tmp_path: Path, architecture: str, format: str, how: dict[str, Any]) -> None:
    model = quantized(architecture, **how)
    size = save_quantized(model, tmp_path / "out", format, source(architecture))
    assert size == sum(f.stat().st_size for f in (tmp_path / "out").iterdir())
    loaded = load_model(tmp_path / "out")
    want = logits(model)
    assert torch.equal(logits(loaded), want) and not torch.equal(
        want, logits(load_model(source(architecture)))
    )
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize(
    ("format", "how"), [(CT, {"weights": Grid(3, 32)}), (GPTQ_FORMAT, {"weights": Grid(4)})]
)
def test_a_streamed_folder_keeps_its_codes_alone(tmp_path: Path, format: str, how: dict[str, Any]) -> None:
    save_quantized(quantized("llada", **how), tmp_path, format, source("llada"))
    whole, streamed = load_model(tmp_path), load_model(tmp_path, stream=True)
    linears = quantized_linears(streamed)
    assert linears.keys() == quantized_linears(whole).keys()
    assert all(linear.is_compact for linear in linears.values())
    assert torch.equal(logits(streamed), logits(whole))


def test_a_loaded_model_is_the_saved_one_in_its_parts(tmp_path: Path) -> None:
    """Codes, scales, zeros, input grids shared by the same linears, the product's parameters."""
    model = quantized("dream", Grid(4), Grid(8), ATTENTION)
    save_quantized(model, tmp_path, CT, source("dream"), max_shard_bytes=4000)
    loaded = load_quantized(tmp_path)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 5
    ours, theirs = quantized_linears(model), quantized_linears(loaded)
    assert ours.keys() == theirs.keys() and len(ours) == 14
    for name, linear in ours.items():
        a, b = linear.quantized, theirs[name].quantized
        assert a.grid == b.grid and torch.equal(a.codes, b.codes)
        assert torch.equal(a.scale, b.scale) and torch.equal(a.zero, b.zero)
        assert (linear.inputs.grid, linear.inputs.readers) == (
            theirs[name].inputs.grid,
            theirs[name].inputs.readers,
        )
    block = loaded.blocks[1]
    assert block.q_proj.inputs is block.v_proj.inputs is not block.o_proj.inputs
    for a, b in zip(model.blocks, loaded.blocks, strict=True):
        assert isinstance(b.product, QuantizedProduct)
        assert (a.product.p_grid, a.product.v_grid, a.product.qk_grid) == (Grid(8), Grid(4), Grid(8))
        assert torch.equal(a.product.v_params.scale, b.product.v_params.scale)
        assert torch.equal(a.product.v_params.zero, b.product.v_params.zero)
    assert weight_bytes(loaded) == weight_bytes(model)


def test_the_packed_backend_takes_a_loaded_model(tmp_path: Path) -> None:
    model = quantized("llada", Grid(4), Grid(8))
    save_quantized(model, tmp_path, CT, source("llada"))
    loaded = load_quantized(tmp_path)
    assert set_backend(model, "packed") == set_backend(loaded, "packed") != "fake"
    assert torch.equal(logits(loaded), logits(model))


def test_bfloat16_models_come_back_too(tmp_path: Path) -> None:
    model = quantized("dream", Grid(4, 16), Grid(8), dtype=torch.bfloat16)
    for format in (CT, DENSE):
        save_quantized(model, tmp_path / format, format, source("dream"))
        assert torch.equal(logits(load_model(tmp_path / format, dtype=torch.bfloat16)), logits(model))


def test_a_tied_head_is_no_tensor(tmp_path: Path) -> None:
    tied = save_source(tmp_path / "tied", "dream", tie_word_embeddings=True)
    model = load_model(tied)
    quantize(model, [], Recipe(RTN(), Grid(4)), states=states("dream"))
    save_quantized(model, tmp_path / "out", CT, tied)
    assert torch.equal(logits(load_model(tmp_path / "out")), logits(model))


def test_a_loop_over_blocks_writes_the_same_files(tmp_path: Path) -> None:
    """As a program does that has one block at a time."""
    model = quantized("dream", Grid(4), Grid(8), ATTENTION)
    save_quantized(model, tmp_path / "whole", CT, source("dream"))
    layout, settings = "pack-quantized", []
    with ShardWriter(tmp_path / "loop") as writer:
        for index, block in enumerate(model.blocks):
            prefix = f"model.layers.{index}."
            settings.append(block_settings(block, model.topology, prefix))
            for name, tensor in stored_tensors(block, prefix, layout):
                writer.add(name, tensor)
        for name in ("model.embed_tokens", "model.norm", "lm_head"):
            for full, tensor in stored_tensors(model.get_submodule(name), f"{name}.", layout):
                writer.add(full, tensor)
        write_companions(writer, describe(settings, layout), model.topology.head, source("dream"))
        writer.finish()
    whole, loop = ({f.name: f for f in (tmp_path / name).iterdir()} for name in ("whole", "loop"))
    assert whole.keys() == loop.keys()
    for name in whole.keys() - {"model.safetensors"}:
        assert whole[name].read_bytes() == loop[name].read_bytes()
    a, b = load_file(whole["model.safetensors"]), load_file(loop["model.safetensors"])
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


# ------------------------------------------------------------------ what lies in the folder


def test_bytes_on_disk_are_those_of_the_width(tmp_path: Path) -> None:
    """Tensors are at most what `weight_bytes` says, plus 16 bytes of weight_shape a linear."""
    sizes = {}
    for bits in (2, 3, 4, 8):
        model = quantized("llada", Grid(bits))
        save_quantized(model, tmp_path / str(bits), CT, source("llada"))
        tensors = load_file(tmp_path / str(bits) / "model.safetensors")
        sizes[bits] = sum(t.numel() * t.element_size() for t in tensors.values())
        assert sizes[bits] == weight_bytes(model) + 16 * 14
    weights = sum(m.weight.numel() for m in quantized_linears(model).values())
    assert sizes[8] - sizes[4] - (sizes[4] - sizes[2]) * 2 == 0 and sizes[4] - sizes[3] >= weights // 8


def test_companions_go_along(tmp_path: Path) -> None:
    made = save_source(tmp_path / "made", "llada")
    for name in ("modeling_llada.py", "README.md", "pytorch_model.bin", "model.safetensors.index.json"):
        (made / name).write_text("{}" if name.endswith("json") else "x = 1")
    (made / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model.safetensors"}, "metadata": {}})
    )
    model = quantized("llada", Grid(4))
    save_quantized(model, tmp_path / "out", GPTQ_FORMAT, made)
    assert {f.name for f in (tmp_path / "out").iterdir()} == {
        "config.json", "quantize_config.json", RECORD, "model.safetensors", "tokenizer.json",
        "generation_config.json", "chat_template.jinja", "modeling_llada.py",
    }  # fmt: skip
    for name in ("tokenizer.json", "modeling_llada.py"):
        assert (tmp_path / "out" / name).read_bytes() == (made / name).read_bytes()


@pytest.mark.parametrize("architecture", ["llada", "dream"])
def test_config_is_the_published_one_and_the_quantization(tmp_path: Path, architecture: str) -> None:
    model = quantized(architecture, Grid(4, 32, True), Grid(8, 16))
    save_quantized(model, tmp_path / "ct", CT, source(architecture))
    config = json.loads((tmp_path / "ct" / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == CONFIGS[architecture]
    assert (quantization["quant_method"], quantization["format"]) == ("compressed-tensors", "pack-quantized")
    assert quantization["ignore"] == [HEADS[architecture]]
    group = quantization["config_groups"]["group_0"]
    assert group["format"] == "pack-quantized" and group["targets"] == ["Linear"]
    assert group["weights"] == {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32,
        "dynamic": False,
    }  # fmt: skip
    assert group["input_activations"] == {
        "num_bits": 8, "type": "int", "symmetric": False, "strategy": "group", "group_size": 16,
        "dynamic": True,
    }  # fmt: skip
    save_quantized(model, tmp_path / "dense", DENSE, source(architecture))
    assert json.loads((tmp_path / "dense" / "config.json").read_text()) == CONFIGS[architecture]


@pytest.mark.parametrize(
    ("weights", "method", "version", "ordered"),
    [
        (Grid(4, 16, True), None, "gptq", False),
        (Grid(4, 16), None, "gptq_v2", False),
        (Grid(4, 16), ORDERED, "gptq_v2", True),
        (Grid(4, -1), ORDERED, "gptq_v2", False),  # one group: its columns have no order
    ],
)
def test_gptq_config(tmp_path: Path, weights: Grid, method: GPTQ | None, version: str, ordered: bool) -> None:
    save_quantized(quantized("llada", weights, method=method), tmp_path, GPTQ_FORMAT, source("llada"))
    found = json.loads((tmp_path / "quantize_config.json").read_text())
    assert found == json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (found["bits"], found["group_size"], found["sym"]) == (4, weights.group_size, weights.symmetric)
    assert (found["checkpoint_format"], found["desc_act"]) == (version, ordered)


def test_the_record_says_how_it_was_made(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = quantized("llada", Grid(4), Grid(8), AttentionGrids(V=Grid(8)))
    with caplog.at_level(logging.INFO, "dllmq"):
        save_quantized(model, tmp_path / "a", CT, source("llada"), {"command": "python -m dllmq.run"})
        save_quantized(model, tmp_path / "b", DENSE, source("llada"))
    assert "linears only (the attention product's grids are in dllmq_quantization.json)" in caplog.messages[0]
    assert "plain weights only (the attention product's grids and the inputs' grid are" in caplog.messages[1]
    record = json.loads((tmp_path / "a" / RECORD).read_text())
    assert record["run"] == {"command": "python -m dllmq.run"} and record["source"]["name"] == "llada"
    digest = hashlib.sha256((source("llada") / "model.safetensors").read_bytes()).hexdigest()
    assert record["source"]["sha256"] == {"model.safetensors": digest}
    assert record["weights"] == {"bits": 4, "group_size": -1, "symmetric": False}
    assert len(record["linears"]) == 14 and len(record["values"]) == 2


def test_scales_are_stored_in_fp32_and_the_rest_in_bf16_where_it_was(tmp_path: Path) -> None:
    save_quantized(quantized("dream", Grid(4)), tmp_path, CT, source("dream"))
    types = {name: t.dtype for name, t in load_file(tmp_path / "model.safetensors").items()}
    scales = {t for name, t in types.items() if name.endswith("weight_scale")}
    packed = ("weight_scale", "weight_packed", "weight_shape", "weight_zero_point")
    assert scales == {torch.float32}
    assert {t for name, t in types.items() if not name.endswith(packed)} == {torch.bfloat16}


def test_norms_that_awq_changed_are_stored_in_fp32(tmp_path: Path) -> None:
    model = quantized("llada", Grid(4), method=AWQ(n_grid=4))
    save_quantized(model, tmp_path, CT, source("llada"))
    stored = load_file(tmp_path / "model.safetensors")["model.transformer.blocks.0.attn_norm.weight"]
    assert stored.dtype == torch.float32 and torch.equal(stored, model.blocks[0].attn_norm.weight)


def test_dequantized_linears_quantize_their_inputs(tmp_path: Path) -> None:
    save_quantized(quantized("dream", Grid(4), Grid(8)), tmp_path, DENSE, source("dream"))
    block = load_model(tmp_path).blocks[0]
    assert isinstance(block.up_proj, InputQuantLinear) and block.up_proj.inputs is block.gate_proj.inputs
    assert (block.up_proj.inputs.grid, block.up_proj.inputs.readers) == (Grid(8), 2)
    assert torch.equal(block.q_proj.bias, load_model(source("dream")).blocks[0].q_proj.bias)


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("format", "how", "said"),
    [
        (GPTQ_FORMAT, {"weights": Grid(4), "inputs": Grid(8)}, "has no quantized inputs (these have 8 bits)"),
        (GPTQ_FORMAT, {"weights": Grid(5)}, "2, 3, 4 or 8 bits, not 5"),
        (GPTQ_FORMAT, {"weights": Grid(4, 0)}, "group_size=-1"),
        (CT, {"weights": Grid(4, 16), "method": ORDERED}, "method.static_groups=true"),
        (
            "awq",
            {"weights": Grid(4)},
            "export=awq is not known; it is null, compressed_tensors, gptq, dequant",
        ),
    ],
)
def test_what_a_format_cannot_hold_leaves_no_folder(
    tmp_path: Path, format: str, how: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError) as error:
        save_quantized(quantized("llada", **how), tmp_path / "out", format, source("llada"))
    assert said in str(error.value) and not (tmp_path / "out").exists()


def test_full_precision_is_not_exported_or_read_as_quantized(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="in full precision: quantize"):
        save_quantized(load_model(source("llada")), tmp_path / "out", CT, source("llada"))
    with pytest.raises(ValueError, match=r"in full precision; load_model reads it\."):
        load_quantized(source("llada"))


def test_the_source_is_not_written_over(tmp_path: Path) -> None:
    made, model = save_source(tmp_path / "made", "llada"), quantized("llada", Grid(4))
    with pytest.raises(ValueError, match="is the source's own"):
        save_quantized(model, made, CT, made)
    with pytest.raises(ValueError, match="so it is no earlier export"):
        save_quantized(model, made, CT, source("llada"))


@pytest.mark.parametrize("format", [CT, DENSE])
def test_a_quantized_folder_is_not_quantized_again(tmp_path: Path, format: str) -> None:
    save_quantized(quantized("llada", Grid(4)), tmp_path, format, source("llada"))
    with pytest.raises(ValueError, match="quantized already"):
        quantize(load_model(tmp_path), [], Recipe(GPTQ(), Grid(4)), states=[])

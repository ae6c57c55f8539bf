"""Folders that other programs wrote, and what is wrong with a folder: one sentence, from the headers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_folders import HEADS, logits, quantized, source
from torch import Tensor

from dllmq.checkpoint import save_quantized
from dllmq.models import load_model, quantized_loading
from dllmq.models.stored import RECORD, from_config
from dllmq.numerics import Grid
from dllmq.pipeline import quantized_linears
from dllmq.recipe import AttentionGrids

CT, GPTQ, DENSE = "compressed_tensors", "gptq", "dequantized"
Q = "model.transformer.blocks.0.q_proj"


def export(folder: Path, format: str = CT, architecture: str = "llada", **how: Any) -> Any:
    model = quantized(architecture, **({"weights": Grid(4, 32)} | how))
    save_quantized(model, folder, format, source(architecture))
    return model


def change(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    state = load_file(folder / "model.safetensors")
    edit(state)
    save_file(state, folder / "model.safetensors")


def edit_json(file: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(file.read_text())
    edit(value)
    file.write_text(json.dumps(value))


# ------------------------------------------------------------------ other programs' folders


@pytest.mark.parametrize("format", [CT, GPTQ])
@pytest.mark.parametrize("symmetric", [False, True])
def test_without_our_record_the_linears_load(tmp_path: Path, format: str, symmetric: bool) -> None:
    model = export(tmp_path, format, weights=Grid(4, 32, symmetric))
    (tmp_path / RECORD).unlink()
    assert torch.equal(logits(load_model(tmp_path)), logits(model))


def test_inputs_come_from_the_config_and_attention_from_the_record_only(tmp_path: Path) -> None:
    grids = {"weights": Grid(4), "inputs": Grid(8, 16)}
    model, plain = export(tmp_path, attention=AttentionGrids(V=Grid(2)), **grids), quantized("llada", **grids)
    assert torch.equal(logits(load_model(tmp_path)), logits(model))
    (tmp_path / RECORD).unlink()
    assert torch.equal(logits(load_model(tmp_path)), logits(plain))


def test_a_folder_that_leaves_some_linears_alone(tmp_path: Path) -> None:
    model, plain = export(tmp_path), load_model(source("llada"))
    (tmp_path / RECORD).unlink()

    def restore(state: dict[str, Tensor]) -> None:
        for suffix in ("packed", "scale", "shape", "zero_point"):
            del state[f"{Q}.weight_{suffix}"]
        state[f"{Q}.weight"] = plain.blocks[0].q_proj.weight.contiguous()

    change(tmp_path, restore)
    loaded = load_model(tmp_path)
    assert quantized_linears(model).keys() - quantized_linears(loaded).keys() == {Q}
    assert torch.equal(loaded.blocks[0].q_proj.weight, plain.blocks[0].q_proj.weight)


def test_a_gptq_folder_in_the_older_fashion(tmp_path: Path) -> None:
    """Half-precision scales, zero biases where the model has none, the config in a file of its own, g_idx."""
    model = export(tmp_path, GPTQ, weights=Grid(4, 32, True))

    def old(state: dict[str, Tensor]) -> None:
        for name in [n for n in state if n.endswith("scales")]:
            state[name] = state[name].half()
            state[name.replace("scales", "bias")] = torch.zeros(state[name].shape[1]).half()

    change(tmp_path, old)
    (tmp_path / RECORD).unlink()
    edit_json(tmp_path / "config.json", lambda c: c.pop("quantization_config"))
    edit_json(
        tmp_path / "quantize_config.json", lambda c: [c.pop("quant_method"), c.pop("checkpoint_format")]
    )
    loaded = load_model(tmp_path)
    for name, linear in quantized_linears(loaded).items():
        ours = quantized_linears(model)[name].quantized
        assert torch.equal(linear.quantized.codes, ours.codes)
        assert torch.equal(linear.quantized.scale, ours.scale.half().float())


def test_version_1_zeros_wrap(tmp_path: Path) -> None:
    """z is stored less 1: 15 of four bits is the zero 0."""
    export(tmp_path, GPTQ)
    (tmp_path / RECORD).unlink()
    change(
        tmp_path, lambda state: state.__setitem__(f"{Q}.qzeros", torch.full_like(state[f"{Q}.qzeros"], -1))
    )
    for file in ("config.json", "quantize_config.json"):
        edit_json(tmp_path / file, lambda c: c.get("quantization_config", c).update(checkpoint_format="gptq"))
    assert set(load_model(tmp_path).blocks[0].q_proj.quantized.zero.flatten().tolist()) == {0.0}


# ------------------------------------------------------------------ what is wrong


@pytest.fixture
def sentence(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], str]:
    """The message with which a folder is refused; reading a weight before that fails the test."""

    def reader(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a weight was read before everything was checked")

    def refuse(folder: Path) -> str:
        monkeypatch.setattr(quantized_loading, "_reader", reader)
        with pytest.raises(ValueError) as error:
            load_model(folder)
        message = str(error.value)
        assert "\n" not in message and message.endswith(".")
        return message

    return refuse


Sentence = Callable[[Path], str]


@pytest.mark.parametrize(
    ("format", "suffix"),
    [
        (CT, "weight_scale"),
        (CT, "weight_packed"),
        (CT, "weight_zero_point"),
        (GPTQ, "g_idx"),
        (GPTQ, "qweight"),
    ],
)
@pytest.mark.parametrize("ours", [True, False])
def test_a_missing_tensor(tmp_path: Path, sentence: Sentence, format: str, suffix: str, ours: bool) -> None:
    export(tmp_path, format)
    change(tmp_path, lambda state: state.pop(f"{Q}.{suffix}"))
    if not ours:
        (tmp_path / RECORD).unlink()
    message = sentence(tmp_path)
    assert f"lacks {Q}.{suffix}" in message and (f"{RECORD} says {Q} is quantized" in message) == ours


@pytest.mark.parametrize(
    ("suffix", "tensor", "said"),
    [
        (
            "weight_packed",
            torch.zeros(64, 4, dtype=torch.int32),
            "shape (64, 4); config.json implies (64, 8)",
        ),
        ("weight_packed", torch.zeros(64, 8), "has type F32; config.json implies I32"),
        ("weight_scale", torch.zeros(64, 1), "shape (64, 1); config.json implies (64, 2)"),
        (
            "weight_scale",
            torch.zeros(64, 2, dtype=torch.int32),
            "has type I32; config.json implies F32 or F16",
        ),
        ("weight", torch.zeros(64, 64), f"has the tensor {Q}.weight, which its config.json does not imply"),
    ],
)
def test_a_wrong_tensor(tmp_path: Path, sentence: Sentence, suffix: str, tensor: Tensor, said: str) -> None:
    export(tmp_path)
    change(tmp_path, lambda state: state.__setitem__(f"{Q}.{suffix}", tensor))
    assert said in sentence(tmp_path)


def test_a_quantized_head_is_not_read(tmp_path: Path, sentence: Sentence) -> None:
    export(tmp_path)
    name = f"{HEADS['llada']}.weight_packed"
    change(tmp_path, lambda state: state.__setitem__(name, torch.zeros(40, 8, dtype=torch.int32)))
    assert f"has the tensor {name}" in sentence(tmp_path)


def test_a_truncated_shard(tmp_path: Path, sentence: Sentence) -> None:
    export(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-1])
    assert "damaged or cut short" in sentence(tmp_path)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ({"quant_method": "awq"}, "quant_method = 'awq'"),
        ({"quant_method": None}, "quant_method = None"),
        ({"format": "nvfp4-pack-quantized", "config_groups": {"a": {}}}, "format = 'nvfp4-pack-quantized'"),
        ({"config_groups": {"a": {}, "b": {}}}, "config_groups = ['a', 'b']"),
        ({"config_groups": {"a": {"format": "pack-quantized"}}}, "incomplete (KeyError('weights'))"),
        ({"config_groups": None}, "incomplete"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme = {'num_bits': 8}"),
    ],
)
def test_a_config_that_is_not_read(
    tmp_path: Path, sentence: Sentence, edit: dict[str, Any], said: str
) -> None:
    export(tmp_path)
    (tmp_path / RECORD).unlink()
    edit_json(tmp_path / "config.json", lambda c: c["quantization_config"].update(edit))
    assert said in sentence(tmp_path)


@pytest.mark.parametrize(
    ("part", "edit", "said"),
    [
        ("weights", {"num_bits": 1}, "weights.num_bits = '1 (group_size 32, symmetric False)'"),
        ("weights", {"type": "float"}, "weights.type = 'float'"),
        ("weights", {"strategy": "block"}, "weights.strategy = 'block'"),
        ("weights", {"dynamic": True}, "weights.dynamic = True"),
        ("input_activations", {"dynamic": False}, "input_activations.dynamic = False"),
        ("input_activations", {"strategy": "tensor"}, "input_activations.strategy = 'tensor'"),
    ],
)
def test_arguments_that_are_not_read(part: str, edit: dict[str, Any], said: str) -> None:
    args = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}
    group: dict[str, Any] = {"format": "pack-quantized", "weights": args, "input_activations": None}
    group[part] = args | {"dynamic": part != "weights"} | edit
    with pytest.raises(ValueError) as error:
        from_config({"quant_method": "compressed-tensors", "config_groups": {"group_0": group}})
    assert said in str(error.value) and "dllmq reads compressed-tensors" in str(error.value)


def test_a_config_of_another_width(tmp_path: Path, sentence: Sentence) -> None:
    """The record disagrees; without one, the packed tensors do."""
    export(tmp_path)

    def widen(config: dict[str, Any]) -> None:
        config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 8

    edit_json(tmp_path / "config.json", widen)
    message = sentence(tmp_path)
    assert f"{RECORD} says weights = Grid(bits=4" in message and "Grid(bits=8" in message
    (tmp_path / RECORD).unlink()
    assert "has shape (64, 8); config.json implies (64, 16)" in sentence(tmp_path)


def test_a_group_size_that_does_not_divide(tmp_path: Path, sentence: Sentence) -> None:
    export(tmp_path)
    (tmp_path / RECORD).unlink()

    def widen(config: dict[str, Any]) -> None:
        config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = 48

    edit_json(tmp_path / "config.json", widen)
    assert f"{Q}: group_size 48 does not divide" in sentence(tmp_path)


def test_packed_tensors_of_a_config_without_quantization(tmp_path: Path, sentence: Sentence) -> None:
    export(tmp_path)
    edit_json(tmp_path / "config.json", lambda c: c.pop("quantization_config"))
    assert f"{RECORD} says pack-quantized, but config.json has no quantization_config" in sentence(tmp_path)


def test_a_quantization_config_over_plain_weights(tmp_path: Path, sentence: Sentence) -> None:
    export(tmp_path / "ct")
    export(tmp_path / "dense", DENSE)
    (tmp_path / "dense" / RECORD).unlink()
    (tmp_path / "dense" / "config.json").write_bytes((tmp_path / "ct" / "config.json").read_bytes())
    assert "but no linear of a block has such tensors" in sentence(tmp_path / "dense")


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda r: r.update(version=2), "has version = 2, this dllmq reads 1"),
        (lambda r: r.pop("weights"), "is damaged"),
        (lambda r: r["weights"].update(bits=99), "is damaged"),
        (lambda r: r["values"][0]["scale"].update(shape=[3]), "is damaged"),
        (lambda r: r["linears"].append("lm_head"), "names lm_head, which is no linear of a block"),
        (lambda r: r["values"].pop(), "scales of V for another model"),
        (lambda r: r["values"][0]["scale"].update(shape=[1, 2, 1]), "scales of V for another model"),
        (lambda r: r.update(values=[]), "a grid of V or V's scales, but not both"),
    ],
)
def test_a_record_that_cannot_be(
    tmp_path: Path, sentence: Sentence, edit: Callable[[dict[str, Any]], Any], said: str
) -> None:
    export(tmp_path, attention=AttentionGrids(V=Grid(8)))
    edit_json(tmp_path / RECORD, edit)
    assert said in sentence(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_record_that_is_no_json(tmp_path: Path, sentence: Sentence, text: str) -> None:
    export(tmp_path)
    (tmp_path / RECORD).write_text(text)
    assert RECORD in sentence(tmp_path)


def test_contradictions_inside_a_tensor_name_the_linear(tmp_path: Path) -> None:
    export(tmp_path)
    change(tmp_path, lambda state: state.__setitem__(f"{Q}.weight_shape", torch.tensor([64, 63])))
    with pytest.raises(ValueError, match=rf"{Q}: weight_shape is \(64, 63\)"):
        load_model(tmp_path)

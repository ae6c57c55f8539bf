"""compressed-tensors folders through transformers' own loader: the same weights, and the same logits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_folders import logits, quantized, source

from dllmq.checkpoint import save_quantized
from dllmq.models import load_model
from dllmq.numerics import Grid
from dllmq.pipeline import quantized_linears

pytest.importorskip("compressed_tensors")

from transformers import AutoModel, AutoModelForCausalLM, CompressedTensorsConfig

import dllmq.models.hf  # noqa: F401 (registers LLaDA and Dream)

SYMMETRIC_8, ASYMMETRIC_8 = Grid(8, -1, True), Grid(8)
PACKED_ASYMMETRIC = [Grid(3), Grid(4, 32)]  # compressed-tensors 0.20 loads their zeros only dequantized
HOW: list[dict[str, Any]] = [
    {"weights": Grid(2, -1, True)},
    {"weights": Grid(4, 32, True)},
    {"weights": Grid(4, 0)},
    {"weights": Grid(5, -1, True), "inputs": Grid(8, 16)},
    {"weights": SYMMETRIC_8, "inputs": SYMMETRIC_8},
    {"weights": ASYMMETRIC_8, "inputs": Grid(4)},
    {"weights": Grid(4, -1, True), "inputs": SYMMETRIC_8},
]


def export(folder: Path, architecture: str, how: dict[str, Any]) -> Any:
    model = quantized(architecture, **how)
    save_quantized(model, folder, "compressed_tensors", source(architecture))
    return model


def as_qwen2(folder: Path) -> None:
    """Dream's tensor names are Qwen2's, so the folder is one of Qwen2 under another config.json."""
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    (folder / "config.json").write_text(json.dumps(config))


def same_weights(model: Any, theirs: Any) -> bool:
    modules, ours = dict(theirs.named_modules()), quantized_linears(model)
    return len(ours) == 14 and all(torch.equal(modules[n].weight, m.weight) for n, m in ours.items())


@pytest.mark.parametrize("how", HOW, ids=str)
def test_qwen2_decompresses_our_weights(tmp_path: Path, how: dict[str, Any]) -> None:
    model = export(tmp_path, "dream", how)
    as_qwen2(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        theirs(torch.arange(6)[None])  # decompresses
        y = theirs.model.layers[1].mlp.up_proj(x)
    assert same_weights(model, theirs)
    torch.testing.assert_close(y, model.blocks[1].up_proj(x), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")  # transformers'
@pytest.mark.parametrize("grid", PACKED_ASYMMETRIC, ids=str)
def test_packed_zeros_need_dequantize(tmp_path: Path, grid: Grid) -> None:
    model = export(tmp_path, "dream", {"weights": grid})
    as_qwen2(tmp_path)
    dense = CompressedTensorsConfig(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, quantization_config=dense)
    assert same_weights(model, theirs)


def test_dequantized_weights_are_a_plain_checkpoint(tmp_path: Path) -> None:
    model = quantized("dream", Grid(3), Grid(8))
    save_quantized(model, tmp_path, "dequantized", source("dream"))
    as_qwen2(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert same_weights(model, theirs) and theirs.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("architecture", ["llada", "dream"])
@pytest.mark.parametrize("how", [HOW[1], HOW[4], HOW[6]], ids=str)
def test_registered_classes_give_our_logits(tmp_path: Path, architecture: str, how: dict[str, Any]) -> None:
    """Inputs are quantized by compressed-tensors' own code there.

    Asymmetric inputs are not in the list: it rounds a zero point as low - min / s in floating point, which
    differs from round(-min / s) + low where -min / s is close to a half.
    """
    model = export(tmp_path, architecture, how)
    theirs = AutoModel.from_pretrained(tmp_path, dtype=torch.float32)
    want = logits(model)
    assert torch.equal(logits(lambda ids, mask: theirs(ids, mask).logits), want)
    assert same_weights(model, theirs)


@pytest.mark.parametrize("architecture", ["llada", "dream"])
def test_registered_classes_read_published_folders(architecture: str) -> None:
    theirs = AutoModel.from_pretrained(source(architecture), dtype=torch.float32)
    ids = torch.arange(12)[None]
    assert torch.equal(theirs(ids).logits, load_model(source(architecture))(ids))
    assert theirs.state_dict().keys() == load_model(source(architecture)).state_dict().keys()

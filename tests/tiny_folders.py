"""Checkpoint folders of tiny random models of each architecture, in the published format, to quantize."""

import json
import math
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dllmq.calibration.states import CalibrationState
from dllmq.diffusion import SamplerConfig
from dllmq.methods import RTN, Method
from dllmq.models import load_model
from dllmq.models.loading import read_config, skeleton
from dllmq.numerics import Grid
from dllmq.pipeline import calibration_states, quantize
from dllmq.recipe import AttentionGrids, Recipe

IDS = {"vocab_size": 40, "mask_token_id": 38, "eos_token_id": 39}
LLADA = IDS | {
    "architectures": ["LLaDAModelLM"],
    "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModel": "modeling_llada.LLaDAModelLM"},
    "model_type": "llada",
    "d_model": 64,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "mlp_hidden_size": 96,
    "max_sequence_length": 32,
    "rope_theta": 10000.0,
    "weight_tying": False,
}
DREAM = IDS | {
    "architectures": ["DreamModel"],
    "model_type": "Dream",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
CONFIGS: dict[str, dict[str, Any]] = {"llada": LLADA, "dream": DREAM}
HEADS = {"llada": "model.transformer.ff_out", "dream": "lm_head"}


def save_source(folder: Path, architecture: str, **changes: Any) -> Path:
    """A full-precision checkpoint with weights in bf16, biases and norms random too."""
    config = CONFIGS[architecture] | changes
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    rng = torch.Generator().manual_seed(1)
    state = {}
    for name, p in skeleton(*read_config(folder)).state_dict().items():
        noise = torch.randn(p.shape, generator=rng)
        small = 0.3 * noise + (not name.endswith("bias"))
        state[name] = (small if p.dim() == 1 else noise * (1.5 / math.sqrt(p.shape[-1]))).bfloat16()
    save_file(state, folder / "model.safetensors")
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja"):
        (folder / name).write_text(json.dumps({"of": name}))
    return folder


@cache
def source(architecture: str) -> Path:
    """One folder for all tests; not to be changed."""
    return save_source(Path(mkdtemp(prefix="dllmq-tiny-")) / architecture, architecture)


@cache
def states(architecture: str) -> list[CalibrationState]:
    model, rng = load_model(source(architecture)), torch.Generator().manual_seed(2)
    prompts = [torch.randint(0, 37, (n,), generator=rng) for n in (5, 3)]
    remasking = "low_confidence" if architecture == "llada" else "entropy"
    sampler = SamplerConfig(gen_length=8, steps=4, block_length=8, remasking=remasking)
    return calibration_states(
        model, prompts, Recipe(RTN(), Grid(4), num_states=4, batch_size=4, sampler=sampler)
    )


def quantized(
    architecture: str,
    weights: Grid,
    inputs: Grid | None = None,
    attention: AttentionGrids | None = None,
    method: Method | None = None,
    dtype: torch.dtype = torch.float32,
) -> Any:
    model = load_model(source(architecture), dtype=dtype)
    recipe = Recipe(method or RTN(), weights, inputs, attention or AttentionGrids())
    quantize(model, [], recipe, states=states(architecture))
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """With a padded row."""
    ids = torch.arange(24).reshape(2, 12)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return model(ids, mask)

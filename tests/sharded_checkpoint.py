"""Tiny random LLaDA and Dream checkpoints as they are published: bf16, in shards, with an index."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dllmq.models.dream import Dream, DreamConfig
from dllmq.models.llada import LLaDA, LLaDAConfig

VOCAB, EOT, MASK, EOS = 40, 37, 38, 39
_COMMON = {"vocab_size": VOCAB, "mask_token_id": MASK, "eos_token_id": EOS, "rope_theta": 10000.0}
CONFIGS: dict[str, dict[str, Any]] = {
    "llada": _COMMON
    | {"architectures": ["LLaDAModelLM"], "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2}
    | {"mlp_hidden_size": 48, "eot_token_id": EOT, "max_sequence_length": 64},
    "dream": _COMMON
    | {"architectures": ["DreamModel"], "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "intermediate_size": 48},
}


def save_sharded(folder: Path, architecture: str, shards: int = 3, **changes: Any) -> Path:
    """Writes config and weights; norms and biases are random too, so that none is mistaken for another."""
    config = CONFIGS[architecture] | changes
    build: Any = LLaDA if architecture == "llada" else Dream
    parse: Any = LLaDAConfig if architecture == "llada" else DreamConfig
    model, rng = build(parse.from_dict(config)), torch.Generator().manual_seed(3)
    state = {}
    for name, p in model.state_dict().items():
        x = torch.randn(p.shape, generator=rng)
        scale = 1.2 / math.sqrt(p.shape[1]) if p.dim() == 2 else 0.3
        shift = 1 if p.dim() == 1 and not name.endswith("bias") else 0
        state[name] = (shift + scale * x).bfloat16()
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    names, weight_map = sorted(state), {}
    for n in range(shards):  # a block's tensors lie in all of them
        file = f"model-{n + 1:05}-of-{shards:05}.safetensors"
        save_file({name: state[name] for name in names[n::shards]}, folder / file)
        weight_map |= dict.fromkeys(names[n::shards], file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder

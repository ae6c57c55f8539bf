"""A checkpoint folder of a tiny random LLaDA that reads and writes the embedded model's tokens."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dllmq.config import EMBEDDED
from dllmq.models.llada import LLaDA, LLaDAConfig

DIMENSIONS = {"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "mlp_hidden_size": 48}


def save_checkpoint(folder: Path, **changes: Any) -> Path:
    """Writes config, weights and tokenizer; `changes` are fields of config.json."""
    config = json.loads((EMBEDDED / "config.json").read_text()) | DIMENSIONS | changes
    model = LLaDA(LLaDAConfig.from_dict(config))
    model.init_weights(torch.Generator().manual_seed(1), gain=4.0)  # no two logits are close
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    state = {name: p.detach().bfloat16().contiguous() for name, p in model.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED / name, folder)
    return folder

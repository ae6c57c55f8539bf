"""Loading a quantized folder; `dllmq.models.load_model` does the same, and takes full-precision ones too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dllmq.models.loading import checkpoint_folder, load_model
from dllmq.models.stored import read_stored


def load_quantized(
    folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Any:
    """The quantized model of a folder (or hub id); `model.stored` says how it is quantized.

    Raises:
        ValueError: the folder is in full precision, or anything `load_model` refuses.
    """
    found = checkpoint_folder(folder)
    if (found / "config.json").is_file() and read_stored(found) is None:
        raise ValueError(f"{folder} is in full precision; load_model reads it.")
    return load_model(found, device, dtype)

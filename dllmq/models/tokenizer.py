"""The checkpoint's own tokenizer; never remote code."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer saved in a checkpoint folder.

    Raises:
        ValueError: the folder has none that can be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), padding_side="left")
    except Exception as error:  # the library raises many kinds
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"the tokenizer in {folder} cannot be read: {first}") from error

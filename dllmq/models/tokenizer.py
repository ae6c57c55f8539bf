"""The checkpoint's own tokenizer; never remote code."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer saved in a checkpoint folder.

    Raises:
        ValueError: the folder has none that can be read.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    saved_whole = (
        Path(folder) / "tokenizer.json"
    ).is_file()  # then no other class, and no config.json, is needed
    loader = PreTrainedTokenizerFast if saved_whole else AutoTokenizer
    try:
        return loader.from_pretrained(str(folder), padding_side="left")
    except Exception as error:  # the library raises many kinds
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"the tokenizer in {folder} cannot be read: {first}") from error

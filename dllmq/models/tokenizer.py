"""The checkpoint's own tokenizer; never remote code."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer saved in a checkpoint folder; a mask token that it lacks is taken from config.json.

    Raises:
        ValueError: the folder has none that can be read.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    saved_whole = (
        Path(folder) / "tokenizer.json"
    ).is_file()  # then no other class, and no config.json, is needed
    loader = PreTrainedTokenizerFast if saved_whole else AutoTokenizer
    try:
        tokenizer = loader.from_pretrained(str(folder), padding_side="left")
    except Exception as error:  # the library raises many kinds
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"the tokenizer in {folder} cannot be read: {first}") from error
    _settle_mask_token(tokenizer, Path(folder) / "config.json")
    return tokenizer


def _settle_mask_token(tokenizer: Any, config: Path) -> None:
    """Declares config.json's mask token where the tokenizer has none, and says so (LLaDA's declares none).

    The model masks with config.json's id in any case; a tokenizer that names another one is only told of.
    """
    try:
        mask_id = json.loads(config.read_text(encoding="utf-8")).get("mask_token_id")
    except (OSError, ValueError, AttributeError):
        return  # no config.json, or a damaged one: read_config says what is wrong with it
    own = tokenizer.mask_token_id
    if not isinstance(mask_id, int) or own == mask_id:
        return
    text = tokenizer.convert_ids_to_tokens(mask_id)
    if own is not None:
        log.warning("%s: mask_token_id is %d (%s), the tokenizer's %d (%s); the model masks with the first",
                    config, mask_id, text, own, tokenizer.mask_token)  # fmt: skip
    elif text is None:
        log.info("tokenizer: no mask token, and no text for config.json's mask_token_id %d", mask_id)
    else:
        tokenizer.mask_token = text
        log.info("tokenizer: no mask token; %s (%d) is taken from config.json", text, mask_id)

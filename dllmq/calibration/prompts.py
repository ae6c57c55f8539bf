"""Calibration prompts: texts to token ids, and texts from a user's own JSONL file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dllmq.models.tokenizer import render_chat

FIELDS = ("prompt", "question", "text")


def read_prompts(path: Path, count: int) -> list[str]:
    """The first `count` prompts of a JSONL file, from the field "prompt", "question" or "text" of each line.

    Raises:
        ValueError: a line that is no JSON object with such a field, or too few lines.
    """
    texts: list[str] = []
    # not splitlines(): it also splits at U+2028 and the like, which JSON strings may hold
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            doc = json.loads(line)
            text = next(doc[f] for f in FIELDS if isinstance(doc.get(f), str))
        except (json.JSONDecodeError, AttributeError, StopIteration) as error:
            raise ValueError(
                f"{path}, line {number}: need a JSON object with one of {', '.join(FIELDS)}."
            ) from error
        texts.append(text)
        if len(texts) == count:
            return texts
    raise ValueError(
        f"{path} has {len(texts)} prompts, but {count} are needed (calibration.num_prompts + "
        "eval.fidelity_prompts): ask for fewer, or add lines."
    )


def encode_prompts(
    texts: list[str], tokenizer: Any, chat_template: bool, add_bos: bool = False
) -> list[Tensor]:
    """Token ids [P] of each text, in the chat layout if asked for; nothing is added but BOS, if asked for
    and no chat layout brings its own.

    Raises:
        ValueError: BOS is asked for, but the tokenizer has none; a chat template that cannot be used.
    """
    bos = [tokenizer.bos_token_id] if add_bos and not chat_template else []
    if None in bos:
        raise ValueError("add_bos=true, but the tokenizer has no BOS token: set model.add_bos=false.")
    if chat_template:
        texts = [
            render_chat(tokenizer, [{"role": "user", "content": text}], add_generation_prompt=True)
            for text in texts
        ]
    ids = [bos + list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    return [torch.tensor(row, dtype=torch.long) for row in ids]

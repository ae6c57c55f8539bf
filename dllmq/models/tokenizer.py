"""The checkpoint's own tokenizer; never remote code."""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment

from dllmq.models.bounds import Exceeded, bounded

log = logging.getLogger(__name__)
QWEN2 = ("DreamTokenizer", "Qwen2Tokenizer", "Qwen2TokenizerFast")
# Published templates have up to some 20,000 characters and render in about a millisecond.
TEMPLATE_CHARACTERS = 100_000
CHAT_CHARACTERS = 1_000_000  # of a rendered chat, beside its messages: far more than any canvas holds
CHAT_SECONDS = 10.0
CHAT_MEMORY = 1 << 30  # bytes


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer saved in a checkpoint folder; a mask token that it lacks is taken from config.json.

    Raises:
        ValueError: the folder has none that can be read without running its code.
    """
    try:
        tokenizer = _read(Path(folder))
    except Exception as error:  # the library raises many kinds
        if "custom code" in str(error):
            raise ValueError(
                f"the tokenizer in {folder} needs the checkpoint's own code, which is never run: put a "
                "tokenizer.json there."
            ) from error
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"the tokenizer in {folder} cannot be read: {first}") from error
    _settle_mask_token(tokenizer, Path(folder) / "config.json")
    return tokenizer


def check_chat_template(folder: Path) -> None:
    """Whether a checkpoint folder says how chats are laid out, told without reading its tokenizer.

    Raises:
        ValueError: it does not.
    """
    if any((folder / name).exists() for name in ("chat_template.jinja", "chat_template.json")):
        return
    try:
        declared = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        declared = {}  # load_tokenizer says what is wrong with it
    if not isinstance(declared, dict) or not declared.get("chat_template"):
        raise ValueError(
            f"prompts are to be wrapped in a chat template, but {folder} has none (chat_template.jinja, or "
            "chat_template in tokenizer_config.json): copy it from the published folder, or set "
            "tasks.chat_template=false."
        )


def render_chat(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> str:
    """The messages in the tokenizer's chat template, which transformers renders in a sandbox of Jinja's.

    A template comes with the checkpoint: its size, its time and memory and what it makes are bounded.

    Args:
        options: of `apply_chat_template`.

    Raises:
        ValueError: there is no template, it fails, asks for what the sandbox does not give or exceeds a
            bound.
    """
    try:
        _check_template(options.get("chat_template") or getattr(tokenizer, "chat_template", None))
        render = partial(tokenizer.apply_chat_template, messages, tokenize=False, **options)
        chat = str(bounded(render, CHAT_SECONDS, CHAT_MEMORY))
        if len(chat) > CHAT_CHARACTERS + sum(len(str(message)) for message in messages):
            raise Exceeded(f"it made {len(chat)} characters of {len(messages)} messages")
    except Exceeded as error:
        raise ValueError(_unusable(str(error))) from None
    except Exception as error:  # a template can raise anything
        first = " ".join(str(error).split())[:200].rstrip(".")
        raise ValueError(_unusable(f"{type(error).__name__}: {first}")) from error
    return chat


def _unusable(why: str) -> str:
    return (
        f"the tokenizer's chat template cannot be used ({why}): set tasks.chat_template=false, or use the "
        "tokenizer of an instruct checkpoint."
    )


def _check_template(template: Any) -> None:
    """Whether a template, or each of several by name, is one to compile.

    Powers are refused: 9 ** 9 ** 9 is one instruction of hours, and no published template has one.

    Raises:
        Exceeded: it is not; with the reason.
    """
    for text in template.values() if isinstance(template, dict) else [template or ""]:
        if len(text) > TEMPLATE_CHARACTERS:
            raise Exceeded(f"it has {len(text)} characters, more than {TEMPLATE_CHARACTERS}")
        if "**" in text and any(token[1:] == ("operator", "**") for token in Environment().lex(text)):
            raise Exceeded("it has the operator **")


def _read(folder: Path) -> Any:
    """By transformers' own classes.

    tokenizer.json needs no other class and no config.json. Dream-org's folders have vocab.json, merges.txt
    and the class DreamTokenizer in tokenization_dream.py, which is Qwen2's slow tokenizer by another name.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

    if (folder / "tokenizer.json").is_file():
        return PreTrainedTokenizerFast.from_pretrained(str(folder), padding_side="left")
    file = folder / "tokenizer_config.json"
    declared = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if declared.get("tokenizer_class") not in QWEN2:
        return AutoTokenizer.from_pretrained(str(folder), padding_side="left", trust_remote_code=False)
    lacking = [name for name in ("vocab.json", "merges.txt") if not (folder / name).is_file()]
    if lacking:  # the library would go on with an empty vocabulary
        raise ValueError(f"{' and '.join(lacking)} is missing; copy or download the folder again.")
    tokenizer = Qwen2Tokenizer.from_pretrained(str(folder), padding_side="left")
    _check_added(tokenizer, declared.get("added_tokens_decoder", {}))
    return tokenizer


def _check_added(tokenizer: Any, added: dict[str, dict[str, Any]]) -> None:
    """Whether added tokens have their declared ids; the library numbers them on from vocab.json's end."""
    for declared, token in added.items():
        found = tokenizer.convert_tokens_to_ids(token["content"])
        if found != int(declared):
            raise ValueError(
                f"tokenizer_config.json gives {token['content']} the id {declared}, but after vocab.json it "
                f"is {found}; take both from the same checkpoint."
            )


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

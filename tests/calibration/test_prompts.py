"""Prompts from a JSONL file, and their token ids."""

import json
from pathlib import Path
from typing import Any

import pytest

from dllmq.calibration.prompts import encode_prompts, read_prompts


def jsonl(folder: Path, *lines: Any) -> Path:
    file = folder / "prompts.jsonl"
    text = "\n".join(
        line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines
    )
    file.write_text(text + "\n", encoding="utf-8")
    return file


def test_the_first_prompts_from_any_known_field(tmp_path: Path) -> None:
    file = jsonl(
        tmp_path, {"question": "a"}, "", {"text": "b", "id": 3}, {"prompt": "c", "text": "no"}, {"text": "d"}
    )
    assert read_prompts(file, 3) == ["a", "b", "c"]


def test_a_line_ends_at_a_newline_only(tmp_path: Path) -> None:
    """JSON strings may hold U+2028 and U+0085, at which str.splitlines splits too."""
    text = "one\u2028two\u0085three"
    assert read_prompts(jsonl(tmp_path, {"text": text}), 1) == [text]


@pytest.mark.parametrize("line", ["{", "[1]", "3", '{"answer": "x"}', '{"text": 3}'])
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    with pytest.raises(ValueError, match="line 2: need a JSON object with one of prompt, question, text"):
        read_prompts(jsonl(tmp_path, {"text": "a"}, line), 2)


def test_too_few_lines(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has 1 prompts, but 2 are needed"):
        read_prompts(jsonl(tmp_path, {"text": "a"}), 2)


class Tokenizer:
    """One id per character; its chat layout is <text>."""

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(c) for c in text]}

    def apply_chat_template(
        self, messages: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool
    ) -> str:
        assert not tokenize and add_generation_prompt and messages[0]["role"] == "user"
        return f"<{messages[0]['content']}>"


def test_ids_plain_and_in_the_chat_layout() -> None:
    plain = encode_prompts(["ab", "c", ""], Tokenizer(), chat_template=False)
    assert [ids.tolist() for ids in plain] == [[97, 98], [99], []]
    (chat,) = encode_prompts(["a"], Tokenizer(), chat_template=True)
    assert chat.tolist() == [60, 97, 62]

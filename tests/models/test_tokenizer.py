"""The tokenizer of a checkpoint: a mask token that it lacks is config.json's, and one line says so."""

import json
import logging
import shutil
from pathlib import Path

import pytest

from dllmq.config import EMBEDDED
from dllmq.models.tokenizer import load_tokenizer

MASK = "<|mdm_mask|>"


def folder(tmp_path: Path, mask_token: str | None, **config: int) -> Path:
    """The embedded tokenizer, declaring this mask token, beside this config.json."""
    shutil.copy(EMBEDDED / "tokenizer.json", tmp_path)
    declared = json.loads((EMBEDDED / "tokenizer_config.json").read_text())
    declared.pop("mask_token", None)
    if mask_token is not None:
        declared["mask_token"] = mask_token
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(declared))
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.fixture(scope="module")
def mask_id() -> int:
    return int(json.loads((EMBEDDED / "config.json").read_text())["mask_token_id"])


def test_a_missing_mask_token_is_taken_from_the_config_and_said(
    tmp_path: Path, mask_id: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "dllmq")
    tokenizer = load_tokenizer(folder(tmp_path, None, mask_token_id=mask_id))
    assert (tokenizer.mask_token, tokenizer.mask_token_id) == (MASK, mask_id)
    assert caplog.messages == [f"tokenizer: no mask token; {MASK} ({mask_id}) is taken from config.json"]
    ids = [mask_id, *tokenizer("Question", add_special_tokens=False)["input_ids"]]
    assert tokenizer.decode(ids) == f"{MASK}Question"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Question"
    assert tokenizer(MASK, add_special_tokens=False)["input_ids"] == [mask_id]


def test_a_declared_one_is_left_alone_in_silence(
    tmp_path: Path, mask_id: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "dllmq")
    assert load_tokenizer(folder(tmp_path, MASK, mask_token_id=mask_id)).mask_token_id == mask_id
    assert load_tokenizer(EMBEDDED).mask_token_id == mask_id
    assert caplog.messages == []


def test_another_one_is_told_of(tmp_path: Path, mask_id: int, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = load_tokenizer(folder(tmp_path, "<|endoftext|>", mask_token_id=mask_id))
    assert tokenizer.mask_token == "<|endoftext|>"
    (said,) = caplog.messages
    assert f"mask_token_id is {mask_id} ({MASK})" in said and "<|endoftext|>" in said


@pytest.mark.parametrize("config", [{}, {"mask_token_id": 10**6}])
def test_without_an_id_or_a_text_there_is_none(tmp_path: Path, config: dict[str, int]) -> None:
    assert load_tokenizer(folder(tmp_path, None, **config)).mask_token_id is None


def test_a_damaged_config_is_left_to_others(tmp_path: Path) -> None:
    (folder(tmp_path, None) / "config.json").write_text("{")
    assert load_tokenizer(tmp_path).mask_token_id is None

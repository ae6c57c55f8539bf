"""The tokenizer of a checkpoint: by transformers' own classes; a mask token it lacks is config.json's."""

import json
import logging
import shutil
from pathlib import Path

import pytest
from tokenizers.pre_tokenizers import ByteLevel

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


# Tokens that Dream-org's tokenizer_config.json adds, in its order; there the first id is 151643.
ADDED = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>"]


def slow_folder(tmp_path: Path, tokenizer_class: str = "DreamTokenizer", gap: int = 0) -> tuple[Path, int]:
    """The files of Dream-org's folders with a vocabulary of bytes and two merges, and the first added id."""
    vocab = {c: i for i, c in enumerate([*sorted(ByteLevel.alphabet()), "hi", "12"])}
    first = len(vocab) + gap
    added = {str(first + i): {"content": text, "special": True} for i, text in enumerate(ADDED)}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nh i\n1 2\n")
    declared = {"tokenizer_class": tokenizer_class, "added_tokens_decoder": added, "unk_token": None} | {
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "bos_token": ADDED[3],
        "eos_token": ADDED[0],
        "pad_token": ADDED[0],
        "mask_token": ADDED[4],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(declared))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "Dream", "mask_token_id": first + 4}))
    (tmp_path / "tokenization_dream.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise SystemExit")
    return tmp_path, first


def test_a_slow_dream_folder_needs_none_of_its_code(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, first = slow_folder(tmp_path)
    tokenizer = load_tokenizer(path)
    ids = (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.mask_token_id)
    assert ids == (first, first, first + 3, first + 4)
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("hi 1212<|mask|>hi")["input_ids"])
    assert pieces == ["hi", "Ġ", "1", "2", "1", "2", "<|mask|>", "hi"]  # digits one by one, in spite of "12"
    rows = tokenizer(["hihi", "1"], padding=True)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(rows[1])[-1] == "1" and rows[1][0] == tokenizer.pad_token_id
    assert not (path / "ran").exists() and caplog.messages == []


def test_what_needs_the_checkpoints_code_is_refused_and_nothing_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    path, _ = slow_folder(tmp_path, "OtherTokenizer")
    with pytest.raises(ValueError, match="needs the checkpoint's own code, which is never run: put a tok"):
        load_tokenizer(path)
    assert not (path / "ran").exists()


def test_damaged_slow_folders_are_told_in_one_sentence(tmp_path: Path) -> None:
    path, first = slow_folder(tmp_path, gap=1)
    said = rf"gives <\|endoftext\|> the id {first}, but after vocab.json it is {first - 1}; take both"
    with pytest.raises(ValueError, match=said):
        load_tokenizer(path)
    (path / "merges.txt").unlink()
    with pytest.raises(ValueError, match=r"cannot be read: merges.txt is missing; copy or download"):
        load_tokenizer(path)
    (path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read: Expecting property name"):
        load_tokenizer(path)

"""The embedded tokenizer: any text makes the round trip; LLaDA's special roles and chat layout."""

import json
import re
from collections.abc import Iterator

import jaxtyping
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dllmq.config import EMBEDDED
from dllmq.mini.tasks import problems
from dllmq.mini.tokenizer import CHAT_TEMPLATE, SPECIAL, build_tokenizer
from dllmq.models.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(EMBEDDED)
WORDS = (
    "Question:",
    " apples",
    "def solve(xs):\n",
    '    """',
    "####",
    "12+30=42",
    "<|endoftext|>",
    " ",
    "\t",
    "é",
)


@pytest.fixture(autouse=True, scope="module")
def _unchecked() -> Iterator[None]:
    """Words are counted in some ten thousand texts: checking the types of every call takes a minute."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def encode(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def decode(ids: list[int]) -> str:
    return TOKENIZER.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@given(st.text() | st.lists(st.sampled_from(WORDS) | st.text(max_size=3)).map("".join))
@example("  two  spaces, a tab\t, a line\r\nand an emoji 🧮 é e\u0301 \u2028 \x00")
def test_any_text_makes_the_round_trip(text: str) -> None:
    assert decode(encode(text)) == text


def test_special_roles_are_lladas() -> None:
    t = TOKENIZER
    assert (t.bos_token, t.eos_token, t.pad_token, t.mask_token) == (
        "<|startoftext|>",
        "<|endoftext|>",
        "<|endoftext|>",
        "<|mdm_mask|>",
    )
    assert t.padding_side == "left"
    assert [encode(token) for token in SPECIAL] == [[i] for i in t.convert_tokens_to_ids(list(SPECIAL))]
    assert encode("12") == [*encode("1"), *encode("2")]  # digits stand alone


def test_special_ids_are_those_of_the_models_config() -> None:
    config = json.loads((EMBEDDED / "config.json").read_text())
    eot = TOKENIZER.convert_tokens_to_ids("<|eot_id|>")
    ids = (TOKENIZER.mask_token_id, TOKENIZER.eos_token_id, TOKENIZER.pad_token_id, eot, len(TOKENIZER))
    names = ("mask_token_id", "eos_token_id", "pad_token_id", "eot_token_id", "vocab_size")
    assert ids == tuple(config[name] for name in names)


def test_chat_layout_is_lladas() -> None:
    """chat_template of GSAI-ML/LLaDA-8B-Instruct, written out."""
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "  What is 2+2?\n"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "Sure?"},
    ]
    expected = (
        "<|startoftext|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhat is 2+2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n4<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nSure?<|eot_id|>"
    )
    ask = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert TOKENIZER.apply_chat_template(messages, tokenize=False) == expected
    assert (
        TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == expected + ask
    )


@pytest.mark.parametrize("task", ["mini_gsm", "mini_code"])
def test_prompt_and_response_meet_at_a_token_border(task: str) -> None:
    """What training encodes separately is what a harness encodes jointly."""
    for doc in problems(task, "test", 200):
        if task == "mini_gsm":
            prompt, response = f"Question: {doc['question']}\nAnswer:", f" {doc['answer']}"
        else:
            prompt, response = doc["prompt"], doc["canonical_solution"]
        assert encode(prompt) + encode(response) == encode(prompt + response)


def test_answers_and_their_eos_fit_the_canvas() -> None:
    lengths = [len(encode(" " + doc["answer"])) for doc in problems("mini_gsm", "test", 500)]
    lengths += [len(encode(doc["canonical_solution"])) for doc in problems("mini_code", "test", 500)]
    assert max(lengths) < 48


def test_words_of_the_tasks_are_one_token_each() -> None:
    for doc in problems("mini_gsm", "test", 100):
        for word in re.findall(r" ?[A-Za-z]+", f"Question: {doc['question']}\nAnswer:"):
            assert len(encode(word)) == 1, word


def test_the_shipped_tokenizer_is_the_one_the_code_builds() -> None:
    built = build_tokenizer()
    assert TOKENIZER.get_vocab() == built.get_vocab()
    assert TOKENIZER.chat_template == built.chat_template == CHAT_TEMPLATE
    assert TOKENIZER.special_tokens_map == built.special_tokens_map
    ours, theirs = (json.loads(t.backend_tokenizer.to_str()) for t in (TOKENIZER, built))
    for part in ("model", "pre_tokenizer", "decoder", "normalizer", "post_processor", "added_tokens"):
        assert ours[part] == theirs[part], part

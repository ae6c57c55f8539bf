"""Chat templates of checkpoints take neither time nor memory without end; real ones render as before."""

import resource
import sys
import time
from typing import Any

import pytest

from dllmq.config import EMBEDDED
from dllmq.models import tokenizer as module
from dllmq.models.bounds import Exceeded, bounded
from dllmq.models.tokenizer import load_tokenizer, render_chat

CHAT = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": " Yes "}]
# Qwen2.5's layout, which Dream has: a system message where there is none, turns between im_start and im_end.
IM = (
    "{%- if messages[0]['role'] != 'system' %}{{- '<|im_start|>system\nYou help.<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' + message.content }}"
    "{{- '<|im_end|>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


@pytest.fixture
def tokenizer() -> Any:
    return load_tokenizer(EMBEDDED)


@pytest.mark.parametrize("template", [None, IM, {"default": IM, "tool_use": "{{ 1 }}"}])
@pytest.mark.parametrize("more", [{"add_generation_prompt": True}, {"continue_final_message": True}])
def test_a_rendered_chat_is_that_of_transformers(
    tokenizer: Any, template: Any, more: dict[str, bool]
) -> None:
    tokenizer.chat_template = template or tokenizer.chat_template
    assert render_chat(tokenizer, CHAT, **more) == tokenizer.apply_chat_template(CHAT, tokenize=False, **more)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "takes more than 0.1 seconds",
        ),
        ("{{ 'abc'|slice(10000000000)|list }}", "takes more than 0.1 seconds"),
        ("{{ 9 ** 9 ** 9 }}", r"has the operator \*\*"),
        ("{{ 'a' * 10000000000 }}", "needs more than 1024 MiB of memory"),
        ("{{ '%10000000000d' % 3 }}", "needs more than 1024 MiB of memory"),
        ("{{ 'a' * 2000000 }}", "made 2000000 characters of 2 messages"),
        ("x" * 100_001, "has 100001 characters, more than 100000"),
        ("{% for i in range(100001) %}x{% endfor %}", r"OverflowError: Range too big"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "RecursionError"),
    ],
)
def test_what_a_template_takes_is_bounded(
    tokenizer: Any, template: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "seconds" in said:
        monkeypatch.setattr(module, "CHAT_SECONDS", 0.1)
    tokenizer.chat_template = template
    start = time.monotonic()
    with pytest.raises(ValueError, match=rf"chat template cannot be used \((it )?{said}.*\): set tasks"):
        render_chat(tokenizer, CHAT)
    assert time.monotonic() - start < 10


def test_a_text_that_doubles_ends(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By time or by memory, whichever comes first."""
    monkeypatch.setattr(module, "CHAT_SECONDS", 0.1)
    monkeypatch.setattr(module, "CHAT_MEMORY", 1 << 26)
    doubling = "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}"
    tokenizer.chat_template = doubling + "{{ n.s }}"
    with pytest.raises(ValueError, match=r"cannot be used \(it (takes|needs) more than"):
        render_chat(tokenizer, CHAT)


def test_limits_and_tracing_are_put_back() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS), sys.gettrace()
    assert bounded(lambda: 3, 1.0, 1 << 30) == 3
    for call in (lambda: bytes(1 << 40), lambda: 1 // 0):
        with pytest.raises((Exceeded, ZeroDivisionError)):
            bounded(call, 1.0, 1 << 20)
    assert (resource.getrlimit(resource.RLIMIT_AS), sys.gettrace()) == before


def test_a_bound_is_no_exception_that_a_library_could_swallow() -> None:
    def stubborn() -> None:
        while True:
            try:
                [None for _ in range(1000)]
            except Exception:
                continue

    with pytest.raises(Exceeded, match=r"more than 0\.05 seconds"):
        bounded(stubborn, 0.05, 1 << 30)

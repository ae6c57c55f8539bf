"""What is run of an answer: raw completions, chat answers, asserts."""

import pytest

from dllmq.evaluation.code_scoring import (
    assert_program,
    asserted_function,
    pass_at_1,
    program,
    run_tests,
    take_function,
)

PROMPT = 'from math import pi\n\ndef area(r):\n    """Area."""\n'
DOC = {
    "prompt": PROMPT,
    "entry_point": "area",
    "test": "def check(f):\n    assert abs(f(1) - 3.14159) < 1e-3\n",
}


def run(source: str, name: str = "area") -> dict:
    scope: dict = {}
    exec(source, scope)
    return scope


@pytest.mark.parametrize(
    "response",
    [
        "    return pi * r * r\n",
        "    return pi * r * r\n\nprint(area(1 / 0))\n",
        "    return pi * r * r\n\nSo the answer is clear: it's done.",
        "Sure!\n```python\ndef area(r):\n    return pi * r * r\n```\nThis works.",
        "```python\ndef area(r):\n    return pi * r * r\n\nassert area(1) == 7\nprint(1 / 0)\n```",
        "```\nfrom math import tau\n\ndef half(x):\n    return x / 2\n\n"
        "def area(r):\n    return half(tau) * r * r",
        "Use:\n```bash\npip install x\n```\nthen\n```python\ndef area(r):\n    return pi * r * r\n```\n"
        "and\n```python\nprint(area(2))\n```",
        "```python\n    return pi * r * r\n```",
        "def area(r):\n    return pi * r * r\n\nThis function",
    ],
)
def test_the_function_in_an_answer(response: str) -> None:
    source = take_function(PROMPT, response, "area")
    assert run(source)["area"](2) == pytest.approx(12.566, abs=1e-3)
    assert "assert" not in source and "print" not in source


def test_an_answer_without_code_stays_wrong() -> None:
    assert run(take_function(PROMPT, "I do not know.", "area"))["area"](1) is None
    assert "area" not in run(take_function("", "I do not know.", "area"))


def test_a_prompt_with_another_indent_and_no_docstring() -> None:
    for prompt in ('def f(x):\n  """Doc."""\n', "def f(x):\n"):
        source = take_function(prompt, "```python\ndef f(x):\n  return x + 1\n```", "f")
        assert run(source)["f"](1) == 2


def test_base_models_raw_completion_is_run_as_it_is() -> None:
    assert program(DOC, "    return 3").source == PROMPT + "    return 3\n"
    assert program(DOC, "    return 3").prelude == PROMPT
    fenced = program(DOC, "```python\ndef area(r):\n    return 3\n```", take_function)
    assert run(fenced.source)["area"](0) == 3
    outcomes = run_tests([["    return pi\n", "    return 3\n"]], [DOC])
    assert [o["status"] for o in outcomes[0]] == ["passed", "failed"]
    assert pass_at_1(DOC, outcomes) == {"pass@1": 0.5}


def test_the_function_that_asserts_call() -> None:
    code = "def helper(x):\r\n  return x\r\ndef volume(r):\r\n  return helper(r)"
    assert asserted_function(["assert math.isclose(volume(10), 4.1)"], code) == "volume"
    assert asserted_function(["assert set(volume((1, 2))) == set(helper(3))"], code) == "volume"
    with pytest.raises(
        ValueError, match=r"No assert calls a function that the problem's code defines.*'other'"
    ):
        asserted_function(["assert other(1) == 2"], code)


def test_mbpps_program_is_the_answer_and_its_first_three_asserts() -> None:
    doc = {"code": "def f(x):\n  return x", "test_list": [f"assert f({i}) == {i}" for i in range(4)]}
    made = assert_program(doc, "def f(x): return x")
    assert (made.source, made.entry_point) == ("def f(x): return x\n", "f")
    assert made.test == "assert f(0) == 0\nassert f(1) == 1\nassert f(2) == 2\n"

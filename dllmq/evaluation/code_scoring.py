"""pass@1: a response becomes a program, which runs in the sandbox with the data set's tests.

The functions that task YAMLs and benchmarks.py name. lm-eval's own humaneval and mbpp need `code_eval` from a
hub at import, and trust a program that ends; this scorer does neither.
"""

import ast
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from dllmq.evaluation.sandbox import Program, run_programs

Doc = Mapping[str, Any]
Postprocess = Callable[[str, str, str], str]  # (prompt, response, name of the wanted function) -> program


def program(doc: Doc, response: str, postprocess: Postprocess | None = None) -> Program:
    """A response to a problem in HumanEval's schema, with the test that judges it.

    The test may use what the prompt defines (imports, helper functions), as the dataset wrote it.
    """
    make = postprocess or continued
    return Program(
        source=make(doc["prompt"], response, doc["entry_point"]),
        test=f"{doc['test']}\ncheck({doc['entry_point']})\n",
        entry_point=doc["entry_point"],
        prelude=doc["prompt"],
    )


def assert_program(doc: Doc, response: str, postprocess: Postprocess | None = None) -> Program:
    """A response to a problem in MBPP's schema: the response alone is the program, its first three asserts
    the test.

    A few problems' asserts build objects of a class that the response has to define, Pair(5, 24): the judge
    hands name and arguments over, and the program builds them.
    """
    name = asserted_function(doc["test_list"], doc["code"])
    make = postprocess or continued
    test = "\n".join(doc["test_list"][:3]) + "\n"
    return Program(source=make("", response, name), test=test, entry_point=name)


def asserted_function(asserts: Iterable[str], reference: str) -> str:
    """The function that asserts call: the first called name that the reference solution defines.

    Raises:
        ValueError: none is.
    """
    called = [
        node.func.id
        for text in asserts
        for node in ast.walk(ast.parse(text.strip()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    ]
    defined = re.findall(r"^def\s+(\w+)", reference, re.MULTILINE)
    found = [name for name in called if name in defined]
    if not found:
        raise ValueError(f"No assert calls a function that the problem's code defines; they call {called}.")
    return found[0]


def continued(prompt: str, response: str, entry_point: str) -> str:
    """The raw completion, as a base model writes it."""
    return f"{prompt}{response}\n"


def take_function(prompt: str, response: str, entry_point: str) -> str:
    """The program in a chat answer, or in a completion that was not cut at the task's stop strings.

    The first fenced block that defines `entry_point` (a fence without its end reaches to the end of the
    text), else the first block, else the whole response. It follows the prompt: as a second definition of the
    function where it has one, as its continuation otherwise. Of that the longest run of lines that parses is
    kept, and of these the definitions, imports and assignments; examples and prints behind them are left out.
    """
    head = re.compile(rf"^(async\s+)?def\s+{re.escape(entry_point)}\b", re.MULTILINE)
    blocks = [
        block for block in re.findall(r"```[^\n]*\n(.*?)(?:```|\Z)", response, re.DOTALL) if block.strip()
    ]
    code: str = next(filter(head.search, blocks), next(iter(blocks), response))
    source = f"{_completed(prompt)}\n{code}" if head.search(code) else f"{prompt}{code}"
    lines = source.split("\n")
    trees = (_parsed("\n".join(lines[:n])) for n in range(len(lines), -1, -1))
    tree = next(tree for tree in trees if tree is not None)
    tree.body = [node for node in tree.body if isinstance(node, _DEFINING)]
    return ast.unparse(tree) + "\n"


_DEFINING = (
    ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Assign,
    ast.AnnAssign,
)  # fmt: skip


def _completed(prompt: str) -> str:
    """The prompt as a program: its unfinished last function gets a body unless its docstring is one."""
    return prompt if _parsed(prompt) is not None else f"{prompt}    pass\n"


def _parsed(source: str) -> ast.Module | None:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


POSTPROCESS: dict[str, Postprocess | None] = {"none": None, "take_function": take_function}


def run_tests(
    responses: Iterable[list[str]], docs: Iterable[Doc], make: Callable[[Doc, str], Program] = program
) -> list[list[dict[str, str]]]:
    """lm-eval filter: each response becomes its sandbox outcome {"status", "detail"}."""
    groups = [[make(doc, text) for text in texts] for texts, doc in zip(responses, docs, strict=True)]
    outcomes: Iterator[dict[str, str]] = map(
        asdict, run_programs([source for group in groups for source in group])
    )
    return [[next(outcomes) for _ in group] for group in groups]


def pass_at_1(doc: Doc, results: list[list[dict[str, str]]]) -> dict[str, float]:
    """lm-eval metric of one problem: the share of its responses that passed."""
    (outcomes,) = results
    return {"pass@1": sum(outcome["status"] == "passed" for outcome in outcomes) / len(outcomes)}

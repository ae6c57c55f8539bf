"""pass@1 of HumanEval's kind: prompt + response + test + check(entry_point), run in the sandbox.

The two functions that task YAMLs name. lm-eval's own humaneval needs `code_eval` from a hub at import, and
trusts a program that ends; this scorer does neither.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from dllmq.evaluation.sandbox import Program, run_programs

Doc = Mapping[str, Any]


def program(doc: Doc, response: str) -> Program:
    """A response to a problem in HumanEval's schema, with the test that judges it.

    The test may use what the prompt defines (imports, helper functions), as the dataset wrote it.
    """
    return Program(
        source=f"{doc['prompt']}{response}\n",
        test=f"{doc['test']}\ncheck({doc['entry_point']})\n",
        entry_point=doc["entry_point"],
        prelude=doc["prompt"],
    )


def run_tests(responses: Iterable[list[str]], docs: Iterable[Doc]) -> list[list[dict[str, str]]]:
    """lm-eval filter: each response becomes its sandbox outcome {"status", "detail"}."""
    groups = [[program(doc, text) for text in texts] for texts, doc in zip(responses, docs, strict=True)]
    outcomes: Iterator[dict[str, str]] = map(
        asdict, run_programs([source for group in groups for source in group])
    )
    return [[next(outcomes) for _ in group] for group in groups]


def pass_at_1(doc: Doc, results: list[list[dict[str, str]]]) -> dict[str, float]:
    """lm-eval metric of one problem: the share of its responses that passed."""
    (outcomes,) = results
    return {"pass@1": sum(outcome["status"] == "passed" for outcome in outcomes) / len(outcomes)}

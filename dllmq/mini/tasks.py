"""The embedded model's tasks as data sets: generated problems in the field's schemas, split without leakage.

mini_gsm    GSM8K's schema: question, answer (worked, ends in `#### N`)
mini_code   HumanEval's schema: task_id, prompt, canonical_solution, test, entry_point
mini_choice ARC's schema: id, question, choices {text, label}, answerKey

Problems are drawn from a seed, in an order that does not depend on how many are asked for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from random import Random
from typing import Any

from dllmq.mini.code_problems import CodeProblem, draw_code_problem
from dllmq.mini.splits import SPLITS, Split, problem_split
from dllmq.mini.word_problems import WordProblem, draw_choice, draw_word_problem

TASKS = ("mini_gsm", "mini_code", "mini_choice")
Doc = dict[str, Any]


def _gsm_doc(problem: WordProblem) -> Doc:
    return {"question": problem.question, "answer": problem.answer}


def _code_doc(problem: CodeProblem) -> Doc:
    return {
        "prompt": problem.prompt,
        "canonical_solution": problem.solution,
        "test": problem.test,
        "entry_point": problem.name,
    }


def _choice_doc(problem: WordProblem, wrong: list[str], rng: Random) -> Doc:
    texts = [problem.answer, *wrong]
    rng.shuffle(texts)
    return {
        "question": problem.question,
        "choices": {"text": texts, "label": list("ABCD")},
        "answerKey": "ABCD"[texts.index(problem.answer)],
    }


def _draw(task: str, rng: Random) -> tuple[Callable[[], Doc], Split | None, str]:
    """One problem: its document, built when asked for, and what problem_split says."""
    if task == "mini_code":
        program = draw_code_problem(rng)
        return partial(_code_doc, program), *problem_split(program.composition, program.numbers)
    if task == "mini_gsm":
        problem = draw_word_problem(rng)
        return partial(_gsm_doc, problem), *problem_split(problem.composition, problem.numbers)
    problem, wrong = draw_choice(rng)
    document = partial(_choice_doc, problem, wrong, rng)
    return document, *problem_split(problem.composition, problem.numbers)


def stream(task: str, split: Split, seed: int = 0) -> Iterator[Doc]:
    """Endless distinct problems of one split.

    Raises:
        ValueError: unknown task or split.
    """
    if task not in TASKS or split not in SPLITS:
        raise ValueError(
            f"got task {task!r}, split {split!r}; tasks are {', '.join(TASKS)}, splits {', '.join(SPLITS)}."
        )
    rng = Random(f"{task}/{split}/{seed}")
    seen: set[str] = set()
    while True:
        document, belongs, held_out = _draw(task, rng)
        if belongs != split:
            continue
        doc = document()
        text = doc.get("question") or doc["prompt"]
        if text in seen:
            continue
        number = len(seen)
        seen.add(text)
        key = "task_id" if task == "mini_code" else "id"
        yield {key: f"{task}/{split}/{number}", **doc, "held_out": held_out}


def problems(task: str, split: Split, n: int, seed: int = 0) -> list[Doc]:
    """The first n problems of a split."""
    return list(islice(stream(task, split, seed), n))


def as_jsonl(docs: list[Doc]) -> str:
    """One problem a line, as the published data sets have it."""
    return "".join(json.dumps(doc) + "\n" for doc in docs)

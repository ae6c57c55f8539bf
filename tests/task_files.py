"""Tiny local files of the published tasks, in the data sets' own schemas, further columns included."""

import json
from pathlib import Path
from typing import Any

from dllmq.evaluation.benchmarks import benchmark

Row = dict[str, Any]
ADDED = (("Ann has {a} apples and buys {b}. How many?", "She has {a}+{b}=<<{a}+{b}={c}>>{c}.\n#### {c}"),)


def gsm8k(i: int) -> Row:
    question, answer = ADDED[0]
    numbers = {"a": i + 1, "b": 2 * i, "c": 3 * i + 1}
    return {"question": question.format(**numbers), "answer": answer.format(**numbers)}


def minerva_math(i: int) -> Row:
    solution = f"Half of ${i}$ is $\\boxed{{\\frac{{{i}}}{{2}}}}$."
    return {"problem": f"What is half of ${i}$?", "level": "Level 1", "type": "Algebra", "solution": solution}


def humaneval(i: int) -> Row:
    return {
        "task_id": f"HumanEval/{i}",
        "prompt": f'from typing import List\n\n\ndef plus(x: int) -> int:\n    """x plus {i}.\n    """\n',
        "canonical_solution": f"    return x + {i}\n",
        "test": f"def check(f):\n    assert f(3) == {3 + i}\n    assert f(0) == {i}\n",
        "entry_point": "plus",
    }


def mbpp(i: int) -> Row:
    return {
        "task_id": 11 + i,
        "text": f"Write a function to add {i} to both numbers of a pair.",
        "code": f"def shifted(pair):\r\n  return (pair[0] + {i}, pair[1] + {i}) ",
        "test_list": [f"assert shifted(({n}, 1)) == ({n + i}, {1 + i})" for n in range(3)],
        "test_setup_code": "",
        "challenge_test_list": [],
    }


def mmlu(i: int) -> Row:
    choices = [f"{i}", f"{i + 1}", f"{i + 2}", f"{i + 3}"]
    return {"question": f"What is {i} + 1? ", "subject": "x", "choices": choices, "answer": 1 if i % 2 else 3}


def arc(i: int) -> Row:
    choices = {"text": ["the sun", "a stone", "the moon"], "label": ["A", "B", "C"]}
    return {
        "id": f"Q{i}",
        "question": f"What shines on day {i}?",
        "choices": choices,
        "answerKey": "AC"[i % 2],
    }


def hellaswag(i: int) -> Row:
    return {
        "ind": i,
        "activity_label": "Cooking",
        "ctx_a": f"[header] A cook takes {i} eggs. [title] She  breaks them.",
        "ctx_b": "then she",
        "ctx": "unused",
        "endings": ["beats them.", "eats the pan [substeps] whole.", "flies.", "sleeps in the bowl."],
        "label": str(i % 4),
    }


def winogrande(i: int) -> Row:
    sentence = f"Kim paid Lee {i} coins because _ had sold the car."
    return {"sentence": sentence, "option1": "Kim", "option2": "Lee", "answer": str(1 + i % 2)}


def piqa(i: int) -> Row:
    return {"goal": f"To boil {i} eggs,", "sol1": "heat water.", "sol2": "freeze water.", "label": i % 2}


def truthfulqa_mc2(i: int) -> Row:
    choices = ["It is water.", "It is milk.", "Nobody knows."]
    return {
        "question": f"What falls as rain on day {i}?",
        "mc1_targets": {"choices": choices, "labels": [1, 0, 0]},
        "mc2_targets": {"choices": choices, "labels": [1, 0, 1]},
    }


def gpqa(i: int) -> Row:
    wrong = {f"Incorrect Answer {k}": f"{i + k} J" for k in (1, 2, 3)}
    return {"Record ID": f"r{i}", "Question": f"Energy of {i}?", "Correct Answer": f"{i} J"} | wrong


def cmmlu(i: int) -> Row:
    options = {letter: f"{i + k}" for k, letter in enumerate("ABCD")}
    return {"Question": f"{i} 加一等于?", **options, "Answer": "B"}


def ceval(i: int) -> Row:
    options = {letter: f"{i + k}" for k, letter in enumerate("ABCD")}
    return {"id": i, "question": f"{i} 加一等于?", **options, "answer": "B", "explanation": ""}


MAKE = {
    "gsm8k": gsm8k, "minerva_math": minerva_math, "humaneval": humaneval, "mbpp": mbpp, "mmlu": mmlu,
    "arc_easy": arc, "arc_challenge": arc, "hellaswag": hellaswag, "winogrande": winogrande, "piqa": piqa,
    "truthfulqa_mc2": truthfulqa_mc2, "gpqa": gpqa, "cmmlu": cmmlu, "ceval-valid": ceval,
}  # fmt: skip


def write_task(folder: Path, name: str, scored: int = 3, examples: int = 9) -> Path:
    """Files of the split that is scored and of the one that examples come from, for every subtask."""
    own = benchmark(name)
    for k, subtask in enumerate(own.subtasks):
        for split, start, n in ((own.splits[1], 100, examples), (own.splits[0], 10 * k, scored + (k % 2))):
            if split:
                n = max(scored, examples) if own.splits[0] == own.splits[1] else n
                write_rows(folder / name / subtask.subset / f"{split}.jsonl",
                           [MAKE[name](i) for i in range(start, start + n)])  # fmt: skip
    return folder


def write_rows(file: Path, rows: list[Row]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file

"""The generated problems: nothing leaks between splits, every answer is right, schemas are the field's."""

import operator
import re
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from random import Random

import jaxtyping
import pytest

from dllmq.mini.code_problems import CodeProblem, draw_code_problem
from dllmq.mini.splits import problem_split
from dllmq.mini.tasks import TASKS, _choice_doc, problems, stream
from dllmq.mini.training_data import _train_draw
from dllmq.mini.word_problems import (
    Equation,
    Unfit,
    WordProblem,
    draw_choice,
    draw_equation,
    draw_word_problem,
)

Problem = WordProblem | CodeProblem
TRAINING_DRAWS, HELD_OUT = 20_000, 1_000


@pytest.fixture(autouse=True, scope="module")
def _unchecked() -> Iterator[None]:
    """Checking the types of some million calls takes minutes; the other files' tests do it."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def text_of(problem: Problem) -> str:
    return problem.prompt if isinstance(problem, CodeProblem) else problem.question


@cache
def held_out(task: str, split: str) -> list[tuple[dict, Problem]]:
    """The split's first documents, each with the drawn problem it shows (drawn again, as the stream does)."""
    docs = {doc.get("question") or doc["prompt"]: doc for doc in problems(task, split, HELD_OUT)}  # type: ignore[arg-type]

    def choice(rng: Random) -> WordProblem:
        problem, wrong = draw_choice(rng)
        if problem_split(problem.composition, problem.numbers)[0] == split:
            _choice_doc(problem, wrong, rng)  # shuffles the choices
        return problem

    draws: dict[str, Callable[[Random], Problem]]
    draws = {"mini_gsm": draw_word_problem, "mini_code": draw_code_problem, "mini_choice": choice}
    draw = draws[task]
    rng, found = Random(f"{task}/{split}/0"), {}
    while len(found) < len(docs):
        problem = draw(rng)
        # a question may be drawn again with another composition only if two templates read alike: not allowed
        if problem_split(problem.composition, problem.numbers)[0] == split and text_of(problem) in docs:
            found.setdefault(text_of(problem), problem)
    return [(doc, found[text]) for text, doc in docs.items()]


def training(task: str) -> list[Problem]:
    """What training sees; mini_choice's questions are of mini_gsm's kind."""
    return _training(draw_code_problem if task == "mini_code" else draw_word_problem)


@cache
def _training(draw: Callable[[Random], Problem]) -> list[Problem]:
    rng = Random(7)
    return [_train_draw(draw, rng) for _ in range(TRAINING_DRAWS)]


@pytest.mark.parametrize("split", ["test", "dev"])
@pytest.mark.parametrize("task", TASKS)
def test_nothing_held_out_is_in_the_training_draws(task: str, split: str) -> None:
    texts = {text_of(p) for p in training(task)}
    compositions = {p.composition for p in training(task)}
    numbers = {p.numbers for p in training(task)}
    rows = held_out(task, split)
    assert len(rows) == HELD_OUT
    kinds = set()
    for doc, problem in rows:
        assert text_of(problem) not in texts
        new_composition, new_numbers = problem.composition not in compositions, problem.numbers not in numbers
        assert new_composition or new_numbers, doc["id" if "id" in doc else "task_id"]
        assert new_composition or doc["held_out"] == "numbers"
        assert new_numbers or doc["held_out"] == "composition"
        kinds.add(doc["held_out"])
    assert kinds >= {"composition", "numbers"}  # both ways of being new are measured


@pytest.mark.parametrize("task", TASKS)
def test_dev_and_test_share_no_question_composition_or_numbers_that_is_held_out(task: str) -> None:
    dev, test = held_out(task, "dev"), held_out(task, "test")
    assert not {text_of(p) for _, p in dev} & {text_of(p) for _, p in test}
    for key in ("composition", "numbers"):
        sets = [
            {getattr(p, key) for doc, p in rows if doc["held_out"] in (key, "both")} for rows in (dev, test)
        ]
        assert not sets[0] & sets[1]


@pytest.mark.parametrize("task", TASKS)
def test_a_question_has_one_composition(task: str) -> None:
    """Else a problem could be in two splits under two keys."""
    seen: dict[str, tuple] = {}
    for problem in [*training(task), *(p for split in ("dev", "test") for _, p in held_out(task, split))]:
        key = (problem.composition, problem.numbers)
        assert seen.setdefault(text_of(problem), key) == key


# ------------------------------------------------------------------ answers

LINE = re.compile(r"(\d+)([-+*/])(\d+)=(\d+) (\w+)\.")
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def evaluated(line: str) -> int:
    """The result a worked line states, after checking it."""
    a, op, b, c, _ = LINE.fullmatch(line).groups()  # type: ignore[union-attr]
    assert OPERATIONS[op](int(a), int(b)) == int(c), line
    return int(c)


@pytest.mark.parametrize("split", ["test", "dev", "train"])
def test_worked_answers_are_right(split: str) -> None:
    for doc in problems("mini_gsm", split, 500):  # type: ignore[arg-type]
        *lines, last = doc["answer"].split("\n")
        known = [int(n) for n in re.findall(r"\d+", doc["question"])]
        assert 1 <= len(lines) <= 3
        for line in lines:
            a, _, b, _, _ = LINE.fullmatch(line).groups()  # type: ignore[union-attr]
            assert int(a) in known and int(b) in known, doc  # from the question, or a result before
            known.append(evaluated(line))
            assert 1 <= known[-1] <= 99
        assert last == f"#### {known[-1]}"


def test_every_number_of_a_question_is_used() -> None:
    for _, problem in held_out("mini_gsm", "test"):
        asked = [int(n) for n in re.findall(r"\d+", text_of(problem))]
        used = [
            n for line in problem.answer.split("\n")[:-1] for n in map(int, LINE.fullmatch(line).group(1, 3))
        ]  # type: ignore
        assert sorted(asked) == sorted(problem.numbers) and set(asked) <= set(used)


def test_a_choice_has_one_right_answer_among_four() -> None:
    for doc, problem in held_out("mini_choice", "test"):
        texts, labels = doc["choices"]["text"], doc["choices"]["label"]
        assert labels == list("ABCD") and len(set(texts)) == 4
        right = texts[labels.index(doc["answerKey"])]
        assert right == problem.answer
        value = evaluated(right.split("\n")[0])
        results = [int(text.rpartition("#### ")[2]) for text in texts]
        assert results.count(value) == 1, doc  # also not by another way, such as 2*2 for 2+2


def test_the_right_choice_may_stand_anywhere() -> None:
    keys = [doc["answerKey"] for doc, _ in held_out("mini_choice", "test")]
    assert all(200 <= keys.count(label) <= 300 for label in "ABCD")


def passes(doc: dict, solution: str) -> bool:
    """Whether a solution passes the document's asserts."""
    namespace: dict = {}
    exec(doc["prompt"] + solution + doc["test"], namespace)
    try:
        namespace["check"](namespace[doc["entry_point"]])
    except Exception:
        return False
    return True


def test_reference_programs_pass_their_own_asserts() -> None:
    for doc, _ in held_out("mini_code", "test"):
        assert passes(doc, doc["canonical_solution"]), doc


def test_wrong_programs_fail() -> None:
    docs = [doc for doc, _ in held_out("mini_code", "test")]
    for doc in docs:
        assert not passes(doc, "    return None\n")
        assert not passes(doc, doc["canonical_solution"].replace("return", "raise", 1))
    lists = [doc for doc in docs if " for x in xs if " in doc["canonical_solution"]]
    unfiltered = [re.sub(r"for x in xs if .*\]", "for x in xs]", d["canonical_solution"]) for d in lists]
    caught = sum(not passes(doc, body) for doc, body in zip(lists, unfiltered, strict=True))
    assert caught > 0.7 * len(lists)  # the largest of the positive numbers is mostly the largest of all


def test_another_problems_solution_fails_mostly() -> None:
    docs = [doc for doc, _ in held_out("mini_code", "test")][:300]
    wrong = 0
    for doc, other in pairwise(docs):
        body = other["canonical_solution"]
        wrong += not passes(doc, body)
    assert wrong > 0.95 * (len(docs) - 1)


def test_equations_of_drills_are_right_and_unfit_ones_refused() -> None:
    rng = Random(0)
    for _ in range(2000):
        evaluated(f"{draw_equation(rng)} toys.")
    for a, op, b in ((1, "-", 1), (60, "+", 40), (7, "/", 2), (50, "*", 2)):
        with pytest.raises(Unfit):
            _ = Equation(a, op, b).c


# ------------------------------------------------------------------ documents

FIELDS = {
    "mini_gsm": {"id", "question", "answer", "held_out"},
    "mini_code": {"task_id", "prompt", "canonical_solution", "test", "entry_point", "held_out"},
    "mini_choice": {"id", "question", "choices", "answerKey", "held_out"},
}


@pytest.mark.parametrize("task", TASKS)
def test_documents_have_the_fields_schema(task: str) -> None:
    docs = problems(task, "test", 30)
    assert all(doc.keys() == FIELDS[task] for doc in docs)
    name = "task_id" if task == "mini_code" else "id"
    assert [doc[name] for doc in docs] == [f"{task}/test/{i}" for i in range(30)]
    assert len({doc.get("question") or doc["prompt"] for doc in docs}) == 30


@pytest.mark.parametrize("task", TASKS)
def test_the_first_problems_do_not_depend_on_how_many_are_asked_for(task: str) -> None:
    assert problems(task, "test", 20)[:5] == problems(task, "test", 5)
    assert problems(task, "test", 5, seed=1) != problems(task, "test", 5)
    assert problems(task, "train", 5) != problems(task, "test", 5)


@pytest.mark.parametrize(("task", "split"), [("mini_gms", "test"), ("mini_gsm", "val")])
def test_unknown_tasks_and_splits_are_named(task: str, split: str) -> None:
    with pytest.raises(
        ValueError, match="tasks are mini_gsm, mini_code, mini_choice, splits train, dev, test"
    ):
        next(stream(task, split))  # type: ignore[arg-type]

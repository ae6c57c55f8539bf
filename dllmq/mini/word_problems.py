"""Worded arithmetic in GSM8K's schema: 1-3 steps, values in 1..99, a worked answer that ends in `#### N`.

Four families: a quantity that changes (chain), a bill (price), two or three people (compare), wages (earn).
Every sentence has several wordings; the tuple of families and wordings is the problem's composition.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from random import Random

NAMES = (
    "Ann", "Ben", "Cara", "Dan", "Ella", "Finn", "Gina", "Hugo", "Iris", "Jack", "Kate", "Leo",
    "Mia", "Noah", "Olga", "Paul", "Rosa", "Sam", "Tina", "Vera",
)  # fmt: skip
ITEMS = (
    "apples", "books", "coins", "cards", "shells", "stamps", "marbles", "pens", "flowers", "stickers",
    "eggs", "cups", "balls", "stones", "pears", "toys",
)  # fmt: skip


class Unfit(Exception):
    """A draw whose values leave 1..99; the caller draws again."""


@dataclass(frozen=True)
class Equation:
    """One step of a worked answer, a op b = c."""

    a: int
    op: str
    b: int

    @property
    def c(self) -> int:
        if self.op == "/":
            if self.a % self.b:
                raise Unfit
            value = self.a // self.b
        else:
            value = {"+": self.a + self.b, "-": self.a - self.b, "*": self.a * self.b}[self.op]
        if not 1 <= value <= 99:
            raise Unfit
        return value

    def __str__(self) -> str:
        return f"{self.a}{self.op}{self.b}={self.c}"


@dataclass(frozen=True)
class WordProblem:
    """A question with its worked solution.

    Attributes:
        composition: family and wording of every sentence; numbers: the constants in the question, in order.
        steps: the equations; unit: the noun counted.
    """

    question: str
    steps: tuple[Equation, ...]
    unit: str
    composition: tuple[str, ...]
    numbers: tuple[int, ...]

    @property
    def answer(self) -> str:
        lines = [f"{step} {self.unit}." for step in self.steps]
        return "\n".join([*lines, f"#### {self.steps[-1].c}"])


# wording -> operation on the running value; {n} is the name, {b} the number
_CHANGES = {
    "+": (
        "{n} buys {b} more.",
        "{n} finds {b} more.",
        "A friend gives {n} {b} more.",
        "Then {n} wins {b} more.",
    ),
    "-": ("{n} gives away {b}.", "{n} loses {b}.", "{n} sells {b}.", "Then {n} breaks {b}."),
    "*": (
        "Then the number grows {b} times.",
        "{n} then gets {b} times as many.",
        "A trick makes it {b} times as many.",
    ),
    "/": ("{n} splits them into {b} equal parts and keeps one.", "{n} keeps one of {b} equal shares."),
}


def _operand(op: str, value: int, rng: Random) -> int:
    if op in "+-":
        return rng.randint(2, 60)
    if op == "*":
        return rng.randint(2, 5)
    divisors = [k for k in range(2, 10) if value % k == 0]
    if not divisors:
        raise Unfit
    return rng.choice(divisors)


def _chain(rng: Random, length: int | None = None) -> WordProblem:
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    length = length or rng.choice((1, 2, 2, 3, 3))
    value = rng.randint(3, 90)
    sentences, steps, wordings, numbers = [], [], [], [value]
    start = rng.randrange(3)
    sentences.append(
        ("{n} has {a} {i}.", "There are {a} {i} in the bag of {n}.", "At first {n} has {a} {i}.")[start]
    )
    sentences[0] = sentences[0].format(n=name, a=value, i=item)
    for _ in range(length):
        op = rng.choice("++--*/")
        which = rng.randrange(len(_CHANGES[op]))
        b = _operand(op, value, rng)
        step = Equation(value, op, b)
        value = step.c
        steps.append(step)
        numbers.append(b)
        wordings.append(f"{op}{which}")
        sentences.append(_CHANGES[op][which].format(n=name, b=b))
    sentences.append(f"How many {item} does {name} have now?")
    return WordProblem(
        " ".join(sentences), tuple(steps), item, ("chain", str(start), *wordings), tuple(numbers)
    )


def _price(rng: Random) -> WordProblem:
    name = rng.choice(NAMES)
    first, second = rng.sample(ITEMS, 2)
    p, q, m, k = rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 9)
    bill, change = rng.randrange(3), rng.randrange(4)
    if change:  # one kind of item, change of a note
        paid = rng.randint(20, 99)
        tell = ("In the shop {i} cost {p} dollars each.", "The price of {i} is {p} dollars each.",
                "{n} sees {i} for {p} dollars each.")[bill]  # fmt: skip
        ask = ("{n} buys {m} and pays with {t} dollars.", "{n} has {t} dollars and takes {m}.",
               "With {t} dollars {n} buys {m} of them.")[change - 1]  # fmt: skip
        steps = [Equation(m, "*", p)]
        steps.append(Equation(paid, "-", steps[0].c))
        numbers = [p, m, paid] if change == 1 else [p, paid, m]
        text = f"{tell} {ask} How many dollars are left?".format(n=name, i=first, p=p, m=m, t=paid)
        return WordProblem(text, tuple(steps), "dollars", ("change", str(bill), str(change)), tuple(numbers))
    tell = ("In the shop {i} cost {p} dollars each and {j} cost {q} dollars each.",
            "The price is {p} dollars for {i} and {q} dollars for {j}.",
            "{n} sees {i} for {p} dollars each and {j} for {q} dollars each.")[bill]  # fmt: skip
    which = rng.randrange(3)
    ask = ("{n} buys {m} {i} and {k} {j}. How many dollars does {n} pay?",
           "{n} takes {m} {i} and {k} {j}. How many dollars does it cost?",
           "How many dollars do {m} {i} and {k} {j} cost?")[which]  # fmt: skip
    steps = [Equation(m, "*", p), Equation(k, "*", q)]
    steps.append(Equation(steps[0].c, "+", steps[1].c))
    text = f"{tell} {ask}".format(n=name, i=first, j=second, p=p, q=q, m=m, k=k)
    return WordProblem(text, tuple(steps), "dollars", ("price", str(bill), str(which)), (p, q, m, k))


def _compare(rng: Random) -> WordProblem:
    a_name, b_name, c_name = rng.sample(NAMES, 3)
    item, a = rng.choice(ITEMS), rng.randint(3, 60)
    relations = {
        "+": ("{y} has {b} more than {x}.", "{y} owns {b} more {i} than {x}."),
        "-": ("{y} has {b} fewer than {x}.", "{y} owns {b} fewer {i} than {x}."),
        "*": ("{y} has {b} times as many as {x}.", "{y} owns {b} times as many {i} as {x}."),
    }
    people = [a_name, b_name, c_name][: rng.choice((2, 2, 3))]
    start = rng.randrange(2)
    sentences = [("{x} has {a} {i}.", "{x} owns {a} {i}.")[start].format(x=a_name, a=a, i=item)]
    values, steps, wordings, numbers = [a], [], [], [a]
    for x, y in pairwise(people):
        op = rng.choice("+-*")
        which = rng.randrange(2)
        b = rng.randint(2, 5) if op == "*" else rng.randint(2, 40)
        step = Equation(values[-1], op, b)
        values.append(step.c)
        steps.append(step)
        numbers.append(b)
        wordings.append(f"{op}{which}")
        sentences.append(relations[op][which].format(x=x, y=y, b=b, i=item))
    if len(people) == 2 or rng.random() < 0.5:
        x, y = people[-2:]
        steps.append(Equation(values[-2], "+", values[-1]))
        sentences.append(f"How many {item} do {x} and {y} have together?")
        wordings.append("together")
    else:
        sentences.append(f"How many {item} does {people[-1]} have?")
        wordings.append("last")
    return WordProblem(
        " ".join(sentences), tuple(steps), item, ("compare", str(start), *wordings), tuple(numbers)
    )


def _earn(rng: Random) -> WordProblem:
    name, p = rng.choice(NAMES), rng.randint(2, 12)
    h, k, spent = rng.randint(2, 9), rng.randint(2, 9), rng.randint(3, 60)
    pay, work, end = rng.randrange(3), rng.randrange(3), rng.randrange(4)
    sentences = [
        ("{n} earns {p} dollars an hour.", "{n} gets {p} dollars for an hour of work.",
         "An hour pays {n} {p} dollars.")[pay],
        ("{n} works {h} hours on Monday and {k} hours on Friday.",
         "On Monday {n} works {h} hours and on Friday {k} hours.",
         "{n} works {h} hours and then {k} hours more.")[work],
    ]  # fmt: skip
    steps = [Equation(h, "+", k)]
    steps.append(Equation(steps[0].c, "*", p))
    numbers = [p, h, k]
    if end:
        steps.append(Equation(steps[1].c, "-", spent))
        numbers.append(spent)
        sentences.append(
            (
                "Then {n} spends {s} dollars.",
                "{n} pays {s} dollars for food.",
                "The bus costs {n} {s} dollars.",
            )[end - 1]
        )
        sentences.append("How many dollars are left?")
    else:
        sentences.append("How many dollars does {n} earn?")
    text = " ".join(sentences).format(n=name, p=p, h=h, k=k, s=spent)
    return WordProblem(text, tuple(steps), "dollars", ("earn", str(pay), str(work), str(end)), tuple(numbers))


def draw_word_problem(rng: Random) -> WordProblem:
    """One problem, families in the shares 40 : 20 : 20 : 20."""
    while True:
        family = rng.choice((_chain, _chain, _price, _compare, _earn))
        try:
            problem = family(rng)
            problem.answer  # noqa: B018 (raises Unfit where a value leaves 1..99)
            return problem
        except Unfit:
            continue


def draw_equation(rng: Random) -> Equation:
    """One bare equation, for drills."""
    while True:
        op = rng.choice("+++---**/")
        try:
            a = rng.randint(2, 99) if op in "+-/" else rng.randint(2, 49)
            equation = Equation(a, op, rng.randint(2, 90) if op in "+-" else _drill_factor(op, a, rng))
            equation.c  # noqa: B018
            return equation
        except Unfit:
            continue


def _drill_factor(op: str, a: int, rng: Random) -> int:
    return rng.randint(2, 12) if op == "*" else _operand("/", a, rng)


def draw_choice(rng: Random) -> tuple[WordProblem, list[str]]:
    """A one-step problem with three wrong worked answers: wrong result, wrong operation, other numbers."""
    while True:
        try:
            problem = _chain(rng, length=1)
        except Unfit:
            continue
        (step,) = problem.steps
        others = {"+": "-*", "-": "+*", "*": "+-", "/": "-+"}[step.op]
        wrong_result = step.c + rng.choice((-10, -2, -1, 1, 2, 10))
        shifted = Equation(step.a, step.op, step.b + rng.choice((-2, -1, 1, 2)))
        try:
            wrong_op = Equation(step.a, rng.choice(others), step.b)
            options = [f"{step.a}{step.op}{step.b}={wrong_result}", str(wrong_op), str(shifted)]
        except (Unfit, ZeroDivisionError):
            continue
        wrong = {wrong_result, wrong_op.c, shifted.c}  # 2*2 is no wrong answer to 2+2
        if 1 <= wrong_result <= 99 and shifted.b >= 1 and step.c not in wrong and len(set(options)) == 3:
            return problem, [f"{text} {problem.unit}.\n#### {text.split('=')[1]}" for text in options]

"""Small programs in HumanEval's schema: a signature and docstring, a reference solution, asserts that run it.

Lists: filter, then map, then reduce, with constants; strings: two operations and a reduction; numbers: a
branch. The operations are the composition, the constants the numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

FUNCTIONS = ("solve", "process", "compute", "convert", "apply", "measure", "collect", "handle")

# name -> (docstring part, Python condition on x); {k} is the constant
_FILTERS = {
    "even": ("Keep the even numbers of xs", "x % 2 == 0"),
    "odd": ("Keep the odd numbers of xs", "x % 2 == 1"),
    "above": ("Keep the numbers of xs above {k}", "x > {k}"),
    "below": ("Keep the numbers of xs below {k}", "x < {k}"),
    "divisible": ("Keep the numbers of xs divisible by {k}", "x % {k} == 0"),
    "differ": ("Drop the numbers of xs equal to {k}", "x != {k}"),
    "positive": ("Keep the positive numbers of xs", "x > 0"),
    "negative": ("Keep the negative numbers of xs", "x < 0"),
}
_MAPS = {
    "double": ("double each one", "x * 2"),
    "square": ("square each one", "x * x"),
    "negate": ("negate each one", "-x"),
    "plus": ("add {k} to each one", "x + {k}"),
    "minus": ("subtract {k} from each one", "x - {k}"),
    "times": ("multiply each one by {k}", "x * {k}"),
    "modulo": ("take each one modulo {k}", "x % {k}"),
    "abs": ("take the absolute value of each one", "abs(x)"),
}
_REDUCTIONS = {
    "sum": ("return the sum", "sum(zs)"),
    "count": ("return how many there are", "len(zs)"),
    "largest": ("return the largest, or zero if there is none", "max(zs, default=0)"),
    "smallest": ("return the smallest, or zero if there is none", "min(zs, default=0)"),
    "sorted": ("return them in rising order", "sorted(zs)"),
    "falling": ("return them in falling order", "sorted(zs, reverse=True)"),
    "reversed": ("return them from last to first", "zs[::-1]"),
    "list": ("return the list", "zs"),
    "distinct": ("return how many differ", "len(set(zs))"),
    "any": ("return whether any is above {k}", "any(z > {k} for z in zs)"),
    "all": ("return whether all are below {k}", "all(z < {k} for z in zs)"),
}
_STRINGS = {
    "upper": ("in upper case", "upper()"),
    "lower": ("in lower case", "lower()"),
    "strip": ("without outer spaces", "strip()"),
    "title": ("with capital first letters", "title()"),
    "drop": ("without every letter {c}", "replace('{c}', '')"),
    "swap": ("with every letter {c} changed to {d}", "replace('{c}', '{d}')"),
}
_STRING_ENDS = {
    "text": ("return it", "t"),
    "reversed": ("return it from last to first", "t[::-1]"),
    "length": ("return its length", "len(t)"),
    "first": ("return its first {k} letters", "t[:{k}]"),
    "last": ("return its last {k} letters", "t[-{k}:]"),
    "repeat": ("return it repeated {k} times", "t * {k}"),
    "words": ("return its list of words", "t.split()"),
    "counts": ("return how often it has the letter {c}", "t.count('{c}')"),
}
_COMPARISONS = {"above": ">", "below": "<", "equal to": "=="}
_ARITHMETIC = {"plus": "+", "minus": "-", "times": "*", "modulo": "%"}


@dataclass(frozen=True)
class CodeProblem:
    """Prompt, reference body and the inputs it is checked on.

    Attributes:
        prompt: signature and docstring, ends in a newline; solution: the body.
        composition: the operations; numbers: constants and letters.
    """

    name: str
    argument: str
    docstring: str
    solution: str
    inputs: tuple[object, ...]
    composition: tuple[str, ...]
    numbers: tuple[object, ...]

    @property
    def prompt(self) -> str:
        return f'def {self.name}({self.argument}):\n    """{self.docstring}"""\n'

    @property
    def expected(self) -> list[object]:
        namespace: dict[str, object] = {}
        exec(self.prompt + self.solution, namespace)  # our own reference solution
        return [namespace[self.name](value) for value in self.inputs]  # type: ignore[operator]

    @property
    def test(self) -> str:
        asserts = [
            f"    assert candidate({x!r}) == {y!r}" for x, y in zip(self.inputs, self.expected, strict=True)
        ]
        return "\n".join(["def check(candidate):", *asserts, ""])


def _lists(rng: Random, name: str) -> CodeProblem:
    keys = [rng.choice(list(table)) for table in (_FILTERS, _MAPS, _REDUCTIONS)]
    parts, numbers = [], []
    for key, table in zip(keys, (_FILTERS, _MAPS, _REDUCTIONS), strict=True):
        words, code = table[key]
        k = rng.randint(2, 9) if key in ("divisible", "modulo", "times") else rng.randint(2, 30)
        if "{k}" in words:
            numbers.append(k)
        parts.append((words.format(k=k), code.format(k=k)))
    (keep, condition), (change, value), (end, result) = parts
    body = f"    ys = [x for x in xs if {condition}]\n    zs = [{value} for x in ys]\n    return {result}\n"
    inputs: list[object] = [[rng.randint(-40, 60) for _ in range(rng.randint(4, 9))] for _ in range(5)]
    special = [n for n in numbers if isinstance(n, int)] or [0]
    inputs += [[], [special[0], special[0] + 1, special[0] - 1, special[0] * 2, special[-1], special[-1]]]
    return CodeProblem(
        name, "xs", f"{keep}, {change} and {end}.", body, tuple(inputs), ("list", *keys), tuple(numbers)
    )


def _strings(rng: Random, name: str) -> CodeProblem:
    first, second = rng.sample(list(_STRINGS), 2)
    end = rng.choice(list(_STRING_ENDS))
    letters = rng.sample("abcdefghiklmnoprstuvw", 5)
    k = rng.randint(2, 6)
    one, two = (
        tuple(part.format(c=letters[2 * i], d=letters[2 * i + 1]) for part in _STRINGS[key])
        for i, key in enumerate((first, second))
    )
    last, result = (part.format(c=letters[4], k=k) for part in _STRING_ENDS[end])
    docstring = f"Take s {one[0]} and then {two[0]} and {last}."
    body = f"    t = s.{one[1]}\n    t = t.{two[1]}\n    return {result}\n"
    used = [
        letters[2 * i : 2 * i + 2 if key == "swap" else 2 * i + 1]
        for i, key in enumerate((first, second))
        if key in ("drop", "swap")
    ]
    numbers: tuple[object, ...] = tuple(letter for pair in used for letter in pair)
    numbers += (letters[4],) if end == "counts" else (k,) if "{k}" in _STRING_ENDS[end][0] else ()
    inputs = [_text(rng, letters) for _ in range(5)] + [
        "",
        f" {''.join(letters)} {''.join(letters).upper()} ",
    ]
    return CodeProblem(name, "s", docstring, body, tuple(inputs), ("string", first, second, end), numbers)


def _text(rng: Random, letters: list[str]) -> str:
    words = [
        "".join(rng.choice([*letters, "x", "Y", "q"]) for _ in range(rng.randint(1, 6))) for _ in range(3)
    ]
    return rng.choice((" ", "")) + " ".join(words) + rng.choice((" ", ""))


def _branches(rng: Random, name: str) -> CodeProblem:
    comparison = rng.choice(list(_COMPARISONS))
    test = _COMPARISONS[comparison]
    a_op, b_op = (rng.choice(list(_ARITHMETIC)) for _ in range(2))
    k, a, b = rng.randint(2, 60), rng.randint(2, 20), rng.randint(2, 20)
    docstring = f"If n is {comparison} {k} return n {a_op} {a}, otherwise return n {b_op} {b}."
    yes, no = f"n {_ARITHMETIC[a_op]} {a}", f"n {_ARITHMETIC[b_op]} {b}"
    body = f"    if n {test} {k}:\n        return {yes}\n    return {no}\n"
    inputs = (k, k + 1, k - 1, 0, -k, k * 2, rng.randint(0, 90))
    return CodeProblem(name, "n", docstring, body, inputs, ("branch", comparison, a_op, b_op), (k, a, b))


def draw_string_program(rng: Random) -> CodeProblem:
    """One string program."""
    return _strings(rng, rng.choice(FUNCTIONS))


def draw_code_problem(rng: Random) -> CodeProblem:
    """One program; lists, strings, branches in the shares 60 : 25 : 15."""
    family = rng.choices((_lists, _strings, _branches), weights=(60, 25, 15))[0]
    return family(rng, rng.choice(FUNCTIONS))

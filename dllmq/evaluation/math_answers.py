"""Whether two final answers of the MATH data set are equal: as strings, or as values.

lm-eval compares the strings, then asks SymPy whether the difference of the parsed LaTeX simplifies to 0.
SymPy's parser needs an antlr4 that excludes Hydra's, so values are computed here: exactly (as fractions)
while they are rational, else as complex numbers at three fixed points of the variables, to 12 digits. What
cannot be read (tuples, intervals, matrices, words) is equal as a string or not at all, as in lm-eval.
"""

from __future__ import annotations

import cmath
import re
from fractions import Fraction

Value = Fraction | complex
_TOKEN = re.compile(r"\d+\.?\d*|\.\d+|\\[A-Za-z]+|\\.|\S")
_IGNORED = ("\\left", "\\right", "\\!", "\\,", "\\;")
_TIMES, _OVER = ("*", "\\cdot", "\\times"), ("/", "\\div")
_POINTS = (0.7316 + 0j, -1.3911 + 0j, 2.2937 + 0.611j)
_DIGITS = 1e-12
_LARGEST_POWER = 4096  # of an exact value


def same_value(a: str, b: str) -> bool:
    """Whether two normalized answers are equal; see the module's docstring."""
    if a and a == b:
        return True
    try:
        return all(_close(_Reader(a, point).value(), _Reader(b, point).value()) for point in _POINTS)
    except (ValueError, ZeroDivisionError, OverflowError, RecursionError):
        return False


def _close(a: Value, b: Value) -> bool:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    return cmath.isclose(complex(a), complex(b), rel_tol=_DIGITS, abs_tol=_DIGITS)


class _Reader:
    """Recursive descent over LaTeX arithmetic. Letters are variables: each its own multiple of `point`."""

    def __init__(self, text: str, point: complex) -> None:
        self.tokens = [token for token in _TOKEN.findall(text) if token not in _IGNORED]
        self.at, self.point = 0, point

    def value(self) -> Value:
        result = self.sum()
        if self.at < len(self.tokens):
            raise ValueError(f"{self.peek()} is not arithmetic")
        return result

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self, expected: str = "") -> str:
        token = self.peek()
        if not token or (expected and token != expected):
            raise ValueError(f"expected {expected or 'a value'}, found {token or 'the end'}")
        self.at += 1
        return token

    def sum(self) -> Value:
        result = self.product()
        while self.peek() in ("+", "-"):
            sign = 1 if self.take() == "+" else -1
            result = _add(result, sign, self.product())
        return result

    def product(self) -> Value:
        if self.peek() in ("-", "+"):
            sign = -1 if self.take() == "-" else 1
            return sign * self.product()
        result = self.power()
        while (token := self.peek()) and token not in ("+", "-", ")", "}", "]"):
            if token in _TIMES or token in _OVER:
                self.take()
            factor = self.power()
            result = _over(result, factor) if token in _OVER else _times(result, factor)
        return result

    def power(self) -> Value:
        base = self.atom()
        if self.peek() != "^":
            return base
        self.take()
        return _raised(base, -self.atom() if self.peek() == "-" and self.take() else self.atom())

    def atom(self) -> Value:
        token = self.take()
        if token[0].isdigit() or (token[0] == "." and len(token) > 1):
            return Fraction(token.rstrip("."))
        if token in ("(", "{"):
            result = self.sum()
            self.take(")" if token == "(" else "}")
            return result
        if token in ("\\frac", "\\dfrac", "\\tfrac", "frac"):
            return _over(self.argument(), self.argument())
        if token == "\\sqrt":
            return self.root()
        if token == "\\pi":
            return complex(cmath.pi)
        if len(token) == 1 and token.isalpha() and token.isascii():
            return self.point * (1 + ord(token) / 97)
        raise ValueError(f"{token} is not arithmetic")

    def argument(self) -> Value:
        """An argument of \\frac: without braces it is one digit."""
        token = self.peek()
        if token.isdigit():
            self.tokens[self.at : self.at + 1] = [token[0], *filter(None, [token[1:]])]
        return self.atom()

    def root(self) -> Value:
        index: Value = Fraction(2)
        if self.peek() == "[":
            self.take()
            index = self.sum()
            self.take("]")
        return _raised(self.atom(), _over(Fraction(1), index))


def _exact(a: Value, b: Value) -> bool:
    return isinstance(a, Fraction) and isinstance(b, Fraction)


def _add(a: Value, sign: int, b: Value) -> Value:
    return a + sign * b if _exact(a, b) else complex(a) + sign * complex(b)


def _times(a: Value, b: Value) -> Value:
    return a * b if _exact(a, b) else complex(a) * complex(b)


def _over(a: Value, b: Value) -> Value:
    return a / b if _exact(a, b) else complex(a) / complex(b)


def _raised(base: Value, exponent: Value) -> Value:
    whole = isinstance(exponent, Fraction) and exponent.denominator == 1 and abs(exponent) <= _LARGEST_POWER
    if isinstance(base, Fraction) and whole and len(str(base)) <= 40:
        return base ** int(exponent.real)
    return complex(base) ** complex(exponent)

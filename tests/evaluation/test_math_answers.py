"""Equality of final answers of MATH."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllmq.evaluation.math_answers import same_value


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("[2,5)", "[2,5)"),
        ("\\frac{1}{2}", "0.5"),
        ("\\frac12", "1/2"),
        ("\\frac123", "3/2"),
        ("\\frac{\\sqrt{3}}{3}", "\\frac{1}{\\sqrt{3}}"),
        ("\\sqrt[3]{8}", "2"),
        ("2\\sqrt{2}", "\\sqrt{8}"),
        ("(x+1)^{2}", "x^{2}+2x+1"),
        ("3x-2y", "-2y+3x"),
        ("\\frac{x}{2}-\\frac{y}{2}", "(x-y)/2"),
        ("\\pi/2", "\\frac{\\pi}{2}"),
        ("2^{-3}", "0.125"),
        ("-2^2", "-4"),
        ("\\left(3\\right)", "3"),
        ("10^{30}+1-10^{30}", "1"),
        ("2\\cdot3\\cdot 5", "30"),
    ],
)
def test_equal(a: str, b: str) -> None:
    assert same_value(a, b) and same_value(b, a)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("0.33", "\\frac{1}{3}"),
        ("[2,5)", "(2,5)"),
        ("(1,2)", "(2,1)"),
        ("x+1", "y+1"),
        ("x", "x^{2}"),
        ("1000000000000000001", "1000000000000000002"),
        ("\\text{east}", "\\text{west}"),
        ("", ""),
        ("", "0"),
        ("1/0", "2/0"),
        ("9^{9^{9^{9}}}", "9^{9^{9^{8}}}"),
        ("\\sqrt{x^{2}}", "x"),
        ("{" * 4000, "1"),
        ("[invalidanswer]", "1"),
    ],
)
def test_not_equal(a: str, b: str) -> None:
    assert not same_value(a, b) and not same_value(b, a)


@settings(max_examples=30)
@given(st.integers(-999, 999), st.integers(1, 99), st.integers(-9, 9))
def test_fractions_written_in_different_ways(p: int, q: int, shift: int) -> None:
    whole = f"{shift}+\\frac{{{p}}}{{{q}}}"
    assert same_value(whole, f"({p}+{q}*({shift}))/{q}")
    assert not same_value(whole, f"({p}+{q}*({shift})+1)/{q}")

"""Runs are interleaved, and a ratio is that of one round."""

import time

import pytest
import torch

from dllmq.bench.timing import Measured, interleaved, ratio

CPU = torch.device("cpu")


def test_runs_take_turns_after_a_warm_up() -> None:
    order: list[str] = []

    def run(name: str) -> str:
        order.append(name)
        time.sleep(0.002)
        return name

    found = interleaved({"a": lambda: run("a"), "b": lambda: run("b")}, repeats=3, device=CPU, enough=1e-9)
    assert order[-6:] == ["a", "b"] * 3
    assert [found[name].output for name in "ab"] == ["a", "b"]
    assert all(len(found[name].seconds) == 3 and min(found[name].seconds) >= 0.002 for name in "ab")


def test_short_runs_are_repeated_within_a_sample_and_told_per_call() -> None:
    calls = 0

    def run() -> None:
        nonlocal calls
        calls += 1
        time.sleep(0.001)

    found = interleaved({"a": run}, repeats=1, device=CPU, enough=0.01)
    assert 4 <= calls - 2 <= 11  # two to warm up
    assert 0.001 <= found["a"].median < 0.005


def test_ratio_is_of_the_same_round() -> None:
    """A machine that becomes ten times slower changes no ratio."""
    base, ours = Measured((2.0, 20.0, 4.0), None), Measured((1.0, 10.0, 1.0), None)
    found = ratio(base, ours)
    assert (found.median, found.low, found.high) == (2.0, 2.0, 4.0)
    assert base.median == 4.0


def test_rounds_are_paired() -> None:
    with pytest.raises(ValueError):
        ratio(Measured((1.0, 2.0), None), Measured((1.0,), None))

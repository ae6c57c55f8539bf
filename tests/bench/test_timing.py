"""Runs are interleaved, and a ratio is that of one round."""

from types import SimpleNamespace

import pytest
import torch

from dllmq.bench import timing
from dllmq.bench.timing import Measured, interleaved, ratio

CPU = torch.device("cpu")


class Clock:
    """In the place of the machine's: it goes on where a run says how long it takes."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=clock.perf_counter))
    return clock


def test_runs_take_turns_after_a_warm_up(clock: Clock) -> None:
    order: list[str] = []

    def run(name: str) -> str:
        order.append(name)
        clock.now += 0.002
        return name

    found = interleaved({"a": lambda: run("a"), "b": lambda: run("b")}, repeats=3, device=CPU, enough=1e-9)
    assert order[-6:] == ["a", "b"] * 3
    assert [found[name].output for name in "ab"] == ["a", "b"]
    assert all(found[name].seconds == pytest.approx((0.002,) * 3) for name in "ab")


def test_short_runs_are_repeated_within_a_sample_and_told_per_call(clock: Clock) -> None:
    calls = 0

    def run() -> None:
        nonlocal calls
        calls += 1
        clock.now += 0.001

    found = interleaved({"a": run}, repeats=1, device=CPU, enough=0.01)
    assert calls == 2 + 1 + 10  # two to warm up, one that was too short for a sample
    assert found["a"].median == pytest.approx(0.001)


def test_a_first_call_that_compiles_says_nothing_about_the_others(clock: Clock) -> None:
    """Single launches of a kernel beside hundreds of another's would be measured with their start."""
    calls = {"compiled": 0, "ready": 0}

    def run(name: str) -> None:
        calls[name] += 1
        clock.now += 3.0 if name == "compiled" and calls[name] == 1 else 0.0001

    found = interleaved({name: (lambda name=name: run(name)) for name in calls}, 2, CPU, enough=0.02)
    assert calls["compiled"] >= 2 * 200 and calls["ready"] >= 2 * 200
    assert found["compiled"].seconds == pytest.approx((0.0001,) * 2)


def test_a_run_that_is_slow_at_first_only_is_sampled_for_long_enough(clock: Clock) -> None:
    """Also where the second call was slow, too, so that the number of calls was found too small."""
    calls = 0

    def run() -> None:
        nonlocal calls
        calls += 1
        clock.now += 0.5 if calls <= 2 else 0.001

    assert interleaved({"a": run}, 1, CPU, enough=0.02)["a"].median == pytest.approx(0.001)
    assert calls == 2 + 1 + 20


def test_ratio_is_of_the_same_round() -> None:
    """A machine that becomes ten times slower changes no ratio."""
    base, ours = Measured((2.0, 20.0, 4.0), None), Measured((1.0, 10.0, 1.0), None)
    found = ratio(base, ours)
    assert (found.median, found.low, found.high) == (2.0, 2.0, 4.0)
    assert base.median == 4.0


def test_rounds_are_paired() -> None:
    with pytest.raises(ValueError):
        ratio(Measured((1.0, 2.0), None), Measured((1.0,), None))

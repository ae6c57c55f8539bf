"""Choosing tiles by time, which the interpreter never does; needs no triton."""

from typing import Any

import pytest

from dllmq.kernels import triton_jit
from dllmq.kernels.triton_jit import fastest, power_of_2
from dllmq.kernels.triton_linear import candidates

TIMES = {"slow": 3.0, "quick": 1.0, "too large": float("inf")}


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """As on a GPU, where each candidate takes its time; what was measured."""
    seen: list[str] = []

    def milliseconds(run: Any, candidate: str) -> float:
        seen.append(candidate)
        return TIMES[candidate]

    monkeypatch.setattr(triton_jit, "is_interpreted", lambda: False)
    monkeypatch.setattr(triton_jit, "_milliseconds", milliseconds)
    monkeypatch.setattr(triton_jit, "_CHOSEN", {})
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: False)
    return seen


def test_the_fastest_is_measured_once_for_each_key(timed: list[str]) -> None:
    names = list(TIMES)
    assert [fastest(key, names, print) for key in ("a", "a", "b")] == ["quick"] * 3
    assert timed == names * 2


def test_one_candidate_is_not_measured(timed: list[str]) -> None:
    assert fastest("a", ["slow"], print) == "slow" and timed == []


def test_the_first_where_nothing_can_be_measured(timed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, and while a graph is captured; what was measured before is kept."""
    fastest("a", list(TIMES), print)
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: True)
    assert fastest("b", list(TIMES), print) == "slow" and fastest("a", list(TIMES), print) == "quick"


def test_powers_of_2() -> None:
    assert [power_of_2(n) for n in (1, 2, 3, 4, 5, 525, 4096)] == [1, 2, 4, 4, 8, 1024, 4096]


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("T", [1, 16, 64, 65, 512, 4096])
def test_tiles_are_what_the_tensor_cores_take(monkeypatch: pytest.MonkeyPatch, T: int, grouped: bool) -> None:
    """Powers of 2, 16 tokens or more; and no wider than few tokens need."""
    monkeypatch.setattr("dllmq.kernels.triton_linear.is_interpreted", lambda: False)
    for tiles in candidates(T, 4096, 128, grouped):
        assert all(n == power_of_2(n) for n in (tiles.outputs, tiles.tokens, tiles.columns, tiles.warps))
        assert tiles.tokens >= 16 and (T > 64 or tiles.tokens < max(32, 2 * T))
        assert tiles.registers is None or tiles.registers * tiles.warps * 32 * 2 <= 65_536

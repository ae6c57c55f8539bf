"""Interleaved repeats: A B A B ..., so that a machine that slows down slows both, and a ratio per round."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

ENOUGH = 0.02  # seconds one sample lasts, about; shorter runs are repeated within it
Run = Callable[[], Any]


@dataclass(frozen=True)
class Measured:
    """Seconds of one call, a sample per round, and what the last call returned."""

    seconds: tuple[float, ...]
    output: Any

    @property
    def median(self) -> float:
        return median(self.seconds)


@dataclass(frozen=True)
class Ratio:
    """baseline / ours over the rounds: median, lowest, highest. Above 1, ours is the faster one."""

    median: float
    low: float
    high: float


def interleaved(
    runs: Mapping[str, Run], repeats: int, device: torch.device, enough: float = ENOUGH
) -> dict[str, Measured]:
    """Times every run once a round, in the given order, `repeats` rounds after a warm-up of each.

    Whether a sample lasted long enough is seen in every round: a first call that compiles tells nothing of
    how often a run has to be called.

    Args:
        runs: name -> what to time.
        repeats: rounds, at least 1.
        device: of the work; a GPU is waited for before the clock is read.
        enough: seconds a sample lasts, half of it at least.
    """
    calls, outputs = dict.fromkeys(runs, 1), {}
    for name, run in runs.items():
        seconds, outputs[name] = _sample(run, 1, device)  # the warm-up: compiles, packs, fills caches
        if seconds < 50 * enough:
            _, outputs[name] = _sample(run, 1, device)
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            seconds, outputs[name] = _sample(run, calls[name], device)
            while seconds * calls[name] < enough / 2:
                calls[name] = max(2 * calls[name], round(enough / max(seconds, 1e-7)))
                seconds, outputs[name] = _sample(run, calls[name], device)
            samples[name].append(seconds)
    return {name: Measured(tuple(samples[name]), outputs[name]) for name in runs}


def _sample(run: Run, calls: int, device: torch.device) -> tuple[float, Any]:
    """Seconds a call, over `calls` of them, and the last one's output."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        output = run()
    synchronize(device)
    return (time.perf_counter() - start) / calls, output


def synchronize(device: torch.device) -> None:
    """Waits for a GPU's queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio(baseline: Measured, ours: Measured) -> Ratio:
    """Of the samples of the same round."""
    pairs = [b / o for b, o in zip(baseline.seconds, ours.seconds, strict=True)]
    return Ratio(median(pairs), min(pairs), max(pairs))

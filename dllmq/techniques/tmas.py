"""TMAS, Temporal-Mask Adaptive Sampling (DLLMQuant, arXiv 2508.14090): which states calibrate.

The full-precision sampler's trajectory is split into K blocks by mask ratio (block 0 = most masked) and the
calibration set takes shares [0.3, 0.2, 0.2, 0.3] of them, at regular intervals inside a block.

Where the paper is silent, we decide: blocks are equal intervals of the response's mask ratio; quotas by
largest remainder (ties: the earlier block); a block with too few states donates its rest to the others,
extremes first; picks go round the prompts, each prompt used before any is used again, in a seeded order. The
authors published no code.

Off: `calibration.states.CleanText`.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch

from dllmq.calibration.states import RowState, Trajectory, ratio_block

log = logging.getLogger(__name__)


def quotas(count: int, shares: tuple[float, ...]) -> list[int]:
    """`count` split by shares, rounded by largest remainder; ties go to the earlier block."""
    exact = [count * share / sum(shares) for share in shares]
    floor = [int(x + 1e-9) for x in exact]
    by_remainder = sorted(range(len(shares)), key=lambda k: (round(floor[k] - exact[k], 9), k))
    for k in by_remainder[: count - sum(floor)]:
        floor[k] += 1
    return floor


def donate(quota: list[int], available: list[int]) -> list[int]:
    """Moves what a block cannot fill to blocks that can, extremes (first, last, second, ...) first."""
    take = [min(q, a) for q, a in zip(quota, available, strict=True)]
    rest = sum(quota) - sum(take)
    extremes_first = sorted(range(len(quota)), key=lambda k: (min(k, len(quota) - 1 - k), k))
    for k in extremes_first:
        more = min(rest, available[k] - take[k])
        take[k] += more
        rest -= more
    return take


def pick(states_of_prompt: list[list[int]], quota: int, order: list[int]) -> list[tuple[int, int]]:
    """`quota` (prompt, state) pairs of one block: regular intervals inside it, prompts in turn.

    Args:
        states_of_prompt: indices of each prompt's states in this block, in the order of the steps.
    """
    holders = [i for i in order if states_of_prompt[i]]
    used: dict[int, set[int]] = {i: set() for i in holders}
    picks: list[tuple[int, int]] = []
    turn = 0
    while len(picks) < quota:
        prompt = holders[turn % len(holders)]
        turn += 1
        states = states_of_prompt[prompt]
        free = [s for s in states if s not in used[prompt]]
        if not free:
            continue
        wanted = states[int((len(picks) + 0.5) / quota * len(states))]
        state = min(free, key=lambda s: (abs(s - wanted), s))
        used[prompt].add(state)
        picks.append((prompt, state))
    return picks


@dataclass(frozen=True)
class TMAS:
    """The sampler; `shares` from most to least masked."""

    shares: tuple[float, ...] = (0.3, 0.2, 0.2, 0.3)
    name: str = "tmas"
    rescored: bool = False

    def __post_init__(self) -> None:
        if not all(s >= 0 for s in self.shares) or not 0 < sum(self.shares) < math.inf:
            raise ValueError(
                f"calibration.shares are {list(self.shares)}; they must be >= 0 with a positive sum "
                "that is finite."
            )

    def __call__(
        self, trajectories: list[Trajectory], count: int, mask_id: int, rng: torch.Generator
    ) -> list[RowState]:
        K = len(self.shares)
        blocks = [ratio_block(t.mask_ratio, K).tolist() for t in trajectories]
        in_block = [[[s for s, b in enumerate(row) if b == k] for row in blocks] for k in range(K)]
        available = [sum(len(states) for states in prompts) for prompts in in_block]
        if sum(available) < count:
            raise ValueError(
                f"calibration.num_states is {count}, but {len(trajectories)} trajectories hold "
                f"{sum(available)} states: ask for fewer, or give more calibration prompts."
            )
        quota = quotas(count, self.shares)
        take = donate(quota, available)
        if take != quota:
            log.warning("TMAS: the shares ask for %s states by block, the trajectories allow %s", quota, take)
        rows: list[RowState] = []
        order = torch.randperm(len(trajectories), generator=rng).tolist()
        for k in range(K):
            start = len(rows) % len(order)
            picks = pick(in_block[k], take[k], order[start:] + order[:start])
            rows += [trajectories[prompt].state(state, prompt) for prompt, state in picks]
        return rows

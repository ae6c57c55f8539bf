"""TMAS: shares of the paper, donated where a block is short, at regular intervals, round the prompts."""

import logging
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_llada import MASK, tiny_model, tiny_trajectories

from dllmq.calibration.states import RowState, Trajectory, ratio_block
from dllmq.techniques.tmas import TMAS, donate, pick, quotas

PAPER = (0.3, 0.2, 0.2, 0.3)


@pytest.fixture(scope="module")
def recorded() -> list[Trajectory]:
    """Four prompts, 16 states each, 4 in every block."""
    return tiny_trajectories(tiny_model())


def draw(
    trajectories: list[Trajectory], count: int, seed: int = 0, shares: tuple[float, ...] = PAPER
) -> list[RowState]:
    return TMAS(shares)(trajectories, count, MASK, torch.Generator().manual_seed(seed))


def by_block(rows: list[RowState], blocks: int = 4) -> list[int]:
    index = ratio_block(torch.tensor([row.mask_ratio for row in rows]), blocks).tolist()
    return [index.count(k) for k in range(blocks)]


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (10, [3, 2, 2, 3]),
        (128, [38, 26, 26, 38]),  # 38.4 25.6 25.6 38.4
        (1, [1, 0, 0, 0]),  # .3 .2 .2 .3: the earlier of equals
        (2, [1, 0, 0, 1]),
        (5, [2, 1, 1, 1]),  # 1.5 1 1 1.5
        (7, [2, 2, 1, 2]),  # 2.1 1.4 1.4 2.1
    ],
)
def test_largest_remainder(count: int, expected: list[int]) -> None:
    assert quotas(count, PAPER) == expected


def test_shares_need_not_sum_to_one() -> None:
    assert quotas(10, (3.0, 2.0, 2.0, 3.0)) == quotas(10, PAPER)
    assert quotas(5, (0.1, 0.3)) == quotas(5, (1.0, 3.0)) == [1, 4]  # 1.25 3.75
    assert quotas(6, (1.0, 3.0)) == [2, 4]  # 1.5 4.5: a tie goes to the earlier


@given(st.integers(1, 500), st.lists(st.floats(0.01, 1), min_size=1, max_size=6))
def test_quotas_sum_up_and_miss_by_less_than_one(count: int, shares: list[float]) -> None:
    found = quotas(count, tuple(shares))
    assert sum(found) == count
    assert all(abs(q - count * s / sum(shares)) < 1 + 1e-6 for q, s in zip(found, shares, strict=True))


@pytest.mark.parametrize(
    ("quota", "available", "expected"),
    [
        ([3, 2, 2, 3], [9, 9, 9, 9], [3, 2, 2, 3]),
        ([3, 2, 2, 3], [9, 0, 9, 9], [5, 0, 2, 3]),  # the first extreme
        ([3, 2, 2, 3], [4, 0, 9, 9], [4, 0, 2, 4]),  # then the last
        ([3, 2, 2, 3], [3, 2, 9, 0], [3, 2, 5, 0]),  # then the inner ones
        ([3, 2, 2, 3], [0, 4, 4, 4], [0, 4, 2, 4]),
    ],
)
def test_a_short_block_donates_to_the_extremes_first(
    quota: list[int], available: list[int], expected: list[int]
) -> None:
    found = donate(quota, available)
    assert sum(found) == sum(quota) and all(f <= a for f, a in zip(found, available, strict=True))
    assert found == expected


def test_regular_intervals_inside_a_block() -> None:
    """Of 12 states of one prompt, 1, 2, 3, 4 picks lie in the middles of as many equal intervals."""
    states = [list(range(20, 32))]
    assert [s - 20 for _, s in pick(states, 1, [0])] == [6]
    assert [s - 20 for _, s in pick(states, 2, [0])] == [3, 9]
    assert [s - 20 for _, s in pick(states, 3, [0])] == [2, 6, 10]
    assert [s - 20 for _, s in pick(states, 4, [0])] == [1, 4, 7, 10]
    assert [s - 20 for _, s in pick(states, 12, [0])] == list(range(12))


def test_picks_go_round_the_prompts() -> None:
    states = [[0, 1, 2, 3], [], [0, 1, 2, 3], [0]]
    picks = pick(states, 6, [3, 0, 1, 2])
    assert [prompt for prompt, _ in picks] == [3, 0, 2, 0, 2, 0]  # prompt 1 has none, prompt 3 only one
    assert len(set(picks)) == 6


@given(st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(lambda sizes: sum(sizes) > 0), st.data())
def test_picks_are_distinct_and_spread(sizes: list[int], data: st.DataObject) -> None:
    quota = data.draw(st.integers(1, sum(sizes)))
    picks = pick([list(range(n)) for n in sizes], quota, list(range(len(sizes))))
    assert len(set(picks)) == quota
    used = Counter(prompt for prompt, _ in picks)
    for prompt, n in enumerate(sizes):  # nobody is used twice more than one who still has states
        assert used[prompt] == n or used[prompt] >= max(used.values()) - 1


@pytest.mark.parametrize("count", [1, 10, 13, 40])
def test_quotas_hold_on_recorded_trajectories(recorded: list[Trajectory], count: int) -> None:
    rows = draw(recorded, count)
    assert by_block(rows) == quotas(count, PAPER)
    assert len({(row.prompt, row.step) for row in rows}) == count
    for row in rows:
        t = recorded[row.prompt]
        assert torch.equal(row.tokens, t.tokens[row.step]) and torch.equal(row.score, t.score[row.step])


@pytest.mark.parametrize("count", [4, 10, 40])
def test_prompts_are_used_evenly_over_all_blocks(recorded: list[Trajectory], count: int) -> None:
    used = Counter(row.prompt for row in draw(recorded, count))
    assert len(used) == 4 and max(used.values()) - min(used.values()) <= 1


def test_a_draw_follows_its_seed(recorded: list[Trajectory]) -> None:
    draws = [[(row.prompt, row.step) for row in draw(recorded, 10, seed)] for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_donation_is_logged(recorded: list[Trajectory], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        rows = draw(recorded, 60)  # 18 12 12 18 wanted, 16 in each block
    assert by_block(rows) == [16, 16, 12, 16]
    assert "[18, 12, 12, 18]" in caplog.text and "[16, 16, 12, 16]" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        draw(recorded, 10)
    assert not caplog.text


def test_all_states_can_be_drawn_but_no_more(recorded: list[Trajectory]) -> None:
    assert by_block(draw(recorded, 64)) == [16] * 4
    with pytest.raises(
        ValueError, match="num_states is 65, but 4 trajectories hold 64 states: ask for fewer"
    ):
        draw(recorded, 65)


def test_other_blocks_than_four(recorded: list[Trajectory]) -> None:
    assert by_block(draw(recorded, 10, shares=(0.5, 0.5)), 2) == [5, 5]
    assert by_block(draw(recorded, 6, shares=(0.0, 1.0, 0.0)), 3) == [0, 6, 0]


@pytest.mark.parametrize("shares", [(), (0.5, -0.1), (0.0, 0.0), (float("nan"), 1.0), (float("inf"),)])
def test_shares_that_are_none(shares: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"shares are .*>= 0 with a positive sum"):
        TMAS(shares)

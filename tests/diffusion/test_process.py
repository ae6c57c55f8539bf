"""The forward process: mask counts, mask ratios, and the schedule that undoes them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllmq.diffusion.process import mask_tokens, stratified_masks, tokens_per_step


def test_larger_counts_come_first() -> None:
    assert tokens_per_step(torch.tensor([16, 33, 3, 0]), 5).tolist() == [
        [4, 3, 3, 3, 3],
        [7, 7, 7, 6, 6],
        [1, 1, 1, 0, 0],
        [0, 0, 0, 0, 0],
    ]


@given(n=st.integers(0, 300), steps=st.integers(1, 300))
def test_counts_add_up_and_differ_by_at_most_one(n: int, steps: int) -> None:
    counts = tokens_per_step(torch.tensor([n]), steps)[0].tolist()
    assert sum(counts) == n and len(counts) == steps
    assert counts == sorted(counts, reverse=True) and counts[0] - counts[-1] <= 1


def test_mask_tokens_masks_the_response_only_at_the_rate_of_its_row() -> None:
    x_0 = torch.arange(4000).repeat(4, 1)
    response = torch.arange(4000).expand(4, -1) >= 1000
    t = torch.tensor([0.0, 0.25, 0.8, 1.0])
    x_t, masked = mask_tokens(x_0, response, t, mask_id=9999, generator=torch.Generator().manual_seed(0))
    assert not (masked & ~response).any()
    assert torch.equal(x_t == 9999, masked) and torch.equal(x_t[~masked], x_0[~masked])
    ratio = masked.sum(1) / 3000
    assert ratio[0] == 0 and ratio[3] == 1
    torch.testing.assert_close(ratio, t, atol=0.04, rtol=0)  # 4 standard errors


def test_mask_tokens_repeats_from_its_seed_and_nests_in_t() -> None:
    x_0, response = torch.zeros(1, 200, dtype=torch.long), torch.ones(1, 200, dtype=torch.bool)

    def draw(t: float) -> torch.Tensor:
        return mask_tokens(x_0, response, torch.tensor([t]), 1, torch.Generator().manual_seed(3))[1]

    assert torch.equal(draw(0.5), draw(0.5))
    assert not (draw(0.3) & ~draw(0.7)).any()


@pytest.mark.parametrize("t", [-0.1, 1.5, float("nan")])
def test_mask_ratio_out_of_range_is_refused(t: float) -> None:
    ids = torch.zeros(1, 2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"lie in \[0, 1\]"):
        mask_tokens(ids, ids == 0, torch.tensor([t]), 1)


@given(length=st.integers(1, 40), batch=st.integers(1, 16), seed=st.integers(0, 99))
def test_stratified_counts_cover_one_to_T_evenly(length: int, batch: int, seed: int) -> None:
    masks, counts = stratified_masks(length, batch, torch.Generator().manual_seed(seed))
    assert torch.equal(masks.sum(1), counts)
    assert counts.min() >= 1 and counts.max() <= length
    if length % batch == 0:  # whole strides: one count in each residue class
        stride = length // batch
        assert sorted(((counts - 1) // stride).tolist()) == list(range(batch))


def test_stratified_counts_round_half_to_even() -> None:
    for seed in range(8):
        k = int(torch.randint(1, 4, (), generator=torch.Generator().manual_seed(seed)))
        _, counts = stratified_masks(3, 2, torch.Generator().manual_seed(seed))
        second = {1: 2, 2: 4, 3: 4}[k]  # round(k + 1.5)
        assert counts.tolist() == [k, (second - 1) % 3 + 1]

"""Divergence: known answers from trajectories made by hand, and runs of models that do and do not agree."""

from dataclasses import replace

import pytest
import torch
from tiny_llada import SAMPLER, tiny_model, tiny_prompts

from dllmq.calibration.states import Trajectory, record_trajectories
from dllmq.evaluation.divergence import compare_trajectories, measure_divergence

MASK, BATCH = 9, 4


def trajectory(prompt: list[int], commits: list[tuple[int, int, int]], num_steps: int) -> Trajectory:
    """Four response positions; commits (step, position, token), one a step."""
    x = torch.tensor(prompt + [MASK] * 4)
    tokens, committed = [], []
    for _, position, token in commits:
        tokens.append(x.clone())
        x[len(prompt) + position] = token
        committed.append(x != tokens[-1])
    states = torch.stack(tokens)
    return Trajectory(
        tokens=states,
        masked=states == MASK,
        score=torch.zeros(states.shape),
        committed=torch.stack(committed),
        step=torch.tensor([step for step, _, _ in commits]),
        final=x,
        prompt_length=len(prompt),
        num_steps=num_steps,
    )


FP = trajectory([5, 5], [(0, 0, 1), (1, 1, 2), (2, 2, 3), (3, 3, 4)], 4)


def test_divergence_of_a_hand_made_pair() -> None:
    """Same first commit; then the other order, which is made up for; then another token, which is not."""
    other = trajectory([5, 5], [(0, 0, 1), (1, 2, 3), (2, 1, 2), (3, 3, 7)], 4)
    found = compare_trajectories([FP], [other])
    assert found.curves["divergence_by_step"] == {"step": [0, 1, 2, 3], "value": [0, 0.5, 0, 0.25]}
    assert found.curves["divergence_mask_ratio_by_step"]["value"] == [1, 0.75, 0.5, 0.25]
    values = {name: figure["value"] for name, figure in found.values.items()}
    assert values == {
        "final_agreement": 0.75,
        "exact_match_rate": 0,
        "first_divergence_step": 1,
        "first_divergence_mask_ratio": 0.75,
    }
    assert found.per_prompt == {"final_agreement": [0.75]}


def test_prompts_that_do_not_diverge_have_no_first_step() -> None:
    other = trajectory([5, 5], [(0, 0, 1), (1, 1, 2), (2, 2, 3), (3, 3, 7)], 4)
    found = compare_trajectories([FP, FP, FP], [FP, other, FP])
    assert found.values["first_divergence_step"] == {"value": 3, "stderr": None, "n": 1}
    assert found.values["first_divergence_mask_ratio"]["value"] == 0.25
    assert found.values["exact_match_rate"]["value"] == pytest.approx(2 / 3)
    assert found.values["final_agreement"]["n"] == 3
    assert found.values["final_agreement"]["stderr"] == pytest.approx(0.25 / 3)
    assert found.per_prompt["final_agreement"] == [1, 0.75, 1]


def test_steps_are_aligned_where_a_run_skips_some() -> None:
    """8 steps, of which these runs recorded four: in between and afterwards their state stands still."""
    gaps = trajectory([5, 5], [(0, 0, 1), (2, 1, 2), (4, 2, 3), (5, 3, 4)], 8)
    other = trajectory([5, 5], [(0, 0, 1), (1, 1, 2), (4, 2, 3), (6, 3, 4)], 8)
    found = compare_trajectories([gaps], [other])
    assert found.curves["divergence_by_step"]["value"] == [0, 0.25, 0, 0, 0, 0.25, 0, 0]
    ratios = [1, 0.75, 0.75, 0.5, 0.5, 0.25, 0, 0]
    assert found.curves["divergence_mask_ratio_by_step"]["value"] == ratios
    assert found.values["first_divergence_step"]["value"] == 1
    assert found.values["exact_match_rate"]["value"] == 1  # it diverged on the way only


def test_masks_that_stay_count_in_the_mask_ratio_of_the_end() -> None:
    left = trajectory([5, 5], [(0, 0, 1), (1, 1, 2)], 4)
    ratios = compare_trajectories([left], [left]).curves["divergence_mask_ratio_by_step"]["value"]
    assert ratios == [1, 0.75, 0.5, 0.5]


def test_a_model_does_not_diverge_from_itself() -> None:
    prompts = tiny_prompts()
    reference = record_trajectories(tiny_model(0), prompts, SAMPLER, BATCH)
    found = measure_divergence(tiny_model(0), reference, prompts, SAMPLER, BATCH)
    assert found.curves["divergence_by_step"] == {"step": list(range(16)), "value": [0] * 16}
    assert found.values["final_agreement"] == {"value": 1, "stderr": 0, "n": 4}
    assert found.values["exact_match_rate"]["value"] == 1
    assert found.values["first_divergence_step"] == {"value": None, "stderr": None, "n": 0}
    assert found.values["first_divergence_mask_ratio"]["value"] is None


def test_another_model_is_compared_on_its_own_run() -> None:
    """Agreement at the end is that of the two models' answers; noise is drawn from the same seed."""
    prompts, sampler = tiny_prompts(), replace(SAMPLER, temperature=0.5)
    reference = record_trajectories(tiny_model(0), prompts, sampler, BATCH, seed=3)
    found = measure_divergence(tiny_model(1), reference, prompts, sampler, BATCH, seed=3)
    own = record_trajectories(tiny_model(1), prompts, sampler, BATCH, seed=3)
    expected = [
        float((a.final == b.final)[a.prompt_length :].float().mean())
        for a, b in zip(reference, own, strict=True)
    ]
    assert found.per_prompt["final_agreement"] == pytest.approx(expected)
    assert found.values["final_agreement"]["value"] == pytest.approx(sum(expected) / 4) != 1
    same = measure_divergence(tiny_model(0), reference, prompts, sampler, BATCH, seed=3)
    assert same.values["exact_match_rate"]["value"] == 1


def test_other_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="got 2 and 1 trajectories"):
        compare_trajectories([FP, FP], [FP])
    with pytest.raises(ValueError, match="trajectory 0 starts from another prompt"):
        compare_trajectories([FP], [replace(FP, tokens=FP.tokens + 1)])
    with pytest.raises(ValueError, match=r"trajectory 0 .* other steps"):
        compare_trajectories([FP], [replace(FP, num_steps=8)])

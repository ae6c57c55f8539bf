"""Trajectories are what the sampler yields; the samplers of states differ in masking alone."""

from dataclasses import replace

import pytest
import torch
from tiny_llada import EOS, MASK, SAMPLER, tiny_model, tiny_prompts, tiny_trajectories

from dllmq.calibration.states import (
    CalibrationState,
    CleanText,
    RandomMask,
    RowState,
    StateSampler,
    Trajectory,
    UniformTrajectory,
    _rescore,
    batched,
    batches_of,
    collate,
    describe,
    draw_states,
    iterate_rows,
    left_pad,
    ratio_block,
    record_trajectories,
)
from dllmq.diffusion import apply, denoise
from dllmq.models.llada import LLaDA
from dllmq.techniques.tmas import TMAS

SAMPLERS: list[StateSampler] = [CleanText(), RandomMask(), UniformTrajectory(), TMAS()]


@pytest.fixture(scope="module")
def model() -> LLaDA:
    return tiny_model()


@pytest.fixture(scope="module")
def trajectories(model: LLaDA) -> list[Trajectory]:
    return tiny_trajectories(model)


def rows_of(
    sampler: StateSampler, trajectories: list[Trajectory], count: int, seed: int = 0
) -> list[RowState]:
    return sampler(trajectories, count, MASK, torch.Generator().manual_seed(seed))


# Recording ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("observe", ["masked", "all"])
def test_trajectories_are_what_denoise_yields(model: LLaDA, observe: str) -> None:
    """Prompt by prompt, unpadded; recorded in one batch of different lengths, so padding leaves no trace."""
    prompts = tiny_prompts()
    recorded = record_trajectories(model, prompts, SAMPLER, batch_size=4, observe=observe)
    for prompt, trajectory in zip(prompts, recorded, strict=True):
        steps = list(denoise(model, prompt[None], SAMPLER, observe=observe))
        assert torch.equal(trajectory.tokens, torch.cat([s.tokens for s in steps]))
        assert torch.equal(trajectory.masked, torch.cat([s.masked for s in steps]))
        assert torch.equal(trajectory.committed, torch.cat([s.committed for s in steps]))
        assert torch.equal(trajectory.final, apply(steps[-1])[0])
        torch.testing.assert_close(trajectory.score, torch.cat([s.score for s in steps]), atol=1e-5, rtol=0)
        assert trajectory.step.tolist() == list(range(16)) and trajectory.prompt_length == len(prompt)
        assert torch.equal(trajectory.masked, trajectory.tokens == MASK)


def test_mask_ratio_counts_the_response_only(trajectories: list[Trajectory]) -> None:
    for t in trajectories:
        torch.testing.assert_close(t.mask_ratio, 1 - torch.arange(16) / 16)
        assert t.state(4, 0).mask_ratio == pytest.approx(0.75)


def test_scores_are_where_the_mask_is(trajectories: list[Trajectory]) -> None:
    for t in trajectories:
        assert bool((t.score[t.masked] > 0).all()) and not bool(t.score[~t.masked].any())


def test_sampled_trajectories_follow_the_seed(model: LLaDA) -> None:
    noisy = replace(SAMPLER, temperature=1.0)
    runs = [record_trajectories(model, tiny_prompts(), noisy, 4, seed=seed) for seed in (0, 0, 1)]
    finals = [torch.cat([t.final for t in run]) for run in runs]
    assert torch.equal(finals[0], finals[1]) and not torch.equal(finals[0], finals[2])


# Drawing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [4, 6, 12])
@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: s.name)
def test_every_sampler_has_the_same_budget(
    model: LLaDA, trajectories: list[Trajectory], sampler: StateSampler, count: int
) -> None:
    """Equal sequences and, prompt by prompt, equal tokens, though the prompts differ in length."""
    used = [row.prompt for row in rows_of(sampler, trajectories, count)]
    assert sorted(used) == sorted(row.prompt for row in rows_of(CleanText(), trajectories, count))
    drawn = describe(draw_states(model, trajectories, sampler, count, batch_size=3, seed=0))
    clean = describe(draw_states(model, trajectories, CleanText(), count, batch_size=3, seed=0))
    assert (drawn["sequences"], drawn["tokens"]) == (count, clean["tokens"])


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: s.name)
def test_a_draw_is_a_function_of_the_seed(trajectories: list[Trajectory], sampler: StateSampler) -> None:
    def drawn(seed: int) -> list[list[int]]:
        return [row.tokens.tolist() for row in rows_of(sampler, trajectories, 6, seed)]

    assert drawn(3) == drawn(3)
    assert drawn(3) != drawn(4)


def test_clean_has_no_mask(trajectories: list[Trajectory]) -> None:
    for row in rows_of(CleanText(), trajectories, 8):
        assert torch.equal(row.tokens, trajectories[row.prompt].final)
        assert not bool(row.masked.any()) and not bool((row.tokens == MASK).any()) and row.mask_ratio == 0


def test_what_the_sampler_left_masked_counts_as_masked(trajectories: list[Trajectory]) -> None:
    final = trajectories[0].final.clone()
    final[-2] = MASK
    (row,) = rows_of(CleanText(), [replace(trajectories[0], final=final)], 1)
    assert row.masked.nonzero().flatten().tolist() == [len(final) - 2]


def test_random_mask_masks_the_response_only(trajectories: list[Trajectory]) -> None:
    ratios = []
    for row in rows_of(RandomMask(), trajectories, 200):
        x_0 = trajectories[row.prompt].final
        assert not bool(row.masked[: row.prompt_length].any())
        assert torch.equal(row.tokens, torch.where(row.masked, MASK, x_0))
        ratios.append(row.mask_ratio)
    assert 0.4 < sum(ratios) / len(ratios) < 0.6 and min(ratios) < 0.1 and max(ratios) > 0.9  # t ~ U(0, 1)


def test_uniform_takes_states_of_the_trajectory_and_every_step(trajectories: list[Trajectory]) -> None:
    rows = rows_of(UniformTrajectory(), trajectories, 300)
    assert {row.step for row in rows} == set(range(16))
    for row in rows[:20]:
        t = trajectories[row.prompt]
        assert torch.equal(row.tokens, t.tokens[row.step]) and torch.equal(row.score, t.score[row.step])


def test_prompts_are_used_evenly(trajectories: list[Trajectory]) -> None:
    used = [row.prompt for row in rows_of(CleanText(), trajectories, 10)]
    assert sorted(used[:4]) == sorted(used[4:8]) == [0, 1, 2, 3] and used[:2] == used[8:]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_rescored_states_have_the_scores_of_a_direct_forward(
    model: LLaDA, trajectories: list[Trajectory], batch_size: int
) -> None:
    for state in draw_states(model, trajectories, RandomMask(), 6, batch_size, seed=1):
        for b in range(len(state.tokens)):
            valid, masked = state.valid[b], state.masked[b]
            p = torch.softmax(model(state.tokens[b][valid][None])[0], -1).amax(-1)
            torch.testing.assert_close(state.score[b][masked], p[masked[valid]], atol=1e-5, rtol=0)
            assert not bool(state.score[b][~masked].any())


GUIDED = [
    {},
    {"cfg_scale": 1.5},
    {"logits_eos_inf": True, "cfg_scale": 0.5},
    {"confidence_eos_eot_inf": True},
]


@pytest.mark.parametrize("observe", ["masked", "all"])
@pytest.mark.parametrize("options", GUIDED, ids=str)
def test_a_state_scored_again_has_the_score_of_its_run(model: LLaDA, options: dict, observe: str) -> None:
    """Guidance, EOS flags and padding included; of decoded tokens and the prompt's too under "all"."""
    config = replace(SAMPLER, **options)
    recorded = record_trajectories(model, tiny_prompts(), config, 4, observe=observe)
    rows = [t.state(step, i) for i, t in enumerate(recorded) for step in (0, 6, 15)]
    for state in batches_of(rows, 5, EOS, 16):
        again = _rescore(model, replace(state, score=torch.zeros_like(state.score)), config, observe)
        assert again.score.dtype == torch.float32 and not bool(again.score[~state.valid].any())
        torch.testing.assert_close(again.score, state.score, atol=1e-5, rtol=0)


def test_decoded_tokens_are_scored_when_asked(model: LLaDA, trajectories: list[Trajectory]) -> None:
    for draw in (RandomMask(), CleanText()):
        masked, every = (
            draw_states(model, trajectories, draw, 6, 3, seed=1, observe=observe)
            for observe in ("masked", "all")
        )
        for a, b in zip(masked, every, strict=True):
            assert torch.equal(b.score > 0, b.valid) and torch.equal(a.score > 0, a.masked)
            torch.testing.assert_close(a.score[a.masked], b.score[a.masked], atol=1e-5, rtol=0)


def test_states_with_nothing_to_score_take_no_forward(
    model: LLaDA, trajectories: list[Trajectory], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dllmq.calibration.states.state_confidence", None)
    for state in draw_states(model, trajectories, CleanText(), 4, 2, seed=0):
        assert not bool(state.score.any())


def test_states_of_the_trajectory_keep_the_scores_of_the_run(
    model: LLaDA, trajectories: list[Trajectory]
) -> None:
    for state in draw_states(model, trajectories, UniformTrajectory(), 6, 3, seed=1):
        p = torch.softmax(model(state.tokens, state.valid), -1).amax(-1)
        torch.testing.assert_close(state.score[state.masked], p[state.masked], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("count", "words"), [(0, "num_states is 0"), (-3, "at least 1")])
def test_no_states_are_refused(model: LLaDA, trajectories: list[Trajectory], count: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        draw_states(model, trajectories, CleanText(), count, 4, seed=0)


def test_no_prompts_are_refused(model: LLaDA) -> None:
    with pytest.raises(ValueError, match="no calibration prompts"):
        draw_states(model, [], CleanText(), 4, 4, seed=0)


# Batches ------------------------------------------------------------------------------------------


def test_batches_are_a_function_of_the_lengths_alone() -> None:
    lengths = [5, 3, 9, 3, 5, 7]
    assert batched(list(range(6)), lengths, 4) == [[1, 3, 0, 4], [5, 2]]
    assert batched([5, 4, 3, 2, 1, 0], lengths, 4) == [[1, 3, 0, 4], [5, 2]]


def test_batches_do_not_depend_on_what_the_rows_hold(trajectories: list[Trajectory]) -> None:
    clean, masked = (
        batches_of(rows_of(sampler, trajectories, 7), 3, EOS, 16) for sampler in (CleanText(), RandomMask())
    )
    assert [s.valid.tolist() for s in clean] == [s.valid.tolist() for s in masked]
    assert [s.response.tolist() for s in clean] == [s.response.tolist() for s in masked]


def test_collate_pads_on_the_left(trajectories: list[Trajectory]) -> None:
    rows = [trajectories[1].state(5, 1), trajectories[2].state(9, 2)]  # prompts of 3 and 7 tokens
    state = collate(rows, EOS, 16)
    assert state.tokens.shape == (2, 23) and state.step.tolist() == [5, 9]
    assert state.tokens[0, :4].tolist() == [EOS] * 4 and torch.equal(state.tokens[0, 4:], rows[0].tokens)
    assert state.valid[0].tolist() == [False] * 4 + [True] * 19
    assert state.response.sum(1).tolist() == [16, 16] and bool(state.response[:, -16:].all())
    assert torch.equal(state.masked, state.tokens == MASK)
    assert not bool(state.score[0, :4].any())
    torch.testing.assert_close(state.mask_ratio, torch.tensor([11 / 16, 7 / 16]))


def test_left_pad() -> None:
    assert left_pad([torch.tensor([1, 2]), torch.tensor([3])], 9, 3).tolist() == [[9, 1, 2], [9, 9, 3]]


# Describing ---------------------------------------------------------------------------------------


def test_describe_counts(trajectories: list[Trajectory]) -> None:
    rows = [trajectories[0].state(s, 0) for s in (0, 3, 4, 8, 15)] + rows_of(CleanText(), trajectories[:1], 1)
    states: list[CalibrationState] = batches_of(rows, 4, EOS, 16)
    assert describe(states) == {
        "sequences": 6,
        "tokens": 6 * 21,
        "masked_tokens": 16 + 13 + 12 + 8 + 1,
        "mean_mask_ratio": pytest.approx(50 / 96),
        "by_block": [2, 1, 1, 2],  # ratios 1, .81 | .75 | .5 | .06, 0
        "unmasked_sequences": 1,
    }


def test_blocks_are_open_below_and_closed_above() -> None:
    ratios = torch.tensor([1.0, 0.76, 0.75, 0.51, 0.5, 0.26, 0.25, 0.01, 0.0])
    assert ratio_block(ratios).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 3]
    tenths = torch.arange(11) / 10
    assert ratio_block(tenths, 10).tolist() == [9, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0]


def test_every_state_is_iterated_once(trajectories: list[Trajectory]) -> None:
    rows = list(iterate_rows(trajectories))
    assert [(row.prompt, row.step) for row in rows] == [(i, s) for i in range(4) for s in range(16)]

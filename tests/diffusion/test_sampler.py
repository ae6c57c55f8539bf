"""The reverse process against a plain re-statement of ML-GSAI/LLaDA's generate()."""

import pytest
import torch
from tiny_mask_predictor import EOS, EOT, MASK, VOCAB, FixedLogits, TinyModel, UniformModel, prompts
from torch import Tensor

from dllmq.diffusion import SamplerConfig, Step, apply, denoise, generate, state_confidence


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def reference_generate(
    model: TinyModel, prompt: Tensor, c: SamplerConfig, attention_mask: Tensor | None = None, seed: int = 0
) -> Tensor:
    """ML-GSAI's loop: full logits in every step, one row at a time, always `steps` forwards.

    Two things are pinned for comparison: random draws come from one generator, Gumbel's u only where a token
    can be committed; equal confidences go to the leftmost.
    """
    g = seeded(seed)
    rows, prompt_length = prompt.shape
    x = torch.full((rows, prompt_length + c.gen_length), MASK)
    x[:, :prompt_length] = prompt
    if attention_mask is not None:
        attention_mask = torch.cat([attention_mask, torch.ones(rows, c.gen_length, dtype=torch.long)], dim=1)
    given = x != MASK
    num_blocks = c.gen_length // c.block_length
    steps_per_block = c.steps // num_blocks
    for block in range(num_blocks):
        start, end = (prompt_length + (block + j) * c.block_length for j in (0, 1))
        in_block = (x[:, start:end] == MASK).sum(1)
        for i in range(steps_per_block):
            masked = x == MASK
            if c.cfg_scale > 0:
                unconditional = torch.where(given, MASK, x)
                cond = model(x, attention_mask)
                uncond = model(unconditional, attention_mask)
                logits = uncond + (c.cfg_scale + 1) * (cond - uncond)
            else:
                logits = model(x, attention_mask).clone()
            if c.logits_eos_inf:
                logits[:, :, EOS] = -torch.inf
            noisy = logits
            if c.temperature > 0:
                can_commit = masked.clone()
                can_commit[:, end:] = False
                u = torch.full(logits.shape, 0.5, dtype=torch.float64)
                u[can_commit] = torch.rand(int(can_commit.sum()), VOCAB, generator=g, dtype=torch.float64)
                noisy = logits.double().exp() / (-u.log()) ** c.temperature
            x0 = noisy.argmax(-1)
            if c.confidence_eos_eot_inf:
                noisy[:, :, EOS] = logits[:, :, EOT] = -torch.inf
            if c.remasking == "low_confidence":
                confidence = logits.softmax(-1).gather(-1, x0[..., None])[..., 0]
            else:
                confidence = torch.rand(x.shape, generator=g)
            confidence[:, end:] = -torch.inf
            confidence[~masked] = -torch.inf
            for row in range(rows):
                k = int(in_block[row]) // steps_per_block + (i < int(in_block[row]) % steps_per_block)
                best = sorted(range(x.shape[1]), key=lambda j, r=row: (-float(confidence[r, j]), j))
                for j in best[:k]:
                    if masked[row, j]:
                        x[row, j] = x0[row, j]
    return x


def left_padded() -> tuple[Tensor, Tensor]:
    ids = prompts(3, 6)
    attention_mask = torch.ones_like(ids)
    for row, pads in enumerate((0, 2, 5)):
        ids[row, :pads] = EOS
        attention_mask[row, :pads] = 0
    return ids, attention_mask


SCHEDULES = [
    (8, 8, 8),
    (8, 8, 4),
    (8, 4, 2),
    (12, 6, 4),
    (12, 9, 4),
    (7, 3, 7),
    (6, 12, 3),
    (6, 2, 3),
    (5, 1, 5),
]


@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tokens_equal_the_reference_for_every_schedule(
    schedule: tuple[int, int, int], cfg_scale: float
) -> None:
    config = SamplerConfig(*schedule, cfg_scale=cfg_scale)
    ids, attention_mask = left_padded()
    model = TinyModel()
    expected = reference_generate(model, ids, config, attention_mask)
    assert torch.equal(generate(model, ids, config, attention_mask).tokens, expected)
    expected = reference_generate(model, ids, config)
    assert torch.equal(generate(model, ids, config).tokens, expected)


FLAGS = [
    {"logits_eos_inf": True},
    {"confidence_eos_eot_inf": True},
    {"logits_eos_inf": True, "confidence_eos_eot_inf": True},
    {"remasking": "random"},
    {"temperature": 0.8},
    {"temperature": 1.3, "remasking": "random", "cfg_scale": 0.5},
    {"temperature": 0.8, "confidence_eos_eot_inf": True},
    {"temperature": 0.8, "logits_eos_inf": True, "cfg_scale": 1.5},
]


def eos_prone(dtype: torch.dtype = torch.float64) -> TinyModel:
    """Predicts EOS and EoT often enough for the flags to matter."""
    model = TinyModel(dtype)
    with torch.no_grad():
        model.unembedding[:, EOS] = 1.1 * model.unembedding[:, 5]
        model.unembedding[:, EOT] = 1.1 * model.unembedding[:, 1]
    return model


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("schedule", [(12, 6, 4), (10, 10, 10), (6, 12, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tokens_equal_the_reference_for_every_option(
    flags: dict, schedule: tuple[int, int, int], dtype: torch.dtype
) -> None:
    config = SamplerConfig(*schedule, **flags)
    ids, attention_mask = left_padded()
    model = eos_prone(dtype)
    expected = reference_generate(model, ids, config, attention_mask, seed=5)
    got = generate(model, ids, config, attention_mask, seeded(5)).tokens
    assert torch.equal(got, expected)


def test_the_eos_flags_change_what_is_generated() -> None:
    ids = prompts()
    plain, eos, eot = (
        generate(eos_prone(), ids, SamplerConfig(12, 6, 12, **flags)).tokens[:, ids.shape[1] :]
        for flags in ({}, {"logits_eos_inf": True}, {"confidence_eos_eot_inf": True})
    )
    assert (plain == EOS).any() and not (eos == EOS).any() and not torch.equal(plain, eot)


def test_confidence_flag_zeroes_both_at_t0_and_only_eot_above() -> None:
    logits = torch.zeros(VOCAB, dtype=torch.float64)
    logits[EOS], logits[EOT], logits[3] = 6.0, 5.0, 4.0
    ids = prompts(1)
    for temperature, excluded in ((0.0, [EOS, EOT]), (1e-6, [EOT])):
        config = SamplerConfig(2, 2, 2, temperature=temperature, confidence_eos_eot_inf=True)
        step = next(denoise(FixedLogits(logits), ids, config, generator=seeded()))
        assert (step.prediction[step.observed] == EOS).all()  # x0 itself is untouched
        p = logits.clone()
        p[excluded] = -torch.inf
        expected = p.softmax(0)[EOS].float().expand(2)
        torch.testing.assert_close(step.score[step.observed], expected)


@pytest.mark.parametrize("options", [{}, {"cfg_scale": 1.5}, {"remasking": "random"}])
def test_masks_in_the_prompt_compete_for_the_quota(options: dict) -> None:
    ids = prompts(3, 6)
    ids[0, 2] = ids[0, 4] = ids[2, 0] = MASK
    config = SamplerConfig(8, 4, 4, **options)
    expected = reference_generate(TinyModel(), ids, config)
    got = generate(TinyModel(), ids, config, generator=seeded()).tokens
    assert torch.equal(got, expected)
    assert (got == MASK).sum(1).tolist() == [2, 0, 1]


def test_a_predicted_mask_id_spends_its_slot() -> None:
    logits = torch.zeros(VOCAB, dtype=torch.float64)
    logits[MASK] = 1.0
    steps = list(denoise(FixedLogits(logits), prompts(1, 3), SamplerConfig(4, 4, 4)))
    assert len(steps) == 4 and not any(step.committed.any() for step in steps)
    assert (apply(steps[-1])[:, 3:] == MASK).all()
    model = TinyModel()
    with torch.no_grad():
        model.unembedding[:, MASK] = 1.1 * model.unembedding[:, 5]
    config = SamplerConfig(12, 6, 4)
    expected = reference_generate(model, prompts(), config)
    assert (expected == MASK).any()
    assert torch.equal(generate(model, prompts(), config).tokens, expected)


@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
def test_padded_batch_rows_equal_single_rows(cfg_scale: float) -> None:
    ids, attention_mask = left_padded()
    config = SamplerConfig(8, 4, 4, cfg_scale=cfg_scale)
    batch = generate(TinyModel(), ids, config, attention_mask).tokens
    for row in range(3):
        alone = generate(TinyModel(), ids[row : row + 1, attention_mask[row] == 1], config).tokens
        assert torch.equal(batch[row, attention_mask[row].argmax() :], alone[0])


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"remasking": "random"}, {"cfg_scale": 1.0}])
def test_tokens_do_not_depend_on_what_is_observed(options: dict) -> None:
    ids, attention_mask = left_padded()
    config = SamplerConfig(12, 6, 4, **options)
    expected = generate(TinyModel(torch.bfloat16), ids, config, attention_mask, seeded()).tokens
    for observe in ("committable", "masked", "all"):
        for keep in (False, True):
            model = TinyModel(torch.bfloat16)
            *_, last = denoise(model, ids, config, attention_mask, seeded(), observe, keep)
            assert torch.equal(apply(last), expected)


def test_the_head_runs_only_where_tokens_can_be_committed() -> None:
    model = TinyModel()
    generate(model, prompts(2), SamplerConfig(8, 8, 4))
    assert model.rows_read == 2 * (4 + 3 + 2 + 1) * 2  # rows x masks left in the block x blocks


@pytest.mark.parametrize(
    ("schedule", "forwards"), [((8, 8, 4), 8), ((8, 2, 4), 2), ((6, 12, 3), 6), ((6, 10, 6), 6)]
)
@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
def test_forwards_counts_model_calls(schedule: tuple[int, int, int], forwards: int, cfg_scale: float) -> None:
    model = TinyModel()
    result = generate(model, prompts(), SamplerConfig(*schedule, cfg_scale=cfg_scale))
    assert result.forwards == model.calls == forwards
    assert not (result.tokens == MASK).any()


@pytest.mark.parametrize("observe", ["committable", "masked", "all"])
def test_steps_are_a_trajectory(observe: str) -> None:
    ids = prompts(2)
    config = SamplerConfig(9, 9, 3)
    steps = list(denoise(TinyModel(), ids, config, observe=observe, keep_logits=True))
    assert [step.index for step in steps] == list(range(9))
    assert [step.block for step in steps] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [step.forwards for step in steps] == list(range(1, 10))
    canvas = torch.cat([ids, torch.full((2, 9), MASK)], dim=1)
    assert torch.equal(steps[0].tokens, canvas)
    for step, after in zip(steps, [*(s.tokens for s in steps[1:]), apply(steps[-1])], strict=True):
        assert torch.equal(step.masked, step.tokens == MASK) and step.num_steps == 9
        assert torch.equal(after, apply(step))
        assert torch.equal(after == MASK, step.masked & ~step.committed)
        assert (step.committed.sum(1) == 1).all() and not (step.committed & ~step.masked).any()
        end = ids.shape[1] + (step.block + 1) * 3
        left = torch.arange(canvas.shape[1]) < end
        expected = {
            "committable": step.masked & left,
            "masked": step.masked,
            "all": torch.ones_like(step.masked),
        }
        assert torch.equal(step.observed, expected[observe])


def test_observed_values_are_those_of_the_full_forward() -> None:
    ids, attention_mask = left_padded()
    config = SamplerConfig(8, 8, 4, cfg_scale=0.5)
    full_mask = torch.cat([attention_mask, torch.ones(3, 8, dtype=torch.long)], dim=1)
    model = TinyModel()
    for step in denoise(model, ids, config, attention_mask, observe="all", keep_logits=True):
        given = step.tokens.clone()
        given[:, : ids.shape[1]] = MASK
        c, u = model(step.tokens, full_mask), model(given, full_mask)
        logits = u + 1.5 * (c - u)
        p, x0 = logits.softmax(-1).max(-1)
        assert step.logits is not None
        torch.testing.assert_close(step.logits.view_as(logits), logits)
        assert torch.equal(step.prediction, x0)
        torch.testing.assert_close(step.score, p.float())


def test_what_is_not_observed_has_no_score_and_keeps_its_token() -> None:
    step = next(denoise(TinyModel(), prompts(), SamplerConfig(8, 8, 4)))
    assert (step.score[step.observed] > 0).all() and (step.score[~step.observed] == 0).all()
    assert torch.equal(step.prediction[~step.observed], step.tokens[~step.observed])
    assert step.logits is None


def test_logits_are_read_in_chunks_without_changing_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SamplerConfig(12, 6, 12, temperature=0.7)
    whole = generate(TinyModel(), prompts(), config, generator=seeded()).tokens
    monkeypatch.setattr("dllmq.diffusion.predict.CHUNK", 5)
    chunked = generate(TinyModel(), prompts(), config, generator=seeded()).tokens
    assert torch.equal(whole, chunked)
    step = next(
        denoise(TinyModel(), prompts(), config, generator=seeded(), observe="masked", keep_logits=True)
    )
    assert step.logits is not None and step.logits.shape == (36, VOCAB)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_equal_confidences_commit_left_to_right_and_equal_logits_take_the_lowest_id(
    dtype: torch.dtype,
) -> None:
    for i, step in enumerate(denoise(UniformModel(dtype), prompts(2, 3), SamplerConfig(40, 20, 40))):
        assert step.committed.nonzero()[:, 1].view(2, 2).tolist() == [[3 + 2 * i, 4 + 2 * i]] * 2
        assert (step.prediction[step.observed] == 0).all()


def test_bfloat16_has_finite_float32_confidence_and_repeats() -> None:
    ids, attention_mask = left_padded()
    config = SamplerConfig(16, 8, 8, cfg_scale=1.0)
    runs = [list(denoise(TinyModel(torch.bfloat16), ids, config, attention_mask)) for _ in range(2)]
    for a, b in zip(*runs, strict=True):
        assert a.score.dtype == torch.float32 and a.score.isfinite().all()
        assert torch.equal(a.score, b.score) and torch.equal(apply(a), apply(b))


@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"remasking": "random"}])
def test_seeds_repeat_and_differ(options: dict) -> None:
    config = SamplerConfig(16, 8, 16, **options)
    a, b, c = (generate(TinyModel(), prompts(), config, generator=seeded(s)).tokens for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    torch.manual_seed(0)
    assert torch.equal(generate(TinyModel(), prompts(), config).tokens, a)  # None: torch's default generator


def test_greedy_decoding_draws_no_random_numbers() -> None:
    g = seeded()
    before = g.get_state()
    generate(TinyModel(), prompts(), SamplerConfig(8, 8, 4), generator=g)
    assert torch.equal(g.get_state(), before)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_gumbel_samples_the_tempered_softmax(temperature: float) -> None:
    logits = torch.randn(VOCAB, generator=seeded(4), dtype=torch.float64)
    config = SamplerConfig(4000, 1, 4000, temperature=temperature)
    tokens = generate(FixedLogits(logits), prompts(1, 1), config, generator=seeded(2)).tokens[0, 1:]
    share = torch.bincount(tokens, minlength=VOCAB) / 4000
    expected = (logits / temperature).softmax(0)
    error = (share - expected) / (expected * (1 - expected) / 4000).sqrt()
    assert error.abs().max() < 4


def test_runs_under_inference_mode_and_leaves_states_that_can_be_used_outside() -> None:
    config = SamplerConfig(8, 4, 4)
    expected = generate(TinyModel(), prompts(), config).tokens
    with torch.inference_mode():
        assert torch.equal(generate(TinyModel(), prompts(), config).tokens, expected)
    for step in denoise(TinyModel(), prompts(), config):
        assert torch.is_grad_enabled()  # the consumer's mode is its own
        assert not step.tokens.is_inference() and not step.score.requires_grad


def test_nan_from_the_model_is_named() -> None:
    with pytest.raises(FloatingPointError, match="denoising step 1 of 4"):
        generate(FixedLogits(torch.full((VOCAB,), torch.nan)), prompts(), SamplerConfig(4, 4, 4))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"gen_length": 10}, "gen_length must be a multiple of block_length; got gen_length=10"),
        ({"block_length": 64}, "multiple of block_length"),
        ({"steps": 30}, "number of blocks, gen_length / block_length = 32 / 8 = 4; got steps=30"),
        ({"steps": 2}, "steps .* must be a multiple"),
        ({"steps": 0}, "steps must be an integer >= 1; got 0"),
        ({"gen_length": 0}, "gen_length must be an integer >= 1"),
        ({"temperature": -0.5}, "temperature must be a finite number >= 0; got -0.5"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"cfg_scale": -1.0}, "cfg_scale must be a finite number >= 0"),
        ({"remasking": "low_confidenc"}, "use low_confidence or random. Did you mean low_confidence?"),
        ({"alg_temp": 0.1}, "alg_temp=0.1 is an option of Dream's sampler, but remasking=low_confidence is"),
        ({"top_p": 0.9}, "top_p=0.9"),
        ({"top_k": 5}, "top_k=5"),
        ({"eps": 0.1}, "eps=0.1"),
    ],
)
def test_a_wrong_config_is_one_clear_sentence(values: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as error:
        SamplerConfig(**values)
    assert "\n" not in str(error.value)


def test_wrong_arguments_are_refused_before_the_model_runs() -> None:
    model, ids, config = TinyModel(), prompts(), SamplerConfig(8, 8, 4)
    with pytest.raises(ValueError, match="Unknown observe=everything: use committable, masked, all"):
        denoise(model, ids, config, observe="everything")
    with pytest.raises(ValueError, match="covers the prompt only"):
        denoise(model, ids, config, torch.ones(3, 13, dtype=torch.long))
    with pytest.raises(ValueError, match="padded on the left"):
        denoise(model, ids, config, torch.tensor([[1, 1, 1, 1, 0]] * 3))
    model.config.eot_token_id = None
    with pytest.raises(ValueError, match="confidence_eos_eot_inf=true needs eot_token_id"):
        denoise(model, ids, SamplerConfig(8, 8, 4, confidence_eos_eot_inf=True))
    assert model.calls == 0


# Rows that leave ----------------------------------------------------------------------------------


class Leaving:
    """Row r leaves after the when[r]-th step; keeps what it was told."""

    def __init__(self, when: tuple[int, ...]) -> None:
        self.when, self.rows, self.told = when, list(range(len(when))), []

    def __call__(self, generated: Tensor) -> Tensor:
        self.told.append(generated.clone())
        gone = [self.when[row] <= len(self.told) for row in self.rows]
        self.rows = [row for row, left in zip(self.rows, gone, strict=True) if not left]
        return torch.tensor(gone)

    def staying(self, number: int) -> list[int]:
        """Rows in the batch at the step of this number, from 0."""
        return [row for row, last in enumerate(self.when) if last > number]


def assert_rows_of(step: Step, full: Step, rows: list[int]) -> None:
    """The step is the full batch's, at these rows."""
    assert (step.index, step.block, step.rows.tolist()) == (full.index, full.block, rows)
    for name in ("tokens", "masked", "observed", "prediction", "committed"):
        assert torch.equal(getattr(step, name), getattr(full, name)[rows]), name
    torch.testing.assert_close(step.score, full.score[rows])


@pytest.mark.parametrize("options", [{}, {"cfg_scale": 1.5}, {"confidence_eos_eot_inf": True}])
@pytest.mark.parametrize("schedule", [(12, 12, 4), (8, 4, 8), (6, 12, 3)])
@pytest.mark.parametrize("when", [(2, 99, 99), (99, 3, 1), (1, 2, 3), (4, 99, 4)])
def test_rows_that_stay_go_on_as_if_nobody_had_left(
    when: tuple[int, ...], schedule: tuple[int, int, int], options: dict
) -> None:
    """Left-padded prompts, one with a mask in it; rows leave inside a block and at its end."""
    ids, attention_mask = left_padded()
    ids[0, 3] = MASK
    config = SamplerConfig(*schedule, **options)
    full = list(denoise(eos_prone(), ids, config, attention_mask, observe="all"))
    model, leave = eos_prone(), Leaving(when)
    steps = list(denoise(model, ids, config, attention_mask, observe="all", leave=leave))
    assert len(steps) == model.calls == min(max(when), len(full))
    for number, (step, whole) in enumerate(zip(steps, full, strict=False)):
        assert_rows_of(step, whole, leave.staying(number))
        assert step.forwards == number + 1
        assert torch.equal(leave.told[number], apply(step)[:, ids.shape[1] :])


def test_kept_logits_are_those_of_the_rows_that_stay() -> None:
    config = SamplerConfig(6, 6, 6)
    full = list(denoise(TinyModel(), prompts(), config, keep_logits=True))
    steps = denoise(TinyModel(), prompts(), config, keep_logits=True, leave=Leaving((2, 99, 3)))
    for step, whole in zip(steps, full, strict=True):
        assert step.logits is not None and whole.logits is not None
        mine = torch.isin(whole.observed.nonzero()[:, 0], step.rows)
        torch.testing.assert_close(step.logits, whole.logits[mine])


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"remasking": "random"}])
def test_nobody_leaves_unasked(options: dict) -> None:
    """And a `leave` that says no changes nothing, nor any draw."""
    config = SamplerConfig(8, 8, 4, **options)
    plain = list(denoise(TinyModel(), prompts(), config, generator=seeded()))
    asked = list(
        denoise(TinyModel(), prompts(), config, generator=seeded(), leave=lambda x: torch.zeros(len(x)) > 0)
    )
    for a, b in zip(plain, asked, strict=True):
        assert a.rows.tolist() == [0, 1, 2]
        assert_rows_of(b, a, [0, 1, 2])
        assert torch.equal(a.score, b.score)


def test_the_run_ends_with_its_last_row() -> None:
    model = TinyModel()
    steps = list(denoise(model, prompts(), SamplerConfig(12, 12, 4), leave=Leaving((2, 1, 2))))
    assert [step.rows.tolist() for step in steps] == [[0, 1, 2], [0, 2]]
    assert model.calls == 2


# The confidence in a state ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cfg_scale": 1.5},
        {"logits_eos_inf": True},
        {"confidence_eos_eot_inf": True, "cfg_scale": 0.5},
        {"logits_eos_inf": True, "confidence_eos_eot_inf": True},
    ],
)
@pytest.mark.parametrize("observe", ["masked", "all"])
def test_the_confidence_in_a_state_is_the_samplers(options: dict, observe: str) -> None:
    ids, attention_mask = left_padded()
    config, model = SamplerConfig(8, 4, 4, **options), eos_prone()
    valid = torch.cat([attention_mask, torch.ones(3, 8, dtype=torch.long)], dim=1) > 0
    given = torch.arange(valid.shape[1]).expand_as(valid) < ids.shape[1]
    for step in denoise(model, ids, config, attention_mask, observe=observe):
        score = state_confidence(model, step.tokens, valid, given, step.observed, config)
        torch.testing.assert_close(score.float(), step.score)
        assert not bool(score[~step.observed].any())


def test_the_confidence_in_a_state_has_no_noise() -> None:
    """At temperature > 0 it is that of the likeliest token, and no random number is drawn."""
    state = next(denoise(TinyModel(), prompts(), SamplerConfig(8, 8, 8)))
    given = state.tokens != MASK
    before = torch.get_rng_state()
    noisy = SamplerConfig(8, 8, 8, temperature=1.0)
    score = state_confidence(TinyModel(), state.tokens, None, given, state.masked, noisy)
    torch.testing.assert_close(score.float(), state.score)
    assert torch.equal(torch.get_rng_state(), before)

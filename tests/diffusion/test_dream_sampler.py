"""Dream's process against its published loop, restated here; T > 0 with the same random stream."""

from itertools import pairwise

import pytest
import torch
from tiny_mask_predictor import EOS, MASK, VOCAB, FixedLogits, TinyModel, prompts
from torch import Tensor

from dllmq.diffusion import SamplerConfig, Step, apply, check_sampler, denoise, generate, state_confidence
from dllmq.diffusion.dream_sampler import cut_logits, unmask_shares

ALGORITHMS = ("origin", "maskgit_plus", "topk_margin", "entropy")


class ShiftedModel(TinyModel):
    """Its logits at column i are for token i + 1; it hardly ever predicts the mask."""

    def __init__(self, mask_logit: float = -30.0, **options: object) -> None:
        super().__init__(**options)
        self.config.shifted_logits, self.mask_logit = True, mask_logit

    def head(self, h: Tensor) -> Tensor:
        logits = super().head(h).clone()
        logits[..., MASK] += self.mask_logit
        return logits


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# The published loop -------------------------------------------------------------------------------


def published_tokens(logits: Tensor, c: SamplerConfig, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Confidence and x0 at every row of logits [n, E]."""
    if c.temperature > 0:
        logits = logits / c.temperature
    if c.top_p is not None and c.top_p < 1:
        ordered, ids = torch.sort(logits, descending=True)
        remove = torch.cumsum(torch.softmax(ordered, -1), -1) > c.top_p
        remove[:, 1:] = remove[:, :-1].clone()
        remove[:, 0] = False
        for row in range(len(logits)):
            logits[row, ids[row, remove[row]]] = torch.finfo(logits.dtype).min
    if c.top_k is not None:
        kth = torch.topk(logits, min(c.top_k, logits.shape[-1])).values[:, -1]
        logits = torch.where(logits < kth[:, None], torch.finfo(logits.dtype).min, logits)
    probs = torch.softmax(logits, -1)
    if c.temperature > 0:
        x0 = torch.multinomial(probs, 1, replacement=True, generator=generator)[:, 0]
        confidence = probs[torch.arange(len(x0)), x0]
    else:
        confidence, x0 = probs.max(-1)
    if c.remasking == "topk_margin":
        ordered = torch.sort(probs, descending=True).values
        confidence = ordered[:, 0] - ordered[:, 1]
    if c.remasking == "entropy":
        confidence = (probs * torch.log(probs + 1e-10)).sum(-1)
    return confidence, x0


def published(
    model: TinyModel, prompt_ids: Tensor, c: SamplerConfig, seed: int = 0, skip: bool = False
) -> Tensor:
    """All rows have equally many masks. Ties, which top_p makes, go to the leftmost (published: to any).

    `skip`: a step that commits nothing draws nothing.
    """
    generator = seeded(seed)
    x = torch.cat([prompt_ids, torch.full((len(prompt_ids), c.gen_length), MASK)], 1)
    timesteps = torch.linspace(1, c.eps, c.steps + 1)
    for i in range(c.steps):
        masked, t, s = x == MASK, timesteps[i], timesteps[i + 1]
        if not masked.any():
            break
        logits = model(x)
        logits = torch.cat([logits[:, :1], logits[:, :-1]], 1)[masked]
        last = i == c.steps - 1
        if c.remasking == "origin":
            x0 = torch.full((len(logits),), MASK)
            chosen = torch.rand(len(x0), generator=generator) < (1 if last else 1 - s / t)
            if chosen.any():
                x0[chosen] = published_tokens(logits[chosen], c, generator)[1]
            x[masked] = x0
            continue
        mean = masked.sum() / len(x)
        count = int(mean) if last else int(mean * (1 - s / t))
        if count == 0 and skip:
            continue
        confidence, x0 = published_tokens(logits, c, generator)
        full = torch.full(x.shape, -torch.inf, dtype=confidence.dtype)
        full[masked] = confidence
        proposed = torch.full_like(x, MASK)
        proposed[masked] = x0
        if count == 0:
            continue
        if not c.alg_temp:
            chosen = full.argsort(dim=1, descending=True, stable=True)[:, :count]
        else:
            chosen = torch.multinomial(torch.softmax(full / c.alg_temp, -1), count, generator=generator)
        x.scatter_(1, chosen, proposed.gather(1, chosen))
    return x


FILTERS = [{}, {"top_p": 0.7}, {"top_k": 3}, {"top_p": 0.8, "top_k": 4}]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("steps", [1, 5, 16])
@pytest.mark.parametrize("remasking", ALGORITHMS)
def test_greedy_tokens_equal_the_published_loop(remasking: str, steps: int, filters: dict) -> None:
    """Its steps that commit nothing included; origin draws where it commits."""
    config = SamplerConfig(12, steps, 12, remasking=remasking, **filters)
    model = ShiftedModel()
    found = generate(model, prompts(), config, generator=seeded(3)).tokens
    assert torch.equal(found, published(ShiftedModel(), prompts(), config, seed=3))
    assert not bool((found == MASK).any())


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize(("temperature", "steps", "eps"), [(0.4, 12, 1e-3), (1.0, 5, 0.1), (1.5, 20, 0.0)])
@pytest.mark.parametrize("remasking", ALGORITHMS)
def test_sampled_tokens_equal_the_published_loop(
    remasking: str, temperature: float, steps: int, eps: float, filters: dict
) -> None:
    config = SamplerConfig(12, steps, 12, temperature, remasking=remasking, eps=eps, **filters)
    for seed in range(2):
        found = generate(ShiftedModel(), prompts(), config, generator=seeded(seed)).tokens
        assert torch.equal(found, published(ShiftedModel(), prompts(), config, seed, skip=True))


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("alg_temp", [0.5, 2.0])
@pytest.mark.parametrize("remasking", ALGORITHMS[1:])
def test_alg_temp_draws_the_published_positions(remasking: str, alg_temp: float, temperature: float) -> None:
    config = SamplerConfig(12, 8, 12, temperature, remasking=remasking, alg_temp=alg_temp)
    for seed in range(3):
        found = generate(ShiftedModel(), prompts(), config, generator=seeded(seed)).tokens
        assert torch.equal(found, published(ShiftedModel(), prompts(), config, seed, skip=True))
    plain = SamplerConfig(12, 8, 12, temperature, remasking=remasking, alg_temp=0.0)
    none = SamplerConfig(12, 8, 12, temperature, remasking=remasking)
    a, b = (generate(ShiftedModel(), prompts(), c, generator=seeded()).tokens for c in (plain, none))
    assert torch.equal(a, b)


def test_the_default_generator_is_torchs() -> None:
    config = SamplerConfig(12, 6, 12, 1.0, remasking="origin")
    torch.manual_seed(5)
    found = generate(ShiftedModel(), prompts(), config).tokens
    assert torch.equal(found, published(ShiftedModel(), prompts(), config, seed=5))


# The schedule -------------------------------------------------------------------------------------


def test_counts_are_truncated_as_in_the_reference() -> None:
    """16 masks in 16 steps: 0 1 1 ... 1 2, as the published code was seen to do; the first is skipped."""
    config = SamplerConfig(16, 16, remasking="maskgit_plus")
    model = ShiftedModel()
    steps = list(denoise(model, prompts(1), config))
    assert [step.index for step in steps] == list(range(1, 16))
    assert [int(step.committed.sum()) for step in steps] == [1] * 14 + [2]
    assert steps[-1].forwards == model.calls == 15


def test_shares_take_everything_at_the_end() -> None:
    shares = unmask_shares(4, 0.0)
    torch.testing.assert_close(shares, torch.tensor([1 / 4, 1 / 3, 1 / 2, 1.0]))
    assert unmask_shares(1, 0.5).tolist() == [1.0]


def test_origin_commits_the_schedules_share() -> None:
    """Half of the masks in the first of two steps, within 4 standard errors of n = 4000."""
    config = SamplerConfig(4000, 2, remasking="origin", eps=0.0)
    first = next(denoise(FixedShifted(), prompts(1, 1), config, generator=seeded()))
    share = float(first.committed.sum()) / 4000
    assert abs(share - 0.5) < 4 * (0.25 / 4000) ** 0.5


class FixedShifted(FixedLogits):
    """Known logits everywhere, the mask's the lowest."""

    def __init__(self) -> None:
        super().__init__(torch.linspace(2, -2, VOCAB))
        self.config.shifted_logits = True


def test_temperature_samples_the_cut_distribution() -> None:
    logits, temperature, top_k = torch.linspace(2, -2, VOCAB), 0.8, 6
    config = SamplerConfig(4000, 1, temperature=temperature, remasking="origin", top_k=top_k)
    step = next(denoise(FixedShifted(), prompts(1, 1), config, generator=seeded(2)))
    share = torch.bincount(step.prediction[0, 1:], minlength=VOCAB) / 4000
    cut = torch.where(torch.arange(VOCAB) < top_k, logits / temperature, -torch.inf)
    expected = cut.softmax(0)
    assert not bool(share[expected == 0].any())
    kept = expected > 0
    error = (share - expected)[kept] / (expected * (1 - expected) / 4000).sqrt()[kept]
    assert error.abs().max() < 4


# What a cut keeps ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("top_p", "top_k", "kept"),
    [
        (None, None, [0, 1, 2, 3]),
        (0.5, None, [1, 3]),  # 0.4 alone is not above 0.5, the one that crosses it stays
        (0.39, None, [1]),
        (0.0001, None, [1]),
        (1.0, None, [0, 1, 2, 3]),
        (None, 1, [1]),
        (None, 3, [0, 1, 3]),
        (None, 99, [0, 1, 2, 3]),
        (0.9, 2, [1, 3]),
    ],
)
def test_what_top_p_and_top_k_keep(top_p: float | None, top_k: int | None, kept: list[int]) -> None:
    logits = torch.tensor([[0.2, 0.4, 0.1, 0.3]]).log()
    cut = cut_logits(logits, 0.0, top_p, top_k)
    assert (cut[0] > torch.finfo(torch.float32).min).nonzero()[:, 0].tolist() == kept
    assert torch.equal(cut[0, kept], logits[0, kept])


# Steps --------------------------------------------------------------------------------------------


def left_padded() -> tuple[Tensor, Tensor]:
    """Rows with 5, 3 and 2 real tokens."""
    keep = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 1, 1]])
    return prompts() * keep, keep


@pytest.mark.parametrize("remasking", ALGORITHMS)
def test_every_step_follows_from_the_one_before(remasking: str) -> None:
    """Observed where asked; a committed token never changes; the last state is generate's."""
    config = SamplerConfig(12, 7, remasking=remasking)
    steps = list(denoise(ShiftedModel(), prompts(), config, generator=seeded(), observe="masked"))
    for step, after in pairwise(steps):
        assert torch.equal(apply(step), after.tokens)
    for number, step in enumerate(steps):
        assert torch.equal(step.masked, step.tokens == MASK) and torch.equal(step.observed, step.masked)
        assert not bool((step.committed & ~step.masked).any())
        assert (step.block, step.num_steps, step.forwards) == (0, 7, number + 1)
    assert torch.equal(
        apply(steps[-1]), generate(ShiftedModel(), prompts(), config, generator=seeded()).tokens
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("remasking", ALGORITHMS)
def test_tokens_do_not_depend_on_what_is_observed(remasking: str, temperature: float) -> None:
    config = SamplerConfig(12, 7, temperature=temperature, remasking=remasking)
    runs = [
        list(denoise(ShiftedModel(), prompts(), config, None, seeded(), observe, keep))
        for observe, keep in (("committable", False), ("masked", True), ("all", True))
    ]
    for a, b, c in zip(*runs, strict=True):
        assert torch.equal(apply(a), apply(b)) and torch.equal(apply(a), apply(c))
        assert torch.equal(a.score[a.observed], c.score[a.observed])


@pytest.mark.parametrize("remasking", ["origin", "entropy"])
def test_scores_and_logits_are_the_raw_models_one_column_earlier(remasking: str) -> None:
    """Scores are the prediction's probability under the plain logits, whatever ranks or is cut."""
    config = SamplerConfig(8, 4, temperature=0.7, remasking=remasking, top_k=4)
    for step in denoise(ShiftedModel(), prompts(), config, None, seeded(), "all", keep_logits=True):
        raw = ShiftedModel()(step.tokens)
        aligned = torch.cat([raw[:, :1], raw[:, :-1]], 1)
        assert step.logits is not None and step.observed.all()
        torch.testing.assert_close(step.logits, aligned.flatten(0, 1))
        p = aligned.softmax(-1).gather(-1, step.prediction[..., None])[..., 0]
        torch.testing.assert_close(step.score, p.float())
        rest = ~step.masked
        assert torch.equal(step.prediction[rest], aligned.argmax(-1)[rest])


def test_the_score_of_a_state_is_the_samplers() -> None:
    ids, keep = left_padded()
    config = SamplerConfig(8, 4, remasking="entropy")
    valid = torch.cat([keep, torch.ones(3, 8, dtype=torch.long)], 1) > 0
    given = torch.arange(13).expand(3, 13) < 5
    for step in denoise(ShiftedModel(), ids, config, keep, observe="masked"):
        score = state_confidence(ShiftedModel(), step.tokens, valid, given, step.observed, config)
        torch.testing.assert_close(score.float(), step.score)


@pytest.mark.parametrize("remasking", ALGORITHMS[1:])
def test_padded_rows_are_denoised_as_alone(remasking: str) -> None:
    ids, keep = left_padded()
    config = SamplerConfig(12, 7, remasking=remasking)
    batch = generate(ShiftedModel(), ids, config, keep).tokens
    for row, length in enumerate((5, 3, 2)):
        alone = generate(ShiftedModel(), ids[row : row + 1, 5 - length :], config).tokens
        assert torch.equal(batch[row : row + 1, 5 - length :], alone)


def test_a_rows_first_token_is_read_at_its_own_column() -> None:
    """A mask there has no column before it, padded or not."""
    ids = torch.tensor([[MASK, 3, 4], [0, MASK, 4]])
    keep = torch.tensor([[1, 1, 1], [0, 1, 1]])
    config = SamplerConfig(4, 1, remasking="maskgit_plus")
    step = next(denoise(ShiftedModel(), ids, config, keep))
    full = torch.cat([keep, torch.ones(2, 4, dtype=torch.long)], 1)
    raw = ShiftedModel()(step.tokens, full).argmax(-1)
    assert step.prediction[0, 0] == raw[0, 0] and step.prediction[1, 1] == raw[1, 1]
    assert step.prediction[1, 3] == raw[1, 2]


def test_rows_do_not_depend_on_each_others_masks() -> None:
    """A prompt's masks compete, and a predicted mask id spends its slot: counts are the row's own."""
    ids = prompts()
    ids[1, 1:4] = MASK
    config = SamplerConfig(12, 9, remasking="topk_margin")
    batch = generate(ShiftedModel(mask_logit=3.0), ids, config).tokens
    assert bool((batch == MASK).any())
    for row in range(3):
        alone = generate(ShiftedModel(mask_logit=3.0), ids[row : row + 1], config).tokens
        assert torch.equal(batch[row : row + 1], alone)
        assert torch.equal(alone, published(ShiftedModel(mask_logit=3.0), ids[row : row + 1], config))


def test_a_cold_alg_temp_never_touches_a_token() -> None:
    """Where softmax(confidence / alg_temp) underflows, the published code may draw a committed position."""
    config = SamplerConfig(12, 12, remasking="entropy", alg_temp=1e-4)
    for seed in range(5):
        steps = list(denoise(ShiftedModel(), prompts(), config, generator=seeded(seed)))
        assert all(torch.equal(apply(s)[~s.masked], s.tokens[~s.masked]) for s in steps)
        assert not bool((apply(steps[-1]) == MASK).any())
    ranked = generate(ShiftedModel(), prompts(), SamplerConfig(12, 12, remasking="entropy")).tokens
    assert torch.equal(apply(steps[-1]), ranked)


def test_equal_confidences_go_to_the_leftmost() -> None:
    steps = list(denoise(FixedShifted(), prompts(1, 2), SamplerConfig(6, 3, remasking="entropy")))
    assert [int(step.committed.sum()) for step in steps] == [1, 2, 3]  # 1.998, 2.4975 and the rest
    assert [step.committed[0].nonzero()[:, 0].tolist() for step in steps] == [[2], [3, 4], [5, 6, 7]]


class Leaving:
    """Row r leaves after the when[r]-th step."""

    def __init__(self, when: tuple[int, ...]) -> None:
        self.when, self.rows, self.calls = when, list(range(len(when))), 0

    def __call__(self, generated: Tensor) -> Tensor:
        self.calls += 1
        gone = [self.when[row] <= self.calls for row in self.rows]
        self.rows = [row for row, left in zip(self.rows, gone, strict=True) if not left]
        return torch.tensor(gone)


def assert_rows_of(step: Step, full: Step) -> None:
    assert step.index == full.index
    for name in ("tokens", "masked", "prediction", "committed"):
        assert torch.equal(getattr(step, name), getattr(full, name)[step.rows]), name


def test_rows_that_stay_go_on_as_if_nobody_had_left() -> None:
    ids, keep = left_padded()
    config = SamplerConfig(12, 12, remasking="entropy")
    assert config.deterministic
    full = list(denoise(ShiftedModel(), ids, config, keep))
    steps = list(denoise(ShiftedModel(), ids, config, keep, leave=Leaving((2, 99, 4))))
    assert [step.rows.tolist() for step in steps] == [[0, 1, 2]] * 2 + [[1, 2]] * 2 + [[1]] * (len(full) - 4)
    for step, whole in zip(steps, full, strict=True):
        assert_rows_of(step, whole)
    assert len(list(denoise(ShiftedModel(), ids, config, keep, leave=Leaving((1, 2, 2))))) == 2


def test_nan_from_the_model_is_named() -> None:
    model = FixedShifted()
    model.fixed = torch.full((VOCAB,), torch.nan)
    with pytest.raises(FloatingPointError, match="denoising step 1 of 1"):
        generate(model, prompts(), SamplerConfig(4, 1, remasking="entropy"))


def test_states_can_be_used_outside() -> None:
    for step in denoise(ShiftedModel(), prompts(), SamplerConfig(8, 4, remasking="entropy")):
        assert torch.is_grad_enabled()
        assert not step.score.requires_grad


# Settings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"remasking": "entropi"},
            "Unknown remasking=entropi: with Dream use origin, maskgit_plus, topk_margin",
        ),
        ({"remasking": "entropi"}, "Did you mean entropy?"),
        (
            {"cfg_scale": 1.0},
            "cfg_scale=1.0 is an option of LLaDA's sampler, but remasking=entropy is Dream's",
        ),
        ({"logits_eos_inf": True}, "leave logits_eos_inf at False"),
        ({"confidence_eos_eot_inf": True}, "leave confidence_eos_eot_inf at False"),
        (
            {"block_length": 4},
            "leave block_length out or give block_length=32, all of gen_length; got block_length=4",
        ),
        ({"alg_temp": -1.0}, "alg_temp must be None (null) or a finite number >= 0"),
        ({"alg_temp": 0.3, "remasking": "origin"}, "alg_temp=0.3 has no effect with remasking=origin"),
        ({"top_p": 0.0}, "top_p must be None (null) or a number in (0, 1]; got 0.0"),
        ({"top_p": 1.5}, "top_p must be"),
        ({"top_k": 0}, "top_k must be None (null) or an integer >= 1; got 0"),
        ({"eps": 1.0}, "eps must be a number in [0, 1); got 1.0"),
        ({"steps": 0}, "steps must be an integer >= 1"),
        ({"gen_length": 0}, "gen_length must be an integer >= 1"),
        ({"temperature": -1.0}, "temperature must be a finite number >= 0"),
    ],
)
def test_a_wrong_config_is_one_clear_sentence(values: dict, sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        SamplerConfig(**({"remasking": "entropy"} | values))
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_there_are_no_blocks() -> None:
    for config in (SamplerConfig(20, 7, remasking="entropy"), SamplerConfig(20, 7, 20, remasking="origin")):
        assert (config.block_length, config.num_blocks, config.steps_per_block) == (20, 1, 7)


def test_which_settings_draw_noise() -> None:
    plain = [SamplerConfig(remasking=name).deterministic for name in ALGORITHMS]
    assert plain == [False, True, True, True]
    assert not SamplerConfig(remasking="entropy", temperature=0.1).deterministic
    assert not SamplerConfig(remasking="entropy", alg_temp=0.1).deterministic
    assert SamplerConfig(remasking="entropy", alg_temp=0.0).deterministic


def test_a_model_only_takes_its_own_process() -> None:
    dream, llada = SamplerConfig(8, 8, remasking="entropy"), SamplerConfig(8, 8, 8)
    model, shifted = TinyModel(), ShiftedModel()
    with pytest.raises(
        ValueError, match="remasking=entropy is Dream's, but this model is no Dream model: use low"
    ):
        denoise(model, prompts(), dream)
    with pytest.raises(
        ValueError, match="remasking=low_confidence is LLaDA's, but this model is a Dream model"
    ):
        denoise(shifted, prompts(), llada)
    check_sampler(model.config, llada)
    check_sampler(shifted.config, dream)
    assert model.calls == shifted.calls == 0


def test_eos_is_not_special() -> None:
    """A model that only says EOS runs its steps to the end."""
    model = FixedShifted()
    model.fixed = 5.0 * torch.nn.functional.one_hot(torch.tensor(EOS), VOCAB)
    steps = list(denoise(model, prompts(1), SamplerConfig(6, 6, remasking="entropy", eps=0.0)))
    assert steps[-1].index == 5 and (apply(steps[-1])[0, -6:] == EOS).all()

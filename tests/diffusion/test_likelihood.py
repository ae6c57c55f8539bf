"""The likelihood bound against a plain re-statement of ML-GSAI/LLaDA's get_log_likelihood()."""

import itertools
import math

import pytest
import torch
from tiny_mask_predictor import EOS, MASK, VOCAB, FixedLogits, TinyModel, UniformModel, prompts
from torch import Tensor

from dllmq.diffusion import SamplerConfig, generate, greedy_match, log_likelihood, log_likelihoods
from dllmq.diffusion.likelihood import request_generator


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def reference_log_likelihood(
    model: TinyModel,
    prompt: Tensor,
    answer: Tensor,
    mc_num: int,
    batch_size: int,
    cfg_scale: float,
    g: torch.Generator,
) -> float:
    """ML-GSAI's estimator: full logits of every sampled copy."""
    length, start = len(answer), len(prompt)
    sequence = torch.cat([prompt, answer]).repeat(batch_size, 1)
    losses = []
    for _ in range(mc_num // batch_size):
        k = torch.randint(1, length + 1, (), generator=g)
        x = (
            torch.linspace(float(k), k + (batch_size - 1) * (length / batch_size), steps=batch_size)
            .round()
            .long()
        )
        x = (x - 1) % length + 1
        masked = torch.zeros_like(sequence, dtype=torch.bool)
        for j in range(batch_size):
            first = torch.arange(length) < x[j]
            masked[j, start:] = first[torch.randperm(length, generator=g)]
        noisy = torch.where(masked, MASK, sequence)
        logits = model(noisy)
        if cfg_scale > 0:
            unconditional = noisy.clone()
            unconditional[:, :start] = MASK
            u = model(unconditional)
            logits = u + (cfg_scale + 1) * (logits - u)
        ratio = (x / length)[:, None].expand_as(masked)
        loss = (
            torch.nn.functional.cross_entropy(logits[masked], sequence[masked], reduction="none")
            / ratio[masked]
        )
        losses.append(float(loss.sum()) / batch_size)
    return -sum(losses) / len(losses)


@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("prompt_length", "answer_length", "num_samples", "batch_size"),
    [(5, 7, 16, 8), (5, 7, 6, 1), (3, 1, 8, 4), (0, 4, 8, 8), (4, 3, 32, 16), (2, 12, 15, 5), (4, 10, 8, 4)],
)
def test_equals_the_reference(
    prompt_length: int,
    answer_length: int,
    num_samples: int,
    batch_size: int,
    dtype: torch.dtype,
    cfg_scale: float,
) -> None:
    model = TinyModel(dtype)
    prompt, answer = prompts(1, prompt_length)[0], prompts(1, answer_length, seed=2)[0]
    for seed in (0, 1):
        g_ours, g_theirs = seeded(seed), seeded(seed)
        got = log_likelihood(model, prompt, answer, num_samples, batch_size, cfg_scale, g_ours)
        expected = reference_log_likelihood(
            model, prompt, answer, num_samples, batch_size, cfg_scale, g_theirs
        )
        assert got == pytest.approx(expected, rel=1e-5)
        assert torch.equal(g_ours.get_state(), g_theirs.get_state())  # the same draws, no more and no fewer


@pytest.mark.parametrize("answer_length", [1, 2, 9, 40])
def test_a_uniform_model_scores_minus_a_log_v_in_every_sample(answer_length: int) -> None:
    prompt, answer = prompts(1, 3)[0], prompts(1, answer_length, seed=2)[0]
    for seed in range(5):
        got = log_likelihood(UniformModel(), prompt, answer, 1, 1, generator=seeded(seed))
        assert got == pytest.approx(-answer_length * math.log(VOCAB), rel=1e-12)


def test_a_context_free_model_scores_its_log_softmax() -> None:
    logits = torch.randn(VOCAB, generator=seeded(3), dtype=torch.float64)
    answer = torch.full((6,), 4)
    got = log_likelihood(FixedLogits(logits), prompts(1, 3)[0], answer, 8, 4, generator=seeded())
    assert got == pytest.approx(6 * float(logits.log_softmax(0)[4]), rel=1e-12)


def test_none_uses_the_default_generator() -> None:
    prompt, answer = prompts(1, 3)[0], prompts(1, 6, seed=2)[0]
    torch.manual_seed(11)
    got = log_likelihood(TinyModel(), prompt, answer, 8, 8)
    assert got == log_likelihood(TinyModel(), prompt, answer, 8, 8, generator=seeded(11))


def test_equal_masks_are_computed_once_and_only_masks_are_read() -> None:
    model = TinyModel()
    log_likelihood(model, prompts(1, 3)[0], prompts(1, 1)[0], 128, 8)
    assert model.calls == 1 and model.rows_read == 1


def test_bfloat16_cross_entropy_is_float32() -> None:
    prompt, answer = prompts(1, 5)[0], prompts(1, 7, seed=2)[0]
    bf16 = log_likelihood(TinyModel(torch.bfloat16), prompt, answer, 32, 8, generator=seeded())
    fp64 = log_likelihood(TinyModel(), prompt, answer, 32, 8, generator=seeded())
    assert bf16 == pytest.approx(fp64, rel=0.05) and bf16 != round(bf16, 2)


def requests() -> list[tuple[Tensor, Tensor]]:
    shapes = [(5, 3), (2, 8), (9, 1), (0, 4), (4, 4), (7, 6), (5, 3)]
    return [(prompts(1, p, seed=i)[0], prompts(1, a, seed=50 + i)[0]) for i, (p, a) in enumerate(shapes)]


@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
@pytest.mark.parametrize("rows_per_forward", [1, 7, 64, 1000])
def test_many_requests_equal_one_at_a_time(rows_per_forward: int, cfg_scale: float) -> None:
    model = TinyModel()
    got = log_likelihoods(model, requests(), 16, 8, cfg_scale, seed=3, rows_per_forward=rows_per_forward)
    one_by_one = [
        log_likelihood(model, p, a, 16, 8, cfg_scale, request_generator(p, a, seed=3)) for p, a in requests()
    ]
    assert got == pytest.approx(one_by_one, rel=1e-9)


def test_a_request_does_not_depend_on_its_neighbours_but_on_the_seed() -> None:
    model = TinyModel()
    all_of_them = log_likelihoods(model, requests(), 16, 8)
    backwards = log_likelihoods(model, requests()[::-1], 16, 8)[::-1]
    assert backwards == pytest.approx(all_of_them, rel=1e-9)
    other_seed = log_likelihoods(model, requests(), 16, 8, seed=1)
    assert sum(a != pytest.approx(b, rel=1e-9) for a, b in zip(all_of_them, other_seed, strict=True)) >= 4


def test_requests_share_forwards_and_progress_reaches_the_end() -> None:
    model, seen = TinyModel(), []
    log_likelihoods(model, requests(), 8, 8, rows_per_forward=16, progress=lambda *done: seen.append(done))
    assert model.calls <= 4  # 7 requests x 8 samples / 16 rows
    assert seen[-1] == (7, 7, "log-likelihood") and seen == sorted(seen)
    assert log_likelihoods(model, [], 8, 8) == []


@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
def test_greedy_match_accepts_exactly_the_greedy_answer(cfg_scale: float) -> None:
    prompt = prompts(1, 5)[0]
    model = TinyModel()
    greedy = generate(model, prompt[None], SamplerConfig(6, 6, 6, cfg_scale=cfg_scale)).tokens[0, 5:]
    assert greedy_match(model, prompt, greedy, cfg_scale)
    for position in range(6):
        other = greedy.clone()
        other[position] = (other[position] + 1) % EOS
        assert not greedy_match(model, prompt, other, cfg_scale)


def test_greedy_match_stops_at_the_first_difference() -> None:
    model = FixedLogits(torch.arange(VOCAB, dtype=torch.float64).flip(0))  # always predicts 0, left to right
    assert greedy_match(model, prompts(1, 5)[0], torch.zeros(8, dtype=torch.long))
    assert model.calls == 8
    assert not greedy_match(model, prompts(1, 5)[0], torch.tensor([0, 0, 1, 0, 0, 0, 0, 0]))
    assert model.calls == 8 + 3


@pytest.mark.parametrize(("num_samples", "batch_size"), [(10, 8), (0, 1), (4, 8), (8, 0)])
def test_samples_must_be_whole_batches(num_samples: int, batch_size: int) -> None:
    prompt, answer = requests()[0]
    sentence = f"num_samples must be a multiple of batch_size.*{num_samples=} and {batch_size=}"
    with pytest.raises(ValueError, match=sentence):
        log_likelihood(TinyModel(), prompt, answer, num_samples, batch_size)
    with pytest.raises(ValueError, match=sentence):
        log_likelihoods(TinyModel(), requests(), num_samples, batch_size)


def test_an_empty_answer_is_refused() -> None:
    empty = torch.zeros(0, dtype=torch.long)
    for call in (log_likelihood, greedy_match):
        with pytest.raises(ValueError, match="no tokens"):
            call(TinyModel(), prompts(1, 3)[0], empty)


# Dream ----------------------------------------------------------------------------------------------


class ShiftedModel(TinyModel):
    """Its logits at column i are for token i + 1."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__(dtype)
        self.config.shifted_logits = True


def shifted(logits: Tensor) -> Tensor:
    return torch.cat([logits[:, :1], logits[:, :-1]], 1)


@torch.no_grad()
def dream_log_likelihood(
    model: TinyModel, prompt: Tensor, answer: Tensor, mc_num: int, batch_size: int, g: torch.Generator
) -> float:
    """The published estimator: an end of text behind the answer; it and the first token are never masked."""
    sequence = torch.cat([prompt, answer, torch.tensor([EOS])]).repeat(batch_size, 1)
    losses = []
    for _ in range(mc_num // batch_size):
        t = (torch.rand(1, generator=g) + torch.arange(batch_size) / batch_size) % 1
        p = ((1 - 1e-3) * t + 1e-3)[:, None].expand(sequence.shape)
        masked = torch.rand(sequence.shape, generator=g) < p
        masked[:, : len(prompt)] = masked[:, 0] = masked[:, -1] = False
        logits = shifted(model(torch.where(masked, MASK, sequence)))
        loss = torch.nn.functional.cross_entropy(logits[masked], sequence[masked], reduction="none")
        losses.append(float((loss / p[masked]).sum()) / batch_size)
    return -sum(losses) / len(losses)


@pytest.mark.parametrize(
    ("prompt_length", "answer_length", "num_samples", "batch_size"),
    [(5, 7, 16, 8), (5, 7, 6, 1), (3, 1, 8, 4), (1, 4, 8, 8), (4, 3, 32, 16), (2, 12, 15, 5)],
)
def test_dream_equals_its_published_estimator(
    prompt_length: int, answer_length: int, num_samples: int, batch_size: int
) -> None:
    model = ShiftedModel()
    prompt, answer = prompts(1, prompt_length)[0], prompts(1, answer_length, seed=2)[0]
    for seed in (0, 1):
        ours, theirs = seeded(seed), seeded(seed)
        got = log_likelihood(model, prompt, answer, num_samples, batch_size, generator=ours)
        expected = dream_log_likelihood(model, prompt, answer, num_samples, batch_size, theirs)
        assert got == pytest.approx(expected, rel=1e-5)
        assert torch.equal(ours.get_state(), theirs.get_state())


@torch.no_grad()
def exact_bound(model: TinyModel, prompt: Tensor, answer: Tensor, weights: list[float]) -> float:
    """The sum over all masks of the answer, weights[k - 1] for one that masks k tokens."""
    total = 0.0
    dream = getattr(model.config, "shifted_logits", False)
    end = torch.tensor([EOS] if dream else [], dtype=torch.long)
    for masked in itertools.product([False, True], repeat=len(answer)):
        at = torch.tensor(masked)
        if not at.any():
            continue
        x = torch.cat([prompt, answer.masked_fill(at, MASK), end])[None]
        logits = shifted(model(x)) if dream else model(x)
        own = logits[0, len(prompt) : len(prompt) + len(answer)].log_softmax(-1)
        total += weights[int(at.sum()) - 1] * float(own[at].gather(1, answer[at][:, None]).sum())
    return total


def dream_weights(eps: float) -> list[float]:
    """E[p^(k-1) (1-p)^(3-k)] for p ~ U(eps, 1), k = 1, 2, 3, integrated by hand."""
    q = 1 - eps
    return [q**3 / 3 / q, (q**2 / 2 - q**3 / 3) / q, (1 - eps**3) / 3 / q]


def test_the_expectation_is_the_sum_over_all_masks() -> None:
    """Three tokens, seven masks, so many samples cost one forward; within four standard errors."""
    prompt, answer = prompts(1, 4)[0], prompts(1, 3, seed=2)[0]
    for model, weights in ((ShiftedModel(), dream_weights(1e-3)), (TinyModel(), [1 / 3, 1 / 6, 1 / 3])):
        exact = exact_bound(model, prompt, answer, weights)
        g = seeded(5)
        estimates = torch.tensor(
            [log_likelihood(model, prompt, answer, 4096, 512, generator=g) for _ in range(20)],
            dtype=torch.float64,
        )
        stderr = float(estimates.std()) / 20**0.5
        assert abs(float(estimates.mean()) - exact) < 4 * stderr
        assert 4 * stderr < 0.05 * abs(exact)  # five per cent more or less would be seen


def test_both_estimators_have_one_expectation_without_a_least_ratio() -> None:
    assert dream_weights(0.0) == pytest.approx([1 / 3, 1 / 6, 1 / 3])  # = 1 / (k binom(3, k))
    assert dream_weights(1e-3) == pytest.approx([1 / 3, 1 / 6, 1 / 3], abs=2e-3)


def test_all_strata_together_are_exact_for_llada() -> None:
    """One token: one mask, weight 1. Then any number of samples gives the exact value."""
    model, prompt, answer = TinyModel(), prompts(1, 4)[0], prompts(1, 1, seed=2)[0]
    exact = exact_bound(model, prompt, answer, [1.0])
    assert log_likelihood(model, prompt, answer, 1, 1, generator=seeded()) == pytest.approx(exact)
    assert log_likelihood(model, prompt, answer, 128, 8, generator=seeded()) == pytest.approx(exact)


@pytest.mark.parametrize("rows_per_forward", [1, 7, 64])
def test_dream_requests_share_forwards_padded_on_the_left(rows_per_forward: int) -> None:
    model, asked = ShiftedModel(), [(p, a) for p, a in requests() if len(p)]
    got = log_likelihoods(model, asked, 16, 8, seed=3, rows_per_forward=rows_per_forward)
    one_by_one = [
        log_likelihood(model, p, a, 16, 8, generator=request_generator(p, a, seed=3)) for p, a in asked
    ]
    assert got == pytest.approx(one_by_one, rel=1e-9)


def test_dream_scores_the_last_answer_token_too() -> None:
    """A model that dislikes one token scores it wherever it stands."""
    logits = torch.zeros(VOCAB, dtype=torch.float64)
    logits[4] = -5.0
    model = FixedLogits(logits)
    model.config.shifted_logits = True
    plain = torch.tensor([1, 2, 3])
    for place in range(3):
        other = plain.clone()
        other[place] = 4
        a, b = (log_likelihood(model, plain, x, 64, 8, generator=seeded()) for x in (plain, other))
        assert b < a - 3


def test_dream_needs_a_token_before_the_answer() -> None:
    empty, answer = torch.zeros(0, dtype=torch.long), prompts(1, 3)[0]
    for call in (
        lambda: log_likelihood(ShiftedModel(), empty, answer),
        lambda: log_likelihoods(ShiftedModel(), [(answer, answer), (empty, answer)]),
    ):
        with pytest.raises(ValueError, match="start prompts with BOS"):
            call()


def test_dreams_greedy_answer_takes_one_token_per_forward() -> None:
    """Restated: the likeliest token of the most confident mask, again and again."""
    model, prompt = ShiftedModel(), prompts(1, 5)[0]
    x = torch.cat([prompt, torch.full((6,), MASK)])[None]
    for _ in range(6):
        with torch.no_grad():
            p, best = shifted(model(x)).softmax(-1).max(-1)
        at = int(p.masked_fill(x != MASK, -1.0).argmax())
        x[0, at] = best[0, at]
    greedy = x[0, 5:]
    assert greedy_match(model, prompt, greedy)
    for position in range(6):
        other = greedy.clone()
        other[position] = (other[position] + 1) % EOS
        assert not greedy_match(model, prompt, other)

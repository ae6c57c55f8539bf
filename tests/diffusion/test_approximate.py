"""Caches and threshold against Fast-dLLM's loop, restated here one row at a time, without padding."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_llada import EOS, MASK, tiny_model, tiny_prompts
from tiny_mask_predictor import MASK as TINY_MASK
from tiny_mask_predictor import FixedLogits, TinyModel
from torch import Tensor

from dllmq.diffusion import SamplerConfig, Step, apply, denoise, generate
from dllmq.models.attention import QuantizedProduct
from dllmq.models.dream import Dream, DreamConfig
from dllmq.models.llada import LLaDA
from dllmq.numerics import Grid, fit

LENGTHS = (5, 2, 7)


def restless() -> LLaDA:
    """Its predictions depend much on the other columns, with confidences around 0.3."""
    model = tiny_model()
    model.embedding.weight[MASK] *= 0.1
    for block in model.blocks:
        block.attn_out.weight *= 6
        block.q_proj.weight *= 1.5
    model.transformer["ff_out"].weight *= 1.5
    return model


MODEL = restless()

# The loop of Fast-dLLM ----------------------------------------------------------------------------


def turn(x: Tensor, theta: float) -> Tensor:
    """RoPE at columns 0, 1, ...: x [heads, L, c]."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[1])[:, None] / theta ** (torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def forward(model: LLaDA, tokens: Tensor, start: int, past: list | None, length: int) -> tuple[Tensor, list]:
    """Logits of the columns start, start + 1, ..., whose K (before RoPE) and V replace those in `past`."""
    heads, out = model.config.n_heads, []
    x = model.embedding.weight[tokens]
    stop = start + len(tokens)
    for i, block in enumerate(model.blocks):
        h = norm(x, block.attn_norm.weight)
        Q, K, V = (
            (h @ getattr(block, n).weight.T).unflatten(-1, (heads, -1)).transpose(0, 1)
            for n in ("q_proj", "k_proj", "v_proj")
        )
        if past is not None:
            K, V = (
                torch.cat([old[:, :start], new, old[:, stop:]], 1)
                for old, new in zip(past[i], (K, V), strict=True)
            )
        out.append((K, V))
        wide = F.pad(Q, (0, 0, start, length - stop))  # so that queries have their own positions
        Q, K = turn(wide, model.config.rope_theta)[:, start:stop], turn(K, model.config.rope_theta)
        P = (Q @ K.transpose(1, 2) / math.sqrt(Q.shape[-1])).softmax(-1)
        x = x + (P @ V).transpose(0, 1).flatten(1) @ block.attn_out.weight.T
        h = norm(x, block.ff_norm.weight)
        x = x + (F.silu(h @ block.ff_proj.weight.T) * (h @ block.up_proj.weight.T)) @ block.ff_out.weight.T
    x = norm(x, model.transformer["ln_f"].weight)
    return x @ model.transformer["ff_out"].weight.T, out


def transfer(logits: Tensor, masked: Tensor, k: int, threshold: float | None) -> dict[int, int]:
    """Column -> token: the k most confident masks, or with a threshold the first and those that reach it."""
    p, x0 = logits.double().softmax(-1).max(-1)
    order = sorted(masked.nonzero()[:, 0].tolist(), key=lambda j: (-float(p[j]), j))
    if threshold is None:
        return {j: int(x0[j]) for j in order[:k]}
    return {j: int(x0[j]) for n, j in enumerate(order) if n == 0 or p[j] >= threshold}


def fast_dllm(model: LLaDA, prompt: Tensor, c: SamplerConfig) -> tuple[Tensor, int, int]:
    """Tokens of one row, the forwards, and how many of these found no mask in their block.

    With a cache the full pass over a block is followed by one forward at least.
    """
    x = torch.cat([prompt, torch.full((c.gen_length,), MASK)])
    L, nfe, idle = len(x), 0, 0
    for block in range(c.num_blocks):
        start = len(prompt) + block * c.block_length
        end, past, i = start + c.block_length, None, 0
        n = int((x[start:end] == MASK).sum())
        while i == 0 or (i == 1 and c.cache != "none") or bool((x[start:end] == MASK).any()):
            idle += not bool((x[start:end] == MASK).any())
            first = 0 if i == 0 or c.cache == "none" else start
            stop = end if i and c.cache == "dual" else L
            logits, kept = forward(model, x[first:stop], first, past, L)
            past = kept if past is None and c.cache != "none" else past
            if i and c.cache == "dual":  # the block's K and V are written in place
                past = kept
            k = n // c.steps_per_block + (i < n % c.steps_per_block)
            masked = x[first:stop] == MASK
            masked[end - first :] = False
            for j, token in transfer(logits, masked, k, c.threshold).items():
                x[first + j] = token
            nfe, i = nfe + 1, i + 1
    return x, nfe, idle


# Equality -----------------------------------------------------------------------------------------


def padded(lengths: tuple[int, ...] = LENGTHS) -> tuple[list[Tensor], Tensor, Tensor]:
    """Prompts, and the same left-padded with their mask."""
    rows, width = tiny_prompts(lengths), max(lengths)
    ids = torch.stack([F.pad(r, (width - len(r), 0), value=EOS) for r in rows])
    return rows, ids, torch.stack([F.pad(torch.ones_like(r), (width - len(r), 0)) for r in rows])


def row_steps(
    model: Any, ids: Tensor, c: SamplerConfig, mask: Tensor | None
) -> tuple[Tensor, list[int], int]:
    """Tokens, the steps each row took part in, and the model calls."""
    taken, tokens, steps = [0] * len(ids), None, 0
    for step in denoise(model, ids, c, mask):
        steps += 1
        assert step.forwards == steps
        if tokens is None:
            tokens = step.tokens.clone()
        assert torch.equal(tokens[step.rows], step.tokens)  # waiting changes nothing
        tokens[step.rows] = apply(step)
        for row in step.rows.tolist():
            taken[row] += 1
    assert tokens is not None
    return tokens, taken, steps


SCHEDULES = [(16, 16, 8), (16, 8, 4), (12, 12, 12), (6, 3, 2)]


@pytest.mark.parametrize("threshold", [None, 0.25, 0.35])
@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_padded_batch_gives_the_rows_of_the_published_loop(
    schedule: tuple[int, int, int], cache: str, threshold: float | None
) -> None:
    config = SamplerConfig(*schedule, cache=cache, threshold=threshold)
    rows, ids, mask = padded()
    expected = [fast_dllm(MODEL, row, config) for row in rows]
    tokens, taken, calls = row_steps(MODEL, ids, config, mask)
    for row, (wanted, nfe, idle) in zip(range(len(rows)), expected, strict=True):
        assert torch.equal(tokens[row, ids.shape[1] - len(rows[row]) :], wanted)
        assert taken[row] == nfe - idle
    assert max(taken) <= calls <= config.num_steps
    found = generate(MODEL, ids, config, mask)
    assert torch.equal(found.tokens, tokens) and found.forwards == calls


@pytest.mark.parametrize(("cache", "theirs"), [("none", 3), ("prefix", 6), ("dual", 6)])
def test_no_forward_is_made_for_a_block_without_masks(cache: str, theirs: int) -> None:
    """Fast-dLLM makes one, with a cache, where the full pass has completed the block; it commits nothing."""
    prompt, config = tiny_prompts((6,))[0], SamplerConfig(12, 12, 4, cache=cache, threshold=0.0)
    tokens, nfe, idle = fast_dllm(MODEL, prompt, config)
    found = generate(MODEL, prompt[None], config)
    assert (nfe, nfe - idle, found.forwards) == (theirs, 3, 3) and torch.equal(found.tokens[0], tokens)


def test_the_cases_above_are_different_ones() -> None:
    """Caches change answers, thresholds commit several tokens a step, and rows wait."""
    _, ids, mask = padded()
    made = {
        (cache, threshold): row_steps(
            MODEL, ids, SamplerConfig(16, 16, 8, cache=cache, threshold=threshold), mask
        )
        for cache in ("none", "prefix", "dual")
        for threshold in (None, 0.3)
    }
    assert len({tuple(tokens.flatten().tolist()) for tokens, _, _ in made.values()}) == len(made)
    for (_, threshold), (_, taken, calls) in made.items():
        if threshold is None:
            assert taken == [16] * 3 and calls == 16
        else:
            assert max(taken) < 16 and min(taken) < calls


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_above_one_a_threshold_commits_one_token_a_step(cache: str) -> None:
    _, ids, mask = padded()
    plain = generate(MODEL, ids, SamplerConfig(12, 12, 6, cache=cache), mask)
    found = generate(MODEL, ids, SamplerConfig(12, 2, 6, cache=cache, threshold=1.01), mask)
    assert torch.equal(found.tokens, plain.tokens) and found.forwards == plain.forwards == 12


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_a_block_of_one_step_is_exact(cache: str) -> None:
    _, ids, mask = padded()
    exact = generate(MODEL, ids, SamplerConfig(12, 4, 3), mask)
    assert torch.equal(generate(MODEL, ids, SamplerConfig(12, 4, 3, cache=cache), mask).tokens, exact.tokens)


@pytest.mark.parametrize("threshold", [None, 0.3])
def test_one_block_is_the_whole_suffix_so_prefix_and_dual_agree(threshold: float | None) -> None:
    _, ids, mask = padded()
    prefix, dual = (
        generate(MODEL, ids, SamplerConfig(12, 12, 12, cache=cache, threshold=threshold), mask)
        for cache in ("prefix", "dual")
    )
    assert torch.equal(prefix.tokens, dual.tokens) and prefix.forwards == dual.forwards


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_masks_in_the_prompt_compete_as_published(cache: str) -> None:
    """Under a cache in a block's first step only."""
    prompt = tiny_prompts((6,))[0]
    prompt[[1, 4]] = MASK
    config = SamplerConfig(8, 8, 4, cache=cache, threshold=0.15)
    assert torch.equal(generate(MODEL, prompt[None], config).tokens[0], fast_dllm(MODEL, prompt, config)[0])


def test_the_threshold_is_reached_by_equality() -> None:
    """Confidence 1/4 of four likely tokens at every position."""
    logits = torch.full((23,), -torch.inf, dtype=torch.float64)
    logits[:4] = 0
    model, ids = FixedLogits(logits), torch.zeros(2, 3, dtype=torch.long)
    assert generate(model, ids, SamplerConfig(8, 8, 4, threshold=0.25)).forwards == 2
    assert generate(model, ids, SamplerConfig(8, 8, 4, threshold=0.2500001)).forwards == 8


def test_a_predicted_mask_ends_the_block_after_as_many_steps_as_it_had_masks() -> None:
    logits = torch.zeros(23, dtype=torch.float64)
    logits[TINY_MASK] = 9
    found = generate(
        FixedLogits(logits), torch.zeros(2, 3, dtype=torch.long), SamplerConfig(6, 6, 3, threshold=0.9)
    )
    assert found.forwards == 3 + 6  # what the first block leaves competes in the second
    assert bool((found.tokens[:, 3:] == TINY_MASK).all())


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("threshold", [None, 0.3])
def test_rows_that_leave_change_nothing_for_those_that_stay(cache: str, threshold: float | None) -> None:
    """As an evaluation does: a row leaves with the first EOS that has no mask before it."""
    _, ids, mask = padded()
    config = SamplerConfig(16, 16, 4, cache=cache, threshold=threshold)
    full = generate(MODEL, ids, config, mask).tokens
    ends = full[:, ids.shape[1] + 6].unique()  # every row ends with its seventh token, or before

    def settled(generated: Tensor) -> Tensor:
        return (torch.isin(generated, ends) & ((generated == MASK).cumsum(1) == 0)).any(1)

    found, seen = full.new_full(full.shape, MASK), 0
    for step in denoise(MODEL, ids, config, mask, leave=settled):
        found[step.rows] = apply(step)
        seen += len(step.rows)
    everywhere = sum(row_steps(MODEL, ids, config, mask)[1])
    answers = full[:, ids.shape[1] :]
    for ours, whole in zip(found[:, ids.shape[1] :].tolist(), answers.tolist(), strict=True):
        stop = next((i for i, token in enumerate(whole) if token in ends), len(whole))
        assert ours[: stop + 1] == whole[: stop + 1]
    assert bool(settled(answers).all()) and seen < everywhere


# Models -------------------------------------------------------------------------------------------


def tiny_dream(seed: int = 0) -> Dream:
    config = DreamConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=40,
        mask_token_id=MASK, eos_token_id=EOS, rope_theta=1e4, num_key_value_heads=2,
    )  # fmt: skip
    model, rng = Dream(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=rng) * (0.5 if "embed" in name else 1.2 / 32**0.5))
            if p.dim() == 1 and "norm" in name:
                p.add_(1)
        model.lm_head.weight[MASK] = 0
    return model.requires_grad_(False).eval()


def quantized(model: LLaDA) -> LLaDA:
    """P, V, Q and K at 4 bits, V with a static scale."""
    for block in model.blocks:
        params = fit(torch.randn(4, 8, generator=torch.Generator().manual_seed(1)).reshape(1, -1), Grid(4))
        block.product = QuantizedProduct(Grid(4), Grid(4), params, Grid(4))
    return model


@pytest.mark.parametrize("make", [tiny_model, tiny_dream, lambda: quantized(tiny_model())])
@pytest.mark.parametrize("pads", [False, True])
def test_an_unchanged_canvas_has_the_hidden_states_of_a_full_forward(make: Any, pads: bool) -> None:
    """Also under quantized products: cached keys and values are quantized as fresh ones are."""
    model = make()
    _, ids, mask = padded()
    mask = mask if pads else None
    full = model.hidden_states(ids, mask)
    hidden, cache = model.start_cache(ids, mask)
    assert torch.equal(hidden, full)
    for start, stop in ((0, 7), (3, 5), (2, 7)):
        torch.testing.assert_close(model.use_cache(ids[:, start:stop], start, cache), full[:, start:stop])
    rest = cache.take(torch.tensor([True, False, True]))
    torch.testing.assert_close(model.use_cache(ids[[0, 2], 4:6], 4, rest), full[[0, 2], 4:6])
    assert all(layer.K is None for layer in cache.layers)


def test_changed_columns_are_attended_to_and_others_stay_stale() -> None:
    ids = padded()[1]
    changed = ids.clone()
    changed[:, 5] = (ids[:, 5] + 1) % 30
    _, cache = MODEL.start_cache(ids)
    before = MODEL.use_cache(ids[:, 5:7], 5, cache)
    after = MODEL.use_cache(changed[:, 5:7], 5, cache)
    assert not torch.allclose(before[:, 1], after[:, 1])
    assert not torch.allclose(after, MODEL.hidden_states(changed)[:, 5:7])  # K, V of columns 0 - 4 are old


def dream_loop(model: Dream, prompt: Tensor, c: SamplerConfig) -> tuple[Tensor, int]:
    """Fast-dLLM's for Dream, one row."""
    x, nfe = torch.cat([prompt, torch.full((c.gen_length,), MASK)])[None], 0
    for block in range(c.num_blocks):
        start = len(prompt) + block * c.block_length
        end = start + c.block_length
        hidden, cache = model.start_cache(x)
        x[0, start] = model.head(hidden)[0, start - 1].argmax()
        nfe += 1
        while bool((x[0, start:end] == MASK).any()):
            stop = end if c.cache == "dual" else x.shape[1]
            logits = model.head(model.use_cache(x[:, start:stop], start, cache))[0]
            logits = torch.cat([logits[:1], logits[:-1]])[: end - start]
            for j, token in transfer(logits, x[0, start:end] == MASK, 0, c.threshold).items():
                x[0, start + j] = token
            nfe += 1
    return x[0], nfe


@pytest.mark.parametrize("threshold", [0.1, 0.3])
@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_dream_commits_a_blocks_first_token_with_the_full_forward(cache: str, threshold: float) -> None:
    model = tiny_dream()
    rows, ids, mask = padded()
    config = SamplerConfig(12, 12, 4, remasking="maskgit_plus", cache=cache, threshold=threshold)
    tokens, taken, _ = row_steps(model, ids, config, mask)
    for row, prompt in enumerate(rows):
        wanted, nfe = dream_loop(model, prompt, config)
        assert torch.equal(tokens[row, ids.shape[1] - len(prompt) :], wanted) and taken[row] == nfe


# Wrong combinations -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"cache": "duel"}, "Unknown cache=duel: use none, prefix or dual. Did you mean dual?"),
        ({"threshold": -0.1}, "threshold must be None .* got -0.1"),
        ({"threshold": float("nan")}, "threshold must be None"),
        ({"cache": "dual", "cfg_scale": 0.5}, "cache=dual does not go with guidance .*set cfg_scale=0"),
        (
            {"threshold": 0.9, "remasking": "random"},
            "remasking=random has none: use remasking=low_confidence",
        ),
        ({"cache": "dual", "remasking": "entropy"}, "Dream is decoded with both"),
        ({"threshold": 0.9, "remasking": "maskgit_plus"}, "Dream is decoded with both"),
        (
            {"cache": "dual", "threshold": 0.9, "remasking": "entropy"},
            "with Dream use remasking=maskgit_plus",
        ),
        (
            {"cache": "dual", "threshold": 0.9, "remasking": "maskgit_plus", "alg_temp": 0.1},
            "alg_temp=0.1 has no effect with a threshold",
        ),
    ],
)
def test_a_wrong_combination_is_one_sentence(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as error:
        SamplerConfig(**values)
    assert "\n" not in str(error.value)


def test_what_a_cache_cannot_do_is_said_before_the_model_runs() -> None:
    model, ids = TinyModel(), torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="observe=masked with cache=dual"):
        denoise(MODEL, ids, SamplerConfig(8, 8, 4, cache="dual"), observe="masked")
    with pytest.raises(ValueError, match="keeps no keys and values: set cache=none"):
        denoise(model, ids, SamplerConfig(8, 8, 4, cache="dual"))
    assert model.calls == 0


def test_the_exact_twin_of_an_approximate_sampler() -> None:
    fast = SamplerConfig(32, 4, 8, cache="dual", threshold=0.9)
    assert not fast.exact and fast.made_exact() == SamplerConfig(32, 4, 8)
    assert (fast.visits_per_block, fast.num_steps, SamplerConfig(32, 4, 8).num_steps) == (8, 32, 4)
    dream = SamplerConfig(32, 32, 8, remasking="maskgit_plus", cache="dual", threshold=0.9)
    assert dream.made_exact() == SamplerConfig(32, 32, remasking="maskgit_plus")


def test_steps_are_numbered_by_block_and_visit() -> None:
    config = SamplerConfig(12, 3, 4, threshold=0.0)
    steps: list[Step] = list(denoise(MODEL, padded()[1], config))
    assert [s.index for s in steps] == [0, 4, 8] and {s.num_steps for s in steps} == {12}

"""CGQ: the weight formula, the trap of decoded confidence, and that weights reach what methods minimise."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_llada import SAMPLER, tiny_model, tiny_prompts, tiny_trajectories
from torch import Tensor

from dllmq.calibration.states import CalibrationState, CleanText, UniformTrajectory, draw_states
from dllmq.calibration.stats import GroupInput, collect
from dllmq.methods import AWQ, GPTQ
from dllmq.models.base import linear_group
from dllmq.numerics import Grid
from dllmq.pipeline import calibration_states, quantize, quantized_linears, weight_summary
from dllmq.recipe import Recipe, TokenWeight, uniform_weight
from dllmq.techniques.cgq import CGQ, token_weights

# The formula ---------------------------------------------------------------------------------------


def test_weights_are_the_square_of_indicator_plus_root_confidence() -> None:
    masked = torch.tensor([[True, True, False, False]])
    score = torch.tensor([[0.25, 1.0, 0.81, 0.0]])
    c = token_weights(masked, score)
    assert torch.allclose(c, torch.tensor([[1.5**2, 2.0**2, 0.7**2, 0.7**2]]))
    literal = token_weights(masked, score, unmasked_confidence="model")
    assert torch.allclose(literal, torch.tensor([[1.5**2, 2.0**2, 1.6**2, 0.7**2]]))


@given(
    token=st.tuples(st.booleans(), st.floats(0, 1, width=32)),
    unmasked=st.floats(0, 4, width=32),
    masked=st.floats(0, 4, width=32),
    confidence=st.sampled_from(["zero", "model"]),
)
def test_every_token_by_the_equation(
    token: tuple[bool, float], unmasked: float, masked: float, confidence: str
) -> None:
    """X~ = x (indicator + sqrt(s)) on the token's input, so the square of it on its squared error."""
    is_masked, s = token
    found = token_weights(torch.tensor([[is_masked]]), torch.tensor([[s]]), unmasked, confidence, masked)
    root = math.sqrt(s) if is_masked or confidence == "model" else 0.0
    assert float(found) == pytest.approx(
        ((masked if is_masked else unmasked) + root) ** 2, rel=1e-5, abs=1e-9
    )


def test_the_object_is_the_function_of_its_fields() -> None:
    state = synthetic(torch.zeros(2, 4, 1))
    for knobs in ({}, {"unmasked": 0.3}, {"unmasked_confidence": "model"}, {"masked_indicator": 2.0}):
        assert torch.equal(CGQ(**knobs)(state), token_weights(state.masked, state.score, **knobs))


def test_decoded_tokens_weigh_as_much_as_masked_ones_only_in_the_literal_variant() -> None:
    masked = torch.tensor([[True, False]])
    score = torch.tensor([[0.5, 0.99]])  # decoded tokens are sure of themselves
    ours, literal = (token_weights(masked, score, unmasked_confidence=u)[0] for u in ("zero", "model"))
    assert ours[0] > 5 * ours[1]
    assert literal[0] < 1.1 * literal[1]


def test_clean_text_gets_one_constant() -> None:
    c = token_weights(torch.zeros(2, 5, dtype=torch.bool), torch.rand(2, 5))
    assert torch.equal(c, torch.full((2, 5), 0.7).add(0.0) ** 2)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"unmasked_confidence": "none"}, "cgq_unmasked_confidence=none is not known; it is zero or model"),
        ({"unmasked": -0.1}, r"cgq_unmasked=-0\.1 .* finite and >= 0"),
        ({"masked_indicator": -1.0}, r"cgq_masked=-1\.0: .* finite and >= 0"),
        ({"unmasked": math.nan}, "cgq_unmasked=nan"),
        ({"masked_indicator": math.inf}, "cgq_masked=inf"),
    ],
)
def test_wrong_knobs_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CGQ(**wrong)


# What methods minimise -----------------------------------------------------------------------------


def synthetic(X: Tensor) -> CalibrationState:
    """Rows of X whose second half is masked; confidences are random."""
    B, L = X.shape[:2]
    masked = (torch.arange(L) >= L // 2).expand(B, L)
    valid = torch.ones(B, L, dtype=torch.bool)
    return CalibrationState(
        tokens=torch.zeros(B, L, dtype=torch.long),
        masked=masked,
        valid=valid,
        response=valid,
        score=torch.rand(B, L, generator=torch.Generator().manual_seed(1)),
        step=torch.zeros(B, dtype=torch.long),
        num_steps=4,
    )


def two_populations() -> Tensor:
    """[16, 32, 32]: visible and masked tokens in subspaces and with large channels of their own."""
    g = torch.Generator().manual_seed(0)
    visible, masked = (
        torch.randn(16, 16, 8, generator=g) @ torch.randn(8, 32, generator=g) for _ in range(2)
    )
    visible[..., -8:] *= 10
    masked[..., :8] *= 10
    return torch.cat([visible, masked], 1)


def errors(method: Any, weight: TokenWeight) -> tuple[float, float]:
    """||(W_hat - W) X|| of a linear over the masked and over the visible tokens."""
    X, model = two_populations(), tiny_model()
    group, state = linear_group(model, 0, model.topology.groups[1]), synthetic(X)
    update = method(group, collect(method.needs, [GroupInput(X, weight(state), state.valid)]), Grid(3))
    scale = 1.0 if update.scale is None else update.scale
    D = X @ (update.weights["attn_out"].dequantize() / scale - group.weights["attn_out"]).T
    return float(D[state.masked].norm()), float(D[~state.masked].norm())


@pytest.mark.parametrize(
    ("method", "masked", "visible"),
    [(GPTQ(), 0.6, 2.5), (AWQ(), 0.9, 1.8), (AWQ(solver="gptq"), 0.75, 3.0)],
    ids=["gptq", "awq", "awq+gptq"],
)
def test_weights_move_the_error_from_masked_to_visible_tokens(
    method: Any, masked: float, visible: float
) -> None:
    """Stressed (visible tokens weigh nothing) by a factor, at the default in the same direction."""
    plain, default = errors(method, uniform_weight), errors(method, CGQ())
    stressed = errors(method, CGQ(unmasked=0.0))
    assert stressed[0] < masked * plain[0] and stressed[1] > visible * plain[1]
    assert default[0] < plain[0] and default[1] > plain[1]


def all_codes(recipe: Recipe) -> list[Tensor]:
    model = tiny_model()
    quantize(model, tiny_prompts(), recipe)
    linears = quantized_linears(model).values()
    return [t for linear in linears for t in (linear.quantized.codes, linear.quantized.scale, linear.weight)]


@pytest.mark.parametrize("method", [GPTQ(), AWQ(n_grid=4)], ids=repr)
def test_a_constant_weight_is_the_plain_baseline(method: Any) -> None:
    """Bit for bit on clean text where (indicator + 0)^2 is a power of two, which rounds nowhere."""
    recipe = Recipe(method, Grid(3, 16), states=CleanText(), num_states=4, batch_size=4, sampler=SAMPLER)
    plain = all_codes(recipe)
    for weight in (CGQ(unmasked=2.0), CGQ(unmasked=0.5, masked_indicator=3.0)):
        found = all_codes(replace(recipe, token_weight=weight))
        assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))


# Where the confidences come from -------------------------------------------------------------------


def test_the_literal_variant_reads_the_confidence_of_decoded_tokens() -> None:
    """`model` has scores recorded everywhere, `zero` only at masks: else it would be `zero` in disguise."""
    recipe = Recipe(GPTQ(), Grid(3, 16), states=UniformTrajectory(), num_states=8, sampler=SAMPLER)
    for confidence, everywhere in (("zero", False), ("model", True)):
        weight = CGQ(unmasked_confidence=confidence)
        (state,) = calibration_states(tiny_model(), tiny_prompts(), replace(recipe, token_weight=weight))
        visible = state.valid & ~state.masked
        assert bool((state.score[visible] > 0).all()) == everywhere
        assert bool((state.score[state.masked] > 0).all())
        assert bool((weight(state)[visible] > 0.7**2 + 1e-6).all()) == everywhere


def test_the_mean_weight_of_both_populations_is_recorded() -> None:
    states = draw_states(tiny_model(), tiny_trajectories(tiny_model()), UniformTrajectory(), 8, 4, 0, SAMPLER)
    recipe = Recipe(GPTQ(), Grid(3), token_weight=CGQ())
    found = weight_summary(states, recipe)
    rows = [(bool(m), float(w)) for s in states for m, w, v in zip(
        s.masked.flatten(), CGQ()(s).flatten(), s.valid.flatten(), strict=True) if v]  # fmt: skip
    for name, is_masked in (("masked", True), ("unmasked", False)):
        mine = [w for m, w in rows if m == is_masked]
        assert found[name] == pytest.approx(sum(mine) / len(mine), rel=1e-5)
    assert found["unmasked"] == pytest.approx(0.49) and found["masked"] > 1

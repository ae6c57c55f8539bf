"""The recipe's strings, its neutral elements, and what a switch does to a model."""

from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from composed import composed
from tiny_llada import SAMPLER, tiny_model, tiny_prompts
from torch import Tensor

import dllmq.models.attention
from dllmq.calibration.states import CalibrationState, CleanText, RandomMask, UniformTrajectory
from dllmq.calibration.values import MinMax
from dllmq.config import load
from dllmq.methods import AWQ, FP, GPTQ, RTN
from dllmq.models.attention import QuantizedProduct
from dllmq.numerics import Grid
from dllmq.pipeline import quantize, quantized_linears
from dllmq.recipe import AttentionGrids, Bits, Recipe, uniform_weight
from dllmq.techniques.cgq import CGQ
from dllmq.techniques.iaaq import IAAQ, EqualWeightSearch
from dllmq.techniques.tmas import TMAS


@pytest.mark.parametrize(
    ("text", "weight", "activation"), [("w4a4", 4, 4), ("w4a16", 4, 16), ("w3a8", 3, 8), ("w2a16", 2, 16)]
)
def test_bits(text: str, weight: int, activation: int) -> None:
    bits = Bits.parse(text)
    assert (bits.weight, bits.activation, str(bits)) == (weight, activation, text)


@pytest.mark.parametrize(
    "text", ["w4", "4", "w4a", "a4w4", "W4A4", "w1a8", "w9a8", "w4a12", "w4a16 ", "", "w-4a4"]
)
def test_bits_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=rf"bits={text} is not a width; write w<N>a<M>.*such as w4a4"):
        Bits.parse(text)


@pytest.mark.parametrize("text", ["w16a16", "w16a4"])
def test_full_precision_weights_are_another_method(text: str) -> None:
    with pytest.raises(ValueError, match=f"bits={text} leaves the weights alone; .*method=fp"):
        Bits.parse(text)


@pytest.mark.parametrize(
    ("attn_bits", "activation", "P", "V"),
    [
        ("auto", 4, 4, 4),
        ("auto", 8, 8, 8),
        ("auto", 16, None, None),
        ("none", 4, None, None),
        ("none", 16, None, None),
        ("v", 4, None, 4),
        ("pv", 6, 6, 6),
        ("8", 4, 8, 8),
        (3, 16, 3, 3),
    ],
)
def test_attention_grids(attn_bits: str | int, activation: int, P: int | None, V: int | None) -> None:
    expected = AttentionGrids(*(None if bits is None else Grid(bits) for bits in (P, V)))
    assert AttentionGrids.parse(attn_bits, activation) == expected


def test_queries_and_keys_are_quantized_where_asked_for() -> None:
    assert AttentionGrids.parse("qkpv", 6) == AttentionGrids(Grid(6), Grid(6), Grid(6))


@pytest.mark.parametrize("attn_bits", ["v", "pv", "qkpv"])
def test_attention_cannot_take_the_width_of_a16(attn_bits: str) -> None:
    with pytest.raises(ValueError, match=f"attn_bits={attn_bits} takes the activation width.*give a width"):
        AttentionGrids.parse(attn_bits, 16)


@pytest.mark.parametrize("attn_bits", ["p", "", "1", "9", "16", 16, "-4", "4.0", "w4", "yes"])
def test_attention_bits_that_are_none(attn_bits: str | int) -> None:
    with pytest.raises(ValueError, match=f"attn_bits={attn_bits} is not known; .*none, v, pv, qkpv or"):
        AttentionGrids.parse(attn_bits, 4)


@pytest.mark.parametrize("states", [CleanText(), RandomMask(), UniformTrajectory(), TMAS()])
@pytest.mark.parametrize(
    ("slots", "calibrated"),
    [
        ({"method": GPTQ()}, True),
        ({"method": AWQ()}, True),
        ({"method": RTN()}, False),
        ({"method": RTN(), "attention": AttentionGrids(V=Grid(4))}, True),
        ({"method": RTN(), "attention": AttentionGrids(P=Grid(4))}, False),  # P is dynamic
        ({"method": FP()}, False),
        ({"method": FP(), "attention": AttentionGrids(V=Grid(4))}, False),  # fp touches nothing
    ],
)
def test_states_nobody_reads_are_inert(states: Any, slots: dict[str, Any], calibrated: bool) -> None:
    inert = Recipe(weights=Grid(4), states=states, **slots).inert()
    if states.name == "clean" or calibrated:
        assert inert == []
    else:
        assert inert == [f"{states.name}: {type(slots['method']).__name__} reads no calibration states"]


V_ONLY, P_ONLY = AttentionGrids(V=Grid(4)), AttentionGrids(P=Grid(4))
CLEAN, NO_STATISTICS = "clean text has no masked token", "reads no statistics"


@pytest.mark.parametrize(
    ("slots", "reason"),
    [
        ({"states": CleanText(), "token_weight": CGQ()}, CLEAN),
        ({"states": CleanText(), "token_weight": CGQ(unmasked=0.3, masked_indicator=2.0)}, CLEAN),
        ({"states": CleanText(), "token_weight": CGQ(unmasked_confidence="model")}, None),
        ({"states": CleanText(), "token_weight": lambda state: state.score}, None),
        ({"states": TMAS(), "token_weight": CGQ()}, None),
        ({"states": RandomMask(), "token_weight": CGQ()}, None),
        ({"states": TMAS(), "token_weight": uniform_weight}, None),
        ({"states": CleanText(), "token_weight": uniform_weight}, None),
    ],
)
@pytest.mark.parametrize("method", [GPTQ(), AWQ(), RTN(), FP()], ids=lambda m: type(m).__name__)
def test_weights_that_change_nothing_are_inert(
    method: Any, slots: dict[str, Any], reason: str | None
) -> None:
    """With RTN and full precision whatever they are: no statistics are taken that could read them."""
    inert = Recipe(method, weights=Grid(4), attention=V_ONLY, **slots).inert()
    if not method.needs and slots["token_weight"] is not uniform_weight:
        reason = NO_STATISTICS
    told = [line for line in inert if line.startswith("cgq: ")]
    assert len(told) == (reason is not None) and all(str(reason) in line for line in told)


@pytest.mark.parametrize("name", ["iaaq", "mse"])
@pytest.mark.parametrize(
    ("method", "attention", "inert"),
    [
        (GPTQ(), V_ONLY, False),
        (RTN(), V_ONLY, False),  # V's scale needs no statistics of the weights
        (AWQ(), AttentionGrids(), True),
        (GPTQ(), P_ONLY, True),
        (GPTQ(), AttentionGrids(QK=Grid(4)), True),
        (FP(), V_ONLY, True),
    ],
)
def test_a_search_without_a_scale_is_inert(
    name: str, method: Any, attention: AttentionGrids, inert: bool
) -> None:
    kind = {"iaaq": IAAQ, "mse": EqualWeightSearch}[name]
    slots = {"value_scale": kind, "value_scale_name": name}
    switch = "iaaq" if name == "iaaq" else "value_scale=mse"
    told = [f"{switch}: V is not quantized, so there is no scale to choose"] if inert else []
    assert Recipe(method, weights=Grid(4), attention=attention, **slots).inert() == told
    assert Recipe(method, weights=Grid(4), attention=attention).inert() == []


# ------------------------------------------------------------------ from the command line to a tensor

SMALL = (
    "bits=w3a4",
    "group_size=16",
    "calibration.num_states=8",
    "calibration.batch_size=4",
    "sampler.gen_length=16",
    "sampler.steps=16",
    "sampler.block_length=16",
)
PLAIN: dict[str, dict[str, Any]] = {  # the slots as they were before there were techniques
    "tmas": {"states": CleanText()},
    "cgq": {"token_weight": lambda state: torch.ones(state.tokens.shape)},
    "iaaq": {"value_scale": MinMax, "value_scale_name": "minmax"},
}


@cache
def recipe(method: str, **switches: bool) -> Recipe:
    """All three on but for what `switches` say."""
    given = {"tmas": True, "cgq": True, "iaaq": True} | switches
    overrides = [f"{name}={str(value).lower()}" for name, value in given.items()]
    overrides += ["method.n_grid=4"] if method == "awq" else []
    return load(composed(f"method={method}", *overrides, *SMALL)).recipe()


def tensors(recipe: Recipe) -> list[Tensor]:
    """All that quantization leaves in the tiny model: parameters, codes, scales, zeros, V's parameters."""
    model = tiny_model()
    quantize(model, tiny_prompts(), recipe)
    found = list(model.parameters())
    for linear in quantized_linears(model).values():
        found += [linear.quantized.codes, linear.quantized.scale, linear.quantized.zero]
    for block in model.blocks:
        assert isinstance(block.product, QuantizedProduct) and block.product.v_params is not None
        found += block.product.v_params
    return found


@cache
def everything_on(method: str) -> list[Tensor]:
    return tensors(recipe(method))


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    assert len(a) == len(b)
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("switch", ["tmas", "cgq", "iaaq"])
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_switch_that_is_off_is_the_plain_baseline_bit_for_bit(method: str, switch: str) -> None:
    """And one that is on is not, though the other two stay on."""
    off = tensors(recipe(method, **{switch: False}))
    assert same(off, tensors(replace(recipe(method), **PLAIN[switch])))
    assert not same(off, everything_on(method))


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_all_switches_off_are_the_recipe_without_them(method: str) -> None:
    grids = AttentionGrids(Grid(4), Grid(4))
    algorithm = {"gptq": GPTQ(), "awq": AWQ(n_grid=4)}[method]
    plain = Recipe(algorithm, Grid(3, 16), Grid(4), grids, num_states=8, batch_size=4, sampler=SAMPLER)
    assert same(tensors(recipe(method, tmas=False, cgq=False, iaaq=False)), tensors(plain))


@pytest.mark.parametrize(
    ("kind", "maps"), [(MinMax, 0), (EqualWeightSearch, 0), (IAAQ, 2 * 2), (partial(IAAQ, alphas=(1.0,)), 4)]
)
def test_attention_maps_are_computed_where_a_scale_asks_for_them(
    monkeypatch: pytest.MonkeyPatch, kind: Any, maps: int
) -> None:
    """Of two batches in two blocks; the product itself needs none while P stays as it is."""
    real, seen = dllmq.models.attention.attention_map, []
    monkeypatch.setattr(
        dllmq.models.attention, "attention_map", lambda *inputs: (seen.append(1), real(*inputs))[1]
    )
    tensors(replace(recipe("gptq"), method=RTN(), attention=V_ONLY, value_scale=kind))
    assert len(seen) == maps


def test_the_search_in_the_model_is_never_above_min_max() -> None:
    report = quantize(tiny_model(), tiny_prompts(), recipe("gptq"))
    notes = [report.notes[f"blocks.{i}.product"] for i in range(2)]
    assert all(n["loss_ratio"] <= 1 and 0.8 - 1e-6 <= n["alpha_mean"] <= 1 for n in notes)
    assert min(n["loss_ratio"] for n in notes) < 1
    off = quantize(tiny_model(), tiny_prompts(), recipe("gptq", iaaq=False))
    assert "alpha_mean" not in off.notes.get("blocks.0.product", {})


def test_the_neutral_weight_is_one_at_tokens_and_zero_at_pads() -> None:
    valid = torch.tensor([[False, True, True]])
    nothing = torch.zeros_like(valid)
    state = CalibrationState(
        torch.zeros(1, 3, dtype=torch.long), nothing, valid, valid, torch.rand(1, 3), torch.tensor([0]), 4
    )
    assert uniform_weight(state).tolist() == [[0, 1, 1]]

"""The recipe's strings and its neutral elements."""

from typing import Any

import pytest
import torch

from dllmq.calibration.states import CalibrationState, CleanText, RandomMask, UniformTrajectory
from dllmq.methods import AWQ, FP, GPTQ, RTN
from dllmq.numerics import Grid
from dllmq.recipe import AttentionGrids, Bits, Recipe, uniform_weight
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
        ("PV", 6, 6, 6),
        ("8", 4, 8, 8),
        (3, 16, 3, 3),
    ],
)
def test_attention_grids(attn_bits: str | int, activation: int, P: int | None, V: int | None) -> None:
    expected = AttentionGrids(*(None if bits is None else Grid(bits) for bits in (P, V)))
    assert AttentionGrids.parse(attn_bits, activation) == expected


@pytest.mark.parametrize("attn_bits", ["v", "pv"])
def test_attention_cannot_take_the_width_of_a16(attn_bits: str) -> None:
    with pytest.raises(ValueError, match=f"attn_bits={attn_bits} takes the activation width.*give a width"):
        AttentionGrids.parse(attn_bits, 16)


@pytest.mark.parametrize("attn_bits", ["p", "", "1", "9", "16", 16, "-4", "4.0", "w4", "yes"])
def test_attention_bits_that_are_none(attn_bits: str | int) -> None:
    with pytest.raises(ValueError, match=f"attn_bits={attn_bits} is not known; it is auto, none, v, pv"):
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


def test_the_neutral_weight_is_one_at_tokens_and_zero_at_pads() -> None:
    valid = torch.tensor([[False, True, True]])
    nothing = torch.zeros_like(valid)
    state = CalibrationState(
        torch.zeros(1, 3, dtype=torch.long), nothing, valid, valid, torch.rand(1, 3), torch.tensor([0]), 4
    )
    assert uniform_weight(state).tolist() == [[0, 1, 1]]

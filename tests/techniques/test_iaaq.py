"""IA-AQ: equals a brute-force float64 search, is never above min-max, and sees interaction."""

import weakref
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dllmq.calibration.values import MinMax
from dllmq.models.attention import quantize_map, quantize_values
from dllmq.numerics import Grid, Params
from dllmq.techniques.iaaq import ALPHAS, IAAQ, EqualWeightSearch, alpha_grid, search_value_scale


def draw(heads: int = 4, kv: int = 2, L: int = 24, h: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """V [B, kv, L, h] with outlier tokens, P [B, heads, L, L]."""
    g = torch.Generator().manual_seed(seed)
    V = torch.randn(3, kv, L, h, generator=g)
    V[:, :, 5] *= 6
    return V, torch.softmax(3 * torch.randn(3, heads, L, L, generator=g), -1)


def brute_force(V: Tensor, P: Tensor, bits: int, head: int) -> list[float]:
    """L(alpha) of one value head over all batches, by the formula, in float64."""
    V, P = V.double(), P.double()
    low, high = min(float(V[:, head].min()), 0.0), max(float(V[:, head].max()), 0.0)
    n, per = 2**bits - 1, P.shape[1] // V.shape[1]
    losses = []
    for i in range(21):
        alpha = 1 - i / 100
        s = alpha * (high - low) / n
        z = round(-alpha * low / s)
        total = 0.0
        for b in range(V.shape[0]):
            q = torch.clamp(torch.round(V[b, head] / s) + z, 0, n)
            for query_head in range(head * per, (head + 1) * per):
                total += float((P[b, query_head] @ ((q - z) * s - V[b, head])).pow(2).sum())
        losses.append(total)
    return losses


def settle(scale: MinMax, V: Tensor, P: Tensor | None) -> MinMax:
    scale.range(V.transpose(1, 2).flatten(0, 1))
    scale.accumulate(V, P)
    return scale


@pytest.mark.parametrize("bits", [2, 4])
def test_losses_equal_a_brute_force_search(bits: int) -> None:
    V, P = draw()
    scale = IAAQ(Grid(bits))
    scale.range(V.transpose(1, 2).flatten(0, 1))
    for b in range(3):  # streamed
        scale.accumulate(V[b : b + 1], P[b : b + 1])
    found = scale.search()
    for head in range(2):
        losses = brute_force(V, P, bits, head)
        assert found.losses[head].tolist() == pytest.approx(losses, rel=1e-3)
        assert losses[ALPHAS.index(round(float(found.alpha[head]), 2))] <= min(losses) * 1.001


# Any shape -----------------------------------------------------------------------------------------


class Case(NamedTuple):
    V: Tensor  # [B, kv, L, h], 0 at pads
    P: Tensor  # [B, heads, L, L], 0 in the rows of pads
    valid: Tensor
    bits: int
    granularity: str


@st.composite
def cases(draw: Any) -> Case:
    """Grouped queries, pads, P quantized or not, values of one sign or both, an outlier token or none."""
    size = lambda most: draw(st.integers(1, most))  # noqa: E731
    B, kv, per, L, h = size(2), size(2), size(3), size(8), size(4)
    bits, granularity = draw(st.integers(2, 6)), draw(st.sampled_from(["tensor", "head", "channel"]))
    shift, sharpness, p_bits = draw(st.sampled_from([0, 2, -2])), size(4), draw(st.sampled_from([None, 3, 4]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    valid = torch.arange(L).expand(B, L) >= torch.randint(0, L, (B, 1), generator=g)  # padded on the left
    V = torch.randn(B, kv, L, h, generator=g) + shift
    V[:, :, -1] *= draw(st.sampled_from([1, 5]))
    scores = sharpness * torch.randn(B, kv * per, L, L, generator=g)
    P = torch.softmax(scores.masked_fill(~valid[:, None, None, :], -torch.inf), -1)
    P = P if p_bits is None else quantize_map(P, Grid(p_bits))
    pads = ~valid[:, None, :, None]
    return Case(V.masked_fill(pads, 0.0), P.masked_fill(pads, 0.0), valid, bits, granularity)


def groups(case: Case) -> list[tuple[slice, slice]]:
    """Which heads and channels share a scale."""
    kv, h = case.V.shape[1], case.V.shape[3]
    one = [slice(i, i + 1) for i in range(max(kv, h))]
    everything = slice(None)
    return {
        "tensor": [(everything, everything)],
        "head": [(one[k], everything) for k in range(kv)],
        "channel": [(one[k], one[c]) for k in range(kv) for c in range(h)],
    }[case.granularity]


def objective(case: Case, heads: slice, channels: slice, params: Params, mixed: bool) -> float:
    """||P E||^2 (or ||E||^2), E = Deq(Q(V)) - V by the definition of the product; sums in float64."""
    V = case.V[:, heads, :, channels]
    E = (quantize_values(V, Grid(case.bits), params) - V).double()
    if not mixed:
        return float(E.pow(2).sum())
    per = case.P.shape[1] // case.V.shape[1]
    total = 0.0
    for k, head in enumerate(range(case.V.shape[1])[heads]):
        for query_head in range(head * per, (head + 1) * per):
            total += float((case.P[:, query_head].double() @ E[:, k]).pow(2).sum())
    return total


@pytest.mark.parametrize("kind", [IAAQ, EqualWeightSearch])
@settings(max_examples=40)
@given(case=cases())
def test_the_choice_is_a_brute_force_searchs(kind: type[IAAQ], case: Case) -> None:
    """Of every group: its losses, the alpha, the scale and zero; never above min-max."""
    scale = kind(Grid(case.bits), case.granularity)
    scale.range(case.V.transpose(1, 2)[case.valid])
    for b in range(len(case.V)):  # streamed; the equal-weight search is given no map
        scale.accumulate(case.V[b : b + 1], case.P[b : b + 1] if kind is IAAQ else None)
    found, n = scale.search(), 2**case.bits - 1
    for g, (heads, channels) in enumerate(groups(case)):
        values = case.V[:, heads, :, channels]
        low, high = values.amin().clamp(max=0), values.amax().clamp(min=0)  # pads are 0
        s = (high - low) / n if high > low else torch.tensor(1.0)
        z = torch.round(-low / s)
        losses = [
            objective(case, heads, channels, Params((s * a).view(1, 1, 1), z.view(1, 1, 1)), kind is IAAQ)
            for a in ALPHAS
        ]
        floor = 1e-6 * max(losses) + 1e-12  # what fp32 sums leave of a loss that is 0
        assert found.losses[g].tolist() == pytest.approx(losses, rel=1e-4, abs=floor)
        chosen = ALPHAS.index(round(float(found.alpha[g]), 2))
        assert losses[chosen] <= min(losses) * (1 + 1e-4) + floor
        assert found.losses[g, chosen] <= found.losses[g, 0]
        assert float(found.scale[g]) == pytest.approx(ALPHAS[chosen] * float(s), rel=1e-6)
        assert float(found.zero[g]) == float(z)


@pytest.mark.parametrize("granularity", ["tensor", "head", "channel"])
def test_never_above_min_max_in_the_product(granularity: str) -> None:
    V, P = draw(seed=1)
    scale, off = (settle(kind(Grid(3), granularity), V, P) for kind in (IAAQ, MinMax))
    assert scale.search().losses.shape == ({"tensor": 1, "head": 2, "channel": 16}[granularity], 21)
    on, plain = (quantize_values(V, Grid(3), s.result()) for s in (scale, off))
    error = [float((P @ (x - V).repeat_interleave(2, 1)).pow(2).sum()) for x in (on, plain)]
    assert error[0] < error[1]
    notes = scale.notes()
    assert notes["loss_ratio"] == pytest.approx(error[0] / error[1], rel=1e-3)
    assert notes["alpha_mean"] == pytest.approx(float(scale.search().alpha.mean()))


def test_queries_in_pieces_are_the_whole_map() -> None:
    """The pipeline hands over long maps piece by piece."""
    V, P = draw()
    whole, pieces = settle(IAAQ(Grid(4)), V, P), settle(IAAQ(Grid(4)), V, P[:, :, :7])
    pieces.accumulate(V, P[:, :, 7:])
    torch.testing.assert_close(whole.search().losses, pieces.search().losses, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", [IAAQ, EqualWeightSearch])
def test_alpha_one_alone_is_min_max(kind: type[IAAQ]) -> None:
    V, P = draw(seed=2)
    scale, off = settle(kind(Grid(4), alphas=(1.0,)), V, P), settle(MinMax(Grid(4)), V, P)
    assert all(torch.equal(a, b) for a, b in zip(scale.result(), off.result(), strict=True))
    assert scale.notes() == {"alpha_mean": 1.0, "loss_ratio": 1.0}


@pytest.mark.parametrize("kind", [IAAQ, EqualWeightSearch])
def test_of_equal_losses_the_largest_alpha(kind: type[IAAQ]) -> None:
    """Nothing but zeros: every scale is exact."""
    scale = settle(kind(Grid(4)), torch.zeros(1, 2, 5, 3), torch.full((1, 2, 5, 5), 0.2))
    assert scale.search().alpha.tolist() == [1.0, 1.0] and scale.notes()["loss_ratio"] == 1.0


def test_tokens_that_are_read_keep_their_precision() -> None:
    """An outlier token nobody reads is clipped; the equal-weight search has to protect it."""
    g = torch.Generator().manual_seed(3)
    V = torch.rand(1, 1, 16, 8, generator=g)
    V[:, :, 3] = 3.0
    P = torch.ones(1, 1, 16, 16) / 15
    P[..., 3] = 1e-6  # next to nobody
    read, equal = (settle(kind(Grid(4)), V, P).search() for kind in (IAAQ, EqualWeightSearch))
    assert not torch.allclose(read.losses / read.losses[:, :1], equal.losses / equal.losses[:, :1], rtol=0.05)
    assert float(equal.alpha) > 0.97
    assert float(read.alpha) < 0.95


# What is asked for and held ------------------------------------------------------------------------


def test_only_the_search_after_mixing_asks_for_maps() -> None:
    assert [kind(Grid(4)).needs for kind in (MinMax, IAAQ, EqualWeightSearch)] == [
        frozenset(),
        {"maps"},
        {"values"},
    ]


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_no_map_and_no_value_is_held(granularity: str) -> None:
    V, P = draw()
    scale = settle(IAAQ(Grid(4), granularity), V, P)
    held = [weakref.ref(V), weakref.ref(P)]
    storage = P.untyped_storage().data_ptr()
    kept = [value for value in vars(scale).values() if isinstance(value, Tensor)]
    assert all(t.untyped_storage().data_ptr() != storage and t.numel() <= 16 * 21 for t in kept)
    del V, P
    assert [ref() for ref in held] == [None, None]


# The grid of alphas, and the contract --------------------------------------------------------------


def test_alphas_go_from_one_to_the_lowest() -> None:
    assert tuple(round(1 - i / 100, 2) for i in range(21)) == ALPHAS  # the paper's 1.0 ... 0.8
    assert alpha_grid(0.5, 0.25) == (1.0, 0.75, 0.5)
    assert alpha_grid(0.8, 0.15) == (1.0, 0.85)  # a step that overshoots stops before
    assert len(alpha_grid(0.5, 0.0005)) == 1001
    with pytest.raises(ValueError, match="more than 1000 values of alpha"):
        alpha_grid(0.8, 1e-6)
    assert alpha_grid(1.0) == (1.0,)


@given(lowest=st.floats(0.01, 1), step=st.floats(0.005, 1))
def test_every_grid_starts_at_min_max_and_stays_in_range(lowest: float, step: float) -> None:
    alphas = alpha_grid(lowest, step)
    assert alphas[0] == 1.0 and min(alphas) >= lowest - 1e-8 and min(alphas) - step < lowest
    assert list(alphas) == sorted(set(alphas), reverse=True)
    IAAQ(Grid(4), alphas=alphas)


@pytest.mark.parametrize(
    ("lowest", "step"),
    [(0.0, 0.01), (-0.5, 0.01), (1.01, 0.01), (0.8, 0.0), (0.8, -1.0), (0.8, 2.0), (float("nan"), 1.0)],
)
def test_grids_that_are_none(lowest: float, step: float) -> None:
    with pytest.raises(ValueError, match=r"iaaq_alpha_min=.* iaaq_alpha_step=.* must lie in \(0, 1\]"):
        alpha_grid(lowest, step)


def test_the_contract_function() -> None:
    V, P = draw(heads=2, kv=2)
    flat = V[0].transpose(0, 1).flatten(1)  # [L, kv * h], head-major
    found = search_value_scale(flat, P[0], Grid(4))
    assert found.losses.shape == (2, 21)
    for head in range(2):
        assert found.losses[head].tolist() == pytest.approx(brute_force(V[:1], P[:1], 4, head), rel=1e-3)


def test_the_contract_function_with_grouped_queries() -> None:
    V, P = draw(heads=4, kv=2)
    flat = V[0].transpose(0, 1).flatten(1)
    found = search_value_scale(flat, P[0], Grid(4), "channel", kv_heads=2)
    direct = settle(IAAQ(Grid(4), "channel"), V[:1], P[:1]).search()
    assert all(torch.equal(a, b) for a, b in zip(found, direct, strict=True))


def test_wrong_alphas_are_refused() -> None:
    with pytest.raises(ValueError, match=r"start at 1\.0"):
        IAAQ(Grid(4), alphas=(0.9, 0.8))

"""IA-AQ: equals a brute-force float64 search, is never above min-max, and sees interaction."""

import pytest
import torch

from dllmq.calibration.values import MinMax
from dllmq.models.attention import quantize_values
from dllmq.numerics import Grid
from dllmq.techniques.iaaq import ALPHAS, IAAQ, EqualWeightSearch, search_value_scale


def draw(
    heads: int = 4, kv: int = 2, L: int = 24, h: int = 8, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """V [B, kv, L, h] with outlier tokens, P [B, heads, L, L]."""
    g = torch.Generator().manual_seed(seed)
    V = torch.randn(3, kv, L, h, generator=g)
    V[:, :, 5] *= 6
    return V, torch.softmax(3 * torch.randn(3, heads, L, L, generator=g), -1)


def brute_force(V: torch.Tensor, P: torch.Tensor, bits: int, head: int) -> list[float]:
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


@pytest.mark.parametrize("granularity", ["tensor", "head", "channel"])
def test_never_above_min_max(granularity: str) -> None:
    V, P = draw(seed=1)
    scale, off = IAAQ(Grid(3), granularity), MinMax(Grid(3), granularity)
    for s in (scale, off):
        s.range(V.transpose(1, 2).flatten(0, 1))
        s.accumulate(V, P)
    found = scale.search()
    assert bool((found.losses.amin(1) <= found.losses[:, 0]).all())
    assert found.losses.shape == ({"tensor": 1, "head": 2, "channel": 16}[granularity], 21)
    on, plain = (quantize_values(V, Grid(3), s.result()) for s in (scale, off))
    error = [float((P @ (x - V).repeat_interleave(2, 1)).pow(2).sum()) for x in (on, plain)]
    assert error[0] <= error[1] * (1 + 1e-5)


def test_alpha_one_alone_is_min_max() -> None:
    V, P = draw(seed=2)
    scale, off = IAAQ(Grid(4), alphas=(1.0,)), MinMax(Grid(4))
    for s in (scale, off):
        s.range(V.transpose(1, 2).flatten(0, 1))
        s.accumulate(V, P)
    assert all(torch.equal(a, b) for a, b in zip(scale.result(), off.result(), strict=True))


def test_tokens_that_are_read_keep_their_precision() -> None:
    """An outlier token nobody reads is clipped; the equal-weight search has to protect it."""
    g = torch.Generator().manual_seed(3)
    V = torch.rand(1, 1, 16, 8, generator=g)
    V[:, :, 3] = 3.0
    P = torch.ones(1, 1, 16, 16) / 15
    P[..., 3] = 1e-6  # next to nobody
    alphas = {}
    for kind in (IAAQ, EqualWeightSearch):
        scale = kind(Grid(4))
        scale.range(V.transpose(1, 2).flatten(0, 1))
        scale.accumulate(V, P)
        alphas[kind] = scale.search()
    read, equal = alphas[IAAQ], alphas[EqualWeightSearch]
    assert not torch.allclose(read.losses / read.losses[:, :1], equal.losses / equal.losses[:, :1], rtol=0.05)
    assert float(equal.alpha) > 0.97
    assert float(read.alpha) < 0.95


def test_the_contract_function() -> None:
    V, P = draw(heads=2, kv=2)
    flat = V[0].transpose(0, 1).flatten(1)  # [L, kv * h], head-major
    found = search_value_scale(flat, P[0], Grid(4))
    assert found.losses.shape == (2, 21)
    for head in range(2):
        assert found.losses[head].tolist() == pytest.approx(brute_force(V[:1], P[:1], 4, head), rel=1e-3)


def test_wrong_alphas_are_refused() -> None:
    with pytest.raises(ValueError, match=r"start at 1\.0"):
        IAAQ(Grid(4), alphas=(0.9, 0.8))

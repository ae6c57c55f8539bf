"""The attention product: full precision is SDPA, and quantized it is its formula."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dllmq.calibration.values import MinMax
from dllmq.models.attention import (
    AttentionProduct,
    QuantizedProduct,
    attention_map,
    attention_maps,
    quantize_map,
    quantize_queries_keys,
    quantize_values,
    repeat_kv,
)
from dllmq.models.base import padding_bias
from dllmq.numerics import Grid, Params, fake_quant

B, HEADS, L, H = 2, 4, 7, 8


def qkv(kv: int = HEADS) -> tuple[Tensor, Tensor, Tensor]:
    return 2 * torch.randn(B, HEADS, L, H), torch.randn(B, kv, L, H), 3 * torch.randn(B, kv, L, H) + 1


def pads() -> Tensor:
    keep = torch.ones(B, L)
    keep[1, :3] = 0
    return keep


def min_max(V: Tensor, grid: Grid, granularity: str = "head") -> Params:
    scale = MinMax(grid, granularity)
    scale.range(V.transpose(1, 2).flatten(0, 1))
    return scale.result()


def formula(Q: Tensor, K: Tensor, V: Tensor, bias: Tensor | None, bits: int) -> Tensor:
    """Deq(Q(P)) Deq(Q(V)) head by head and query by query: P per query, V per key/value head."""
    top, out = 2**bits - 1, torch.empty(B, HEADS, L, H)
    for b in range(B):
        for head in range(HEADS):
            kv = head * V.shape[1] // HEADS
            low, high = min(float(V[:, kv].min()), 0.0), max(float(V[:, kv].max()), 0.0)
            s, z = (high - low) / top, round(-low / ((high - low) / top))
            V_hat = ((V[b, kv] / s).round().add(z).clamp(0, top) - z) * s
            for q in range(L):
                scores = torch.tensor([float(Q[b, head, q] @ k) / math.sqrt(H) for k in K[b, kv]])
                if bias is not None:
                    scores += bias[b, 0, 0]
                P = torch.softmax(scores, 0)
                s_P = float(P.max()) / top
                out[b, head, q] = (P / s_P).round().clamp(0, top) * s_P @ V_hat
    return out


@pytest.mark.parametrize("kv", [4, 2, 1])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("bits", [3, 8])
def test_quantized_product_equals_its_formula(kv: int, padded: bool, bits: int) -> None:
    Q, K, V = qkv(kv)
    bias = padding_bias(pads(), torch.float32) if padded else None
    grid = Grid(bits)
    out = QuantizedProduct(grid, grid, min_max(V, grid))(Q, K, V, bias)
    error = (out - formula(Q, K, V, bias, bits)).abs()
    # a rounding tie of a code may fall to the other side: one step of P or V, nowhere more
    assert float(error.quantile(0.95)) < 1e-4 and float(error.max()) < 0.05 * 2 ** (8 - bits)


@pytest.mark.parametrize("kv", [4, 2])
def test_without_grids_it_is_sdpa(kv: int) -> None:
    Q, K, V = qkv(kv)
    bias = padding_bias(pads(), torch.float32)
    sdpa = F.scaled_dot_product_attention(
        Q, K.repeat_interleave(HEADS // kv, 1), V.repeat_interleave(HEADS // kv, 1), attn_mask=bias
    )
    assert torch.equal(AttentionProduct()(Q, K, V, bias), sdpa)
    torch.testing.assert_close(QuantizedProduct(None, None, None)(Q, K, V, bias), sdpa, atol=1e-5, rtol=0)


def test_eight_bits_are_near_full_precision_and_fewer_are_farther() -> None:
    Q, K, V = qkv()
    exact = AttentionProduct()(Q, K, V, None)

    def error(P: Grid | None, V_grid: Grid | None) -> float:
        params = None if V_grid is None else min_max(V, V_grid)
        return float((QuantizedProduct(P, V_grid, params)(Q, K, V, None) - exact).norm() / exact.norm())

    by_width = [error(Grid(b), Grid(b)) for b in (8, 4, 2)]
    assert by_width[0] < 0.01 < by_width[1] < by_width[2]
    assert 0 < error(None, Grid(4)) < by_width[1] and 0 < error(Grid(4), None) < by_width[1]


def test_pad_keys_weigh_nothing_for_any_query() -> None:
    Q, K, _ = qkv()
    P = attention_map(Q, K, padding_bias(pads(), torch.float32))
    assert torch.equal(P[1, :, :, :3], torch.zeros(HEADS, L, 3))
    torch.testing.assert_close(P.sum(-1), torch.ones(B, HEADS, L))


def test_no_bias_without_pads() -> None:
    assert padding_bias(None, torch.float32) is None
    assert padding_bias(torch.ones(B, L), torch.float32) is None
    bias = padding_bias(pads(), torch.bfloat16)
    assert bias is not None and set(bias[1, 0, 0].tolist()) == {0.0, torch.finfo(torch.bfloat16).min}


def test_heads_read_consecutive_value_heads() -> None:
    V = torch.arange(2.0)[None, :, None, None].expand(1, 2, 3, 4)
    assert repeat_kv(V, 4)[0, :, 0, 0].tolist() == [0, 0, 1, 1]
    assert repeat_kv(V, 2) is V


@pytest.mark.parametrize("granularity", ["tensor", "head", "channel"])
def test_values_err_by_half_a_step_and_finer_scales_err_less(granularity: str) -> None:
    _, _, V = qkv()
    V[:, 1] *= 10
    V[..., 3] *= 5
    grid = Grid(4)
    params = min_max(V, grid, granularity)
    V_hat = quantize_values(V, grid, params)
    assert bool(((V_hat - V).abs() <= params.scale / 2 * (1 + 1e-5)).all())
    finer: dict[str, Callable[[], Tensor]] = {
        g: lambda g=g: quantize_values(V, grid, min_max(V, grid, g)) for g in ("tensor", "head", "channel")
    }
    errors = [float((make() - V).norm()) for make in finer.values()]
    assert errors[0] > errors[1] > errors[2]


def test_static_scales_saturate_beyond_their_range() -> None:
    V = torch.tensor([-4.0, -1.0, 2.0, 9.0])[None, None, :, None]
    params = Params(torch.tensor([[[1.0]]]), torch.tensor([[[1.0]]]))  # codes 0..3 mean -1..2
    assert quantize_values(V, Grid(2), params).flatten().tolist() == [-1, -1, 2, 2]


def test_only_unquantized_values_let_a_scale_through() -> None:
    grid = Grid(4)
    params = Params(torch.ones(1, 1, 1), torch.zeros(1, 1, 1))
    assert AttentionProduct().passes_values
    assert QuantizedProduct(grid, None, None).passes_values
    assert not QuantizedProduct(None, grid, params).passes_values


# P ------------------------------------------------------------------------------------------------


@given(
    bits=st.integers(2, 8),
    keys=st.integers(1, 40),
    peaks=st.sampled_from([0.0, 1e-3, 1.0, 10.0, 1000.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    grid=st.sampled_from([(-1, False), (-1, True), (0, False)]),
    seed=st.integers(0, 2**20),
)
def test_quantize_map_is_fake_quant_bit_for_bit(
    bits: int, keys: int, peaks: float, dtype: torch.dtype, grid: tuple[int, bool], seed: int
) -> None:
    """Flat rows, one-hot rows, rows of a single key, and a row of ties: points half-way between codes."""
    rng, top = torch.Generator().manual_seed(seed), 2**bits - 1
    P = torch.softmax(peaks * torch.randn(2, 2, 3, keys, generator=rng), -1).to(dtype)
    halves = torch.randint(0, 2 * top + 1, (keys,), generator=rng) / 2
    halves[0] = top
    P[0, 0, 0] = halves / halves.sum()
    given, found = P.clone(), quantize_map(P, Grid(bits, *grid))
    expected = fake_quant(P, Grid(bits, *grid))
    assert found.dtype == dtype and torch.equal(P, given)
    assert torch.equal(found, expected) and torch.equal(found.signbit(), expected.signbit())


@pytest.mark.parametrize("padded", [False, True])
def test_maps_in_pieces_are_the_whole_map(monkeypatch: pytest.MonkeyPatch, padded: bool) -> None:
    """Of at most MAX_MAP elements, and of one query at least; heads share keys in the same way."""
    Q, K, V = qkv(kv=2)
    bias, grid = padding_bias(pads(), torch.float32) if padded else None, Grid(4)
    product = QuantizedProduct(grid, grid, min_max(V, grid))
    (whole,), out = list(attention_maps(Q, K, bias)), product(Q, K, V, bias)
    torch.testing.assert_close(whole, attention_map(Q, repeat_kv(K, HEADS), bias))
    for sizes, limit in (([3, 3, 1], B * HEADS * L * 3 + 1), ([1] * L, 5)):
        monkeypatch.setattr("dllmq.models.attention.MAX_MAP", limit)
        pieces = list(attention_maps(Q, K, bias))
        assert [P.shape[2] for P in pieces] == sizes
        torch.testing.assert_close(torch.cat(pieces, 2), whole)
        torch.testing.assert_close(product(Q, K, V, bias), out)


def test_the_product_leaves_its_inputs_as_they_are() -> None:
    """Scores are scaled and biased in place: those of the product, not what it was given."""
    Q, K, V = qkv()
    bias, grid = padding_bias(pads(), torch.float32), Grid(4)
    kept = [x.clone() for x in (Q, K, V, bias)]
    QuantizedProduct(grid, grid, min_max(V, grid), grid)(Q, K, V, bias)
    assert all(torch.equal(x, y) for x, y in zip((Q, K, V, bias), kept, strict=True))


# Q and K ------------------------------------------------------------------------------------------


def test_queries_and_keys_have_one_scale_per_token_and_head() -> None:
    Q, K, _ = qkv(kv=2)
    K[1, 0, 3] *= 1000  # one token of one head: nobody else notices
    for x, x_hat in zip((Q, K), quantize_queries_keys(Q, K, Grid(3)), strict=True):
        for row, row_hat in zip(x.reshape(-1, H), x_hat.reshape(-1, H), strict=True):
            low, high = min(float(row.min()), 0.0), max(float(row.max()), 0.0)
            s = (high - low) / 7
            z = round(-low / s)
            expected = ((row / s).round().add(z).clamp(0, 7) - z) * s
            torch.testing.assert_close(row_hat, expected, atol=1e-5 * s, rtol=1e-6)
    same_Q, same_K = quantize_queries_keys(Q, K, None)
    assert same_Q is Q and same_K is K


@pytest.mark.parametrize("p_grid", [None, Grid(4)], ids=str)
def test_the_map_is_that_of_quantized_queries_and_keys(p_grid: Grid | None) -> None:
    Q, K, V = qkv(kv=2)
    bias, grid = padding_bias(pads(), torch.float32), Grid(4)
    rounded = QuantizedProduct(p_grid, None, None)(fake_quant(Q, grid), fake_quant(K, grid), V, bias)
    out = QuantizedProduct(p_grid, None, None, qk_grid=grid)(Q, K, V, bias)
    assert torch.equal(out, rounded)
    assert not torch.allclose(out, QuantizedProduct(p_grid, None, None)(Q, K, V, bias), atol=1e-3)

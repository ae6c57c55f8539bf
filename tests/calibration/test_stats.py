"""Streamed statistics are their formulas; pads never enter; weight 1 is no weight, bit for bit."""

import pytest
import torch
from torch import Tensor

from dllmq.calibration import stats as stats_module
from dllmq.calibration.stats import GroupInput, GroupStats, StatsCollector, collect
from dllmq.numerics.linalg import weighted_gram

ALL = frozenset({"gram", "mean_abs", "inputs"})
I = 6


def batch(B: int, L: int, pads: int = 0, weight: Tensor | None = None) -> GroupInput:
    valid = torch.ones(B, L, dtype=torch.bool)
    valid[0, :pads] = False
    c = torch.rand(B, L) if weight is None else weight
    return GroupInput(torch.randn(B, L, I), c * valid, valid)


def test_statistics_equal_their_formulas_token_by_token() -> None:
    batches = [batch(2, 5, pads=3), batch(1, 7), batch(3, 2, pads=1)]
    H, total, weights = torch.zeros(I, I).double(), torch.zeros(I).double(), 0.0
    for b in batches:
        for row in range(len(b.X)):
            for j in range(b.X.shape[1]):
                x, c = b.X[row, j].double(), float(b.weight[row, j])
                H, total, weights = H + 2 * c * torch.outer(x, x), total + c * x.abs(), weights + c
    stats = collect(ALL, batches)
    assert stats.gram is not None and stats.mean_abs is not None
    torch.testing.assert_close(stats.gram.double(), H, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stats.mean_abs.double(), total / weights, atol=1e-5, rtol=1e-5)
    assert stats.inputs is not None and [b.X.data_ptr() for b in stats.inputs] == [
        b.X.data_ptr() for b in batches
    ]


def test_streaming_equals_one_shot() -> None:
    whole = batch(6, 4)
    parts = [
        GroupInput(whole.X[i : i + 2], whole.weight[i : i + 2], whole.valid[i : i + 2]) for i in (0, 2, 4)
    ]
    streamed, once = collect(ALL, parts), collect(ALL, [whole])
    assert streamed.gram is not None and streamed.mean_abs is not None
    torch.testing.assert_close(streamed.gram, once.gram)
    torch.testing.assert_close(streamed.mean_abs, once.mean_abs)


def test_weight_one_is_no_weight_bit_for_bit() -> None:
    b = batch(3, 5, weight=torch.ones(3, 5))
    stats, X = collect(ALL, [b]), b.X.flatten(0, 1)
    assert torch.equal(stats.gram, weighted_gram(X))  # type: ignore[arg-type]
    assert torch.equal(stats.mean_abs, X.abs().sum(0) / 15)  # type: ignore[arg-type]


@pytest.mark.parametrize("garbage", [1e9, float("inf"), float("nan")])
def test_pads_never_enter(garbage: float) -> None:
    """Whatever stands at a pad, the statistics are those of the unpadded rows, bit for bit."""
    b = batch(1, 6, pads=2)
    b.X[0, :2] = garbage
    padded = collect(ALL, [b])
    unpadded = collect(ALL, [GroupInput(b.X[:, 2:], b.weight[:, 2:], b.valid[:, 2:])])
    assert torch.equal(padded.gram, unpadded.gram) and torch.equal(padded.mean_abs, unpadded.mean_abs)  # type: ignore[arg-type]


def test_a_positive_constant_moves_gram_only() -> None:
    """H is linear in c; mean|x| is normalised."""
    b = batch(2, 5)
    four = collect(ALL, [GroupInput(b.X, 4 * b.weight, b.valid)])
    one = collect(ALL, [b])
    assert four.gram is not None and one.gram is not None
    torch.testing.assert_close(four.gram, 4 * one.gram)
    torch.testing.assert_close(four.mean_abs, one.mean_abs)


def test_only_what_is_needed_is_kept() -> None:
    assert collect(frozenset(), [batch(1, 3)]) == GroupStats()
    assert collect(frozenset({"mean_abs"}), [batch(1, 3)]).gram is None
    assert collect(frozenset({"gram"}), [batch(1, 3)]).inputs is None


def test_sums_are_fp32_for_bf16_inputs() -> None:
    collector, b = StatsCollector(ALL), batch(2, 5)
    collector.add(b.X.bfloat16(), b.weight, b.valid)
    stats = collector.result()
    exact = collect(ALL, [GroupInput(b.X.bfloat16().float(), b.weight, b.valid)])
    assert stats.gram is not None and stats.gram.dtype == torch.float32
    assert torch.equal(stats.gram, exact.gram)  # type: ignore[arg-type]


@pytest.mark.parametrize("tokens", [1, 7, 13])
def test_few_large_products_equal_one_per_batch(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches wait until there are `tokens` of them; none is lost, whatever the size of the buffer."""
    batches = [batch(2, 5, pads=3), batch(1, 7), batch(3, 2, pads=1), batch(1, 1)]
    once = collect(ALL, batches)
    monkeypatch.setattr(stats_module, "BUFFER_ELEMENTS", tokens * I)
    parts = collect(ALL, batches)
    torch.testing.assert_close(parts.gram, once.gram)
    assert torch.equal(parts.mean_abs, once.mean_abs)  # type: ignore[arg-type]


def test_buffer_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats_module, "BUFFER_ELEMENTS", 20 * I)
    collector, seen = StatsCollector(frozenset({"gram"})), []
    for _ in range(12):
        b = batch(2, 4)
        collector.add(b.X, b.weight, b.valid)
        seen.append(sum(len(rows) for rows, _ in collector.waiting))
    assert seen == [8, 16, 0] * 4

"""CGQ: the weight formula, the trap of decoded confidence, and that the weights reach the statistics."""

import pytest
import torch

from dllmq.calibration.stats import StatsCollector
from dllmq.methods.gptq import gptq
from dllmq.numerics import Grid
from dllmq.techniques.cgq import CGQ, token_weights


def test_weights_are_the_square_of_indicator_plus_root_confidence() -> None:
    masked = torch.tensor([[True, True, False, False]])
    score = torch.tensor([[0.25, 1.0, 0.81, 0.0]])
    c = token_weights(masked, score)
    assert torch.allclose(c, torch.tensor([[1.5**2, 2.0**2, 0.7**2, 0.7**2]]))
    literal = token_weights(masked, score, unmasked_confidence="model")
    assert torch.allclose(literal, torch.tensor([[1.5**2, 2.0**2, 1.6**2, 0.7**2]]))


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
    [({"unmasked_confidence": "none"}, "zero or model"), ({"unmasked": -0.1}, "must be >= 0")],
)
def test_wrong_knobs_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CGQ(**wrong)


def test_weights_reach_the_gram_matrix_and_move_the_error() -> None:
    """A stress weighting: error on masked tokens falls, on unmasked ones it rises, by a factor."""
    g = torch.Generator().manual_seed(0)
    I, n = 32, 400
    masked = torch.arange(2 * n) < n
    subspaces = [torch.randn(I, 24, generator=g) @ torch.randn(24, I, generator=g) for _ in range(2)]
    X = torch.cat([torch.randn(n, I, generator=g) @ s for s in subspaces])
    W = torch.randn(16, I, generator=g)

    def errors(c: torch.Tensor) -> tuple[float, float]:
        collector = StatsCollector(frozenset({"gram"}))
        collector.add(X[None], c[None], torch.ones(1, 2 * n, dtype=torch.bool))
        E = (gptq(W, collector.result().gram, Grid(3)) - W) @ X.T
        return float(E[:, masked].norm()), float(E[:, ~masked].norm())

    plain = errors(torch.ones(2 * n))
    stressed = errors(torch.where(masked, 1e4, 1.0))
    assert stressed[0] < 0.8 * plain[0]
    assert stressed[1] > 1.2 * plain[1]

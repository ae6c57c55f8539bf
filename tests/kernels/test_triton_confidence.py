"""The best token and its probability, against softmax in fp64."""

import pytest
import torch
from kernel_cases import DEVICE, needs_triton
from torch import Tensor

from dllmq.kernels import triton_confidence
from dllmq.kernels.triton_confidence import argmax_confidence

pytestmark = needs_triton


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_confidence, "CHUNK", 64)


def check(logits: Tensor) -> None:
    x0, p = argmax_confidence(logits.to(DEVICE))
    expected = torch.softmax(logits.double(), -1)
    best = torch.stack([torch.nonzero(l == l.max())[0, 0] for l in logits.float()])  # the lowest id
    assert torch.equal(x0.cpu(), best)
    torch.testing.assert_close(p.cpu().double(), expected.gather(1, best[:, None])[:, 0], rtol=3e-6, atol=0)


@pytest.mark.parametrize("E", [1, 5, 64, 65, 525])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_logits(E: int, dtype: torch.dtype) -> None:
    check((8 * torch.randn(4, E)).to(dtype))


def test_among_equals_the_lowest_id_wins() -> None:
    """In one chunk, across chunks, and everywhere."""
    logits = torch.randn(4, 300)
    logits[0, [7, 9]] = 20.0
    logits[1, [70, 200, 299]] = 20.0
    logits[2] = 3.0
    logits[3, [250, 6]] = 20.0  # the later column of a chunk's lane first
    check(logits)


def test_excluded_tokens_and_certain_ones() -> None:
    """-inf at single tokens, whole chunks, all but one; and sums that would overflow without the maximum."""
    logits = torch.randn(5, 200)
    logits[0, ::2] = float("-inf")
    logits[1, :130] = float("-inf")
    logits[2] = float("-inf")
    logits[2, 150] = -3.0
    logits[3] += 2000.0
    logits[4, 99] = 500.0
    check(logits)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
def test_what_has_no_probability_is_nan() -> None:
    logits = torch.randn(3, 100)
    logits[0, 50], logits[1] = float("nan"), float("-inf")
    x0, p = argmax_confidence(logits.to(DEVICE))
    assert p.isnan().tolist() == [True, True, False] and bool(((x0 >= 0) & (x0 < 100)).all())


def test_rows_may_lie_apart() -> None:
    check(torch.randn(6, 90)[::2])
    check(torch.randn(90, 3).T)
    assert [t.shape[0] for t in argmax_confidence(torch.randn(0, 9, device=DEVICE))] == [0, 0]

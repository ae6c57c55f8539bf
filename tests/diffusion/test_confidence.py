"""The likeliest token and its probability against argmax and softmax of the whole chunk."""

import pytest
import torch
from tiny_mask_predictor import TinyModel, prompts
from torch import Tensor

from dllmq.diffusion import SamplerConfig, confidence, generate
from dllmq.diffusion.confidence import argmax_confidence, confidence_of


def plain(logits: Tensor, never_trusted: list[int]) -> tuple[Tensor, Tensor]:
    x0 = logits.argmax(-1)
    logits = logits.clone()
    logits[:, never_trusted] = -torch.inf
    p = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
    return x0, p.gather(1, x0[:, None])[:, 0]


def random_logits(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(rows, columns, generator=g, dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("never_trusted", [[], [0, 130]])
@pytest.mark.parametrize("piece", [1, 500, 2**20])
@pytest.mark.parametrize("columns", [131, 384, 1280])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_pieces_have_the_bits_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, columns: int, piece: int, never_trusted: list[int]
) -> None:
    """bfloat16 logits have many equal maxima: the lowest id is taken in each way."""
    monkeypatch.setattr(confidence, "PIECE", piece)
    logits = random_logits(7, columns, dtype)
    logits[0, 130] = logits.max() + 1  # an id that is predicted and not trusted
    x0, p = argmax_confidence(logits, never_trusted)
    expected_x0, expected_p = plain(logits, never_trusted)
    assert torch.equal(x0, expected_x0) and torch.equal(p, expected_p)
    assert torch.equal(confidence_of(logits, x0, never_trusted), p)
    assert (p[0] == 0) == bool(never_trusted)


@pytest.mark.parametrize("columns", [100, 256])
def test_equal_logits_take_the_lowest_id(columns: int) -> None:
    logits = torch.full((3, columns), -1.0)
    logits[0, [7, 90, 99]] = logits[1, [99, 55]] = 2.0
    x0, p = argmax_confidence(logits, [])
    assert x0.tolist() == [7, 55, 0]
    assert p[2] == pytest.approx(1 / columns)


def test_infinite_and_missing_numbers_are_not_hidden() -> None:
    logits = torch.full((3, 256), -torch.inf)
    logits[0, 200] = 0.0
    logits[1, 3], logits[1, 140] = 1.0, torch.nan
    x0, p = argmax_confidence(logits, [])
    assert x0[0] == 200 and p[0] == 1
    assert p[1].isnan() and p[2].isnan()


@pytest.mark.parametrize("flags", [{}, {"confidence_eos_eot_inf": True}, {"logits_eos_inf": True}])
def test_noise_does_not_depend_on_the_pieces(monkeypatch: pytest.MonkeyPatch, flags: dict) -> None:
    config = SamplerConfig(12, 6, 12, temperature=0.9, **flags)

    def run(dtype: torch.dtype) -> Tensor:
        return generate(
            TinyModel(dtype), prompts(), config, generator=torch.Generator().manual_seed(2)
        ).tokens

    whole = [run(torch.float32), run(torch.float64)]
    monkeypatch.setattr(confidence, "PIECE", 50)
    assert torch.equal(run(torch.float32), whole[0]) and torch.equal(run(torch.float64), whole[1])


@pytest.mark.gpu
def test_the_kernel_agrees_on_cuda() -> None:
    logits = random_logits(64, 126464, torch.bfloat16)
    x0, p = argmax_confidence(logits.cuda(), [])
    expected_x0, expected_p = plain(logits, [])
    assert torch.equal(x0.cpu(), expected_x0)
    torch.testing.assert_close(p.cpu(), expected_p, rtol=1e-5, atol=0)

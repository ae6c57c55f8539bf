"""The two backends of a quantized model: its predictions, and its answers to the same problems.

A linear's outputs differ in their last bit (kernels/). That can move an input of a later linear over the
border between two of its codes, so predictions differ by more than rounding, but by little of what quantizing
changes; with full-precision inputs nothing is moved.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dllmq.config import EMBEDDED
from dllmq.diffusion import SamplerConfig
from dllmq.evaluation.settings import EvalSettings
from dllmq.evaluation.tasks import evaluate
from dllmq.kernels import cpu_int8
from dllmq.methods import RTN
from dllmq.mini.tasks import problems
from dllmq.models import load_model
from dllmq.models.tokenizer import load_tokenizer
from dllmq.numerics import Grid
from dllmq.pipeline import quantize, set_backend
from dllmq.recipe import Recipe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not cpu_int8.is_exact(), reason="this processor saturates int8 products"),
]
SETTINGS = EvalSettings(SamplerConfig(gen_length=48, steps=48, block_length=16), batch_size=12)
PROBLEMS = 12
WIDTHS = {
    "w8a8": (Grid(8), Grid(8)),
    "w4a8": (Grid(4), Grid(8)),
    "w4a4": (Grid(4), Grid(4)),
    "w4a4 in groups": (Grid(4, 32), Grid(4, 64)),
    "w2a4": (Grid(2), Grid(4)),
    "w4a16": (Grid(4), None),
}


def rounded(weights: Grid, inputs: Grid | None) -> Any:
    model = load_model(EMBEDDED)
    recipe = Recipe(RTN(), weights, inputs, num_states=1, sampler=SETTINGS.sampler)
    quantize(model, [torch.zeros(8, dtype=torch.long)], recipe)
    return model


def half_answered(mask_id: int) -> tuple[Tensor, Tensor]:
    """Solved problems of one length with about half of the solution's tokens masked [B, L], and where."""
    tokenizer, rng = load_tokenizer(EMBEDDED), torch.Generator().manual_seed(0)

    def tokens(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    solved = [
        (tokens(f"Question: {p['question']}\nAnswer:"), tokens(f" {p['answer']}"))
        for p in problems("mini_gsm", "dev", 200)
    ]
    lengths = Counter(len(question + answer) for question, answer in solved)
    rows = [(q, a) for q, a in solved if len(q + a) == max(lengths, key=lambda n: lengths[n])]
    ids = torch.tensor([q + a for q, a in rows])
    response = torch.arange(ids.shape[1]) >= torch.tensor([[len(q)] for q, _ in rows])
    masked = response & (torch.rand(ids.shape, generator=rng) < 0.5)
    return ids.masked_fill(masked, mask_id), masked


def divergence(p: Tensor, q: Tensor) -> float:
    """The mean of KL(p, q) over positions, in nats; logits [n, E]."""
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("width", WIDTHS)
@torch.inference_mode()
def test_predictions_of_fake_and_packed_agree(width: str) -> None:
    """Few tokens turn, and KL between them is a small part of what quantizing costs, or next to nothing."""
    plain, model = load_model(EMBEDDED), rounded(*WIDTHS[width])
    ids, masked = half_answered(model.config.mask_token_id)
    logits = {"fp": plain(ids)[masked]}
    for backend in ("fake", "packed"):
        assert set_backend(model, backend).startswith(backend)
        logits[backend] = model(ids)[masked]
    if width == "w4a16":
        torch.testing.assert_close(logits["packed"], logits["fake"], rtol=1e-4, atol=1e-3)
    turned = (logits["packed"].argmax(-1) != logits["fake"].argmax(-1)).float().mean()
    between, cost = divergence(logits["fake"], logits["packed"]), divergence(logits["fp"], logits["fake"])
    assert turned <= 0.02 and between <= max(cost / 4, 1e-4)


@pytest.mark.parametrize(
    "width",
    [
        pytest.param("w4a8", marks=pytest.mark.long),
        "w2a4",
        pytest.param("w4a4 in groups", marks=pytest.mark.long),
    ],
)
def test_answers_of_fake_and_packed_agree(width: str, tmp_path: Path) -> None:
    """Most are the same, token by token; experiments/backends has the scores of 200 problems."""
    model, answers = rounded(*WIDTHS[width]), {}
    for backend in ("fake", "packed"):
        set_backend(model, backend)
        result = evaluate(
            model, load_tokenizer(EMBEDDED), ["mini_gsm"], SETTINGS, PROBLEMS, work_dir=tmp_path
        )
        answers[backend] = [sample["response"] for sample in result.samples["mini_gsm"]]
    equal = sum(a == b for a, b in zip(answers["fake"], answers["packed"], strict=True))
    assert equal >= PROBLEMS - 2 and len(set(answers["fake"])) > PROBLEMS // 2

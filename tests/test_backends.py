"""Task scores of the two backends of a quantized model, on the same problems."""

from pathlib import Path

import pytest
import torch

from dllmq.config import EMBEDDED
from dllmq.diffusion import SamplerConfig
from dllmq.evaluation.settings import EvalSettings
from dllmq.evaluation.statistics import mcnemar
from dllmq.evaluation.tasks import evaluate
from dllmq.kernels import cpu_int8
from dllmq.methods import RTN
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
PROBLEMS = 24


@pytest.mark.parametrize(
    ("weights", "inputs"),
    [
        pytest.param(Grid(4), Grid(8), marks=pytest.mark.long, id="w4a8"),
        pytest.param(Grid(2), Grid(4), id="w2a4"),
        pytest.param(Grid(4, 32), Grid(4, 64), marks=pytest.mark.long, id="w4a4 in groups"),
    ],
)
def test_scores_of_fake_and_packed_agree(weights: Grid, inputs: Grid, tmp_path: Path) -> None:
    """Sums that differ in their last bit may turn a token, and an answer with it, either way: McNemar's test
    sees no side, and few problems turn."""
    model = load_model(EMBEDDED)
    recipe = Recipe(RTN(), weights, inputs, num_states=1, sampler=SETTINGS.sampler)
    quantize(model, [torch.zeros(8, dtype=torch.long)], recipe)
    scores = {}
    for backend in ("fake", "packed"):
        assert set_backend(model, backend).startswith(backend)
        result = evaluate(
            model, load_tokenizer(EMBEDDED), ["mini_gsm"], SETTINGS, PROBLEMS, work_dir=tmp_path
        )
        by_metric = result.per_problem["mini_gsm"]
        scores[backend] = next(column for name, column in by_metric.items() if "strict" in name)
    found = mcnemar(scores["packed"], scores["fake"])
    assert sum(scores["fake"]) > 0 and found.p > 0.05 and found.won + found.lost <= PROBLEMS // 8

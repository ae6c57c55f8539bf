"""The embedded model on a GPU: what it generates, quantizes and scores is what it does on the CPU."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from dllmq.bench.shapes import EMBEDDED  # a GPU machine may lack hydra, which dllmq.config needs
from dllmq.calibration.prompts import encode_prompts
from dllmq.diffusion import SamplerConfig, generate
from dllmq.methods import AWQ, GPTQ, RTN
from dllmq.mini.tasks import problems
from dllmq.models import load_model
from dllmq.models.graphs import graphed
from dllmq.models.tokenizer import load_tokenizer
from dllmq.numerics import Grid, fit
from dllmq.numerics import quantize as quantize_values
from dllmq.pipeline import quantize, quantized_linears, set_backend
from dllmq.recipe import Recipe

pytestmark = pytest.mark.gpu
SAMPLER = SamplerConfig(gen_length=32, steps=16, block_length=16)


@cache
def prompts() -> list[Tensor]:
    texts = [doc["question"] for doc in problems("mini_gsm", "dev", 8)]
    return encode_prompts(texts, load_tokenizer(EMBEDDED), chat_template=False)


def model_on(device: str, recipe: Recipe | None = None) -> Any:
    model = load_model(EMBEDDED, device=device)
    if recipe is not None:
        quantize(model, prompts()[:4], recipe)
    return model


def logits(model: Any) -> Tensor:
    """At a half-masked canvas of a prompt."""
    ids = prompts()[0].clone()
    ids[::2] = model.config.mask_token_id
    with torch.no_grad():
        return model(ids[None].to(model.device))[0].float().cpu()


def recipe(method: Any, weights: Grid, inputs: Grid | None) -> Recipe:
    return Recipe(method, weights, inputs, num_states=8, batch_size=4, sampler=SAMPLER)


def test_full_precision_generates_the_same_tokens() -> None:
    """In fp32 without TF32, which is torch's default for products."""
    models = [model_on(device) for device in ("cpu", "cuda")]
    torch.testing.assert_close(logits(models[1]), logits(models[0]), atol=1e-3, rtol=1e-3)
    tokens = [generate(m, prompts()[0][None].to(m.device), SAMPLER).tokens.cpu() for m in models]
    assert torch.equal(*tokens)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_scales_and_codes_are_the_same_bit_for_bit(bits: int, symmetric: bool) -> None:
    x = torch.randn(500, 384) * torch.rand(500, 1)
    for grid in (Grid(bits, -1, symmetric), Grid(bits, 64, symmetric)):
        here, there = fit(x, grid), fit(x.cuda(), grid)
        assert torch.equal(there.scale.cpu(), here.scale) and torch.equal(there.zero.cpu(), here.zero)
        assert torch.equal(quantize_values(x.cuda(), there, grid).cpu(), quantize_values(x, here, grid))


METHODS = [RTN(), GPTQ(), AWQ(n_grid=4)]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize(("weights", "inputs"), [(Grid(4), Grid(8)), (Grid(4, 64), None)], ids=str)
def test_quantized_models_agree(method: Any, weights: Grid, inputs: Grid | None) -> None:
    """Rounding moves codes at ties only; GPTQ's errors go other ways from there (0.84 of its
    codes were equal where only the order of its sums differed), and AWQ may choose another
    scale among equals."""
    here, there = (model_on(device, recipe(method, weights, inputs)) for device in ("cpu", "cuda"))
    pairs = list(zip(quantized_linears(here).values(), quantized_linears(there).values(), strict=True))
    assert len(pairs) == 42
    equal = [a.quantized.codes == b.quantized.codes.cpu() for a, b in pairs]
    share = float(torch.cat([e.flatten() for e in equal]).float().mean())
    least = {RTN: 0.999, GPTQ: 0.7, AWQ: 0.0}[type(method)]
    assert share > least, f"{share:.4f} of the codes are equal"
    p, q = (torch.log_softmax(logits(m), -1) for m in (here, there))
    divergence = float((p.exp() * (p - q)).sum(-1).mean())
    assert divergence < (1e-3 if isinstance(method, RTN) else 0.05), f"{divergence:.2e} nats apart"


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_graphs_of_a_packed_model_give_its_tokens(cache: str) -> None:
    """Integer products, norms fused with their quantization, and cached keys and values, all replayed."""
    pytest.importorskip("triton", reason="triton is not installed")
    model = model_on("cuda", recipe(RTN(), Grid(4), Grid(8)))
    set_backend(model, "packed")
    wrapped, sampler = graphed(model), replace(SAMPLER, cache=cache)
    prompt = prompts()[0][None].to(model.device)
    found, expected = (generate(m, prompt, sampler).tokens for m in (wrapped, model))
    assert float((found == expected).float().mean()) > 0.9  # a window of columns may round otherwise
    assert wrapped._recorded and not wrapped._failed


@pytest.mark.parametrize(
    ("weights", "inputs"),
    [(Grid(8), Grid(8)), (Grid(4), Grid(8)), (Grid(4), Grid(4)), (Grid(4, 64), Grid(8)), (Grid(4, 64), None)],
    ids=str,
)
def test_the_packed_backend_is_the_fake_one(weights: Grid, inputs: Grid | None) -> None:
    """The integer product on the GPU against dequantized values there: logits and generated text."""
    model = model_on("cuda", recipe(RTN(), weights, inputs))
    prompt = prompts()[0][None].to(model.device)
    fake = logits(model), generate(model, prompt, SAMPLER).tokens
    pytest.importorskip("triton", reason="triton is not installed")
    assert set_backend(model, "packed").startswith("packed")
    p, q = (torch.log_softmax(l, -1) for l in (fake[0], logits(model)))
    assert float((p.exp() * (p - q)).sum(-1).mean()) < 1e-2
    equal = generate(model, prompt, SAMPLER).tokens == fake[1]
    assert float(equal.float().mean()) > 0.9

"""What is to be true on the pretended CUDA device; test_pretended_cuda.py runs this in a process of its own.

Triton's confidence kernel is left out where many steps are denoised: interpreted, it takes most of the time.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pretend_cuda
import pytest
import torch
from pretend_cuda import counts
from sharded_checkpoint import save_sharded
from tiny_dream import tiny_dream
from tiny_llada import tiny_model, tiny_prompts
from torch import Tensor

from dllmq.calibration.states import RandomMask
from dllmq.diffusion import SamplerConfig, confidence, denoise
from dllmq.diffusion.sampler import apply
from dllmq.evaluation.batches import Batches
from dllmq.methods import AWQ, GPTQ, RTN
from dllmq.models import load_model
from dllmq.models.graphs import graphed
from dllmq.numerics import Grid
from dllmq.pipeline import quantize, quantized_linears, set_backend
from dllmq.recipe import AttentionGrids, Recipe
from dllmq.techniques.cgq import CGQ
from dllmq.techniques.iaaq import IAAQ
from dllmq.techniques.tmas import TMAS

CUDA = torch.device("cuda")


# ---- the device itself ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x + torch.ones(4),
        lambda x: x @ torch.ones(4, 4),
        lambda x: torch.cat([x, torch.ones(1, 4)]),
        lambda x: x.gather(1, torch.zeros(4, 1, dtype=torch.long)),
        lambda x: torch.ones(4)[torch.tensor([0], device=CUDA)],
        lambda x: torch.rand(4, device=CUDA, generator=torch.Generator()),
        lambda x: torch.nn.functional.embedding(torch.tensor([1]), x),
    ],
)
def test_devices_do_not_mix(mix: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(RuntimeError, match="device"):
        mix(torch.ones(4, 4, device=CUDA))


def test_what_cuda_takes_from_the_host_is_taken() -> None:
    x = torch.arange(4.0, device=CUDA)
    assert (x + torch.tensor(1.0)).tolist() == [1, 2, 3, 4]
    assert x[torch.tensor([3, 1])].tolist() == [3, 1]


def recorded(function: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


def test_a_recording_runs_nothing_and_a_replay_reads_what_is_there_then() -> None:
    x, total = torch.ones(3, device=CUDA), torch.zeros(3, device=CUDA)

    def step() -> Tensor:
        total.add_(x)
        return total * 2

    graph, y = recorded(step)
    assert total.tolist() == [0, 0, 0] and bool(y.isnan().all())
    x.fill_(5)
    graph.replay()
    assert total.tolist() == [5, 5, 5] and y.tolist() == [10, 10, 10]


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.cpu(),
        lambda x: torch.tensor([1.0, 2.0], device=CUDA),
        lambda x: torch.cuda.synchronize(),
        lambda x: torch.equal(x, x),
    ],
)
def test_a_recording_waits_for_nothing(wait: Callable[[Tensor], Any]) -> None:
    x = torch.ones(3, device=CUDA)
    with pytest.raises(RuntimeError, match="capturing"):
        recorded(lambda: wait(x))


def test_a_replay_does_not_find_memory_that_was_given_back() -> None:
    x = torch.ones(3, device=CUDA)
    graph, _ = recorded(lambda: x + 1)
    del x
    with pytest.raises(RuntimeError, match="given back"):
        graph.replay()


def test_graphs_of_a_pool_overwrite_each_other() -> None:
    x = torch.ones(3, device=CUDA)
    (first, y), (second, _) = recorded(lambda: x + 1), recorded(lambda: x + 2)
    first.replay()
    assert y.tolist() == [2, 2, 2]
    second.replay()
    assert bool(y.isnan().all())


# ---- generation -----------------------------------------------------------------------------------------


@pytest.fixture
def no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confidence, "_kernel", lambda: None)


def dream() -> Any:
    return tiny_dream(mask_token_id=38, eos_token_id=39)


def answers(model: Any, config: SamplerConfig, leaving: bool) -> tuple[list[list[int]], int]:
    """Of three prompts with pads on their left, and the forwards this took."""
    rows = 3
    ids = torch.randint(0, 37, (rows, 10), generator=torch.Generator().manual_seed(1)).to(model.device)
    mask = (torch.arange(10) >= torch.arange(rows)[:, None]).long().to(model.device)
    leave = (lambda x: (x == 39).any(1)) if leaving else None
    rng, before, tokens = torch.Generator().manual_seed(7), model.forwards, None
    for step in denoise(model, ids, config, mask, rng, leave=leave):
        after = apply(step)
        tokens = after if tokens is None else tokens.index_copy(0, step.rows, after)
    assert tokens is not None
    return tokens.tolist(), model.forwards - before


BLOCKS = SamplerConfig(12, 12, 4)
DREAM = SamplerConfig(12, 12, 12, remasking="entropy")
# Sampler, and how often a step waits for the device at most.
SAMPLERS = [
    *((tiny_model, replace(BLOCKS, **changes), most) for changes, most in (
        ({}, 7), ({"cfg_scale": 1.0}, 8), ({"temperature": 0.7}, 7), ({"remasking": "random"}, 7),
        ({"logits_eos_inf": True, "confidence_eos_eot_inf": True}, 7), ({"threshold": 0.3}, 8),
        ({"cache": "prefix"}, 5), ({"cache": "dual"}, 5), ({"cache": "dual", "threshold": 0.2}, 7),
    )),
    *((dream, replace(DREAM, **changes), most) for changes, most in (
        ({"remasking": "origin"}, 10), ({}, 8), ({"temperature": 0.5, "top_p": 0.9, "alg_temp": 0.3}, 8),
        ({"remasking": "maskgit_plus", "block_length": 4, "cache": "prefix", "threshold": 0.3}, 6),
        ({"remasking": "maskgit_plus", "block_length": 4, "cache": "dual", "threshold": 0.3}, 6),
    )),
]  # fmt: skip


@pytest.mark.parametrize(("make", "config", "most"), SAMPLERS)
@pytest.mark.parametrize("leaving", [False, True])
def test_tokens_are_those_of_the_cpu_and_the_host_waits_seldom(
    no_kernel: None, make: Callable[[], Any], config: SamplerConfig, most: int, leaving: bool
) -> None:
    """Step by step, and with steps recorded and replayed; both wait for the device equally seldom."""
    expected, model = answers(make(), config, leaving), make().to(CUDA)
    wrapped = graphed(model)
    for run in (model, wrapped, wrapped):
        before = counts()
        assert answers(run, config, leaving) == expected
        steps = expected[1]
        assert counts().syncs - before.syncs <= most * steps + 6, pretend_cuda.device.sync_log()
    assert wrapped._recorded and not wrapped._failed


def test_the_kernel_that_chooses_tokens_chooses_those_of_the_cpu() -> None:
    config = SamplerConfig(8, 8, 8)
    assert answers(tiny_model().to(CUDA), config, False) == answers(tiny_model(), config, False)


# ---- quantization ---------------------------------------------------------------------------------------

PV = AttentionGrids(Grid(4), Grid(4))
TOY = Recipe(
    RTN(), Grid(4), Grid(8), attention=PV, states=TMAS(), token_weight=CGQ(), value_scale=IAAQ,
    value_scale_name="iaaq", num_states=4, batch_size=4, sampler=SamplerConfig(8, 8, 8),
)  # fmt: skip


def quantized(device: str, recipe: Recipe) -> Any:
    model = tiny_model(d_model=64, mlp_hidden_size=96).to(device)
    quantize(model, tiny_prompts(), recipe)
    return model


def logits(model: Any) -> Tensor:
    ids = torch.randint(0, 37, (2, 12), generator=torch.Generator().manual_seed(2)).to(model.device)
    with torch.no_grad():
        return model(ids).cpu()


@pytest.mark.parametrize("method", [RTN(), GPTQ(), GPTQ(act_order=True), AWQ(n_grid=4)], ids=str)
@pytest.mark.parametrize("weights", [Grid(4), Grid(4, 32)], ids=str)
def test_codes_are_those_of_the_cpu(no_kernel: None, method: Any, weights: Grid) -> None:
    """GPTQ's kernel sums errors in another order, which moves codes at ties, and all that follows from them:
    the later a block, the more."""
    recipe = replace(TOY, method=method, weights=weights)
    here, there = (quantized(device, recipe) for device in ("cpu", "cuda"))
    pairs = zip(quantized_linears(here).values(), quantized_linears(there).values(), strict=True)
    equal = [a.quantized.codes == b.quantized.codes.cpu() for a, b in pairs]
    share = float(torch.cat([e.flatten() for e in equal]).float().mean())
    assert share == 1 if not isinstance(method, GPTQ) else share > 0.7, f"{share:.4f}"


@pytest.mark.parametrize(
    ("weights", "inputs"),
    [(Grid(8), Grid(8)), (Grid(4), Grid(8)), (Grid(4), Grid(4)), (Grid(4, 32), Grid(8)), (Grid(4, 32), None)],
    ids=str,
)
def test_packed_linears_are_the_fake_ones_also_when_they_are_replayed(
    weights: Grid, inputs: Grid | None
) -> None:
    model = quantized("cuda", replace(TOY, weights=weights, inputs=inputs, states=RandomMask()))
    fake = logits(model)
    assert set_backend(model, "packed") == "packed:triton"
    packed = logits(model)
    torch.testing.assert_close(packed, fake, atol=0.1, rtol=0.05)
    wrapped = graphed(model)
    for _ in range(3):
        torch.testing.assert_close(logits(wrapped), packed, atol=1e-5, rtol=1e-5)
    assert len(wrapped._recorded) == 1 and not wrapped._failed


@pytest.mark.parametrize("kind", ["llada", "dream"])
def test_blocks_stream_from_the_disk_to_the_device(no_kernel: None, tmp_path: Path, kind: str) -> None:
    folder = save_sharded(tmp_path / "model", kind)
    recipe = replace(TOY, sampler=DREAM if kind == "dream" else BLOCKS)
    found = []
    for device, stream in (("cpu", False), ("cuda", True)):
        model = load_model(folder, device=device, stream=stream)
        plain = logits(model)
        quantize(model, tiny_prompts(), recipe)
        found.append((plain, logits(model)))
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-4)


# ---- memory runs out ------------------------------------------------------------------------------------


def test_a_batch_that_does_not_fit_is_halved(no_kernel: None) -> None:
    """And recordings that ran out of memory leave a model that goes on."""
    model = graphed(tiny_model().to(CUDA))
    batches = Batches([[1, 2, 3]] * 4, 8, 4)
    sizes, failures = [], 2
    for batch in batches:
        prompts = torch.tensor([[1, 2, 3]] * len(batch.rows), device=CUDA)
        config = SamplerConfig(8, 8, 8)
        try:
            if failures:
                failures -= 1
                with pretend_cuda.memory_runs_out_after(40):
                    list(denoise(model, prompts, config))
            list(denoise(model, prompts, config))
            sizes.append(len(batch.rows))
        except torch.OutOfMemoryError as error:
            model.forget()
            batches.halve(error)
    assert sizes == [1, 1, 1, 1] and not model._failed

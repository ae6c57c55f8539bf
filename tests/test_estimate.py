"""What a dry run says a run will take: arithmetic on the config, over one measured number."""

from pathlib import Path

import pytest
import torch
from composed import composed
from tiny_checkpoint import save_checkpoint
from tiny_llada import tiny_model, tiny_prompts

from dllmq import estimate as module
from dllmq.config import Plan, check_cell
from dllmq.diffusion import SamplerConfig, generate
from dllmq.estimate import denoised_columns, duration, estimate, seconds_per_token, told
from dllmq.models.loading import read_config, skeleton
from dllmq.models.memory import in_bytes

SIZES = [
    *("eval.limit=10", "eval.fidelity_prompts=3", "eval.fidelity_states=6"),
    *("calibration.num_prompts=4", "calibration.num_states=8"),
    *("sampler.gen_length=16", "sampler.steps=8", "sampler.block_length=16"),
]


@pytest.fixture(autouse=True)
def one_second_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "seconds_per_token", lambda *_: 1.0)
    monkeypatch.setattr(module, "_MEASURED", {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("estimate") / "llada", max_sequence_length=512)


def plan(folder: Path, *overrides: str) -> Plan:
    words = [f"model.path={folder}", "device=cpu", *SIZES, *overrides]
    return check_cell(
        composed(*words, *([] if any(w.startswith("tasks=") for w in words) else ["tasks=mini_gsm"]))
    )


def test_every_stage_counts_the_tokens_that_go_through_the_blocks(folder: Path) -> None:
    found = estimate(plan(folder, "method=rtn", "tmas=false"))
    config = read_config(folder)[0]
    kv = config.kv_heads * config.head_dim
    block = config.d_model * (2 * config.d_model + 2 * kv + 3 * config.mlp_hidden_size)
    width = 34 + 16  # prompt and answer
    head = 16 / 2 * config.d_model * config.embedding_size / block
    a_prompt = 8 * (width * config.n_layers + head)
    assert found.shared["task mini_gsm"] == pytest.approx(10 * a_prompt)
    assert found.shared["calibration states"] == pytest.approx(4 * a_prompt)
    assert found.shared["fidelity's reference"] == pytest.approx(3 * a_prompt + 6 * width * config.n_layers)
    assert found.cell == {
        "quantize": pytest.approx(8 * width * config.n_layers),
        "task mini_gsm": found.shared["task mini_gsm"],
        "fidelity": found.shared["fidelity's reference"],
    }


@pytest.mark.parametrize(
    ("more", "stage", "factor"),
    [
        ("sampler.cfg_scale=1.5", "task mini_gsm", 2),
        ("eval.limit=30", "task mini_gsm", 3),
        ("calibration.num_prompts=8", "calibration states", 2),
    ],
)
def test_what_costs_more_is_estimated_so(folder: Path, more: str, stage: str, factor: int) -> None:
    plain = estimate(plan(folder, "method=rtn")).shared[stage]
    assert estimate(plan(folder, "method=rtn", more)).shared[stage] == pytest.approx(factor * plain)


SAMPLER = ("sampler.gen_length=16", "sampler.steps=8", "sampler.block_length=4")


@pytest.mark.parametrize(
    ("approximation", "columns", "forwards"),
    [
        ([], 8 * 50, 8),
        (["cache=dual"], 4 * 50 + 4 * 4, 8),  # two steps a block: the canvas, then the block
        (["cache=prefix"], 4 * 50 + 16 + 12 + 8 + 4, 8),
        (["threshold=0.9"], 16 * 50, 16),  # one token a step at most, whatever the steps
        (["cache=dual", "threshold=0.9"], 4 * 50 + 3 * 4 * 4, 16),
        (["cache=prefix", "threshold=0.9"], 4 * 50 + 3 * (16 + 12 + 8 + 4), 16),
    ],
)
def test_a_forward_with_cached_context_costs_the_columns_it_computes(
    folder: Path, approximation: list[str], columns: int, forwards: int
) -> None:
    """An answer's columns counted by hand; full precision's own answers are exact."""
    words = ("method=rtn", *SAMPLER, *(f"sampler.{key}" for key in approximation))
    found, exact = estimate(plan(folder, *words)), estimate(plan(folder, "method=rtn", *SAMPLER))
    config = read_config(folder)[0]
    block = config.d_model * (2 * config.d_model + 2 * config.kv_heads * config.head_dim)
    block += 3 * config.d_model * config.mlp_hidden_size
    head = forwards * 4 / 2 * config.d_model * config.embedding_size / block
    assert found.cell["task mini_gsm"] == pytest.approx(10 * (columns * config.n_layers + head))
    assert found.shared == exact.shared and found.cell["fidelity"] == exact.cell["fidelity"]
    assert bool(found.cached) == ("cache" in " ".join(approximation))


@pytest.mark.parametrize("threshold", [None, 0.999])
@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize(("steps", "block_length"), [(8, 4), (16, 16), (32, 4), (4, 8)])
def test_columns_and_forwards_are_those_the_sampler_computes(
    cache: str, threshold: float | None, steps: int, block_length: int
) -> None:
    """By a model that is never sure, so that a threshold saves nothing."""
    model, seen = tiny_model(), []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    config = SamplerConfig(16, steps, block_length, cache=cache, threshold=threshold)
    generate(model, tiny_prompts((4,))[0][None], config)
    assert denoised_columns(4, config) == (sum(seen), len(seen))


def test_what_is_not_known_is_said(folder: Path) -> None:
    words = ("method=rtn", "sampler.cache=dual", "sampler.threshold=0.9", *SAMPLER)
    lines = "\n".join(told(estimate(plan(folder, *words))))
    assert "threshold=0.9 takes at most 16 forwards an answer, at least 4; how many it saves is not" in lines
    assert (
        "with cache=dual 4 of an answer's forwards are of all 50 columns, the others of the block's 4"
        in lines
    )
    assert "prompts of 34 tokens" in lines and "answers are of full length" in lines
    config = read_config(folder)[0]
    kept = 10 * 50 * (2 * config.n_layers * config.kv_heads * config.head_dim + config.d_model) * 2
    assert f"KV cache     at most about {in_bytes(kept)} (10 prompts of mini_gsm at once, 50 columns" in lines
    plain = "\n".join(told(estimate(plan(folder, "method=rtn"))))
    assert "KV cache" not in plain and "threshold" not in plain and "cache=" not in plain


def test_full_precision_decoded_approximately_has_a_cell_of_its_own(folder: Path) -> None:
    """Beside the exact reference; nothing is quantized, calibrated or compared."""
    found = estimate(plan(folder, "method=fp", *SAMPLER, "sampler.cache=dual"))
    assert list(found.cell) == list(found.shared) == ["task mini_gsm"]
    assert found.cell["task mini_gsm"] < found.shared["task mini_gsm"]


def test_solvers_cost_more_than_rounding(folder: Path) -> None:
    cost = {m: estimate(plan(folder, f"method={m}")).cell["quantize"] for m in ("rtn", "gptq", "awq")}
    assert cost["rtn"] < cost["gptq"] < cost["awq"]


def test_full_precision_has_no_cell_of_its_own(folder: Path) -> None:
    found = estimate(plan(folder, "method=fp"))
    assert found.cell == {} and list(found.shared) == ["task mini_gsm"]
    assert not any("this cell" in line for line in told(found))


def test_fidelity_that_is_left_out_costs_nothing(folder: Path) -> None:
    found = estimate(plan(folder, "method=rtn", "eval.fidelity_states=0"))
    assert list(found.shared) == ["task mini_gsm", "calibration states"]
    assert list(found.cell) == ["quantize", "task mini_gsm"]


def test_likelihoods_count_their_samples(folder: Path) -> None:
    few, many = (
        estimate(plan(folder, "tasks=mini_choice", f"eval.mc_num={n}", "eval.mc_batch_size=1")).shared
        for n in (2, 8)
    )
    assert many["task mini_choice"] == pytest.approx(4 * few["task mini_choice"])


def test_the_measured_number_is_that_of_a_block(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    model = skeleton(*read_config(folder))
    found = seconds_per_token(model, "cpu", torch.float32)
    assert 1e-9 < found < 1e-2
    assert model.blocks[1].attn_norm.weight.is_meta  # nothing but the first block was made


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3.14, "3.1 s"), (98.0, "98 s"), (120.0, "2.0 min"), (5940.0, "1.6 h"), (360000.0, "4.2 d")],
)
def test_durations_are_read_at_a_glance(seconds: float, text: str) -> None:
    assert duration(seconds) == text

"""What a dry run says a run will take: arithmetic on the config, over one measured number."""

from pathlib import Path

import pytest
import torch
from composed import composed
from tiny_checkpoint import save_checkpoint

from dllmq import estimate as module
from dllmq.config import Plan, check_cell
from dllmq.estimate import duration, estimate, seconds_per_token, told
from dllmq.models.loading import read_config, skeleton

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
    width = 96 + 16  # prompt and answer
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

"""Every section runs at toy sizes, and its checks of equality can fail."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dllmq.bench import evaluate, generate, linear, machine, memory, quantize
from dllmq.bench.rows import Row, Sheet
from dllmq.bench.shapes import Setup, Work, build, check_room, parameters, sampler_of, work
from dllmq.bench.timing import Measured
from dllmq.diffusion import Generation, SamplerConfig
from dllmq.evaluation.settings import EvalSettings
from dllmq.models.graphs import GraphedModel
from dllmq.models.linear import QuantLinear
from dllmq.models.llada import LLaDA, LLaDAConfig
from dllmq.pipeline import quantized_linears

CPU = torch.device("cpu")
QUICK = Setup("tiny", CPU, torch.float32, repeats=1, quick=True)


def rows_of(section: Any, setup: Setup = QUICK) -> tuple[dict[str, Row], list[str]]:
    sheet = Sheet()
    section.measure(setup, sheet)
    return {row.key: row for row in sheet.rows}, sheet.left_out


# ------------------------------------------------------------------ generate


def test_generate_finds_equal_tokens_and_counts_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "WIDTHS", ("w8a8",))
    rows, left_out = rows_of(generate)
    exact = rows["generate.exact"]
    assert exact.equal is True and exact.share == 1.0
    assert exact.numbers == {"forwards": 8, "baseline_forwards": 8}
    assert "batch 2, prompts of 11 - 12, 8 tokens in 8 steps" in exact.shape
    assert rows["generate.w8a8"].share is None  # tokens of random weights mean nothing
    assert any(line.startswith("Thresholds are not measured on random weights") for line in left_out)
    assert not any("threshold" in key for key in rows)


def test_no_recording_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA graphs are recorded before the first round; here a recording is a function called again."""
    made = []

    def capture(function: Any) -> Any:
        made.append(function)
        output = function()
        return output, lambda: output.copy_(function())

    def timing(runs: Any, repeats: int, device: Any) -> Any:
        before = len(made)
        found = {name: Measured((1.0,), run()) for name, run in runs.items()}
        assert len(made) == before > 0
        return found

    monkeypatch.setattr(generate, "as_evaluated", lambda model: GraphedModel(model, capture))
    monkeypatch.setattr(generate, "interleaved", timing)
    sheet, model = Sheet(), LLaDA(LLaDAConfig(d_model=16, n_layers=1, n_heads=2, mlp_hidden_size=16,
                                              vocab_size=20, mask_token_id=19, eos_token_id=18))  # fmt: skip
    model.requires_grad_(False).init_weights(torch.Generator().manual_seed(0))
    job = Work(torch.arange(6)[None], None, SamplerConfig(gen_length=4, steps=4, block_length=2))
    generate.loops(QUICK, sheet, model, job)
    generate.widths(QUICK, sheet, (model, model), job, "w8a8 fake")
    assert {"generate.exact", "generate.eager", "generate.prefix", "generate.dual"} < {
        row.key for row in sheet.rows
    }


def test_generate_claims_nothing_in_bfloat16() -> None:
    a = Generation(torch.zeros(2, 20, dtype=torch.long), 8)
    pair = Measured((1.0,), a), Measured((1.0,), replace(a, tokens=a.tokens + 1))
    job = work(QUICK, 2)
    assert generate.exact_row(replace(QUICK, dtype=torch.bfloat16), pair, job).equal is None
    assert generate.exact_row(QUICK, pair, job).equal is False


def test_one_token_that_differs_fails_the_claim() -> None:
    job = work(QUICK, 2)
    tokens = torch.cat([job.prompts, torch.zeros(2, 8, dtype=torch.long)], dim=1)
    other = tokens.clone()
    other[1, -1] = 1
    pair = Measured((1.0,), Generation(tokens, 8)), Measured((1.0,), Generation(other, 8))
    row = generate.exact_row(QUICK, pair, job)
    assert row.equal is False and row.share == 15 / 16


def test_caches_and_thresholds_are_rows_where_the_sampler_has_them() -> None:
    """One row or one sentence for each, whatever this version has."""
    setup, sheet = replace(QUICK, shape="mini"), Sheet()
    found = generate.variants(setup, sampler_of(setup), sheet)
    assert len(found) + len(sheet.left_out) == 4
    for variant in found:
        assert (variant.sampler.cache, variant.sampler.threshold) != ("none", None)


# ------------------------------------------------------------------ quantize


def test_quantize_finds_equal_codes_and_one_block_of_everything() -> None:
    rows, _ = rows_of(quantize, replace(QUICK, dtype=torch.bfloat16))
    for key in (
        "loop",
        "factor",
        "gptq",
        "gram",
        "gram_group",
        "awq_qkv",
        "awq_attn_out",
        "awq_gate_up",
        "awq_down",
    ):
        assert rows[f"quantize.{key}"].equal is True, key
    assert rows["quantize.gptq"].share is not None and rows["quantize.gptq"].share >= 0.99
    end = rows["quantize.gptq_blocks"]
    assert end.ratio is None and end.numbers["blocks"] == 1 and 0 < end.numbers["quantize_s"] < end.ours_value
    assert "TMAS, CGQ, IA-AQ" in end.what and end.repeats == 1


def test_other_codes_fail_the_claim() -> None:
    W, X = quantize.gptq_problem(16, CPU)
    H = X.T @ X
    codes = quantize.gptq.gptq_solve(W, H, quantize.GRID).codes
    rounded = codes.clone()
    rounded[0] ^= 1

    def judged(other: Tensor) -> Row:
        pair = Measured((1.0,), codes), Measured((1.0,), other)
        return quantize.codes_row("k", "w", pair, W=W, H=H, size=16)

    assert judged(codes).equal is True
    assert judged(rounded).equal is False and judged(rounded).share == 15 / 16


def test_another_factor_fails_the_claim() -> None:
    U = torch.eye(4)
    assert quantize.factor_row(Measured((1.0,), U), Measured((1.0,), U), 4).equal is True
    assert quantize.factor_row(Measured((1.0,), U), Measured((1.0,), 1.01 * U), 4).equal is False


def test_everything_is_on() -> None:
    recipe = quantize.everything_on(quantize.METHODS["gptq"], replace(QUICK, quick=False))
    assert recipe.inert() == [] and recipe.states.name == "tmas" and recipe.value_scale_name == "iaaq"
    assert recipe.weights == recipe.inputs == recipe.attention.P == recipe.attention.V == quantize.GRID


# ------------------------------------------------------------------ linear


def test_linears_are_checked_against_their_definition() -> None:
    rows, _ = rows_of(linear)
    assert {"linear.w8a8", "linear.w4a8", "linear.w4a4"} <= set(rows)
    assert all(row.equal is True and row.numbers["fake_s"] > 0 for row in rows.values())
    assert rows["linear.w8a8"].shape == "8 x 64 -> 96"


@torch.no_grad()
@pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
def test_a_wrong_output_fails_the_claim(bits: str) -> None:
    model, x = linear.quant_linear(torch.randn(24, 32), bits, CPU), torch.randn(4, 32).bfloat16()
    y = model(x)
    assert linear.is_exact(model, x, y)
    y[1, 5] += 0.02 * y.abs().max()
    assert not linear.is_exact(model, x, y)


# ------------------------------------------------------------------ evaluate


@pytest.mark.slow
def test_evaluate_finds_equal_answers() -> None:
    rows, left_out = rows_of(evaluate, replace(QUICK, shape="mini"))
    assert set(rows) == {"evaluate.single", "evaluate.batch"} and not left_out
    assert all(row.equal is True and row.share == 1.0 for row in rows.values())
    assert rows["evaluate.single"].numbers["score"] == rows["evaluate.single"].numbers["baseline_score"]


def test_evaluate_is_of_the_embedded_model_only() -> None:
    rows, left_out = rows_of(evaluate)
    assert not rows and "embedded model" in left_out[0]


def test_plain_answers_do_not_depend_on_the_batch() -> None:
    model, sampler = build("tiny", CPU, torch.float32), sampler_of(QUICK)
    prompts = [[3, 4, 5], [6, 7], [8, 9, 10, 11]]
    settings = EvalSettings(sampler)
    one = evaluate.answer_tokens(model, prompts, settings, 1, [510])
    assert one == evaluate.answer_tokens(model, prompts, settings, 3, [510])
    assert all(len(tokens) == 8 and 511 not in tokens for tokens in one)


def test_answers_that_differ_are_told() -> None:
    assert evaluate.share_of(["a", "b"], ["a", "c"]) == 0.5


# ------------------------------------------------------------------ memory


def test_memory_of_packed_codes_is_counted_in_this_process() -> None:
    setup = replace(QUICK, dtype=torch.bfloat16)
    full, small = memory.measured(setup, "bfloat16"), memory.measured(setup, "w4a16 compact")
    assert full["held_bytes"] == 2 * parameters("tiny") == full["stored_bytes"]
    assert full["other_bytes"] == small["other_bytes"] == 2 * (2 * 512 * 64 + 64)
    assert small["held_bytes"] - small["stored_bytes"] < 0.05 * small["stored_bytes"]
    sheet = Sheet()
    memory.add_rows(sheet, ("bfloat16", "w4a16 compact"), full, small)
    row = sheet.rows[0]
    assert row.key == "memory.weights_w4a16 compact" and row.ours.startswith("w4a16 compact ")
    assert row.ratio == full["held_bytes"] / small["held_bytes"]
    assert 3 < row.numbers["without_embedding_and_head"] <= 4


def test_w4a4_is_measured_with_four_bits_a_weight() -> None:
    """On a CPU the fast backend of both W4 formats keeps a byte a weight; compact ones do not."""
    assert {"w4a8", "w4a4", "w4a8 compact", "w4a4 compact"} <= set(memory.FORMATS)
    setup, blocks = replace(QUICK, dtype=torch.bfloat16), []
    for name in ("bfloat16", "w4a4", "w4a4 compact"):
        found = memory.measured(setup, name)
        blocks.append(found["held_bytes"] - found["other_bytes"])
    assert 3 < blocks[0] / blocks[2] <= 4 and 1 < blocks[0] / blocks[1] < 2


def test_a_format_without_a_backend_is_left_out() -> None:
    sheet = Sheet()
    memory.add_rows(sheet, ("bfloat16", "w4a16"), {}, {"left_out": "why"})
    assert sheet.left_out == ["why"] and not sheet.rows


@pytest.mark.slow
def test_a_process_that_fails_is_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"memory of tiny as w9a9 failed: .*w9a9"):
        memory.in_process(replace(QUICK, dtype=torch.bfloat16), "w9a9")


def test_held_bytes_count_every_storage_once() -> None:
    shared = torch.zeros(10)
    module = nn.Linear(3, 2, bias=False)
    assert machine.held_bytes(module) == 24
    module.cache = {"a": (shared, shared[2:]), "b": [shared.view(2, 5)]}
    assert machine.held_bytes(module) == 24 + 40


def test_held_bytes_reach_a_quantized_linears_codes() -> None:
    model = build("tiny", CPU, torch.bfloat16)
    generate.quantize_in_place(model, "w8a8")
    codes = sum(m.quantized.codes.numel() for m in quantized_linears(model).values())
    assert isinstance(model.blocks[0].q_proj, QuantLinear)
    assert machine.held_bytes(model) >= 2 * parameters("tiny") - 2 * codes + codes


# ------------------------------------------------------------------ shapes


def test_sizes_of_the_shapes() -> None:
    """LLaDA-8B has 8,015,581,184 parameters."""
    assert parameters("llada_8b_shape") == 8_015_581_184
    assert parameters("llada_1b_shape") == 1_486_972_928
    assert parameters("mini") == sum(p.numel() for p in build("mini", CPU, torch.float32).parameters())


def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"on a CUDA device.*--shape llada_1b_shape"):
        check_room("llada_8b_shape", CPU, torch.bfloat16)
    monkeypatch.setattr("dllmq.bench.shapes.free_memory", lambda device: 4_000_000_000)
    with pytest.raises(ValueError, match=r"needs about 6.5 GB .* cpu has 4.0 GB free"):
        check_room("llada_1b_shape", CPU, torch.bfloat16)
    check_room("mini", CPU, torch.float32)


def test_random_models_repeat_and_have_their_dtype() -> None:
    a, b = (build("tiny", CPU, torch.bfloat16, blocks=1) for _ in range(2))
    assert len(a.blocks) == 1 and a.dtype == torch.bfloat16
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert all(bool(p.isfinite().all()) for p in a.parameters())


def test_prompts_are_padded_on_the_left() -> None:
    job = work(replace(QUICK, shape="mini"), 2)
    assert job.mask is not None
    assert bool((job.mask[:, 1:] >= job.mask[:, :-1]).all()) and job.mask[:, -1].tolist() == [1, 1]
    assert job.prompts.shape == job.mask.shape and int(job.mask.sum()) < job.mask.numel()


# ------------------------------------------------------------------ the order on a GPU


def test_on_a_gpu_rows_with_targets_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time may run out there: exact generation at batch 1, then the packed widths, at batch 16 first."""
    order: list[str] = []
    named = ("solver", "whole_block", "gram", "awq_grid")
    for name in named:
        monkeypatch.setattr(quantize, name, lambda *args, name=name: order.append(name))
    cuda = replace(QUICK, device=torch.device("cuda"))
    quantize.measure(cuda, Sheet())
    quantize.measure(QUICK, Sheet())
    assert order == [*named, "solver", "gram", "awq_grid", "whole_block"]

    jobs: list[str] = []
    for name, made in (("check_room", None), ("build", nn.Module()), ("quantize_in_place", None)):
        monkeypatch.setattr(generate, name, lambda *args, made=made: made)
    monkeypatch.setattr(generate, "packs", lambda *args: "packed")
    monkeypatch.setattr(generate, "work", lambda setup, batch: batch)
    monkeypatch.setattr(generate, "loops", lambda setup, sheet, model, job: jobs.append(f"loops {job}"))
    monkeypatch.setattr(
        generate, "widths", lambda setup, sheet, models, job, name: jobs.append(f"{name[:4]} {job}")
    )
    generate.measure(replace(cuda, quick=False), Sheet())
    assert jobs[:4] == ["loops 1", "w4a8 16", "w4a8 1", "w4a4 16"] and jobs[-1] == "loops 16"
    jobs.clear()
    generate.measure(replace(QUICK, quick=False), Sheet())
    assert jobs[:4] == ["loops 1", "loops 8", "w8a8 1", "w8a8 8"]

"""AWQ against the searches written out as loops, and what must hold for its results."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_llada import tiny_model
from torch import Tensor

from dllmq.calibration.stats import GroupInput, GroupStats, collect
from dllmq.methods import AWQ, GPTQ, Method, awq
from dllmq.methods.awq import (
    clip_range,
    clip_tokens,
    module_loss,
    scale_for,
    search_clip,
    search_ratio,
    search_scale,
)
from dllmq.methods.gptq import gptq_solve
from dllmq.methods.rtn import round_to_nearest, rtn
from dllmq.models.base import LinearGroup, linear_group
from dllmq.numerics import Grid, fake_quant

I = 16
GRIDS = [Grid(3), Grid(3, 4), Grid(2, 8, symmetric=True), Grid(4, 0)]


def problem(seed: int = 0, tokens: int = 120, rows: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """W, inputs X with two salient channels, and token weights c."""
    rng = torch.Generator().manual_seed(seed)
    X = torch.randn(tokens, I, generator=rng) * torch.rand(I, generator=rng).add(0.2)
    X[:, [3, 9]] *= 20
    return torch.randn(rows, I, generator=rng), X, torch.rand(tokens, generator=rng).add(0.1)


def layer_error(D: Tensor, X: Tensor, c: Tensor | None = None) -> float:
    """sum_j c_j ||D x_j||^2 in double precision, token by token."""
    weights = torch.ones(len(X)) if c is None else c
    return sum(
        float(w) * float((D.double() @ x.double()).square().sum()) for x, w in zip(X, weights, strict=True)
    )


def textbook_scale(
    X: Tensor, c: Tensor | None, loss: Callable[[Tensor], float]
) -> tuple[float, Tensor, list[float]]:
    weights = torch.ones(len(X)) if c is None else c
    mean = sum(w * x.abs() for x, w in zip(X, weights, strict=True)) / weights.sum()
    best, losses = None, []
    for i in range(20):
        s = torch.tensor([max(float(m) ** (i / 20), 1e-4) for m in mean])
        s = s / (s.max() * s.min()) ** 0.5
        losses.append(loss(s))
        if best is None or losses[-1] < best[2]:
            best = (i / 20, s, losses[-1])
    assert best is not None
    return best[0], best[1], losses


def textbook_clip(W: Tensor, X: Tensor, c: Tensor, grid: Grid) -> Tensor:
    """Best clipping ratio of each output channel and group, one at a time."""
    width = grid.group_size if grid.group_size > 0 else I
    best = torch.empty(len(W), I // width)
    for o in range(len(W)):
        for n in range(I // width):
            w, x = W[o : o + 1, n * width : (n + 1) * width], X[:, n * width : (n + 1) * width]
            errors = []
            for i in range(10):
                limit = float(w.abs().max()) * (1 - i / 20)
                clipped = fake_quant(w.clamp(-limit, limit), Grid(grid.bits, -1, grid.symmetric))
                errors.append(layer_error(clipped - w, x, c))
            best[o, n] = 1 - errors.index(min(errors)) / 20
    return best


# search_scale -------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_search_scale_equals_the_textbook(grid: Grid, weighted: bool) -> None:
    W, X, weights = problem()
    c = weights if weighted else None
    found = search_scale(W, X, grid, c)
    ratio, scale, losses = textbook_scale(X, c, lambda s: layer_error(fake_quant(W * s, grid) / s - W, X, c))
    assert found.ratio == ratio and ratio > 0
    torch.testing.assert_close(found.scale, scale)
    torch.testing.assert_close(found.losses, torch.tensor(losses), rtol=1e-4, atol=0)


def test_loss_replaces_the_layers_own() -> None:
    W, X, _ = problem()
    seen: list[Tensor] = []

    def loss(s: Tensor) -> float:
        seen.append(s)
        return abs(len(seen) - 8)

    found = search_scale(W, X, Grid(3), loss=loss)
    assert found.ratio == 7 / 20 and torch.equal(found.scale, seen[7])
    assert found.losses.tolist() == [float(abs(n - 8)) for n in range(1, 21)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_loss_at_a_linear_output_equals_running_it(grid: Grid) -> None:
    """From the Gram matrix of the tokens with a weight, or by running the linears on every token: the losses
    agree for every exponent and both choose the same."""

    def outputs(weights: dict[str, Tensor], X: Tensor, valid: Tensor | None) -> Tensor:
        return torch.cat([F.linear(X, W) for W in weights.values()], dim=-1)

    run = replace(group(), inspect=outputs)
    searched = [
        search_ratio(stats(batches()).mean_abs, module_loss(linears, batches(), grid))
        for linears in (run, replace(run, inspect=_never, inspects_itself=True))
    ]
    torch.testing.assert_close(searched[0].losses, searched[1].losses, rtol=1e-4, atol=0)
    assert searched[0].ratio == searched[1].ratio > 0


def test_a_models_groups_say_whose_output_is_linear() -> None:
    """Attention output and down-projection are judged at their own outputs, as running the block shows."""
    model, X = tiny_model(), {32: torch.randn(4, 20, 32), 48: torch.randn(4, 20, 48)}
    linear = []
    for row in model.topology.groups:
        group = linear_group(model, 0, row)
        inputs = X[next(iter(group.weights.values())).shape[1]]
        batch = GroupInput(inputs, torch.rand(4, 20), torch.ones(4, 20, dtype=torch.bool))
        if group.inspects_itself:
            linear.append(row.name)
            s = torch.rand(inputs.shape[-1]) + 0.5
            fast, run = (
                module_loss(g, [batch], Grid(3))(s) for g in (group, replace(group, inspects_itself=False))
            )
            assert fast == pytest.approx(run, rel=1e-4) and fast > 0
    assert linear == ["attn_out", "down"]


def test_few_tokens_are_run() -> None:
    """With fewer tokens than channels the Gram matrix would be the longer way: the outputs are looked at."""
    calls = []

    def outputs(weights: dict[str, Tensor], X: Tensor, valid: Tensor | None) -> Tensor:
        calls.append(len(X))
        return F.linear(X, weights["up"])

    _, X, c = problem(tokens=10)
    batch = GroupInput(X[None], c[None], torch.ones(1, 10, dtype=torch.bool))
    loss = module_loss(replace(group(), inspect=outputs, inspects_itself=True), [batch], Grid(3))
    D = rtn(group().weights["up"], Grid(3)) - group().weights["up"]
    assert loss(torch.ones(I)) == pytest.approx(layer_error(D, X, c), rel=1e-4) and calls == [1, 1]


def _never(*_: object) -> Tensor:
    raise AssertionError("a linear output needs no run")


def test_unit_weights_are_no_weights_bit_for_bit() -> None:
    W, X, _ = problem()
    plain, ones = search_scale(W, X, Grid(3)), search_scale(W, X, Grid(3), torch.ones(len(X)))
    assert torch.equal(plain.losses, ones.losses) and torch.equal(plain.scale, ones.scale)
    plain_clip, ones_clip = search_clip(W, X, Grid(3)), search_clip(W, X, Grid(3), torch.ones(len(X)))
    assert torch.equal(plain_clip.losses, ones_clip.losses)


def test_weights_enter_the_statistic_too() -> None:
    """With a loss that ignores them, they still move s: only tokens with a weight are in mean|x|."""
    W, X, _ = problem()
    c = torch.ones(len(X))
    c[20:] = 0
    pick: dict[str, Callable[[Tensor], float]] = {"loss": lambda s: -float(s.max())}
    weighted = search_scale(W, X, Grid(3), c, **pick)
    assert torch.equal(weighted.scale, search_scale(W, X[:20], Grid(3), **pick).scale)
    assert not torch.equal(weighted.scale, search_scale(W, X, Grid(3), **pick).scale)


def test_first_candidate_is_rtn_bit_for_bit() -> None:
    W, X, _ = problem()
    scales: list[Tensor] = []
    search_scale(W, X, Grid(3), loss=lambda s: scales.append(s) or 0.0)  # type: ignore[func-returns-value]
    assert torch.equal(scales[0], torch.ones(I))
    assert torch.equal(awq.scaled_rounding(W, scales[0], Grid(3)), rtn(W, Grid(3)))


def test_ties_go_to_the_smallest_exponent() -> None:
    """Inputs of equal magnitude leave nothing to scale: every candidate is s = 1."""
    W, X, _ = problem()
    found = search_scale(W, X.sign(), Grid(3))
    assert found.ratio == 0 and len(set(found.losses.tolist())) == 1


def test_channels_without_input_keep_a_positive_scale() -> None:
    """By hand, r = 1/2: s = (1, 1e-4, 4), divided by sqrt(4 * 1e-4) = 0.02."""
    torch.testing.assert_close(
        scale_for(torch.tensor([1.0, 0.0, 16.0]), 0.5), torch.tensor([50.0, 0.005, 200.0])
    )


# search_clip --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [120, 6])
@pytest.mark.parametrize("grid", [Grid(3), Grid(2, 4), Grid(3, 8, symmetric=True)], ids=str)
def test_search_clip_equals_the_textbook(grid: Grid, tokens: int) -> None:
    """Also with fewer tokens than a group has channels."""
    W, X, c = problem(1, tokens)
    found = search_clip(W, X, grid, c)
    torch.testing.assert_close(found.ratio, textbook_clip(W, X, c, grid))
    assert found.ratio.min() < 1  # or the search never acted


def test_per_tensor_grid_has_one_range() -> None:
    """Judged by the error of the whole layer."""
    W, X, c = problem(1)
    grid = Grid(3, 0)
    found = search_clip(W, X, grid, c)
    errors = []
    for i in range(10):
        limit = W.abs().max() * (1 - i / 20)
        errors.append(layer_error(fake_quant(W.clamp(-limit, limit), grid) - W, X, c))
    assert found.ratio.shape == (1, 1)
    assert found.ratio.item() == pytest.approx(1 - errors.index(min(errors)) / 20)
    torch.testing.assert_close(found.losses.flatten(), torch.tensor(errors), rtol=1e-4, atol=0)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_ratio_one_clips_nothing_bit_for_bit(grid: Grid) -> None:
    W, _, _ = problem()
    assert torch.equal(clip_range(W, torch.ones(1, grid.groups(I)), grid), W)


def test_clip_reads_512_spaced_tokens_with_a_weight() -> None:
    W, X, c = problem(2, tokens=2048)
    c[1::2] = 0  # 1024 tokens left, so every second of them
    spaced = search_clip(W, X[::4], Grid(3), c[::4])
    assert torch.equal(search_clip(W, X, Grid(3), c).losses, spaced.losses)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    W, X, c = problem(3)
    whole, whole_clip = search_scale(W, X, Grid(3), c), search_clip(W, X, Grid(3, 4), c)
    monkeypatch.setattr(awq, "CHUNK_ELEMENTS", 50)
    torch.testing.assert_close(search_scale(W, X, Grid(3), c).losses, whole.losses)
    torch.testing.assert_close(search_clip(W, X, Grid(3, 4), c).losses, whole_clip.losses)


# the method ---------------------------------------------------------------------------------------


def gated(weights: dict[str, Tensor], X: Tensor, valid: Tensor | None) -> Tensor:
    """An MLP's two input linears, so that the loss is at a non-linear output."""
    return F.silu(F.linear(X, weights["gate"])) * F.linear(X, weights["up"])


def group(seed: int = 0, can_scale: bool = True, clip: tuple[str, ...] = ("gate", "up")) -> LinearGroup:
    weights = {"gate": problem(seed)[0], "up": problem(seed + 1)[0]}
    return LinearGroup("blocks.1.gate_up", weights, can_scale, gated, frozenset(clip))


def batches(seed: int = 0) -> list[GroupInput]:
    """Two batches [3, 20, I] with left pads that hold garbage."""
    result = []
    for n in (0, 1):
        _, X, c = problem(seed + n, tokens=60)
        X, c = X.reshape(3, 20, I), c.reshape(3, 20)
        valid = torch.ones(3, 20, dtype=torch.bool)
        valid[0, :5] = False
        result.append(GroupInput(X.masked_fill(~valid[..., None], 1e30), c * valid, valid))
    return result


def stats(inputs: list[GroupInput]) -> GroupStats:
    return collect(frozenset({"gram", "mean_abs", "inputs"}), inputs)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_method_searches_at_the_inspected_module(grid: Grid) -> None:
    """s, ratio and codes equal the loop over candidates at the gated output; pads count nothing."""
    linears, inputs = group(), batches()
    X, c = torch.cat([b.X[b.valid] for b in inputs]), torch.cat([b.weight[b.valid] for b in inputs])

    def loss(s: Tensor) -> float:
        quantized = {name: fake_quant(W * s, grid) / s for name, W in linears.weights.items()}
        errors = (gated(quantized, X, None) - gated(linears.weights, X, None)).double().square().sum(-1)
        return float((errors * c).sum())

    ratio, scale, _ = textbook_scale(X, c, loss)
    update = AWQ(clip=False)(linears, stats(inputs), grid)
    assert update.notes["awq_ratio"] == ratio and ratio > 0
    assert update.scale is not None
    torch.testing.assert_close(update.scale, scale)
    for name, W in linears.weights.items():
        assert torch.equal(update.weights[name].codes, round_to_nearest(W * update.scale, grid).codes)


def test_clip_acts_on_scaled_weights_and_inputs_of_the_named_linears() -> None:
    linears, inputs, grid = group(clip=("up",)), batches(), Grid(2)
    update = AWQ()(linears, stats(inputs), grid)
    s = update.scale
    assert s is not None
    X, c = torch.cat([b.X[b.valid] for b in inputs]), torch.cat([b.weight[b.valid] for b in inputs])
    W = linears.weights["up"] * s
    clipped = clip_range(W, textbook_clip(W, X / s, c, grid), grid)
    torch.testing.assert_close(update.weights["up"].dequantize(), rtn(clipped, grid))
    assert not torch.equal(clipped, W)
    assert torch.equal(update.weights["gate"].dequantize(), rtn(linears.weights["gate"] * s, grid))


def test_without_scale_and_clip_it_is_rtn_bit_for_bit() -> None:
    inputs = batches()
    fixed = group(can_scale=False)
    flat = [GroupInput(b.X.sign(), b.weight, b.valid) for b in inputs]  # nothing to scale: ratio 0
    for linears, given in ((fixed, inputs), (group(), flat)):
        update = AWQ(clip=False)(linears, stats(given), Grid(3, 4))
        assert update.scale is None
        for name, W in linears.weights.items():
            assert torch.equal(update.weights[name].dequantize(), rtn(W, Grid(3, 4)))


def test_clip_still_acts_where_nothing_absorbs_a_scale() -> None:
    linears, inputs = group(can_scale=False), batches()
    update = AWQ()(linears, stats(inputs), Grid(2))
    assert update.scale is None and "awq_ratio" not in update.notes
    assert not torch.equal(update.weights["up"].dequantize(), rtn(linears.weights["up"], Grid(2)))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 0, 4])
@pytest.mark.parametrize("knobs", [{"clip": False}, {"clip": True}, {"solver": "gptq"}], ids=str)
def test_beats_rtn(knobs: dict[str, Any], group_size: int, bits: int) -> None:
    """At the inspected output, with inputs x / s. (One clipping range for a whole tensor, judged before the
    gate, may lose after it: there only the scale is searched.)"""
    method = AWQ(**{**knobs, "clip": False} if group_size == 0 else knobs)
    for seed in range(3):
        linears, inputs, grid = group(seed), batches(seed), Grid(bits, group_size)
        update = method(linears, stats(inputs), grid)
        s = torch.ones(I) if update.scale is None else update.scale
        X = torch.cat([b.X[b.valid] for b in inputs])
        c = torch.cat([b.weight[b.valid] for b in inputs])
        target = gated(linears.weights, X, None)
        ours = gated({name: q.dequantize() for name, q in update.weights.items()}, X / s, None)
        plain = gated({name: rtn(W, grid) for name, W in linears.weights.items()}, X, None)
        error, reference = (((Y - target).square().sum(-1) * c).sum() for Y in (ours, plain))
        assert error < reference


def test_gptq_solver_sees_the_hessian_of_the_scaled_inputs() -> None:
    linears, given, grid = group(), stats(batches()), Grid(3, 4)
    update = AWQ(solver="gptq", act_order=True)(linears, given, grid)
    s = update.scale
    assert s is not None and given.gram is not None
    assert torch.equal(s, AWQ(clip=False)(linears, given, grid).scale)  # judged by rounding
    for name, W in linears.weights.items():
        alone = gptq_solve(W * s, given.gram / torch.outer(s, s), grid, act_order=True)
        assert torch.equal(update.weights[name].codes, alone.codes)


def test_gptq_solver_without_scale_is_gptq_bit_for_bit() -> None:
    linears, given = group(can_scale=False), stats(batches())
    ours, plain = AWQ(solver="gptq")(linears, given, Grid(3)), GPTQ()(linears, given, Grid(3))
    for name in linears.weights:
        assert torch.equal(ours.weights[name].dequantize(), plain.weights[name].dequantize())


def test_runs_repeat_and_change_no_argument() -> None:
    linears, given = group(), stats(batches())
    kept = {name: W.clone() for name, W in linears.weights.items()}
    first, second = (AWQ()(linears, given, Grid(3, 4)) for _ in range(2))
    for name in kept:
        assert torch.equal(first.weights[name].dequantize(), second.weights[name].dequantize())
        assert torch.equal(linears.weights[name], kept[name])


def test_clip_tokens_are_those_of_all_inputs_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(awq, "CLIP_TOKENS", 13)
    inputs = batches()
    X, c = torch.cat([b.X[b.valid] for b in inputs]), torch.cat([b.weight[b.valid] for b in inputs])
    picked_X, picked_c = clip_tokens(inputs)
    every = torch.arange(13) * len(X) // 13
    assert torch.equal(picked_X, X[every]) and torch.equal(picked_c, c[every])


def test_needs() -> None:
    assert isinstance(AWQ(), Method) and AWQ().needs == {"mean_abs", "inputs"}
    assert AWQ(solver="gptq").needs == {"mean_abs", "inputs", "gram"}


# wrong input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"solver": "gptqq"}, "'gptqq'.*'rtn' and 'gptq': did you mean 'gptq'"),
        ({"solver": "x"}, "'x'.*choose one of the two"),
        ({"n_grid": 0}, "n_grid is 0"),
        ({"damp": 0.0}, "damp is 0"),
        ({"block_size": 0}, "block_size is 0"),
    ],
)
def test_knobs_out_of_range(knobs: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AWQ(**knobs)  # type: ignore[arg-type]


def test_no_token_with_a_weight() -> None:
    W, X, c = problem()
    for search in (search_scale, search_clip):
        with pytest.raises(ValueError, match="no calibration token with a weight reached this layer"):
            search(W, X, Grid(3), 0 * c)
    with pytest.raises(ValueError, match=r"blocks\.1\.gate_up: no calibration token with a weight"):
        AWQ()(group(), stats([GroupInput(b.X, 0 * b.weight, b.valid) for b in batches()]), Grid(3))


def test_inputs_with_nan() -> None:
    W, X, _ = problem()
    X[0, 0] = float("nan")
    with pytest.raises(ValueError, match="no AWQ candidate has a finite loss"):
        search_scale(W, X, Grid(3))


def test_broken_weight_is_named() -> None:
    linears = group()
    linears.weights["up"][0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"blocks\.1\.gate_up\.up: the weight holds NaN or Inf"):
        AWQ()(linears, stats(batches()), Grid(3))

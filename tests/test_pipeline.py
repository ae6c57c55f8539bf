"""The block loop: what is swapped in, from which statistics, and that off-values are the plain baselines."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from tiny_llada import LENGTHS, MASK, SAMPLER, VOCAB, tiny_config, tiny_model, tiny_prompts, tiny_trajectories
from torch import Tensor, nn

from dllmq.calibration.observe import attention_inputs
from dllmq.calibration.states import (
    CalibrationState,
    CleanText,
    RandomMask,
    Trajectory,
    UniformTrajectory,
    draw_states,
)
from dllmq.calibration.stats import GroupInput, GroupStats, collect
from dllmq.kernels import cpu_int8, cpu_onednn
from dllmq.kernels.backends import pays
from dllmq.methods import AWQ, FP, GPTQ, RTN
from dllmq.methods.base import GroupUpdate
from dllmq.methods.gptq import gptq_solve
from dllmq.models.attention import QuantizedProduct, attention_map, quantize_queries_keys
from dllmq.models.base import LinearGroup, linear_group
from dllmq.models.linear import Linear, QuantLinear
from dllmq.models.llada import LLaDA
from dllmq.numerics import Grid, Params, fake_quant
from dllmq.numerics.linalg import weighted_gram
from dllmq.pipeline import (
    calibration_states,
    check_group_sizes,
    quantize,
    quantized_linears,
    set_backend,
    weight_bytes,
    weight_summary,
)
from dllmq.recipe import AttentionGrids, Recipe, uniform_weight
from dllmq.techniques.cgq import CGQ
from dllmq.techniques.iaaq import IAAQ, EqualWeightSearch
from dllmq.techniques.tmas import TMAS

W3 = Recipe(
    RTN(), weights=Grid(3, 16), num_states=8, batch_size=4, sampler=SAMPLER, states=UniformTrajectory()
)
W4A4 = replace(W3, weights=Grid(4), inputs=Grid(4), attention=AttentionGrids(Grid(4), Grid(4)))
LINEARS = ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")
METHODS = [RTN(), GPTQ(), AWQ(n_grid=4), AWQ(n_grid=4, solver="gptq")]


@pytest.fixture(scope="module")
def trajectories() -> list[Trajectory]:
    return tiny_trajectories(tiny_model())


@pytest.fixture(scope="module")
def ids() -> Tensor:
    ids = torch.randint(0, VOCAB, (4, 14), generator=torch.Generator().manual_seed(5))
    ids[:, 8:11] = MASK
    return ids


def quantized(trajectories: list[Trajectory], recipe: Recipe, **slots: Any) -> LLaDA:
    model = tiny_model()
    quantize(model, tiny_prompts(), replace(recipe, **slots), trajectories)
    return model


def states_of(recipe: Recipe, trajectories: list[Trajectory]) -> list[CalibrationState]:
    return draw_states(
        tiny_model(), trajectories, recipe.states, recipe.num_states, recipe.batch_size, recipe.seed
    )


def same(a: LLaDA, b: LLaDA) -> bool:
    """Bit for bit: every parameter, code and scale."""
    left, right = quantized_linears(a), quantized_linears(b)
    assert left.keys() == right.keys()
    tensors = all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    codes = all(torch.equal(left[n].quantized.codes, right[n].quantized.codes) for n in left)
    return (
        tensors
        and codes
        and all(torch.equal(left[n].quantized.scale, right[n].quantized.scale) for n in left)
    )


def agreement(a: LLaDA, b: LLaDA, linears: int | None = None) -> float:
    """Share of equal codes, in the first so many linears."""
    pairs = list(zip(quantized_linears(a).values(), quantized_linears(b).values(), strict=True))[:linears]
    equal = torch.cat([(x.quantized.codes == y.quantized.codes).flatten() for x, y in pairs])
    return float(equal.float().mean())


# What is touched ----------------------------------------------------------------------------------


def test_full_precision_is_the_untouched_model(trajectories: list[Trajectory], ids: Tensor) -> None:
    model, untouched = tiny_model(), tiny_model()
    report = quantize(model, tiny_prompts(), replace(W4A4, method=FP()))
    assert torch.equal(model(ids), untouched(ids))
    assert {n: id(type(m)) for n, m in model.named_modules()} == {
        n: id(type(m)) for n, m in untouched.named_modules()
    }
    assert report.quantized_share == 0 and report.states == {}
    assert report.weight_bytes == 2 * sum(p.numel() for p in untouched.parameters())


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_the_block_linears_are_swapped_and_nothing_else(trajectories: list[Trajectory], method: Any) -> None:
    model, untouched = quantized(trajectories, W3, method=method), tiny_model()
    names = {f"model.transformer.blocks.{i}.{name}" for i in range(2) for name in LINEARS}
    assert set(quantized_linears(model)) == names
    head = model.transformer["ff_out"]  # called like the blocks' down-projection
    assert type(head) is Linear and torch.equal(head.weight, untouched.transformer["ff_out"].weight)
    moved = {n for n, p in model.state_dict().items() if not torch.equal(p, untouched.state_dict()[n])}
    norms = {f"model.transformer.blocks.{i}.{n}.weight" for i in range(2) for n in ("attn_norm", "ff_norm")}
    weights = {f"{name}.weight" for name in names}
    assert weights <= moved <= weights | (norms if isinstance(method, AWQ) else set())


def test_rounding_equals_every_weight_rounded_by_hand(trajectories: list[Trajectory], ids: Tensor) -> None:
    by_hand = tiny_model()
    for block in by_hand.blocks:
        for name in LINEARS:
            groups = getattr(block, name).weight.data.unflatten(1, (-1, 16))
            low, high = groups.amin(-1, True).clamp(max=0), groups.amax(-1, True).clamp(min=0)
            s = (high - low) / 7
            z = torch.round(-low / s)
            codes = (torch.round(groups / s) + z).clamp(0, 7)
            getattr(block, name).weight.data = ((codes - z) * s).flatten(1)
    assert torch.equal(quantized(trajectories, W3)(ids), by_hand(ids))


def test_share_and_bytes_against_a_hand_count(trajectories: list[Trajectory]) -> None:
    report = quantize(tiny_model(), tiny_prompts(), replace(W3, weights=Grid(4, 16)), trajectories)
    inside = 2 * (4 * 32 * 32 + 3 * 32 * 48)  # q k v o, gate up down, two blocks
    outside = 2 * VOCAB * 32 + 5 * 32  # embedding and head, norms
    groups = inside // 16
    assert report.quantized_share == inside / (inside + outside)
    assert report.weight_bytes == inside // 2 + groups // 2 + 4 * groups + 2 * outside


def test_a_bias_counts_two_bytes(trajectories: list[Trajectory]) -> None:
    model = tiny_model()
    plain = weight_bytes(model)
    model.blocks[0].q_proj.bias = nn.Parameter(torch.randn(32), requires_grad=False)
    assert weight_bytes(model) == plain + 64
    quantize(model, tiny_prompts(), W3, trajectories)
    assert weight_bytes(model) == weight_bytes(quantized(trajectories, W3)) + 64


def test_quantizing_twice_is_refused(trajectories: list[Trajectory]) -> None:
    with pytest.raises(ValueError, match="quantized already"):
        quantize(quantized(trajectories, W3), tiny_prompts(), W3, trajectories)


# How well -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_error_falls_with_bits(trajectories: list[Trajectory], ids: Tensor, method: Any) -> None:
    """Weights, inputs and the attention product all at the same width."""
    exact = tiny_model()(ids)

    def error(bits: int) -> float:
        grid = Grid(bits)
        recipe = replace(W4A4, weights=grid, inputs=grid, attention=AttentionGrids(grid, grid))
        logits = quantized(trajectories, recipe, method=method)(ids)
        return float((logits - exact).norm() / exact.norm())

    errors = [error(bits) for bits in (8, 4, 2)]
    assert errors[0] < 0.05 and errors[0] < errors[1] < errors[2]


def correlated(method: Any, salient: bool) -> tuple[Any, GroupInput, Any, Any]:
    """Block 0's qkv group with inputs of rank 8 (or with salient channels), its input and two updates."""
    model = tiny_model()
    group = linear_group(model, 0, model.topology.groups[0])
    X = torch.randn(4, 20, 8) @ torch.randn(8, 32) + 0.1 * torch.randn(4, 20, 32)
    if salient:
        X[..., [3, 17]] *= 15
    x = GroupInput(X, torch.ones(4, 20), torch.ones(4, 20, dtype=torch.bool))
    stats = collect(frozenset({"gram", "mean_abs", "inputs"}), [x])
    return group, x, method(group, stats, Grid(3)), RTN()(group, stats, Grid(3))


def test_gptq_errs_less_than_rounding_on_correlated_inputs() -> None:
    group, x, found, rounded = correlated(GPTQ(), salient=False)
    for name, W in group.weights.items():
        errors = [(x.X @ (u.weights[name].dequantize() - W).T).norm() for u in (found, rounded)]
        assert errors[0] < 0.8 * errors[1]


def test_awq_errs_less_than_rounding_at_its_inspected_module() -> None:
    group, x, found, rounded = correlated(AWQ(clip=False), salient=True)
    target = group.inspect(group.weights, x.X, x.valid)
    scaled = {name: q.dequantize() / found.scale for name, q in found.weights.items()}
    plain = {name: q.dequantize() for name, q in rounded.weights.items()}
    errors = [(group.inspect(weights, x.X, x.valid) - target).norm() for weights in (scaled, plain)]
    assert found.notes["awq_ratio"] > 0 and errors[0] < 0.8 * errors[1]


# From which statistics ----------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [W3, W4A4], ids=["weights", "everything"])
def test_every_group_is_solved_on_what_the_quantized_model_before_it_gives(
    trajectories: list[Trajectory], recipe: Recipe
) -> None:
    """GPTQ by hand on each group's inputs, hooked in the finished model, gives that model's codes."""
    model, original = quantized(trajectories, recipe, method=GPTQ()), tiny_model()
    states = states_of(recipe, trajectories)
    for index, block in enumerate(model.blocks):
        for row in model.topology.groups:
            inside, before = gram_at(model, index, row.linears[0], states), None
            if index == 1:
                before = gram_at(original, index, row.linears[0], states)
            for name in row.linears:
                W = getattr(original.blocks[index], name).weight
                codes = getattr(block, name).quantized.codes
                assert torch.equal(gptq_solve(W, inside, recipe.weights).codes, codes)  # type: ignore[arg-type]
                if before is not None:  # the full-precision prefix gives others
                    assert not torch.equal(gptq_solve(W, before, recipe.weights).codes, codes)  # type: ignore[arg-type]


def gram_at(model: LLaDA, index: int, linear: str, states: list[CalibrationState]) -> Tensor:
    """H at one linear over the states, from a plain hook in forwards of the whole model."""
    found: list[Tensor] = []
    module = getattr(model.blocks[index], linear)
    handle = module.register_forward_pre_hook(lambda _m, inputs: found.append(inputs[0]))
    for state in states:
        model(state.tokens, state.valid)
    handle.remove()
    H = torch.zeros(found[0].shape[-1], found[0].shape[-1])
    for X, state in zip(found, states, strict=True):
        H += weighted_gram(X[state.valid])
    return H


def test_values_are_scaled_by_the_quantized_projection(trajectories: list[Trajectory]) -> None:
    """The range of V, per head, in the finished model: not that of full precision."""
    model, original, states = quantized(trajectories, W4A4), tiny_model(), states_of(W4A4, trajectories)
    for index in range(2):
        product = model.blocks[index].product
        assert isinstance(product, QuantizedProduct) and product.v_params is not None
        ranges = []
        for source in (model, original):
            outputs: list[Tensor] = []
            handle = source.blocks[index].v_proj.register_forward_hook(lambda _m, _x, y: outputs.append(y))  # noqa: B023
            for state in states:
                source(state.tokens, state.valid)
            handle.remove()
            V = torch.cat([y[state.valid] for y, state in zip(outputs, states, strict=True)]).view(-1, 4, 8)
            low, high = V.amin((0, 2)).clamp(max=0), V.amax((0, 2)).clamp(min=0)
            ranges.append((high - low) / 15)
        assert torch.equal(product.v_params.scale.flatten(), ranges[0])
        assert not torch.equal(ranges[0], ranges[1])


class Recorded:
    """A value scale that wants `needs`, and keeps what it is given: for each layer, V and pieces of P."""

    needs = frozenset({"maps"})
    layers: ClassVar[list[list[tuple[Tensor, list[Tensor | None]]]]] = []

    def __init__(self, grid: Grid) -> None:
        self.batches: list[tuple[Tensor, list[Tensor | None]]] = []
        self.layers.append(self.batches)

    def range(self, V: Tensor) -> None:
        assert V.shape[1:] == (4, 8)

    def accumulate(self, V: Tensor, P: Tensor | None) -> None:
        if not self.batches or self.batches[-1][0] is not V:
            self.batches.append((V, []))
        self.batches[-1][1].append(P)

    def result(self) -> Params:
        return Params(torch.ones(1, 1, 1), torch.full((1, 1, 1), 8.0))

    def notes(self) -> dict[str, float]:
        return {"batches": float(len(self.batches))}


class RecordedValues(Recorded):
    needs = frozenset({"values"})


class RecordedNothing(Recorded):
    needs: frozenset[str] = frozenset()


@pytest.mark.parametrize("in_pieces", [False, True])
@pytest.mark.parametrize(
    "grids",
    [
        AttentionGrids(Grid(3), Grid(4)),
        AttentionGrids(None, Grid(4)),
        AttentionGrids(Grid(3), Grid(4), Grid(3)),
    ],
    ids=["PV", "V", "QKPV"],
)
def test_a_value_scale_reads_the_maps_the_product_will_use(
    trajectories: list[Trajectory], monkeypatch: pytest.MonkeyPatch, grids: AttentionGrids, in_pieces: bool
) -> None:
    """P of Q and K, each quantized when it will be; V at pads, and rows of pad queries, are 0."""
    Recorded.layers.clear()
    if in_pieces:
        monkeypatch.setattr("dllmq.models.attention.MAX_MAP", 4 * 4 * 23 * 5)
    model = quantized(trajectories, replace(W3, inputs=None), value_scale=Recorded, attention=grids)
    states, seen = states_of(W3, trajectories), Recorded.layers[1]
    assert len(seen) == len(states) == 2 and any(not bool(s.valid.all()) for s in states)
    for state, (V, pieces) in zip(states, seen, strict=True):
        assert (len(pieces) > 1) is in_pieces
        ctx = model.context(state.tokens.shape[1], state.valid)
        x = model.blocks[0](model.embed(state.tokens), ctx)
        Q, K, values, bias = attention_inputs(model.blocks[1], x, ctx)
        expected = attention_map(*quantize_queries_keys(Q, K, grids.QK), bias)
        if grids.P is not None:
            expected = fake_quant(expected, grids.P)
        assert torch.equal(V, values * state.valid[:, None, :, None])
        P = torch.cat(pieces, 2)  # type: ignore[arg-type]
        torch.testing.assert_close(P, expected * state.valid[:, None, :, None], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("scale", "given"), [(RecordedValues, [[None], [None]]), (RecordedNothing, [])])
def test_a_value_scale_is_given_what_it_asks_for(
    trajectories: list[Trajectory], monkeypatch: pytest.MonkeyPatch, scale: Any, given: list[Any]
) -> None:
    """No map is computed for one that reads values alone, and no second pass made for one that reads none."""
    monkeypatch.setattr("dllmq.models.attention.attention_map", None)
    Recorded.layers.clear()
    model = tiny_model()
    recipe = replace(W3, value_scale=scale, attention=AttentionGrids(None, Grid(4)))
    report = quantize(model, tiny_prompts(), recipe, trajectories)
    assert [[pieces for _, pieces in batches] for batches in Recorded.layers] == [given, given]
    assert report.notes["blocks.1.product"] == {"batches": len(given)}


@pytest.mark.parametrize("scale", [IAAQ, EqualWeightSearch])
def test_the_search_is_the_same_in_pieces(
    trajectories: list[Trajectory], monkeypatch: pytest.MonkeyPatch, scale: Any
) -> None:
    recipe = replace(W4A4, value_scale=scale)
    whole = [block.product.v_params for block in quantized(trajectories, recipe).blocks]
    monkeypatch.setattr("dllmq.models.attention.MAX_MAP", 4 * 4 * 23 * 5)
    pieces = [block.product.v_params for block in quantized(trajectories, recipe).blocks]
    for a, b in zip(whole, pieces, strict=True):
        torch.testing.assert_close(a, b)


class Kept(RTN):
    """Rounds, and keeps what it was given."""

    stats: ClassVar[list[GroupStats]] = []

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"gram", "mean_abs"})

    def __call__(self, group: LinearGroup, stats: GroupStats, grid: Grid) -> GroupUpdate:
        self.stats.append(stats)
        return super().__call__(group, stats, grid)


def test_padding_is_invisible_to_statistics(trajectories: list[Trajectory]) -> None:
    """All rows at once or one by one, without a pad: the same up to rounding, in every group."""
    assert len(set(LENGTHS)) > 1
    Kept.stats.clear()
    for batch_size in (8, 1):
        quantized(trajectories, W3, method=Kept(), batch_size=batch_size)
    together, alone = Kept.stats[:8], Kept.stats[8:]
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a.gram, b.gram, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(a.mean_abs, b.mean_abs, rtol=1e-4, atol=1e-5)


def test_states_matter(trajectories: list[Trajectory]) -> None:
    models = [
        quantized(trajectories, W3, method=GPTQ(), states=states)
        for states in (CleanText(), RandomMask(), UniformTrajectory(), TMAS())
    ]
    assert all(agreement(a, b) < 1 for i, a in enumerate(models) for b in models[:i])


# Neutral elements ---------------------------------------------------------------------------------


def constant(c: float) -> Callable[[CalibrationState], Tensor]:
    return lambda state: torch.full_like(state.score, c)


@pytest.mark.parametrize("method", METHODS[1:], ids=repr)
def test_token_weight_one_is_the_plain_baseline(trajectories: list[Trajectory], method: Any) -> None:
    """Bit for bit, and whatever the weight says at pads."""

    def wild_at_pads(state: CalibrationState) -> Tensor:
        return uniform_weight(state).masked_fill(~state.valid, float("nan"))

    plain = quantized(trajectories, W4A4, method=method)
    for weight in (constant(1.0), wild_at_pads):
        assert same(plain, quantized(trajectories, W4A4, method=method, token_weight=weight))


@pytest.mark.parametrize("c", [4.0, 0.25])
def test_a_constant_weight_changes_nothing_in_gptq(trajectories: list[Trajectory], c: float) -> None:
    """Powers of two bit for bit, for they round nowhere."""
    plain = quantized(trajectories, W4A4, method=GPTQ())
    assert same(plain, quantized(trajectories, W4A4, method=GPTQ(), token_weight=constant(c)))


@pytest.mark.parametrize("method", METHODS[1:], ids=repr)
def test_any_constant_weight_changes_nothing_but_rounding(
    trajectories: list[Trajectory], method: Any
) -> None:
    """In the first group: a tie that falls to the other side changes the rest of its row and what follows."""
    plain = quantized(trajectories, W3, method=method)
    weighted = quantized(trajectories, W3, method=method, token_weight=constant(0.49))
    assert agreement(plain, weighted, linears=3) > 0.99


@pytest.mark.parametrize("method", METHODS[1:], ids=repr)
def test_a_token_weight_acts(trajectories: list[Trajectory], method: Any) -> None:
    def masked_first(state: CalibrationState) -> Tensor:
        return state.masked.float() + 0.05

    plain = quantized(trajectories, W3, method=method)
    assert agreement(plain, quantized(trajectories, W3, method=method, token_weight=masked_first)) < 0.999


def test_a_weight_of_zero_everywhere_names_the_layer(trajectories: list[Trajectory]) -> None:
    for method in METHODS[1:]:
        with pytest.raises(ValueError, match=r"^blocks\.0\.qkv: no calibration token"):
            quantized(trajectories, W3, method=method, token_weight=constant(0.0))


# Running ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("states", [RandomMask(), TMAS()], ids=lambda s: s.name)
def test_a_run_is_a_function_of_its_seed(trajectories: list[Trajectory], states: Any) -> None:
    """Also when the trajectories were recorded inside, on the fly."""
    recipe = replace(W4A4, method=GPTQ(), states=states)
    a, b, c = tiny_model(), tiny_model(), tiny_model()
    first = quantize(a, tiny_prompts(), recipe)
    second = quantize(b, tiny_prompts(), recipe, trajectories)
    quantize(c, tiny_prompts(), replace(recipe, seed=1))
    assert same(a, b) and not same(a, c)
    assert first.states == second.states and first.notes == second.notes


def test_the_report_says_what_was_done(trajectories: list[Trajectory]) -> None:
    done: list[tuple[int, int, str]] = []
    report = quantize(
        tiny_model(),
        tiny_prompts(),
        replace(W3, method=AWQ(n_grid=4)),
        trajectories,
        lambda *a: done.append(a),
    )
    assert list(report.notes) == [
        f"blocks.{i}.{g}" for i in (0, 1) for g in ("qkv", "attn_out", "gate_up", "down")
    ]
    assert all(0 <= notes["awq_ratio"] < 1 for notes in report.notes.values())
    assert report.states["sequences"] == 8 and report.states["sampler"] == "uniform"
    assert sum(report.states["by_block"]) == 8
    assert set(report.seconds) == {"calibrate_s", "quantize_s"}
    assert done == [(1, 2, "blocks"), (2, 2, "blocks")]


def test_values_shared_by_heads_or_quantized_take_no_scale(trajectories: list[Trajectory]) -> None:
    gqa = tiny_model(n_kv_heads=2)
    shared = quantize(gqa, tiny_prompts(), replace(W3, method=AWQ(n_grid=4))).notes
    settled = quantize(tiny_model(), tiny_prompts(), replace(W4A4, method=AWQ(n_grid=4)), trajectories).notes
    for notes in (shared, settled):
        assert [name for name, n in notes.items() if "awq_ratio" not in n] == [
            "blocks.0.attn_out",
            "blocks.1.attn_out",
        ]


def test_bf16_models_stay_bf16(trajectories: list[Trajectory], ids: Tensor) -> None:
    exact, model = tiny_model()(ids), tiny_model().to(torch.bfloat16)
    quantize(model, tiny_prompts(), replace(W3, method=AWQ(n_grid=4), weights=Grid(8)), trajectories)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert float((model(ids).float() - exact).norm() / exact.norm()) < 0.05


def test_group_sizes_are_checked_without_weights() -> None:
    with torch.device("meta"):
        model = LLaDA(tiny_config())
    check_group_sizes(model, replace(W3, weights=Grid(4, 16), inputs=Grid(4, 8)))
    check_group_sizes(model, replace(W3, weights=Grid(4, 0), inputs=None))
    with pytest.raises(
        ValueError, match=r"^group_size=32 does not divide the 48 inputs of ff_out; use a div"
    ):
        check_group_sizes(model, replace(W3, weights=Grid(4, 32)))
    with pytest.raises(ValueError, match=r"^act_group_size=5 does not .* 32 inputs of q_proj.*per token\.$"):
        check_group_sizes(model, replace(W3, inputs=Grid(4, 5)))


def test_quant_linears_hold_the_recipes_grids(trajectories: list[Trajectory]) -> None:
    for linear in quantized_linears(quantized(trajectories, W4A4)).values():
        assert isinstance(linear, QuantLinear)
        assert (linear.quantized.grid, linear.inputs.grid) == (Grid(4), Grid(4))


# Backends -----------------------------------------------------------------------------------------

W4A8 = replace(W4A4, inputs=Grid(8), attention=AttentionGrids())
exact_only = pytest.mark.skipif(not cpu_int8.is_exact(), reason="this processor saturates int8 products")


def processor(patch: pytest.MonkeyPatch, fast: bool, exact: bool) -> None:
    patch.setattr(cpu_int8, "is_fast", lambda: fast)
    patch.setattr(cpu_int8, "is_exact", lambda: exact)
    patch.setattr(cpu_onednn, "works", lambda: False)


def backends(model: LLaDA) -> set[str]:
    return {linear.backend for linear in quantized_linears(model).values()}


@exact_only
def test_the_backends_are_one_function_and_can_be_changed(
    trajectories: list[Trajectory], ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = quantized(trajectories, W4A8)
    assert backends(model) == {"fake"}
    fake = model(ids)
    for asked in ("packed", "fake", "auto", "packed", "fake"):
        processor(monkeypatch, fast=True, exact=True)
        wanted = "fake" if asked == "fake" else "packed:int_mm"
        assert set_backend(model, asked) == wanted and backends(model) == {wanted}
        error = float((model(ids) - fake).norm() / fake.norm())
        assert error == 0 if wanted == "fake" else 0 < error < 0.01


GROUPS = {
    "w3 by 16": W3,
    "a8 by 8": replace(W4A8, inputs=Grid(8, 8)),
    "w4 by 16": replace(W4A8, weights=Grid(4, 16)),
}


@exact_only
@pytest.mark.parametrize("name", GROUPS)
def test_packed_groups_are_the_fake_ones(name: str, trajectories: list[Trajectory], ids: Tensor) -> None:
    model = quantized(trajectories, GROUPS[name])
    fake = model(ids)
    assert set_backend(model, "packed").startswith("packed:")
    error = float((model(ids) - fake).norm() / fake.norm())
    assert error < 1e-6 if GROUPS[name].inputs is None else 0 < error < 0.01


@pytest.mark.parametrize(("fast", "exact"), [(False, True), (True, False), (False, False)])
def test_auto_is_fake_where_packed_does_not_pay(
    trajectories: list[Trajectory], monkeypatch: pytest.MonkeyPatch, fast: bool, exact: bool
) -> None:
    model = quantized(trajectories, W4A8)
    processor(monkeypatch, fast, exact)
    assert set_backend(model, "auto") == "fake" and backends(model) == {"fake"}


@pytest.mark.parametrize("recipe", [*GROUPS.values(), replace(W4A8, inputs=None)], ids=[*GROUPS, "w4a16"])
def test_auto_is_fake_with_small_groups_and_full_precision_inputs(
    trajectories: list[Trajectory], monkeypatch: pytest.MonkeyPatch, recipe: Recipe
) -> None:
    model = quantized(trajectories, recipe)
    processor(monkeypatch, fast=True, exact=True)
    assert set_backend(model, "auto") == "fake"


@pytest.mark.parametrize(
    ("weight", "inputs", "dtype", "expected"),
    [
        (Grid(4), Grid(8), torch.bfloat16, True),
        (Grid(4), Grid(4), torch.float32, True),
        (Grid(4, 64), Grid(8), torch.float32, True),
        (Grid(4, 64), Grid(8), torch.bfloat16, False),
        (Grid(4, 64), Grid(8, 96), torch.float32, False),  # segments of 32
        (Grid(4), None, torch.float32, False),
    ],
)
def test_when_packed_pays(
    monkeypatch: pytest.MonkeyPatch, weight: Grid, inputs: Grid | None, dtype: torch.dtype, expected: bool
) -> None:
    monkeypatch.setattr(cpu_int8, "is_fast", lambda: True)
    assert pays("cpu", weight, inputs, 192, dtype) is expected
    assert pays("cuda", weight, inputs, 192, dtype) is (inputs is not None)


def test_the_first_linear_that_cannot_be_packed_is_named(
    trajectories: list[Trajectory], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And then none is packed."""
    model = quantized(trajectories, W4A8)
    processor(monkeypatch, fast=True, exact=True)
    for name in ("ff_out", "attn_out"):
        getattr(model.blocks[1], name).inputs.grid = Grid(8, 0)
    named = r"^backend=packed has no kernel for model\.transformer\.blocks\.1\.attn_out: .*=fake or auto\.$"
    with pytest.raises(ValueError, match=named) as error:
        set_backend(model, "packed")
    assert "\n" not in str(error.value) and "ff_out" not in str(error.value)
    assert set_backend(model, "auto") == "fake" and backends(model) == {"fake"}


def test_packed_is_refused_where_the_processor_errs(
    trajectories: list[Trajectory], monkeypatch: pytest.MonkeyPatch
) -> None:
    processor(monkeypatch, fast=True, exact=False)
    with pytest.raises(ValueError, match=r"errs on this processor\. Use backend=fake or auto"):
        set_backend(quantized(trajectories, W4A8), "packed")


@pytest.mark.parametrize("backend", ["auto", "fake", "packed"])
def test_full_precision_has_no_backend(backend: str) -> None:
    assert set_backend(tiny_model(), backend) == ""


@pytest.mark.parametrize("backend", ["fake", pytest.param("packed", marks=exact_only)])
def test_a_groups_input_is_quantized_once(
    trajectories: list[Trajectory], ids: Tensor, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """Four groups a block, seven linears: and nothing is kept afterwards."""
    model = quantized(trajectories, W4A8)
    set_backend(model, backend)
    made: list[str] = []

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given: (made.append(name), function(*given))[1]

    monkeypatch.setattr("dllmq.models.linear.fake_quant", counted("fake", fake_quant))
    packed = counted("packed", cpu_int8.quantize_for)
    for kernel in (cpu_int8, cpu_onednn):
        monkeypatch.setattr(kernel, "quantize_for", packed)
    model(ids)
    assert made == [backend] * 8
    shared = {id(linear.inputs): linear.inputs for linear in quantized_linears(model).values()}
    assert sorted(inputs.readers for inputs in shared.values()) == [1, 1, 1, 1, 2, 2, 3, 3]
    assert all(inputs._source is None and inputs._value is None for inputs in shared.values())


# Calibration sets ---------------------------------------------------------------------------------


def test_a_calibration_set_can_be_drawn_before(trajectories: list[Trajectory]) -> None:
    """It is what `quantize` draws, recorded trajectories or not."""
    recipe, models = replace(W4A4, method=GPTQ(), states=RandomMask()), [tiny_model() for _ in range(3)]
    drawn = calibration_states(tiny_model(), tiny_prompts(), recipe, trajectories)
    recorded = calibration_states(tiny_model(), tiny_prompts(), recipe)
    reports = [
        quantize(models[0], tiny_prompts(), recipe, trajectories),
        quantize(models[1], [], recipe, states=drawn),
        quantize(models[2], [], recipe, states=recorded),
    ]
    assert same(models[0], models[1]) and same(models[0], models[2])
    assert reports[0].states == reports[1].states == reports[2].states


@pytest.mark.parametrize("states", [CleanText(), UniformTrajectory()], ids=lambda s: s.name)
def test_scores_are_taken_where_the_token_weight_reads_them(states: Any) -> None:
    literal = replace(W3, states=states, token_weight=CGQ(unmasked_confidence="model"))
    for recipe in (literal, replace(literal, token_weight=CGQ())):
        for state in calibration_states(tiny_model(), tiny_prompts(), recipe):
            wanted = state.valid if recipe is literal else state.masked
            assert torch.equal(state.score > 0, wanted)


def test_the_summary_of_weights_is_their_mean_by_kind_of_token(trajectories: list[Trajectory]) -> None:
    """Over all batches, pads left out whatever they weigh."""

    def weight(state: CalibrationState) -> Tensor:
        return torch.where(state.masked, 1.0 + state.score, 0.5).masked_fill(~state.valid, float("nan"))

    recipe = replace(W3, token_weight=weight, batch_size=3)
    states = states_of(recipe, trajectories)
    masked = [float(w) for s in states for w in weight(s)[s.masked]]
    assert any(not bool(s.valid.all()) for s in states)
    found = weight_summary(states, recipe)
    assert found == {"masked": pytest.approx(sum(masked) / len(masked)), "unmasked": pytest.approx(0.5)}
    report = quantize(tiny_model(), tiny_prompts(), replace(recipe, method=RTN()), trajectories)
    assert report.states["token_weight"] == found


def test_clean_text_has_no_masked_token_to_weigh(trajectories: list[Trajectory]) -> None:
    recipe = replace(W3, states=CleanText(), token_weight=CGQ(unmasked=0.6))
    found = weight_summary(states_of(recipe, trajectories), recipe)
    assert found == {"masked": None, "unmasked": pytest.approx(0.36)}

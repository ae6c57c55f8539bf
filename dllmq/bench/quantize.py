"""Section `quantize`: GPTQ's solver against Algorithm 1 as published, its statistics, AWQ's grid, one block.

The textbook's codes and ours come from sums in another order, so a weight that lies halfway between two codes
can go either way and take the later columns with it (0.2 % of the codes at 4096 x 4096, where the objective
moves by 1e-5). Equal means: at least CODES of the codes are equal, and the objective tr((W - Q) H (W - Q)^T)
is the same within LOSS. That codes are equal in exact arithmetic is tested in tests/methods.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dllmq.bench import textbook_gptq
from dllmq.bench.rows import Row, Sheet, timed_row
from dllmq.bench.shapes import Setup, build, check_room
from dllmq.bench.timing import Measured, interleaved, synchronize
from dllmq.calibration.stats import GroupInput, StatsCollector, collect
from dllmq.diffusion import SamplerConfig
from dllmq.methods import AWQ, GPTQ, Method, gptq
from dllmq.methods.awq import scale_for
from dllmq.models.base import LinearGroup, linear_group
from dllmq.numerics import Grid, QuantizedTensor, fake_quant, fit
from dllmq.numerics.linalg import damped_inverse_cholesky
from dllmq.pipeline import quantize
from dllmq.recipe import AttentionGrids, Recipe
from dllmq.techniques.cgq import CGQ
from dllmq.techniques.iaaq import IAAQ
from dllmq.techniques.tmas import TMAS

CODES, LOSS = 0.99, 2e-3
GRID, NUM_EXPONENTS = Grid(4), 20
SIZE, TOKENS, BATCHES = 4096, 512, 4  # of the solver's matrix; of the Gram matrix's inputs
STATES, BATCH = 128, 16  # sequences that AWQ's linears are judged by, and of one batch
METHODS: dict[str, Method] = {"gptq": GPTQ(), "awq": AWQ()}


def measure(setup: Setup, sheet: Sheet) -> None:
    """Adds the section's rows; on a GPU, where time may run out, those with a target first."""
    size = 128 if setup.quick else SIZE
    on_gpu = setup.device.type == "cuda"
    solver(setup, sheet, size)
    if on_gpu:
        whole_block(setup, sheet)
    gram(setup, sheet, size)
    awq_grid(setup, sheet)
    if not on_gpu:
        whole_block(setup, sheet)


# ------------------------------------------------------------------ GPTQ


@torch.no_grad()
def solver(setup: Setup, sheet: Sheet, size: int) -> None:
    """Factorization, loop, and both together."""
    W, X = gptq_problem(size, setup.device)
    H = textbook_gptq.running_gram([X])
    U = textbook_gptq.inverse_factor(H)
    runs: dict[str, Callable[[], Any]] = {
        "their loop": lambda: textbook_gptq.solve(W, U, GRID)[0],
        "our loop": lambda: solve_given_factor(W, U),
        "their factor": lambda: textbook_gptq.inverse_factor(H),
        "our factor": lambda: damped_inverse_cholesky(H, 0.01),
        "theirs": lambda: textbook_gptq.solve(W, textbook_gptq.inverse_factor(H), GRID)[0],
        "ours": lambda: gptq.gptq_solve(W, H, GRID).codes,
    }
    found = interleaved(runs, setup.repeats, setup.device)
    judge = partial(codes_row, W=W, H=H, size=size)
    sheet.add(judge("quantize.loop", "GPTQ, columns only", (found["their loop"], found["our loop"])))
    sheet.add(factor_row(found["their factor"], found["our factor"], size))
    sheet.add(judge("quantize.gptq", "GPTQ with its factorization", (found["theirs"], found["ours"])))


def solve_given_factor(W: Float[Tensor, "O I"], U: Float[Tensor, "I I"]) -> Tensor:
    """Our codes as the textbook's loop makes its own: from W and U, the fit of scales in it, no look at H."""
    Wt = W.T.clone(memory_format=torch.contiguous_format)
    group_of = torch.zeros(len(Wt), dtype=torch.long, device=W.device)
    codes, _ = gptq.solve_columns(Wt, U, GRID, fit(Wt.T, GRID), group_of, GPTQ().block_size)
    return codes.T.contiguous()


def gptq_problem(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A weight, and inputs with correlated channels: [size, size], [2 size, size]."""
    rng = torch.Generator().manual_seed(0)
    W = torch.randn(size, size, generator=rng) / size**0.5
    X = torch.randn(2 * size, size, generator=rng)
    X += 0.5 * X.roll(1, dims=1) + X[:, :1]
    return W.to(device), X.to(device)


def codes_row(key: str, what: str, pair: tuple[Measured, Measured], W: Tensor, H: Tensor, size: int) -> Row:
    """A row of two solvers' codes, with the share of equal ones and both objectives."""
    theirs, ours = (m.output for m in pair)
    share = float((theirs == ours).float().mean())
    losses = [objective(W, codes, H) for codes in (theirs, ours)]
    equal = share >= CODES and abs(losses[0] - losses[1]) <= LOSS * losses[0]
    return timed_row(
        key, what, f"{size} x {size} float32, w4", ("textbook", "dllmq"), pair, equal, share,
        
        numbers={"baseline_loss": losses[0], "loss": losses[1]},
    )  # fmt: skip


def objective(W: Float[Tensor, "O I"], codes: Tensor, H: Float[Tensor, "I I"]) -> float:
    """tr((W - Q) H (W - Q)^T)."""
    params = fit(W, GRID)
    D = W - QuantizedTensor(codes, params.scale, params.zero, GRID).dequantize()
    return float(((D @ H) * D).sum(dtype=torch.float64))


def factor_row(theirs: Measured, ours: Measured, size: int) -> Row:
    """The factor of the inverse; unique, so equal up to rounding."""
    difference = float((theirs.output - ours.output).abs().max() / theirs.output.abs().max())
    return timed_row(
        "quantize.factor", "factor of the inverse Hessian", f"{size} x {size} float32",
        ("textbook", "dllmq"), (theirs, ours), equal=difference < 1e-3,
         numbers={"difference": difference},
    )  # fmt: skip


@torch.no_grad()
def gram(setup: Setup, sheet: Sheet, size: int) -> None:
    """H of {q, k, v}, which share their input: textbook one product a linear, ours one."""
    tokens = 16 if setup.quick else TOKENS
    rng = torch.Generator().manual_seed(0)
    shape = (BATCHES, 2, tokens // 2, size)
    inputs = torch.randn(shape, generator=rng).to(setup.device, setup.dtype)
    ones = torch.ones(shape[1:3], device=setup.device)

    def ours() -> Tensor:
        collector = StatsCollector(frozenset({"gram"}))
        for X in inputs:
            collector.add(X, ones, ones.bool())
        found = collector.result().gram
        assert found is not None
        return found

    flat = [X.flatten(0, 1) for X in inputs]
    runs: dict[str, Callable[[], Tensor]] = {
        "theirs": lambda: [textbook_gptq.running_gram(flat) for _ in ("q", "k", "v")][-1],
        "one": lambda: textbook_gptq.running_gram(flat),
        "ours": ours,
    }
    found = interleaved(runs, setup.repeats, setup.device)
    H, mine = found["theirs"].output * BATCHES * tokens, found["ours"].output  # their mean over tokens
    difference = float((H - mine).abs().max() / H.abs().max())
    name = f"{BATCHES} x {tokens} tokens of {size}, {setup.dtype_name}"
    for key, what, baseline in (
        ("quantize.gram", "Hessian of one linear", "one"),
        ("quantize.gram_group", "Hessian of q, k, v", "theirs"),
    ):
        row = timed_row(
            key, what, name, ("textbook", "dllmq"), (found[baseline], found["ours"]), difference < 1e-2,
             numbers={"difference": difference},
        )  # fmt: skip
        sheet.add(row)


# ------------------------------------------------------------------ AWQ


@torch.no_grad()
def awq_grid(setup: Setup, sheet: Sheet) -> None:
    """The search over 20 exponents for the four groups of one block.

    {q, k, v} and {gate, up} are judged by attention and the MLP, which both ways run for every candidate, on
    two sequences. attn_out and down are judged by their own outputs: ours comes from one Gram matrix, of as
    many tokens as calibration has, 128 states. (1B's values are grouped, so that its attn_out would not be
    scaled at all; its search is timed as that of a model whose values are not, as LLaDA-8B's.)
    """
    shape = "tiny" if setup.quick else "llada_1b_shape"
    model = build(shape, setup.device, setup.dtype, blocks=1)
    length = 32 if setup.quick else 128
    batches = 1 if setup.quick else STATES // BATCH
    for row in model.topology.groups:
        group = replace(linear_group(model, 0, row), can_scale=True)
        sizes = (batches, BATCH, length) if group.inspects_itself else (1, 2, length)
        sheet.add(awq_row(setup, group, f"block of {shape}", awq_inputs(setup, group, sizes)))


def awq_inputs(setup: Setup, group: LinearGroup, shape: tuple[int, int, int]) -> list[GroupInput]:
    """Random inputs of a group, (batches, B, L); some channels are seven times as large as others."""
    rng, width = torch.Generator().manual_seed(0), next(iter(group.weights.values())).shape[1]
    ones = torch.ones(shape[1:], device=setup.device)
    sizes = (1 + torch.arange(width) % 7).to(setup.device, setup.dtype)
    made = (torch.randn(*shape[1:], width, generator=rng) for _ in range(shape[0]))
    return [GroupInput(X.to(setup.device, setup.dtype) * sizes, ones, ones.bool()) for X in made]


def awq_row(setup: Setup, group: LinearGroup, where: str, inputs: list[GroupInput]) -> Row:
    """The textbook's search -> ours, with its rounding; equal: the exponent, or the loss of another one."""
    method, name = AWQ(NUM_EXPONENTS, clip=False), group.name.rpartition(".")[2]
    runs: dict[str, Callable[[], Any]] = {
        "theirs": lambda: textbook_losses(group, inputs),
        "ours": lambda: method(group, collect(method.needs, inputs), GRID),
    }
    found = interleaved(runs, setup.repeats, setup.device)
    losses, ours = found["theirs"].output, found["ours"].output.notes["awq_ratio"]
    theirs = losses.index(min(losses)) / NUM_EXPONENTS
    sequences, length = sum(len(batch.X) for batch in inputs), inputs[0].X.shape[1]
    as_small = losses[round(ours * NUM_EXPONENTS)] <= (1 + LOSS) * min(losses)
    return timed_row(
        f"quantize.awq_{name}", f"AWQ's grid of {name}",
        f"{where}, {sequences} x {length} tokens, {setup.dtype_name}",
        ("module run each time", "dllmq"), (found["theirs"], found["ours"]),
        equal=theirs == ours or (group.inspects_itself and as_small),
        numbers={"baseline_exponent": theirs, "exponent": ours},
    )  # fmt: skip


def textbook_losses(group: LinearGroup, inputs: list[GroupInput]) -> list[float]:
    """Of the exponents r = 0, 1/20, ...: the group's module is run once for every candidate."""
    flat = torch.cat([batch.X.flatten(0, 1) for batch in inputs]).float()
    mean_abs = flat.abs().mean(0)
    targets = [group.inspect(group.weights, batch.X, batch.valid) for batch in inputs]
    losses = []
    for i in range(NUM_EXPONENTS):
        s = scale_for(mean_abs, i / NUM_EXPONENTS)
        candidate = {name: fake_quant(W * s, GRID) / s for name, W in group.weights.items()}
        outputs = [group.inspect(candidate, batch.X, batch.valid) for batch in inputs]
        errors = ((y.float() - t.float()).square().sum() for y, t in zip(outputs, targets, strict=True))
        losses.append(float(torch.stack(list(errors)).sum()))
    return losses


# ------------------------------------------------------------------ end to end


def whole_block(setup: Setup, sheet: Sheet) -> None:
    """LLaDA-8B, everything on, from its trajectories to its codes; once, no ratio.

    All 32 blocks on a GPU with shape llada_8b_shape, else a model of one: its seconds times 32 are not those
    of the whole, and are not printed.
    """
    shape = "tiny" if setup.quick else "llada_8b_shape"
    whole = setup.device.type == "cuda" and setup.shape == "llada_8b_shape"
    if not whole and not setup.quick:
        sheet.leave_out("All 32 blocks of LLaDA-8B: measured on a GPU, with --shape llada_8b_shape.")
    try:
        check_room("llada_1b_shape" if shape == "llada_8b_shape" else shape, setup.device, torch.float32)
    except ValueError as error:
        sheet.leave_out(f"Not measured, a block of llada_8b_shape: {error}")
        return
    for method in METHODS:
        sheet.add(end_to_end(setup, shape, method, blocks=None if whole else 1))


def end_to_end(setup: Setup, shape: str, method: str, blocks: int | None) -> Row:
    """Quantizes a random model with TMAS, CGQ and IA-AQ at w4a4; seconds, and those of its stages."""
    model = build(shape, setup.device, setup.dtype, blocks)
    recipe = everything_on(METHODS[method], setup)
    rng = torch.Generator().manual_seed(2)
    most = 8 if setup.quick else 64
    lengths = [most - i % 4 for i in range(2 if setup.quick else 16)]
    prompts = [torch.randint(0, model.config.vocab_size - 500, (n,), generator=rng) for n in lengths]
    synchronize(setup.device)
    start = time.perf_counter()
    report = quantize(model, prompts, recipe)
    synchronize(setup.device)
    seconds = time.perf_counter() - start
    depth = len(model.blocks)
    name = f"{depth} block{'s' * (depth > 1)} of {shape} {setup.dtype_name}"
    return Row(
        f"quantize.{method}_blocks", f"{method} w4a4, TMAS, CGQ, IA-AQ, end to end",
        f"{name}, {recipe.num_states} states of {most + recipe.sampler.gen_length} tokens", "", "dllmq", "s",
        None, seconds, None, None, None, 1, note="once; includes full precision's trajectories",
        numbers=dict(report.seconds) | {"blocks": float(depth), "quantized_share": report.quantized_share},
    )  # fmt: skip


def everything_on(method: Method, setup: Setup) -> Recipe:
    """w4a4 with the attention product, TMAS, CGQ and IA-AQ; 128 states on a GPU, 16 on a CPU."""
    on_gpu = setup.device.type == "cuda"
    length = 8 if setup.quick else 64 if on_gpu else 32
    return Recipe(
        method, GRID, GRID, AttentionGrids(P=GRID, V=GRID), TMAS(), CGQ(), IAAQ, "iaaq",
        num_states=4 if setup.quick else 128 if on_gpu else 16, batch_size=2 if setup.quick else 16,
        sampler=SamplerConfig(gen_length=length, steps=length // (2 if on_gpu else 1), block_length=length),
    )  # fmt: skip

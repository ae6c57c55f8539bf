"""What a run will take, before it: seconds by stage and memory. No weight is read.

Time is arithmetic over one measured number. A run is forwards of the blocks; the seconds a block needs for a
token are measured here, on one block of the model's shape with random weights, on the run's device at its
dtype. Everything else is counted from the config:

    denoising      prompts x steps x (prompt + gen_length) tokens through every block, and the head at half of
                   the block's positions; twice that with guidance. With a cache only a block's first forward
                   is of the whole canvas, the others of what the cache leaves to be computed. With a
                   threshold gen_length steps are the most, one a block the least
    likelihood     problems x choices x mc_num x tokens, and the head at half the answer
    quantizing     per group of linears a partial forward of all states for its statistics, then the solver

What is not known before the run (the length of prompts, how many steps a threshold saves, where answers end)
is assumed and said. An estimate is good to a factor of two; the first cell of a sweep tells better
(`python -m dllmq.status`).

Legend: I, O inputs and outputs of a linear; G generated columns, L those of the canvas, n those of a block.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch

from dllmq.config import Plan, RunConfig
from dllmq.diffusion import SamplerConfig
from dllmq.evaluation import benchmarks
from dllmq.evaluation.batches import LARGEST
from dllmq.evaluation.settings import EvalSettings
from dllmq.evaluation.task_settings import sizes
from dllmq.evaluation.tasks import generates, published, task_config
from dllmq.methods import AWQ, FP
from dllmq.models.loading import checkpoint_folder, read_config, skeleton
from dllmq.models.memory import MemoryPlan, in_bytes, plan_memory

QUESTION = 160  # tokens assumed for a question with its answer, in the prompt of a published task
GENERATED = 34  # of the generated tasks and the calibration's generated problems
ANSWER, GENERATED_ANSWER, CHOICES = 24, 14, 4  # of a likelihood: tokens of an answer, answers of a problem
MOST_TOKENS = 2048  # in the forward that is timed
FACTOR, RATIOS = 1.0, 20  # I^3 of a Cholesky factor and its inverse; candidates of AWQ's scale
_MEASURED: dict[Any, float] = {}


@dataclass(frozen=True)
class Shape:
    """What costs: inputs and outputs of a block's linears by group, blocks, widths, vocabulary."""

    groups: tuple[tuple[int, int], ...]  # (I, sum of O)
    blocks: int
    d: int
    kv: int  # width of the keys, and of the values
    E: int

    @property
    def block_weights(self) -> int:
        return sum(I * O for I, O in self.groups)


@dataclass(frozen=True)
class Estimate:
    """Seconds by stage; `shared` is what the cells of a sweep make once.

    Attributes:
        shared: of full precision; cell: of one quantized cell.
        seconds_per_token: of one block, as measured.
        assumed: what was not known.
        cached: keys and values that are held while answers are generated, with their bytes; "" without a
            cache.
    """

    shared: dict[str, float]
    cell: dict[str, float]
    seconds_per_token: float
    memory: MemoryPlan
    assumed: list[str] = field(default_factory=list)
    cached: str = ""


def estimate(plan: Plan) -> Estimate:
    """Of a checked plan whose checkpoint is on this disk."""
    model = skeleton(*read_config(checkpoint_folder(plan.config.model_path)))
    config, recipe, shape = plan.config, plan.recipe, shape_of(model)
    dtype = getattr(torch, config.dtype())
    memory = plan_memory(config.memory, plan.parameters, dtype, plan.device)
    key = (shape, plan.device, dtype)
    if key not in _MEASURED:  # the cells of a sweep have one block
        _MEASURED[key] = seconds_per_token(model, plan.device, dtype)
    per_token = _MEASURED[key]
    exact = _task_tokens(config.decoded_exactly(), shape)  # full precision's, whatever approximates a cell's
    tasks = _task_tokens(config, shape)
    calibration = _denoised(config.calibration.num_prompts, GENERATED, recipe.sampler, shape)
    held_out = _denoised(config.eval.fidelity_prompts, GENERATED, recipe.sampler, shape)
    width = GENERATED + recipe.sampler.gen_length
    teacher = config.eval.fidelity_states * width * shape.blocks
    shared = dict(exact)
    cell = dict(tasks) if config.approximations() else {}
    if not isinstance(recipe.method, FP):
        shared["calibration states"] = calibration
        quantizing = quantize_tokens(recipe.method, config.calibration.num_states * width, shape)
        cell = {"quantize": quantizing} | tasks
        if config.eval.fidelity_states:
            shared["fidelity's reference"] = cell["fidelity"] = held_out + teacher
    return Estimate(
        {name: tokens * per_token for name, tokens in shared.items()},
        {name: tokens * per_token for name, tokens in cell.items()},
        per_token, memory, _assumptions(config), _cached(config, shape, dtype.itemsize),
    )  # fmt: skip


def shape_of(model: Any) -> Shape:
    block = model.blocks[0]
    weights = [[getattr(block, name).weight.shape for name in row.linears] for row in model.topology.groups]
    groups = tuple((shapes[0][1], sum(s[0] for s in shapes)) for shapes in weights)
    E, d = model.get_submodule(model.topology.head).weight.shape
    kv = model.config.kv_heads * model.config.head_dim
    return Shape(groups, len(model.blocks), int(d), int(kv), int(E))


@torch.no_grad()
def seconds_per_token(model: Any, device: str, dtype: torch.dtype, repeats: int = 3) -> float:
    """Of one block in full precision: the quickest of a few forwards over as many tokens as take a while.

    Args:
        model: a skeleton on the meta device; its first block gets random weights, its embedding one row.
    """
    block = model.blocks[0].to_empty(device=device).to(dtype)
    for p in block.parameters():
        p.normal_(std=0.02)
    d = shape_of(model).d
    model.embedding.weight = torch.nn.Parameter(torch.zeros(1, d, device=device, dtype=dtype))
    length = 128
    while True:
        x, ctx = torch.randn(max(1, length // 256), min(length, 256), d).to(device, dtype), None
        ctx = model.context(x.shape[1])
        seconds = []
        for _ in range(repeats):
            _wait(device)
            start = time.perf_counter()
            block(x, ctx)
            _wait(device)
            seconds.append(time.perf_counter() - start)
        if length >= MOST_TOKENS or min(seconds) > 0.05:
            return min(seconds) / (x.shape[0] * x.shape[1])
        length *= 2


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def quantize_tokens(method: Any, tokens: int, shape: Shape) -> float:
    """Tokens through a block that cost as much as quantizing all blocks does."""
    per_token = 2 * shape.block_weights  # floating-point operations of a block
    flops = float(per_token * tokens)  # the block itself, once it is quantized
    inputs = 0.0
    for I, O in shape.groups:
        inputs += 2.0 * I * O
        if method.needs:  # the block is run up to this group
            flops += inputs * tokens
        if "gram" in method.needs:
            flops += 2.0 * tokens * I * I + FACTOR * I**3 + O * I * I
        if isinstance(method, AWQ):
            flops += RATIOS * 2.0 * tokens * I * O
    return shape.blocks * flops / per_token


@dataclass(frozen=True)
class Requests:
    """What a task asks for: so many prompts, of so many tokens, generated from or scored by likelihood."""

    count: int
    prompt: int
    answer: int  # tokens of an answer that is scored
    shots: int | None = None  # of a published task


def requests_of(config: RunConfig, name: str, answer: EvalSettings) -> Requests:
    """A task's, where the length of its prompts is assumed."""
    limit = config.eval.limit
    if not published(name):
        size = task_config(name)["metadata"]["dllmq"]["test_size"]
        return Requests(limit or size, GENERATED, GENERATED_ANSWER)
    subtasks = benchmarks.benchmark(name).subtasks
    count = sizes()[name] if limit is None else min(limit * len(subtasks), sizes()[name])
    shots = subtasks[0].num_fewshot if answer.num_fewshot is None else answer.num_fewshot
    return Requests(count, QUESTION * (1 + shots), ANSWER, shots)


def _task_tokens(config: RunConfig, shape: Shape) -> dict[str, float]:
    """Tokens through a block that each task costs."""
    tokens = {}
    for name, answer in config.answers().items():
        asked = requests_of(config, name, answer)
        tokens[f"task {name}"] = (
            _denoised(asked.count, asked.prompt, answer.sampler, shape)
            if generates(name)
            else _scored(asked, answer, shape)
        )
    return tokens


def _scored(asked: Requests, answer: EvalSettings, shape: Shape) -> float:
    """Tokens through a block of a task's likelihoods."""
    copies = asked.count * CHOICES * answer.mc_num * (2 if answer.sampler.cfg_scale else 1)
    return copies * ((asked.prompt + asked.answer) * shape.blocks + _head(asked.answer / 2, shape))


def _denoised(count: int, prompt: int, sampler: SamplerConfig, shape: Shape) -> float:
    """Tokens through a block of `count` prompts denoised to the end; answers that end early cost less."""
    columns, forwards = denoised_columns(prompt, sampler)
    tokens = columns * shape.blocks + forwards * _head(sampler.block_length / 2, shape)
    return count * tokens * (2 if sampler.cfg_scale else 1)


def denoised_columns(prompt: int, sampler: SamplerConfig) -> tuple[int, int]:
    """Columns that go through every block until one answer of full length is there, and forwards; at most.

    A step that commits nothing is no forward; `steps` plays no part with a threshold. What a cache leaves to
    be computed attends to the whole canvas, so that a column costs what it costs without one.
    """
    G, n, blocks = sampler.gen_length, sampler.block_length, sampler.num_blocks
    visits = min(sampler.visits_per_block, n)
    L = prompt + G
    later = {
        "none": L * blocks,
        "prefix": sum(G - block * n for block in range(blocks)),
        "dual": G,
    }[sampler.cache]
    return blocks * L + (visits - 1) * later, blocks * visits


def _head(positions: float, shape: Shape) -> float:
    """The head at so many positions, in tokens through a block."""
    return positions * shape.d * shape.E / shape.block_weights


def _assumptions(config: RunConfig) -> list[str]:
    """What the arithmetic takes for granted, a sentence each."""
    found = [
        "answers are of full length (those that end early take less)",
        "a quantized forward takes as long as one in full precision",
        f"generated tasks, calibration and fidelity: prompts of {GENERATED} tokens",
    ]
    for name, answer in config.answers().items():
        asked = requests_of(config, name, answer)
        if asked.shots is not None:
            found.append(f"{name}: prompts of {asked.prompt} tokens ({asked.shots} examples)")
        if not generates(name):
            found.append(f"{name}: {CHOICES} answers of {asked.answer} tokens, {answer.mc_num} samples each")
        elif not answer.sampler.exact:
            found.append(f"{name}: {_approximated(asked.prompt, answer.sampler)}")
    return found


def _approximated(prompt: int, sampler: SamplerConfig) -> str:
    """How many forwards of what size a cache and a threshold leave, in words."""
    G, n, blocks = sampler.gen_length, sampler.block_length, sampler.num_blocks
    forwards = denoised_columns(prompt, sampler)[1]
    parts = []
    if sampler.cache != "none":
        what = (
            f"the block's {n} columns"
            if sampler.cache == "dual"
            else f"{n} to {G} columns, from the block's first"
        )
        parts.append(
            f"with cache={sampler.cache} {blocks} of an answer's forwards are of all {prompt + G} columns, "
            f"the others of {what}"
        )
    if sampler.threshold is not None:
        parts.append(
            f"threshold={sampler.threshold:g} takes at most {forwards} forwards an answer, at least "
            f"{blocks}; how many it saves is not known before the run"
        )
    return "; ".join(parts)


def _cached(config: RunConfig, shape: Shape, itemsize: int) -> str:
    """Keys, values and hidden states that the largest cache of a task holds, in words; "" without one."""
    sizes = {}
    for name, answer in config.answers().items():
        if generates(name) and answer.sampler.cache != "none":
            asked = requests_of(config, name, answer)
            most = LARGEST if isinstance(answer.batch_size, str) else answer.batch_size
            rows = min(most, asked.count)
            columns = asked.prompt + answer.sampler.gen_length
            size = rows * columns * (2 * shape.blocks * shape.kv + shape.d) * itemsize
            sizes[size] = f"{rows} prompt{'s' * (rows > 1)} of {name} at once, {columns} columns each"
    return f"{in_bytes(max(sizes))} ({sizes[max(sizes)]})" if sizes else ""


def told(found: Estimate) -> list[str]:
    """Lines for a dry run."""
    lines = [f"memory       {found.memory}"]
    lines += [f"KV cache     at most about {found.cached}"] if found.cached else []
    for what, stages in (("shared", found.shared), ("this cell", found.cell)):
        if stages:
            parts = ", ".join(f"{name} {duration(s)}" for name, s in stages.items())
            lines.append(f"time         {what}: at most about {duration(sum(stages.values()))} ({parts})")
    each = f"{found.seconds_per_token * 1e6:.1f} us"
    sentences = [
        f"a token through one block, with random weights, takes {each} here (measured)",
        *found.assumed,
    ]
    return lines + [f"{'assumed' if not i else '':12} {text}" for i, text in enumerate(sentences)]


def duration(seconds: float) -> str:
    """ "3 s", "12 min", "4.5 h", "2.1 d"."""
    for limit, unit, size in ((99, "s", 1), (99 * 60, "min", 60), (72 * 3600, "h", 3600)):
        if seconds < limit:
            value = seconds / size
            return f"{value:.1f} {unit}" if value < 10 else f"{value:.0f} {unit}"
    return f"{seconds / 86400:.1f} d"

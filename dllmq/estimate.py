"""What a run will take, before it: seconds by stage and memory. No weight is read.

Time is arithmetic over one measured number. A run is forwards of the blocks; the seconds a block needs for a
token are measured here, on one block of the model's shape with random weights, on the run's device at its
dtype. Everything else is counted from the config:

    denoising      steps x prompts x (prompt + gen_length) tokens through every block, and the head at half of
                   the generated positions; twice that with guidance
    likelihood     problems x choices x mc_num x tokens, and the head at half the answer
    quantizing     per group of linears a partial forward of all states for its statistics, then the solver

What is not known before the task files are read (the length of prompts) is assumed and said. An estimate is
good to a factor of two; the first cell of a sweep tells better (`python -m dllmq.status`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch

from dllmq.config import Plan
from dllmq.diffusion import SamplerConfig
from dllmq.evaluation import benchmarks
from dllmq.evaluation.settings import EvalSettings
from dllmq.evaluation.task_settings import sizes
from dllmq.evaluation.tasks import published, task_config
from dllmq.methods import AWQ, FP
from dllmq.models.loading import checkpoint_folder, read_config, skeleton
from dllmq.models.memory import MemoryPlan, plan_memory

QUESTION = 160  # tokens assumed for a question with its answer, in the prompt of a published task
GENERATED = 96  # of the embedded model's tasks
ANSWER, CHOICES = 24, 4  # of a likelihood: tokens of an answer, answers of a problem
MOST_TOKENS = 2048  # in the forward that is timed
FACTOR, RATIOS = 1.0, 20  # I^3 of a Cholesky factor and its inverse; candidates of AWQ's scale
_MEASURED: dict[Any, float] = {}


@dataclass(frozen=True)
class Shape:
    """What costs: inputs and outputs of a block's linears by group, blocks, width, vocabulary."""

    groups: tuple[tuple[int, int], ...]  # (I, sum of O)
    blocks: int
    d: int
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
    """

    shared: dict[str, float]
    cell: dict[str, float]
    seconds_per_token: float
    memory: MemoryPlan
    assumed: list[str] = field(default_factory=list)


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
    assumed: list[str] = []
    tasks = {f"task {n}": _task_tokens(config, n, a, shape, assumed) for n, a in config.answers().items()}
    calibration = _denoised(config.calibration.num_prompts, GENERATED, recipe.sampler, shape)
    held_out = _denoised(config.eval.fidelity_prompts, GENERATED, recipe.sampler, shape)
    width = GENERATED + recipe.sampler.gen_length
    teacher = config.eval.fidelity_states * width * shape.blocks
    assumed.append(f"prompts of {GENERATED} tokens for calibration and fidelity")
    shared = dict(tasks)
    cell: dict[str, float] = {}
    if not isinstance(recipe.method, FP):
        shared["calibration states"] = calibration
        quantizing = quantize_tokens(recipe.method, config.calibration.num_states * width, shape)
        cell = {"quantize": quantizing} | tasks
        if config.eval.fidelity_states:
            shared["fidelity's reference"] = cell["fidelity"] = held_out + teacher
    return Estimate(
        {name: tokens * per_token for name, tokens in shared.items()},
        {name: tokens * per_token for name, tokens in cell.items()},
        per_token, memory, assumed,
    )  # fmt: skip


def shape_of(model: Any) -> Shape:
    block = model.blocks[0]
    weights = [[getattr(block, name).weight.shape for name in row.linears] for row in model.topology.groups]
    groups = tuple((shapes[0][1], sum(s[0] for s in shapes)) for shapes in weights)
    E, d = model.get_submodule(model.topology.head).weight.shape
    return Shape(groups, len(model.blocks), int(d), int(E))


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


def _task_tokens(config: Any, name: str, answer: EvalSettings, shape: Shape, assumed: list[str]) -> float:
    """Tokens through a block that a task costs."""
    if not published(name):
        own = task_config(name)
        count, prompt = config.eval.limit or own["metadata"]["dllmq"]["test_size"], GENERATED
        kind = own["output_type"]
    else:
        subtasks = benchmarks.benchmark(name).subtasks
        limit = config.eval.limit
        count = sizes()[name] if limit is None else min(limit * len(subtasks), sizes()[name])
        shots = subtasks[0].num_fewshot if answer.num_fewshot is None else answer.num_fewshot
        prompt, kind = QUESTION * (1 + shots), subtasks[0].config["output_type"]
        assumed.append(f"{name}: prompts of {prompt} tokens ({shots} examples)")
    if kind == "generate_until":
        return _denoised(count, prompt, answer.sampler, shape)
    copies = count * CHOICES * answer.mc_num * (2 if answer.sampler.cfg_scale else 1)
    return copies * ((prompt + ANSWER) * shape.blocks + _head(ANSWER / 2, shape))


def _denoised(count: int, prompt: int, sampler: SamplerConfig, shape: Shape) -> float:
    """Tokens through a block of `count` prompts denoised to the end; answers that end early cost less."""
    steps = min(sampler.steps, sampler.gen_length)
    width = (prompt + sampler.gen_length) * shape.blocks + _head(sampler.block_length / 2, shape)
    return count * steps * width * (2 if sampler.cfg_scale else 1)


def _head(positions: float, shape: Shape) -> float:
    """The head at so many positions, in tokens through a block."""
    return positions * shape.d * shape.E / shape.block_weights


def told(found: Estimate) -> list[str]:
    """Lines for a dry run."""
    lines = [f"memory       {found.memory}"]
    for what, stages in (("shared", found.shared), ("this cell", found.cell)):
        if stages:
            parts = ", ".join(f"{name} {duration(s)}" for name, s in stages.items())
            lines.append(f"time         {what}: at most about {duration(sum(stages.values()))} ({parts})")
    lines.append(
        f"             estimated from one block with random weights, {found.seconds_per_token * 1e6:.1f} us "
        f"a token here; answers that end early take less; assumed: {'; '.join(found.assumed)}"
    )
    return lines


def duration(seconds: float) -> str:
    """ "3 s", "12 min", "4.5 h", "2.1 d"."""
    for limit, unit, size in ((99, "s", 1), (99 * 60, "min", 60), (72 * 3600, "h", 3600)):
        if seconds < limit:
            value = seconds / size
            return f"{value:.1f} {unit}" if value < 10 else f"{value:.0f} {unit}"
    return f"{seconds / 86400:.1f} d"

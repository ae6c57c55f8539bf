"""Section `generate`: the plain loop against ours; full precision against packed widths; caches, thresholds.

Exact rows claim equal tokens where the model is float32. In bfloat16 many confidences are exactly equal and
their order is the softmax's rounding, so the share of equal tokens is shown and nothing is claimed. Widths
are rounded to nearest (the values do not change the time), inputs quantized by token, the attention product
left in full precision.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from dllmq.bench.reference_loop import plain_generate
from dllmq.bench.rows import Row, Sheet, timed_row
from dllmq.bench.shapes import Setup, Work, batch_sizes, build, check_room, work
from dllmq.bench.timing import Measured, interleaved
from dllmq.calibration.states import CalibrationState
from dllmq.diffusion import Generation, SamplerConfig, generate
from dllmq.methods import RTN
from dllmq.numerics import Grid
from dllmq.pipeline import quantize, set_backend
from dllmq.recipe import FULL_PRECISION_BITS, Bits, Recipe

WIDTHS = ("w8a8", "w4a8", "w4a4")
TARGETS_FIRST = ("w4a8", "w4a4", "w8a8")  # on a GPU, where time may run out (experiments/speed/gpu.py)
THRESHOLD = 0.9
APPROXIMATE = "approximate"
# Generations until every shape has been recorded (models/graphs.py): one that comes once each time is in the
# second, and the whole canvas of a cache, which counts only once such a slice is there, two later.
WARM_UPS = 4
RANDOM = (
    "Thresholds are not measured on random weights: every confidence is about 1 / vocabulary, so no step "
    "would commit more than one token. See the embedded model's rows."
)


def measure(setup: Setup, sheet: Sheet) -> None:
    """Adds the section's rows; on a GPU, where time may run out, those with a target first."""
    check_room(setup.shape, setup.device, setup.dtype)
    model = build(setup.shape, setup.device, setup.dtype)
    on_gpu, (first, *others) = setup.device.type == "cuda", batch_sizes(setup)
    loops(setup, sheet, model, work(setup, first))
    for batch in others if not on_gpu else ():
        loops(setup, sheet, model, work(setup, batch))
    for name in TARGETS_FIRST if on_gpu else WIDTHS:
        packed = copy.deepcopy(model)
        quantize_in_place(packed, name)
        if backend := packs(packed, name, sheet):
            for batch in sorted(batch_sizes(setup), reverse=on_gpu):
                widths(setup, sheet, (model, packed), work(setup, batch), f"{name} {backend}")
        del packed
    for batch in others if on_gpu else ():
        loops(setup, sheet, model, work(setup, batch))


def loops(setup: Setup, sheet: Sheet, model: Any, job: Work) -> None:
    """The plain loop, ours, and ours with what is approximate, in the same rounds."""
    graphs = as_evaluated(model) is not model
    runs: dict[str, Callable[[], Generation]] = {
        "plain": lambda: plain_generate(model, job.prompts, job.sampler, job.mask),
        "exact": generating(model, job.sampler, job),
    }
    if graphs:
        runs["eager"] = lambda: generate(model, job.prompts, job.sampler, job.mask)
    for variant in variants(setup, job.sampler, sheet):
        runs[variant.key] = generating(model, variant.sampler, job)
    with torch.no_grad():
        found = interleaved(runs, setup.repeats, setup.device)
    plain, exact = found["plain"], found["exact"]
    sheet.add(exact_row(setup, (plain, exact), job))
    if graphs:
        row = exact_row(setup, (plain, found["eager"]), job)
        sheet.add(replace(row, key="generate.eager", what="exact generation without CUDA graphs"))
    for variant in variants(setup, job.sampler, sheet):
        sheet.add(approximate_row(variant, (exact, found[variant.key]), job))


def generating(model: Any, sampler: SamplerConfig, job: Work) -> Callable[[], Generation]:
    """What generates as evaluation does; on CUDA everything it replays is recorded already, so that no
    recording is timed. Its recordings are its own: those of other settings would take their room.
    """
    ours = as_evaluated(model)

    def run() -> Generation:
        return generate(ours, job.prompts, sampler, job.mask)

    if ours is not model:
        with torch.no_grad():
            for _ in range(WARM_UPS):
                run()
    return run


def exact_row(setup: Setup, pair: tuple[Measured, Measured], job: Work) -> Row:
    """Plain loop -> ours; equality is claimed in float32."""
    share = token_share(pair[0].output, pair[1].output, job)
    claimed = setup.dtype == torch.float32
    return timed_row(
        "generate.exact", "exact generation", job.name, ("plain loop", "dllmq"), pair,
        equal=share == 1.0 if claimed else None, share=share, numbers=forwards(pair),
    )  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """An approximate way to generate."""

    key: str
    what: str
    sampler: SamplerConfig


def variants(setup: Setup, sampler: SamplerConfig, sheet: Sheet) -> list[Variant]:
    """What this version of dllmq has of caches and thresholds; the rest is left out with a sentence."""
    wanted: list[tuple[str, str, dict[str, Any]]] = [
        ("prefix", "prefix cache", {"cache": "prefix"}),
        ("dual", "dual cache", {"cache": "dual"}),
    ]
    if setup.shape == "mini":
        both = {"cache": "dual", "threshold": THRESHOLD}
        wanted += [
            ("threshold", f"threshold {THRESHOLD}", {"threshold": THRESHOLD}),
            (
                "dual_threshold",
                f"dual cache, threshold {THRESHOLD}",
                both,
            ),
        ]
    else:
        sheet.leave_out(RANDOM)
    found = []
    for key, what, changes in wanted:
        try:
            found.append(Variant(key, what, replace(sampler, **changes)))
        except ValueError as error:
            sheet.leave_out(f"Not measured, {what}: {error}")
    return found


def approximate_row(variant: Variant, pair: tuple[Measured, Measured], job: Work) -> Row:
    """Ours exact -> ours with a cache or a threshold."""
    share = token_share(pair[0].output, pair[1].output, job)
    return timed_row(
        f"generate.{variant.key}", variant.what, job.name, ("dllmq, exact", variant.what), pair,
        share=share, note=APPROXIMATE, numbers=forwards(pair),
    )  # fmt: skip


def widths(setup: Setup, sheet: Sheet, models: tuple[Any, Any], job: Work, name: str) -> None:
    """Full precision against a packed width, the same loop."""
    full, packed = (generating(model, job.sampler, job) for model in models)
    runs = {setup.dtype_name: full, name: packed}
    with torch.no_grad():
        found = interleaved(runs, setup.repeats, setup.device)
    pair = found[setup.dtype_name], found[name]
    trained = setup.shape == "mini"
    row = timed_row(
        f"generate.{name.partition(' ')[0]}", name, job.name,
        (f"dllmq, {setup.dtype_name}", f"dllmq, {name}"), pair,
        share=token_share(pair[0].output, pair[1].output, job) if trained else None,
        numbers=forwards(pair),
    )  # fmt: skip
    sheet.add(row)


def packs(model: Any, bits: str, sheet: Sheet) -> str:
    """Changes a quantized model to the packed backend and names it; "" and a sentence where there is none."""
    try:
        return set_backend(model, "packed")
    except ValueError as error:
        sheet.leave_out(f"Not measured, {bits} packed: {error}")
        return ""


def as_evaluated(model: Any) -> Any:
    """The model as evaluation runs it: on CUDA forwards are replayed as CUDA graphs, if this version can."""
    if model.device.type != "cuda" or find_spec("dllmq.models.graphs") is None:
        return model
    return import_module("dllmq.models.graphs").graphed(model)


def quantize_in_place(model: Any, bits: str, compact: bool = False) -> None:
    """Rounds a model to nearest: one scale per output channel and per token.

    compact: it keeps packed codes alone.
    """
    width = Bits.parse(bits)
    inputs = None if width.activation == FULL_PRECISION_BITS else Grid(width.activation)
    recipe = Recipe(RTN(), Grid(width.weight), inputs)
    quantize(model, [], recipe, states=[toy_state(model)], compact=compact)


def toy_state(model: Any) -> CalibrationState:
    """A state for methods that read none."""
    tokens = torch.full((1, 4), model.config.mask_token_id)
    yes, no = torch.ones(1, 4, dtype=torch.bool), torch.zeros(1, 4, dtype=torch.bool)
    return CalibrationState(tokens, no, yes, yes, torch.zeros(1, 4), torch.zeros(1, dtype=torch.long), 1)


def token_share(a: Generation, b: Generation, job: Work) -> float:
    """Share of generated tokens that are equal."""
    P = job.prompts.shape[1]
    same: Tensor = a.tokens[:, P:].cpu() == b.tokens[:, P:].cpu()
    return float(same.float().mean())


def forwards(pair: tuple[Measured, Measured]) -> dict[str, float]:
    """Model calls of both; every answer of a batch takes part in each of them."""
    theirs, ours = (float(m.output.forwards) for m in pair)
    return {"forwards": ours, "baseline_forwards": theirs}

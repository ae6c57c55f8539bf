"""The block loop: quantizes a model in place, group by group, from calibration states.

    x = embed(states)
    for each block:
        for each of its groups, in execution order:
            statistics of the group's input (the groups before it are quantized already)
            update = method(group, statistics, grid);  swap in QuantLinear
        x = block(x)                                   (so every block sees the quantized prefix)

In memory meanwhile: the block at hand (of a streamed model; else all of them), the statistics of one group,
and the hidden states x on the CPU or on disk (calibration/hidden.py). A finished block stays as it is, or as
packed codes (`compact`), or is taken by `on_block`, which may write it out and free it: `block.to("meta")`.

It names no method and no technique: those are values in the recipe's slots.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dllmq import interrupt
from dllmq.calibration.hidden import HiddenStates, Spill
from dllmq.calibration.observe import AttentionInputs, attention_inputs, group_input
from dllmq.calibration.states import CalibrationState, Trajectory, describe, draw_states, record_trajectories
from dllmq.calibration.stats import GroupStats, StatsCollector
from dllmq.methods import FP
from dllmq.methods.base import GroupUpdate
from dllmq.models.attention import (
    QuantizedProduct,
    attention_maps,
    quantize_map,
    quantize_queries_keys,
)
from dllmq.models.base import Block, BlockContext, GroupRow, absorb_scale, linear_group
from dllmq.models.block_store import BlockStore, Grids
from dllmq.models.fused_norms import place_norms
from dllmq.models.linear import InputQuantizer, QuantLinear
from dllmq.models.streaming import compact_block, give_back_freed_memory, is_streamed, log_reading
from dllmq.recipe import AttentionGrids, Recipe

log = logging.getLogger(__name__)
Progress = Callable[[int, int, str], None]
OnBlock = Callable[[int, Block], None]
_IN_MEMORY = Spill()


@dataclass(frozen=True)
class QuantizationReport:
    """What a quantization did.

    Attributes:
        quantized_share: parameters inside quantized linears / all parameters.
        weight_bytes: bytes of all weights, quantized ones at their packed size.
        states: what calibrated (`calibration.states.describe`).
        notes: group -> numbers from the method; seconds: by stage.
    """

    quantized_share: float
    weight_bytes: int
    states: dict[str, Any]
    notes: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Batch:
    """One batch of states on its way through the blocks: x [B, L, d] is the current block's input."""

    x: Tensor
    ctx: BlockContext
    valid: Tensor
    weight: Tensor  # c_j, 0 at pads


class _Batches:
    """The calibration set between two blocks; iterating brings one batch at a time to the model's device."""

    def __init__(self, model: Any, states: list[CalibrationState], recipe: Recipe, spill: Spill) -> None:
        self.model, self.states, self.recipe = model, states, recipe
        shapes = [(*state.tokens.shape, _width(model)) for state in states]
        self.hidden = HiddenStates(shapes, model.dtype, model.device, spill)
        for i, state in enumerate(states):
            self.hidden[i] = model.embed(state.tokens.to(model.device))

    def __iter__(self) -> Iterator[_Batch]:
        for i, state in enumerate(self.states):
            valid = state.valid.to(self.model.device)
            weight = self.recipe.token_weight(state).to(valid.device).float().masked_fill(~valid, 0.0)
            yield _Batch(self.hidden[i], self.model.context(valid.shape[1], valid), valid, weight)

    def advance(self, block: Block) -> None:
        """x -> block(x)."""
        for i, b in enumerate(self):
            self.hidden[i] = block(b.x, b.ctx)


def quantize(
    model: Any,
    prompts: list[Tensor],
    recipe: Recipe,
    trajectories: list[Trajectory] | None = None,
    progress: Progress | None = None,
    states: list[CalibrationState] | None = None,
    compact: bool = False,
    spill: Spill = _IN_MEMORY,
    on_block: OnBlock | None = None,
    store: BlockStore | None = None,
) -> QuantizationReport:
    """Quantizes `model` in place.

    Args:
        model: a `MaskPredictor` in full precision.
        prompts: calibration prompts, token ids [P] each.
        recipe: what to do.
        trajectories: recorded full-precision trajectories of the prompts, where there are some already.
        progress: told (done, total, stage).
        states: the calibration set, where it has been drawn already (`calibration_states`).
        compact: finished blocks keep their weights as packed codes alone; always so with a streamed model.
        spill: when the calibration set's hidden states go to disk.
        on_block: given each block (index, block) when it is finished; may free it with `block.to("meta")`.
        store: where finished blocks are kept until the run ends; those of an earlier run are not made again.

    Raises:
        Interrupted: after a signal, when the block at hand is finished.
        ValueError: what a user can mend (sizes that do not divide, a singular Hessian with the layer's name).
    """
    if isinstance(recipe.method, FP) or recipe.weights is None:
        return QuantizationReport(0.0, weight_bytes(model), {})
    if quantized_linears(model) or hasattr(model, "stored"):
        raise ValueError(
            "the model is quantized already, and would be a second time: load the full-precision checkpoint."
        )
    started = time.perf_counter()
    if states is None:
        states = calibration_states(model, prompts, recipe, trajectories, progress)
    drawn = describe(states) | {"token_weight": weight_summary(states, recipe)}
    log.info(
        "calibration: %s, %d sequences, %d tokens, by mask-ratio block %s",
        *(recipe.states.name, drawn["sequences"], drawn["tokens"], drawn["by_block"]),
    )
    calibrated = time.perf_counter()
    notes = quantize_blocks(model, states, recipe, progress, compact, spill, on_block, store)
    done = time.perf_counter()
    return QuantizationReport(
        quantized_share=quantized_share(model),
        weight_bytes=weight_bytes(model),
        states=drawn | {"sampler": recipe.states.name},
        notes=notes,
        seconds={"calibrate_s": calibrated - started, "quantize_s": done - calibrated},
    )


def calibration_states(
    model: Any,
    prompts: list[Tensor],
    recipe: Recipe,
    trajectories: list[Trajectory] | None = None,
    progress: Progress | None = None,
) -> list[CalibrationState]:
    """The calibration set of a recipe; runs full precision on the prompts where no trajectories are given."""
    if trajectories is None:
        forwards = -(-len(prompts) // recipe.batch_size) * recipe.sampler.steps
        log_reading(model, "trajectories", forwards)
        trajectories = record_trajectories(
            model, prompts, recipe.sampler, recipe.batch_size, recipe.seed, recipe.observe, progress
        )
    return draw_states(
        model, trajectories, recipe.states, recipe.num_states, recipe.batch_size, recipe.seed, recipe.sampler,
        recipe.observe,
    )  # fmt: skip


def weight_summary(states: list[CalibrationState], recipe: Recipe) -> dict[str, float | None]:
    """Mean weight c_j of masked and of other tokens."""
    weights = [recipe.token_weight(s).float() for s in states]

    def mean(chosen: list[Tensor]) -> float | None:
        values = torch.cat([w[at] for w, at in zip(weights, chosen, strict=True)])
        return float(values.mean()) if len(values) else None

    return {
        "masked": mean([s.masked & s.valid for s in states]),
        "unmasked": mean([~s.masked & s.valid for s in states]),
    }


def set_backend(model: Any, backend: str) -> str:
    """Changes a quantized model's linears to a backend and names it: fake, packed and the kernels
    (packed:onednn, packed:int4+onednn), or "" where none is quantized.

    `auto` is packed where every linear has a kernel and all are faster with it (kernels/backends.py), in
    whatever form they are held, so that memory changes no number; fake otherwise.

    Raises:
        ValueError: packed, where a linear has no kernel.
    """
    linears = quantized_linears(model)
    if not linears:
        return ""
    unfit = [name for name, linear in linears.items() if not linear.can_pack()]
    if backend == "packed" and unfit:
        raise ValueError(
            f"backend=packed has no kernel for {unfit[0]}: its grids, size or device do not fit, or the int8 "
            "product errs on this processor. Use backend=fake or auto."
        )
    packed = backend == "packed" or (
        backend == "auto" and not unfit and all(x.pays for x in linears.values())
    )
    for linear in linears.values():
        linear.pack() if packed else linear.unpack()
    place_norms(model)
    names = {linear.backend.removeprefix("packed:") for linear in linears.values()}
    return f"packed:{'+'.join(sorted(names))}" if packed else "fake"


@torch.no_grad()
def quantize_blocks(
    model: Any,
    states: list[CalibrationState],
    recipe: Recipe,
    progress: Progress | None = None,
    compact: bool = False,
    spill: Spill = _IN_MEMORY,
    on_block: OnBlock | None = None,
    store: BlockStore | None = None,
) -> dict[str, dict[str, float]]:
    """The loop on top of this file; arguments as `quantize`. Returns the method's notes by group.

    Hidden states go through restored blocks only when a block behind them has to be quantized.
    """
    assert recipe.weights is not None, "full precision has no loop"
    compact = compact or is_streamed(model)
    batches = _Batches(model, states if recipe.reads_states else [], recipe, spill)
    notes: dict[str, dict[str, float]] = {}
    last, behind = len(model.blocks) - 1, list[Block]()  # finished blocks that the hidden states are before

    def catch_up() -> None:
        while behind:
            batches.advance(behind.pop(0))

    def quantize_one(index: int, block: Block) -> dict[str, dict[str, float]]:
        catch_up()
        return _quantize_block(model, index, block, batches, recipe)

    with closing(batches.hidden):
        for index, block in enumerate(model.blocks):
            make, restored = partial(quantize_one, index, block), False
            if store is None:
                notes |= make()
            else:
                own, restored = store.settle(index, block, model.topology, _grids(recipe), make)
                notes |= own
            behind.append(block)
            if index < last and not (restored and on_block is None):  # on_block may free it
                catch_up()
            if on_block is not None:
                on_block(index, block)
            if compact:
                compact_block(model, index)
            if progress is not None:
                progress(index + 1, len(model.blocks), "blocks")
            interrupt.check()
    return notes


def _grids(recipe: Recipe) -> Grids:
    grids = recipe.attention
    return Grids(recipe.inputs, grids.P, grids.V, grids.QK)


def _quantize_block(
    model: Any, index: int, block: Block, batches: _Batches, recipe: Recipe
) -> dict[str, dict[str, float]]:
    """Quantizes a block, group by group; notes by group."""
    assert recipe.weights is not None
    notes = {}
    for row in model.topology.groups:
        if row.name == model.topology.product_before and (found := _settle_product(block, batches, recipe)):
            notes[f"blocks.{index}.product"] = found
        group = linear_group(model, index, row)
        stats = _statistics(block, row, batches, recipe.method.needs)
        if is_streamed(model):
            give_back_freed_memory()
        update = recipe.method(group, stats, recipe.weights)
        _apply(block, row, update, recipe, model.dtype)
        notes[group.name] = update.notes
    return notes


def _width(model: Any) -> int:
    """d, the width of the residual stream."""
    return int(model.get_submodule(model.topology.embedding).weight.shape[1])


def _statistics(block: Block, row: GroupRow, batches: _Batches, needs: frozenset[str]) -> GroupStats:
    """Statistics of a group's input over all states; nothing is run when the method asks for nothing."""
    if not needs:
        return GroupStats()
    collector = StatsCollector(needs)
    for b in batches:
        collector.add(group_input(block, row.linears[0], b.x, b.ctx), b.weight, b.valid)
    return collector.result()


def _settle_product(block: Block, batches: _Batches, recipe: Recipe) -> dict[str, float]:
    """Quantizes the attention product: V's static parameters from two passes over the states."""
    grids = recipe.attention
    if grids == AttentionGrids():
        return {}
    params, notes = None, {}
    if grids.V is not None:
        scale = recipe.value_scale(grids.V)
        for b in batches:
            scale.range(attention_inputs(block, b.x, b.ctx).V.transpose(1, 2)[b.valid])
        second: Iterable[_Batch] = batches if scale.needs else ()
        for b in second:
            inputs = attention_inputs(block, b.x, b.ctx)
            V = inputs.V.masked_fill(~b.valid[:, None, :, None], 0.0)
            for P in _read_maps(inputs, grids, b.valid) if "maps" in scale.needs else (None,):
                scale.accumulate(V, P)
        params = scale.result()
        notes = scale.notes()
    block.product = QuantizedProduct(grids.P, grids.V, params, grids.QK)
    return notes


def _read_maps(inputs: AttentionInputs, grids: AttentionGrids, valid: Tensor) -> Iterator[Tensor]:
    """P as the quantized product will have it, in pieces [B, heads, q, L] of the queries.

    Rows of pad queries are 0, so that no loss counts them.
    """
    Q, K = quantize_queries_keys(inputs.Q, inputs.K, grids.QK)
    start = 0
    for P in attention_maps(Q, K, inputs.bias):
        stop = start + P.shape[2]
        P = P if grids.P is None else quantize_map(P, grids.P)
        yield P.masked_fill(~valid[:, None, start:stop, None], 0.0)
        start = stop


def _apply(block: Block, row: GroupRow, update: GroupUpdate, recipe: Recipe, dtype: torch.dtype) -> None:
    """Moves the update's scale into the op before the group and swaps in the quantized linears."""
    if update.scale is not None:
        absorb_scale(block, row, update.scale)
    inputs = InputQuantizer(recipe.inputs, readers=len(update.weights))
    for name, quantized in update.weights.items():
        linear = getattr(block, name)
        setattr(block, name, QuantLinear(quantized, linear.bias, inputs, dtype))


def quantized_linears(model: Any) -> dict[str, QuantLinear]:
    """Every quantized linear by its dotted name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}


def quantized_share(model: Any) -> float:
    """Parameters inside quantized linears / all parameters."""
    inside = sum(math.prod(m.shape) for m in quantized_linears(model).values())
    return inside / (inside + _other_parameters(model))


def weight_bytes(model: Any) -> int:
    """Bytes of all weights: packed codes, scales and zeros where quantized, 2 bytes (bf16) elsewhere."""
    return 2 * _other_parameters(model) + sum(m.nbytes for m in quantized_linears(model).values())


def _other_parameters(model: Any) -> int:
    """Number of parameters that are not quantized weights."""
    inside = {id(m.weight) for m in quantized_linears(model).values() if m.holds_weight}
    return sum(p.numel() for p in model.parameters() if id(p) not in inside)


def check_group_sizes(model: Any, recipe: Recipe) -> None:
    """Whether the grids fit every block linear; the model may be on the meta device.

    Raises:
        ValueError: a group size that does not divide a linear's inputs, with its name.
    """
    for row in model.topology.groups:
        for name in row.linears:
            inputs = getattr(model.blocks[0], name).weight.shape[1]
            for key, grid, unit in (
                ("group_size", recipe.weights, "output channel"),
                ("act_group_size", recipe.inputs, "token"),
            ):
                if grid is not None and grid.group_size > 0 and inputs % grid.group_size:
                    raise ValueError(
                        f"{key}={grid.group_size} does not divide the {inputs} inputs of {name}; use a "
                        f"divisor of {inputs}, or -1 for one scale per {unit}."
                    )

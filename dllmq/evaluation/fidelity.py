"""Fidelity: how far a quantized model's predictions are from full precision, on full precision's states.

Teacher-forced, on states of held-out full-precision trajectories, at masked positions:

    KL(fp || q) = sum_v p_fp(v) log(p_fp(v) / p_q(v))       nats
    top-1       = 1[argmax p_fp = argmax p_q]

A state's value is the mean over its masked positions. Figures over states carry the standard error over
*prompts* (states of one prompt are not independent). Curves: by denoising step, and by block of the mask
ratio (0 = most masked).
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dllmq.calibration.states import (
    CalibrationState,
    RowState,
    Trajectory,
    batches_of,
    iterate_rows,
    ratio_block,
)
from dllmq.evaluation.statistics import mean_stderr

BLOCKS = 4
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class FidelityReference:
    """Held-out states and full precision's log-probabilities at their masked positions.

    Attributes:
        states: batches; positions: [B, L] of each batch, where log_probs were taken, row-major.
        log_probs: per batch [n, E].
        prompt: per batch [B], which prompt a row came from.
    """

    states: list[CalibrationState]
    positions: list[Tensor]
    log_probs: list[Float[Tensor, "_ E"]]
    prompt: list[Int[Tensor, " _"]]


@dataclass(frozen=True)
class Fidelity:
    """Figures {"kl", "top1"} with value, stderr, n (states), and the curves."""

    values: dict[str, dict[str, float | int]]
    curves: dict[str, dict[str, list[float | int]]]


def select_states(trajectories: list[Trajectory], count: int, seed: int) -> list[RowState]:
    """`count` states of the trajectories, each step of each prompt as likely as any other."""
    rows = list(iterate_rows(trajectories))
    rng = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(rows), generator=rng)[:count].sort().values.tolist()
    return [rows[i] for i in chosen]


def _some_positions(masked: Tensor, most: int | None, rng: torch.Generator) -> Tensor:
    """At most `most` masked positions of each row, drawn at random."""
    if most is None:
        return masked
    rank = torch.where(masked, torch.rand(masked.shape, generator=rng), 2.0).argsort(1).argsort(1)
    return masked & (rank < most)


@torch.no_grad()
def reference(
    model: Any,
    trajectories: list[Trajectory],
    count: int,
    batch_size: int,
    seed: int = 0,
    positions_per_state: int | None = None,
) -> FidelityReference:
    """Full precision's predictions on `count` held-out states.

    Args:
        positions_per_state: at most so many masked positions of each state, None for all (a position takes
            E x 4 bytes).
    """
    rows = select_states(trajectories, count, seed)
    states = batches_of(rows, batch_size, model.config.eos_token_id, trajectories[0].num_steps)
    rng = torch.Generator().manual_seed(seed)
    positions = [_some_positions(s.masked, positions_per_state, rng) for s in states]
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i].tokens), i))
    prompts = torch.tensor([rows[i].prompt for i in order]).split([len(s.step) for s in states])
    log_probs = [log_probabilities(model, s, p) for s, p in zip(states, positions, strict=True)]
    return FidelityReference(states, positions, log_probs, list(prompts))


@torch.no_grad()
def log_probabilities(model: Any, state: CalibrationState, positions: Tensor) -> Float[Tensor, "n E"]:
    """log p(. | x_t) at the given positions, row-major, in fp32 on CPU."""
    h = model.hidden_states(state.tokens.to(model.device), state.valid.to(model.device))
    return torch.log_softmax(model.head(h[positions.to(model.device)]).float(), -1).cpu()


@torch.no_grad()
def measure(model: Any, ref: FidelityReference, progress: Progress | None = None) -> Fidelity:
    """Compares a model with the reference."""
    per_batch: dict[str, list[Tensor]] = {"kl": [], "top1": []}
    for number, (state, at, p) in enumerate(zip(ref.states, ref.positions, ref.log_probs, strict=True)):
        q = log_probabilities(model, state, at)
        kl, same = (p.exp() * (p - q)).sum(-1), (p.argmax(-1) == q.argmax(-1)).float()
        per_batch["kl"].append(_row_means(kl, at))
        per_batch["top1"].append(_row_means(same, at))
        if progress is not None:
            progress(number + 1, len(ref.states), "fidelity")
    step = torch.cat([s.step for s in ref.states])
    block = ratio_block(torch.cat([s.mask_ratio for s in ref.states]), BLOCKS)
    prompt = torch.cat(ref.prompt)
    values, curves = {}, {}
    for name, parts in per_batch.items():
        per_state = torch.cat(parts)
        values[name] = _clustered(per_state, prompt)
        curves[f"{name}_by_step"] = _curve(step, per_state)
        curves[f"{name}_by_mask_ratio"] = _curve(block, per_state)
    return Fidelity(values, curves)


def _row_means(values: Float[Tensor, " n"], at: Bool[Tensor, "B L"]) -> Float[Tensor, " B"]:
    """Mean of each row's values, which lie at its positions `at` in row-major order."""
    sums = torch.zeros(len(at)).index_add_(0, at.nonzero()[:, 0], values)
    return sums / at.sum(1).clamp(min=1)


def _clustered(per_state: Tensor, prompt: Tensor) -> dict[str, float | int]:
    """Mean over states; standard error over prompts, which have unequal numbers of states."""
    mean = per_state.mean()
    ids, inverse = prompt.unique(return_inverse=True)
    sums = torch.zeros(len(ids), dtype=torch.float64).index_add_(0, inverse, (per_state - mean).double())
    scaled = sums * len(ids) / len(per_state)
    stderr = mean_stderr(scaled.tolist()).stderr if len(ids) > 1 else float("nan")
    return {"value": float(mean), "stderr": float(stderr), "n": len(per_state)}


def _curve(x: Tensor, values: Tensor) -> dict[str, list[float | int]]:
    ids, inverse = x.unique(return_inverse=True)
    sums = torch.zeros(len(ids)).index_add_(0, inverse, values)
    return {"step": ids.tolist(), "value": (sums / torch.bincount(inverse)).tolist()}


def save_reference(ref: FidelityReference, path: Path) -> None:
    """Writes a reference as safetensors, whole or not at all."""
    tensors = {"num_steps": torch.tensor(ref.states[0].num_steps)}
    for i, state in enumerate(ref.states):
        parts = {
            "tokens": state.tokens,
            "masked": state.masked,
            "valid": state.valid,
            "response": state.response,
        }
        parts |= {"score": state.score, "step": state.step, "positions": ref.positions[i]}
        parts |= {"log_probs": ref.log_probs[i], "prompt": ref.prompt[i]}
        tensors |= {f"{i}.{name}": t.contiguous().clone() for name, t in parts.items()}
    write_tensors(tensors, path)


def load_reference(path: Path) -> FidelityReference:
    """Reads what `save_reference` wrote."""
    tensors = read_tensors(path)
    count = 1 + max(int(name.split(".")[0]) for name in tensors if "." in name)
    num_steps = int(tensors["num_steps"])
    fields = ("tokens", "masked", "valid", "response", "score", "step")
    states = [
        CalibrationState(**{f: tensors[f"{i}.{f}"] for f in fields}, num_steps=num_steps)
        for i in range(count)
    ]
    columns = [[tensors[f"{i}.{f}"] for i in range(count)] for f in ("positions", "log_probs", "prompt")]
    return FidelityReference(states, *columns)


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Saves tensors under `path`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        save_file(tensors, part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_tensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)

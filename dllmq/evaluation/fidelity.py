"""Fidelity: how far a quantized model is from full precision, on full precision's own states.

Teacher-forced, on states of held-out full-precision trajectories. At masked positions:

    kl      KL(fp || q) = sum_v p_fp(v) log(p_fp(v) / p_q(v))       nats
    top1    1[argmax p_fp = argmax p_q]

On the k positions C that full precision commits in that state, i.e. on the decisions of the sampler:

    argmax_at_k   share of C where both models predict the same token
    slots_at_k    |C and C_q| / k, C_q the k most confident committable positions of q in the sampler's order
                  (sampler.TopK; a position where q predicts the mask stays masked, so it is no slot)

Both read the prediction as the sampler does (guidance and EOS flags included, without noise). slots_at_k is
left out where the model's confidence does not decide: random and origin remasking, temperature or alg_temp
above 0.

    hidden_error  ||h_q - h_fp||_F / ||h_fp||_F of a block's output over the valid positions of a state,
                  on a subset of the states; a state's value is the mean over blocks

A state's value is the mean over its positions. Figures over states carry the standard error over *prompts*
(states of one prompt are not independent). Curves: by denoising step, and by block of the mask ratio (0 =
most masked); hidden_error by step and by transformer block.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
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
    left_pad,
    ratio_block,
)
from dllmq.diffusion import SamplerConfig
from dllmq.diffusion.dream_sampler import confidence_of, cut_logits
from dllmq.diffusion.predict import hidden_states, logits_at
from dllmq.diffusion.predict import positions as positions_of
from dllmq.diffusion.sampler import TopK
from dllmq.durable import replace, sync_file
from dllmq.evaluation.statistics import mean_stderr

BLOCKS = 4
Progress = Callable[[int, int, str], None]
_Column = tuple[Tensor, Tensor]  # a figure's value in every state, and where it is defined


@dataclass(frozen=True)
class FidelityReference:
    """Held-out states and what full precision makes of them; lists have one entry per batch.

    Attributes:
        states: batches; positions: [B, L] of each batch, where log_probs were taken, row-major.
        log_probs: per batch [n, E].
        prompt: per batch [B], which prompt a row came from.
        committed: [B, L], what full precision commits in this state (recorded in its trajectory).
        prediction: [B, L], its token at the committable positions, x_t elsewhere.
        kept: [B], the states whose block outputs are stored; blocks: [blocks, V, d], at the V valid positions
            of the kept rows, row-major, in the model's dtype.
        sampler: how full precision denoised; num_prompts: held-out prompts, with states here or not.
    """

    states: list[CalibrationState]
    positions: list[Tensor]
    log_probs: list[Float[Tensor, "_ E"]]
    prompt: list[Int[Tensor, " _"]]
    committed: list[Bool[Tensor, "_ _"]]
    prediction: list[Int[Tensor, "_ _"]]
    kept: list[Bool[Tensor, " _"]]
    blocks: list[Float[Tensor, "blocks _ d"]]
    sampler: SamplerConfig
    num_prompts: int


@dataclass(frozen=True)
class Fidelity:
    """Figures {name: {value, stderr, n}} (n = states), curves, and means per held-out prompt.

    per_prompt: name -> one value per prompt, None where no state of the prompt defines the figure.
    """

    values: dict[str, dict[str, float | int | None]]
    curves: dict[str, dict[str, list[float | int]]]
    per_prompt: dict[str, list[float | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Reading:
    """What one forward on a batch of states gives, on CPU (the names are FidelityReference's)."""

    log_probs: Float[Tensor, "n E"]
    prediction: Int[Tensor, "B L"]
    confidence: Float[Tensor, "B L"]
    blocks: Float[Tensor, "blocks V d"]


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
    sampler: SamplerConfig,
    count: int,
    batch_size: int,
    seed: int = 0,
    positions_per_state: int | None = None,
    hidden_states_kept: int = 64,
) -> FidelityReference:
    """Full precision's predictions on `count` held-out states.

    Args:
        trajectories: one per held-out prompt, recorded with `sampler`.
        positions_per_state: at most so many masked positions of each state for kl and top1, None for all (a
            position takes E x 4 bytes). The committed positions are read in any case.
        hidden_states_kept: how many of the states, evenly spread, keep full precision's block outputs (a
            state takes blocks x length x d numbers of the model's dtype: about 90 MB for an 8B model and 350
            tokens in bfloat16, 2 MB for the embedded model in float32).
    """
    rows = select_states(trajectories, count, seed)
    states = batches_of(rows, batch_size, model.config.eos_token_id, trajectories[0].num_steps)
    rng = torch.Generator().manual_seed(seed)
    positions = [_some_positions(s.masked, positions_per_state, rng) for s in states]
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i].tokens), i))
    sizes = [len(s.step) for s in states]
    prompts = torch.tensor([rows[i].prompt for i in order]).split(sizes)
    spread = {i * len(rows) // hidden_states_kept for i in range(hidden_states_kept)}
    kept = torch.tensor([i in spread for i in order]).split(sizes)
    committed = [
        left_pad([_committed(trajectories, rows[i]) for i in group.tolist()], False, s.tokens.shape[1])
        for group, s in zip(torch.tensor(order).split(sizes), states, strict=True)
    ]
    found = [_read(model, s, p, k, sampler) for s, p, k in zip(states, positions, kept, strict=True)]
    return FidelityReference(
        states=states,
        positions=positions,
        log_probs=[f.log_probs for f in found],
        prompt=list(prompts),
        committed=committed,
        prediction=[f.prediction for f in found],
        kept=list(kept),
        blocks=[f.blocks for f in found],
        sampler=sampler,
        num_prompts=len(trajectories),
    )


def _committed(trajectories: list[Trajectory], row: RowState) -> Bool[Tensor, " L"]:
    trajectory = trajectories[row.prompt]
    return trajectory.committed[int((trajectory.step == row.step).nonzero())]


def committable(state: CalibrationState, sampler: SamplerConfig) -> Bool[Tensor, "B L"]:
    """The masks left of the end of the block that is being decoded."""
    L = state.tokens.shape[1]
    block = state.step // sampler.steps_per_block
    end = L - sampler.gen_length + (block + 1) * sampler.block_length
    return state.masked & (torch.arange(L) < end[:, None])


@torch.no_grad()
def _read(
    model: Any, state: CalibrationState, positions: Tensor, kept: Tensor, sampler: SamplerConfig
) -> _Reading:
    """One forward: log p(. | x_t) at `positions` in fp32, decisions, block outputs of `kept` rows."""
    device = model.device
    tokens, valid = state.tokens.to(device), state.valid.to(device)
    given = ~(state.response | state.masked).to(device)
    with _block_outputs(model, valid & kept.to(device)[:, None]) as outputs:
        hidden = hidden_states(model, tokens, valid, given, sampler.cfg_scale)
    log_probs = torch.log_softmax(model.head(hidden[0][positions.to(device)]).float(), -1).cpu()
    where = committable(state, sampler)
    prediction, confidence = state.tokens.clone(), torch.zeros(where.shape)
    parts = [
        _decide(logits, model.config, sampler)
        for logits in logits_at(model, hidden, positions_of(where.to(device)), sampler.cfg_scale)
    ]
    if parts:
        prediction[where], confidence[where] = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    return _Reading(log_probs, prediction, confidence, torch.stack(outputs))


@contextmanager
def _block_outputs(model: Any, where: Bool[Tensor, "B L"]) -> Iterator[list[Tensor]]:
    """Collects every block's output at `where` [V, d], on CPU, in the forward made inside the context."""
    outputs: list[Tensor] = []

    def keep(module: Any, inputs: Any, output: Tensor) -> None:
        outputs.append(output[: len(where)][where].cpu())  # with guidance the conditional copies come first

    blocks = model.blocks.children()  # not `in model.blocks`: that would read the weights of streamed ones
    handles = [block.register_forward_hook(keep) for block in blocks]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _decide(logits: Float[Tensor, "n E"], config: Any, sampler: SamplerConfig) -> tuple[Tensor, Tensor]:
    """The sampler's noiseless prediction and its float32 confidence.

    EOS flags: see diffusion/sampler.py; Dream's confidences: see diffusion/dream_sampler.py.
    """
    if sampler.dream:
        q = cut_logits(logits.float(), sampler.temperature, sampler.top_p, sampler.top_k).softmax(-1)
        x0 = q.argmax(-1)
        return x0, confidence_of(sampler.remasking, q, x0)
    if sampler.logits_eos_inf:
        logits = _without(logits, [config.eos_token_id])
    x0 = logits.argmax(-1)
    if sampler.confidence_eos_eot_inf:
        logits = _without(logits, [config.eot_token_id, config.eos_token_id])
    p = torch.softmax(logits.float(), -1).gather(1, x0[:, None])[:, 0]
    return x0, p


def _without(logits: Float[Tensor, "n E"], ids: list[int]) -> Float[Tensor, "n E"]:
    return logits.index_fill(-1, torch.tensor(ids, device=logits.device), -torch.inf)


@torch.no_grad()
def measure(model: Any, ref: FidelityReference, progress: Progress | None = None) -> Fidelity:
    """Compares a model with the reference."""
    columns: dict[str, list[_Column]] = {}
    errors: list[Tensor] = []
    for i, state in enumerate(ref.states):
        found = _read(model, state, ref.positions[i], ref.kept[i], ref.sampler)
        errors.append(_relative_errors(found.blocks, ref.blocks[i], state.valid & ref.kept[i][:, None]))
        new = _predictions(found, ref, i) | _decisions(model, found, ref, i)
        for name, column in (new | {"hidden_error": (errors[-1].mean(1), ref.kept[i])}).items():
            columns.setdefault(name, []).append(column)
        if progress is not None:
            progress(i + 1, len(ref.states), "fidelity")
    joined = {n: (torch.cat([c[0] for c in p]), torch.cat([c[1] for c in p])) for n, p in columns.items()}
    by_block = torch.cat(errors)[torch.cat(ref.kept)]
    return _summary(ref, {n: c for n, c in joined.items() if bool(c[1].any())}, by_block)


def _predictions(found: _Reading, ref: FidelityReference, i: int) -> dict[str, _Column]:
    """kl and top1 of batch i."""
    p, q, at = ref.log_probs[i], found.log_probs, ref.positions[i]
    kl, same = (p.exp() * (p - q)).sum(-1), (p.argmax(-1) == q.argmax(-1)).float()
    everywhere = torch.ones(len(at), dtype=torch.bool)
    return {"kl": (_row_means(kl, at), everywhere), "top1": (_row_means(same, at), everywhere)}


def _decisions(model: Any, found: _Reading, ref: FidelityReference, i: int) -> dict[str, _Column]:
    """argmax_at_k and slots_at_k of batch i; undefined in states where full precision commits nothing."""
    committed = ref.committed[i]
    k = committed.sum(1)
    same = (found.prediction == ref.prediction[i])[committed].float()
    columns = {"argmax_at_k": (_row_means(same, committed), k > 0)}
    if ref.sampler.deterministic:
        slots = committable(ref.states[i], ref.sampler) & (found.prediction != model.config.mask_token_id)
        chosen = TopK(ref.sampler.steps_per_block)(found.confidence, slots, k)
        columns["slots_at_k"] = (_row_means(chosen[committed].float(), committed), k > 0)
    return columns


def _relative_errors(
    q: Float[Tensor, "blocks V d"], p: Float[Tensor, "blocks V d"], at: Bool[Tensor, "B L"]
) -> Float[Tensor, "B blocks"]:
    """||q - p||_F / ||p||_F by row and block; q and p lie at `at`, row-major. NaN in rows without any."""
    row = at.nonzero()[:, 0]

    def energy(x: Tensor) -> Tensor:
        return torch.zeros(len(at)).index_add_(0, row, x.pow(2).sum(-1))

    return torch.stack(
        [(energy(a.float() - b.float()) / energy(b.float())).sqrt() for a, b in zip(q, p, strict=True)], 1
    )


def _summary(ref: FidelityReference, columns: dict[str, _Column], errors: Tensor) -> Fidelity:
    """Figures, curves and means per prompt; errors [kept states, blocks]."""
    step = torch.cat([s.step for s in ref.states])
    ratio = ratio_block(torch.cat([s.mask_ratio for s in ref.states]), BLOCKS)
    prompt = torch.cat(ref.prompt)
    values, curves, per_prompt = {}, {}, {}
    for name, (per_state, defined) in columns.items():
        x, of = per_state[defined], prompt[defined]
        values[name] = _clustered(x, of)
        curves[f"{name}_by_step"] = _curve(step[defined], x)
        if name != "hidden_error":
            curves[f"{name}_by_mask_ratio"] = _curve(ratio[defined], x)
        per_prompt[name] = [
            float(x[of == i].mean()) if bool((of == i).any()) else None for i in range(ref.num_prompts)
        ]
    if "hidden_error" in columns:
        curves["hidden_error_by_block"] = _curve(torch.arange(errors.shape[1]), errors.mean(0))
    return Fidelity(values, curves, per_prompt)


def _row_means(values: Float[Tensor, " n"], at: Bool[Tensor, "B L"]) -> Float[Tensor, " B"]:
    """Mean of each row's values, which lie at its positions `at` in row-major order."""
    sums = torch.zeros(len(at)).index_add_(0, at.nonzero()[:, 0], values)
    return sums / at.sum(1).clamp(min=1)


def _clustered(per_state: Tensor, prompt: Tensor) -> dict[str, float | int | None]:
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


_FIELDS = ("tokens", "masked", "valid", "response", "score", "step")  # of a state
_COLUMNS = ("positions", "log_probs", "prompt", "committed", "prediction", "kept", "blocks")


def save_reference(ref: FidelityReference, path: Path) -> None:
    """Writes a reference as safetensors, whole or not at all."""
    tensors = {
        "num_steps": torch.tensor(ref.states[0].num_steps),
        "num_prompts": torch.tensor(ref.num_prompts),
    }
    tensors["sampler"] = torch.tensor(list(json.dumps(asdict(ref.sampler)).encode()), dtype=torch.uint8)
    for i, state in enumerate(ref.states):
        parts = {name: getattr(state, name) for name in _FIELDS}
        parts |= {name: getattr(ref, name)[i] for name in _COLUMNS}
        tensors |= {f"{i}.{name}": t.contiguous().clone() for name, t in parts.items()}
    write_tensors(tensors, path)


def load_reference(path: Path) -> FidelityReference:
    """Reads what `save_reference` wrote."""
    tensors = read_tensors(path)
    count = 1 + max(int(name.split(".")[0]) for name in tensors if "." in name)
    num_steps = int(tensors["num_steps"])
    states = [
        CalibrationState(**{f: tensors[f"{i}.{f}"] for f in _FIELDS}, num_steps=num_steps)
        for i in range(count)
    ]
    columns: dict[str, Any] = {f: [tensors[f"{i}.{f}"] for i in range(count)] for f in _COLUMNS}
    sampler = SamplerConfig(**json.loads(bytes(tensors["sampler"].tolist())))
    return FidelityReference(states, sampler=sampler, num_prompts=int(tensors["num_prompts"]), **columns)


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Saves tensors under `path`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        save_file(tensors, part)
        sync_file(part)
        replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_tensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)

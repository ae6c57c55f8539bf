"""Calibration states: which (x_t, mask) pairs the statistics are taken on.

The full-precision sampler runs once on the calibration prompts and every state is kept
(`record_trajectories`). A `StateSampler` draws the calibration set from it. All samplers draw the same number
of sequences from the same prompts on the same canvas, so only the masking differs:

    clean        x_0, the end of the trajectory: fully visible text, what an autoregressive PTQ calibrates on
    random_mask  x_0 masked by the forward process, t ~ U(0, 1)
    uniform      states of the trajectories, every step alike
    tmas         states by time block with the paper's shares (techniques/tmas.py)

Legend: S steps of a trajectory, L canvas, B batch. Mask ratios count the response only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllmq import interrupt
from dllmq.diffusion import SamplerConfig, apply, denoise, mask_tokens, state_confidence

Progress = Callable[[int, int, str], None]
# (number of a batch, what records it) -> its trajectories, or those that were kept
KeepBatch = Callable[[int, Callable[[], list["Trajectory"]]], list["Trajectory"]]
_PLAIN = SamplerConfig()


@dataclass(frozen=True)
class CalibrationState:
    """A batch of states, left-padded."""

    tokens: Int[Tensor, "B L"]  # x_t
    masked: Bool[Tensor, "B L"]  # 1[x_t = MASK]
    valid: Bool[Tensor, "B L"]  # not a pad
    response: Bool[Tensor, "B L"]  # not the prompt, not a pad
    score: Float[Tensor, "B L"]  # probability of the predicted token in full precision, 0 where not observed
    step: Int[Tensor, " B"]
    num_steps: int

    @property
    def mask_ratio(self) -> Float[Tensor, " B"]:
        return (self.masked & self.response).sum(1) / self.response.sum(1)


@dataclass(frozen=True)
class RowState:
    """One sequence of a calibration set, unpadded; `prompt` is the index of the prompt it came from."""

    tokens: Int[Tensor, " L"]
    masked: Bool[Tensor, " L"]
    score: Float[Tensor, " L"]
    prompt_length: int
    prompt: int
    step: int

    @property
    def mask_ratio(self) -> float:
        return float(self.masked[self.prompt_length :].float().mean())


@dataclass(frozen=True)
class Trajectory:
    """Every state of one prompt's full-precision run, in the order of the steps; `final` is x_0."""

    tokens: Int[Tensor, "S L"]
    masked: Bool[Tensor, "S L"]
    score: Float[Tensor, "S L"]
    committed: Bool[Tensor, "S L"]
    step: Int[Tensor, " S"]
    final: Int[Tensor, " L"]
    prompt_length: int
    num_steps: int

    def __len__(self) -> int:
        return len(self.step)

    @property
    def mask_ratio(self) -> Float[Tensor, " S"]:
        return self.masked[:, self.prompt_length :].float().mean(1)

    def state(self, index: int, prompt: int) -> RowState:
        return RowState(
            tokens=self.tokens[index],
            masked=self.masked[index],
            score=self.score[index],
            prompt_length=self.prompt_length,
            prompt=prompt,
            step=int(self.step[index]),
        )


@runtime_checkable
class StateSampler(Protocol):
    """Draws `count` states from recorded trajectories.

    Attributes:
        name: for records.
        rescored: whether the states lie off the trajectory, so that their scores take a forward of the model.
    """

    @property
    def name(self) -> str: ...
    @property
    def rescored(self) -> bool: ...
    def __call__(
        self, trajectories: list[Trajectory], count: int, mask_id: int, rng: torch.Generator
    ) -> list[RowState]: ...


@dataclass(frozen=True)
class CleanText:
    """The final x_0 of the trajectories, nothing masked: TMAS off."""

    name: str = "clean"
    rescored: bool = True

    def __call__(
        self, trajectories: list[Trajectory], count: int, mask_id: int, rng: torch.Generator
    ) -> list[RowState]:
        return [_clean(trajectories[i], i, mask_id) for i in _spread(len(trajectories), count, rng)]


@dataclass(frozen=True)
class RandomMask:
    """x_0 masked by the forward process q(x_t | x_0): every response token with probability t ~ U(0, 1)."""

    name: str = "random_mask"
    rescored: bool = True

    def __call__(
        self, trajectories: list[Trajectory], count: int, mask_id: int, rng: torch.Generator
    ) -> list[RowState]:
        rows = []
        for i in _spread(len(trajectories), count, rng):
            clean = _clean(trajectories[i], i, mask_id)
            t = torch.rand(1, generator=rng)
            response = torch.arange(len(clean.tokens)) >= clean.prompt_length
            x_t, _ = mask_tokens(clean.tokens[None], response[None], t, mask_id, rng)
            tokens = x_t[0]
            step = int((1 - float(t)) * trajectories[i].num_steps)
            rows.append(RowState(tokens, tokens == mask_id, clean.score, clean.prompt_length, i, step))
        return rows


@dataclass(frozen=True)
class UniformTrajectory:
    """States of the trajectories, each step as likely as any other."""

    name: str = "uniform"
    rescored: bool = False

    def __call__(
        self, trajectories: list[Trajectory], count: int, mask_id: int, rng: torch.Generator
    ) -> list[RowState]:
        rows = []
        for i in _spread(len(trajectories), count, rng):
            index = int(torch.randint(len(trajectories[i]), (1,), generator=rng))
            rows.append(trajectories[i].state(index, i))
        return rows


def _clean(trajectory: Trajectory, prompt: int, mask_id: int) -> RowState:
    """x_0; what the sampler left masked (a predicted mask id, a mask in the prompt) counts as masked."""
    return RowState(
        tokens=trajectory.final,
        masked=trajectory.final == mask_id,
        score=torch.zeros(len(trajectory.final)),
        prompt_length=trajectory.prompt_length,
        prompt=prompt,
        step=trajectory.num_steps,
    )


def _spread(prompts: int, count: int, rng: torch.Generator) -> list[int]:
    """`count` prompt indices, every prompt used before any is used again."""
    order = torch.randperm(prompts, generator=rng).tolist()
    return [order[j % prompts] for j in range(count)]


def left_pad(rows: list[Tensor], pad: Any, length: int) -> Tensor:
    """Rows of different lengths as one [B, length] tensor, padded on the left."""
    out = torch.full((len(rows), length), pad, dtype=rows[0].dtype)
    for i, row in enumerate(rows):
        out[i, length - len(row) :] = row
    return out


def batched(indices: list[int], lengths: list[int], batch_size: int) -> list[list[int]]:
    """Batches of similar length: a function of the lengths alone."""
    order = sorted(indices, key=lambda i: (lengths[i], i))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


@torch.no_grad()
def record_trajectories(
    model: Any,
    prompts: list[Int[Tensor, " _"]],
    sampler: SamplerConfig,
    batch_size: int,
    seed: int = 0,
    observe: str = "masked",
    progress: Progress | None = None,
    keep: KeepBatch | None = None,
) -> list[Trajectory]:
    """Runs the full-precision sampler on every prompt and keeps all states, on CPU.

    Args:
        prompts: token ids, unpadded.
        observe: where scores are taken: "masked", or "all" to include decoded tokens.
        keep: asked for each batch in the place of running it, so that a run that was stopped goes on.

    Raises:
        ValueError: the sampler approximates; trajectories are the published process's.
        Interrupted: after a signal, when the batch at hand is finished.
    """
    if not sampler.exact:
        raise ValueError(
            f"trajectories are recorded with the exact process, not with {sampler.approximations}: give "
            "sampler.made_exact()."
        )
    done: dict[int, Trajectory] = {}
    groups = batched(list(range(len(prompts))), [len(p) for p in prompts], batch_size)
    total = len(groups) * sampler.steps
    for number, group in enumerate(groups):

        def tell(step: int, number: int = number) -> None:
            if progress is not None:
                progress(number * sampler.steps + step, total, "trajectories")

        record = partial(
            _record_batch, model, [prompts[i] for i in group], sampler, seed + number, observe, tell
        )
        done |= zip(group, record() if keep is None else keep(number, record), strict=True)
        interrupt.check()
    return [done[i] for i in range(len(prompts))]


def _record_batch(
    model: Any,
    prompts: list[Int[Tensor, " _"]],
    sampler: SamplerConfig,
    seed: int,
    observe: str,
    tell: Callable[[int], None],
) -> list[Trajectory]:
    """The trajectories of prompts that are denoised together."""
    lengths = [len(p) for p in prompts]
    width = max(lengths)
    ids = left_pad(prompts, model.config.eos_token_id, width)
    valid = left_pad([torch.ones_like(p) for p in prompts], 0, width)
    rng = torch.Generator(device=model.device).manual_seed(seed)
    steps: list[tuple[Any, ...]] = []
    final = ids
    on_device = ids.to(model.device), sampler, valid.to(model.device)
    for step in denoise(model, *on_device, rng, observe=observe):
        kept = (step.tokens, step.masked, step.score, step.committed)
        steps.append((step.index, *(t.cpu() for t in kept)))
        final = apply(step).cpu()
        tell(step.index + 1)
    index = torch.tensor([s[0] for s in steps])
    found = []
    for row, length in enumerate(lengths):
        tokens, masked, score, committed = (
            torch.stack([s[k][row, width - length :] for s in steps]) for k in range(1, 5)
        )
        last = final[row, width - length :]
        found.append(Trajectory(tokens, masked, score, committed, index, last, length, sampler.steps))
    return found


def collate(rows: list[RowState], eos_id: int, num_steps: int) -> CalibrationState:
    """A batch of states, left-padded with EOS."""
    L = max(len(r.tokens) for r in rows)
    response = [torch.arange(len(r.tokens)) >= r.prompt_length for r in rows]
    return CalibrationState(
        tokens=left_pad([r.tokens for r in rows], eos_id, L),
        masked=left_pad([r.masked for r in rows], False, L),
        valid=left_pad([torch.ones_like(r.masked) for r in rows], False, L),
        response=left_pad(response, False, L),
        score=left_pad([r.score.float() for r in rows], 0.0, L),
        step=torch.tensor([r.step for r in rows]),
        num_steps=num_steps,
    )


def batches_of(rows: list[RowState], batch_size: int, eos_id: int, num_steps: int) -> list[CalibrationState]:
    """The calibration set in batches of similar length."""
    groups = batched(list(range(len(rows))), [len(r.tokens) for r in rows], batch_size)
    return [collate([rows[i] for i in group], eos_id, num_steps) for group in groups]


@torch.no_grad()
def draw_states(
    model: Any,
    trajectories: list[Trajectory],
    draw: StateSampler,
    count: int,
    batch_size: int,
    seed: int,
    sampler: SamplerConfig = _PLAIN,
    observe: str = "masked",
) -> list[CalibrationState]:
    """The calibration set of a run: states drawn by `draw`, batched, with full-precision scores.

    Args:
        sampler: of the trajectories; states off them are scored under its guidance and EOS flags.
        observe: where scores are needed: "masked", or "all" to include decoded tokens.
    """
    if count < 1:
        raise ValueError(f"calibration.num_states is {count}; it must be at least 1.")
    if not trajectories:
        raise ValueError("there are no calibration prompts, so no states to calibrate on: give at least one.")
    rng = torch.Generator().manual_seed(seed)
    rows = draw(trajectories, count, model.config.mask_token_id, rng)
    states = batches_of(rows, batch_size, model.config.eos_token_id, trajectories[0].num_steps)
    return [_rescore(model, state, sampler, observe) for state in states] if draw.rescored else states


def _rescore(model: Any, state: CalibrationState, sampler: SamplerConfig, observe: str) -> CalibrationState:
    """Scores of states the sampler did not visit: probability of its prediction, where it is needed."""
    where = state.masked if observe == "masked" else state.valid
    if not bool(where.any()):
        return state
    given = ~state.response  # prompt and pads
    score = state_confidence(model, state.tokens, state.valid, given, where, sampler)
    return replace(state, score=torch.where(where, score.cpu().float(), 0.0))


def describe(states: list[CalibrationState], blocks: int = 4) -> dict[str, Any]:
    """What was drawn: sequences, tokens, and counts by block of the mask ratio (block 0 = most masked)."""
    ratio = torch.cat([s.mask_ratio for s in states])
    index = ratio_block(ratio, blocks)
    return {
        "sequences": len(ratio),
        "tokens": int(sum(s.valid.sum() for s in states)),
        "masked_tokens": int(sum(s.masked.sum() for s in states)),
        "mean_mask_ratio": float(ratio.mean()),
        "by_block": [int((index == k).sum()) for k in range(blocks)],
        "unmasked_sequences": int((ratio == 0).sum()),
    }


def ratio_block(ratio: Float[Tensor, " N"], blocks: int = 4) -> Int[Tensor, " N"]:
    """Equal intervals of the mask ratio, block 0 the most masked: 1 - (k+1)/K < ratio <= 1 - k/K."""
    return torch.clamp(torch.floor((1 - ratio) * blocks + 1e-6).long(), 0, blocks - 1)


def iterate_rows(trajectories: list[Trajectory]) -> Iterator[RowState]:
    """Every state of every trajectory."""
    for i, trajectory in enumerate(trajectories):
        for index in range(len(trajectory)):
            yield trajectory.state(index, i)

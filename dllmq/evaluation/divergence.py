"""Divergence: how far the quantized model's own runs leave full precision's, free-running.

Both models denoise the same held-out prompts, each on its own states. With x_s the state after the commit of
step s (the final tokens once a run has no more steps), R the response positions and fp, q the two models:

    divergence(s)          share of R where x_s^q != x_s^fp; a token against a mask counts as a difference
    first_divergence_step  the first s with divergence(s) > 0, mean over the prompts that diverge at all
    first_divergence_mask_ratio   full precision's mask ratio in the state that this step saw
    final_agreement        1 - divergence at the end
    exact_match_rate       share of prompts whose whole response is the same

Every figure is a mean over prompts; n counts them (for the first divergence only those that diverge).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dllmq.calibration.states import KeepBatch, Progress, Trajectory, record_trajectories
from dllmq.diffusion import SamplerConfig
from dllmq.evaluation.fidelity import Fidelity
from dllmq.evaluation.statistics import mean_stderr


def measure_divergence(
    model: Any,
    reference: list[Trajectory],
    prompts: list[Int[Tensor, " _"]],
    sampler: SamplerConfig,
    batch_size: int,
    progress: Progress | None = None,
    seed: int = 0,
    keep: KeepBatch | None = None,
) -> Fidelity:
    """Denoises the prompts with `model` and compares with full precision's runs.

    Args:
        reference: full precision's trajectories of the same prompts; sampler, batch_size and seed are those
            that recorded them, so that the same model gives the same run.
        progress: told (done, total, stage) like `record_trajectories`.
        keep: asked for the batches of the quantized model's runs, as there.
    """
    own = record_trajectories(model, prompts, sampler, batch_size, seed, "committable", progress, keep)
    return compare_trajectories(reference, own)


def compare_trajectories(reference: list[Trajectory], other: list[Trajectory]) -> Fidelity:
    """Figures, curves and final agreement per prompt of two models' runs on the same prompts.

    Raises:
        ValueError: the trajectories are not of the same prompts, canvas and steps.
    """
    _check_pairs(reference, other)
    pairs = list(zip(reference, other, strict=True))
    shares = torch.stack([divergence(a, b) for a, b in pairs])  # [prompts, S]
    ratios = torch.stack([mask_ratios(a) for a in reference])
    firsts = [first_divergence(share) for share in shares]
    diverged = [(i, step) for i, step in enumerate(firsts) if step is not None]
    agreement = (1 - shares[:, -1]).tolist()
    values = {
        "final_agreement": _estimate(agreement),
        "exact_match_rate": _estimate((shares[:, -1] == 0).double().tolist()),
        "first_divergence_step": _estimate([step for _, step in diverged]),
        "first_divergence_mask_ratio": _estimate([float(ratios[i, step]) for i, step in diverged]),
    }
    steps = list(range(shares.shape[1]))
    curves = {
        "divergence_by_step": {"step": steps, "value": shares.mean(0).tolist()},
        "divergence_mask_ratio_by_step": {"step": steps, "value": ratios.mean(0).tolist()},
    }
    return Fidelity(values, curves, {"final_agreement": agreement})


def divergence(a: Trajectory, b: Trajectory) -> Float[Tensor, " S"]:
    """Share of response positions that differ after each of the `num_steps` steps."""
    return (_after_steps(a) != _after_steps(b))[:, a.prompt_length :].double().mean(1)


def first_divergence(shares: Float[Tensor, " S"]) -> int | None:
    """The first step with a difference, None where the runs never differ."""
    steps = shares.nonzero()[:, 0]
    return int(steps[0]) if len(steps) else None


def mask_ratios(trajectory: Trajectory) -> Float[Tensor, " S"]:
    """Mask ratio of the state that each step saw; a step that was skipped saw its predecessor's outcome."""
    left = trajectory.masked[-1] & ~trajectory.committed[-1]  # what the run leaves masked
    masked = torch.cat([trajectory.masked, left[None]])[:, trajectory.prompt_length :]
    steps = torch.arange(trajectory.num_steps)
    return masked.double().mean(1)[torch.searchsorted(trajectory.step, steps)]  # steps recorded before s


def _after_steps(trajectory: Trajectory) -> Int[Tensor, "S L"]:
    """x_s of every step s, skipped ones included."""
    states = torch.cat([trajectory.tokens, trajectory.final[None]])
    steps = torch.arange(trajectory.num_steps)
    return states[torch.searchsorted(trajectory.step, steps, right=True)]  # steps recorded up to s


def _estimate(values: list[float] | list[int]) -> dict[str, float | int | None]:
    """Mean over prompts; null without any, and no standard error from one."""
    if not values:
        return {"value": None, "stderr": None, "n": 0}
    found = mean_stderr(values)
    return {"value": found.value, "stderr": found.stderr if found.n > 1 else None, "n": found.n}


def _check_pairs(reference: list[Trajectory], other: list[Trajectory]) -> None:
    if not reference or len(reference) != len(other):
        raise ValueError(
            f"divergence compares run by run, got {len(reference)} and {len(other)} trajectories: record "
            "both on the same prompts, at least one."
        )
    for i, (a, b) in enumerate(zip(reference, other, strict=True)):
        same = (a.num_steps, a.prompt_length) == (b.num_steps, b.prompt_length)
        if not same or not torch.equal(a.tokens[0], b.tokens[0]):
            raise ValueError(
                f"trajectory {i} starts from another prompt or canvas, or has other steps: record both with "
                "the same prompts and sampler."
            )

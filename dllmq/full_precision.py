"""Full precision's share of a run, made once: trajectories, calibration states, references, its own scores.

Every value is asked of the cache by what it depends on, so the cells of a sweep, its seeds, and other sweeps
of the same model share them; a cell that finds all of them there makes no full-precision forward.

    trajectories   of the calibration prompts          prompts, sampler, batch size, seed, where scored
    states         the calibration set                 the trajectories', and how states are drawn
    held_out       trajectories of held-out prompts    prompts, sampler, batch size
    reference      predictions on their states         the held-out trajectories', and how many
    baseline       full precision's record, answers    tasks, sampler and everything else about evaluation
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dllmq.cache import Cache, load_json, load_tensors, save_json, save_tensors
from dllmq.calibration.prompts import encode_prompts, read_prompts
from dllmq.calibration.states import CalibrationState, KeepBatch, Trajectory, record_trajectories
from dllmq.config import Plan, identity
from dllmq.evaluation import fidelity
from dllmq.mini.splits import Split
from dllmq.mini.tasks import problems
from dllmq.models.streaming import log_reading
from dllmq.pipeline import calibration_states
from dllmq.report.results import RunRecord

Progress = Callable[[int, int, str], None]
_TRAJECTORY = ("tokens", "masked", "score", "committed", "step", "final")
_STATE = ("tokens", "masked", "valid", "response", "score", "step")
HELD_OUT_SEED = 0


@dataclass
class ForwardCounter:
    """Counts the forwards of a model while it is in full precision, those replayed as CUDA graphs too."""

    count: int = 0

    @contextmanager
    def watching(self, model: Any) -> Iterator[None]:
        before = model.forwards
        try:
            yield
        finally:
            self.count += model.forwards - before


@dataclass(frozen=True)
class Baseline:
    """Full precision's record, and its answers by task."""

    record: RunRecord
    samples: dict[str, list[dict[str, Any]]]


@dataclass
class FullPrecision:
    """What one run needs of its model in full precision.

    Args:
        plan: the run's; model, tokenizer: loaded; progress: told (done, total, stage).

    Attributes:
        hits, made: kinds of values that were read from the cache, or computed here.
    """

    plan: Plan
    cache: Cache
    model: Any
    tokenizer: Any
    progress: Progress | None
    hits: list[str] = field(default_factory=list)
    made: list[str] = field(default_factory=list)

    def prompts(self, held_out: bool = False) -> list[Tensor]:
        """Calibration or held-out prompts, token ids."""
        config = self.plan.config
        own, other = config.calibration.num_prompts, config.eval.fidelity_prompts
        if config.calibration.data is not None:
            texts = read_prompts(Path(config.calibration.data), own + other)
            texts = texts[own:] if held_out else texts[:own]
        elif held_out:
            texts = _generated_prompts("dev", other, HELD_OUT_SEED)
        else:
            texts = _generated_prompts("train", own, config.seed)
        return encode_prompts(texts, self.tokenizer, config.chat_template, config.add_bos)

    def trajectories(self, prompts: list[Tensor]) -> list[Trajectory]:
        """Of the calibration prompts."""
        recipe = self.plan.recipe
        parts = self._of_prompts(prompts, recipe.seed) | {"observe": recipe.observe}
        return self._recorded("trajectories", parts, prompts, recipe.seed, recipe.observe)

    def states(self, prompts: list[Tensor]) -> list[CalibrationState]:
        """The calibration set."""
        recipe = self.plan.recipe
        parts = self._of_prompts(prompts, recipe.seed) | {
            "observe": recipe.observe,
            "draw": asdict(recipe.states),  # type: ignore[call-overload]
            "num_states": recipe.num_states,
        }

        def make() -> list[CalibrationState]:
            return calibration_states(self.model, prompts, recipe, self.trajectories(prompts), self.progress)

        return self._get("states", parts, make, _save_states, _load_states)

    def held_out(self) -> tuple[list[Tensor], list[Trajectory]]:
        """Held-out prompts and full precision's runs on them."""
        prompts = self.prompts(held_out=True)
        parts = self._of_prompts(prompts, HELD_OUT_SEED) | {"observe": "committable"}
        return prompts, self._recorded("held_out", parts, prompts, HELD_OUT_SEED, "committable")

    def reference(self, prompts: list[Tensor], trajectories: list[Trajectory]) -> fidelity.FidelityReference:
        """Full precision's predictions on states of its runs on the held-out prompts."""
        config = self.plan.config
        batch, count = config.calibration.batch_size, config.eval.fidelity_states
        positions = None if self.model.config.logit_size <= 4096 else 16
        parts = self._of_prompts(prompts, HELD_OUT_SEED) | {"states": count, "positions": positions}
        sampler = self.plan.recipe.sampler

        def make() -> fidelity.FidelityReference:
            log_reading(self.model, "reference", -(-count // batch))
            return fidelity.reference(
                self.model, trajectories, sampler, count, batch, HELD_OUT_SEED, positions
            )

        return self._get("reference", parts, make, fidelity.save_reference, fidelity.load_reference)

    def baseline(self, key: str, make: Callable[[Path], Baseline]) -> Baseline:
        """`make()`, or what it gave before; `key` is the fingerprint of full precision's configuration.

        Args:
            make: given a folder for its answers meanwhile, so that a run that was stopped goes on.
        """
        parts = {"fingerprint": key}
        folder = self.cache.unfinished("baseline", parts)
        return self._get("baseline", parts, lambda: make(folder), _save_baseline, _load_baseline)

    @cached_property
    def _identity(self) -> dict[str, Any]:
        return identity(self.plan.config, self.plan.device)

    def _of_prompts(self, prompts: list[Tensor], seed: int) -> dict[str, Any]:
        """What every forward on these prompts depends on."""
        recipe = self.plan.recipe
        digest = hashlib.sha256(repr([p.tolist() for p in prompts]).encode()).hexdigest()
        sampler = asdict(recipe.sampler)
        own = {"prompts": digest, "sampler": sampler, "batch_size": recipe.batch_size, "seed": seed}
        return self._identity | own

    def _recorded(
        self, kind: str, parts: dict[str, Any], prompts: list[Tensor], seed: int, observe: str
    ) -> list[Trajectory]:
        recipe = self.plan.recipe

        def make() -> list[Trajectory]:
            forwards = -(-len(prompts) // recipe.batch_size) * recipe.sampler.steps
            log_reading(self.model, kind, forwards)
            keep = keep_batches(Cache(self.cache.unfinished(kind, parts)), kind, recipe.sampler.steps)
            return record_trajectories(
                self.model, prompts, recipe.sampler, recipe.batch_size, seed, observe, self.progress, keep
            )

        load = partial(load_trajectories, num_steps=recipe.sampler.steps)
        return self._get(kind, parts, make, save_trajectories, load)

    def _get(self, kind: str, parts: dict[str, Any], make: Any, save: Any, load: Any) -> Any:
        value, hit = self.cache.get(kind, parts, make, save, load)
        (self.hits if hit else self.made).append(kind)
        return value


def _generated_prompts(split: Split, count: int, seed: int) -> list[str]:
    """Word problems and programs by turns."""
    half = -(-count // 2)
    words, code = problems("mini_gsm", split, half, seed), problems("mini_code", split, half, seed)
    pairs = zip(words, code, strict=True)
    texts = [text for w, c in pairs for text in (f"Question: {w['question']}\nAnswer:", c["prompt"])]
    return texts[:count]


def _save_baseline(baseline: Baseline, path: Path) -> None:
    save_json({"record": baseline.record.to_json(), "samples": baseline.samples}, path)


def _load_baseline(path: Path) -> Baseline:
    """A record with other fields (of another version) is refused, so it is measured again."""
    found = load_json(path)
    return Baseline(RunRecord(**found["record"]), found["samples"])


def keep_batches(cache: Cache, kind: str, num_steps: int) -> KeepBatch:
    """For `record_trajectories`: batches are kept in `cache`, which is of this one recording."""
    load = partial(load_trajectories, num_steps=num_steps)

    def keep(number: int, record: Callable[[], list[Trajectory]]) -> list[Trajectory]:
        return cache.get(kind, {"batch": number}, record, save_trajectories, load)[0]

    return keep


def save_trajectories(trajectories: list[Trajectory], path: Path) -> None:
    tensors = {f"{i}.{n}": getattr(t, n) for i, t in enumerate(trajectories) for n in _TRAJECTORY}
    tensors |= {f"{i}.prompt_length": torch.tensor(t.prompt_length) for i, t in enumerate(trajectories)}
    save_tensors(tensors, path)


def load_trajectories(path: Path, num_steps: int) -> list[Trajectory]:
    tensors = load_tensors(path)
    return [
        Trajectory(
            **{n: tensors[f"{i}.{n}"] for n in _TRAJECTORY},
            prompt_length=int(tensors[f"{i}.prompt_length"]),
            num_steps=num_steps,
        )
        for i in range(_count(tensors))
    ]


def _save_states(states: list[CalibrationState], path: Path) -> None:
    tensors = {f"{i}.{n}": getattr(s, n) for i, s in enumerate(states) for n in _STATE}
    tensors |= {f"{i}.num_steps": torch.tensor(s.num_steps) for i, s in enumerate(states)}
    save_tensors(tensors, path)


def _load_states(path: Path) -> list[CalibrationState]:
    tensors = load_tensors(path)
    return [
        CalibrationState(**{n: tensors[f"{i}.{n}"] for n in _STATE}, num_steps=int(tensors[f"{i}.num_steps"]))
        for i in range(_count(tensors))
    ]


def _count(tensors: dict[str, Tensor]) -> int:
    return 1 + max(int(name.split(".")[0]) for name in tensors)

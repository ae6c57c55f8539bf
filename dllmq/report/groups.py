"""The runs of a sweep in groups, what tells the groups apart, and a group's mean scores.

group       the runs that differ in nothing but the calibration seed
twin        of a group with a switch on: the group of the sweep whose axes are the same but for that switch
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dllmq.evaluation.statistics import clustered_mean
from dllmq.report.results import RunRecord, Sweep

# The metric that stands for a task, first match wins; a task without any of them shows its first metric.
PRIMARY = (
    "exact_match,strict-match",
    "exact_match,flexible-extract",
    "exact_match",
    "pass@1",
    "pass_at_1",
    "acc_norm",
    "acc",
)
_SHARE = re.compile(r"^(exact_match|acc|acc_norm|pass@\d+|pass_at_\d+|f1|mc[12])\b")
OFF = {"states": "clean", "value_scale": "minmax"}  # axes with an off-state, as a switch has
_LOWER = re.compile(r"perplexity|bits_per_byte|nll|loss|^kl\b")


@dataclass(frozen=True)
class Group:
    """Runs with equal axes but for the seed, one for each seed; `axes` is without it."""

    axes: dict[str, Any]
    records: tuple[RunRecord, ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(seed_of(r) for r in self.records)


@dataclass(frozen=True)
class Mean:
    """A group's score: mean over its seeds, standard error over n problems, and each seed's own value."""

    value: float | int
    stderr: float | int | None
    n: int | None
    per_seed: tuple[float | int, ...]


@dataclass(frozen=True)
class Measure:
    """A task's metric, or with task None a fidelity figure ("kl", "top1", ...)."""

    task: str | None
    metric: str

    def estimate(self, record: RunRecord) -> dict[str, Any] | None:
        """The run's {value, stderr, n}; None when it was not measured."""
        found = record.fidelity if self.task is None else record.scores.get(self.task, {})
        estimate = found.get(self.metric)
        return estimate if estimate and estimate["value"] is not None else None

    def values(self, record: RunRecord) -> Sequence[float | int | None] | None:
        """One value per problem, or per held-out prompt for fidelity; None when the run kept none."""
        if self.task is None:
            return record.fidelity_per_prompt.get(self.metric) or None
        return record.per_problem.get(self.task, {}).get(self.metric) or None


# ---------------------------------------------------------------- tasks and axes


def primary_metric(metrics: Iterable[str]) -> str | None:
    """The metric a task is judged by, a filter suffix ("acc,none") ignored."""
    names = list(metrics)
    for known in PRIMARY:
        for name in names:
            if name == known or name.removesuffix(",none") == known:
                return name
    return names[0] if names else None


def is_share(metric: str) -> bool:
    """True for metrics in 0..1 that are shown as percentages."""
    return bool(_SHARE.match(metric))


def metric_title(metric: str, between: str = ",\n") -> str:
    """lm-eval's "exact_match,strict-match" as a heading, the filter on its own line; "acc" for "acc,none"."""
    name, _, kept = metric.partition(",")
    return name if kept in ("", "none") else f"{name}{between}{kept}"


def lower_is_better(metric: str) -> bool:
    return bool(_LOWER.search(metric))


def tasks(sweep: Sweep) -> dict[str, str]:
    """Task -> its primary metric, over all records, in the order they were evaluated."""
    found: dict[str, str] = {}
    for record in all_records(sweep):
        for task, metrics in record.scores.items():
            if metric := primary_metric(metrics):
                found.setdefault(task, metric)
    return found


def all_records(sweep: Sweep) -> tuple[RunRecord, ...]:
    """The reference first, then the runs."""
    return (*((sweep.baseline,) if sweep.baseline else ()), *sweep.records)


def varying_axes(sweep: Sweep) -> list[str]:
    """Axes with more than one value among the runs, finished and failed, in the order they were written."""
    cells = [r.axes for r in sweep.records] + [s["axes"] for s in sweep.failed]
    names = list(dict.fromkeys(name for axes in cells for name in axes))
    return [name for name in names if len({repr(axes.get(name)) for axes in cells}) > 1]


def varying_toggles(sweep: Sweep) -> list[str]:
    """The varying axes that are plain switches."""
    cells = [r.axes for r in sweep.records] + [s["axes"] for s in sweep.failed]
    return [
        name for name in varying_axes(sweep) if all(isinstance(axes.get(name, False), bool) for axes in cells)
    ]


# ---------------------------------------------------------------- groups and twins


def groups(sweep: Sweep) -> list[Group]:
    """The sweep's runs by cell, in its order; a second run of one cell and seed starts a group of its own."""
    found: list[list[RunRecord]] = []
    for record in sweep.records:
        for members in found:
            same = _cell(members[0].axes) == _cell(record.axes)
            if same and seed_of(record) not in map(seed_of, members):
                members.append(record)
                break
        else:
            found.append([record])
    return [as_group(*members) for members in found]


def most_seeds(sweep: Sweep) -> int:
    return max((len(g.seeds) for g in groups(sweep)), default=1)


def as_group(*records: RunRecord) -> Group:
    """The given runs, which must differ in the seed only, as a group."""
    return Group({k: v for k, v in records[0].axes.items() if k != "seed"}, records)


def seed_of(record: RunRecord) -> int:
    return int(record.axes.get("seed", record.seed))


def _cell(axes: dict[str, Any], without: str | None = None) -> dict[str, Any]:
    """The axes that tell cells apart. A switch that an older record does not have counts as off."""
    return {k: v for k, v in axes.items() if k not in ("seed", without) and v is not None and v is not False}


def twin(sweep: Sweep, group: Group, toggle: str) -> Group | None:
    """The group with only `toggle` off; None when it is off here already, missing, or not unique."""
    if group.axes.get(toggle) is not True:
        return None
    wanted = _cell(group.axes, toggle)
    matches = [g for g in groups(sweep) if _cell(g.axes) == wanted]
    return matches[0] if len(matches) == 1 else None


def inert_reason(record: RunRecord, switch: str) -> str | None:
    """Why an axis has no effect in this run, None when it has; records say "cgq", "cgq: why" or, with the
    key's group, "calibration.states: why"."""
    for text in map(str, record.inert):
        name, _, reason = text.partition(":")
        if name.strip().rpartition(".")[2] == switch:
            return reason.strip() or "it is recorded as inert"
    return None


# ---------------------------------------------------------------- means


def score(group: Group, task: str, metric: str) -> Mean | None:
    """A group's score on a task; None when one of its runs lacks it."""
    return mean(group.records, Measure(task, metric))


def fidelity(group: Group, name: str) -> Mean | None:
    """A group's fidelity figure ("kl", "top1", ...); None when one of its runs lacks it."""
    return mean(group.records, Measure(None, name))


def mean(records: Sequence[RunRecord], measure: Measure) -> Mean | None:
    """One run: as recorded. Several: their mean, with the error clustered by problem.

    Without per-problem values the error is the mean of the runs' errors, which that of their mean cannot
    exceed.
    """
    found = [e for r in records if (e := measure.estimate(r))]
    if len(found) < len(records):
        return None
    per_seed = tuple(e["value"] for e in found)
    errors = [e["stderr"] for e in found]
    stderr = errors[0] if len(found) == 1 else None
    if len(found) > 1:
        table = columns(records, measure)
        known = None if table is None else table[np.isfinite(table).all(axis=1)]
        if known is not None and len(known):
            stderr = finite(clustered_mean(known).stderr)
        elif None not in errors:
            stderr = math.fsum(errors) / len(errors)
    counts = {e["n"] for e in found}
    n = counts.pop() if len(counts) == 1 else None
    return Mean(math.fsum(per_seed) / len(per_seed), stderr, n, per_seed)


def held_out_prompts(sweep: Sweep) -> int | None:
    """How many prompts the fidelity figures are from; None where runs differ or did not record them."""
    counts = {len(r.fidelity_per_prompt.get("kl", ())) for r in sweep.records if r.fidelity}
    return counts.pop() or None if len(counts) == 1 else None


def columns(records: Sequence[RunRecord], measure: Measure) -> np.ndarray | None:
    """Per-problem values [problems, runs], NaN where undefined; None unless all runs have as many."""
    found = [v for r in records if (v := measure.values(r))]
    if len(found) < len(records) or len({len(v) for v in found}) != 1:
        return None
    return np.array(found, dtype=np.float64).T


def finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


# ---------------------------------------------------------------- names and curves


def label(axes: dict[str, Any], varying: Iterable[str], without: str | None = None) -> str:
    """A run's short name: method, what varies and is not off, switches that are on: "gptq w3a4 +tmas"."""
    varying = list(varying)
    words = [str(axes.get("method", "run"))]
    words += [str(axes[k]) for k in ("bits",) if k in varying and k in axes]
    rest = [k for k in varying if k not in ("method", "bits", without) and k in axes]
    words += [f"{k}={axes[k]}" for k in rest if not isinstance(axes[k], bool) and OFF.get(k) != axes[k]]
    words += [f"+{k}" for k in rest if axes[k] is True]
    return " ".join(words)


def curve(
    record: RunRecord, metric: str, by_mask_ratio: bool
) -> tuple[list[float | int], list[float | int]] | None:
    """(steps, values) of a recorded curve such as `kl_by_step` or `kl_by_mask_ratio`, nulls left out."""
    for name, points in record.curves.items():
        if name.lower().replace("/", "_").startswith(metric) and is_by_mask_ratio(name) == by_mask_ratio:
            pairs = [
                (s, v) for s, v in zip(points["step"], points["value"], strict=True) if None not in (s, v)
            ]
            if pairs:
                return [s for s, _ in pairs], [v for _, v in pairs]
    return None


def is_by_mask_ratio(curve_name: str) -> bool:
    """True for a curve over mask-ratio blocks, False for one over denoising steps."""
    return curve_name.lower().endswith("by_mask_ratio")

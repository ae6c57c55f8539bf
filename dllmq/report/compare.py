"""Which runs are compared with which, and by how much: the only place where the report subtracts.

reference   full precision
twin        of a run with a switch on: the run of the sweep whose axes are the same but for that switch
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dllmq.evaluation.statistics import paired_difference
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
_LOWER = re.compile(r"perplexity|bits_per_byte|nll|loss|^kl\b")


@dataclass(frozen=True)
class Delta:
    """run - reference in the metric's unit; `stderr` None when unknown; `paired` over the same problems."""

    value: float | int
    stderr: float | int | None
    n: int | None
    paired: bool

    @property
    def clear(self) -> bool:
        """Larger than two standard errors; False when there is no standard error to hold it against."""
        return self.stderr is not None and abs(self.value) > 2 * self.stderr


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


def twin(sweep: Sweep, record: RunRecord, toggle: str) -> RunRecord | None:
    """The run with only `toggle` off; None when it is off here already, missing, or not unique."""
    if record.axes.get(toggle) is not True:
        return None
    wanted = {**record.axes, toggle: False}
    matches = [r for r in sweep.records if r.axes == wanted]
    return matches[0] if len(matches) == 1 else None


def delta(record: RunRecord, reference: RunRecord | None, task: str, metric: str) -> Delta | None:
    """Difference of one task's score, paired by problem where both kept their problems.

    Without per-problem values (or with different problems) the two standard errors add in squares, which
    overstates the error of a paired comparison. None when either score is missing, and when `reference` is a
    sweep's full precision measured under other settings than the run's own (a sweep over the model, say).
    """
    if reference is None or not comparable(record, reference):
        return None
    a, b = (r.per_problem.get(task, {}).get(metric) for r in (record, reference))
    if a and b and len(a) == len(b) and None not in a and None not in b:
        d = paired_difference(a, b)
        return Delta(d.value, d.stderr if math.isfinite(d.stderr) else None, d.n, paired=True)
    ours, theirs = (r.scores.get(task, {}).get(metric) for r in (record, reference))
    if not ours or not theirs or ours["value"] is None or theirs["value"] is None:
        return None
    errors = ours["stderr"], theirs["stderr"]
    stderr = math.hypot(*errors) if None not in errors else None
    return Delta(ours["value"] - theirs["value"], stderr, None, paired=False)


def comparable(record: RunRecord, reference: RunRecord) -> bool:
    """Whether a full-precision reference is the run's own, where the run names it (`notes.baseline`)."""
    own = record.notes.get("baseline")
    return reference.axes.get("method") != "fp" or own is None or own == reference.fingerprint


def relative_change(record: RunRecord, reference: RunRecord, metric: str) -> float | None:
    """(run - reference) / reference of a fidelity metric; None where undefined."""
    ours, theirs = (r.fidelity.get(metric, {}).get("value") for r in (record, reference))
    return (ours - theirs) / theirs if ours is not None and theirs else None


def label(axes: dict[str, Any], varying: Iterable[str], without: str | None = None) -> str:
    """A run's short name: method, what varies, and the switches that are on: "gptq w3a4 +tmas"."""
    varying = list(varying)
    words = [str(axes.get("method", "run"))]
    words += [str(axes[k]) for k in ("bits",) if k in varying and k in axes]
    rest = [k for k in varying if k not in ("method", "bits", without) and k in axes]
    words += [f"{k}={axes[k]}" for k in rest if not isinstance(axes[k], bool)]
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
    return bool(re.search(r"mask|ratio|block", curve_name.lower()))

"""Which runs are compared with which, and by how much: the only place where the report subtracts.

reference   full precision, one run
twin        of a group of runs with a switch on: the group that differs in that switch only (`groups.twin`)

Groups are compared problem by problem and seed by seed. Seeds are averaged inside a problem first, so they
are not extra problems; intervals and p-values speak about new problems, not about new seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from dllmq.evaluation.statistics import (
    Estimate,
    bootstrap_interval,
    holm,
    mcnemar,
    mean_stderr,
    sign_flip_p,
    t_test_p,
)
from dllmq.report.groups import (
    Group,
    Measure,
    columns,
    fidelity,
    finite,
    groups,
    inert_reason,
    lower_is_better,
    mean,
    seed_of,
    tasks,
    twin,
    varying_toggles,
)
from dllmq.report.results import RunRecord, Sweep

ALPHA = 0.05  # a difference is shown when its corrected p is below
Pairs = list[tuple[RunRecord, RunRecord]]


@dataclass(frozen=True)
class Delta:
    """a - b in the metric's unit.

    Attributes:
        stderr: over problems, None when unknown.
        low, high: 95 % BCa bootstrap interval over problems; None where not paired or n == 1.
        p: two-sided. Exact McNemar for one seed and 0/1 scores, else sign-flip permutation over problems.
        p_holm: p corrected for the comparisons of its family, None until corrected.
        n: problems (or prompts) on both sides.
        seeds: matched pairs of runs that were averaged.
        paired: False: the sides have no common per-problem values, and `stderr` is an upper estimate.
        won, lost: problems where a is larger, and smaller.
    """

    value: float | int
    stderr: float | int | None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_holm: float | None = None
    n: int | None = None
    seeds: int = 1
    paired: bool = True
    won: int | None = None
    lost: int | None = None

    @property
    def clear(self) -> bool:
        """Shown to differ: p (corrected where it is) below 0.05, or two standard errors without a p."""
        p = self.p if self.p_holm is None else self.p_holm
        if p is not None:
            return p < ALPHA
        return not self.paired and self.stderr is not None and abs(self.value) > 2 * self.stderr


@dataclass(frozen=True)
class Effect:
    """What a switch changed in one group: the group minus its twin, per task and in KL."""

    toggle: str
    group: Group
    twin: Group
    deltas: dict[str, Delta]
    kl: Delta | None

    @property
    def inert(self) -> bool:
        """The runs recorded that the switch has no effect in this combination."""
        return any(inert_reason(r, self.toggle) is not None for r in self.group.records)


@dataclass(frozen=True)
class MainEffect:
    """What a switch changed on average: per problem over all its twin pairs, of one method or of all.

    `task` is "KL" for the KL to full precision, with n counting prompts.

    Attributes:
        delta: speaks about new problems.
        runs: the mean over matched runs (twin pairs x seeds) with the standard error that their own spread
            gives, n counting them: two quantizations that should not differ do, and problems cannot tell.
        runs_p: two-sided t test over the runs.
        placebo: the pairs are those in which the switch is inert, so that all there is to see is noise.
    """

    toggle: str
    method: str | None
    task: str
    metric: str
    twins: int
    delta: Delta
    runs: Estimate
    runs_p: float
    placebo: bool = False

    @property
    def verdict(self) -> str:
        """Helps or hurts where corrected p over problems and p over runs are below 0.05.

        "one run" where there is a single matched pair of runs: what another one would give is not known.
        """
        if self.placebo:
            return "placebo"
        if self.runs.n == 1:
            return "one run"
        p = self.delta.p_holm
        if p is None or p >= ALPHA or self.runs_p >= ALPHA or self.delta.value == 0:
            return "no difference shown"
        return "helps" if (self.delta.value > 0) != lower_is_better(self.metric) else "hurts"


# ---------------------------------------------------------------- differences


def delta(a: Group | RunRecord, b: Group | RunRecord | None, task: str, metric: str) -> Delta | None:
    """a - b of one task's score, paired by problem, and by seed where b is a group.

    Two groups are matched over the seeds they share. A single run as b (full precision) stands against
    every seed of a. None when a score is missing, no seed is shared, or when b is a sweep's full precision
    measured under other settings than a's own (a sweep over the model, say).
    """
    return _delta(a, b, Measure(task, metric))


def fidelity_delta(a: Group | RunRecord, b: Group | RunRecord | None, name: str) -> Delta | None:
    """a - b of a fidelity figure, paired by held-out prompt; every prompt counts the same."""
    return _delta(a, b, Measure(None, name))


def _delta(a: Group | RunRecord, b: Group | RunRecord | None, measure: Measure) -> Delta | None:
    pairs = matched(a, b)
    if not pairs:
        return None
    d = _differences(pairs, measure)
    d = None if d is None else d[np.isfinite(d)]
    return _unpaired(pairs, measure) if d is None or not len(d) else _tested(d, len(pairs))


def matched(a: Group | RunRecord, b: Group | RunRecord | None) -> Pairs:
    """The runs to subtract from each other, none where the two sides cannot be compared."""
    ours = a.records if isinstance(a, Group) else (a,)
    if b is None:
        pairs = []
    elif isinstance(b, Group):
        of_seed = {seed_of(r): r for r in b.records}
        pairs = [(r, of_seed[seed_of(r)]) for r in ours if seed_of(r) in of_seed]
    else:
        pairs = [(r, b) for r in ours]
    return pairs if all(comparable(x, y) for x, y in pairs) else []


def comparable(record: RunRecord, reference: RunRecord) -> bool:
    """Whether a full-precision reference is the run's own, where the run names it (`notes.baseline`)."""
    own = record.notes.get("baseline")
    return reference.axes.get("method") != "fp" or own is None or own == reference.fingerprint


def _differences(pairs: Pairs, measure: Measure) -> np.ndarray | None:
    """Per problem the mean of a - b over the pairs, [problems]; None unless all have the same problems."""
    table = columns([r for pair in pairs for r in pair], measure)
    return None if table is None else (table[:, 0::2] - table[:, 1::2]).sum(axis=1) / len(pairs)


def _tested(d: np.ndarray, seeds: int) -> Delta:
    binary = seeds == 1 and bool(np.isin(d, (-1, 0, 1)).all())
    return replace(_test(d.tobytes(), binary), seeds=seeds)


@lru_cache(maxsize=4096)
def _test(raw: bytes, binary: bool) -> Delta:
    """Value, error, interval and p of differences [problems]; kept, for several tables show the same."""
    d = np.frombuffer(raw)
    estimate, (low, high) = mean_stderr(d), bootstrap_interval(d)
    return Delta(
        value=estimate.value,
        stderr=finite(estimate.stderr),
        low=finite(low),
        high=finite(high),
        p=mcnemar(d > 0, d < 0).p if binary else sign_flip_p(d),
        n=estimate.n,
        won=int((d > 0).sum()),
        lost=int((d < 0).sum()),
    )


def _unpaired(pairs: Pairs, measure: Measure) -> Delta | None:
    """Difference of the two means; their errors add in squares, which overstates a paired comparison's."""
    a, b = (mean(records, measure) for records in zip(*pairs, strict=True))
    if a is None or b is None:
        return None
    stderr = None if a.stderr is None or b.stderr is None else math.hypot(a.stderr, b.stderr)
    return Delta(a.value - b.value, stderr, seeds=len(pairs), paired=False)


def relative_change(a: Group, b: Group, name: str) -> float | None:
    """(a - b) / b of a fidelity figure; None where undefined."""
    ours, theirs = fidelity(a, name), fidelity(b, name)
    return (ours.value - theirs.value) / theirs.value if ours and theirs and theirs.value else None


# ---------------------------------------------------------------- effects of switches


def effects(sweep: Sweep) -> list[Effect]:
    """Every group with a switch on against its twin.

    p-values are Holm-corrected over all tasks of all effects; those of KL over all effects, on their own.
    """
    found = []
    for toggle in varying_toggles(sweep):
        for group in groups(sweep):
            if off := twin(sweep, group, toggle):
                deltas = {t: d for t, m in tasks(sweep).items() if (d := delta(group, off, t, m))}
                found.append(Effect(toggle, group, off, deltas, fidelity_delta(group, off, "kl")))
    scores = iter(holm_corrected([d for e in found for d in e.deltas.values()]))
    kls = iter(holm_corrected([e.kl for e in found if e.kl]))
    return [
        replace(e, deltas={t: next(scores) for t in e.deltas}, kl=next(kls) if e.kl else None) for e in found
    ]


def main_effects(sweep: Sweep) -> list[MainEffect]:
    """Each switch with two twin pairs or more: over all methods, then over each method that has two.

    A problem's differences are averaged over the pairs and their seeds before anything is tested, so a pair
    is no extra problem. Pairs in which the switch is inert make rows of their own, a placebo. p-values are
    Holm-corrected over all other rows on the tasks; those of KL on their own.
    """
    found = []
    for toggle in varying_toggles(sweep):
        own = [e for e in effects(sweep) if e.toggle == toggle]
        active, inert = [e for e in own if not e.inert], [e for e in own if e.inert]
        methods = list(dict.fromkeys(str(e.group.axes.get("method")) for e in active))
        for method in (None, *(methods if len(methods) > 1 else ())):
            pairs = [e for e in active if method in (None, str(e.group.axes.get("method")))]
            found += average(sweep, toggle, method, pairs)
        found += [replace(e, placebo=True) for e in average(sweep, toggle, None, inert)]
    return corrected(found)


def corrected(found: Sequence[MainEffect]) -> list[MainEffect]:
    """The same rows with Holm's correction: over all rows on the tasks, and over those of KL; no placebo."""
    families = {
        kl: iter(holm_corrected([e.delta for e in found if not e.placebo and (e.task == "KL") == kl]))
        for kl in (False, True)
    }
    return [e if e.placebo else replace(e, delta=next(families[e.task == "KL"])) for e in found]


def average(
    sweep: Sweep, toggle: str, method: str | None, pairs: Sequence[Effect], least: int = 2
) -> list[MainEffect]:
    """The mean over twin pairs on every task and in KL; nothing below `least` pairs."""
    measures = [(t, Measure(t, m)) for t, m in tasks(sweep).items()] + [("KL", Measure(None, "kl"))]
    found = []
    for task, measure in measures if len(pairs) >= least else ():
        if d := _averaged(pairs, measure):
            by_run = _run_differences(pairs, measure)
            runs, p = mean_stderr(by_run), t_test_p(by_run)
            found.append(MainEffect(toggle, method, task, measure.metric, len(pairs), d, runs, p))
    return found


def _run_differences(twins: Sequence[Effect], measure: Measure) -> np.ndarray:
    """The mean difference of every matched pair of runs, [twin pairs x seeds]."""
    pairs = [pair for e in twins for pair in matched(e.group, e.twin)]
    found = [d for pair in pairs if (d := _differences([pair], measure)) is not None]
    return np.array([float(d[np.isfinite(d)].mean()) for d in found])


def _averaged(twins: Sequence[Effect], measure: Measure) -> Delta | None:
    """The mean difference over twin pairs; None unless all of them have the same problems."""
    matches = [matched(e.group, e.twin) for e in twins]
    found = [d for pairs in matches if pairs and (d := _differences(pairs, measure)) is not None]
    if len(found) < len(twins) or len({len(d) for d in found}) != 1:
        return None
    d = np.mean(found, axis=0)
    d = d[np.isfinite(d)]
    return _tested(d, min(map(len, matches))) if len(d) else None


def holm_corrected(deltas: Sequence[Delta]) -> list[Delta]:
    """The same deltas with Holm's correction over those that have a p; they are one family."""
    adjusted = iter(holm([d.p for d in deltas if d.p is not None]))
    return [d if d.p is None else replace(d, p_holm=next(adjusted)) for d in deltas]

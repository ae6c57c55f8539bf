"""Answers that changed against full precision, read from the samples that lie beside the records.

    <sweep>/samples_<task>.jsonl          full precision
    <sweep>/<run>/samples_<task>.jsonl    a run

One JSON object per line and problem: doc_id, id, prompt, target, response, filtered, and <metric>: value.
A problem is *lost* when the run scores below full precision on the task's primary metric, *won* when above.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dllmq.report.compare import comparable
from dllmq.report.groups import Group, groups, lower_is_better, tasks
from dllmq.report.results import RunRecord, Sweep

PER_RUN, ON_PAGE, LENGTH = 6, 60, 1200  # changes shown of a group and of a sweep, characters of a text


@dataclass(frozen=True)
class Answer:
    """A response, what the task's filter read in it (None: the response itself), and its score."""

    response: str
    read_as: str | None
    value: float


@dataclass(frozen=True)
class Change:
    """One problem with the answer of full precision (`before`) and of the run (`after`); texts are cut."""

    task: str
    problem: str
    prompt: str
    target: str
    before: Answer
    after: Answer
    lost: bool


@dataclass(frozen=True)
class GroupChanges:
    """Lost and won problems of runs that differ in their seed only, and some of the first run's.

    Attributes:
        records: the runs that have samples.
        problems: that both full precision and the first run answered.
        lost, won: one count per run.
        shown: lost ones first.
    """

    group: Group
    records: tuple[RunRecord, ...]
    problems: int
    lost: tuple[int, ...]
    won: tuple[int, ...]
    shown: tuple[Change, ...]


def changed_answers(
    sweep: Sweep, folder: str | Path, per_run: int = PER_RUN, on_page: int = ON_PAGE
) -> list[GroupChanges]:
    """What each group of runs answered differently from full precision; those without samples are left out.

    Args:
        folder: the sweep's, where full precision's samples lie; a run's lie beside its results.json.
        per_run: changes shown of one run at most; a third of them are won ones where there are some.
        on_page: changes shown of all groups together at most, divided evenly.

    Raises:
        ValueError: a samples file cannot be read; names the file and the line.
    """
    if sweep.baseline is None or not sweep.paths:
        return []
    folders = {id(r): (Path(folder) / p).parent for r, p in zip(sweep.records, sweep.paths, strict=True)}
    references = {task: _read(Path(folder) / _name(task)) for task in tasks(sweep)}
    found = []
    for group in groups(sweep):
        own = [r for r in group.records if comparable(r, sweep.baseline)]
        runs = [(r, *_changes_of(folders[id(r)], tasks(sweep), references)) for r in own]
        if runs := [run for run in runs if run[1]]:
            records, problems, lost, won = zip(*runs, strict=True)
            counts = (tuple(map(len, lost)), tuple(map(len, won)))
            shown = _choose(lost[0], won[0], per_run)
            found.append(GroupChanges(group, records, problems[0], *counts, shown))
    return _share(found, on_page)


def _changes_of(
    folder: Path, metrics: dict[str, str], references: dict[str, dict[str, dict[str, Any]]]
) -> tuple[int, list[Change], list[Change]]:
    """(problems compared, lost, won) of one run; tasks take turns."""
    problems = 0
    lost: list[list[Change]] = []
    won: list[list[Change]] = []
    for task, metric in metrics.items():
        samples = _read(folder / _name(task)) if references[task] else {}
        pairs = list(_pairs(references[task], samples, metric))
        changed = [_change(task, metric, *pair) for pair in pairs if pair[0][metric] != pair[1][metric]]
        problems += len(pairs)
        lost.append([c for c in changed if c.lost])
        won.append([c for c in changed if not c.lost])
    return problems, _by_turns(lost), _by_turns(won)


def _pairs(
    reference: dict[str, dict[str, Any]], samples: dict[str, dict[str, Any]], metric: str
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """(full precision's, the run's) sample of each problem both answered, with the same prompt."""
    for key, after in samples.items():
        before = reference.get(key, {})
        scored = all(isinstance(sample.get(metric), (int, float)) for sample in (before, after))
        if scored and before.get("prompt") == after.get("prompt"):
            yield before, after


def _change(task: str, metric: str, before: dict[str, Any], after: dict[str, Any]) -> Change:
    name = after.get("id") if after.get("id") is not None else after.get("doc_id")
    return Change(
        task=task,
        problem=_cut(_text(name)),
        prompt=_cut(_text(after.get("prompt")), keep_end=True),
        target=_cut(_text(after.get("target"))),
        before=_answer(before, metric),
        after=_answer(after, metric),
        lost=(after[metric] < before[metric]) != lower_is_better(metric),
    )


def _answer(sample: dict[str, Any], metric: str) -> Answer:
    filtered = sample.get("filtered")
    read = filtered.get(metric.partition(",")[2]) if isinstance(filtered, dict) else None
    return Answer(
        response=_cut(_text(sample.get("response"))),
        read_as=None if read is None else _cut(_text(read)),
        value=float(sample[metric]),
    )


# ---------------------------------------------------------------- choosing


def _by_turns(per_task: list[list[Change]]) -> list[Change]:
    """The first change of each task, then the second of each, ..."""
    longest = max(map(len, per_task), default=0)
    return [changes[i] for i in range(longest) for changes in per_task if i < len(changes)]


def _choose(lost: list[Change], won: list[Change], limit: int) -> tuple[Change, ...]:
    """`limit` changes, a third of them won ones or more where too few are lost; lost ones first."""
    some = min(len(won), max(limit // 3, limit - len(lost)))
    return (*lost[: limit - some], *won[:some])


def _share(found: list[GroupChanges], on_page: int) -> list[GroupChanges]:
    """Cuts every group to the same number of changes, the largest with which all fit, but at least one."""
    each = max((len(g.shown) for g in found), default=1)
    while each > 1 and sum(min(len(g.shown), each) for g in found) > on_page:
        each -= 1
    left, shared = on_page, []
    for g in found:
        lost, won = ([c for c in g.shown if c.lost == kind] for kind in (True, False))
        shared.append(replace(g, shown=_choose(lost, won, min(each, left))))
        left -= len(shared[-1].shown)
    return shared


# ---------------------------------------------------------------- reading


def _name(task: str) -> str:
    return f"samples_{task}.jsonl"


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """doc_id -> sample; empty when there is no such file."""
    if not path.is_file():
        return {}
    samples: dict[str, dict[str, Any]] = {}
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                sample = _parse(line, path, number)
                samples[_text(sample["doc_id"])] = sample
    return samples


def _parse(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        sample = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is not valid JSON in line {number} ({error.msg}); delete it, or run that cell again."
        ) from None
    if not isinstance(sample, dict) or "doc_id" not in sample:
        raise ValueError(
            f"{path}, line {number}: expected an object with a doc_id; delete it, or run that cell again."
        )
    return sample


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, ensure_ascii=False, default=str)


def _cut(text: str, keep_end: bool = False) -> str:
    """`text` in at most LENGTH characters; of a prompt the end is kept, where the question stands."""
    if len(text) <= LENGTH:
        return text
    return "… " + text[2 - LENGTH :] if keep_end else text[: LENGTH - 2] + " …"

"""The parts of report.html that unfold: answers that changed, and how each run is reproduced.

Every text that comes from a record or a sample passes `escape`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape
from typing import Any

from dllmq.report.groups import label, seed_of, varying_axes
from dllmq.report.results import RunRecord, Sweep, redact
from dllmq.report.samples import Answer, Change, GroupChanges

MAX_NOTES = 12  # entries of one note that are shown, of hundreds (a line per linear)


# ---------------------------------------------------------------- answers


def changes_html(sweep: Sweep, changes: list[GroupChanges]) -> str:
    """One block per group: how many answers were lost and won, and some of them with both answers."""
    if not changes:
        return ""
    varying = varying_axes(sweep)
    lead = (
        "Lost: full precision scored higher on this problem; won: the run did. "
        f"{sum(len(g.shown) for g in changes)} of them are shown, long texts cut; the samples files have "
        "every answer. Of several seeds all are counted and the first one's answers are shown."
    )
    return f"<p>{lead}</p>" + "".join(_group_changes(label(g.group.axes, varying), g) for g in changes)


def _group_changes(name: str, changes: GroupChanges) -> str:
    lost, won = (" / ".join(map(str, counts)) for counts in (changes.lost, changes.won))
    counts = f"{lost} lost, {won} won of {changes.problems}"
    if len(changes.records) > 1:
        counts += f" (seeds {', '.join(str(seed_of(r)) for r in changes.records)})"
    title = f'{escape(name)} <span class="muted">{counts}</span>'
    if not changes.shown:
        return f'<p class="fold">{title}</p>'
    return f"<details><summary>{title}</summary><div>{''.join(map(_change, changes.shown))}</div></details>"


def _change(change: Change) -> str:
    tone, word = ("worse", "lost") if change.lost else ("better", "won")
    answers = _answer("full precision", change.before) + _answer("this run", change.after)
    return (
        f'<article><h4>{escape(change.task)} <small>{escape(change.problem)}</small> <span class="{tone}">'
        f"<span>{word}</span></span></h4>"
        + _text("prompt", change.prompt)
        + f'<div class="pair">{answers}</div>'
        + _text("target", change.target)
        + "</article>"
    )


def _answer(title: str, answer: Answer) -> str:
    verdict = {0.0: "wrong", 1.0: "correct"}.get(answer.value, f"{answer.value:.4g}")
    read = f", read as “{answer.read_as}”" if answer.read_as is not None else ""
    return _text(f"{title}: {verdict}{read}", answer.response)


def _text(title: str, text: str) -> str:
    return f'<div><h5>{escape(title)}</h5><pre class="wrap">{escape(text)}</pre></div>'


# ---------------------------------------------------------------- reproduce


def reproduce_html(sweep: Sweep) -> str:
    """What all runs share once, then each run's command and what is its own; nothing is left out."""
    varying = varying_axes(sweep)
    named = [("full precision", sweep.baseline)] if sweep.baseline else []
    named += [(label(r.axes, varying), r) for r in sweep.records]
    if not named:
        return ""
    facts = [dict(_facts(record)) for _, record in named]
    configs = [dict(_leaves(redact(record.config))) for _, record in named]
    blocks = [
        _block(name, record.command, _without(fact, _common(facts)), _without(config, _common(configs)))
        for (name, record), fact, config in zip(named, facts, configs, strict=True)
    ]
    if len(named) > 1:
        blocks.insert(0, _block("what all runs share", "", _common(facts), _common(configs)))
    lead = "Each run's command, environment and configuration, as recorded."
    return f"<p>{lead}</p>" + "".join(blocks)


def _block(name: str, command: str, facts: dict[str, str], config: dict[str, str]) -> str:
    items = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items() if v)
    lines = "\n".join(f"{k}: {v}" for k, v in config.items())
    return (
        f"<details><summary>{escape(name)}</summary><div>"
        + (f'<pre class="wrap">{escape(command)}</pre>' if command else "")
        + (f"<dl>{items}</dl>" if items else "")
        + (f"<pre>{escape(lines)}</pre>" if lines else "")
        + "</div></details>"
    )


def _facts(r: RunRecord) -> Iterator[tuple[str, str]]:
    yield "run", r.run_name
    yield "device", r.device if isinstance(r.device, str) else _join(r.device)
    yield "git", _join(r.git) or "not recorded"
    yield "seed", str(r.seed)
    yield "versions", _join(r.versions)
    yield "without effect", ", ".join(map(str, r.inert))
    yield "fingerprint", r.fingerprint
    for key, value in r.notes.items():
        entries = [f"{name} {text}".strip() for name, text in flatten(value)]
        more = len(entries) - MAX_NOTES
        rest = [f"and {more} more in results.json"] if more > 0 else []
        yield f"notes: {key}", ", ".join(entries[:MAX_NOTES] + rest)


def _leaves(values: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The entries of a nested configuration as ("a.b", JSON text)."""
    if isinstance(values, dict) and values:
        for key, value in values.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, json.dumps(values, ensure_ascii=False)


def _common(all_values: list[dict[str, str]]) -> dict[str, str]:
    """The entries that are the same in all of several dicts; none of a single one."""
    if len(all_values) < 2:
        return {}
    return {k: v for k, v in all_values[0].items() if all(values.get(k) == v for values in all_values)}


def _without(values: dict[str, str], common: dict[str, str]) -> dict[str, str]:
    return {k: v for k, v in values.items() if k not in common}


def _join(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {text}".strip() for key, text in flatten(values))


def flatten(values: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested mappings as ("a.b", text) pairs; lists of plain values on one line, shortened after 12."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(values, list) and values and isinstance(values[0], (dict, list)):
        for i, value in enumerate(values):
            yield from flatten(value, f"{prefix}[{i}]")
    elif isinstance(values, list):
        yield prefix, ", ".join(_short(v) for v in values[:12]) + (" …" if len(values) > 12 else "")
    else:
        yield prefix, _short(values)


def _short(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)

"""What each setting changes: runs with one value of an axis minus the runs with its reference value.

axis        anything that varies in a sweep beside model, method, widths, sampler, seed and plain switches: a
            constant of a technique, the number of states, a group size
level       the value of an axis in a run. Where the calibration states come from is one axis with the levels
            clean, random_mask, uniform and tmas, however they were switched on; so is V's scale with minmax,
            mse and iaaq.
reference   the level that most cells have (of several, the first). For states and V's scale that is an
            off-state's, and the technique's own level is a second one: would another choice do as well?

The statistics are those of the switches (`compare.average`); one pair is enough here.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from dllmq.report.compare import Effect, MainEffect, average, corrected
from dllmq.report.groups import Group, groups, varying_axes, varying_toggles
from dllmq.report.results import Sweep

# switch -> (axis it belongs to, its level there)
_SWITCHED = {"tmas": ("states", "tmas"), "iaaq": ("value_scale", "iaaq")}
_NO_SETTING = ("model", "method", "bits", "gen_length", "steps", "cache", "threshold", "seed")


@dataclass(frozen=True)
class SettingEffect:
    """`level` instead of `reference`, everything else equal."""

    axis: str
    level: str
    reference: str
    effect: MainEffect


def setting_effects(sweep: Sweep) -> list[SettingEffect]:
    """Every level of every axis against its references; p-values are Holm-corrected over all rows."""
    found = [
        SettingEffect(axis, _text(sweep, axis, level), _text(sweep, axis, reference), effect)
        for axis in setting_axes(sweep)
        for level, reference in _contrasts(sweep, axis)
        for effect in _averages(sweep, axis, level, reference)
    ]
    effects = corrected([f.effect for f in found])
    return [replace(f, effect=effect) for f, effect in zip(found, effects, strict=True)]


def setting_axes(sweep: Sweep) -> list[str]:
    """The varying axes that are settings."""
    switches = varying_toggles(sweep)
    return [a for a in varying_axes(sweep) if a not in _NO_SETTING and a not in switches]


def levels(axes: dict[str, Any]) -> dict[str, Any]:
    """A run's level on every axis; switches are merged into the axis they belong to."""
    found = {k: v for k, v in axes.items() if v is not None and k not in _SWITCHED and k != "seed"}
    for switch, (axis, level) in _SWITCHED.items():
        if axes.get(switch):
            found[axis] = level
    return found


def _contrasts(sweep: Sweep, axis: str) -> list[tuple[Any, Any]]:
    """(level, reference) pairs; a technique against its own off-state is a switch, and shown there."""
    counts = Counter(levels(g.axes).get(axis) for g in groups(sweep))
    own = [level for of_axis, level in _SWITCHED.values() if of_axis == axis and level in counts]
    usual = max((level for level in counts if level not in own), key=lambda level: counts[level])
    references = [usual, *own]
    return [
        (level, reference)
        for reference in references
        for level in counts
        if level not in references and level != reference
    ]


def _averages(sweep: Sweep, axis: str, level: Any, reference: Any) -> list[MainEffect]:
    """Over all methods, then over each where there are several."""
    pairs = [
        Effect(axis, group, other, {}, None)
        for group in groups(sweep)
        if levels(group.axes).get(axis) == level and (other := _partner(sweep, group, axis, reference))
    ]
    methods = list(dict.fromkeys(str(e.group.axes.get("method")) for e in pairs))
    found = []
    for method in (None, *(methods if len(methods) > 1 else ())):
        own = [e for e in pairs if method in (None, str(e.group.axes.get("method")))]
        found += average(sweep, axis, method, own, least=1)
    return found


def _partner(sweep: Sweep, group: Group, axis: str, reference: Any) -> Group | None:
    """The group whose levels are the same but for `axis`, which is at the reference."""
    wanted = levels(group.axes) | {axis: reference}
    wanted = {k: v for k, v in wanted.items() if v is not None and v is not False}
    matches = [
        g for g in groups(sweep) if {k: v for k, v in levels(g.axes).items() if v is not False} == wanted
    ]
    return matches[0] if len(matches) == 1 else None


def _text(sweep: Sweep, axis: str, level: Any) -> str:
    """A level in words; a constant that a run has at its default is looked up in the run's config."""
    if level is not None:
        return str(level)
    for record in sweep.records:
        if axis not in record.axes:
            config = record.config
            for node in (config, config.get("calibration"), config.get("method")):
                if isinstance(node, dict) and axis in node:
                    value = node[axis]
                    return " ".join(f"{x:g}" for x in value) if isinstance(value, list) else str(value)
    return "default"

"""Published settings per model and task (task_settings.yaml), and how they become EvalSettings."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from dllmq.diffusion import SamplerConfig
from dllmq.evaluation.settings import EvalSettings

_TABLE = Path(__file__).with_name("task_settings.yaml")
_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
DEFAULT = "default"
_SAMPLER = tuple(f.name for f in fields(SamplerConfig))
_OFF: dict[str, Any] = {
    **{"temperature": 0.0, "cfg_scale": 0.0, "logits_eos_inf": False, "confidence_eos_eot_inf": False},
    **{"alg_temp": None, "top_p": None, "top_k": None, "eps": SamplerConfig.eps},
    **{"cache": "none", "threshold": None},
}


@dataclass(frozen=True)
class Row:
    """A published setting.

    Attributes:
        preset, model, task: what it is found by; model: the name of a model preset.
        settings: fields of SamplerConfig and EvalSettings, as in the YAML.
        score: in percent, full precision, of all `n` problems; metric: what it is.
        mark: V, verbatim from `source`.
        differs: in what the published run was not this one; "" where nothing is known.
    """

    preset: str
    model: str
    task: str
    settings: Mapping[str, Any]
    score: float
    metric: str
    n: int
    mark: str
    source: str
    differs: str

    def published(self) -> dict[str, Any]:
        """For the record: what was published under this setting."""
        names = ("preset", "score", "metric", "n", "mark", "source", "differs")
        return {name: getattr(self, name) for name in names}


@cache
def _table() -> Mapping[str, Any]:
    table: dict[str, Any] = yaml.load(_TABLE.read_text(encoding="utf-8"), _Base)
    return table


@cache
def rows() -> tuple[Row, ...]:
    """All rows, in the order of the YAML."""
    table = dict(_table())
    sizes, metrics = table.pop("sizes"), table.pop("metrics")
    return tuple(
        Row(
            preset, model, task, row["set"], row["score"], metrics[task], sizes[task],
            group["mark"], group["source"], row.get("differs", ""),
        )
        for preset, group in table.items()
        for model, tasks in group["rows"].items()
        for task, row in tasks.items()
    )  # fmt: skip


def sizes() -> dict[str, int]:
    """Problems of each published task, all subtasks together."""
    return dict(_table()["sizes"])


def presets() -> tuple[str, ...]:
    """Values of `tasks.settings`."""
    return (DEFAULT, *dict.fromkeys(row.preset for row in rows()))


def find(preset: str, model: str, task: str) -> Row | None:
    """The row; None for default.

    Raises:
        ValueError: an unknown preset, or one without a row for the model and task, with the rows it has.
    """
    if preset not in presets():
        close = difflib.get_close_matches(preset, presets(), n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ValueError(f"tasks.settings={preset} is not known; there are {', '.join(presets())}.{hint}")
    if preset == DEFAULT:
        return None
    own = [row for row in rows() if row.preset == preset]
    found = [row for row in own if (row.model, row.task) == (model, task)]
    if found:
        return found[0]
    models = dict.fromkeys(row.model for row in own)
    has = "; ".join(f"{m} with {', '.join(row.task for row in own if row.model == m)}" for m in models)
    raise ValueError(
        f"tasks.settings={preset} has no row for model {model} and task {task}; it has {has}: choose one of "
        "these (model=..., with model.path=<folder> for a folder of your own), or tasks.settings=default."
    )


def published(
    preset: str, model: str, task: str, base: EvalSettings, explicit: frozenset[str] = frozenset()
) -> list[dict[str, Any]]:
    """What was published for the model and task: under the preset, or under all of them for default.

    Under a preset, `differs` also names the fields in which the user's settings (`explicit`) leave the row.
    """
    found = [row for row in rows() if (row.model, row.task) == (model, task)]
    out = []
    for row in found:
        if preset == row.preset:
            left = _left(apply_row(row, base), apply_row(row, base, explicit))
            out.append(row.published() | {"differs": "; ".join(filter(None, (row.differs, left)))})
        elif preset == DEFAULT:
            out.append(row.published())
    return out


def _left(row: EvalSettings, own: EvalSettings) -> str:
    """The fields in which a run's settings are not the row's, with the run's values."""
    theirs, ours = (asdict(x) | asdict(x.sampler) for x in (row, own))
    changed = [f"{k}={v}" for k, v in ours.items() if k != "sampler" and theirs[k] != v]
    return f"here {', '.join(changed)}" if changed else ""


def apply_row(row: Row | None, base: EvalSettings, explicit: frozenset[str] = frozenset()) -> EvalSettings:
    """base with a row's settings, except for the fields that the user set.

    Args:
        explicit: names of fields of SamplerConfig and EvalSettings that keep base's value.

    Raises:
        ValueError: what the user set does not go with the row.
    """
    if row is None:
        return base
    wanted = _complete(row.settings, base.sampler, explicit)
    wanted = {name: value for name, value in wanted.items() if name not in explicit}
    own = {name: value for name, value in wanted.items() if name not in _SAMPLER}
    sampler = asdict(base.sampler) | {name: value for name, value in wanted.items() if name in _SAMPLER}
    try:
        return replace(base, sampler=SamplerConfig(**sampler), **own)
    except ValueError as error:
        raise ValueError(f"tasks.settings={row.preset} for {row.task}: {error}") from error


def _complete(given: Mapping[str, Any], sampler: SamplerConfig, explicit: frozenset[str]) -> dict[str, Any]:
    """A row with what it leaves out: see task_settings.yaml."""
    if "gen_length" not in given:
        return {"cfg_scale": 0.0} | dict(given)
    length = sampler.gen_length if "gen_length" in explicit else given["gen_length"]
    return {"steps": length, "block_length": length} | _OFF | dict(given)

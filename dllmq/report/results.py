"""The record of a run (results.json), and a sweep as the records under one folder.

Files of a sweep folder:
    baseline.json                full precision, the same schema as results.json (axes.method = "fp")
    <run>/results.json           a finished run, at any depth
    <run>/status.json            {"status": "failed", "run_name", "axes", "error"} of a run that failed
    summary.json, table.md, report.html    written from the above by `build.write_report`

Rule for numbers that are not finite: NaN and +-infinity are written as null (JSON has no other word for
them) and one warning names where they were. A null reads as "not measured" everywhere in the report.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from dllmq.durable import write_whole

logger = logging.getLogger(__name__)

RESULTS, BASELINE, STATUS = "results.json", "baseline.json", "status.json"
_SEAL = "sha256"
_SECRET = re.compile(r"(api_?key|secret|password|passwd|(access|auth|hf|bearer)_?token)$", re.IGNORECASE)


@dataclass(frozen=True)
class RunRecord:
    """Everything one run leaves behind; field names are the keys of results.json.

    Scores and per-problem values are in the metric's own unit (accuracies in 0..1), seconds end in `_s`,
    memory in `_bytes`. A curve whose name ends in `_by_mask_ratio` has the mask-ratio block as its step
    (block 0 = most masked), any other one the denoising step.
    """

    config: dict[str, Any]  # fully resolved
    run_name: str
    scores: dict[str, dict[str, dict[str, Any]]]  # task -> metric -> {value, stderr, n}
    fidelity: dict[str, dict[str, Any]]  # "kl" (nats), "top1" (0..1), ... -> {value, stderr, n}
    curves: dict[str, dict[str, list]]  # name -> {step: [...], value: [...]}, equally long
    cost: dict[str, float | int | None]
    inert: list[str]  # switches without effect here: "cgq" or "cgq: why"
    versions: dict[str, str]
    git: dict[str, Any]  # {"commit": ..., "dirty": ...}; empty outside a checkout
    device: str | dict[str, Any]
    seed: int
    axes: dict[str, Any]  # what tells the cells of a sweep apart: method, bits, tmas, ...
    command: str
    status: str
    fingerprint: str
    per_problem: dict[str, dict[str, list]] = field(default_factory=dict)  # task -> metric -> [n], doc order
    calibration: dict[str, Any] = field(default_factory=dict)  # what was drawn
    notes: dict[str, Any] = field(default_factory=dict)
    fidelity_per_prompt: dict[str, list] = field(default_factory=dict)  # name -> [held-out prompts]

    def to_json(self) -> dict[str, Any]:
        """The record as plain JSON values, fields in the order above."""
        return to_plain({f.name: getattr(self, f.name) for f in dataclasses.fields(self)})


@dataclass(frozen=True)
class Sweep:
    """The runs under one folder, in the order of their axes; `paths[i]` is where `records[i]` was read."""

    name: str
    records: tuple[RunRecord, ...]
    baseline: RunRecord | None
    failed: tuple[dict[str, Any], ...]
    paths: tuple[str, ...] = ()  # relative to the sweep folder


# ---------------------------------------------------------------- writing


def to_plain(obj: Any) -> Any:
    """obj as JSON values: dataclasses, mappings, sequences, paths, enums, numpy and torch scalars or arrays.

    NaN and infinity become None. Raises TypeError naming the place of anything else.
    """
    dropped: list[str] = []
    plain = _plain(obj, "", dropped)
    if dropped:
        logger.warning(
            "Not finite, written as null: %s", ", ".join(dropped[:5]) + " ..." * (len(dropped) > 5)
        )
    return plain


def _plain(obj: Any, where: str, dropped: list[str]) -> Any:
    if isinstance(obj, Enum):
        return _plain(obj.value, where, dropped)
    if obj is None or isinstance(obj, str):
        return None if obj is None else str(obj)
    if isinstance(obj, (bool, int)):
        return obj
    if isinstance(obj, float):
        if math.isfinite(obj):
            return float(obj)
        dropped.append(where or "the value")
        return None
    if isinstance(obj, os.PathLike):
        return os.fspath(obj)
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        obj = {f.name: getattr(obj, f.name) for f in dataclasses.fields(obj)}
    if isinstance(obj, Mapping):
        return {str(k): _plain(v, f"{where}.{k}" if where else str(k), dropped) for k, v in obj.items()}
    if isinstance(obj, (set, frozenset)):
        obj = sorted(obj, key=str)
    if isinstance(obj, (list, tuple)):
        return [_plain(v, f"{where}[{i}]", dropped) for i, v in enumerate(obj)]
    if hasattr(obj, "tolist"):  # numpy and torch, without importing either
        return _plain(obj.tolist(), where, dropped)
    raise TypeError(f"{where or 'The value'} is a {type(obj).__name__}, which has no place in a JSON record.")


def write_text_atomic(path: str | os.PathLike[str], text: str) -> Path:
    """Write text to path whole or not at all (dllmq/durable.py)."""
    return write_whole(Path(path), text)


def write_json_atomic(path: str | os.PathLike[str], obj: Any) -> Path:
    """Write obj (see `to_plain`) as JSON to path, whole or not at all; NaN and infinity become null."""
    plain = _sealed(obj.to_json()) if isinstance(obj, RunRecord) else to_plain(obj)
    return write_text_atomic(path, json_text(plain) + "\n")


def _sealed(plain: dict[str, Any]) -> dict[str, Any]:
    """A record with its checksum, so that a flipped bit does not read as another number."""
    return plain | {_SEAL: _checksum(plain)}


def _checksum(plain: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def json_text(plain: Any, indent: str = "") -> str:
    """Indented JSON in which a list of plain values stays on one line: a thousand scores are one line."""
    inner = indent + "  "
    if isinstance(plain, dict) and plain:
        items = (
            f"{inner}{json.dumps(k, ensure_ascii=False)}: {json_text(v, inner)}" for k, v in plain.items()
        )
        return "{\n" + ",\n".join(items) + f"\n{indent}}}"
    if isinstance(plain, list) and any(isinstance(v, (dict, list)) for v in plain):
        return "[\n" + ",\n".join(f"{inner}{json_text(v, inner)}" for v in plain) + f"\n{indent}]"
    return json.dumps(plain, ensure_ascii=False, allow_nan=False)


def redact(config: Any) -> Any:
    """A copy of a configuration in which values under keys such as `api_key` or `password` are hidden."""
    if isinstance(config, Mapping):
        return {k: "***" if v and _SECRET.search(str(k)) else redact(v) for k, v in config.items()}
    return [redact(v) for v in config] if isinstance(config, (list, tuple)) else config


# ---------------------------------------------------------------- reading


def read_json(path: str | os.PathLike[str]) -> Any:
    """Parse a JSON file; ValueError names the file and the line when it cannot be read."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is not valid JSON ({error.msg}, line {error.lineno}); delete it and run that cell again."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}.") from None


def load_record(path: str | os.PathLike[str]) -> RunRecord:
    """Read one results.json or baseline.json.

    Unknown keys are left aside, so that a newer version's records still open.

    Raises:
        ValueError: not JSON, not what was written, a key is missing, or has the wrong type; names the file
            and the key.
    """
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(raw).__name__}.")
    if (seal := raw.pop(_SEAL, None)) is not None and seal != _checksum(raw):
        raise ValueError(
            f"{path} is damaged: its content is not what was written; delete it and run that cell again (or "
            f"remove its key '{_SEAL}', if you changed it yourself)."
        )
    values = {}
    for f in dataclasses.fields(RunRecord):
        if f.name in raw:
            values[f.name] = _typed(raw[f.name], _JSON_TYPES[f.name], f.name, path)
        elif f.default_factory is dataclasses.MISSING:
            raise ValueError(
                f"{path} has no key '{f.name}'; was it written by another version or another program?"
            )
    record = RunRecord(**values)
    _check_estimates(record, path)
    _check_curves(record, path)
    return record


_JSON_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("config", "scores", "fidelity", "curves", "cost", "versions", "git"), (dict,)),
    **dict.fromkeys(("axes", "per_problem", "calibration", "notes", "fidelity_per_prompt"), (dict,)),
    **dict.fromkeys(("run_name", "command", "status", "fingerprint"), (str,)),
    "inert": (list,),
    "device": (str, dict),
    "seed": (int,),
}


def _typed(value: Any, types: tuple[type, ...], key: str, path: Any) -> Any:
    if isinstance(value, types) and not (isinstance(value, bool) and bool not in types):
        return value
    expected = " or ".join(
        {"dict": "an object", "list": "a list", "str": "text", "int": "a whole number"}[t.__name__]
        for t in types
    )
    raise ValueError(f"{path}: '{key}' must be {expected}, got {value!r:.60}.")


def _check_estimates(record: RunRecord, path: Any) -> None:
    estimates = {
        f"scores.{task}.{metric}": e for task, ms in record.scores.items() for metric, e in ms.items()
    }
    estimates |= {f"fidelity.{metric}": e for metric, e in record.fidelity.items()}
    for where, estimate in estimates.items():
        for key in ("value", "stderr", "n"):
            if not isinstance(estimate, dict) or key not in estimate:
                raise ValueError(f"{path} has no key '{where}.{key}'.")
            number = estimate[key]
            if number is not None and (isinstance(number, bool) or not isinstance(number, (int, float))):
                raise ValueError(f"{path}: '{where}.{key}' must be a number or null, got {number!r:.60}.")


def _check_curves(record: RunRecord, path: Any) -> None:
    for name, curve in record.curves.items():
        for key in ("step", "value"):
            if not isinstance(curve, dict) or not isinstance(curve.get(key), list):
                raise ValueError(f"{path} has no list 'curves.{name}.{key}'.")
        if len(curve["step"]) != len(curve["value"]):
            raise ValueError(
                f"{path}: 'curves.{name}' has {len(curve['step'])} steps and {len(curve['value'])} values."
            )


def load_sweep(folder: str | os.PathLike[str]) -> Sweep:
    """All runs under a folder, ordered by their axes.

    The reference is baseline.json at the top, else the first run with method "fp". A folder that has a
    results.json is finished, whatever an older status.json beside it says. W&B's folders and hidden ones
    are not searched.

    Raises:
        ValueError: the folder is missing, holds no record at all, or one of them cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"No folder {folder}; give the folder of a sweep, such as outputs/<sweep>.")
    paths = files_named(RESULTS, folder)
    found = [(load_record(path), path.relative_to(folder).as_posix()) for path in paths]
    open_ends = [path for path in files_named(STATUS, folder) if not path.with_name(RESULTS).exists()]
    failed = [status for status in map(read_status, open_ends) if status.get("status") == "failed"]
    baseline = load_record(folder / BASELINE) if (folder / BASELINE).exists() else None
    if not found and not failed and baseline is None:
        raise ValueError(f"No {RESULTS} under {folder}; run a sweep first, or give the folder it wrote to.")

    key = _axes_key([r.axes for r, _ in found] + [s["axes"] for s in failed])
    found.sort(key=lambda pair: (key(pair[0].axes), pair[0].run_name, pair[1]))
    failed.sort(key=lambda status: (key(status["axes"]), status["run_name"]))
    if baseline is None:
        index = next((i for i, (r, _) in enumerate(found) if r.axes.get("method") == "fp"), None)
        baseline = found.pop(index)[0] if index is not None else None
    return Sweep(
        name=folder.resolve().name,
        records=tuple(record for record, _ in found),
        baseline=baseline,
        failed=tuple(failed),
        paths=tuple(path for _, path in found),
    )


def read_status(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A status.json with every key the report reads; absent ones get neutral values."""
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(raw).__name__}.")
    defaults = {
        "status": "unknown",
        "run_name": Path(path).parent.name,
        "axes": {},
        "error": "no error was recorded",
    }
    return {**raw, **{k: raw.get(k) or v for k, v in defaults.items()}}


def files_named(name: str, folder: Path) -> Iterator[Path]:
    """Files of this name at any depth, in order, without hidden folders and W&B's copies.

    A sweep that runs makes and removes folders meanwhile: os.walk passes over them, rglob raises.
    """
    found = []
    for place, inner, files in os.walk(folder):
        inner[:] = [part for part in inner if part != "wandb" and not part.startswith(".")]
        if name in files:
            found.append(Path(place, name))
    return iter(sorted(found))


def _axes_key(axes: list[dict[str, Any]]):
    """Sort key of a run: its axes in the order they were first written, off before on, w4a4 before w4a16."""
    names = list(dict.fromkeys(name for a in axes for name in a))
    return lambda a: tuple(natural(name, a.get(name)) for name in names)


def natural(name: str, value: Any) -> tuple:
    """Orders the values of an axis: none, off, on, numbers, then text with its numbers as numbers."""
    if value is None:
        return (0,)
    if isinstance(value, (bool, int, float)):
        return (1, value)
    rank = {"fp": 0, "rtn": 1}.get(str(value), 2) if name == "method" else 0
    parts = re.split(r"(\d+)", str(value))
    return (2, rank, tuple((1, int(p), "") if p.isdigit() else (0, 0, p) for p in parts if p))

"""Tracks a run offline for real, without an account, and reads its .wandb file back."""

from __future__ import annotations

import dataclasses
import json
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dllmq.report.results import RunRecord
from dllmq.report.tracker import MAX_SAMPLES, TrackedRun
from tests.report.records_factory import record

# ends of names: every curve and fidelity figure that a run can leave
CURVES = [f"{m}_by_{x}" for m in ("kl", "top1", "argmax_at_k", "slots_at_k") for x in ("step", "mask_ratio")]
CURVES += ["hidden_error_by_step", "hidden_error_by_block"]
CURVES += ["divergence_by_step", "divergence_mask_ratio_by_step"]
FIDELITY = ["kl", "top1", "argmax_at_k", "slots_at_k", "hidden_error", "final_agreement", "exact_match_rate"]
FIDELITY += ["first_divergence_step", "first_divergence_mask_ratio"]
KEY = "0123456789abcdef0123456789abcdef01234567"
ROWS = [
    {
        "task": "mini_gsm",
        "problem": i,
        "prompt": f"Question {i}\nAnswer:",
        "target": 7 if i else "#### 7",  # W&B wants one type in a column
        "full_precision": "#### 7",
        "quantized": f"#### {i}",
        "correct_before": True,
        "correct_after": i == 7,
    }
    for i in range(MAX_SAMPLES + 3)
]


def full_record() -> RunRecord:
    """A run with every curve, fidelity figure and cost, and lm-eval's names of metrics."""
    run = record("awq", tmas=True, cgq=False, iaaq=True)
    lengths = {"step": 32, "mask_ratio": 4, "block": 8}
    curves = {}
    for i, name in enumerate(CURVES):
        n = next(n for end, n in lengths.items() if name.endswith(f"_by_{end}"))
        curves[name] = {"step": list(range(n)), "value": [0.1 * i + 0.01 * k for k in range(n)]}
    gsm = run.scores["mini_gsm"]["exact_match"]
    return dataclasses.replace(
        run,
        curves=curves,
        fidelity={
            name: {"value": 0.05 * (i + 1), "stderr": 0.01, "n": 400} for i, name in enumerate(FIDELITY)
        },
        scores=run.scores | {"mini_gsm": {f"exact_match,{f}-match": gsm for f in ("strict", "flexible")}},
        cost=run.cost | {"fp_forwards": 0, "truncated_share": 0.02},
    )


def tracked(folder: Path, **axes: Any) -> TrackedRun:
    axes = {"method": "awq", "bits": "w3a4", "tmas": True, "cgq": False, "iaaq": True, "seed": 0} | axes
    return TrackedRun(
        name="awq-w3a4-tmas",
        folder=folder,
        config={"method": {"n_grid": 20}, "tmas": True, "tracker": {"api_key": KEY}},
        axes=axes,
        group="demo-sweep",
    )


@contextmanager
def no_account(folder: Path) -> Iterator[Callable[[str, str], None]]:
    """Neither WANDB_ variables nor a key in this block; gives `setenv`."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith("WANDB_")]:
            patch.delenv(name)
        patch.setenv("NETRC", str(folder / "netrc"))
        patch.setenv("HOME", str(folder / "home"))
        yield patch.setenv


def offline_file(folder: Path) -> Path:
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    return path


def read_offline(path: Path) -> list:
    """The records of a .wandb file: 7 bytes of header, then LevelDB's log format in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, offset, parts, records = path.read_bytes(), 7, b"", []
    assert data[:4] == b":W&B"
    while offset + 7 <= len(data):
        left = 32768 - offset % 32768
        if left < 7:
            offset += left
            continue
        _, length, kind = struct.unpack("<IHB", data[offset : offset + 7])
        if kind == 0:
            offset += left
            continue
        parts += data[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # full, last
            records.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
    return records


def values(items: Any) -> dict[str, Any]:
    return {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in items}


def history(records: list) -> list[dict[str, Any]]:
    return [values(r.history.item) for r in records if r.HasField("history")]


def summary_of(records: list) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for r in records:
        if r.HasField("summary"):
            found |= values(r.summary.update)
    return found


def config_of(records: list) -> dict[str, Any]:
    return values(next(r.run for r in records if r.HasField("run")).config.update)

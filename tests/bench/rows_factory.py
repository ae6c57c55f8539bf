"""Rows and sections for the tests of the bench."""

from typing import Any

from dllmq.bench.rows import Row, Section

MACHINE: dict[str, Any] = {
    "device": "cpu",
    "accelerator": None,
    "processor": "a processor",
    "instructions": ["avx512_vnni"],
    "threads": 2,
    "system": "Linux x86_64",
    "versions": {"dllmq": "0.1", "python": "3.12.1", "torch": "2.11"},
    "git": "abc",
}


def row(**changes: Any) -> Row:
    fields: dict[str, Any] = dict(
        key="generate.exact",
        what="exact generation",
        shape="batch 8",
        baseline="plain loop",
        ours="dllmq",
        unit="s",
        baseline_value=3.0,
        ours_value=1.0,
        ratio=3.0,
        low=2.5,
        high=3.25,
        repeats=5,
        equal=True,
        share=1.0,
        note="",
        numbers={"forwards": 16.0, "baseline_forwards": 16.0},
    )
    return Row(**(fields | changes))


def section(*rows: Row, **changes: Any) -> Section:
    fields: dict[str, Any] = dict(
        section="generate",
        shape="llada_1b_shape bfloat16",
        quick=False,
        command="python -m dllmq.bench generate --shape llada_1b_shape",
        date="2026-11-23 01:00 UTC",
        machine=MACHINE,
        left_out=("Not measured, this: for that reason.",),
    )
    return Section(rows=rows, **(fields | changes))

"""`packed` against `fake`, width by width, on the same problems: scores, answers, KL.

python experiments/backends/pairs.py outputs/backends    # reads that sweep; pairs.json and pairs.md lie here

Differences are the report's own (`dllmq.report.compare`): paired by problem, exact McNemar p, 95 % BCa
bootstrap interval. Holm's correction is over the widths of a task. Answers are those in the samples beside
each record, which are not kept in git.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from dllmq.report.cells import p_text, signed
from dllmq.report.compare import delta, fidelity_delta, holm_corrected
from dllmq.report.groups import Group, groups, score, tasks
from dllmq.report.results import Sweep, load_sweep

HERE = Path(__file__).resolve().parent
HEAD = (
    "| width | kernel | task | fake | packed | packed − fake, points [95 %] | won | lost | p (Holm) "
    "| same answer |\n|---|---|---|---:|---:|---:|---:|---:|---:|---:|\n"
)


def main() -> None:
    folder = Path(sys.argv[1])
    rows = compared(load_sweep(folder), folder)
    (HERE / "pairs.json").write_text(json.dumps(rows, indent=1) + "\n")
    (HERE / "pairs.md").write_text(HEAD + "".join(map(line, rows)))


def compared(sweep: Sweep, folder: Path) -> list[dict[str, Any]]:
    """A row per task and width, widths in the order of the sweep."""
    found: dict[tuple[str, str], Group] = {(g.axes["bits"], g.axes["backend"]): g for g in groups(sweep)}
    widths = [bits for bits, backend in found if backend == "packed" and (bits, "fake") in found]
    rows = []
    for task, metric in tasks(sweep).items():
        pairs = [(found[bits, "packed"], found[bits, "fake"]) for bits in widths]
        deltas = holm_corrected([d for p, f in pairs if (d := delta(p, f, task, metric))])
        for bits, (packed, fake), d in zip(widths, pairs, deltas, strict=True):
            kl = fidelity_delta(packed, fake, "kl")
            rows.append(
                {"bits": bits, "kernel": packed.records[0].notes["backend"], "task": task, "metric": metric}
                | {"fake": score(fake, task, metric).value, "packed": score(packed, task, metric).value}
                | {"difference": vars(d), "kl": None if kl is None else vars(kl)}
                | answers(*(samples(folder, g, task) for g in (packed, fake)))
            )
    return rows


def samples(folder: Path, group: Group, task: str) -> list[dict[str, Any]]:
    """What a run answered, by problem."""
    file = folder / group.records[0].run_name / f"samples_{task}.jsonl"
    rows = [json.loads(text) for text in file.read_text().splitlines()]
    return sorted(rows, key=lambda row: row["doc_id"])


def answers(packed: list[dict[str, Any]], fake: list[dict[str, Any]]) -> dict[str, Any]:
    """How many responses are the same text, and how far apart log-likelihoods are in nats."""
    both = list(zip(packed, fake, strict=True))
    gaps = [
        abs(a - b)
        for p, f in both
        for a, b in zip(p.get("log_likelihoods", ()), f.get("log_likelihoods", ()), strict=True)
    ]
    found = {"n": len(both), "same": sum(p["response"] == f["response"] for p, f in both)}
    return found | ({"nats": {"mean": sum(gaps) / len(gaps), "largest": max(gaps)}} if gaps else {})


def line(row: dict[str, Any]) -> str:
    d = row["difference"]
    points, low, high = (signed(100 * d[name], 1) for name in ("value", "low", "high"))
    cells = (
        row["bits"], row["kernel"], row["task"], f"{100 * row['fake']:.1f} %", f"{100 * row['packed']:.1f} %",
        f"{points} [{low}, {high}]", d["won"], d["lost"], f"{p_text(d['p'])} ({p_text(d['p_holm'])})",
        f"{row['same']} of {row['n']}",
    )  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |\n"


if __name__ == "__main__":
    main()

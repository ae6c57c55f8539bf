"""A sweep of 16 cells against 16 separate runs: seconds and full-precision forwards.

python experiments/sharing/run.py        # writes results.json and table.md beside itself
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SIZES = [
    "tasks=mini_gsm",
    "eval.limit=10",
    "eval.fidelity_states=50",
    "eval.fidelity_prompts=8",
    "calibration.num_prompts=16",
    "calibration.num_states=32",
    "tracker=none",
    "threads=1",
]
AXES = {
    "method": ("awq", "gptq"),
    "tmas": ("false", "true"),
    "cgq": ("false", "true"),
    "iaaq": ("false", "true"),
}


def run(words: list[str], folder: Path) -> float:
    """Wall seconds of one command."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "dllmq.run", *words, *SIZES]
    done = subprocess.run(command, cwd=folder, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return time.perf_counter() - start


def forwards(folder: Path) -> list[int]:
    """Full-precision forwards each cell made, in the order they ran."""
    files = sorted(folder.rglob("results.json"), key=lambda f: f.stat().st_mtime)
    return [json.loads(f.read_text())["cost"]["fp_forwards"] for f in files]


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        together, apart = Path(name) / "together", Path(name) / "apart"
        for folder in (together, apart):
            folder.mkdir()
        sweep = run(["-m", *(f"{k}={','.join(v)}" for k, v in AXES.items())], together)
        single = []
        for values in itertools.product(*AXES.values()):
            words = [f"{k}={v}" for k, v in zip(AXES, values, strict=True)]
            single.append(run([*words, "cache_dir=null"], apart))
        results = {
            "command": "python experiments/sharing/run.py",
            "sizes": SIZES,
            "sweep": {"seconds": sweep, "fp_forwards": forwards(together)},
            "separate": {"seconds": sum(single), "fp_forwards": forwards(apart)},
        }
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (HERE / "table.md").write_text(table(results))
    print(table(results))


def table(results: dict) -> str:
    """The two rows, and their ratio."""
    lines = [
        "| | seconds | full-precision forwards | of the first cell | of the others |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in ("sweep", "separate"):
        r = results[name]
        first, *rest = r["fp_forwards"]
        lines.append(f"| {name} | {r['seconds']:.0f} | {sum(r['fp_forwards'])} | {first} | {sum(rest)} |")
    ratio = results["separate"]["seconds"] / results["sweep"]["seconds"]
    return "\n".join([*lines, "", f"Separate runs take {ratio:.1f} times as long."]) + "\n"


if __name__ == "__main__":
    main()

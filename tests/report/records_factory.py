"""Records as a sweep on the embedded model leaves them; the numbers are made up, for tests only."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

from dllmq.evaluation.statistics import mean_stderr
from dllmq.report.results import RunRecord, write_json_atomic

TASKS = {"mini_gsm": "exact_match", "mini_code": "pass@1", "mini_choice": "acc"}
N, STEPS = 200, 32
# (method, tmas) -> the share solved per task, KL
CELLS = {
    ("awq", False): ((0.545, 0.84, 0.71), 0.0823),
    ("awq", True): ((0.585, 0.86, 0.72), 0.0611),
    ("gptq", False): ((0.665, 0.905, 0.745), 0.0342),
    ("gptq", True): ((0.71, 0.925, 0.75), 0.0214),
}


def record(method: str = "gptq", shares=(0.7, 0.9, 0.75), kl: float | None = 0.03, **axes) -> RunRecord:
    """One run; problem i is solved when its difficulty is below the share, so runs are paired."""
    rng = random.Random(0)
    difficulty = {task: [rng.random() for _ in range(N)] for task in TASKS}
    noise = random.Random(f"{method}{axes}")
    per_problem, scores = {}, {}
    for (task, metric), share in zip(TASKS.items(), shares, strict=True):
        solved = [float(d + noise.gauss(0, 0.06) < share) for d in difficulty[task]]
        per_problem[task] = {metric: solved}
        scores[task] = {metric: dataclasses.asdict(mean_stderr(solved))}
    fp = method == "fp"
    axes = {"method": method, **({} if fp else {"bits": "w3a4"}), **axes}
    name = "-".join(f"{k}_{v}" if not isinstance(v, str) else v for k, v in axes.items())
    return RunRecord(
        config={
            "method": {"_target_": f"dllmq.methods.{method}"},
            "tmas": axes.get("tmas", False),
            "tasks": list(TASKS),
        },
        run_name=name,
        scores=scores,
        fidelity={} if fp else {"kl": _estimate(kl, 0.04), "top1": _estimate(1 - 1.1 * kl, 0.002)},
        curves={} if fp else _curves(kl, noise),
        cost={
            "calibrate_s": 0.0 if fp else 11.2 + noise.random(),
            "quantize_s": 0.0 if fp else 6.4 + noise.random(),
            "evaluate_s": 38.0 + 3 * noise.random(),
            "peak_memory_bytes": 612_000_000,
            "weight_bytes": 7_000_000 if fp else 1_910_000,
            "quantized_share": 0.0 if fp else 0.843,
            "tokens_per_second": 412.0 + noise.random(),
            "forwards": 18_400,
        },
        inert=[],
        versions={
            "dllmq": "0.1.0",
            "python": "3.11.2",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "lm_eval": "0.4.13",
        },
        git={"commit": "3f1c9a7b2d5e48c0a9b1", "dirty": False},
        device={"type": "cpu", "threads": 2},
        seed=0,
        axes=axes,
        command=f"python -m dllmq.run method={method} tmas={str(axes.get('tmas', False)).lower()}",
        status="finished",
        fingerprint=f"fp-{name}",
        per_problem=per_problem,
        calibration={}
        if fp
        else {
            "states": "tmas" if axes.get("tmas") else "clean",
            "sequences": 128,
            "tokens": 6144,
            "prompts": 128,
            "mask_ratio_blocks": [38, 26, 26, 38] if axes.get("tmas") else [0, 0, 0, 128],
        },
    )


def _estimate(value: float, spread: float) -> dict:
    return {"value": value, "stderr": abs(value) * spread, "n": 500}


def _curves(kl: float, noise: random.Random) -> dict:
    steps = list(range(STEPS))
    by_step = [kl * (2.1 - 1.7 * s / STEPS) * (1 + 0.15 * noise.random()) for s in steps]
    by_block = [kl * f * (1 + 0.1 * noise.random()) for f in (1.9, 1.2, 0.8, 0.5)]
    return {
        "kl_by_step": {"step": steps, "value": by_step},
        "top1_by_step": {"step": steps, "value": [1 - v for v in by_step]},
        "kl_by_mask_ratio": {"step": [0, 1, 2, 3], "value": by_block},
        "top1_by_mask_ratio": {"step": [0, 1, 2, 3], "value": [1 - v for v in by_block]},
    }


def baseline() -> RunRecord:
    return record("fp", (0.86, 0.955, 0.78), kl=None)


def cells() -> list[RunRecord]:
    return [record(method, shares, kl, tmas=tmas) for (method, tmas), (shares, kl) in CELLS.items()]


def write_sweep(folder: Path, failed: bool = False) -> Path:
    """A sweep folder: baseline.json, four cells, and with `failed` one that left only its status.json."""
    write_json_atomic(folder / "baseline.json", baseline())
    for i, cell in enumerate(cells()):
        write_json_atomic(folder / str(i) / "results.json", cell)
    if failed:
        status = {
            "status": "failed",
            "run_name": "rtn-w3a4-tmas_True",
            "axes": {"method": "rtn", "bits": "w3a4", "tmas": True},
            "error": "SingularHessianError: blocks.3.down: the Gram matrix is singular; raise damp.\nmore",
        }
        write_json_atomic(folder / "4" / "status.json", status)
    return folder

"""Records as a sweep on the embedded model leaves them; the numbers are made up, for tests only."""

from __future__ import annotations

import dataclasses
import json
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


# ---------------------------------------------------------------- an ablation: 16 cells, several seeds


def ablation(
    methods=("awq", "gptq"), seeds=(0, 1, 2), tasks=("mini_gsm", "mini_code")
) -> tuple[RunRecord, list[RunRecord]]:
    """(full precision, every method x tmas x cgq x iaaq x seed) with the curves of a whole evaluation."""
    switches = [(a, b, c) for a in (False, True) for b in (False, True) for c in (False, True)]
    runs = [ablation_cell(m, *on, seed, tasks) for m in methods for on in switches for seed in seeds]
    return _of_tasks(baseline(), tasks), runs


def ablation_cell(method: str, tmas: bool, cgq: bool, iaaq: bool, seed: int, tasks) -> RunRecord:
    shares, kl = CELLS[method, tmas]
    noise = random.Random(f"{method}{tmas}{cgq}{iaaq}{seed}")
    kl *= (0.9 if cgq and tmas else 1.0) * (0.85 if iaaq else 1.0) * (1 + 0.06 * noise.random())
    shares = tuple(s + 0.01 * iaaq for s in shares)
    run = record(method, shares, kl, tmas=tmas, cgq=cgq, iaaq=iaaq, seed=seed)
    switches = f"tmas={tmas} cgq={cgq} iaaq={iaaq}".lower()
    fidelity = run.fidelity | {
        "argmax_at_k": _estimate(1 - 0.6 * kl, 0.002),
        "slots_at_k": _estimate(1 - 1.4 * kl, 0.003),
        "hidden_error": _estimate(3 * kl, 0.02),
        "final_agreement": _estimate(1 - 4 * kl, 0.01),
        "exact_match_rate": _estimate(1 - 6 * kl, 0.03),
        "first_divergence_step": _estimate(9.5, 0.1),
        "first_divergence_mask_ratio": _estimate(0.71, 0.05),
    }
    return dataclasses.replace(
        _of_tasks(run, tasks),
        run_name=run.run_name + f"-seed_{seed}",
        seed=seed,
        command=f"python -m dllmq.run method={method} {switches} seed={seed}",
        fidelity=fidelity,
        fidelity_per_prompt={"kl": [kl * (0.5 + i / 32) * (0.9 + 0.2 * noise.random()) for i in range(32)]},
        curves=run.curves | _more_curves(kl, noise),
        cost=run.cost
        | {"weight_bytes": 1_910_000 if method == "gptq" else 2_034_000, "fp_forwards": 0}
        | {"quantize_s": (6.4 if method == "gptq" else 15.9) * (1 + 0.2 * noise.random())},
        inert=["cgq: the calibration text has no masked tokens"] if cgq and not tmas else [],
        config=run.config | {"cgq": cgq, "iaaq": iaaq, "seed": seed, "bits": "w3a4"},
    )


def _of_tasks(run: RunRecord, tasks) -> RunRecord:
    scores, per_problem = ({t: values[t] for t in tasks} for values in (run.scores, run.per_problem))
    return dataclasses.replace(run, scores=scores, per_problem=per_problem)


def _more_curves(kl: float, noise: random.Random) -> dict:
    steps = list(range(STEPS))

    def near(value: float) -> float:
        return value * (1 + 0.1 * noise.random())

    curves = {
        "hidden_error_by_step": [near(3 * kl * (1.4 - 0.6 * s / STEPS)) for s in steps],
        "hidden_error_by_block": [near(kl * (0.6 + 0.5 * b)) for b in range(8)],
        "divergence_by_step": [min(1.0, near(4 * kl * s / STEPS)) for s in steps],
        "divergence_mask_ratio_by_step": [1 - s / STEPS for s in steps],
    }
    for name, factor in (("argmax_at_k", 0.6), ("slots_at_k", 1.4)):
        curves[f"{name}_by_step"] = [1 - near(factor * kl * (1.6 - s / STEPS)) for s in steps]
        curves[f"{name}_by_mask_ratio"] = [1 - near(factor * kl * f) for f in (1.9, 1.2, 0.8, 0.5)]
    return {name: {"step": list(range(len(v))), "value": v} for name, v in curves.items()}


def write_ablation(folder: Path, **choice) -> Path:
    """The ablation's sweep folder, with the samples that the records' per-problem values speak of."""
    reference, runs = ablation(**choice)
    for place, run in ((folder, reference), *((folder / r.run_name, r) for r in runs)):
        write_json_atomic(place / ("baseline.json" if run is reference else "results.json"), run)
        write_samples(place, run)
    return folder


def write_samples(folder: Path, run: RunRecord, text: str = "") -> None:
    """samples_<task>.jsonl of a run; `text` is put into every prompt, response and target."""
    for task, metrics in run.per_problem.items():
        ((metric, values),) = metrics.items()
        lines = []
        for i, value in enumerate(values):
            result = 18 + i if value else 17 + i
            sample = {
                "doc_id": i,
                "id": f"{task}/test/{i}{text}",
                "prompt": f"Question: Tina has {i} balls and wins 18 more. How many now?{text}\nAnswer:",
                "target": f"{i}+18={18 + i} balls.\n#### {18 + i}{text}",
                "response": f" {i}+18={result} balls.\n#### {result}{text}",
                "filtered": {"strict-match": str(result)},
                metric: value,
            }
            lines.append(json.dumps(sample) + "\n")
        (folder / f"samples_{task}.jsonl").write_text("".join(lines), encoding="utf-8")


def with_prompts(run: RunRecord, prompts: int = 32) -> RunRecord:
    """The run with its KL and top-1 per held-out prompt; prompts are as hard in every run."""
    hard, noise = random.Random(1), random.Random(run.run_name)
    kl = [run.fidelity["kl"]["value"] * hard.lognormvariate(0, 0.7) for _ in range(prompts)]
    kl = [value * (1 + 0.1 * noise.random()) for value in kl]
    top1 = [1 - 1.1 * value for value in kl]
    return dataclasses.replace(run, fidelity_per_prompt={"kl": kl, "top1": top1})

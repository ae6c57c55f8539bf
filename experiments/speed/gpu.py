"""Everything that needs a GPU, in one call under ten minutes; results are written as they come.

    python experiments/speed/gpu.py --out experiments/speed/gpu
    python experiments/speed/gpu.py --dry-run --shape tiny --device cpu --out outputs/gpu     does it run?

    tests      pytest -m gpu: the kernels' exactness on this device
    linear     bf16 F.linear against the packed kernels, W8A8, W4A8, W4A4, W4A16 (each checked in float64)
    generate   the plain loop against ours; bf16 against packed widths; batch 1 and 16
    memory     bytes of the weights, peak of a forward
    quantize   GPTQ's solver against Algorithm 1 as published; LLaDA-8B, all techniques, end to end

Each part is a process of its own with a budget of seconds; what it did not use goes to the next. A part that
fails or runs out of time leaves its rows so far in results.json and its last words in parts.json.
Needs torch with CUDA, triton, transformers, jaxtyping and pytest; neither hydra nor lm-eval.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from dllmq.bench.machine import describe  # noqa: E402
from dllmq.bench.sections import run_section  # noqa: E402
from dllmq.bench.shapes import DTYPES, SHAPES, Setup, default_dtype  # noqa: E402
from dllmq.bench.study import write_tables  # noqa: E402
from dllmq.report.results import write_json_atomic, write_text_atomic  # noqa: E402

BUDGET = {"tests": 90, "linear": 120, "generate": 130, "memory": 50, "quantize": 180}  # seconds
TOTAL = 570


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, prog="experiments/speed/gpu.py"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for everything that is measured")
    parser.add_argument("--shape", default="llada_8b_shape", help=f"the model: {', '.join(SHAPES)}")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--parts", default=",".join(BUDGET), help="with commas, in the order they run in")
    parser.add_argument("--seconds", type=int, default=TOTAL, help=f"for everything ({TOTAL})")
    parser.add_argument(
        "--dry-run", action="store_true", help="toy sizes, on any device: does the script run?"
    )
    parser.add_argument("--part", choices=BUDGET, help=argparse.SUPPRESS)  # one part, in this process
    return parser.parse_args()


def refusal(args: argparse.Namespace) -> str:
    """Why nothing can be measured here, in one sentence; "" where it can."""
    unknown = [part for part in args.parts.split(",") if part not in BUDGET]
    if unknown:
        return f"unknown part {unknown[0]!r}: use {', '.join(BUDGET)}."
    if args.shape not in SHAPES:
        return f"unknown --shape {args.shape!r}: use {', '.join(SHAPES)}."
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        return (
            "this measures on a CUDA device, and torch sees none here: run it on a machine with a GPU, or "
            "try it out with --dry-run --shape tiny --device cpu."
        )
    if not args.device.startswith("cuda") and not args.dry_run:
        return f"--device {args.device} is for --dry-run only: CPU numbers are python -m dllmq.bench's."
    return ""


def main() -> int:
    args = arguments()
    if why := refusal(args):
        print(f"experiments/speed/gpu.py: {why}", file=sys.stderr)
        return 1
    args.out.mkdir(parents=True, exist_ok=True)
    if args.part:
        return run_part(args)
    parts = all_parts(args)
    write_tables(args.out)
    return int(any(part["status"] != "finished" for part in parts))


def all_parts(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs the parts one after the other; parts.json is written after each."""
    started, spare, parts = time.monotonic(), 0.0, list[dict[str, Any]]()
    for name in args.parts.split(","):
        left = args.seconds - (time.monotonic() - started)
        budget = min(BUDGET[name] + spare, left)
        begun = time.monotonic()
        status = in_process(args, name, budget) if budget > 5 else "not started: no time left"
        seconds = time.monotonic() - begun
        spare = max(0.0, budget - seconds)
        parts.append({"part": name, "status": status, "seconds": round(seconds, 1), "budget": round(budget)})
        print(f"{name}: {status}, {seconds:.0f} s", flush=True)
        about = {"machine": describe(torch.device(args.device)), "command": command_of(args), "parts": parts}
        write_json_atomic(args.out / "parts.json", about)
    return parts


def command_of(args: argparse.Namespace) -> str:
    return " ".join(["python", "experiments/speed/gpu.py", *sys.argv[1:]])


def in_process(args: argparse.Namespace, name: str, budget: float) -> str:
    """Runs one part in a process of its own, its output into <part>.log; how it ended."""
    command = [sys.executable, str(Path(__file__).resolve()), "--part", name, *sys.argv[1:]]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    log = args.out / f"{name}.log"
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, start_new_session=True
        )
        try:
            code = process.wait(timeout=budget)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)  # it and what it started
            process.wait()
            return f"out of time after {budget:.0f} s; its rows so far are kept"
    if code == 0:
        return "finished"
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return f"failed with code {code}: {lines[-1] if lines else 'no output'}"


def run_part(args: argparse.Namespace) -> int:
    """One part, in this process."""
    if args.part == "tests":
        return run_tests(args)
    torch.manual_seed(0)
    dtype = "bfloat16" if args.part in ("linear", "quantize", "memory") else default_dtype(args.shape)
    setup = Setup(args.shape, torch.device(args.device), DTYPES[dtype], args.repeats, quick=args.dry_run)
    command = command_of(args).replace(f"--part {args.part} ", "")
    section = run_section(args.part, setup, command, args.out, lambda line: print(line, flush=True))
    for row in section.unequal:
        print(f"NOT EQUAL: {row.what}, {row.shape}")
    return int(bool(section.unequal))


def run_tests(args: argparse.Namespace) -> int:
    """pytest on the files that have tests marked gpu; its last lines into tests.txt."""
    marked = [f for f in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in f.read_text("utf-8")]
    if not marked:
        print("no test is marked gpu")
        return 0
    files = [str(f.relative_to(ROOT)) for f in marked]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rfEs", "-p", "no:cacheprovider"]
    command += ["-W", "default", *files]  # other versions than the tested ones may warn
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout + done.stderr)
    write_text_atomic(args.out / "tests.txt", "\n".join(done.stdout.splitlines()[-40:]) + "\n")
    return done.returncode if done.returncode != 5 else 0  # 5: nothing collected under the mark


if __name__ == "__main__":
    sys.exit(main())

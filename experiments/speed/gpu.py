"""Everything that needs a GPU, in one call under ten minutes; results are written as they come.

    python experiments/speed/gpu.py --out experiments/speed/gpu
    python experiments/speed/gpu.py --dry-run --shape tiny --device cpu --out outputs/gpu     does it run?

    generate   the plain loop against ours; bf16 against packed widths; batch 1 and 16
    memory     bytes of the weights, peak of a forward
    quantize   GPTQ's solver against Algorithm 1 as published; LLaDA-8B, all techniques, end to end
    linear     bf16 F.linear against the packed kernels, W8A8, W4A8, W4A4, W4A16 (each checked in float64)
    tests      pytest -m gpu: the kernels' exactness on this device

Parts with targets come first, and in each of them the rows with targets. Each part is a process of its own
with a budget of seconds; what it did not use goes to the next, and the time of parts that were not asked for
to the first. A part that fails or runs out of time leaves its rows so far in results.json, where its section
is marked as stopped, and one sentence here and in parts.json; the others run all the same. Compiling and
tuning every kernel is expected to take longer than the budgets of linear and tests (this has not run on a GPU
yet); compiled kernels stay in triton's cache, so `--parts linear,tests` later gets further.
Needs torch with CUDA, triton, transformers, jaxtyping, pytest and hypothesis; neither hydra nor lm-eval.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
import traceback
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from dllmq.bench.machine import describe  # noqa: E402
from dllmq.bench.rows import check_folder  # noqa: E402
from dllmq.bench.sections import run_section  # noqa: E402
from dllmq.bench.shapes import DTYPES, SHAPES, Setup, default_dtype, device_of  # noqa: E402
from dllmq.bench.study import write_tables  # noqa: E402
from dllmq.report.results import write_json_atomic  # noqa: E402

BUDGET = {"generate": 170, "memory": 40, "quantize": 200, "linear": 80, "tests": 80}  # seconds
TOTAL = 570
NEEDED = {"tests": ("pytest", "hypothesis")}  # by one part alone; on a GPU all need triton


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
    for name in ("repeats", "seconds"):
        if getattr(args, name) < 1:
            return f"--{name} must be an integer >= 1; got {getattr(args, name)}."
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        return (
            "this measures on a CUDA device, and torch sees none here: run it on a machine with a GPU, or "
            "try it out with --dry-run --shape tiny --device cpu."
        )
    try:
        device_of(args.device)
    except ValueError as error:
        return str(error)
    needed = [name for part in args.parts.split(",") for name in NEEDED.get(part, ())]
    needed += ["triton"] if args.device.startswith("cuda") else []
    if missing := [name for name in needed if find_spec(name) is None]:
        words = " ".join(missing)
        out = "" if "triton" in missing else ", or leave its part out (--parts)"
        return f"{missing[0]} is not installed: pip install {words}{out}."
    if not args.device.startswith("cuda") and not args.dry_run:
        return f"--device {args.device} is for --dry-run only: CPU numbers are python -m dllmq.bench's."
    try:
        check_folder(args.out)
    except ValueError as error:
        return str(error)
    return ""


def main() -> int:
    args = arguments()
    if why := refusal(args):
        print(f"experiments/speed/gpu.py: {why}", file=sys.stderr)
        return 1
    args.device = str(device_of(args.device))
    if args.part:
        return run_part(args)
    parts = all_parts(args)
    print(f"In {args.out}: {', '.join(['parts.json', *write_tables(args.out)])}.")
    return int(any(part["status"] != "finished" for part in parts))


def all_parts(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs the parts one after the other; parts.json is written after each."""
    names, parts = args.parts.split(","), list[dict[str, Any]]()
    started, spare = time.monotonic(), max(0.0, args.seconds - sum(BUDGET[name] for name in names))
    for name in names:
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
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            code = process.wait(timeout=budget)
        except subprocess.TimeoutExpired:
            return f"out of time after {budget:.0f} s; its rows so far are kept"
        finally:
            if process.poll() is None:  # out of time, or this script was interrupted
                os.killpg(process.pid, signal.SIGKILL)  # it and what it started
                process.wait()
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
    try:
        section = run_section(args.part, setup, command, args.out, lambda line: print(line, flush=True))
    except Exception as error:  # whatever a driver or a compiler raises: the last line says it
        traceback.print_exc(file=sys.stdout)
        print(sentence(error), flush=True)
        return 1
    for row in section.unequal:
        print(f"NOT EQUAL: {row.what}, {row.shape}")
    return int(bool(section.unequal))


def sentence(error: Exception) -> str:
    """Type and first line of an error; CUDA's go on for a paragraph, Triton's end in source text."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()[:300]}" if lines else type(error).__name__


def gpu_tests() -> list[str]:
    """Files with tests marked gpu, from the checkout's root; the kernels', which compile most, last."""
    files = sorted((ROOT / "tests").rglob("test_*.py"), key=lambda f: (f.parent.name == "kernels", f))
    return [str(f.relative_to(ROOT)) for f in files if "mark.gpu" in f.read_text("utf-8")]


def run_tests(args: argparse.Namespace) -> int:
    """pytest on the tests marked gpu; a line a test into tests.txt, as they end."""
    if not (files := gpu_tests()):
        print("no test is marked gpu")
        return 0
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-rfEs", "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors", "-W", "default"]  # other versions than the tested ones
    command += files
    found = (args.out / "tests.txt").resolve()
    with found.open("w", encoding="utf-8") as file:
        code = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT).returncode
    print("\n".join(found.read_text(encoding="utf-8", errors="replace").splitlines()[-40:]))
    return code if code != 5 else 0  # 5: nothing collected under the mark


if __name__ == "__main__":
    sys.exit(main())

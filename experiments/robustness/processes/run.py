"""One evaluation by one process, by two and by three, and by two of which one is killed in the middle.

python experiments/robustness/processes/run.py       # writes results.json and table.md beside itself

The embedded model, GPTQ at w2a4, on a task that generates, one of likelihoods and one that runs programs.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
TASKS = ["tasks=mini_all", "eval.allow_code_execution=true"]
SIZES = [
    *("method=gptq", "eval.limit=40", "eval.batch_size=4", "eval.fidelity_states=16", "threads=1"),
    *("eval.fidelity_prompts=4", "calibration.num_prompts=8", "calibration.num_states=16", "tracker=none"),
    "cache_dir=null",
]
NUMBERS = ("scores", "fidelity", "curves", "per_problem", "fidelity_per_prompt", "calibration", "fingerprint")


@dataclass(frozen=True)
class Outcome:
    """A run: how many problems were compared with one process's, and how many differ in a byte.

    Attributes:
        helped: batches that the other processes answered, of all.
    """

    scenario: str
    processes: int
    problems: int
    helped: str
    different_answers: int
    different_numbers: list[str]
    forwards: int


def command(folder: Path, processes: int, sizes: list[str]) -> subprocess.Popen[bytes]:
    """The run's command, in `folder`, in a process group of its own."""
    start = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"] if processes > 1 else []
    words = [sys.executable, *start, "-m", "dllmq.run", *TASKS, *sizes, "name=run"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (folder / "output.txt").open("ab") as file:
        return subprocess.Popen(
            words, cwd=folder, env=environment, stdout=file, stderr=file, start_new_session=True
        )


def finish(process: subprocess.Popen[bytes], folder: Path) -> None:
    if process.wait():
        raise RuntimeError((folder / "output.txt").read_text()[-3000:])


def records(folder: Path) -> list[dict[str, Any]]:
    """Full precision's and the quantized model's."""
    sweep = folder / "outputs" / "run"
    return [json.loads((sweep / name).read_text()) for name in ("baseline.json", "run/results.json")]


def samples(folder: Path) -> dict[str, list[str]]:
    """Prompts, answers and scores, a line a problem, by file."""
    sweep = folder / "outputs" / "run"
    files = sorted([*sweep.glob("samples_*"), *sweep.glob("run/samples_*")])
    return {str(f.relative_to(sweep)): f.read_text().splitlines() for f in files}


def outcome(scenario: str, processes: int, folder: Path, alone: Path) -> Outcome:
    own, other = samples(folder), samples(alone)
    pairs = [pair for name in other for pair in zip(other[name], own[name], strict=True)]
    helpers = [record["notes"].get("helpers", {}) for record in records(folder)]
    numbers = [
        f"{which}.{name}"
        for which, a, b in zip(("full precision", "gptq"), records(alone), records(folder), strict=True)
        for name in NUMBERS
        if a[name] != b[name]
    ]
    return Outcome(
        scenario=scenario,
        processes=processes,
        problems=len(pairs),
        helped=", ".join(str(sum(h.values())) for h in helpers),
        different_answers=sum(a != b for a, b in pairs),
        different_numbers=numbers,
        forwards=sum(int(record["cost"]["forwards"]) for record in records(folder)),
    )


def killed(folder: Path, sizes: list[str]) -> None:
    """Two processes, all of whose group gets SIGKILL once the quantized model has answered a few batches."""
    process = command(folder, 2, sizes)
    try:
        while not answers_of_helpers(folder):
            if process.poll() is not None:
                raise RuntimeError("it ended too early:\n" + (folder / "output.txt").read_text()[-3000:])
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for child in helpers_of(folder):  # torchrun starts them in sessions of their own
        os.kill(child, signal.SIGKILL)


def answers_of_helpers(folder: Path) -> list[str]:
    """Files with answers of the second process; os.walk passes over folders that go meanwhile."""
    return [
        file
        for place, _, files in os.walk(folder / "outputs")
        for file in files
        if place.endswith("run/.resume/answers") and file.endswith(".1.jsonl")
    ]


def helpers_of(folder: Path) -> list[int]:
    """Processes that run in `folder`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "cwd").resolve() == folder.resolve() and int(entry.name) != os.getpid():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def scenarios(root: Path, sizes: list[str]) -> list[Outcome]:
    found = []
    for name, processes in (("one", 1), ("two", 2), ("three", 3), ("killed", 2)):
        folder = root / name
        folder.mkdir()
        if name == "killed":
            killed(folder, sizes)
        finish(command(folder, processes, sizes), folder)
        label = "two, killed, same command again" if name == "killed" else name
        found.append(outcome(label, processes, folder, root / "one"))
        print(json.dumps(asdict(found[-1])), flush=True)
    return found


def table(outcomes: list[Outcome]) -> str:
    names = "processes, problems, different answers, different numbers, batches of helpers, forwards"
    head = f"| {names.replace(', ', ' | ')} |\n|---|---:|---:|---:|---:|---:|\n"
    rows = [
        f"| {o.scenario} | {o.problems} | {o.different_answers} | {len(o.different_numbers)} | "
        f"{o.helped or '0'} | {o.forwards} |\n"
        for o in outcomes
    ]
    return head + "".join(rows)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        outcomes = scenarios(Path(name), SIZES)
    (HERE / "results.json").write_text(json.dumps([asdict(o) for o in outcomes], indent=2) + "\n")
    (HERE / "table.md").write_text(table(outcomes))


if __name__ == "__main__":
    main()

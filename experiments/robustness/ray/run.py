"""A sweep on a Ray cluster of two nodes on this machine: undisturbed, and with a node killed in the middle.

python experiments/robustness/ray/run.py       # writes results.json and table.md beside itself

Needs dllmq[ray]. Each node has one CPU, so that it runs one cell at a time. A killed node's Ray processes get
SIGKILL while a cell of it calibrates or evaluates; the cell ends with them.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
SWEEP = ["method=rtn,gptq", "tmas=true,false"]
SIZES = [
    *("tasks=mini_gsm", "eval.limit=8", "eval.batch_size=4", "eval.fidelity_states=16"),
    *("eval.fidelity_prompts=4", "calibration.num_prompts=8", "calibration.num_states=16", "tracker=none"),
]
# what must repeat bit for bit
NUMBERS = ("scores", "fidelity", "curves", "per_problem", "fidelity_per_prompt", "calibration", "fingerprint")
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # 15 otherwise
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
}


@dataclass(frozen=True)
class Outcome:
    """What a scenario showed: commands' exit codes, cells by the node that finished them, and losses."""

    scenario: str
    exit_codes: list[int]
    finished: int
    cells_of_node: dict[str, int]
    killed_during: str
    started_twice: int
    lost_results: int
    wrong_results: int
    full_precision_measured: int
    said: str


@contextmanager
def cluster() -> Iterator[Any]:
    """Two nodes, "head" and "worker", one CPU each; the cluster, to join with its `address`."""
    os.environ.update(ENVIRONMENT)
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # a process reads it once
    from ray.cluster_utils import Cluster

    own = Cluster()
    try:
        for name in ("head", "worker"):
            own.add_node(num_cpus=1, include_dashboard=False, env_vars={"DLLMQ_HOST": name})
        yield own
    finally:
        own.shutdown()


def start(folder: Path, address: str, *more: str) -> subprocess.Popen[str]:
    """The sweep's command, in `folder`."""
    words = ["-m", "dllmq.run", "-m", "hydra/launcher=dllmq_ray", *SWEEP, *SIZES, "name=sweep", *more]
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=folder,
        env=os.environ | {"RAY_ADDRESS": address},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def logs(folder: Path) -> dict[str, str]:
    return {file.parent.name: file.read_text() for file in (folder / "outputs" / "sweep").glob("*/run.log")}


def wait_for_cell(folder: Path, node: str, line: str, process: subprocess.Popen[str]) -> str:
    """The name of a cell that `node` runs, once its log has the line."""
    while process.poll() is None:
        for name, text in logs(folder).items():
            _, on_it, since = text.rpartition(f", on {node},")
            if on_it and line in since and not results_file(folder, name).exists():
                return name
        time.sleep(0.05)
    raise RuntimeError(f"no cell was seen on {node} at '{line}':\n{process.stdout.read()}")


def results_file(folder: Path, name: str) -> Path:
    return folder / "outputs" / "sweep" / name / "results.json"


def numbers(folder: Path) -> dict[str, dict[str, Any]]:
    """What the cells recorded, by name."""
    found = {}
    for file in (folder / "outputs" / "sweep").glob("*/results.json"):
        record = json.loads(file.read_text())
        found[file.parent.name] = {key: record[key] for key in NUMBERS}
    return found


def outcome(
    scenario: str, folder: Path, codes: list[int], killed: str, said: str, expected: dict[str, Any]
) -> Outcome:
    """Counts; `expected` is what the cells record when nothing happens."""
    found, texts = numbers(folder), logs(folder)
    nodes = [re.findall(", on ([a-z]+), process", texts[name])[-1] for name in found]
    return Outcome(
        scenario=scenario,
        exit_codes=codes,
        finished=len(found),
        cells_of_node=dict(sorted(Counter(nodes).items())),
        killed_during=killed,
        started_twice=sum(starts(text) > 1 for text in texts.values()),
        lost_results=len(expected.keys() - found.keys()),
        wrong_results=sum(found[name] != expected[name] for name in found.keys() & expected.keys()),
        full_precision_measured=sum(text.count("full precision: measured once") for text in texts.values()),
        said=said,
    )


def starts(text: str) -> int:
    """How often a cell's work was begun, going by its log."""
    attempts = re.split(", on [a-z]+, process", text)[1:]
    return sum("finished already" not in attempt for attempt in attempts)


def undisturbed(folder: Path) -> Outcome:
    """Cells on both nodes."""
    with cluster() as own:
        process = start(folder, own.address)
        told, _ = process.communicate()
    assert process.returncode == 0, told
    return outcome("two nodes", folder, [process.returncode], "", "", numbers(folder))


def node_killed(folder: Path, expected: dict[str, Any], line: str) -> Outcome:
    """Ray runs the cell of the killed node again on the other one."""
    with cluster() as own:
        process = start(folder, own.address)
        wait_for_cell(folder, "worker", line, process)
        own.remove_node(next(iter(own.worker_nodes)), allow_graceful=False)
        told, _ = process.communicate()
    assert process.returncode == 0, told
    return outcome("a node killed, Ray retries", folder, [0], line, "", expected)


def node_killed_without_retries(folder: Path, expected: dict[str, Any], line: str) -> Outcome:
    """The command ends with one sentence; the same command continues on what is left of the cluster."""
    once = ("hydra.launcher.ray.remote.max_retries=0",)
    with cluster() as own:
        first = start(folder, own.address, *once)
        wait_for_cell(folder, "worker", line, first)
        own.remove_node(next(iter(own.worker_nodes)), allow_graceful=False)
        told, _ = first.communicate()
        (said,) = [row for row in told.splitlines() if row.startswith("the launcher stopped")]
        assert "Traceback" not in told, told
        kept = {f: f.stat().st_mtime_ns for f in folder.glob("outputs/sweep/*/results.json")}
        second = start(folder, own.address, *once)
        told, _ = second.communicate()
    assert second.returncode == 0, told
    again = [str(f) for f, time_ns in kept.items() if f.stat().st_mtime_ns != time_ns]
    assert not again, f"finished cells ran again: {again}"
    codes = [first.returncode, second.returncode]
    return outcome("a node killed, no retries, same command again", folder, codes, line, said, expected)


def table(outcomes: list[Outcome]) -> str:
    names = "run, exit codes, cells finished by node, started twice, full precision measured, lost, wrong"
    head = f"| {names.replace(', ', ' | ')} |"
    rows = [
        f"| {o.scenario} | {', '.join(map(str, o.exit_codes))} | {o.finished}: "
        f"{', '.join(f'{n} on {name}' for name, n in o.cells_of_node.items())} | {o.started_twice} | "
        f"{o.full_precision_measured} | {o.lost_results} | {o.wrong_results} |"
        for o in outcomes
    ]
    return "\n".join([head, "|---|---|---|---:|---:|---:|---:|", *rows]) + "\n"


def scenarios(root: Path) -> Iterator[Outcome]:
    for name in ("undisturbed", "killed", "stopped"):
        (root / name).mkdir()
    yield undisturbed(root / "undisturbed")
    expected = numbers(root / "undisturbed")
    yield node_killed(root / "killed", expected, "calibration:")
    yield node_killed_without_retries(root / "stopped", expected, "mini_gsm:")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        outcomes = []
        for found in scenarios(Path(name)):
            outcomes.append(found)
            print(json.dumps(asdict(found)), flush=True)
    (HERE / "results.json").write_text(json.dumps([asdict(o) for o in outcomes], indent=2) + "\n")
    (HERE / "table.md").write_text(table(outcomes))


if __name__ == "__main__":
    main()

"""A seeded sample of experiments/robustness: faults of the kinds that it has most of, over a whole sweep."""

import json
import os
import shlex
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

STUDY = Path(__file__).resolve().parents[2] / "experiments" / "robustness"


@pytest.mark.slow
def test_a_sample_of_faults_is_recovered_bit_for_bit(tmp_path: Path) -> None:
    """In a process of its own, which forks: threads of the test's would not survive that."""
    command = [
        sys.executable,
        str(STUDY / "run.py"),
        "--faults",
        "12",
        "--seed",
        "11",
        "--keep",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    counted = {row[0]: row[1:] for row in rows(done.stdout[done.stdout.index("| fault |") :])}
    injected, recovered, lost, wrong = map(int, counted["all"])
    assert injected == recovered >= 12 and lost == wrong == 0
    assert counted.keys() >= {"SIGKILL", "SIGTERM", "disk full", "two processes, one killed"}


@pytest.mark.slow
def test_a_signal_ends_the_sweep_and_says_how_to_continue(tmp_path: Path) -> None:
    """After the block at hand, with the exit code of the signal; the command that is told finishes it."""
    words = ["-m", "method=gptq,rtn", "tracker=none", "name=s", "tasks=mini_gsm", "eval.limit=2",
             "eval.fidelity_states=4", "eval.fidelity_prompts=2", "calibration.num_prompts=2",
             "calibration.num_states=4", "sampler.steps=12"]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(STUDY.parents[1]), "OMP_NUM_THREADS": "1"}
    how: dict[str, Any] = {"cwd": tmp_path, "env": environment, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(
        [sys.executable, "-m", "dllmq.run", *words], stdout=subprocess.DEVNULL, **how
    ) as run:
        assert run.stderr is not None
        said = []
        for line in run.stderr:
            said.append(line)
            if "calibration: " in line:
                run.send_signal(signal.SIGTERM)
    assert run.returncode == 143, said
    _, _, told = said[-1].partition("stopped by SIGTERM; what is finished is kept, and this continues: ")
    assert shlex.split(told) == ["python", "-m", "dllmq.run", *words]
    assert not list(tmp_path.glob("outputs/s/*/results.json"))
    kept = len(list(tmp_path.glob("outputs/s/*/.resume/block/*/*.json")))
    assert 1 <= kept < 6  # of six, and mostly one: the signal is sent when this process gets to it
    done = subprocess.run([sys.executable, "-m", *shlex.split(told)[2:]], stdout=subprocess.DEVNULL, **how)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("outputs/s/*/results.json"))) == 2


def test_the_study_lost_nothing_and_got_nothing_wrong() -> None:
    """The committed record: 200 faults of every kind in every stage; the table counts them."""
    faults = json.loads((STUDY / "results.json").read_text())["faults"]
    assert len(faults) >= 200 and {fault["outcome"] for fault in faults} == {"recovered"}
    stages = {fault["event"][1] for fault in faults}
    assert stages >= {
        "load",
        "calibrate",
        "reference",
        "quantize",
        "export",
        "evaluate",
        "fidelity",
        "report",
    }
    counts = Counter(fault["kind"] for fault in faults) + Counter(fault["event"][1] for fault in faults)
    assert len(counts) >= 9 + len(stages)
    told = {row[0]: row[1:] for row in rows((STUDY / "table.md").read_text()) if row[0] != "all"}
    assert told == {name: [str(count), str(count), "0", "0"] for name, count in counts.items()}


def rows(table: str) -> list[list[str]]:
    """The cells of all rows but the heads and the lines below them."""
    found = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if "|" in line]
    return [row for row in found if row[1].isdigit()]

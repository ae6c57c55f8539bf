"""The GPU's code paths on a device that is pretended (pretend_cuda.py), each run in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pretend_cuda
import pytest

CASES = "tests/pretended_cuda_cases.py"
TESTS = Path(__file__).resolve().parent
WHY_NOT = pretend_cuda.why_not()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


def passes(*words: str) -> None:
    """pytest with these words succeeds where torch sees the pretended device."""
    command = [
        sys.executable,
        str(TESTS / "pretend_cuda.py"),
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        *words,
    ]
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, cwd=TESTS.parent, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.slow
def test_generation_and_graphs() -> None:
    """Rows leave; the first of each kind of fact."""
    passes(
        CASES,
        "-k",
        "(tokens_are and True) or device_ or devices or host_is or recording or replay_ or halved",
    )


@pytest.mark.long
def test_everything() -> None:
    passes(CASES)


@pytest.mark.long
def test_what_is_marked_gpu() -> None:
    """Graphs, and the embedded model without what takes the interpreter many minutes."""
    passes("-m", "gpu", "tests/models/test_graphs.py")
    passes("-m", "gpu", "tests/test_cuda.py", "-k", "full_precision or bit_for_bit or (agree and RTN)")

"""The command on disks that are really full or read-only: file systems of their own, made by bubblewrap."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dllmq.faults import check_writable, in_words

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "tracker=none", "name=s", "tasks=mini_gsm", "eval.limit=2", "eval.fidelity_states=4",
    "eval.fidelity_prompts=2", "calibration.num_prompts=2", "calibration.num_states=4", "sampler.steps=12",
)  # fmt: skip
needs_bubblewrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bubblewrap")


def command(folder: Path, disk: list[str], *words: str) -> subprocess.CompletedProcess[str]:
    """python -m dllmq.run, with folder/outputs on another file system."""
    (folder / "outputs").mkdir(exist_ok=True)
    return subprocess.run(
        ["bwrap", "--dev-bind", "/", "/", *disk, sys.executable, "-m", "dllmq.run", *words, *SMALL],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "160"},
        capture_output=True,
        text=True,
    )


@needs_bubblewrap
@pytest.mark.slow
@pytest.mark.parametrize("words", [("-m", "method=rtn,gptq"), ("method=rtn",)])
def test_a_read_only_folder_is_refused_at_once(tmp_path: Path, words: tuple[str, ...]) -> None:
    outputs = str(tmp_path / "outputs")
    done = command(tmp_path, ["--ro-bind", outputs, outputs], *words)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "outputs is read-only): start the run where it can" in done.stderr


@needs_bubblewrap
@pytest.mark.slow
def test_a_disk_that_fills_up_is_told_in_one_sentence_and_leaves_nothing_half_done(tmp_path: Path) -> None:
    """Kept on a disk image, the folder would be continued; this one goes with the process."""
    outputs = str(tmp_path / "outputs")
    done = command(tmp_path, ["--size", "150000", "--tmpfs", outputs], "-m", "method=rtn")
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    assert "no space is left on the disk of" in done.stderr and "the same command continues" in done.stderr


@pytest.mark.parametrize("place", ["there", "there/not/yet"])
def test_a_folder_that_can_be_written_is_not_made_by_the_check(tmp_path: Path, place: str) -> None:
    (tmp_path / "there").mkdir()
    check_writable(tmp_path / place)
    assert list((tmp_path / "there").iterdir()) == []


def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file is a file.*hydra\.sweep\.dir=<folder>"):
        check_writable(tmp_path / "file" / "sweep")


def test_only_the_machines_refusals_are_put_into_words(tmp_path: Path) -> None:
    elsewhere = PermissionError(13, "Permission denied", "/checkpoints/model.safetensors")
    here = PermissionError(13, "Permission denied", str(tmp_path / "results.json"))
    assert in_words(elsewhere, tmp_path) is None and in_words(RuntimeError("shapes differ"), tmp_path) is None
    assert in_words(FileNotFoundError(2, "No such file", "x"), tmp_path) is None
    assert in_words(here, tmp_path, "quantize").startswith(f"{tmp_path} cannot be written")

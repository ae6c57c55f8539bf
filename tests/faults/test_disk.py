"""The command on disks that are really full or read-only: file systems of their own, made by bubblewrap."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import hydra.core.utils
import pytest
from omegaconf import OmegaConf

import dllmq.report.callback
import dllmq.run
from dllmq.faults import check_writable, in_words
from dllmq.report.callback import SweepCallback

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


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("sweep.json", errno.ENOSPC),
        ("multirun.yaml", errno.ENOSPC),
        ("config.yaml", errno.ENOSPC),
        ("config.yaml", errno.EROFS),
        ("single", errno.ENOSPC),
    ],
)
def test_a_disk_that_refuses_what_hydra_writes_between_two_cells(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    file: str,
    code: int,
) -> None:
    """At the sweep's own files; at those of its second cell, when the first has been run; of a single run."""
    monkeypatch.chdir(tmp_path)
    ran: list[object] = []
    save_config = hydra.core.utils._save_config

    def refuse(path: Path) -> None:
        raise OSError(code, os.strerror(code), str(path))

    def saving_config(config: Any, name: str, folder: Path) -> None:
        if file == "single" or (file == name and ran):
            refuse(folder / name)
        save_config(config, name, folder)

    if file == "multirun.yaml":
        monkeypatch.setattr(OmegaConf, "save", lambda config, f: refuse(f))
    if file == "sweep.json":
        monkeypatch.setattr(dllmq.report.callback, "write_json_atomic", lambda path, plan: refuse(path))
    monkeypatch.setattr(hydra.core.utils, "_save_config", saving_config)
    monkeypatch.setattr(SweepCallback, "_checked", lambda self, overrides, make: {})
    monkeypatch.setattr(SweepCallback, "on_run_start", lambda self, config, **_: None)
    monkeypatch.setattr(dllmq.run, "run", ran.append)
    monkeypatch.setattr(dllmq.run, "start_logging", lambda *_: None)
    words = ["method=rtn"] if file == "single" else ["-m", "method=rtn,gptq"]
    monkeypatch.setattr(sys, "argv", ["run", *words, "name=s"])
    with pytest.raises(SystemExit) as ended:
        dllmq.run.main()
    out, err = capsys.readouterr()
    assert ended.value.code == 1 and len(err.splitlines()) == 1 and "Traceback" not in out + err
    place = "outputs/s/run" if file == "single" else "outputs/s"
    full, closed = f"no space is left on the disk of {place}", f"{place} cannot be written any more"
    assert err.startswith(full if code == errno.ENOSPC else closed) and "the same command continues" in err
    assert len(ran) == (file == "config.yaml")


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

"""experiments/speed/gpu.py: refusals, budgets, and the whole script at a toy size on the CPU."""

import json
import subprocess
import sys
from argparse import Namespace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "experiments" / "speed" / "gpu.py"
BLOCKED = ("hydra", "omegaconf", "lm_eval", "datasets", "wandb", "beartype", "triton", "torchao", "rich")
DRY = ["--dry-run", "--shape", "tiny", "--device", "cpu", "--repeats", "1"]


@pytest.fixture
def script() -> Any:
    spec = spec_from_file_location("gpu_script", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arguments(out: Path, **changes: Any) -> Namespace:
    fields = dict(out=out, shape="tiny", device="cpu", repeats=1, parts="linear,memory", seconds=100,
                  dry_run=True, part=None)  # fmt: skip
    return Namespace(**(fields | changes))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_is_one_sentence(script: Any, tmp_path: Path) -> None:
    why = script.refusal(arguments(tmp_path, device="cuda", dry_run=False))
    assert why.startswith("this measures on a CUDA device, and torch sees none here") and "--dry-run" in why


def test_other_refusals(script: Any, tmp_path: Path) -> None:
    assert "is for --dry-run only" in script.refusal(arguments(tmp_path, dry_run=False))
    assert script.refusal(arguments(tmp_path, parts="linear,speed")).startswith("unknown part 'speed'")
    assert script.refusal(arguments(tmp_path, shape="huge")).startswith("unknown --shape 'huge'")
    assert script.refusal(arguments(tmp_path)) == ""
    assert script.refusal(arguments(tmp_path, repeats=0)) == "--repeats must be an integer >= 1; got 0."
    assert script.refusal(arguments(tmp_path, seconds=-5)) == "--seconds must be an integer >= 1; got -5."
    assert script.refusal(arguments(tmp_path, device="cpu:3")).startswith("unknown --device 'cpu:3'")
    (tmp_path / "file").write_text("")
    for out in (Path("/proc/speed"), tmp_path / "file"):
        assert script.refusal(arguments(out)).startswith(f"results cannot be written to {out} (")


@pytest.mark.parametrize("option", [["--repeats", "0"], ["--out", "/proc/speed"]])
def test_a_refusal_is_the_exit_code(script: Any, tmp_path: Path, monkeypatch: Any, option: list[str]) -> None:
    monkeypatch.setattr(script, "all_parts", lambda args: pytest.fail("measured"))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path), *DRY, *option])
    assert script.main() == 1


def test_parts_with_targets_come_first(script: Any) -> None:
    assert list(script.BUDGET) == ["generate", "memory", "quantize", "linear", "tests"]


def test_a_part_that_fails_is_one_sentence_and_stops_nothing(
    script: Any, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """CUDA's errors end with advice, Triton's with source text: the last line says what happened."""

    def broken(*args: Any) -> None:
        raise RuntimeError("CUDA error: no kernel image\nCompile with `TORCH_USE_CUDA_DSA`.\n")

    monkeypatch.setattr(script, "run_section", broken)
    assert script.run_part(arguments(tmp_path, part="memory")) == 1
    printed = capsys.readouterr().out.strip().splitlines()
    assert printed[-1] == "RuntimeError: CUDA error: no kernel image" and printed[0].startswith("Traceback")
    assert script.sentence(AssertionError()) == "AssertionError"

    ends = iter(["failed with code 1: RuntimeError: CUDA error: no kernel image", "finished"])
    monkeypatch.setattr(script, "in_process", lambda *args: next(ends))
    assert [p["status"] for p in script.all_parts(arguments(tmp_path))][-1] == "finished"
    assert (
        "linear: failed with code 1: RuntimeError: CUDA error: no kernel image, 0 s\n"
        in capsys.readouterr().out
    )


def test_all_budgets_fit_into_ten_minutes(script: Any) -> None:
    assert sum(script.BUDGET.values()) <= script.TOTAL <= 590
    assert set(script.BUDGET) == {"tests", "linear", "generate", "memory", "quantize"}


def test_what_a_part_does_not_use_goes_to_the_next(script: Any, tmp_path: Path, monkeypatch: Any) -> None:
    budgets = []
    monkeypatch.setattr(script, "in_process", lambda args, name, budget: budgets.append(budget) or "finished")
    own = script.BUDGET["linear"], script.BUDGET["memory"]
    parts = script.all_parts(arguments(tmp_path, seconds=sum(own) + 7))
    assert budgets[0] == own[0] + 7  # and what the parts that were not asked for would have
    assert budgets[1] == pytest.approx(sum(own) + 7, abs=1)
    written = json.loads((tmp_path / "parts.json").read_text())
    assert written["parts"] == parts and written["machine"]["device"] == "cpu"
    assert "python experiments/speed/gpu.py" in written["command"]


def test_a_part_without_time_is_not_started(script: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(script, "in_process", lambda *args: pytest.fail("started"))
    assert {p["status"] for p in script.all_parts(arguments(tmp_path, seconds=3))} == {
        "not started: no time left"
    }


def test_a_part_runs_in_this_process_too(script: Any, tmp_path: Path) -> None:
    assert script.run_part(arguments(tmp_path, part="linear")) == 0
    plain = json.loads((tmp_path / "results.json").read_text())
    assert plain["sections"][0]["section"] == "linear" and plain["sections"][0]["quick"] is True


@pytest.mark.slow
def test_a_part_out_of_time_is_ended(script: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path), *DRY])
    assert script.in_process(arguments(tmp_path), "linear", 0.2).startswith("out of time after 0 s")


@pytest.mark.long
def test_the_whole_script_at_a_toy_size(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path), *DRY, "--seconds", "3000"]  # others work
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = json.loads((tmp_path / "parts.json").read_text())["parts"]
    assert [p["status"] for p in parts] == ["finished"] * 5
    sections = json.loads((tmp_path / "results.json").read_text())["sections"]
    assert [s["section"] for s in sections] == ["generate", "memory", "quantize", "linear"]
    assert all(s["rows"] for s in sections)
    assert "## quantize" in (tmp_path / "table.md").read_text()
    assert "a trial of the program at toy sizes" in (tmp_path / "report.html").read_text()


WITHOUT = f"""
import sys
sys.modules |= dict.fromkeys({BLOCKED!r})  # neither found nor imported
"""


@pytest.mark.slow
def test_it_needs_neither_hydra_nor_lm_eval(tmp_path: Path) -> None:
    """What a GPU machine may lack is not imported; one section runs all the same."""
    program = f"""{WITHOUT}
sys.argv = ["gpu.py", "--part", "generate", "--out", {str(tmp_path)!r}, *{DRY!r}]
import runpy
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "generate.exact" in (tmp_path / "results.json").read_text()


@pytest.mark.slow
def test_nor_do_the_tests_that_it_runs(script: Any) -> None:
    """All are found; triton's are passed over where it is not installed."""
    program = f"""{WITHOUT}
import os, pytest
os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # hydra brings one
options = ["--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-W", "default"]
sys.exit(pytest.main([*options, *{script.gpu_tests()!r}]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=script.ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"test_cuda.py", "test_graphs.py"} <= {line.partition("::")[0].rpartition("/")[2]
                                                  for line in done.stdout.splitlines()}  # fmt: skip


def test_a_missing_package_is_one_sentence(script: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(script, "find_spec", lambda name: None)
    assert script.refusal(arguments(tmp_path)) == ""
    why = script.refusal(arguments(tmp_path, parts="linear,tests"))
    assert why.startswith("pytest is not installed: pip install pytest hypothesis, or") and "--parts" in why


def test_relative_folders_are_the_callers(script: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """A part is a process of its own, which starts where the script did; interrupted, it ends with it."""
    started: list[dict[str, Any]] = []

    class Process:
        pid = 0

        def __init__(self, command: list[str], **options: Any) -> None:
            started.append(options)

        def wait(self, timeout: float | None = None) -> int:
            if timeout is not None:
                raise KeyboardInterrupt
            return 0

        def poll(self) -> None:
            return None

    ended: list[int] = []
    monkeypatch.setattr(script.subprocess, "Popen", Process)
    monkeypatch.setattr(script.os, "killpg", lambda pid, signal: ended.append(pid))
    with pytest.raises(KeyboardInterrupt):
        script.in_process(arguments(tmp_path), "linear", 10)
    assert "cwd" not in started[0] and ended == [0]

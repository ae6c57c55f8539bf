"""dllmq.status: what it says of a sweep's folder, while cells run and after they died."""

import json
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import forked
import pytest
from rich.console import Console

from dllmq.report.callback import SWEEP
from dllmq.report.heartbeat import HEARTBEAT, LOG, Pulse, cell_log, heartbeat, host
from dllmq.report.results import RESULTS, STATUS
from dllmq.status import SILENT_AFTER, file_system_time, main, read_sweep, remaining, show, span

METHODS = ("rtn", "gptq", "awq")


def beat(folder: Path, age: float = 0.0, **changes: object) -> None:
    """A heartbeat as a cell writes it, `age` seconds old."""
    folder.mkdir(parents=True, exist_ok=True)
    state = Pulse("cell").state() | {"stage": "mini_gsm: denoising steps", "done": 30, "total": 120}
    state |= {"host": "node-7", "pid": 4711, "elapsed_s": 40.0, "left_s": 90.0, "since_progress_s": 1.0}
    (folder / HEARTBEAT).write_text(json.dumps(state | changes))
    then = file_system_time(folder) - age
    os.utime(folder / HEARTBEAT, (then, then))


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six planned cells, one in each state; finished ones took 100 s (rtn) and 300 s (gptq)."""
    names = [f"method={m},seed={s}" for m in METHODS for s in (0, 1)]
    cells = [{"name": n, "overrides": [*n.split(","), "eval.limit=8"]} for n in names]
    monkeypatch.chdir(tmp_path)
    folder = Path("outputs/ablation")
    folder.mkdir(parents=True)
    plan = {"command": "python -m dllmq.run -m method=rtn,gptq,awq", "launcher": "basic", "cells": cells}
    (folder / SWEEP).write_text(json.dumps(plan))
    for name, seconds in (("method=rtn,seed=0", 40.0), ("method=gptq,seed=0", 240.0)):
        (folder / name).mkdir()
        cost = {"evaluate_s": seconds, "calibrate_s": 60.0, "tokens_per_second": 5.0, "fp_forwards": 3}
        (folder / name / RESULTS).write_text(json.dumps({"cost": cost}))
    beat(folder / "method=rtn,seed=1")
    (folder / "method=gptq,seed=1").mkdir()
    failed = {
        "status": "failed",
        "error": "blocks.0.down: not\npositive [bold]definite[/bold]\x1b[2J",
        "axes": {},
    }
    (folder / "method=gptq,seed=1" / STATUS).write_text(json.dumps(failed))
    (folder / "method=gptq,seed=1" / LOG).write_text("2026-11-23 01:02:03,456 it began\n")
    beat(folder / "method=awq,seed=0", age=SILENT_AFTER + 3600)
    return folder


def said(folder: Path, width: int = 100) -> str:
    console = Console(width=width, force_terminal=False)
    with console.capture() as capture:
        console.print(show(read_sweep(folder), width))
    return capture.get()


def test_every_state_is_told_from_the_others(sweep: Path) -> None:
    found = {cell.name: cell.state for cell in read_sweep(sweep).cells}
    assert found == {
        "method=rtn,seed=0": "done",
        "method=rtn,seed=1": "running",
        "method=gptq,seed=0": "done",
        "method=gptq,seed=1": "failed",
        "method=awq,seed=0": "no sign of life",
        "method=awq,seed=1": "not started",
    }


def test_what_remains_is_told_from_the_finished_cells(sweep: Path) -> None:
    """rtn took 100 s, gptq 300, awq is given their mean; a running stage that needs longer is believed."""
    expected = {cell.name: cell.expected_s for cell in read_sweep(sweep).cells}
    assert expected == {
        "method=rtn,seed=0": None,
        "method=rtn,seed=1": 90.0,
        "method=gptq,seed=0": None,
        "method=gptq,seed=1": 300.0,
        "method=awq,seed=0": 200.0,
        "method=awq,seed=1": 200.0,
    }
    assert remaining(read_sweep(sweep)).startswith("4 to go, about 13 min of computing")


def test_nothing_is_guessed_before_a_cell_is_done(sweep: Path) -> None:
    for file in sweep.glob(f"*/{RESULTS}"):
        file.unlink()
    assert "is known when the first one is done" in remaining(read_sweep(sweep))


def test_the_page_says_what_a_person_asks(sweep: Path) -> None:
    text = said(sweep)
    assert "6 cells: 2 done, 1 running, 1 failed, 1 no sign of life, 1 not started" in text
    assert "running for 40 s: method=rtn seed=1\n  mini_gsm: denoising steps, 30 of 120, 90 s left" in text
    assert "on node-7, process 4711, last sign" in text
    wide = said(sweep, 140)
    assert "25 %" in wide and "90 s" in wide and "node-7 4711" in wide
    assert "failed: method=gptq seed=1\n  blocks.0.down: not" in text
    assert f"log: outputs/ablation/method=gptq,seed=1/{LOG}" in text
    assert "definite" not in text  # the first line is enough
    assert "no sign of life for 62 min: method=awq seed=0" in text
    assert "eval.limit" not in text.partition("failed")[0]  # every cell has it


def test_a_command_is_offered_when_nothing_runs(sweep: Path) -> None:
    command = "python -m dllmq.run -m method=rtn,gptq,awq"
    assert command not in said(sweep)
    (sweep / "method=rtn,seed=1" / HEARTBEAT).unlink()
    assert f"continue with\n  {command}" in said(sweep)


@pytest.mark.parametrize("width", [60, 80, 140])
def test_no_line_is_wider_than_the_terminal_and_nothing_is_obeyed(sweep: Path, width: int) -> None:
    status = sweep / "method=gptq,seed=1" / STATUS
    status.write_text(json.dumps({"status": "failed", "error": "[bold]x[/bold] \x1b[2J " + "long " * 40}))
    text = said(sweep, width)
    assert max(map(len, text.splitlines())) <= width
    assert "[bold]x[/bold]" in text and "\x1b" not in text


def test_logs_and_commands_can_be_copied_from_a_narrow_terminal(
    sweep: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    beat(sweep / "method=rtn,seed=1", ended="interrupted")
    (sweep / "method=rtn,seed=1" / LOG).write_text("")
    assert main([str(sweep)]) == 0
    lines = capsys.readouterr().out.splitlines()
    for cell in ("method=gptq,seed=1", "method=rtn,seed=1"):
        assert f"  log: outputs/ablation/{cell}/{LOG}" in lines
    assert "  python -m dllmq.run -m method=rtn,gptq,awq" in lines


def test_cells_without_a_plan_are_called_by_what_tells_them_apart(tmp_path: Path) -> None:
    names = ("method=awq,seed=0,tmas=True", "method=awq,seed=1,tmas=True,calibration.shares=_0.1,0.9")
    for name in names:
        beat(tmp_path / name)
    assert [c.label for c in read_sweep(tmp_path).cells] == ["seed=0", "seed=1 calibration.shares=_0.1,0.9"]


def test_a_young_heartbeat_wins_over_what_an_earlier_attempt_left(sweep: Path) -> None:
    beat(sweep / "method=gptq,seed=1")
    beat(sweep / "method=gptq,seed=0")
    beat(
        sweep / "method=rtn,seed=0", age=SILENT_AFTER + 1
    )  # killed while it ran again: its results are there
    states = {cell.name: cell.state for cell in read_sweep(sweep).cells}
    assert states["method=gptq,seed=1"] == states["method=gptq,seed=0"] == "running"
    assert states["method=rtn,seed=0"] == "done"


def test_a_cell_without_progress_shows_its_last_line(sweep: Path) -> None:
    folder = sweep / "method=rtn,seed=1"
    (folder / LOG).write_text(
        "2026-11-23 01:02:03,456 baseline/ab: another process is computing it; waiting\n"
    )
    assert "another process" not in said(sweep)
    beat(folder, since_progress_s=45.0)
    assert "no progress for 45 s; last said\n  baseline/ab: another process is computing it; waiting" in said(
        sweep
    )


def test_the_age_is_the_file_systems_whatever_this_clock_says(
    sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", lambda: 0.0)
    monkeypatch.setattr(Pulse, "clock", lambda self: 1e9, raising=False)
    states = read_sweep(sweep).counts
    assert states["running"] == states["no sign of life"] == 1


def test_without_a_plan_the_cells_are_those_that_left_something(sweep: Path) -> None:
    (sweep / SWEEP).unlink()
    shutil.copytree(sweep / "method=rtn,seed=0", sweep / ".shared" / "not a cell")
    found = read_sweep(sweep)
    assert len(found.cells) == 5 and found.command == ""
    assert found.counts == {"done": 2, "running": 1, "failed": 1, "no sign of life": 1}


def test_a_damaged_record_is_a_failed_cell(sweep: Path) -> None:
    (sweep / "method=rtn,seed=0" / RESULTS).write_text("{")
    (cell,) = [c for c in read_sweep(sweep).cells if c.name == "method=rtn,seed=0"]
    assert cell.state == "failed" and "cannot be read" in cell.error


def test_folders_that_go_while_it_reads_are_passed_over(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cell that ends removes its .resume between two looks."""
    gone, scandir = sweep / "method=rtn,seed=0" / ".resume", os.scandir
    (gone / "answers").mkdir(parents=True)
    before = read_sweep(sweep).cells

    def vanishing(path: str | Path = ".") -> object:
        if ".resume" in str(path):
            raise FileNotFoundError(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", vanishing)
    assert [(c.name, c.state) for c in read_sweep(sweep).cells] == [(c.name, c.state) for c in before]


@pytest.mark.parametrize("plan", ["[]", '{"cells": [{}]}', '{"cells": 3}'])
def test_a_damaged_plan_is_one_sentence(sweep: Path, plan: str) -> None:
    (sweep / SWEEP).write_text(plan)
    with pytest.raises(ValueError, match=f"^{sweep / SWEEP} is damaged: delete it; .* are not listed then"):
        read_sweep(sweep)


def test_json_and_errors(sweep: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([str(sweep), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["counts"] == {"done": 2, "running": 1, "failed": 1, "no sign of life": 1, "not started": 1}
    assert {cell["state"] for cell in told["cells"]} == set(told["counts"])
    (tmp_path / "empty").mkdir()
    for folder, words in ((tmp_path / "none", "No folder"), (tmp_path / "empty", "No cells under")):
        assert main([str(folder)]) == 2
        error = capsys.readouterr().err
        assert words in error and len(error.splitlines()) == 1


def test_watch_ends_when_everything_is_done(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for cell in read_sweep(sweep).cells:
        (sweep / cell.name).mkdir(exist_ok=True)
        shutil.copy(
            sweep / "method=rtn,seed=0" / RESULTS, sweep / cell.name / RESULTS
        ) if cell.state != "done" else None
        (sweep / cell.name / HEARTBEAT).unlink(missing_ok=True)
    assert main([str(sweep), "--watch", "0.5"]) == 0
    assert "all done" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "–"),
        (0.4, "0 s"),
        (99.4, "99 s"),
        (100, "2 min"),
        (5939, "99 min"),
        (7500, "2 h 05 min"),
        (200000, "2 d 08 h"),
    ],
)
def test_spans(seconds: float | None, text: str) -> None:
    assert span(seconds) == text


# ------------------------------------------------------------------ heartbeats


def test_what_is_left_follows_from_the_stages_own_pace() -> None:
    """Resumed at 40 of 100: 20 steps in 10 s leave 40 steps, 20 s, of which 5 have passed."""
    now = [0.0]
    pulse = Pulse("cell", clock=lambda: now[0])
    pulse.tell(7, 10, "quantize")
    now[0] = 100.0
    pulse.tell(40, 100, "evaluate")
    assert pulse.state()["left_s"] is None
    now[0] = 110.0
    pulse.tell(60, 100, "evaluate")
    now[0] = 115.0
    state = pulse.state()
    assert (state["left_s"], state["elapsed_s"], state["since_progress_s"]) == (15.0, 115.0, 5.0)
    assert (state["stage"], state["done"], state["total"], state["run_name"]) == ("evaluate", 60, 100, "cell")


def test_progress_is_passed_on() -> None:
    told: list[tuple[int, int, str]] = []
    Pulse("cell", lambda *what: told.append(what)).tell(1, 2, "x")
    assert told == [(1, 2, "x")]


def test_a_heartbeat_is_renewed_while_a_step_takes_long_and_goes_with_the_cell(tmp_path: Path) -> None:
    pulse, file = Pulse("cell"), tmp_path / HEARTBEAT
    with heartbeat(tmp_path, pulse, every=0.01):
        pulse.tell(1, 4, "a long step")
        deadline, seen = time.monotonic() + 60, set()
        while len(seen) < 3 and time.monotonic() < deadline:
            if file.exists():
                seen.add(json.loads(file.read_text())["elapsed_s"])
        assert len(seen) == 3
    assert list(tmp_path.iterdir()) == []
    assert not [t for t in threading.enumerate() if t.name == "heartbeat"]


@pytest.mark.parametrize(
    ("error", "stays"), [(RuntimeError, False), (KeyboardInterrupt, True), (SystemExit, True)]
)
def test_only_an_interrupted_cell_leaves_its_heartbeat(tmp_path: Path, error: type, stays: bool) -> None:
    with pytest.raises(error), heartbeat(tmp_path, Pulse("cell")):
        raise error
    assert (tmp_path / HEARTBEAT).exists() == stays
    if stays:
        (cell,) = read_sweep(tmp_path).cells
        assert cell.state == "interrupted" and "the same command continues it" in said(tmp_path)


def test_a_folder_that_cannot_be_written_fails_no_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with cell_log(blocked), heartbeat(blocked, Pulse("cell"), every=0.01):
        deadline = time.monotonic() + 60
        while len(caplog.records) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)  # some more beats, which say nothing
    assert [r.getMessage().count("the run goes on") for r in caplog.records] == [1, 1]


def test_a_log_goes_on_behind_what_an_earlier_attempt_wrote(tmp_path: Path) -> None:
    import logging

    for text in ("first", "second"):
        with cell_log(tmp_path):
            logging.getLogger("dllmq").warning(text)
    lines = (tmp_path / LOG).read_text().splitlines()
    assert [line[24:] for line in lines] == ["first", "second"]


def test_a_machine_can_be_given_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DLLMQ_HOST", "worker-3")
    assert host() == "worker-3" == Pulse("x").state()["host"]


@pytest.mark.slow
def test_it_is_read_while_the_sweep_runs(tmp_path: Path) -> None:
    """A real sweep of two cells: each is seen running, then done; nothing is left behind."""
    small = ("eval.limit=2", "eval.fidelity_states=4", "eval.fidelity_prompts=2", "calibration.num_prompts=2")
    words = (
        "-m",
        "method=rtn,gptq",
        "tasks=mini_gsm",
        "calibration.num_states=4",
        "tracker=none",
        "name=s",
        *small,
    )
    sweep, seen = tmp_path / "outputs" / "s", set()
    with ThreadPoolExecutor() as pool:
        running = pool.submit(forked.run, tmp_path, "dllmq.run", *words, DLLMQ_HOST="here")
        while not running.done():
            if (sweep / SWEEP).exists():
                state = read_sweep(sweep)
                seen |= {(c.label, c.state, c.host) for c in state.cells if c.state == "running"}
                assert len(state.cells) == 2 and not state.of("failed", "no sign of life")
            time.sleep(0.1)
    assert running.result().returncode == 0, running.result().stderr
    assert seen == {("method=rtn", "running", "here"), ("method=gptq", "running", "here")}
    assert read_sweep(sweep).counts == {"done": 2} and not list(sweep.rglob(HEARTBEAT))
    assert all("calibration:" in (sweep / c.name / LOG).read_text() for c in read_sweep(sweep).cells)

"""Sweeps by joblib, submitit and Ray: presets, refusals, and launches (slow) against the same sweep alone."""

import importlib.util
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import fake_slurm
import pytest
from composed import CONF
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from dllmq import workers
from dllmq.report.callback import EXTRAS, SWEEP, SweepCallback, check_launcher, launcher_of
from dllmq.report.results import RESULTS, STATUS
from dllmq.run import arguments, last_line
from dllmq.status import read_sweep

ROOT = Path(__file__).resolve().parent.parent
PRESETS = sorted(path.stem for path in (CONF / "hydra" / "launcher").glob("*.yaml"))
NUMBERS = ("scores", "fidelity", "curves", "per_problem", "fidelity_per_prompt", "calibration", "fingerprint")
SIZES = (
    *("tasks=mini_gsm", "eval.limit=4", "eval.fidelity_states=8", "eval.fidelity_prompts=2", "threads=1"),
    *("calibration.num_prompts=2", "calibration.num_states=4", "tracker=none", "name=s"),
)
AXES = ("method=rtn,gptq", "tmas=true,false")


def sweep_config(*overrides: str) -> DictConfig:
    """What Hydra hands to the callbacks of a sweep."""
    with initialize_config_module("dllmq.conf", version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        return hydra.compose_config("config", list(overrides), run_mode=RunMode.MULTIRUN)


# ------------------------------------------------------------------ presets


def test_every_preset_names_its_extra() -> None:
    assert sorted(EXTRAS) == PRESETS
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for extra in EXTRAS.values():
        assert f"\n{extra} = [" in text


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_composes_and_can_be_overridden(preset: str) -> None:
    first = {"dllmq_joblib": "n_jobs=4", "dllmq_ray": "ray.remote.num_gpus=1", "dllmq_slurm": "partition=gpu"}
    own = f"hydra.launcher.{first.get(preset, 'timeout_min=9')}"
    config = sweep_config(f"hydra/launcher={preset}", own)
    assert launcher_of(config.hydra) == preset
    key, _, value = own.partition("=")
    assert str(OmegaConf.select(config, key)) == value


def test_without_a_choice_the_cells_run_one_after_the_other() -> None:
    assert launcher_of(sweep_config("seed=1,2").hydra) == "basic"


@pytest.mark.parametrize("preset", PRESETS)
def test_a_missing_package_is_one_sentence_with_its_extra(
    preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = sweep_config(f"hydra/launcher={preset}").hydra.launcher._target_
    for answer in (lambda name: None, missing):
        monkeypatch.setattr(importlib.util, "find_spec", answer)
        with pytest.raises(ValueError) as error:
            check_launcher(preset, target)
        assert f"pip install 'dllmq[{EXTRAS[preset]}]'" in str(error.value) and "\n" not in str(error.value)


def missing(name: str) -> None:
    raise ModuleNotFoundError("No module named 'hydra_plugins'")


def test_a_refused_launcher_ends_the_command_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = sweep_config("hydra/launcher=dllmq_ray", f"hydra.sweep.dir={tmp_path}/s", "seed=1,2")
    with pytest.raises(SystemExit):
        SweepCallback(lambda config: None).on_multirun_start(config)
    assert "dllmq[ray]" in capsys.readouterr().err and not list(tmp_path.iterdir())


# ------------------------------------------------------------------ the command and its folders


def test_the_planned_cells_are_written_before_the_first_starts(tmp_path: Path) -> None:
    config = sweep_config(f"hydra.sweep.dir={tmp_path}/s", "method=rtn,gptq", "seed=3", "name=s")
    checked: list[int] = []
    with initialize_config_module("dllmq.conf", version_base="1.3"):
        SweepCallback(lambda config: checked.append(config.seed)).on_multirun_start(config)
    plan = json.loads((tmp_path / "s" / SWEEP).read_text())
    assert plan == {
        "command": "python -m dllmq.run -m method=rtn,gptq seed=3 name=s",
        "launcher": "basic",
        "cells": [
            {"name": f"method={m},seed=3", "overrides": [f"method={m}", "seed=3", "name=s"]}
            for m in ("rtn", "gptq")
        ],
    }
    assert checked == [3, 3] and read_sweep(tmp_path / "s").counts == {"not started": 2}


def test_a_dry_run_writes_no_plan(tmp_path: Path) -> None:
    config = sweep_config(f"hydra.sweep.dir={tmp_path}/s", "seed=1,2")
    with open_dict(config):
        config.dry_run = True
    with initialize_config_module("dllmq.conf", version_base="1.3"):
        SweepCallback(lambda config: None).on_multirun_start(config)
    assert not list(tmp_path.iterdir())


def test_a_launched_sweep_has_a_whole_path_and_the_folder_of_the_same_sweep_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    alone = arguments(["-m", "tmas=true,false"])[-1]
    launched = arguments(["-m", "hydra/launcher=dllmq_joblib", "hydra.launcher.n_jobs=3", "tmas=true,false"])[
        -1
    ]
    assert alone == "hydra.sweep.dir='outputs/tmas=true,false'"
    assert launched == f"hydra.sweep.dir='{tmp_path}/outputs/tmas=true,false'"
    own = arguments(["-m", "hydra/launcher=dllmq_ray", "hydra.sweep.dir=here"])
    assert own[-1] == f"hydra.sweep.dir='{tmp_path}/here'"


def test_a_dry_run_launches_nothing() -> None:
    words = ["-m", "hydra/launcher=dllmq_slurm", "hydra.launcher.partition=gpu", "dry_run=true", "seed=1,2"]
    assert arguments(words)[:-1] == ["-m", "dry_run=true", "seed=1,2"]


def test_a_worker_goes_to_the_folder_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    workers.enter(str(tmp_path))
    assert Path.cwd() == tmp_path
    with pytest.raises(ValueError, match=r"where the sweep was started, is not on .* that they share"):
        workers.enter(str(tmp_path / "elsewhere"))


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("Job failed\n------\nTraceback ...\nRuntimeError: boom\n------", "RuntimeError: boom"),
        ("The node died. To see more, use `ray logs`. Also:", "The node died"),
        ("", "no message"),
    ],
)
def test_a_launchers_error_is_cut_to_its_reason(message: str, reason: str) -> None:
    assert last_line(RuntimeError(message)) == reason


# ------------------------------------------------------------------ GPUs


def another_process(monkeypatch: pytest.MonkeyPatch, seen: str | None) -> None:
    """Locks are held on; what this process has taken is forgotten."""
    monkeypatch.setattr(workers, "_held", [])
    if seen is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)


def test_workers_take_the_gpus_in_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken, kept = [], []
    for _ in range(5):
        another_process(monkeypatch, "3,GPU-b")
        taken.append(workers.pin_gpu(2, tmp_path))
        assert (
            workers.pin_gpu(2, tmp_path) == taken[-1] == os.environ["CUDA_VISIBLE_DEVICES"]
        )  # once a process
        kept.append(workers._held[0])
    assert taken == ["3", "GPU-b", "3", "GPU-b", "3"]
    kept[1].release()  # a worker ended: its place is the next to be taken
    another_process(monkeypatch, "3,GPU-b")
    assert workers.pin_gpu(2, tmp_path) == "GPU-b"


@pytest.mark.parametrize("count", [0, 1])
def test_without_a_choice_of_gpus_nothing_is_pinned(count: int, tmp_path: Path, monkeypatch) -> None:
    another_process(monkeypatch, None)
    assert workers.pin_gpu(count, tmp_path) is None and not list(tmp_path.iterdir())


def test_torchruns_processes_take_the_gpu_of_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, gpu in (("0", "4"), ("1", "6"), ("2", "4")):
        another_process(monkeypatch, "4,6")
        monkeypatch.setenv("LOCAL_RANK", rank)
        workers.pin_rank(2)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == gpu


# ------------------------------------------------------------------ real launches


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "160"} | more


def launch(folder: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, "-m", "dllmq.run", "-m", *words],
        cwd=folder,
        env=environment(**more),
        capture_output=True,
        text=True,
    )


def numbers(folder: Path) -> dict[str, dict]:
    files = sorted((folder / "outputs" / "s").glob(f"*/{RESULTS}"))
    return {f.parent.name: {key: json.loads(f.read_text())[key] for key in NUMBERS} for f in files}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sweep of four cells, one after the other."""
    folder = tmp_path_factory.mktemp("alone")
    done = launch(folder, *AXES, *SIZES)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.long
def test_a_slurm_job_computes_with_as_many_threads_as_it_has_cpus(tmp_path: Path) -> None:
    more = fake_slurm.install(tmp_path / "slurm")
    done = launch(
        tmp_path, "hydra/launcher=dllmq_slurm", "hydra.launcher.cpus_per_task=3", "method=rtn", *SIZES, **more
    )
    assert done.returncode == 0, done.stderr
    (script,) = (tmp_path / "slurm" / "jobs").glob("1000")
    text = script.read_text()
    assert "#SBATCH --cpus-per-task=3" in text
    assert text.index("export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK") < text.index("\nsrun ")


@pytest.mark.long
def test_a_slurm_job_that_is_told_its_time_is_over_is_queued_again_and_continues(tmp_path: Path) -> None:
    """SLURM's signal comes while the cell runs; the second job ends it, and the command with it."""
    slurm = fake_slurm.install(tmp_path / "slurm")
    words = ("hydra/launcher=dllmq_slurm", "method=rtn", *SIZES, "eval.limit=40", "eval.batch_size=1")
    sweep, requeued = tmp_path / "outputs" / "s", tmp_path / "slurm" / "jobs" / "requeued"
    with subprocess.Popen(
        [sys.executable, "-m", "dllmq.run", "-m", *words], cwd=tmp_path, env=environment(**slurm)
    ) as process:
        while process.poll() is None:
            for cell in read_sweep(sweep).of("running") if sweep.is_dir() and not requeued.exists() else []:
                if cell.pid and "denoising" in cell.stage:
                    with suppress(ProcessLookupError):
                        os.kill(cell.pid, signal.SIGUSR2)
            time.sleep(0.5)
    assert process.returncode == 0 and len(numbers(tmp_path)) == 1
    assert requeued.read_text() == "1000\n"
    (log,) = (tmp_path / "outputs" / "s").glob("*/run.log")
    assert log.read_text().count(", process ") == 2


@pytest.mark.parametrize(
    "preset",
    [
        pytest.param("dllmq_joblib", marks=pytest.mark.long),
        *(pytest.param(name, marks=pytest.mark.long) for name in ("dllmq_local", "dllmq_slurm")),
    ],
)
def test_a_launched_sweep_gives_the_numbers_of_the_same_sweep_alone(
    alone: Path, tmp_path: Path, preset: str
) -> None:
    """Each cell in a process of its own; shared work is done once; the table comes at the end."""
    more = fake_slurm.install(tmp_path / "slurm") if preset == "dllmq_slurm" else {}
    done = launch(tmp_path, f"hydra/launcher={preset}", *AXES, *SIZES, **more)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "UserWarning" not in done.stderr
    assert numbers(tmp_path) == numbers(alone) and len(numbers(alone)) == 4
    sweep = tmp_path / "outputs" / "s"
    logs = [file.read_text() for file in sweep.glob("*/run.log")]
    assert len(logs) == 4 and sum(log.count("full precision: measured once") for log in logs) == 1
    entries = (tmp_path / "outputs" / ".cache").rglob("*.json")
    kept = Counter(path.relative_to(tmp_path / "outputs" / ".cache").parts[0] for path in entries)
    assert kept == {"baseline": 1, "trajectories": 1, "states": 2, "held_out": 1, "reference": 1}
    assert (sweep / "report.html").exists() and "gptq" in done.stdout
    assert (
        read_sweep(sweep).counts == {"done": 4}
        and json.loads((sweep / SWEEP).read_text())["launcher"] == preset
    )

    again = launch(tmp_path, f"hydra/launcher={preset}", *AXES, *SIZES, **more)
    assert again.returncode == 0 and numbers(tmp_path) == numbers(alone)
    assert all("finished already" in file.read_text() for file in sweep.glob("*/run.log"))


@pytest.mark.long
def test_two_cells_at_once_wait_for_each_others_full_precision_work(tmp_path: Path) -> None:
    """Both need the baseline, the trajectories and the reference; each is made by one, read by the other."""
    done = launch(tmp_path, "hydra/launcher=dllmq_joblib", "method=gptq,awq", *SIZES)
    assert done.returncode == 0, done.stderr
    shared = [
        json.loads(f.read_text())["notes"]["shared"]
        for f in (tmp_path / "outputs" / "s").glob(f"*/{RESULTS}")
    ]
    made = [kind for cell in shared for kind in cell["made"]]
    read = [kind for cell in shared for kind in cell["read"]]
    assert sorted(made) == sorted(set(made)) and {"baseline", "reference", "held_out", "states"} <= set(made)
    assert {"reference", "held_out", "states"} <= set(read)
    logs = "".join(f.read_text() for f in (tmp_path / "outputs" / "s").glob("*/run.log"))
    assert "another process is computing it; waiting" in logs


@pytest.mark.long
def test_a_failed_cell_is_told_and_the_others_finish(tmp_path: Path) -> None:
    """One sequence has fewer tokens than a layer has inputs: without damping its Hessian is singular."""
    bad = ("method=gptq", "method.damp=1e-30,0.01", "calibration.num_states=1")
    sizes = [s for s in SIZES if not s.startswith("calibration.num_states")]
    done = launch(tmp_path, "hydra/launcher=dllmq_joblib", *bad, *sizes)
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    (status,) = (tmp_path / "outputs" / "s").glob(f"*/{STATUS}")
    assert "damp" in json.loads(status.read_text())["error"] and len(numbers(tmp_path)) == 1
    assert read_sweep(tmp_path / "outputs" / "s").counts == {"done": 1, "failed": 1}


def until_a_cell_runs_and_one_is_done(folder: Path, *words: str) -> subprocess.Popen[str]:
    """The command, in a process group of its own, when that is so."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dllmq.run", "-m", *words],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    sweep = folder / "outputs" / "s"
    while process.poll() is None:
        if list(sweep.glob(f"*/{RESULTS}")) and read_sweep(sweep).of("running"):
            return process
        time.sleep(0.02)
    raise AssertionError(f"it ended before it could be disturbed: {process.communicate()}")


@pytest.mark.long
def test_a_killed_worker_is_one_sentence_and_the_same_command_continues(alone: Path, tmp_path: Path) -> None:
    words = ("hydra/launcher=dllmq_joblib", *AXES, *SIZES)
    with until_a_cell_runs_and_one_is_done(tmp_path, *words) as process:
        pid = read_sweep(tmp_path / "outputs" / "s").of("running")[0].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        _, said = process.communicate()
    assert process.returncode == 1 and "Traceback" not in said
    (sentence,) = [line for line in said.splitlines() if line.startswith("the launcher stopped")]
    assert "Terminated" in sentence and "the same command continues" in sentence
    assert launch(tmp_path, *words).returncode == 0 and numbers(tmp_path) == numbers(alone)


@pytest.mark.long
def test_an_interrupted_sweep_says_how_to_continue(alone: Path, tmp_path: Path) -> None:
    """Ctrl-C reaches the command and its workers."""
    words = ("hydra/launcher=dllmq_joblib", *AXES, *SIZES)
    with until_a_cell_runs_and_one_is_done(tmp_path, *words) as process:
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate()
    assert process.returncode == 130 and "Traceback" not in said
    assert "this continues: python -m dllmq.run -m hydra/launcher=dllmq_joblib" in said
    assert launch(tmp_path, *words).returncode == 0 and numbers(tmp_path) == numbers(alone)


@pytest.mark.slow
def test_the_fields_of_the_presets_are_the_plugins() -> None:
    """A field the plugin does not have would fail in the launch; SLURM's are submitit's too."""
    import hydra_plugins.hydra_joblib_launcher.config as joblib
    import hydra_plugins.hydra_submitit_launcher.config as submitit

    schemas = {
        "joblib": joblib.JobLibLauncherConf,
        "slurm": submitit.SlurmQueueConf,
        "local": submitit.LocalQueueConf,
    }
    for name, schema in schemas.items():
        own = OmegaConf.load(CONF / "hydra" / "launcher" / f"dllmq_{name}.yaml")
        assert set(own) <= set(OmegaConf.structured(schema)), name
        assert own._target_ == schema._target_


@pytest.mark.long
def test_a_ray_cluster_of_two_nodes_with_one_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """experiments/robustness/ray: cells on both nodes, shared work once, nothing lost, nothing wrong."""
    monkeypatch.setenv("HOME", str(tmp_path))
    study = ROOT / "experiments" / "robustness" / "ray" / "run.py"
    where = tmp_path / "sweeps"
    where.mkdir()
    program = (
        "import json, runpy, sys; from dataclasses import asdict; from pathlib import Path\n"
        f"found = runpy.run_path({str(study)!r})['scenarios'](Path({str(where)!r}))\n"
        "print('FOUND' + json.dumps([asdict(o) for o in found]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FOUND")]
    both, killed, stopped = json.loads(line.removeprefix("FOUND"))
    assert set(both["cells_of_node"]) == {"head", "worker"} and both["exit_codes"] == [0]
    assert killed["exit_codes"] == [0] and killed["started_twice"] == 1
    assert stopped["exit_codes"] == [1, 0] and stopped["said"].startswith("the launcher stopped (")
    for outcome in (both, killed, stopped):
        assert outcome["finished"] == 4 and outcome["lost_results"] == outcome["wrong_results"] == 0
        assert outcome["full_precision_measured"] == 1


def test_the_committed_ray_study_lost_nothing() -> None:
    folder = ROOT / "experiments" / "robustness" / "ray"
    study, found = runpy.run_path(str(folder / "run.py")), json.loads((folder / "results.json").read_text())
    assert len(found) == 3 and all(o["lost_results"] == o["wrong_results"] == 0 for o in found)
    assert set(found[0]["cells_of_node"]) == {"head", "worker"}
    assert (folder / "table.md").read_text() == study["table"]([study["Outcome"](**o) for o in found])

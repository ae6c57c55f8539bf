"""The command line on the embedded model and very few problems, started as forked.py does."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from rich.console import Console

import dllmq.run
from dllmq.config import slug
from dllmq.report.callback import cells
from dllmq.report.progress import progress_bar
from dllmq.report.results import RESULTS, STATUS, load_record

ROOT = Path(__file__).resolve().parent.parent
SMALL = (
    "eval.limit=3",
    "eval.fidelity_states=8",
    "eval.fidelity_prompts=2",
    "calibration.num_prompts=2",
    "calibration.num_states=8",
    "sampler.steps=12",
)
SWEEP = ("-m", "method=rtn,gptq", "tmas=true,false", "tracker=none", *SMALL)
# DESIGN, section 5
KEYS = {
    "config",
    "run_name",
    "scores",
    "fidelity",
    "curves",
    "cost",
    "inert",
    "versions",
    "git",
    "device",
    "seed",
    "fidelity_per_prompt",
    "notes",
}
COST = {"calibrate_s", "quantize_s", "evaluate_s", "peak_memory_bytes", "weight_bytes", "quantized_share"}
COST |= {"tokens_per_second", "forwards", "fp_forwards"}
# what a rerun must repeat bit for bit
NUMBERS = ("scores", "fidelity", "curves", "per_problem", "fidelity_per_prompt", "calibration", "fingerprint")


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """python -m dllmq.run in a folder of its own."""
    return forked.run(folder, "dllmq.run", *arguments, COLUMNS="160")


def new_process(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The same, its imports included."""
    return subprocess.run(
        [sys.executable, "-m", "dllmq.run", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "160"},
        capture_output=True,
        text=True,
    )


def finished(done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def results(folder: Path) -> dict[str, dict]:
    """Run name -> results.json of a sweep folder."""
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob(f"*/{RESULTS}"))}


def numbers(record: dict) -> dict:
    return {key: record[key] for key in NUMBERS}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A 2 x 2 sweep: where it ran, its folder, what was printed and logged."""
    where = tmp_path_factory.mktemp("sweep")
    done = finished(command(where, *SWEEP, "name=small"))
    folder = where / "outputs" / "small"
    cache = where / "outputs" / ".cache"
    return SimpleNamespace(where=where, folder=folder, cache=cache, stdout=done.stdout, log=done.stderr)


# ------------------------------------------------------------------ a sweep


def test_a_sweep_records_every_cell(sweep: SimpleNamespace) -> None:
    records = results(sweep.folder)
    assert len(records) == 4
    for record in records.values():
        assert record.keys() >= KEYS | {"per_problem", "command", "status", "fingerprint", "axes"}
        assert record["cost"].keys() >= COST and None not in [record["cost"][key] for key in COST]
        assert record["status"] == "finished" and record["cost"]["quantized_share"] > 0.5
        for task in ("mini_gsm", "mini_choice"):
            for metric, score in record["scores"][task].items():
                assert score["n"] == len(record["per_problem"][task][metric]) == 3
        assert record["fidelity"]["kl"]["n"] == 8 and record["fidelity"]["kl"]["value"] > 0
        assert {"kl_by_step", "kl_by_mask_ratio", "divergence_by_step"} <= record["curves"].keys()
        assert record["fidelity"]["final_agreement"]["n"] == len(record["fidelity_per_prompt"]["kl"]) == 2
        assert record["cost"].keys() >= {"quantize_peak_bytes", "evaluate_peak_bytes"}
    axes = {(r["axes"]["method"], r["axes"]["tmas"]) for r in records.values()}
    assert axes == {(method, tmas) for method in ("rtn", "gptq") for tmas in (True, False)}


def test_the_four_cells_have_four_different_numbers(sweep: SimpleNamespace) -> None:
    assert len({record["fidelity"]["kl"]["value"] for record in results(sweep.folder).values()}) == 4
    calibration = {name: r["calibration"] for name, r in results(sweep.folder).items()}
    assert {c["sequences"] for c in calibration.values()} == {8}
    masked = {c["sampler"]: c["masked_tokens"] for c in calibration.values()}
    assert masked["clean"] == 0 < masked["tmas"]


def test_full_precision_is_measured_once(sweep: SimpleNamespace) -> None:
    baseline = load_record(sweep.folder / "baseline.json")
    assert baseline.axes["method"] == "fp" and baseline.scores.keys() == {"mini_gsm", "mini_choice"}
    assert (
        baseline.cost["quantized_share"] == 0 and baseline.config["method"]["_target_"] == "dllmq.methods.FP"
    )
    assert sweep.log.count("full precision: measured once") == 1
    assert (sweep.folder / "samples_mini_gsm.jsonl").read_text().count("\n") == 3


def test_full_precisions_work_is_done_once_and_kept_for_other_sweeps(sweep: SimpleNamespace) -> None:
    """In the cache beside the sweep's folder: two choices of states from the same trajectories."""
    forwards = [record["cost"]["fp_forwards"] for record in results(sweep.folder).values()]
    assert sorted(count > 0 for count in forwards) == [False, False, False, True]
    kept = Counter(path.relative_to(sweep.cache).parts[0] for path in sweep.cache.rglob("*.json"))
    assert kept == {"baseline": 1, "trajectories": 1, "states": 2, "held_out": 1, "reference": 1}
    assert [path.name for path in (sweep.folder / ".shared").iterdir()] == ["tasks"]


def test_a_sweep_is_reported(sweep: SimpleNamespace) -> None:
    for name in ("summary.json", "table.md", "report.html"):
        assert (sweep.folder / name).stat().st_size > 500
    summary = json.loads((sweep.folder / "summary.json").read_text())
    assert len(summary["runs"]) == 4 and summary["failed"] == []
    for run in summary["runs"]:  # a switch's effect is told against the run with only that switch off
        assert run["delta_to_twin"].keys() == ({"tmas"} if run["axes"]["tmas"] else set())
        assert run["delta_to_full_precision"]["mini_gsm"]["n"] == 3
    assert "gptq" in sweep.stdout and "rtn" in sweep.stdout and "outputs/small" in sweep.stdout


def test_the_same_command_runs_nothing_twice(sweep: SimpleNamespace) -> None:
    kept = [*sweep.folder.glob(f"*/{RESULTS}"), sweep.folder / "baseline.json"]
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in kept}
    done = finished(command(sweep.where, *SWEEP, "name=small"))
    assert {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in kept} == before
    assert done.stderr.count("finished already") == 4
    assert done.stdout == sweep.stdout  # the table is printed again


@pytest.mark.slow
def test_a_single_run_elsewhere_has_the_same_numbers_and_a_wandb_folder(
    sweep: SimpleNamespace, tmp_path: Path
) -> None:
    """Nothing is shared with the sweep: numbers repeat bit for bit from the seed."""
    finished(command(tmp_path, "method=gptq", "tmas=true", "tracker=wandb", *SMALL))
    (folder,) = (tmp_path / "outputs").glob("*/run")
    single = json.loads((folder / RESULTS).read_text())
    same = [r for r in results(sweep.folder).values() if r["axes"] == single["axes"]]
    assert [numbers(r) for r in same] == [numbers(single)]
    assert len(list((folder / "wandb").glob("offline-run-*"))) == 1
    assert (folder.parent / "report.html").exists() and (folder.parent / "baseline.json").exists()


@pytest.mark.slow
def test_resume_false_repeats_the_numbers_bit_for_bit(sweep: SimpleNamespace) -> None:
    shutil.copytree(sweep.folder, sweep.where / "outputs" / "again")
    finished(command(sweep.where, *SWEEP, "name=again", "resume=false"))
    first, second = results(sweep.folder), results(sweep.where / "outputs" / "again")
    assert {name: numbers(r) for name, r in first.items()} == {name: numbers(r) for name, r in second.items()}
    assert all(second[name]["cost"] != first[name]["cost"] for name in first)  # they were run again


@pytest.mark.slow
def test_a_cell_that_fails_leaves_its_error_and_the_others_go_on(sweep: SimpleNamespace) -> None:
    """One sequence has fewer tokens than a layer has inputs: without damping its Hessian is singular."""
    folder = sweep.where / "outputs" / "failing"
    shutil.copytree(sweep.folder, folder)  # full precision is measured already
    rows = ("-m", "name=failing", "tracker=none", *SMALL[:4], "sampler.steps=12")
    done = command(sweep.where, *rows, "method=gptq", "calibration.num_states=1", "method.damp=1e-30,0.01")
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    (status,) = folder.glob(f"*/{STATUS}")
    told = json.loads(status.read_text())
    assert told["status"] == "failed" and told["axes"]["damp"] == 1e-30
    assert "damp" in told["error"] and "blocks.0" in told["error"]  # the remedy and the layer
    assert told["error"] in done.stderr and "Traceback" in told["traceback"]
    assert not (status.parent / RESULTS).exists()
    assert len(results(folder)) == 5  # the sweep's four and the other cell
    summary = json.loads((folder / "summary.json").read_text())
    assert [f["error"] for f in summary["failed"]] == [told["error"]]


# ------------------------------------------------------------------ refused, or only looked at


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["-m", "method=awq,gptqq"],
            ["cell 2 of 2 (method=gptqq)", "Did you mean gptq? Known: awq, fp,"],
        ),
        (["-m", "bits=w4a4,w9a4", "tmas=true"], ["cell 2 of 2 (bits=w9a4 tmas=True)", "from 2 to 8"]),
        (["+tmass=true"], ["no key tmass", "Did you mean tmas?"]),
        (["model.path=/nowhere/model"], ["/nowhere/model does not exist"]),
        (["method=gptqq"], ["method=gptqq is not known. Did you mean gptq?"]),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_wrong_input_ends_at_once_and_leaves_nothing(
    tmp_path: Path, arguments: list[str], said: list[str]
) -> None:
    start = new_process if arguments == ["+tmass=true"] else command
    done = start(tmp_path, *arguments)
    assert done.returncode != 0
    assert [part for part in said if part not in done.stderr] == [], done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_prints_the_plan_of_every_cell(tmp_path: Path) -> None:
    switches = ("tmas=true", "cgq=true", "iaaq=true", "attn_bits=none")
    done = finished(command(tmp_path, "-m", "dry_run=true", "method=rtn,gptq", *switches))
    assert done.stdout.count("checked, nothing run") == 2
    assert "method       GPTQ(block_size=128" in done.stdout and "calibration  tmas, 128" in done.stdout
    assert done.stdout.count("token weight CGQ(unmasked=0.7") == 2
    assert done.stdout.count("no effect    tmas: RTN reads no calibration states") == 1
    assert done.stdout.count("no effect    cgq: RTN reads no statistics") == 1
    assert done.stdout.count("no effect    iaaq: V is not quantized") == 2
    assert not list(tmp_path.rglob("*.json"))


# ------------------------------------------------------------------ parts


def test_cells_of_a_sweep_are_hydras() -> None:
    def listed(*overrides: str) -> list[list[str]]:
        with initialize_config_module("dllmq.conf", version_base="1.3"):
            hydra = GlobalHydra.instance().hydra
            assert hydra is not None
            return cells(hydra.compose_config("config", list(overrides), run_mode=RunMode.MULTIRUN))

    assert listed("seed=1") == [["seed=1"]]
    four = listed("method=awq,gptq", "tmas=true,false")
    # Hydra spells booleans its own way
    assert four == [[f"method={m}", f"tmas={t}"] for m in ("awq", "gptq") for t in (True, False)]
    study = listed("experiment=bitwidth")
    assert len(study) == 18 and len({slug(",".join(cell)) for cell in study}) == 18
    assert len(listed("experiment=bitwidth", "bits=w4a4")) == 3


def test_an_unexpected_error_is_one_line_and_keeps_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hydra = SimpleNamespace(
        runtime=SimpleNamespace(output_dir=str(tmp_path)),
        job=SimpleNamespace(override_dirname="bits=w4a4"),
        overrides=SimpleNamespace(task=["bits=w4a4", "tasks.names=[mini_gsm]"]),
        mode=RunMode.MULTIRUN,
    )

    def failing(cfg: object) -> None:
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(dllmq.run.HydraConfig, "get", lambda: hydra)
    monkeypatch.setattr(dllmq.run, "run", failing)
    with initialize_config_module("dllmq.conf", version_base="1.3"):
        dllmq.run.guarded(compose("config", overrides=["bits=w4a4"]))
    status = json.loads((tmp_path / STATUS).read_text())
    assert status["error"] == "RuntimeError: out of memory" and status["axes"]["bits"] == "w4a4"
    assert status["command"] == "python -m dllmq.run bits=w4a4 'tasks.names=[mini_gsm]'"
    assert "RuntimeError: out of\nmemory" in status["traceback"]
    said = capsys.readouterr().err
    assert said == f"bits=w4a4: RuntimeError: out of memory (the traceback is in {tmp_path / STATUS})\n"


def test_arguments_get_a_folder_unless_they_have_one() -> None:
    from dllmq.run import arguments

    assert arguments(["-m", "tmas=true,false"])[-1] == "hydra.sweep.dir='outputs/tmas=true,false'"
    assert arguments(["tmas=true"])[-1] == "hydra.run.dir='outputs/tmas=true/run'"
    assert arguments(["-m", "hydra.sweep.dir=x"]) == ["-m", "hydra.sweep.dir=x"]
    for named in ("/data/x", "/data/x/", "'/data/x'", "/data/x/run"):  # no report over all of /data
        assert arguments([f"hydra.run.dir={named}"])[-1].replace("'", "") == "hydra.run.dir=/data/x/run"


def test_progress_is_drawn_on_a_terminal_only() -> None:
    drawn = {}
    for terminal in (True, False):
        out = StringIO()
        console = Console(file=out, force_terminal=terminal, width=120)
        with progress_bar(console, "cell") as progress:
            progress(1, 4, "quantize")
            progress(1, 2, "mini_gsm")
        drawn[terminal] = out.getvalue()
    assert "cell" in drawn[True] and "1/2" in drawn[True] and drawn[False] == ""

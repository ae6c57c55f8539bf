"""The W&B workspace as code, built offline and held against what a run logs; the files for `wandb sweep`."""

import itertools
from functools import cache
from pathlib import Path

import pytest
import yaml
from composed import composed

from dllmq.config import check_cell
from dllmq.evaluation.tasks import generated_tasks
from dllmq.report import dashboard
from dllmq.report.results import load_record, write_json_atomic
from dllmq.report.tracker import SAMPLES, WandbTracker, curve_key, summary
from tests.report.wandb_offline import (
    CURVES,
    FIDELITY,
    KEY,
    ROWS,
    config_of,
    full_record,
    history,
    no_account,
    offline_file,
    read_offline,
    summary_of,
    tracked,
)

ROOT = Path(__file__).resolve().parents[2]
SWEEPS = sorted((ROOT / "experiments" / "wandb").glob("*.yaml"))


@pytest.fixture(autouse=True)
def without_account(tmp_path):
    with no_account(tmp_path) as setenv:
        yield setenv


@pytest.fixture(scope="module")
def panels() -> list[dict]:
    """Every panel as W&B stores it."""
    pytest.importorskip("wandb_workspaces")
    spec = dashboard.specification(dashboard.build_workspace("team", "dllmq"))
    sections = spec["section"]["panelBankConfig"]["sections"]
    return [panel | {"section": s["name"]} for s in sections for panel in s["panels"]]


@pytest.fixture(scope="module")
def logged(tmp_path_factory) -> tuple[set[str], set[str], set[str]]:
    """(names in the history, in the summary, axes in the configuration) of a run that was tracked offline."""
    folder = tmp_path_factory.mktemp("run")
    run = full_record()
    with no_account(folder):
        tracker = WandbTracker(mode="offline")
        tracker.start(tracked(folder))
        tracker.log_curves(run.curves)
        tracker.log_samples(ROWS)
        tracker.finish(run, write_json_atomic(folder / "results.json", run))
    records = read_offline(offline_file(folder))
    in_history = {name for row in history(records) for name in row}
    axes = {f"axes.value.{name}" for name in config_of(records)["axes"]}
    return in_history, set(summary_of(records)), axes


def of_type(panels: list[dict], kind: str) -> list[dict]:
    found = [panel["config"] for panel in panels if panel["viewType"] == kind]
    assert found
    return found


# ------------------------------------------------------------------ the workspace


def test_lines_are_of_logged_curves_over_their_own_x(panels, logged):
    in_history, _, _ = logged
    own = dict(curve_key(name) for name in CURVES)
    for line in of_type(panels, "Run History Line Plot"):
        (y,) = line["metrics"]
        assert {y, line["xAxis"]} <= in_history
        assert line["xAxis"] in (own[y], "denoise/divergence_mask_ratio_by_step")


def test_every_curve_is_drawn(panels):
    drawn = {name for line in of_type(panels, "Run History Line Plot") for name in line["metrics"]}
    drawn |= {line["xAxis"] for line in of_type(panels, "Run History Line Plot")}
    assert {curve_key(name)[0] for name in CURVES} <= drawn


def test_bars_are_of_logged_figures_and_axes(panels, logged):
    _, in_summary, axes = logged
    for bar in of_type(panels, "Bar Chart"):
        assert set(bar["metrics"]) <= in_summary
        assert bar.get("groupBy") in (None, *axes)
    figures = {name for bar in of_type(panels, "Bar Chart") for name in bar["metrics"]}
    assert {f"fidelity/{name}" for name in FIDELITY} <= figures


def test_scores_are_grouped_by_method_and_by_every_switch(panels):
    by = {(bar["metrics"][0], bar.get("groupBy")) for bar in of_type(panels, "Bar Chart")}
    for axis in ("method", "tmas", "cgq", "iaaq"):
        assert ("eval/mini_gsm/exact_match_strict_match", f"axes.value.{axis}") in by


def test_the_sweep_plot_names_logged_columns(panels, logged):
    _, in_summary, axes = logged
    (plot,) = of_type(panels, "Parallel Coordinates Plot")
    known = {f"summary:{name}" for name in in_summary} | {f"config:{name}" for name in axes}
    assert {column["accessor"] for column in plot["columns"]} <= known


def test_the_table_is_the_one_that_is_logged(panels, logged):
    in_history, _, _ = logged
    (panel,) = [panel for panel in panels if panel["section"] == "changed samples"]
    key = panel["config"]["panel2Config"]["exp"]["fromOp"]["inputs"]["key"]["val"]
    assert key == SAMPLES and f"{SAMPLES}/path" in in_history


def test_runs_are_grouped_so_that_seeds_are_averaged(logged):
    pytest.importorskip("wandb_workspaces")
    spec = dashboard.specification(dashboard.build_workspace("team", "dllmq"))
    (runs,) = spec["section"]["runSets"]
    assert [key["name"] for key in runs["grouping"]] == [f"axes.value.{name}" for name in dashboard.GROUPS]
    assert {name.removeprefix("summary:") for name in runs["runFeed"]["columnOrder"][1:]} <= logged[1]


def test_scores_are_those_of_the_tasks_that_exist():
    assert set(dashboard.SCORES) == set(generated_tasks())
    assert {"mini_gsm", "mini_choice"} <= real_names().keys()
    for task, names in real_names().items():
        assert dashboard.SCORES[task] in names


@cache
def real_names() -> dict[str, set[str]]:
    """Task -> its metrics, in the committed records."""
    cells = (f for f in (ROOT / "experiments").glob("*/*/results.json") if "robustness" not in f.parts)
    files = [*cells, *(ROOT / "experiments").rglob("baseline.json")]
    found: dict[str, set[str]] = {}
    for scores in (load_record(file).scores for file in files):
        for task, metrics in scores.items():
            found.setdefault(task, set()).update(metrics)
    return found


# ------------------------------------------------------------------ its command


def test_without_save_it_is_listed_and_nothing_is_sent(capsys):
    pytest.importorskip("wandb_workspaces")
    assert dashboard.main(["--entity", "team", "--project", "p"]) == 0
    out = capsys.readouterr().out
    assert "kl_by_step: denoise/kl_by_step over denoise/step" in out
    assert out.splitlines()[-1].startswith("Built and checked here, nothing was sent")


def test_saving_without_a_key_says_what_to_do(capsys, monkeypatch):
    workspaces = pytest.importorskip("wandb_workspaces.workspaces")
    monkeypatch.setattr(workspaces.Workspace, "save", lambda self: pytest.fail("sent without a key"))
    assert dashboard.main(["--entity", "team", "--save"]) == 2
    error = capsys.readouterr().err
    assert "wandb login" in error and "--save" in error and error.count("\n") == 1


def test_a_failed_save_is_one_line_without_the_key(capsys, monkeypatch, without_account):
    workspaces = pytest.importorskip("wandb_workspaces.workspaces")

    def fail(self):
        raise RuntimeError(f"entity team not found\nfor {KEY}")

    without_account("WANDB_API_KEY", KEY)
    monkeypatch.setattr(workspaces.Workspace, "save", fail)
    assert dashboard.main(["--entity", "team", "--save"]) == 2
    assert "RuntimeError: entity team not found for ***" in capsys.readouterr().err


def test_a_missing_package_is_named_with_its_remedy(capsys, monkeypatch):
    def missing(*_):
        raise ModuleNotFoundError("No module named 'wandb_workspaces'")

    monkeypatch.setattr(dashboard, "_library", missing)
    assert dashboard.main(["--entity", "team"]) == 2
    assert "pip install 'dllmq[dashboard]'" in capsys.readouterr().err


# ------------------------------------------------------------------ wandb sweep


def corners(sweep: dict) -> list[dict]:
    """The grid's corners: first and last value of every parameter, in every combination."""
    values = {name: p["values"] for name, p in sweep["parameters"].items()}
    ends = [dict.fromkeys([v[0], v[-1]]) for v in values.values()]
    return [dict(zip(values, corner, strict=True)) for corner in itertools.product(*ends)]


def arguments(sweep: dict, values: dict, monkeypatch) -> list[str]:
    """What an agent puts behind `python`, made by W&B's own code."""
    from wandb.sdk.launch.sweeps import utils

    monkeypatch.setenv("WANDB_SWEEP_ID", "x1y2z3w4")
    macros = utils.create_sweep_command_args({"args": {k: {"value": v} for k, v in values.items()}})
    command = utils.create_sweep_command(sweep["command"])
    assert command[:2] == ["${env}", "${interpreter}"]
    return [word for part in command[2:] for word in macros.get(part[2:-1], [part])]


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_corner_of_a_sweep_is_a_run_that_passes_the_checks(path, monkeypatch):
    sweep = yaml.safe_load(path.read_text())
    for values in corners(sweep):
        module, name, multirun, *overrides = arguments(sweep, values, monkeypatch)
        assert (module, name, multirun) == ("-m", "dllmq.run", "-m")
        assert f"name={path.stem}-x1y2z3w4" in overrides and "${" not in "".join(overrides)
        config = check_cell(composed(*overrides)).config
        assert {name: config.axes()[name] for name in values} == values


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_sweep_names_a_metric_that_its_runs_log(path):
    sweep = yaml.safe_load(path.read_text())
    demo = [load_record(file) for file in (ROOT / "experiments" / "demo").rglob("results.json")]
    assert all(sweep["metric"]["name"] in summary(run) for run in demo)
    worse_when_lower = sweep["metric"]["name"].startswith("eval/")
    assert sweep["metric"]["goal"] == ("maximize" if worse_when_lower else "minimize")
    assert sweep["name"] == path.stem and sweep["method"] == "grid"


def test_the_sweeps_are_there():
    assert {path.stem for path in SWEEPS} == {"ablation", "bitwidth"}

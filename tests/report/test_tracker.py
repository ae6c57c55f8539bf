"""The W&B copy: recorded offline for real and read back; never in the way of a run."""

import dataclasses
import json
import logging
import os
from pathlib import Path

import pytest

from dllmq.report import tracker as module
from dllmq.report.results import BASELINE, write_json_atomic
from dllmq.report.tracker import (
    MAX_SAMPLES,
    SAMPLE_COLUMNS,
    SAMPLES,
    NullTracker,
    WandbTracker,
    changed_samples,
    curve_key,
    metric_name,
    resolve_mode,
    summary,
)
from tests.report.records_factory import baseline, record
from tests.report.wandb_offline import (
    CURVES,
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


@pytest.fixture(autouse=True)
def without_account(tmp_path):
    with no_account(tmp_path):
        yield


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """One run tracked offline, as a sweep does it: (folder, record, records read back)."""
    folder = tmp_path_factory.mktemp("run")
    run = full_record()
    with no_account(folder):
        results = write_json_atomic(folder / "results.json", run)
        tracker = WandbTracker(project="test", tags=("ci",))
        tracker.start(tracked(folder))
        tracker.log_curves(run.curves)
        tracker.log_samples(ROWS)
        tracker.finish(run, results)
    return folder, run, read_offline(offline_file(folder))


def test_every_curve_point_is_in_the_history_against_its_own_x(offline):
    _, run, records = offline
    rows = history(records)
    assert run.curves.keys() == set(CURVES)
    for name, curve in run.curves.items():
        key, x = curve_key(name)
        assert [(row[x], row[key]) for row in rows if key in row] == list(
            zip(curve["step"], curve["value"], strict=True)
        )
    xs = {"denoise/step", "mask_ratio/block", "transformer/block"}
    assert [len(xs & row.keys()) for row in rows if f"{SAMPLES}/path" not in row] == [1] * (32 + 4 + 8)


def test_curves_are_drawn_over_their_x(offline):
    _, run, records = offline
    metrics = {r.metric.name: r.metric for r in records if r.HasField("metric")}
    for name, x in {
        "denoise/kl_by_step": "denoise/step",
        "denoise/hidden_error_by_step": "denoise/step",
        "denoise/divergence_mask_ratio_by_step": "denoise/step",
        "mask_ratio/kl_by_mask_ratio": "mask_ratio/block",
        "transformer/hidden_error_by_block": "transformer/block",
    }.items():
        assert metrics[name].step_metric == x
    assert {curve_key(name)[0] for name in run.curves} <= set(metrics)


def test_a_curve_can_be_drawn_over_another_of_the_same_steps(offline):
    _, run, records = offline
    x, y = "denoise/divergence_mask_ratio_by_step", "denoise/divergence_by_step"
    points = [(row[x], row[y]) for row in history(records) if x in row]
    ratio, divergence = (run.curves[k.removeprefix("denoise/")]["value"] for k in (x, y))
    assert points == list(zip(ratio, divergence, strict=True))


def test_config_group_and_tags(offline):
    _, _, records = offline
    start = next(r.run for r in records if r.HasField("run"))
    config = config_of(records)
    assert config["method"] == {"n_grid": 20}
    assert config["axes"]["bits"] == "w3a4"
    assert start.run_group == "demo-sweep"
    assert start.job_type == "quantize"
    assert start.display_name == "awq-w3a4-tmas"
    assert set(start.tags) == {"awq", "w3a4", "tmas", "iaaq", "ci"}


def test_summary_has_scores_fidelity_and_cost(offline):
    _, run, records = offline
    found = summary_of(records)
    expected = summary(run)
    assert {key: found[key] for key in expected} == expected
    score = run.scores["mini_gsm"]["exact_match,strict-match"]
    assert found["eval/mini_gsm/exact_match_strict_match"] == score["value"]
    assert found["eval/mini_gsm/exact_match_strict_match_stderr"] == score["stderr"]
    assert found["eval/mini_code/pass_at_1"] == run.scores["mini_code"]["pass@1"]["value"]
    assert {f"fidelity/{name}" for name in run.fidelity} <= found.keys()
    assert {f"cost/{name}" for name in run.cost} <= found.keys()
    assert not any(
        key.startswith(("denoise/kl", "mask_ratio/kl")) for key in found
    )  # a last point is no score


def test_changed_samples_are_a_table_of_at_most_fifty_rows(offline):
    folder, _, records = offline
    (row,) = [row for row in history(records) if f"{SAMPLES}/path" in row]
    assert row[f"{SAMPLES}/nrows"] == MAX_SAMPLES
    table = json.loads((offline_file(folder).parent / "files" / row[f"{SAMPLES}/path"]).read_text())
    assert table["columns"] == list(SAMPLE_COLUMNS)
    assert len(table["data"]) == MAX_SAMPLES
    first, eighth = table["data"][0], table["data"][7]
    assert first == ["mini_gsm", "0", "Question 0\nAnswer:", "#### 7", "#### 7", "#### 0", True, False]
    assert eighth == ["mini_gsm", "7", "Question 7\nAnswer:", "7", "#### 7", "#### 7", True, True]
    assert summary_of(records)[f"{SAMPLES}/path"] == row[f"{SAMPLES}/path"]


def test_the_results_file_is_an_artifact_kept_in_the_runs_folder(offline):
    folder, _, records = offline
    artifacts = [r.request.log_artifact.artifact for r in records if r.request.HasField("log_artifact")]
    artifacts += [r.artifact for r in records if r.HasField("artifact")]
    (artifact,) = [a for a in artifacts if a.type == "results"]
    (entry,) = artifact.manifest.contents
    assert entry.path == "results.json"
    assert Path(entry.local_path).is_relative_to(folder)
    assert Path(entry.local_path).read_bytes() == (folder / "results.json").read_bytes()


def test_secrets_are_nowhere_in_the_files(offline):
    folder, _, _ = offline
    assert not any(KEY.encode() in path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_everything_lies_in_the_runs_folder(offline):
    folder, _, _ = offline
    assert not (folder / "home").exists()
    assert {p.name for p in folder.iterdir()} == {"results.json", "wandb"}


def test_the_environment_is_left_as_it_was_and_nothing_is_printed(tmp_path, capfd):
    before = dict(os.environ)
    tracker = WandbTracker()
    tracker.start(tracked(tmp_path))
    tracker.finish()
    assert dict(os.environ) == before
    assert capfd.readouterr() == ("", "")


# ---------------------------------------------------------------- never in the way


@pytest.mark.parametrize("broken", ["init", "log"])
def test_a_failure_is_one_warning_without_secrets_and_the_run_goes_on(tmp_path, monkeypatch, caplog, broken):
    import wandb

    monkeypatch.setenv("MY_API_KEY", KEY)

    def fail(*_, **__):
        raise RuntimeError(f"no space left\nfor {KEY}")

    monkeypatch.setattr(*{"init": (wandb, "init"), "log": (wandb.Run, "log")}[broken], fail)
    run = record("awq")
    tracker = WandbTracker()
    with caplog.at_level(logging.WARNING, logger=module.__name__):
        tracker.start(tracked(tmp_path))
        tracker.log_curves(run.curves)
        tracker.finish(run, write_json_atomic(tmp_path / "results.json", run))
    messages = [r.getMessage() for r in caplog.records if r.name == module.__name__]
    assert len(messages) == 1
    assert "RuntimeError: no space left for ***" in messages[0]
    assert KEY not in caplog.text


def test_an_unreachable_server_falls_back_to_offline(tmp_path, monkeypatch, caplog):
    import wandb

    monkeypatch.setenv("WANDB_API_KEY", KEY)
    real, modes = wandb.init, []

    def init(**kwargs):
        modes.append(kwargs["mode"])
        if kwargs["mode"] == "online":
            raise wandb.errors.CommError("Timed out while retrying")
        return real(**kwargs)

    monkeypatch.setattr(wandb, "init", init)
    tracker = WandbTracker()
    with caplog.at_level(logging.WARNING, logger=module.__name__):
        tracker.start(tracked(tmp_path))
        tracker.finish()
    assert modes == ["online", "offline"]
    assert "recording offline (CommError: Timed out while retrying)" in caplog.text
    assert list(tmp_path.glob("wandb/offline-run-*"))


def test_the_mode_is_decided_without_asking(monkeypatch, tmp_path, caplog):
    assert resolve_mode("auto") == "offline"
    assert resolve_mode("disabled") == "disabled"
    assert resolve_mode("online") == "offline"
    assert "no API key found" in caplog.text
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert resolve_mode("auto") == "online"
    assert resolve_mode("offline") == "offline"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert resolve_mode("auto") == "offline"
    assert resolve_mode("online") == "online"


def test_a_key_in_netrc_counts(monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai\n  login user\n  password {KEY}\n")
    assert resolve_mode("auto") == "online"


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="auto, online, offline, disabled"):
        WandbTracker(mode="maybe")


def test_the_null_tracker_does_nothing(tmp_path):
    tracker = NullTracker()
    tracker.start(tracked(tmp_path))
    tracker.log_curves({})
    tracker.log_samples(ROWS)
    tracker.finish(record(), tmp_path / "results.json")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- names, job types, samples


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("exact_match,strict-match", "exact_match_strict_match"),
        ("exact_match,flexible-extract", "exact_match_flexible_extract"),
        ("pass@1", "pass_at_1"),
        ("acc,none", "acc"),
        ("acc_norm", "acc_norm"),
        ("gsm8k_cot (zero shot)", "gsm8k_cot_zero_shot"),
    ],
)
def test_names_are_those_that_wandb_can_sort_filter_and_sweep_by(text, name):
    assert metric_name(text) == name
    assert name.isascii() and name.isidentifier()


def test_a_sample_that_cannot_be_logged_is_one_warning(tmp_path, caplog):
    tracker = WandbTracker()
    with caplog.at_level(logging.WARNING, logger=module.__name__):
        tracker.start(tracked(tmp_path))
        tracker.log_samples([{"task": "mini_gsm"}])
        tracker.finish(record("awq"))
    assert [r.getMessage() for r in caplog.records if r.name == module.__name__] == [
        "W&B could not log the samples (KeyError: 'problem')"
    ]


def test_the_job_type_is_the_method_s_unless_given(tmp_path):
    assert tracked(tmp_path).kind() == "quantize"
    assert tracked(tmp_path, method="fp").kind() == "full precision"
    assert dataclasses.replace(tracked(tmp_path), job_type="evaluate").kind() == "evaluate"
    with pytest.raises(ValueError, match="quantize, full precision, evaluate"):
        dataclasses.replace(tracked(tmp_path), job_type="train").kind()


def write_samples(folder: Path, task: str, metric: str, answers: list[tuple[str, float]]) -> None:
    """Samples with the given (response, score) by doc_id."""
    samples = [
        {"doc_id": i, "prompt": f"p{i}", "target": "7", "response": text, metric: score}
        for i, (text, score) in enumerate(answers)
    ]
    (folder / f"samples_{task}.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))


@pytest.fixture
def cell(tmp_path):
    """(sweep folder, path of the run's results.json); no samples yet."""
    write_json_atomic(tmp_path / BASELINE, baseline())
    results = write_json_atomic(tmp_path / "cell" / "results.json", record("awq"))
    return tmp_path, results


def test_changed_samples_pair_the_run_with_full_precision(cell):
    sweep, results = cell
    write_samples(sweep, "mini_gsm", "exact_match", [("7", 1.0), ("7", 1.0), ("3", 0.0), ("7", 1.0)])
    write_samples(results.parent, "mini_gsm", "exact_match", [("7!", 1.0), ("8", 0.0), ("7", 1.0)])
    write_samples(results.parent, "mini_choice", "acc", [("a", 1.0)])  # full precision's are not there
    rows = changed_samples(record("awq"), results, sweep)
    assert [tuple(row) for row in rows] == [SAMPLE_COLUMNS] * 2
    assert [tuple(row.values()) for row in rows] == [
        ("mini_gsm", "1", "p1", "7", "7", "8", True, False),
        ("mini_gsm", "2", "p2", "7", "3", "7", False, True),
    ]


def test_tasks_share_the_rows_of_the_table(cell):
    sweep, results = cell
    for task, metric in {"mini_gsm": "exact_match", "mini_choice": "acc"}.items():
        write_samples(sweep, task, metric, [("a", 1.0)] * 60)
        write_samples(results.parent, task, metric, [("b", 0.0)] * 60)
    tasks = [row["task"] for row in changed_samples(record("awq"), results, sweep)]
    assert (tasks.count("mini_gsm"), tasks.count("mini_choice")) == (25, 25)


def test_a_sweep_without_full_precision_has_no_changed_samples(tmp_path):
    assert changed_samples(record("awq"), tmp_path / "cell" / "results.json", tmp_path) == []


def test_damaged_samples_do_not_stop_a_run(cell, caplog):
    sweep, results = cell
    for folder in (sweep, results.parent):
        (folder / "samples_mini_gsm.jsonl").write_text('{"doc_id": 0, "resp')
    assert changed_samples(record("awq"), results, sweep) == []
    assert "samples_mini_gsm.jsonl is not valid JSON" in caplog.text

"""The W&B copy: recorded offline for real and read back; never in the way of a run."""

import json
import logging
import os
import struct
from pathlib import Path

import pytest

from dllmq.report import tracker as module
from dllmq.report.results import write_json_atomic
from dllmq.report.tracker import NullTracker, TrackedRun, WandbTracker, curve_key, resolve_mode, summary
from tests.report.records_factory import record

KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def no_account(monkeypatch, tmp_path):
    for name in [n for n in os.environ if n.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def tracked(folder: Path) -> TrackedRun:
    return TrackedRun(
        name="awq-w3a4-tmas",
        folder=folder,
        config={"method": {"n_grid": 20}, "tmas": True, "tracker": {"api_key": KEY}},
        axes={"method": "awq", "bits": "w3a4", "tmas": True, "cgq": False, "seed": 0},
        group="demo-sweep",
    )


def read_offline(path: Path) -> list:
    """The records of a .wandb file: 7 bytes of header, then LevelDB's log format in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, offset, parts, records = path.read_bytes(), 7, b"", []
    assert data[:4] == b":W&B"
    while offset + 7 <= len(data):
        left = 32768 - offset % 32768
        if left < 7:
            offset += left
            continue
        _, length, kind = struct.unpack("<IHB", data[offset : offset + 7])
        if kind == 0:
            offset += left
            continue
        parts += data[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # full, last
            records.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
    return records


def values(items) -> dict:
    return {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in items}


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """One run tracked offline, as a sweep does it: (folder, record, records read back, console output)."""
    folder = tmp_path_factory.mktemp("run")
    run = record("awq", tmas=True)
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith("WANDB_")]:
            patch.delenv(name)
        patch.setenv("HOME", str(folder / "home"))
        patch.setenv("NETRC", str(folder / "netrc"))
        results = write_json_atomic(folder / "results.json", run)
        tracker = WandbTracker(project="test", tags=("ci",))
        tracker.start(tracked(folder))
        tracker.log_curves(run.curves)
        tracker.finish(run, results)
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    return folder, run, read_offline(path)


def test_every_curve_point_is_in_the_history_against_its_own_x(offline):
    _, run, records = offline
    rows = [values(r.history.item) for r in records if r.HasField("history")]
    for name, curve in run.curves.items():
        key, x = curve_key(name)
        assert [(row[x], row[key]) for row in rows if key in row] == list(
            zip(curve["step"], curve["value"], strict=True)
        )
    assert not any("denoise/step" in row and "mask_ratio/block" in row for row in rows)


def test_curves_are_drawn_over_their_x(offline):
    _, run, records = offline
    metrics = {r.metric.name: r.metric for r in records if r.HasField("metric")}
    assert metrics["denoise/kl_by_step"].step_metric == "denoise/step"
    assert metrics["mask_ratio/kl_by_mask_ratio"].step_metric == "mask_ratio/block"
    assert {curve_key(name)[0] for name in run.curves} <= set(metrics)


def test_config_group_and_tags(offline):
    _, _, records = offline
    start = next(r.run for r in records if r.HasField("run"))
    config = values(start.config.update)
    assert config["method"] == {"n_grid": 20}
    assert config["axes"]["bits"] == "w3a4"
    assert start.run_group == "demo-sweep"
    assert start.job_type == "quantize"
    assert start.display_name == "awq-w3a4-tmas"
    assert set(start.tags) == {"awq", "w3a4", "tmas", "ci"}


def test_summary_has_scores_fidelity_and_cost(offline):
    _, run, records = offline
    found: dict = {}
    for r in records:
        if r.HasField("summary"):
            found |= values(r.summary.update)
    for key, value in summary(run).items():
        assert found[key] == value
    assert found["eval/mini_gsm/exact_match"] == run.scores["mini_gsm"]["exact_match"]["value"]
    assert found["cost/quantized_share"] == 0.843


def test_the_results_file_is_an_artifact_kept_in_the_runs_folder(offline):
    folder, _, records = offline
    requests = [r.request.log_artifact for r in records if r.request.HasField("log_artifact")]
    artifact = (
        requests[0].artifact if requests else next(r.artifact for r in records if r.HasField("artifact"))
    )
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
    tracker.finish(record(), tmp_path / "results.json")
    assert list(tmp_path.iterdir()) == []

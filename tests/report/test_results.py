"""Records: written whole or not at all, read strictly, ordered by their axes."""

import dataclasses
import json
import logging
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllmq.report import results
from dllmq.report.results import RunRecord, load_record, load_sweep, redact, to_plain, write_json_atomic
from tests.report.records_factory import baseline, cells, record, write_sweep


def test_a_record_survives_the_disk(tmp_path):
    written = record(tmas=True)
    assert load_record(write_json_atomic(tmp_path / "results.json", written)) == written


def test_numpy_and_torch_values_become_plain_numbers():
    obj = {
        "a": np.float32(0.5),
        "b": torch.tensor(2),
        "c": torch.tensor([1.5, 2.5], dtype=torch.bfloat16),
        "d": np.bool_(True),
        3: (np.int64(1), {2, 1}),
    }
    assert to_plain(obj) == {"a": 0.5, "b": 2, "c": [1.5, 2.5], "d": True, "3": [1, [1, 2]]}


def test_not_finite_becomes_null_and_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        assert to_plain({"kl": {"value": math.nan, "max": math.inf}}) == {"kl": {"value": None, "max": None}}
    assert "kl.value, kl.max" in caplog.text


def test_what_has_no_json_form_is_named():
    with pytest.raises(TypeError, match=r"config\.method is a object"):
        to_plain({"config": {"method": object()}})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(json_values)
def test_plain_json_is_left_as_it_is(value):
    assert to_plain(value) == value


@pytest.mark.parametrize("broken", ["replace", "fsync"])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, broken):
    path = write_json_atomic(tmp_path / "results.json", {"old": 1})

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(results.os, broken, fail)
    with pytest.raises(OSError, match="disk full"):
        write_json_atomic(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
    assert os.listdir(tmp_path) == ["results.json"]


def test_a_missing_key_is_named_with_its_file(tmp_path):
    raw = record().to_json()
    del raw["fidelity"]
    path = write_json_atomic(tmp_path / "results.json", raw)
    with pytest.raises(ValueError, match=r"results\.json has no key 'fidelity'"):
        load_record(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scores": {"t": {"acc": {"value": 1.0, "n": 3}}}}, r"scores\.t\.acc\.stderr"),
        ({"scores": {"t": {"acc": {"value": "1", "stderr": 0, "n": 3}}}}, "must be a number"),
        ({"curves": {"kl": {"step": [0, 1], "value": [0.5]}}}, "2 steps and 1 values"),
        ({"curves": {"kl": {"step": [0, 1]}}}, r"curves\.kl\.value"),
        ({"seed": "zero"}, "'seed' must be a whole number"),
        ({"axes": []}, "'axes' must be an object"),
    ],
)
def test_a_wrong_value_is_named_with_its_place(tmp_path, change, words):
    path = write_json_atomic(tmp_path / "results.json", {**record().to_json(), **change})
    with pytest.raises(ValueError, match=words):
        load_record(path)


def test_a_cut_off_file_is_named(tmp_path):
    (tmp_path / "results.json").write_text('{"config": ')
    with pytest.raises(ValueError, match=r"results\.json is not valid JSON"):
        load_sweep(tmp_path)


def test_keys_of_a_newer_version_are_left_aside(tmp_path):
    path = write_json_atomic(tmp_path / "results.json", {**record().to_json(), "divergence": 1})
    assert load_record(path) == record()


def test_secrets_in_a_configuration_are_hidden():
    config = {
        "tracker": {"api_key": "abc", "hf_token": "x"},
        "mask_token_id": 3,
        "tokens": [1],
        "password": None,
    }
    assert redact(config) == {
        "tracker": {"api_key": "***", "hf_token": "***"},
        "mask_token_id": 3,
        "tokens": [1],
        "password": None,
    }


# ---------------------------------------------------------------- sweeps


def test_a_sweep_is_ordered_by_its_axes_wherever_the_files_lie(tmp_path):
    write_json_atomic(tmp_path / "baseline.json", baseline())
    for name, cell in zip(("d", "c/x", "b", "a"), cells(), strict=True):
        write_json_atomic(tmp_path / name / "results.json", cell)
    sweep = load_sweep(tmp_path)
    assert [(r.axes["method"], r.axes["tmas"]) for r in sweep.records] == [
        ("awq", False),
        ("awq", True),
        ("gptq", False),
        ("gptq", True),
    ]
    assert sweep.paths == ("d/results.json", "c/x/results.json", "b/results.json", "a/results.json")
    assert sweep.baseline == baseline()


def test_widths_are_ordered_as_numbers_and_methods_from_plain_to_elaborate(tmp_path):
    axes = [("gptq", "w4a16"), ("gptq", "w4a4"), ("rtn", "w4a4"), ("awq", "w8a8")]
    for i, (method, bits) in enumerate(axes):
        write_json_atomic(tmp_path / str(i) / "results.json", record(method, bits=bits))
    found = [(r.axes["method"], r.axes["bits"]) for r in load_sweep(tmp_path).records]
    assert found == [("rtn", "w4a4"), ("awq", "w8a8"), ("gptq", "w4a4"), ("gptq", "w4a16")]


def test_failed_runs_are_kept_unless_they_finished_later(tmp_path):
    write_sweep(tmp_path, failed=True)
    assert [s["run_name"] for s in load_sweep(tmp_path).failed] == ["rtn-w3a4-tmas_True"]
    write_json_atomic(tmp_path / "4" / "results.json", record("rtn", tmas=True))
    assert load_sweep(tmp_path).failed == ()


def test_copies_in_wandbs_folders_are_not_runs(tmp_path):
    write_sweep(tmp_path)
    write_json_atomic(tmp_path / "0" / "wandb" / "data" / "results.json", record("rtn"))
    write_json_atomic(tmp_path / ".cache" / "results.json", record("rtn"))
    assert len(load_sweep(tmp_path).records) == 4


def test_folders_that_go_while_a_sweep_is_read_are_passed_over(tmp_path, monkeypatch):
    """A cell that runs renames its unfinished folders: here each is gone when the walk comes to it."""
    write_sweep(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name / "unfinished").mkdir(parents=True)
    scandir = os.scandir

    def too_late(path):
        if os.path.basename(path) == "unfinished":
            os.rmdir(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", too_late)
    assert len(load_sweep(tmp_path).records) == 4
    assert not list(tmp_path.glob("*/unfinished"))


def test_without_a_baseline_file_the_full_precision_run_is_the_reference(tmp_path):
    write_json_atomic(tmp_path / "0" / "results.json", record("gptq"))
    write_json_atomic(tmp_path / "1" / "results.json", baseline())
    sweep = load_sweep(tmp_path)
    assert sweep.baseline.axes["method"] == "fp"
    assert [r.axes["method"] for r in sweep.records] == ["gptq"]
    assert sweep.paths == ("0/results.json",)


def test_a_missing_or_empty_folder_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="No folder"):
        load_sweep(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"No results\.json under"):
        load_sweep(tmp_path)


def test_the_fields_of_the_contract_are_there():
    contract = [
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
    ]
    assert set(contract) <= {f.name for f in dataclasses.fields(RunRecord)}


def test_json_keeps_a_list_of_plain_values_on_one_line(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None, "x\n", True], "b": {}, "c": []}
    value |= {"d": [{"e": [1]}, [2, 3]], "é": {"f": "[1, {"}}
    path = write_json_atomic(tmp_path / "x.json", value)
    assert json.loads(path.read_text(encoding="utf-8")) == value
    assert '  "a": [1, 2.5, null, "x\\n", true],\n' in path.read_text(encoding="utf-8")

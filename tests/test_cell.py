"""Parts of a cell: cost by stage, files shared in a sweep, what is run again and what is not."""

import logging
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module

import dllmq.cell
from dllmq.calibration.states import Trajectory
from dllmq.cell import (
    Cell,
    Stages,
    _difference,
    _generated_prompts,
    _reference_config,
    eval_settings,
    read_trajectories,
    write_trajectories,
)
from dllmq.config import Plan, check_cell, load
from dllmq.methods import FP
from dllmq.report.results import BASELINE, RESULTS, STATUS, RunRecord, write_json_atomic


def plan(*overrides: str) -> Plan:
    with initialize_config_module("dllmq.conf", version_base="1.3"):
        return check_cell(compose("config", overrides=["tracker=none", *overrides]))


def cell(folder: Path, *overrides: str) -> Cell:
    return Cell(plan(*overrides), folder / "cell", folder, "cell", "python -m dllmq.run", lambda *_: None)


def record(fingerprint: str, **fields: object) -> RunRecord:
    empty = {"scores": {}, "fidelity": {}, "curves": {}, "cost": {}, "inert": [], "versions": {}, "git": {}}
    values = {"config": {}, "run_name": "cell", "device": "cpu", "seed": 0, "axes": {}, "command": "c"}
    return RunRecord(**(empty | values | {"status": "finished", "fingerprint": fingerprint} | fields))


# ------------------------------------------------------------------ small functions


def test_difference_names_the_keys() -> None:
    old = {"a": 1, "b": {"c": 2, "d": 3}, "e": [1, 2]}
    assert _difference(old, {"a": 1, "b": {"c": 2, "d": 3}, "e": [1, 2]}) == "code, machine or data"
    assert _difference(old, {"a": 2, "b": {"c": 2, "d": 4}, "e": [1, 2]}) == "a, b.d"
    assert _difference(old, {"b": {"c": 2}, "e": [1], "new": 0}) == "a, b.d, e, new"
    assert _difference({"b": {"c": 1}}, {"b": None}) == "b"


def test_stages_add_seconds_and_keep_the_largest_peak() -> None:
    stages = Stages("cpu")
    for _ in range(2):
        with stages("work"):
            time.sleep(0.01)
    with stages("memory"):
        block = torch.ones(2**24)  # 64 MiB
        del block
    cost = stages.cost
    assert 0.02 <= cost["work_s"] < 5
    assert cost["memory_peak_bytes"] >= 2**26
    assert cost["peak_memory_bytes"] == max(cost["memory_peak_bytes"], cost["work_peak_bytes"])


def test_a_stage_that_fails_is_not_a_measurement() -> None:
    stages = Stages("cpu")
    with pytest.raises(RuntimeError), stages("work"):
        raise RuntimeError
    assert stages.cost == {}


def test_generated_prompts_take_turns_and_do_not_depend_on_the_count() -> None:
    texts = _generated_prompts("train", 7, seed=3)
    assert [t.startswith("Question: ") for t in texts] == [True, False] * 3 + [True]
    assert all(t.endswith("\nAnswer:") or t.endswith('"""\n') for t in texts)
    assert texts[:4] == _generated_prompts("train", 4, seed=3)
    assert not set(texts) & set(_generated_prompts("dev", 7, seed=3))
    assert texts != _generated_prompts("train", 7, seed=4)


# ------------------------------------------------------------------ files


def trajectory(steps: int, prompt: int, generator: torch.Generator) -> Trajectory:
    L = prompt + 4
    return Trajectory(
        tokens=torch.randint(9, (steps, L), generator=generator),
        masked=torch.rand(steps, L, generator=generator) < 0.5,
        score=torch.rand(steps, L, generator=generator),
        committed=torch.rand(steps, L, generator=generator) < 0.5,
        step=torch.arange(steps) * 2,
        final=torch.randint(9, (L,), generator=generator),
        prompt_length=prompt,
        num_steps=2 * steps,
    )


def test_trajectories_make_the_round_trip(tmp_path: Path, generator: torch.Generator) -> None:
    # more than ten: read back in the order of their numbers, not of their names
    written = [trajectory(2 + i % 3, 1 + i, generator) for i in range(12)]
    for t in written:
        object.__setattr__(t, "num_steps", 10)
    write_trajectories(written, tmp_path / "deep" / "t.safetensors")
    read = read_trajectories(tmp_path / "deep" / "t.safetensors", 10)
    assert len(read) == 12
    for a, b in zip(written, read, strict=True):
        assert (a.prompt_length, a.num_steps) == (b.prompt_length, b.num_steps)
        for name in ("tokens", "masked", "score", "committed", "step", "final"):
            assert torch.equal(getattr(a, name), getattr(b, name))
    assert [f.name for f in (tmp_path / "deep").iterdir()] == ["t.safetensors"]


def test_shared_files_are_named_after_what_made_them(tmp_path: Path) -> None:
    one, same, other = (
        cell(tmp_path, *o) for o in ((), ("method=rtn", "bits=w8a8", "tmas=true"), ("sampler.steps=24",))
    )
    assert one._shared("reference") == same._shared("reference") != other._shared("reference")
    assert one.key != same.key


# ------------------------------------------------------------------ full precision's config


def test_the_reference_drops_quantization_and_keeps_the_measurement() -> None:
    config = plan(
        "method=awq", "bits=w4a8", "tmas=true", "seed=5", "group_size=32", "sampler.steps=24", "eval.limit=7"
    ).config
    reference = _reference_config(config)
    assert isinstance(reference.recipe().method, FP) and reference.axes()["bits"] == "w16a16"
    assert not reference.tmas and reference.seed == 0 and reference.group_size == -1
    assert (reference.eval, reference.sampler, reference.tasks) == (config.eval, config.sampler, config.tasks)
    assert _reference_config(reference) == reference


def test_settings_of_the_evaluation_are_the_configs() -> None:
    made = plan("sampler.steps=24", "eval.batch_size=5", "eval.eos_cut=none", "model.chat_template=true")
    settings = eval_settings(made.config, made)
    assert settings.sampler == made.recipe.sampler and settings.sampler.steps == 24
    assert (settings.batch_size, settings.eos_cut, settings.chat_template) == (5, "none", True)
    assert (settings.mc_num, settings.mc_batch_size) == (8, 8)


# ------------------------------------------------------------------ resume


def test_a_finished_cell_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = cell(tmp_path)
    done = record(made.key)
    write_json_atomic(tmp_path / "cell" / RESULTS, done)
    monkeypatch.setattr(Cell, "_compute", lambda self: pytest.fail("it was run again"))
    assert made.run() == done


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("other", "has results of another configuration, code or machine (bits)"),
        ("{", "not readable"),
        ("{}", "not readable"),
    ],
)
def test_other_and_damaged_results_are_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, content: str, said: str
) -> None:
    made = cell(tmp_path)
    old = record("another", config=made.config.plain() | {"bits": "w8a8"})
    write_json_atomic(tmp_path / "cell" / RESULTS, old)
    if content != "other":
        (tmp_path / "cell" / RESULTS).write_text(content)
    (tmp_path / "cell" / STATUS).write_text("{}")
    monkeypatch.setattr(Cell, "_compute", lambda self: record(self.key, seed=7))
    with caplog.at_level(logging.INFO, "dllmq"):
        assert made.run().seed == 7
    assert said in caplog.text
    assert made.run().seed == 7 and not (tmp_path / "cell" / STATUS).exists()  # the failure is past


def test_results_of_another_configuration_are_set_aside_when_the_cell_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the report would show them as this configuration's."""
    made = cell(tmp_path)
    write_json_atomic(tmp_path / "cell" / RESULTS, record("another"))

    def failing(self: Cell) -> RunRecord:
        raise ValueError("no")

    monkeypatch.setattr(Cell, "_compute", failing)
    with pytest.raises(ValueError, match="no"):
        made.run()
    assert [f.name for f in (tmp_path / "cell").iterdir()] == ["results.stale.json"]


def test_resume_false_runs_a_finished_cell_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = cell(tmp_path, "resume=false")
    write_json_atomic(tmp_path / "cell" / RESULTS, record(made.key))
    monkeypatch.setattr(Cell, "_compute", lambda self: record(self.key, seed=7))
    assert made.run().seed == 7


class Spy:
    """A tracker that writes down what it is told."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def start(self, run: object) -> None:
        self.calls.append("start")

    def log_curves(self, curves: object) -> None:
        self.calls.append("curves")

    def finish(self, record: object = None, results: object = None) -> None:
        self.calls.append("finish" if record is not None else "failed")


def test_the_tracker_is_closed_whatever_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy()
    monkeypatch.setattr(dllmq.cell, "build", lambda key, node: spy)

    def interrupted(self: Cell) -> RunRecord:
        raise KeyboardInterrupt

    monkeypatch.setattr(Cell, "_compute", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cell(tmp_path).run()
    assert spy.calls == ["start", "failed"] and not (tmp_path / "cell" / RESULTS).exists()

    def checked(self: Cell) -> RunRecord:
        return record(self.key)

    spy.calls.clear()
    monkeypatch.setattr(Cell, "_compute", checked)
    cell(tmp_path).run()
    assert spy.calls == ["start", "curves", "finish"] and (tmp_path / "cell" / RESULTS).exists()


def test_full_precision_is_read_where_it_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = cell(tmp_path)
    measured = []

    def measure(self: Cell, *args: object) -> RunRecord:
        measured.append(self.name)
        return record(self.key)

    monkeypatch.setattr(Cell, "_measure", measure)
    monkeypatch.setattr(dllmq.cell, "weight_bytes", lambda model: 0)
    first = made._baseline(None, None)
    assert first.fingerprint == made.fp_key and first.axes["method"] == "fp"
    assert first.config["bits"] == "w16a16" and not first.config["tmas"]
    assert cell(tmp_path, "method=rtn", "tmas=true")._baseline(None, None) == first and len(measured) == 1
    (tmp_path / BASELINE).write_text("{")
    assert made._baseline(None, None) == first and len(measured) == 2
    cell(tmp_path, "eval.limit=3")._baseline(None, None)
    assert len(measured) == 3


def test_a_cell_of_full_precision_is_the_baseline_under_its_own_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = cell(tmp_path, "method=fp")
    baseline = record(made.fp_key, scores={"t": {"acc": {"value": 0.5, "stderr": 0.1, "n": 3}}})
    monkeypatch.setattr(Cell, "_load", lambda self: (None, None))
    monkeypatch.setattr(Cell, "_baseline", lambda self, model, tokenizer: baseline)
    done = made.run()
    assert done.scores == baseline.scores and done.fingerprint == made.key
    assert done == replace(
        baseline,
        run_name="cell",
        fingerprint=made.key,
        axes=made.config.axes(),
        config=made.config.plain(),
        command="python -m dllmq.run",
    )


def test_load_and_plain_agree() -> None:
    config = plan("bits=auto").config
    assert config.plain()["bits"] == config.model.default_bits
    with initialize_config_module("dllmq.conf", version_base="1.3"):
        assert load(compose("config", overrides=["tracker=none"])) == config

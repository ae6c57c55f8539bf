"""Parts of a cell: cost by stage, full precision's record, what is run again and what is not."""

import json
import logging
import time
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from composed import composed
from tiny_checkpoint import save_checkpoint
from tiny_llada import tiny_model

import dllmq.cell
from dllmq.cache import Cache
from dllmq.cell import Cell
from dllmq.config import Plan, RunConfig, check_cell, load, reference_config
from dllmq.evaluation.tasks import EvalResult
from dllmq.full_precision import FullPrecision
from dllmq.machine import Stages
from dllmq.methods import FP
from dllmq.report.results import BASELINE, RESULTS, STATUS, RunRecord, to_plain, write_json_atomic
from dllmq.resume import difference


def plan(*overrides: str) -> Plan:
    return check_cell(composed("tracker=none", *overrides))


def cell(folder: Path, *overrides: str) -> Cell:
    return Cell(plan(*overrides), folder / "cell", folder, "cell", "python -m dllmq.run", lambda *_: None)


def record(fingerprint: str, **fields: object) -> RunRecord:
    empty = {"scores": {}, "fidelity": {}, "curves": {}, "cost": {}, "inert": [], "versions": {}, "git": {}}
    values = {"config": {}, "run_name": "cell", "device": "cpu", "seed": 0, "axes": {}, "command": "c"}
    return RunRecord(**(empty | values | {"status": "finished", "fingerprint": fingerprint} | fields))


# ------------------------------------------------------------------ small functions


def test_difference_names_the_keys() -> None:
    old = {"a": 1, "b": {"c": 2, "d": 3}, "e": [1, 2]}
    assert difference(old, {"a": 1, "b": {"c": 2, "d": 3}, "e": [1, 2]}) == "code, machine or data"
    assert difference(old, {"a": 2, "b": {"c": 2, "d": 4}, "e": [1, 2]}) == "a, b.d"
    assert difference(old, {"b": {"c": 2}, "e": [1], "new": 0}) == "a, b.d, e, new"
    assert difference({"b": {"c": 1}}, {"b": None}) == "b"


def test_stages_add_seconds_and_keep_the_largest_peak() -> None:
    stages = Stages("cpu")
    for _ in range(2):
        with stages("work"):
            time.sleep(0.01)
    with stages("memory"):
        block = torch.ones(2**24)  # 64 MiB
        del block
    cost = stages.cost
    assert 0.02 <= cost["work_s"] < 60
    assert cost["memory_peak_bytes"] >= 2**26
    assert cost["peak_memory_bytes"] == max(cost["memory_peak_bytes"], cost["work_peak_bytes"])


def test_a_stage_that_fails_is_not_a_measurement() -> None:
    stages = Stages("cpu")
    with pytest.raises(RuntimeError), stages("work"):
        raise RuntimeError
    assert stages.cost == {}


# ------------------------------------------------------------------ full precision's config


def test_the_reference_drops_quantization_and_keeps_the_measurement() -> None:
    config = plan(
        "method=awq", "bits=w4a8", "tmas=true", "cgq=true", "iaaq=true", "seed=5", "group_size=32",
        "cgq_unmasked=0.3", "iaaq_alpha_min=0.5", "value_scale=mse", "backend=fake", "attn_bits=qkpv",
        "calibration.num_prompts=8", "calibration.num_states=9", "eval.fidelity_states=3",
        "sampler.steps=24", "eval.limit=7", "eval.batch_size=5",
    ).config  # fmt: skip
    reference, plain = reference_config(config), RunConfig()
    assert isinstance(reference.recipe().method, FP) and reference.axes()["bits"] == "w16a16"
    kept = ("model", "sampler", "tasks", "tracker", "device", "cache_dir", "explicit")
    assert all(getattr(reference, name) == getattr(config, name) for name in kept)
    assert (reference.eval.limit, reference.eval.batch_size) == (7, 5)
    same = {f.name for f in fields(plain) if getattr(reference, f.name) == getattr(plain, f.name)}
    assert {f.name for f in fields(plain)} - same <= {*kept, "method", "eval"}
    assert reference_config(reference) == reference


def test_settings_of_the_evaluation_are_the_configs() -> None:
    made = plan("sampler.steps=24", "eval.batch_size=5", "eval.eos_cut=none", "model.chat_template=true")
    settings = made.config.answers()["mini_gsm"]
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
    assert [f.name for f in (tmp_path / "cell").iterdir() if f.name[0] != "."] == ["results.stale.json"]


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

    def log_samples(self, rows: object) -> None:
        self.calls.append("samples")

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
    assert spy.calls == ["start", "curves", "samples", "finish"] and (tmp_path / "cell" / RESULTS).exists()


def baseline_of(made: Cell, cache: Path) -> RunRecord:
    """What the cell takes for full precision's record; nothing is loaded."""
    shared = FullPrecision(made.plan, Cache(cache), SimpleNamespace(blocks=[]), None, None)
    return made._baseline(shared)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Measuring is replaced; holds the name of the cell for each time it was."""
    names: list[str] = []

    def measure(self: Cell, *args: object) -> tuple[RunRecord, EvalResult]:
        names.append(self.name)
        return record(self.key), EvalResult(samples={"mini_gsm": [{"doc_id": len(names)}]})

    monkeypatch.setattr(Cell, "_measure", measure)
    monkeypatch.setattr(dllmq.cell, "weight_bytes", lambda model: 0)
    return names


def test_full_precision_is_measured_once_for_a_sweep(tmp_path: Path, measured: list[str]) -> None:
    cache = tmp_path / "cache"
    made = cell(tmp_path / "one")
    first = baseline_of(made, cache)
    assert first.fingerprint == made.fp_key and first.axes["method"] == "fp"
    assert first.config["bits"] == "w16a16" and not first.config["tmas"]
    other = cell(tmp_path / "one", "method=rtn", "tmas=true", "cgq=true", "iaaq=true")
    assert baseline_of(other, tmp_path / "another") == first and len(measured) == 1  # the sweep has it
    baseline_of(cell(tmp_path / "one", "eval.limit=3"), cache)
    assert len(measured) == 2


def test_another_sweep_takes_record_and_answers_from_the_cache(tmp_path: Path, measured: list[str]) -> None:
    for sweep in ("one", "two"):
        assert baseline_of(cell(tmp_path / sweep), tmp_path / "cache").fingerprint == cell(tmp_path).fp_key
        (line,) = (tmp_path / sweep / "samples_mini_gsm.jsonl").read_text().splitlines()
        assert json.loads(line) == {"doc_id": 1}
    assert len(measured) == 1
    assert (tmp_path / "one" / BASELINE).read_bytes() == (tmp_path / "two" / BASELINE).read_bytes()


def test_a_damaged_baseline_comes_from_the_cache(tmp_path: Path, measured: list[str]) -> None:
    first = baseline_of(cell(tmp_path), tmp_path / "cache")
    whole = (tmp_path / BASELINE).read_bytes()
    (tmp_path / BASELINE).write_text("{")
    assert baseline_of(cell(tmp_path), tmp_path / "cache") == first and len(measured) == 1
    assert (tmp_path / BASELINE).read_bytes() == whole


def test_measuring_full_precision_costs_the_cell_nothing(tmp_path: Path, measured: list[str]) -> None:
    made = cell(tmp_path)
    stages = made.stages
    baseline_of(made, tmp_path / "cache")
    assert made.stages is stages and stages.cost == {}


def test_full_precision_with_a_cache_is_measured_against_the_exact_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: list[str]
) -> None:
    monkeypatch.setattr(Cell, "_load", lambda self: (tiny_model(), None))
    exact = cell(tmp_path, "method=fp")
    fast = cell(tmp_path, "method=fp", "sampler.cache=dual", f"cache_dir={tmp_path / 'cache'}")
    done = fast.run()
    assert measured == ["cell", "cell"] and done.fingerprint == fast.key != fast.fp_key == exact.fp_key
    assert json.loads((tmp_path / BASELINE).read_text())["fingerprint"] == exact.fp_key
    assert (tmp_path / "cell" / "samples_mini_gsm.jsonl").is_file()


def test_full_precisions_answers_are_decoded_exactly_whoever_asks_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record goes to the cache under the exact run's fingerprint, so exact runs will take it."""
    asked: list[tuple[str, bool]] = []

    def evaluate(*arguments: Any) -> EvalResult:
        settings = arguments[3]
        sampler = settings["mini_gsm"].sampler
        asked.append((sampler.cache, sampler.exact))
        return EvalResult()

    monkeypatch.setattr(dllmq.cell, "evaluate", evaluate)
    monkeypatch.setattr(Cell, "_load", lambda self: (setattr(self, "memory", None), (tiny_model(), None))[1])
    fast = cell(tmp_path, "method=fp", "sampler.cache=dual", f"cache_dir={tmp_path / 'cache'}")
    fast.run()
    assert asked == [("none", True), ("dual", False)]
    notes = json.loads((tmp_path / BASELINE).read_text())["notes"]
    assert notes["settings"]["mini_gsm"]["sampler"]["cache"] == "none"
    assert "approximate decoding" not in notes


def test_a_cache_without_generated_answers_is_recorded_as_without_effect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = cell(tmp_path, "method=fp", "tasks=mini_choice", "sampler.cache=dual", "sampler.threshold=0.9")
    monkeypatch.setattr(Cell, "_load", lambda self: (tiny_model(), None))
    monkeypatch.setattr(Cell, "_baseline", lambda self, shared: record(made.fp_key))
    assert made.run().inert == [
        f"sampler.{name}: no task generates its answers" for name in ("cache", "threshold")
    ]


def test_a_cell_of_full_precision_is_the_baseline_under_its_own_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And says which switches it has no use for."""
    made = cell(tmp_path, "method=fp", "tmas=true", "cgq=true", "iaaq=true")
    baseline = record(made.fp_key, scores={"t": {"acc": {"value": 0.5, "stderr": 0.1, "n": 3}}})
    monkeypatch.setattr(Cell, "_load", lambda self: (tiny_model(), None))
    monkeypatch.setattr(Cell, "_baseline", lambda self, shared: baseline)
    done = made.run()
    assert [line.partition(":")[0] for line in done.inert] == ["tmas", "cgq", "iaaq"]
    assert all(f"no effect: {line}" in caplog.text for line in done.inert)
    assert done == replace(
        baseline,
        run_name="cell",
        fingerprint=made.key,
        axes=made.config.axes(),
        config=made.config.plain(),
        command="python -m dllmq.run",
        inert=done.inert,
    )


def test_load_and_plain_agree() -> None:
    config = plan("bits=auto").config
    assert config.plain()["bits"] == config.model.default_bits
    assert load(composed("tracker=none")) == config


# ------------------------------------------------------------------ memory


@pytest.fixture(scope="module")
def by_memory(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunRecord]:
    """The same cell with its model loaded and streamed, each with a cache of its own; states on disk."""
    where, records = tmp_path_factory.mktemp("memory"), {}
    model = save_checkpoint(where / "model", n_layers=2)
    words = ["calibration.num_prompts=2", "calibration.num_states=4", "eval.fidelity_states=4",
             "eval.fidelity_prompts=1", "sampler.gen_length=8", "sampler.steps=4", "sampler.block_length=8",
             "tasks.names=[mini_choice]", "eval.limit=2", "eval.mc_num=2",
             "eval.mc_batch_size=2"]  # fmt: skip
    words += [f"model.path={model}", "method=gptq", "max_state_bytes=0"]
    for memory in ("whole", "stream"):
        folder = where / memory
        (folder / "cell").mkdir(parents=True)
        records[memory] = cell(folder, *words, f"memory={memory}", f"cache_dir={folder / 'cache'}").run()
    return records


def test_a_streamed_cell_has_the_loaded_cells_numbers(by_memory: dict[str, RunRecord]) -> None:
    whole, streamed = (to_plain(by_memory[memory]) for memory in ("whole", "stream"))
    for key in ("scores", "fidelity", "curves", "per_problem", "fidelity_per_prompt", "calibration"):
        assert whole[key] == streamed[key] and whole[key]
    for key in ("weight_bytes", "quantized_share", "fp_forwards"):
        assert whole["cost"][key] == streamed["cost"][key] > 0
    assert whole["notes"]["method"] == streamed["notes"]["method"]
    assert whole["fingerprint"] == streamed["fingerprint"]


def test_a_record_says_what_was_held(by_memory: dict[str, RunRecord]) -> None:
    for memory, record in by_memory.items():
        noted = record.notes["memory"]
        assert noted["mode"] == memory and noted["weight_bytes"] > 0

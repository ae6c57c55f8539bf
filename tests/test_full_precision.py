"""Full precision's share of a run: made once for all that depend on the same things, and only for those."""

import json
import shutil
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from composed import composed
from tiny_checkpoint import save_checkpoint
from torch import Tensor

from dllmq.cache import Cache, load_json, save_json
from dllmq.calibration.states import CalibrationState, Trajectory
from dllmq.cell import Cell
from dllmq.config import check_cell
from dllmq.full_precision import (
    Baseline,
    ForwardCounter,
    FullPrecision,
    _generated_prompts,
    _load_states,
    _save_states,
    load_trajectories,
    save_trajectories,
)
from dllmq.models.loading import load_model
from dllmq.models.tokenizer import load_tokenizer
from dllmq.pipeline import calibration_states
from dllmq.report.results import RunRecord, load_record

SMALL = (
    "model.dtype=float32",
    "tracker=none",
    "tasks=mini_gsm",
    "eval.limit=2",
    "eval.fidelity_states=4",
    "eval.fidelity_prompts=2",
    "calibration.num_prompts=2",
    "calibration.num_states=4",
    "calibration.batch_size=2",
    "sampler.gen_length=8",
    "sampler.steps=4",
    "sampler.block_length=8",
    "bits=w4a4",
)
ALL_ON = ("method=gptq", "tmas=true", "cgq=true", "iaaq=true")
KINDS = ["baseline", "trajectories", "states", "held_out", "reference"]
# 4 steps each for the task, the calibration and the held-out prompts, and 2 batches of reference states
FORWARDS = 4 + 4 + 4 + 2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("tiny") / "model")


def plan(checkpoint: Path, *overrides: str) -> Any:
    return check_cell(composed(f"model.path={checkpoint}", *SMALL, *overrides))


def run(sweep: Path, name: str, checkpoint: Path, *overrides: str) -> RunRecord:
    """A cell as the command line runs it."""
    cell = Cell(plan(checkpoint, *overrides), sweep / name, sweep, name, "command", lambda *_: None)
    return cell.run()


def numbers(record: RunRecord) -> dict[str, Any]:
    """What a repetition must give bit for bit."""
    names = ("scores", "fidelity", "curves", "per_problem", "fidelity_per_prompt", "calibration")
    return {name: getattr(record, name) for name in names}


# ------------------------------------------------------------------ runs


@pytest.fixture(scope="module")
def runs(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Two cells of one sweep and one of another on the same cache; one that shares nothing."""
    root = tmp_path_factory.mktemp("runs")
    shared = f"cache_dir={root / 'cache'}"
    return SimpleNamespace(
        root=root,
        first=run(root / "one", "first", checkpoint, *ALL_ON, shared),
        second=run(root / "one", "second", checkpoint, "method=awq", shared),
        elsewhere=run(root / "two", "first", checkpoint, *ALL_ON, shared),
        alone=run(root / "alone", "first", checkpoint, *ALL_ON, "cache_dir=null"),
    )


def test_the_first_cell_does_all_of_it_and_the_second_none(runs: SimpleNamespace) -> None:
    assert runs.first.cost["fp_forwards"] == FORWARDS
    assert runs.first.notes["shared"] == {"read": [], "made": KINDS}
    assert runs.second.cost["fp_forwards"] == 0
    # another choice from the trajectories that are there; the baseline is the sweep's own
    assert runs.second.notes["shared"] == {
        "read": ["trajectories", "held_out", "reference"],
        "made": ["states"],
    }


def test_another_sweep_does_none_either_and_has_the_same_numbers(runs: SimpleNamespace) -> None:
    assert runs.elsewhere.cost["fp_forwards"] == 0
    assert runs.elsewhere.notes["shared"] == {
        "read": ["baseline", "states", "held_out", "reference"],
        "made": [],
    }
    assert numbers(runs.elsewhere) == numbers(runs.first) != numbers(runs.second)


def test_every_sweep_has_full_precisions_record_and_answers(runs: SimpleNamespace) -> None:
    """Also the one that has them from the cache."""
    for name in ("baseline.json", "samples_mini_gsm.jsonl"):
        assert (runs.root / "one" / name).read_bytes() == (runs.root / "two" / name).read_bytes()
    samples = (runs.root / "two" / "samples_mini_gsm.jsonl").read_text().splitlines()
    baseline = load_record(runs.root / "two" / "baseline.json")
    assert len(samples) == baseline.scores["mini_gsm"]["exact_match,strict-match"]["n"] == 2
    assert all({"doc_id", "prompt", "target", "response"} <= json.loads(line).keys() for line in samples)
    assert runs.elsewhere.notes["baseline"] == baseline.fingerprint


def test_without_a_cache_folder_everything_stays_in_the_sweep(runs: SimpleNamespace) -> None:
    assert runs.alone.cost["fp_forwards"] == FORWARDS and runs.alone.notes["shared"]["made"] == KINDS
    assert numbers(runs.alone) == numbers(runs.first)  # from the seed alone
    kept = {path.name for path in (runs.root / "alone" / ".shared").iterdir()}
    assert kept == {*KINDS, "tasks"}
    assert {path.name for path in runs.root.iterdir()} == {"cache", "one", "two", "alone"}
    assert {path.name for path in (runs.root / "one" / ".shared").iterdir()} == {"tasks"}


def test_damaged_entries_are_made_again_with_the_same_numbers(
    runs: SimpleNamespace, checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One byte in the middle of each."""
    cache = shutil.copytree(runs.root / "cache", tmp_path / "cache")
    payloads = [p.with_suffix("") for p in cache.rglob("*.json")]
    for payload in payloads:
        content = bytearray(payload.read_bytes())
        content[len(content) // 2] ^= 1
        payload.write_bytes(content)
    found = run(tmp_path / "sweep", "first", checkpoint, *ALL_ON, f"cache_dir={cache}")
    assert found.cost["fp_forwards"] == FORWARDS and found.notes["shared"]["made"] == KINDS
    assert numbers(found) == numbers(runs.first)
    told = [record.message for record in caplog.records if "is damaged" in record.message]
    assert sorted(line.split()[1].partition("/")[0] for line in told) == sorted(KINDS)


# ------------------------------------------------------------------ what an entry depends on


def full_precision(checkpoint: Path, cache: Path, *overrides: str) -> FullPrecision:
    made = plan(checkpoint, *overrides)
    model = load_model(checkpoint, "cpu", getattr(torch, made.config.dtype()))
    return FullPrecision(made, Cache(cache), model, load_tokenizer(checkpoint), None)


def equal(a: list[CalibrationState], b: list[CalibrationState]) -> bool:
    pairs = zip(a, b, strict=True)
    names = [f.name for f in fields(CalibrationState) if f.name != "num_steps"]
    return all(
        x.num_steps == y.num_steps and all(torch.equal(getattr(x, n), getattr(y, n)) for n in names)
        for x, y in pairs
    )


@pytest.mark.parametrize(
    "overrides",
    [
        ("tmas=true",),
        ("calibration.states=random_mask",),
        ("cgq=true", "cgq_unmasked_confidence=model"),
    ],
    ids=" ".join,
)
def test_states_are_the_pipelines_whether_made_or_read(
    checkpoint: Path, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    direct, found = None, []
    for hit in (False, True):
        shared = full_precision(checkpoint, tmp_path, *overrides)
        prompts = shared.prompts()
        direct = direct or calibration_states(shared.model, prompts, shared.plan.recipe)
        found.append(shared.states(prompts))
        assert ("states" in shared.hits) == hit
    assert equal(found[0], direct) and equal(found[1], direct)


@pytest.fixture(scope="module")
def recorded(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds what the default calibration makes."""
    folder = tmp_path_factory.mktemp("recorded")
    shared = full_precision(checkpoint, folder)
    shared.states(shared.prompts())
    assert shared.made == ["trajectories", "states"]
    return folder


@pytest.mark.parametrize(
    ("overrides", "hits"),
    [
        # what concerns quantization and evaluation only
        (["method=awq", "bits=w8a8", "group_size=16", "attn_bits=none"], ["states"]),
        (["cgq=true", "iaaq=true", "value_scale=mse"], ["states"]),
        (["eval.limit=1", "tasks=mini_choice", "eval.fidelity_prompts=1"], ["states"]),
        # how states are chosen
        (["tmas=true"], ["trajectories"]),
        (["calibration.states=uniform"], ["trajectories"]),
        (["calibration.num_states=3"], ["trajectories"]),
        # what trajectories are made of
        (["seed=1"], []),
        (["sampler.steps=8"], []),
        (["sampler.remasking=random"], []),
        (["calibration.batch_size=1"], []),
        (["calibration.num_prompts=3"], []),
        (["model.dtype=bfloat16"], []),
        (["model.dtype=auto"], []),
        (["cgq=true", "cgq_unmasked_confidence=model"], []),  # scored everywhere
    ],
    ids=" ".join,
)
def test_an_entry_is_found_by_what_it_depends_on(
    checkpoint: Path, recorded: Path, tmp_path: Path, overrides: list[str], hits: list[str]
) -> None:
    cache = shutil.copytree(recorded, tmp_path / "cache")
    shared = full_precision(checkpoint, cache, *overrides)
    shared.states(shared.prompts())
    assert shared.hits == hits
    assert (
        shared.made
        == {"states": [], "trajectories": ["states"], "": ["trajectories", "states"]}["".join(hits)]
    )


def test_tmas_shares_are_part_of_the_choice(checkpoint: Path, tmp_path: Path) -> None:
    for shares, made in (("[0.3,0.2,0.2,0.3]", True), ("[1,0,0,0]", True), ("[0.3,0.2,0.2,0.3]", False)):
        shared = full_precision(checkpoint, tmp_path, "tmas=true", f"calibration.shares={shares}")
        shared.states(shared.prompts())
        assert ("states" in shared.made) == made


def test_weights_of_another_checkpoint_are_another_entry(
    checkpoint: Path, recorded: Path, tmp_path: Path
) -> None:
    cache = shutil.copytree(recorded, tmp_path / "cache")
    other = shutil.copytree(checkpoint, tmp_path / "model")
    shared = full_precision(other, cache)
    shared.states(shared.prompts())
    assert shared.hits == ["states"]  # the same content in another folder
    content = bytearray((other / "model.safetensors").read_bytes())
    content[-3] ^= 1
    (other / "model.safetensors").write_bytes(content)
    shared = full_precision(other, cache)
    shared.states(shared.prompts())
    assert shared.hits == []


# ------------------------------------------------------------------ the baseline


def record(**changes: Any) -> RunRecord:
    empty = {"scores": {}, "fidelity": {}, "curves": {}, "cost": {}, "inert": [], "versions": {}, "git": {}}
    values = {
        "config": {},
        "run_name": "full precision",
        "device": "cpu",
        "seed": 0,
        "axes": {},
        "command": "",
    }
    return RunRecord(**(empty | values | {"status": "finished", "fingerprint": "key"} | changes))


def test_a_baseline_of_another_version_is_measured_again(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The record's fields belong to the report, whose code is no part of the key."""
    shared = full_precision(checkpoint, tmp_path)
    old = {"record": record().to_json() | {"no_longer_a_field": 1}, "samples": {}}
    shared.cache.get("baseline", {"fingerprint": "key"}, lambda: old, save_json, load_json)
    new = Baseline(record(seed=7), {"mini_gsm": [{"doc_id": 0}]})
    assert shared.baseline("key", lambda folder: new) == new and "no_longer_a_field" in caplog.text
    assert shared.baseline("key", lambda folder: pytest.fail("it is there")) == new
    assert (shared.made, shared.hits) == (["baseline"], ["baseline"])


# ------------------------------------------------------------------ parts


def test_forwards_are_counted_while_watched(checkpoint: Path) -> None:
    model, counter = load_model(checkpoint, "cpu", torch.float32), ForwardCounter()
    ids = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(RuntimeError), counter.watching(model):
        model(ids)
        model(ids)
        raise RuntimeError
    model(ids)
    assert counter.count == 2


def test_generated_prompts_take_turns_and_do_not_depend_on_the_count() -> None:
    texts = _generated_prompts("train", 7, seed=3)
    assert [t.startswith("Question: ") for t in texts] == [True, False] * 3 + [True]
    assert all(t.endswith("\nAnswer:") or t.endswith('"""\n') for t in texts)
    assert texts[:4] == _generated_prompts("train", 4, seed=3)
    assert not set(texts) & set(_generated_prompts("dev", 7, seed=3))
    assert texts != _generated_prompts("train", 7, seed=4)


def test_held_out_prompts_are_others_and_the_same_for_every_seed(checkpoint: Path, tmp_path: Path) -> None:
    def ids(held_out: bool, *overrides: str) -> list[list[int]]:
        shared = full_precision(checkpoint, tmp_path, *overrides)
        return [p.tolist() for p in shared.prompts(held_out)]

    assert ids(True) == ids(True, "seed=1") and ids(False) != ids(False, "seed=1")
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("a", "b", "c", "d", "e")))
    own = [load_tokenizer(checkpoint)(text, add_special_tokens=False)["input_ids"] for text in "abcd"]
    assert ids(False, f"calibration.data={data}") == own[:2]
    assert ids(True, f"calibration.data={data}") == own[2:]


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
        num_steps=10,
    )


def state(rows: int, generator: torch.Generator) -> CalibrationState:
    draw = torch.rand(4, rows, 6, generator=generator)
    tokens, masked, valid, response = (draw * 9).long()[0], draw[1] < 0.5, draw[2] < 0.9, draw[3] < 0.5
    return CalibrationState(tokens, masked, valid, response, draw[0], torch.arange(rows), num_steps=10)


def same_fields(a: Any, b: Any) -> bool:
    left, right = asdict(a), asdict(b)
    return all(
        torch.equal(left[n], right[n]) if isinstance(left[n], Tensor) else left[n] == right[n] for n in left
    )


def test_what_is_saved_is_read_in_its_order(tmp_path: Path, generator: torch.Generator) -> None:
    """More than ten: by their numbers, not by their names."""
    trajectories = [trajectory(2 + i % 3, 1 + i, generator) for i in range(12)]
    save_trajectories(trajectories, tmp_path / "trajectories")
    read = load_trajectories(tmp_path / "trajectories", 10)
    assert len(read) == 12 and all(same_fields(a, b) for a, b in zip(trajectories, read, strict=True))
    states = [state(1 + i % 3, generator) for i in range(12)]
    _save_states(states, tmp_path / "states")
    again = _load_states(tmp_path / "states")
    assert len(again) == 12 and all(same_fields(a, b) for a, b in zip(states, again, strict=True))

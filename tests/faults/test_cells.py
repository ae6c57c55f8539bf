"""A cell that is killed, or whose disk, memory, tracker or clock fails: what it says, and what it leaves."""

import errno
import json
import logging
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from composed import composed
from tiny_checkpoint import save_checkpoint

import dllmq.cell
import dllmq.report.results
from dllmq.cell import Cell
from dllmq.config import check_cell
from dllmq.interrupt import Interrupted, listening
from dllmq.models.stored import RECORD
from dllmq.report.results import RESULTS, load_record, to_plain

NUMBERS = ("scores", "fidelity", "curves", "per_problem", "fidelity_per_prompt", "calibration", "fingerprint")
SMALL = (
    "tracker=none", "method=gptq", "tmas=true", "iaaq=true", "bits=w4a4", "tasks.names=[mini_gsm]",
    "eval.limit=4", "eval.batch_size=2", "eval.fidelity_states=4", "eval.fidelity_prompts=4",
    "calibration.num_prompts=4", "calibration.num_states=4", "calibration.batch_size=2",
    "sampler.gen_length=8", "sampler.steps=4", "sampler.block_length=8",
)  # fmt: skip
SLOW = pytest.mark.slow  # a cell takes most of a second
Tell = Callable[[int, int, str], None]


class Killed(BaseException):
    """In the place of a process that ends: nothing catches it."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def cell(model: Path) -> Callable[..., Cell]:
    def make(folder: Path, *overrides: str, tell: Tell = lambda *_: None) -> Cell:
        words = (*SMALL, f"model.path={model}", f"cache_dir={folder / 'cache'}", *overrides)
        return Cell(check_cell(composed(*words)), folder / "sweep/cell", folder / "sweep", "cell", "c", tell)

    return make


@pytest.fixture(scope="module")
def plain(cell: Callable[..., Cell], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The numbers of a cell that nothing disturbed."""
    folder = tmp_path_factory.mktemp("plain")
    return numbers(cell(folder).run(), folder)


def numbers(record: Any, folder: Path) -> dict[str, Any]:
    raw = to_plain(record)
    counters = raw["notes"]["counters"]["mini_gsm"]
    counters.pop("seconds")
    samples = (folder / "sweep/cell/samples_mini_gsm.jsonl").read_text()
    return {key: raw[key] for key in NUMBERS} | {"counters": counters, "samples": samples}


def at(what: str, done: int, action: Callable[[], None], times: int = 1) -> Tell:
    """A progress callback that acts the nth time it is told this."""
    seen = 0

    def tell(now: int, total: int, stage: str) -> None:
        nonlocal seen
        seen += (stage, now) == (what, done)
        if seen == times and (stage, now) == (what, done):
            action()

    return tell


def kill() -> None:
    raise Killed


# ------------------------------------------------------------------ stopped


@pytest.mark.parametrize(
    ("what", "done", "times", "restored"),
    [
        pytest.param("mini_gsm: denoising steps", 7, 1, {"blocks": 0, "mini_gsm": 0}, marks=SLOW),  # baseline
        pytest.param("trajectories", 7, 1, {"blocks": 0, "mini_gsm": 0}, marks=SLOW),
        pytest.param("blocks", 2, 1, {"blocks": 2, "mini_gsm": 0}, marks=SLOW),
        ("mini_gsm: denoising steps", 7, 2, {"blocks": 2, "mini_gsm": 2}),
        pytest.param("fidelity", 1, 1, {"blocks": 2, "mini_gsm": 4}, marks=SLOW),
    ],
)
def test_a_killed_cell_goes_on_bit_for_bit(
    tmp_path: Path,
    cell: Callable[..., Cell],
    plain: dict[str, Any],
    what: str,
    done: int,
    times: int,
    restored: dict[str, int],
) -> None:
    with pytest.raises(Killed):
        cell(tmp_path, tell=at(what, done, kill, times)).run()
    record = cell(tmp_path).run()
    assert numbers(record, tmp_path) == plain
    assert record.notes["restored"] == restored
    left = [
        f.name for f in tmp_path.rglob("*") if f.name == ".resume" or f.name.endswith((".unfinished", ".tmp"))
    ]
    assert left == []


@SLOW
def test_batches_of_full_precision_are_not_run_twice(tmp_path: Path, cell: Callable[..., Cell]) -> None:
    """Killed in the second batch: the first one is there. 2 batches of 4 steps each, three times."""
    steps: list[str] = []

    def tell(done: int, total: int, what: str) -> None:
        steps.append(f"{what} {done}")

    for stop in ("mini_gsm: denoising steps 6", "trajectories 6"):

        def killing(done: int, total: int, what: str, stop: str = stop) -> None:
            tell(done, total, what)
            if f"{what} {done}" == stop:
                raise Killed

        with pytest.raises(Killed):
            cell(tmp_path, tell=killing).run()
    steps.clear()
    cell(tmp_path, tell=tell).run()
    of_calibration = steps[: steps.index("blocks 1")]
    assert of_calibration.count("trajectories 1") == 1  # of the held-out prompts; the calibration's is kept
    assert of_calibration.count("mini_gsm: denoising steps 1") == 0


@SLOW
def test_a_signal_ends_the_cell_after_its_block(
    tmp_path: Path, cell: Callable[..., Cell], plain: dict[str, Any]
) -> None:
    signal_now = at("blocks", 1, lambda: os.kill(os.getpid(), 15))
    with pytest.raises(Interrupted), listening():
        cell(tmp_path, tell=signal_now).run()
    record = cell(tmp_path).run()
    assert numbers(record, tmp_path) == plain and record.notes["restored"]["blocks"] == 1


@SLOW
def test_another_configuration_starts_fresh_and_says_what_differs(
    tmp_path: Path, cell: Callable[..., Cell], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Killed):
        cell(tmp_path, tell=at("blocks", 2, kill)).run()
    with caplog.at_level(logging.INFO, "dllmq"):
        record = cell(tmp_path, "iaaq=false", "group_size=16").run()
    assert "not used: now group_size, iaaq differs" in caplog.text
    assert record.notes["restored"]["blocks"] == 0


@SLOW
def test_another_machine_or_code_starts_fresh(
    tmp_path: Path,
    cell: Callable[..., Cell],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(Killed):
        cell(tmp_path, tell=at("blocks", 2, kill)).run()
    monkeypatch.setattr(dllmq.cell, "describe_device", lambda device: {"type": "cpu", "name": "another"})
    with caplog.at_level(logging.INFO, "dllmq"), pytest.raises(Killed):
        cell(tmp_path, tell=at("blocks", 1, kill)).run()
    assert "machine.name, machine.threads differs" in caplog.text


@SLOW
def test_resume_false_begins_again(tmp_path: Path, cell: Callable[..., Cell], plain: dict[str, Any]) -> None:
    with pytest.raises(Killed):
        cell(tmp_path, tell=at("mini_gsm: denoising steps", 7, kill, 2)).run()
    record = cell(tmp_path, "resume=false").run()
    assert record.notes["restored"] == {"blocks": 0, "mini_gsm": 0} and numbers(record, tmp_path) == plain


@pytest.mark.parametrize("finished", [False, True])
def test_what_killed_writers_left_is_removed_before_a_cell_begins(
    tmp_path: Path, cell: Callable[..., Cell], monkeypatch: pytest.MonkeyPatch, finished: bool
) -> None:
    """In the sweep's folder, the cell's and its export's; of a cell that is finished too."""
    made = cell(tmp_path)
    folder, stub = tmp_path / "sweep/cell", load_record_stub(made)
    monkeypatch.setattr(Cell, "_compute", lambda self: stub)
    if finished:
        made.run()
    (folder / "model/.writing-x").mkdir(parents=True)
    names = (
        "sweep/.baseline.json.12ab.tmp",
        "sweep/.report.html.34cd.tmp",
        "sweep/cell/.heartbeat.json.5e.tmp",
    )
    for name in names:
        (tmp_path / name).write_text("half of it")
    cell(tmp_path).run()
    assert [name for name in names if (tmp_path / name).exists()] == []
    assert (folder / RESULTS).is_file() and (folder / "model/.writing-x").exists() == finished


# ------------------------------------------------------------------ damaged


@SLOW
def test_damage_anywhere_is_made_good(
    tmp_path: Path, cell: Callable[..., Cell], plain: dict[str, Any]
) -> None:
    """Every file of a stopped cell in turn: a bit flipped, or cut short."""
    rng = random.Random(0)
    with pytest.raises(Killed):
        cell(tmp_path, tell=at("mini_gsm: denoising steps", 7, kill, 2)).run()
    files = [f for f in tmp_path.rglob("*") if f.is_file() and "tasks" not in f.parts and f.suffix != ".lock"]
    assert len(files) > 15
    for file in files:
        raw = bytearray(file.read_bytes())
        if raw and rng.random() < 0.5:
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        else:
            del raw[rng.randrange(len(raw) or 1) :]
        file.write_bytes(raw)
    assert numbers(cell(tmp_path).run(), tmp_path) == plain


@SLOW
@pytest.mark.parametrize(
    "damage", [lambda raw: b"\xfb" + raw[1:], lambda raw: raw[:99], None], ids=["flip", "cut", "gone"]
)
def test_a_finished_cells_reference_is_mended(
    tmp_path: Path, cell: Callable[..., Cell], plain: dict[str, Any], damage: Callable[[bytes], bytes] | None
) -> None:
    """The sweep's table needs it, and no other cell may be left to make it."""
    cell(tmp_path).run()
    file = tmp_path / "sweep/baseline.json"
    whole = file.read_bytes()
    if damage is None:
        file.unlink()
    else:
        file.write_bytes(damage(whole))
    assert numbers(cell(tmp_path).run(), tmp_path) == plain
    assert load_record(file).scores == json.loads(whole)["scores"]


@SLOW
def test_a_flipped_digit_in_the_results_is_no_other_number(
    tmp_path: Path, cell: Callable[..., Cell], plain: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    cell(tmp_path).run()
    file = tmp_path / "sweep/cell" / RESULTS
    text = file.read_text()
    place = text.index('"value": ') + len('"value": ')
    digit = str((int(text[place]) + 1) % 10)
    file.write_text(text[:place] + digit + text[place + 1 :])
    with pytest.raises(ValueError, match="is damaged: its content is not what was written"):
        load_record(file)
    assert numbers(cell(tmp_path).run(), tmp_path) == plain and "is damaged" in caplog.text


# ------------------------------------------------------------------ disk and memory


@SLOW
def test_a_full_disk_is_one_sentence_and_the_cell_goes_on_later(
    tmp_path: Path,
    cell: Callable[..., Cell],
    plain: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Full from the second block on: nothing can be kept, the results cannot be written."""
    fsync, full = os.fsync, []

    def failing(file: int) -> None:
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(file)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(ValueError, match=r"no space is left on the disk of .*what was finished is kept"):
        cell(tmp_path, tell=at("blocks", 1, lambda: full.append(True))).run()
    assert not (tmp_path / "sweep/cell" / RESULTS).exists()
    full.clear()
    record = cell(tmp_path).run()
    assert numbers(record, tmp_path) == plain and record.notes["restored"]["blocks"] == 1


def test_a_folder_that_cannot_be_written_is_told_before_the_work(
    tmp_path: Path, cell: Callable[..., Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sweep").write_text("a file")
    monkeypatch.setattr(Cell, "_compute", lambda self: pytest.fail("it was run"))
    with pytest.raises(ValueError, match=r"sweep cannot be written .*hydra\.sweep\.dir=<folder>"):
        cell(tmp_path).run()


@SLOW
@pytest.mark.parametrize(
    ("what", "done", "remedy"),
    [("blocks", 1, "lower calibration.batch_size"), ("fidelity", 1, "lower calibration.batch_size")],
)
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_too_little_memory_is_one_sentence(
    tmp_path: Path, cell: Callable[..., Cell], what: str, done: int, remedy: str, error: type[Exception]
) -> None:
    def fail() -> None:
        raise error("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has ...")

    with pytest.raises(ValueError, match=f"not enough memory to .*20.00 MiB|not enough memory.*{remedy}"):
        cell(tmp_path, tell=at(what, done, fail)).run()


@SLOW
@pytest.mark.parametrize(
    ("temperature", "note"), [(0, None), (1, {"mini_gsm": "2 -> 1"})], ids=["greedy", "sampled"]
)
def test_a_batch_that_does_not_fit_is_halved_and_the_run_goes_on(
    tmp_path: Path,
    cell: Callable[..., Cell],
    caplog: pytest.LogCaptureFixture,
    temperature: float,
    note: dict[str, str] | None,
) -> None:
    """Where noise is drawn the record says so: it is drawn for a whole batch."""

    def fail() -> None:
        raise MemoryError

    sampled = (f"sampler.temperature={temperature}", "eval.fidelity_states=0")
    record = cell(tmp_path, *sampled, tell=at("mini_gsm: denoising steps", 4, fail, times=2)).run()
    assert "out of memory with" in caplog.text and record.status == "finished"
    assert record.notes.get("sampled in halved batches") == note


def test_an_error_of_the_programs_own_is_not_blamed_on_the_machine(
    tmp_path: Path, cell: Callable[..., Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self: Cell) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(Cell, "_compute", failing)
    with pytest.raises(RuntimeError, match="shapes differ"):
        cell(tmp_path).run()


# ------------------------------------------------------------------ numbers


@SLOW
def test_an_overflow_names_its_layer(
    tmp_path: Path, cell: Callable[..., Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    import dllmq.pipeline

    own = dllmq.pipeline.group_input

    def overflowing(block: Any, name: str, x: Any, ctx: Any) -> Any:
        return own(block, name, x, ctx) * float("inf") if name == "ff_out" else own(block, name, x, ctx)

    monkeypatch.setattr(dllmq.pipeline, "group_input", overflowing)
    for method in ("gptq", "awq"):
        with pytest.raises(ValueError, match=r"blocks\.0\.down"):
            cell(tmp_path, f"method={method}").run()


@SLOW
def test_a_singular_hessian_names_its_layer_and_the_remedy(tmp_path: Path, cell: Callable[..., Cell]) -> None:
    with pytest.raises(ValueError, match=r"blocks\.0\..*raise method\.damp"):
        cell(tmp_path, "method.damp=1e-30", "calibration.num_states=1").run()


@SLOW
def test_a_problem_that_cannot_be_scored_is_named_and_its_answers_are_kept(
    tmp_path: Path, cell: Callable[..., Cell], plain: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.api.task import ConfigurableTask

    own = ConfigurableTask.process_results

    def process_results(self: Any, doc: Any, results: Any) -> Any:
        if doc["id"].endswith("2"):
            raise KeyError("gold")
        return own(self, doc, results)

    cell(tmp_path).run()  # full precision is there
    with monkeypatch.context() as patched:
        patched.setattr(ConfigurableTask, "process_results", process_results)
        with pytest.raises(ValueError, match=r"mini_gsm: problem [0-3] cannot be scored .KeyError: 'gold'"):
            cell(tmp_path, "resume=false").run()
    record = cell(tmp_path).run()
    assert record.notes["restored"] == {"blocks": 2, "mini_gsm": 4} and numbers(record, tmp_path) == plain


# ------------------------------------------------------------------ trackers, exports, clocks


class Failing:
    """A tracker whose nth call raises, and all after it."""

    def __init__(self, after: int) -> None:
        self.left = after

    def _call(self, *_: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise ConnectionError("api.example: unreachable, key=abc")

    start = log_curves = log_samples = finish = _call


@pytest.mark.parametrize("after", range(4))
def test_a_tracker_that_fails_costs_a_warning(
    tmp_path: Path,
    cell: Callable[..., Cell],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    after: int,
) -> None:
    monkeypatch.setattr(dllmq.cell, "build", lambda key, node: Failing(after))
    stub = load_record_stub(cell(tmp_path))
    monkeypatch.setattr(Cell, "_compute", lambda self: stub)
    assert cell(tmp_path).run() == stub
    assert load_record(tmp_path / "sweep/cell" / RESULTS).fingerprint == stub.fingerprint
    warnings = [r.message for r in caplog.records if "the tracker's copy is not whole" in r.message]
    assert len(warnings) == 4 - after


def load_record_stub(made: Cell) -> Any:
    empty = {"scores": {}, "fidelity": {}, "curves": {}, "cost": {}, "inert": [], "versions": {}, "git": {}}
    values = {"config": {}, "run_name": "cell", "device": "cpu", "seed": 0, "axes": {}, "command": "c"}
    return dllmq.report.results.RunRecord(**empty, **values, status="finished", fingerprint=made.key)


@SLOW
def test_an_export_of_another_run_is_set_aside(tmp_path: Path, cell: Callable[..., Cell]) -> None:
    """Else model/ would hold other weights than results.json speaks of."""
    folder = tmp_path / "sweep/cell"
    first = cell(tmp_path, "export=dequantized")
    first.run()
    assert json.loads((folder / "model" / RECORD).read_text())["run"]["fingerprint"] == first.key
    cell(tmp_path).run()  # the same numbers: finished, and the export is theirs
    assert (folder / "model").is_dir()
    cell(tmp_path, "iaaq=false").run()
    assert not (folder / "model").exists() and (folder / "model.stale" / RECORD).is_file()
    again = cell(tmp_path, "export=dequantized")
    again.run()
    assert json.loads((folder / "model" / RECORD).read_text())["run"]["fingerprint"] == again.key


@SLOW
def test_a_clock_that_jumps_changes_nothing(
    tmp_path: Path, cell: Callable[..., Cell], plain: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(range(10**9, 0, -86400))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    record = cell(tmp_path).run()
    assert numbers(record, tmp_path) == plain
    assert all(value >= 0 for key, value in record.cost.items() if key.endswith("_s"))


@pytest.fixture(autouse=True)
def _no_lock_is_left(tmp_path: Path) -> Iterator[None]:
    """A lock that outlived its cell would hold up the next one."""
    from filelock import FileLock

    yield
    for file in tmp_path.rglob("*.lock"):
        with FileLock(file).acquire(timeout=0):
            pass

"""The log of answers: what a kill leaves of it, and evaluations that go on bit for bit."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llada import tiny_model

from dllmq.diffusion import SamplerConfig
from dllmq.evaluation.answers import AnswerFolder, AnswerLog, Batch
from dllmq.evaluation.settings import EvalSettings
from dllmq.evaluation.tasks import EvalResult, evaluate


def log(folder: Path, key: str = "k", rank: int = 0) -> AnswerLog:
    return AnswerFolder(folder, key, rank).of("task")


def never() -> Batch:
    pytest.fail("it is known")


def answered(values: list[Any]) -> Callable[[], Batch]:
    return lambda: Batch(values, forwards=3, counts={"positions": 9})


def test_a_batch_is_answered_once(tmp_path: Path) -> None:
    first = log(tmp_path).batch("generate", 0, [[1, 2]], answered([[5], [6]]))
    assert first.values == [[5], [6]] and first.forwards == 3 and first.seconds > 0
    again = log(tmp_path)
    assert again.batch("generate", 0, [[1, 2]], never) == first
    assert (again.restored, again.seconds) == (2, first.seconds)


@pytest.mark.parametrize("other", [("choose", 0, [[1]]), ("generate", 1, [[1]]), ("generate", 0, [[2]])])
def test_another_batch_is_not_taken_for_it(tmp_path: Path, other: tuple[str, int, Any]) -> None:
    log(tmp_path).batch("generate", 0, [[1]], answered([7]))
    assert log(tmp_path).batch(*other, answered([8])).values == [8]


def test_another_key_starts_the_file_anew(tmp_path: Path) -> None:
    log(tmp_path, "one").batch("generate", 0, 0, answered([7]))
    other = log(tmp_path, "two")
    assert other.batch("generate", 0, 0, answered([8])).values == [8] and other.restored == 0
    lines = (tmp_path / "task.0.jsonl").read_text().splitlines()
    assert len(lines) == 2 and json.loads(lines[0])["key"] == "two/task"


def test_a_line_names_its_problem(tmp_path: Path) -> None:
    log(tmp_path).batch("generate", 0, 0, answered([[4], [5]]), ["gsm/7", "gsm/2"])
    lines = [json.loads(line) for line in (tmp_path / "task.0.jsonl").read_text().splitlines()]
    assert [(line["problem"], line["value"]) for line in lines[1:]] == [("gsm/7", [4]), ("gsm/2", [5])]


def test_processes_read_each_others_files(tmp_path: Path) -> None:
    for rank in range(3):
        log(tmp_path, rank=rank).batch("generate", rank, 0, answered([rank]))
    merged = log(tmp_path, rank=1)
    assert [merged.batch("generate", i, 0, never).values for i in range(3)] == [[0], [1], [2]]
    assert len(list(tmp_path.iterdir())) == 3


def test_a_task_does_not_read_another_ones_file(tmp_path: Path) -> None:
    folder = AnswerFolder(tmp_path, "k")
    folder.of("mmlu").batch("generate", 0, 0, answered([7]))
    assert folder.of("mml").batch("generate", 0, 0, answered([8])).values == [8]


@pytest.mark.parametrize("keep", [0, 1, 17, 200, -1, -2, -30])
def test_what_a_kill_has_cut_off_is_answered_again(tmp_path: Path, keep: int) -> None:
    """At every place: in the header, between batches, in a line, before the last newline."""
    for index in range(2):
        log(tmp_path).batch("generate", index, 0, answered([index, 10 + index]))
    file = tmp_path / "task.0.jsonl"
    file.write_bytes(file.read_bytes()[:keep])
    again = log(tmp_path)
    for index in range(2):
        assert again.batch("generate", index, 0, answered([index, 10 + index])).values == [index, 10 + index]
    whole = log(tmp_path)
    assert [whole.batch("generate", i, 0, never).values for i in range(2)] == [[0, 10], [1, 11]]


@settings(max_examples=30)
@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_flipped_bit_is_never_an_answer(
    tmp_path_factory: pytest.TempPathFactory, place: int, bit: int
) -> None:
    folder = tmp_path_factory.mktemp("flip")
    for index in range(2):
        log(folder).batch("generate", index, 0, answered([0.1 * index, [1, 2, index]]))
    file = folder / "task.0.jsonl"
    raw = bytearray(file.read_bytes())
    raw[place % len(raw)] ^= 1 << bit
    file.write_bytes(raw)
    again = log(folder)
    for index in range(2):
        assert again.batch("generate", index, 0, answered([0.1 * index, [1, 2, index]])).values == [
            0.1 * index,
            [1, 2, index],
        ]


def test_a_file_that_cannot_be_written_costs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "folder").write_text("a file")
    full = log(tmp_path / "folder")
    for index in range(2):
        assert full.batch("generate", index, 0, answered([index])).values == [index]
    assert len(caplog.records) == 1 and "are not kept" in caplog.text


@given(
    st.lists(
        st.floats(allow_nan=False) | st.lists(st.integers(0, 2**31)) | st.booleans() | st.text(), min_size=1
    )
)
def test_values_come_back_exactly(tmp_path_factory: pytest.TempPathFactory, values: list[Any]) -> None:
    folder = tmp_path_factory.mktemp("values")
    log(folder).batch("any", 0, 0, answered(values))
    assert repr(log(folder).batch("any", 0, 0, never).values) == repr(values)


# ------------------------------------------------------------------ whole evaluations


class Killed(BaseException):
    """In the place of a process that ends."""


SETTINGS = EvalSettings(SamplerConfig(8, 4, 8), batch_size=2, mc_num=4, mc_batch_size=4, rows_per_forward=8)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from dllmq.config import EMBEDDED
    from dllmq.models.tokenizer import load_tokenizer

    return load_tokenizer(EMBEDDED)


def run(tokenizer: Any, work: Path, answers: AnswerFolder, task: str, stop: int | None = None) -> EvalResult:
    """Killed in front of forward `stop`."""
    model = tiny_model(vocab_size=len(tokenizer), mask_token_id=len(tokenizer) - 1, max_sequence_length=512)
    forwards = 0

    def count(*_: Any) -> None:
        nonlocal forwards
        if forwards == stop:
            raise Killed
        forwards += 1

    handle = model.blocks[0].register_forward_pre_hook(count)
    try:
        return evaluate(model, tokenizer, [task], SETTINGS, limit=5, work_dir=work, answers=answers)
    finally:
        handle.remove()


def numbers(result: EvalResult, task: str) -> tuple[Any, ...]:
    counters = {k: v for k, v in result.counters[task].items() if k != "seconds"}
    return repr(result.scores), result.per_problem, repr(result.samples), counters


@pytest.mark.parametrize("task", ["mini_gsm", "mini_choice"])
def test_a_killed_evaluation_goes_on_bit_for_bit(tmp_path: Path, tokenizer: Any, task: str) -> None:
    plain = run(tokenizer, tmp_path / "work", AnswerFolder(), task)
    kept, restored = AnswerFolder(tmp_path / "answers", "k"), []
    for stop in (5, 3, None):
        try:
            found = run(tokenizer, tmp_path / "work", kept, task, stop)
        except Killed:
            continue
        restored.append(found.restored[task])
    assert numbers(found, task) == numbers(plain, task)
    assert restored[0] > 0 and plain.restored == {task: 0}
    assert found.counters[task]["forwards"] == plain.counters[task]["forwards"] > 5


def test_restored_batches_count_as_the_steps_they_may_take(tmp_path: Path, tokenizer: Any) -> None:
    """With a threshold that is gen_length, whatever `steps` says."""
    model = tiny_model(vocab_size=len(tokenizer), mask_token_id=len(tokenizer) - 1, max_sequence_length=512)
    sampler = SamplerConfig(gen_length=8, steps=4, block_length=8, threshold=0.9)
    kept, told = AnswerFolder(tmp_path / "answers", "k"), [[(0, 0)], [(0, 0)]]
    for now in told:
        evaluate(
            model, tokenizer, ["mini_gsm"], replace(SETTINGS, sampler=sampler), limit=2, work_dir=tmp_path,
            progress=lambda done, total, what, now=now: now.append((done, total)), answers=kept,
        )  # fmt: skip
    (_, total), restored = told[0][-1], told[1][-1]
    assert restored == (total, total) and total % 8 == 0

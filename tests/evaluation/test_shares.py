"""Batches shared among processes: together they are one process's, whatever the others leave out."""

import logging
import threading
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance

from dllmq.diffusion import SamplerConfig
from dllmq.evaluation.answers import AnswerFolder, Batch
from dllmq.evaluation.harness import DiffusionLM
from dllmq.evaluation.settings import EvalSettings
from dllmq.evaluation.shares import Answered, SharedAnswers, Tail, only_answers
from dllmq.mini.tasks import problems

SETTINGS = EvalSettings(
    SamplerConfig(gen_length=8, steps=4, block_length=8),
    batch_size=2,
    mc_num=4,
    mc_batch_size=2,
    rows_per_forward=6,
)


def requests(kind: str, n: int = 9) -> list[Instance]:
    docs = problems("mini_gsm", "test", n)
    return [
        Instance(
            kind,
            {},
            (doc["question"], {"until": []} if kind == "generate_until" else " 12 34"),
            0,
            ("t", i, 1),
        )
        for i, doc in enumerate(docs)
    ]


def ask(model, tokenizer, log, kind: str) -> tuple[list, DiffusionLM]:
    lm = DiffusionLM(model, tokenizer, SETTINGS, None, log)
    return getattr(lm, kind)(requests(kind)), lm


@pytest.mark.parametrize("kind", ["generate_until", "loglikelihood"])
@pytest.mark.parametrize("size", [2, 3])
def test_together_they_answer_like_one(model, tokenizer, tmp_path: Path, kind: str, size: int) -> None:
    expected, alone = ask(model, tokenizer, None, kind)
    answered, lms = {}, {}
    for rank in reversed(range(size)):  # the helpers first; rank 0 finds their answers
        log = SharedAnswers(tmp_path, "key", rank, size).of("task")
        found, lms[rank] = ask(model, tokenizer, log, kind)
        answered[rank] = log.answered
        if rank > 0:
            assert found != expected  # blanks
    assert found == expected
    counted = ("requests", "forwards", "generated_tokens", "truncated")
    assert [getattr(lms[0].counters, c) for c in counted] == [getattr(alone.counters, c) for c in counted]
    total = sum(answered.values())
    assert total >= 5 and max(answered.values()) - min(answered.values()) <= 1  # even shares, none twice


def test_rank_0_waits_while_another_works(model, tokenizer, tmp_path: Path) -> None:
    """The helper starts when rank 0 already waits for it, and its batches are not answered twice."""
    expected, _ = ask(model, tokenizer, None, "generate_until")
    waits = threading.Event()
    done = threading.Event()

    def working(rank: int) -> bool:
        assert rank == 1
        waits.set()
        return not done.is_set()

    def helper() -> None:
        waits.wait(20)
        ask(model, tokenizer, SharedAnswers(tmp_path, "key", 1, 2).of("task"), "generate_until")
        done.set()

    thread = threading.Thread(target=helper)
    thread.start()
    own = SharedAnswers(tmp_path, "key", 0, 2, working).of("task")
    found, _ = ask(model, tokenizer, own, "generate_until")
    thread.join()
    assert found == expected and own.answered == 3  # of 5 batches


def test_what_a_lost_process_left_out_is_answered_by_rank_0(model, tokenizer, tmp_path: Path, caplog) -> None:
    expected, _ = ask(model, tokenizer, None, "generate_until")
    ask(model, tokenizer, SharedAnswers(tmp_path, "key", 1, 2).of("task"), "generate_until")
    file = tmp_path / "task.1.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:4]) + lines[4][:20])  # killed in its second batch
    own = SharedAnswers(tmp_path, "key", 0, 2).of("task")
    with caplog.at_level(logging.WARNING):
        found, _ = ask(model, tokenizer, own, "generate_until")
    assert found == expected and own.answered == 4
    assert caplog.text.count("process 1 has ended") == 1


def test_a_process_that_ended_is_told_of_once(model, tokenizer, tmp_path: Path, caplog) -> None:
    """Not for each batch of its share, nor for each task."""
    shares = SharedAnswers(tmp_path, "key", 0, 2)
    with caplog.at_level(logging.WARNING):
        answered = []
        for task in ("first", "second"):
            own = shares.of(task)
            ask(model, tokenizer, own, "generate_until")
            answered.append(own.answered)
    assert answered == [5, 5]  # two each are of process 1's share
    assert len(caplog.records) == 1 and "process 1 has ended" in caplog.text


def test_another_number_of_processes_goes_on_with_the_same_answers(model, tokenizer, tmp_path: Path) -> None:
    expected, _ = ask(model, tokenizer, None, "loglikelihood")
    for rank in (2, 1):
        ask(model, tokenizer, SharedAnswers(tmp_path, "key", rank, 3).of("task"), "loglikelihood")
    log = AnswerFolder(tmp_path, "key").of("task")  # one process, later
    found, _ = ask(model, tokenizer, log, "loglikelihood")
    assert found == expected and log.restored > 0


class Short:
    """A model that runs out of memory when it is asked to: fails(rows, number of the call)."""

    def __init__(self, model, fails) -> None:
        self.model, self.config, self.device, self.head = model, model.config, model.device, model.head
        self.fails, self.calls = fails, 0

    def hidden_states(self, input_ids, attention_mask=None):
        self.calls += 1
        if self.fails(len(input_ids), self.calls):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return self.model.hidden_states(input_ids, attention_mask)


@pytest.mark.parametrize("kind", ["generate_until", "loglikelihood"])
def test_a_batch_that_a_helper_cannot_hold_is_left_to_rank_0(
    model, tokenizer, tmp_path: Path, caplog, kind: str
) -> None:
    """Rank 1 alone is out of memory, once: its other batches are used, and rank 0 waits for none of them."""
    expected, _ = ask(model, tokenizer, None, kind)
    helper = SharedAnswers(tmp_path, "key", 1, 2, run="now").of("task")
    ask(Short(model, lambda rows, call: call == 1), tokenizer, helper, kind)
    helper.ended()
    own = SharedAnswers(tmp_path, "key", 0, 2, lambda rank: True, "now").of(
        "task"
    )  # it may be at other tasks
    with caplog.at_level(logging.WARNING):
        found, lm = ask(model, tokenizer, own, kind)
    assert found == expected and helper.answered >= 1
    alone = SharedAnswers(tmp_path / "alone", "key", 0, 1).of("task")
    _, once = ask(model, tokenizer, alone, kind)
    assert own.answered + helper.answered == alone.answered
    assert caplog.text.count("process 1 left out a batch") == 1
    assert lm.counters.forwards == once.counters.forwards


@pytest.mark.parametrize("kind", ["generate_until", "loglikelihood"])
def test_helpers_follow_rank_0_to_smaller_batches(model, tokenizer, tmp_path: Path, kind: str) -> None:
    """Rank 0 is out of memory with the planned batches, the helper is not: shares of rank 0's plan."""

    def narrow() -> Short:
        return Short(model, lambda rows, call: rows > (1 if kind == "generate_until" else 3))

    alone = SharedAnswers(tmp_path / "alone", "key", 0, 1).of("task")
    expected, once = ask(narrow(), tokenizer, alone, kind)
    begun = threading.Event()
    helper = SharedAnswers(tmp_path, "key", 1, 2, run="now").of("task")

    def help_rank_0() -> None:
        begun.wait(20)
        ask(model, tokenizer, helper, kind)
        helper.ended()

    def working(rank: int) -> bool:
        begun.set()
        return True

    thread = threading.Thread(target=help_rank_0)
    thread.start()
    own = SharedAnswers(tmp_path, "key", 0, 2, working, "now").of("task")
    found, lm = ask(narrow(), tokenizer, own, kind)
    thread.join()
    assert found == expected and lm.counters.forwards == once.counters.forwards
    assert helper.answered >= 1 and own.answered + helper.answered == alone.answered  # none twice


def test_a_plan_that_comes_late_is_followed_from_its_batch_on(model, tokenizer, tmp_path: Path) -> None:
    """The helper has answered a batch of the old plan; those before the halving stay what they are."""
    own = SharedAnswers(tmp_path, "key", 0, 2, run="now").of("task")
    helper = SharedAnswers(tmp_path, "key", 1, 2, run="now").of("task")

    def tell(rows: int, call: int) -> bool:
        if call == 1:
            own.halved("generate_until", 2, 1)
        return False

    ask(Short(model, tell), tokenizer, helper, "generate_until")
    kept = [len(batch.values) for batch in helper._known.values()]
    assert kept == [2, 1, 1]  # batch 1 of two rows; 3 and 5 of one; 2, 4 and 6 are rank 0's


def test_what_an_earlier_run_said_is_not_followed(model, tokenizer, tmp_path: Path) -> None:
    earlier = SharedAnswers(tmp_path, "key", 0, 2, run="earlier").of("task")
    earlier.halved("generate_until", 0, 1)
    helper = SharedAnswers(tmp_path, "key", 1, 2, run="now").of("task")
    ask(model, tokenizer, helper, "generate_until")
    assert [len(batch.values) for batch in helper._known.values()] == [2, 2]


def test_answers_of_another_key_are_not_taken(model, tokenizer, tmp_path: Path) -> None:
    ask(model, tokenizer, SharedAnswers(tmp_path, "other", 1, 2).of("task"), "generate_until")
    own = SharedAnswers(tmp_path, "key", 0, 2).of("task")
    ask(model, tokenizer, own, "generate_until")
    assert own.answered == 5


def test_a_tail_gives_each_batch_once_and_only_whole_ones(tmp_path: Path) -> None:
    """A log is read while it is written: at every byte, what is there is the batches whose last line is."""
    log = AnswerFolder(tmp_path, "key", 1).of("task")
    for index in range(3):
        log.batch("generate_until", index, [index], lambda i=index: Batch([[i], ["é"]], forwards=i))
    text = (tmp_path / "task.1.jsonl").read_bytes()
    file = tmp_path / "growing.jsonl"
    tail, seen = Tail(file, "key/task"), []
    assert tail.more() == {}
    for end in range(0, len(text) + 1, 7):
        file.write_bytes(text[:end])
        seen += tail.more().values()
        lines = text[:end].count(b"\n")
        assert len(seen) == max(0, lines - 1) // 2
    file.write_bytes(text)
    seen += tail.more().values()
    assert [(batch.values, batch.forwards) for batch in seen] == [([[i], ["é"]], i) for i in range(3)]
    assert Tail(file, "another").more() == {}


def test_a_helper_ends_before_anything_is_scored(model, tokenizer, tmp_path: Path) -> None:
    log = SharedAnswers(tmp_path, "key", 1, 2).of("task")
    lm = only_answers(DiffusionLM(model, tokenizer, SETTINGS, None, log))
    with pytest.raises(Answered):
        lm.generate_until(requests("generate_until"))
    assert log.answered == 2 and (tmp_path / "task.1.jsonl").exists()

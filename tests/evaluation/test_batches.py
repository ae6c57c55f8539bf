"""Which prompts go together, and what happens when memory runs out."""

import logging
import math
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from torch import Tensor

from dllmq.diffusion import SamplerConfig
from dllmq.evaluation import batches
from dllmq.evaluation.batches import Batches, cut, prompt_columns, settle
from dllmq.evaluation.harness import DiffusionLM
from dllmq.evaluation.settings import EvalSettings
from dllmq.faults import in_words, is_out_of_memory
from dllmq.mini.tasks import problems
from dllmq.models.memory import rounded

SAMPLER = SamplerConfig(gen_length=8, steps=4, block_length=8)
CPU_ERROR = RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")
PROMPTS = st.lists(st.lists(st.integers(0, 3), max_size=40), min_size=1, max_size=30)


def contents(prompts: list[list[int]], gen_length: int, size: int) -> list[list[list[int]]]:
    return [[prompts[i] for i in batch.rows] for batch in Batches(prompts, gen_length, size)]


# --- the cut


@given(PROMPTS, st.integers(1, 50), st.integers(1, 9))
def test_batches_are_a_partition_longest_first_and_little_padded(prompts, gen_length, size) -> None:
    made = list(Batches(prompts, gen_length, size))
    assert sorted(i for batch in made for i in batch.rows) == list(range(len(prompts)))
    assert [batch.index for batch in made] == list(range(len(made)))
    assert {batch.total for batch in made} == {len(made)}
    lengths = [len(prompts[i]) for batch in made for i in batch.rows]
    assert lengths == sorted(lengths, reverse=True)
    for batch in made:
        own = [len(prompts[i]) for i in batch.rows]
        assert 1 <= len(own) <= size
        assert max(own) - min(own) <= (max(own) + gen_length) / 4


@given(PROMPTS, st.integers(1, 50), st.integers(1, 9), st.randoms())
def test_batches_do_not_depend_on_the_order_of_requests(prompts, gen_length, size, rng) -> None:
    shuffled = rng.sample(prompts, len(prompts))
    assert contents(prompts, gen_length, size) == contents(shuffled, gen_length, size)


@pytest.mark.parametrize(
    ("lengths", "gen_length", "size", "expected"),
    [
        ([], 8, 4, []),
        ([9, 9, 8, 8, 8], 8, 2, [2, 2, 1]),
        ([12, 7, 6, 1], 8, 9, [2, 1, 1]),  # a canvas of 20 takes 5 pads, one of 14 takes 3
        ([12, 1, 1, 1], 8, 9, [1, 3]),
        ([12, 1], 100, 9, [2]),
    ],
)
def test_a_batch_ends_when_it_is_full_or_a_canvas_would_be_pads_for_a_quarter(
    lengths, gen_length, size, expected
) -> None:
    assert cut(lengths, gen_length, size) == expected


@given(st.lists(st.integers(0, 200), min_size=1, max_size=9), st.integers(1, 300))
def test_padded_canvases_of_a_gpu_have_few_widths(lengths: list[int], gen_length: int) -> None:
    exact = prompt_columns(lengths, gen_length, torch.device("cpu"))
    wide = prompt_columns(lengths, gen_length, torch.device("cuda"))
    assert exact == max(lengths) <= wide < max(lengths) + 32
    assert wide == exact if len(set(lengths)) == 1 else (wide + gen_length) % 32 == 0


# --- memory


SHORT_OF_MEMORY = [
    "CUDA out of memory. Tried to allocate 2.00 GiB",
    "CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.",
    "CUDA driver error: out of memory",
    "Triton Error [CUDA]: out of memory",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "std::bad_alloc",
    str(CPU_ERROR),
]


@pytest.mark.parametrize("message", SHORT_OF_MEMORY)
def test_memory_that_ran_out_is_known_by_its_message(message: str) -> None:
    """It halves the batch, and is told as a lack of memory where nothing can be halved."""
    error, queue = RuntimeError(message), Batches([[1], [1]], 8, 2)
    next(iter(queue))
    queue.halve(error)
    assert queue.size == 1
    assert str(in_words(error, Path(), "load")).startswith("there is not enough memory to load")


def test_what_counts_as_running_out_of_memory() -> None:
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError("CUDA ..."))
    for error in (
        RuntimeError("shape mismatch"),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"),
        RuntimeError("out of resource: shared memory, Required: 270336, Hardware limit: 232448"),
        ValueError("out of memory"),
        KeyError("CUDA out of memory"),
    ):
        assert not is_out_of_memory(error)


def test_the_size_is_halved_where_memory_ran_out_and_from_there_on(caplog) -> None:
    prompts = [[0] * n for n in (9, 9, 9, 9, 9, 8, 8, 8, 8, 8, 8)]
    queue, seen = Batches(prompts, 8, 5), []
    with caplog.at_level(logging.WARNING):
        for batch in queue:
            seen.append((batch.index, batch.total, batch.rows))
            if len(batch.rows) > 2:
                queue.halve(torch.OutOfMemoryError("CUDA out of memory"))
    assert seen[0] == (0, 3, (0, 1, 2, 3, 4))
    assert seen[1:] == [(i, 6, tuple(range(2 * i, min(2 * i + 2, 11)))) for i in range(6)]
    assert queue.size == 2
    assert [r.message for r in caplog.records] == [
        "out of memory with 5 canvases of 17 tokens at once: 2 from here on"
    ]


def test_another_processes_sizes_are_taken_from_the_first_batch_on() -> None:
    """Twice: what the first plan had changed by then does not count for the second."""
    queue, sizes = Batches([[0] * 9] * 12, 8, 4), []
    plans = {1: {1: 2}, 3: {1: 2, 3: 1}}
    for batch in queue:
        if (plan := plans.pop(batch.index, None)) is not None:
            queue.begin_again(plan)
            sizes.clear()
        else:
            sizes.append((batch.index, len(batch.rows)))
    assert sizes == [(0, 4), (1, 2), (2, 2), (3, 1), (4, 1), (5, 1), (6, 1)]


def test_one_row_that_does_not_fit_and_other_errors_end_the_run() -> None:
    queue = Batches([[1, 2, 3]], 8, 4)
    for _ in queue:
        with pytest.raises(RuntimeError, match="shape mismatch"):
            queue.halve(RuntimeError("shape mismatch"))
        with pytest.raises(ValueError, match="not enough memory for one of the canvases of 11 tokens"):
            queue.halve(MemoryError())


@pytest.mark.parametrize(
    ("gigabytes", "columns", "expected"), [(0.001, 512, 1), (24, 1024, 8), (80, 1024, 32), (141, 512, 64)]
)
def test_auto_is_a_power_of_two_by_the_devices_memory(monkeypatch, gigabytes, columns, expected) -> None:
    """A model as wide as LLaDA-8B."""
    monkeypatch.setattr(batches, "total_memory", lambda device: int(gigabytes * 2**30))
    model = torch.nn.Module()
    model.device, model.embedding = torch.device("cpu"), torch.nn.Embedding(1, 4096)
    assert settle("auto", model, columns) == expected
    assert settle(7, model, columns) == 7


@pytest.mark.parametrize(
    ("memory", "expected"),
    [(None, None), (17 * 2**30 + 5, 17 * 2**30), (2**30, 2**30), (2**27 + 9, 2**27), (5, 0)],
)
def test_a_little_memory_more_or_less_is_the_same(memory: int | None, expected: int | None) -> None:
    assert rounded(memory) == expected


def test_auto_where_nothing_is_known(monkeypatch, model) -> None:
    monkeypatch.setattr(batches, "total_memory", lambda device: None)
    assert settle("auto", model, 100) == 64


def test_batch_sizes_that_are_none() -> None:
    with pytest.raises(ValueError, match="batch_size=big is not known; it is an integer >= 1, or auto"):
        EvalSettings(batch_size="big")
    assert EvalSettings(batch_size="auto").batch_size == "auto"


# --- in the harness


class Narrow:
    """A model that runs out of memory above so many rows."""

    def __init__(self, model, rows: int, error: Exception = CPU_ERROR) -> None:
        self.model, self.config, self.device, self.head = model, model.config, model.device, model.head
        self.rows, self.error, self.shapes = rows, error, []

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        self.shapes.append(tuple(input_ids.shape))
        if len(input_ids) > self.rows:
            raise self.error
        return self.model.hidden_states(input_ids, attention_mask)


def requests(n: int) -> list[Instance]:
    texts = [f"Question: {doc['question']}\nAnswer:" for doc in problems("mini_gsm", "test", n)]
    return [Instance("generate_until", {}, (text, {}), 0, ("task", i, 1)) for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def answers(model, tokenizer) -> list[str]:
    lm = DiffusionLM(model, tokenizer, EvalSettings(SAMPLER, batch_size=1, eos_cut="none"))
    return lm.generate_until(requests(9))


@pytest.mark.parametrize("error", [CPU_ERROR, MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_answers_are_the_same_when_memory_runs_out(model, tokenizer, answers, error) -> None:
    narrow = Narrow(model, 3, error)
    lm = DiffusionLM(narrow, tokenizer, EvalSettings(SAMPLER, batch_size=8, eos_cut="none"))
    assert lm.generate_until(requests(9)) == answers
    assert lm.counters.batch_size == 2 and lm.counters.requests == 9
    assert [rows for rows, _ in narrow.shapes[:4]] == [8, 4, 2, 2]
    settled = DiffusionLM(Narrow(model, 3), tokenizer, EvalSettings(SAMPLER, batch_size=2, eos_cut="none"))
    settled.generate_until(requests(9))
    assert settled.model.model.shapes == narrow.shapes[2:]  # the batches of the size that was settled


def test_a_settled_size_repeats_noise(model, tokenizer) -> None:
    """Noise is a function of the batch, which that of the requests and the size."""
    sampler = SamplerConfig(gen_length=8, steps=4, block_length=8, temperature=1.0)
    narrow, wide = (
        DiffusionLM(m, tokenizer, EvalSettings(sampler, batch_size=size, eos_cut="none"))
        for m, size in ((Narrow(model, 2), 4), (model, 2))
    )
    order = random.Random(1).sample(range(7), 7)
    straight = narrow.generate_until(requests(7))
    assert wide.generate_until([requests(7)[i] for i in order]) == [straight[i] for i in order]


@pytest.mark.parametrize(("temperature", "halved_from"), [(0.0, 0), (1.0, 4)])
def test_samples_of_halved_batches_are_told_of(model, tokenizer, caplog, temperature, halved_from) -> None:
    """Greedy answers do not hang on the batch, but for rounding."""
    sampler = SamplerConfig(gen_length=8, steps=4, block_length=8, temperature=temperature)
    for fitting in (2, 4):
        lm = DiffusionLM(Narrow(model, fitting), tokenizer, EvalSettings(sampler, batch_size=4))
        lm.generate_until(requests(7))
        assert lm.counters.halved_from == (halved_from if fitting == 2 else 0)
    told = (
        "task: memory ran out, so batches have 2 prompts instead of 4 and other noise: with more memory the "
    )
    told += "same settings draw other answers"
    assert [m for m in caplog.messages if "noise" in m] == ([told] if temperature else [])


def test_a_row_that_does_not_fit_is_one_sentence(model, tokenizer) -> None:
    lm = DiffusionLM(Narrow(model, 0), tokenizer, EvalSettings(SAMPLER, batch_size=2))
    with pytest.raises(ValueError, match="not enough memory for one of the canvases") as error:
        lm.generate_until(requests(2))
    assert "\n" not in str(error.value)


def test_automatic_batches_answer_the_same(model, tokenizer, answers) -> None:
    lm = DiffusionLM(model, tokenizer, EvalSettings(SAMPLER, batch_size="auto", eos_cut="none"))
    assert lm.generate_until(requests(9)) == answers
    assert lm.counters.batch_size == 64


def test_likelihoods_take_fewer_rows_when_memory_runs_out(model, tokenizer) -> None:
    pairs = [("Question: 3+4", " 7"), ("Question", " 3+4=7 coins.")]
    given = [Instance("loglikelihood", {}, pair, 0, ("task", 0, 1)) for pair in pairs]
    settings = EvalSettings(mc_num=8, mc_batch_size=8, rows_per_forward=16)
    expected, got = (
        [value for value, _ in DiffusionLM(m, tokenizer, settings).loglikelihood(given)]
        for m in (model, Narrow(model, 5))
    )
    assert all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(expected, got, strict=True))

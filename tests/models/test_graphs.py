"""Recorded forwards: what is recorded, what is replayed, and that it changes nothing.

CUDA graphs need a GPU; here a recording is a function that is called again into the same output.
"""

import logging
from collections.abc import Callable

import pytest
import torch
from tiny_dream import tiny_dream
from torch import Tensor

from dllmq.bench.generate import WARM_UPS
from dllmq.diffusion import SamplerConfig, denoise, generate
from dllmq.models import graphs
from dllmq.models.graphs import GraphedModel, graphed, pad_rows, round_up
from dllmq.models.llada import LLaDA, LLaDAConfig


class FakeCapture:
    """Counts recordings and replays; fails as told."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.recorded, self.replayed = error, 0, 0

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        if self.error is not None:
            raise self.error
        self.recorded += 1
        output = function()

        def replay() -> None:
            self.replayed += 1
            output.copy_(function())

        return output, replay


class SilentCapture(FakeCapture):
    """Replays as a graph does: without running the module. What it hands out is that of the recording."""

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        output, _ = super().__call__(function)
        return output, self.replay

    def replay(self) -> None:
        self.replayed += 1


def llada() -> LLaDA:
    config = LLaDAConfig(d_model=32, n_layers=2, n_heads=2, mlp_hidden_size=48, vocab_size=40,
                         mask_token_id=39, eos_token_id=38)  # fmt: skip
    model = LLaDA(config)
    model.init_weights(torch.Generator().manual_seed(0), gain=3.0)
    return model.requires_grad_(False).eval()


def ids(rows: int, columns: int = 10, seed: int = 0) -> Tensor:
    return torch.randint(0, 38, (rows, columns), generator=torch.Generator().manual_seed(seed))


def left_padding(rows: int, columns: int = 10) -> Tensor:
    return (torch.arange(columns) >= torch.arange(rows)[:, None]).long()


@pytest.mark.parametrize("make", [llada, tiny_dream])
@pytest.mark.parametrize("padded", [False, True])
def test_replays_give_the_models_own_hidden_states(make: Callable, padded: bool) -> None:
    """Of other tokens and other pads than those that were recorded, too."""
    model, capture = make(), FakeCapture()
    wrapped = GraphedModel(model, capture)
    for seed in range(4):
        x = ids(4, seed=seed)
        mask = left_padding(4).roll(seed, 0) if padded else None
        assert torch.equal(wrapped.hidden_states(x, mask), model.hidden_states(x, mask))
    assert (capture.recorded, capture.replayed) == (1, 3)  # the first forward of a shape is not recorded
    assert torch.equal(wrapped(x, mask), model(x, mask))


def test_shapes_and_pads_are_recorded_apart() -> None:
    model, capture = llada(), FakeCapture()
    wrapped = GraphedModel(model, capture)
    for _ in range(3):
        for x, mask in ((ids(2), None), (ids(2), left_padding(2)), (ids(2, 12), None), (ids(3), None)):
            assert torch.equal(wrapped.hidden_states(x, mask), model.hidden_states(x, mask))
        wrapped.hidden_states(ids(2), torch.ones(2, 10))  # no pads: the same as no mask
    assert capture.recorded == 4


def test_rows_are_rounded_up_with_copies_of_the_last() -> None:
    assert [round_up(n) for n in (1, 4, 5, 7, 9, 13, 33, 64)] == [1, 4, 6, 8, 12, 16, 48, 64]
    padded = pad_rows(ids(5))
    assert torch.equal(padded[:5], ids(5)) and torch.equal(padded[5], ids(5)[4])
    model, capture = llada(), FakeCapture()
    wrapped = GraphedModel(model, capture)
    for rows in (6, 5, 6, 5):  # a row leaves: the same recording
        got = wrapped.hidden_states(ids(rows), left_padding(rows))
        assert torch.equal(got, model.hidden_states(ids(rows), left_padding(rows)))
    assert (capture.recorded, capture.replayed) == (1, 3)


def test_what_is_handed_out_survives_the_next_replay() -> None:
    wrapped = GraphedModel(llada(), FakeCapture())
    wrapped.hidden_states(ids(2))
    first = wrapped.hidden_states(ids(2))
    kept = first.clone()
    wrapped.hidden_states(ids(2, seed=1))
    assert torch.equal(first, kept)


def test_the_shape_used_longest_ago_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)
    capture = FakeCapture()
    wrapped = GraphedModel(llada(), capture)
    for rows, recorded in ((1, 0), (1, 1), (2, 1), (2, 2), (1, 2), (3, 2), (3, 3), (1, 3), (2, 4)):
        wrapped.hidden_states(ids(rows))
        assert capture.recorded == recorded


def test_long_forwards_are_run_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MAX_TOKENS", 30)
    model, capture = llada(), FakeCapture()
    wrapped = GraphedModel(model, capture)
    for _ in range(3):
        assert torch.equal(wrapped.hidden_states(ids(4)), model.hidden_states(ids(4)))
        window = wrapped.states(ids(65)).window(2, 5)
        torch.testing.assert_close(window, model.hidden_states(ids(65))[:, 2:5])
    assert capture.recorded == 0


def test_a_failed_recording_is_said_once_and_nothing_else_changes(caplog: pytest.LogCaptureFixture) -> None:
    model = llada()
    wrapped = GraphedModel(model, FakeCapture(RuntimeError("operation not permitted\nmore lines")))
    with caplog.at_level(logging.WARNING):
        for rows in (2, 2, 2, 3, 3):
            assert torch.equal(wrapped.hidden_states(ids(rows)), model.hidden_states(ids(rows)))
    assert [r.message for r in caplog.records] == [
        "forwards cannot be recorded as CUDA graphs, they run kernel by kernel: operation not permitted"
    ]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA driver error: out of memory")]
)
def test_running_out_of_memory_is_not_a_failed_recording(error: RuntimeError) -> None:
    wrapped = GraphedModel(llada(), FakeCapture(error))
    wrapped.hidden_states(ids(2))
    with pytest.raises(RuntimeError, match="out of memory"):
        wrapped.hidden_states(ids(2))


@pytest.mark.parametrize("cfg_scale", [0.0, 1.0])
def test_generation_is_that_of_the_model(cfg_scale: float) -> None:
    model, capture = llada(), FakeCapture()
    config = SamplerConfig(16, 16, 8, cfg_scale=cfg_scale)
    expected = generate(model, ids(3), config, left_padding(3)).tokens
    got = generate(GraphedModel(model, capture), ids(3), config, left_padding(3)).tokens
    assert torch.equal(got, expected) and capture.replayed == 15


@pytest.mark.parametrize("make", [llada, tiny_dream])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("rows", [4, 5])
def test_cached_forwards_give_the_models_own_hidden_states(make: Callable, padded: bool, rows: int) -> None:
    """One recording serves every block, another one the canvas that fills the cache, of any tokens."""
    model, capture = make(), FakeCapture()
    wrapped, mask = GraphedModel(model, capture), left_padding(rows) if padded else None
    for seed in range(3):
        x = ids(rows, seed=seed)
        (h, cache), (own_h, own) = wrapped.start_cache(x, mask), model.start_cache(x, mask)
        torch.testing.assert_close(h, own_h)
        for start in (0, 6, 3):
            part = ids(rows, 3, seed + start)
            expected = model.use_cache(part, start, own)
            torch.testing.assert_close(wrapped.use_cache(part, start, cache), expected)
        stay = torch.arange(rows) != 1  # rounded up: 4 -> 3, or 6 -> 4
        few, own_few = cache.take(stay), own.take(stay)
        expected = model.use_cache(part[stay], 4, own_few)
        torch.testing.assert_close(wrapped.use_cache(part[stay], 4, few), expected)
        assert cache.cache.is_empty
    assert capture.recorded == 3  # blocks of all rows and of fewer, and the canvas when it came again


def test_caches_that_take_turns_keep_their_keys_and_values() -> None:
    """The one that was in a recording's memory gets its own when another is used, or filled."""
    model = llada()
    wrapped = GraphedModel(model, FakeCapture())
    ours, theirs = ([m.start_cache(ids(2, seed=i))[1] for i in range(2)] for m in (wrapped, model))
    for i in (0, 0, 1, 0, 1, 2, 0, 2, 3, 1):
        if i == len(ours):
            ours.append(wrapped.start_cache(ids(2, seed=i))[1])
            theirs.append(model.start_cache(ids(2, seed=i))[1])
        x = ids(2, 4, seed=7 + i)
        assert torch.equal(wrapped.use_cache(x, i, ours[i]), model.use_cache(x, i, theirs[i]))


def cached(make: Callable, cache: str) -> SamplerConfig:
    """Three blocks; Dream has no cache without a threshold."""
    if make is llada:
        return SamplerConfig(12, 12, 4, cache=cache)
    return SamplerConfig(12, 12, 4, cache=cache, remasking="maskgit_plus", threshold=1.01)


@pytest.mark.parametrize("make", [llada, tiny_dream])
@pytest.mark.parametrize(("cache", "recorded"), [("dual", 2), ("prefix", 4)])
def test_cached_generation_is_that_of_the_model(make: Callable, cache: str, recorded: int) -> None:
    """The canvas is recorded in the last block; the prefix cache's slices have a length in each block."""
    model, capture, config = make(), FakeCapture(), cached(make, cache)
    expected = generate(model, ids(3), config, left_padding(3))
    found = generate(GraphedModel(model, capture), ids(3), config, left_padding(3))
    assert torch.equal(found.tokens, expected.tokens) and found.forwards == expected.forwards == 12
    assert capture.recorded == recorded


@pytest.mark.parametrize(
    ("cache", "steps", "block_length", "threshold"),
    [
        ("none", 1, 8, None),
        ("dual", 2, 8, None),
        ("prefix", 4, 4, None),
        ("dual", 8, 4, None),
        ("dual", 8, 8, 0.3),
    ],
)
def test_after_the_benchs_warm_ups_nothing_is_recorded(
    cache: str, steps: int, block_length: int, threshold: float | None
) -> None:
    """Whatever the schedule; with a threshold rows wait outside, so there are shapes of fewer rows, too."""
    config = SamplerConfig(8, steps, block_length, cache=cache, threshold=threshold)
    capture = FakeCapture()
    wrapped, recorded = GraphedModel(llada(), capture), []
    for _ in range(WARM_UPS + 1):
        generate(wrapped, ids(3), config, left_padding(3))
        recorded.append(capture.recorded)
    assert recorded[-1] == recorded[-2] > 0
    if (cache, steps) == ("dual", 2):
        assert recorded[-3] < recorded[-1]  # one generation fewer is not enough
    if threshold is not None:
        assert len({key[1] for key in wrapped._recorded}) > 1  # numbers of rows


def test_nobody_may_stay_while_rows_wait_outside() -> None:
    """With a threshold, rows whose block is complete are not in the canvas, and the others may all leave."""
    _, cache = GraphedModel(llada(), FakeCapture()).start_cache(ids(3))
    assert cache.take(torch.zeros(3, dtype=torch.bool)).rows == 0


def test_rows_that_leave_do_not_change_cached_generation() -> None:
    model = llada()

    def tokens(predictor: object, seed: int) -> Tensor:
        def leave(x: Tensor, *_: object) -> Tensor:
            return (x == 38).any(1)

        config = SamplerConfig(16, 8, 8, cache="dual", threshold=0.1)
        steps = list(denoise(predictor, ids(4, seed=seed), config, leave=leave))
        return steps[-1].tokens

    for seed in range(8):
        assert torch.equal(tokens(GraphedModel(model, FakeCapture()), seed), tokens(model, seed))


def test_recordings_hold_few_caches_and_none_after_memory_ran_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MAX_CACHED", 50)  # rows x columns
    model = llada()
    wrapped = GraphedModel(model, FakeCapture())
    for rows in (4, 3, 2, 1):
        x = ids(rows)
        for _ in range(3):
            own, given = model.start_cache(x)[1], wrapped.start_cache(x)[1]
            for _ in range(2):
                y = ids(rows, 4, seed=rows)
                assert torch.equal(wrapped.use_cache(y, 2, given), model.use_cache(y, 2, own))
    held = {id(r.memory): r.memory.layers[0].K for key, r in wrapped._recorded.items() if key[0] == "slice"}
    assert sum(K.shape[0] * K.shape[2] for K in held.values()) <= 50
    wrapped.forget()
    assert not wrapped._recorded


def test_long_cached_forwards_are_run_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """The canvas with the rows it has, its slices with those that shorter slices are recorded with."""
    monkeypatch.setattr(graphs, "MAX_TOKENS", 30)
    model, capture = llada(), FakeCapture()
    wrapped, x = GraphedModel(model, capture), ids(5)
    (h, cache), (own_h, own) = wrapped.start_cache(x), model.start_cache(x)
    assert torch.equal(h, own_h)
    for n in (6, 6, 6, 5, 5, 5):
        found, expected = (m.use_cache(x[:, 2 : 2 + n], 2, c) for m, c in ((wrapped, cache), (model, own)))
        torch.testing.assert_close(found, expected)
    assert capture.recorded == 1


def test_a_forward_counts_once_however_it_is_run() -> None:
    """A replay calls no module; a recording calls it, but is no forward."""
    model, capture = llada(), SilentCapture()
    wrapped = GraphedModel(model, capture)
    for _ in range(5):
        wrapped.hidden_states(ids(2))
    assert (model.forwards, capture.recorded, capture.replayed) == (5, 1, 4)
    for n in range(1, 4):
        _, cache = wrapped.start_cache(ids(2))
        for _ in range(3):
            wrapped.use_cache(ids(2, 4), 2, cache)
        assert model.forwards == 5 + 4 * n
    assert capture.recorded == 3


def test_models_on_the_cpu_are_not_wrapped() -> None:
    model = llada()
    assert graphed(model) is model


@pytest.mark.gpu
@pytest.mark.parametrize("make", [llada, tiny_dream])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_graphs_give_the_models_own_hidden_states(make: Callable, dtype: torch.dtype) -> None:
    model = make().to("cuda", dtype)
    wrapped = graphed(model)
    assert isinstance(wrapped, GraphedModel)
    for rows in (4, 4, 4, 6, 6):
        for seed in range(3):
            x, mask = ids(rows, seed=seed).cuda(), left_padding(rows).cuda()
            for given in (None, mask):
                assert torch.equal(wrapped.hidden_states(x, given), model.hidden_states(x, given))
    assert not wrapped._failed and len(wrapped._recorded) == 4


@pytest.mark.gpu
def test_generation_with_cuda_graphs_is_that_of_the_model() -> None:
    model = llada().cuda()
    config = SamplerConfig(32, 32, 16)
    expected = generate(model, ids(4).cuda(), config, left_padding(4).cuda()).tokens
    wrapped = graphed(model)
    assert torch.equal(generate(wrapped, ids(4).cuda(), config, left_padding(4).cuda()).tokens, expected)
    assert wrapped._recorded and not wrapped._failed


@pytest.mark.gpu
@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("make", [llada, tiny_dream])
def test_cached_generation_with_cuda_graphs_is_that_of_the_model(make: Callable, cache: str) -> None:
    model, config = make().cuda(), cached(make, cache)
    expected = generate(model, ids(3).cuda(), config, left_padding(3).cuda()).tokens
    wrapped = graphed(model)
    assert torch.equal(generate(wrapped, ids(3).cuda(), config, left_padding(3).cuda()).tokens, expected)
    assert len(wrapped._recorded) >= 2 and not wrapped._failed

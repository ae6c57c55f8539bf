"""A streamed model against the loaded one, bit for bit: forwards, trajectories, quantization, measures."""

import errno
import io
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sharded_checkpoint import EOT, MASK, save_sharded
from torch import Tensor, nn

from dllmq.calibration.hidden import HiddenStates, Spill
from dllmq.calibration.states import CalibrationState, RandomMask, draw_states, record_trajectories
from dllmq.diffusion import SamplerConfig
from dllmq.evaluation import fidelity
from dllmq.methods import AWQ, GPTQ, RTN
from dllmq.models import load_model
from dllmq.models.memory import in_bytes
from dllmq.models.streaming import StreamedBlocks, is_streamed, log_reading
from dllmq.numerics import Grid
from dllmq.pipeline import QuantizationReport, quantize, quantized_linears, set_backend
from dllmq.recipe import AttentionGrids, Recipe
from dllmq.techniques.cgq import CGQ
from dllmq.techniques.iaaq import IAAQ

SAMPLERS = {
    "LLaDA": SamplerConfig(gen_length=8, steps=8, block_length=8),
    "Dream": SamplerConfig(gen_length=8, steps=8, remasking="entropy"),
}
PV = AttentionGrids(Grid(4), Grid(4))
PLAIN = Recipe(RTN(), Grid(4), num_states=6, batch_size=4, states=RandomMask())
RECIPES = {
    "rtn, attention": replace(PLAIN, inputs=Grid(4), attention=PV),
    "gptq, groups in order of the Hessian": replace(
        PLAIN, method=GPTQ(act_order=True), weights=Grid(3, 16), token_weight=CGQ()
    ),
    "gptq, attention by IA-AQ": replace(
        PLAIN, method=GPTQ(), inputs=Grid(8), attention=replace(PV, QK=Grid(4)), value_scale=IAAQ
    ),
    "awq, symmetric": replace(PLAIN, method=AWQ(n_grid=2), weights=Grid(4, 16, True), inputs=Grid(4)),
}


@pytest.fixture(scope="module", params=["llada", "dream"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sharded(tmp_path_factory.mktemp("sharded") / "model", request.param)


@pytest.fixture(scope="module")
def states(checkpoint: Path) -> list[CalibrationState]:
    return states_for(load_model(checkpoint))


@pytest.fixture
def llada(tmp_path: Path) -> Path:
    return save_sharded(tmp_path / "model", "llada")


def some_prompts() -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [torch.randint(0, EOT, (n,), generator=rng) for n in (5, 3, 7)]


def some_ids() -> tuple[Tensor, Tensor]:
    """Tokens with masks among them, and an attention mask with pads on the left."""
    ids = torch.randint(0, EOT, (2, 12), generator=torch.Generator().manual_seed(1))
    ids[:, 5:9] = MASK
    keep = torch.ones_like(ids)
    keep[1, :3] = 0
    return ids, keep


def states_for(model: Any) -> list[CalibrationState]:
    sampler = SAMPLERS[type(model).__name__]
    trajectories = record_trajectories(model, some_prompts(), sampler, 4)
    return draw_states(model, trajectories, PLAIN.states, PLAIN.num_states, 4, 0, sampler)


def in_memory(block: nn.Module) -> bool:
    return not any(p.is_meta for p in block.parameters())


def everything(model: Any) -> dict[str, Tensor]:
    """Every parameter, code, scale, zero and group index of a quantized model, and V's parameters."""
    out = {name: p for name, p in model.state_dict().items()}
    for name, linear in quantized_linears(model).items():
        q = linear.quantized
        parts = {"codes": q.codes, "scale": q.scale, "zero": q.zero, "index": q.group_index}
        out |= {f"{name}.{part}": value for part, value in parts.items() if value is not None}
    for i, block in enumerate(model.blocks.children()):
        params = getattr(block.product, "v_params", None)
        out |= {} if params is None else {f"{i}.V.scale": params.scale, f"{i}.V.zero": params.zero}
    return out


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])] == []


# Forwards -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_are_the_loaded_models(checkpoint: Path, dtype: torch.dtype) -> None:
    whole, streamed = (load_model(checkpoint, dtype=dtype, stream=s) for s in (False, True))
    assert is_streamed(streamed) and not is_streamed(whole)
    ids, keep = some_ids()
    for _ in range(2):  # the second time every block is read again
        assert torch.equal(streamed(ids), whole(ids)) and streamed(ids).dtype == dtype
        assert torch.equal(streamed(ids, keep), whole(ids, keep))


def test_one_block_is_in_memory_at_a_time(checkpoint: Path) -> None:
    model = load_model(checkpoint, stream=True)
    blocks = list(model.blocks.children())
    seen: list[list[bool]] = []
    for block in blocks:
        block.register_forward_hook(lambda *_: seen.append([in_memory(b) for b in blocks]))
    model(some_ids()[0])
    assert seen == [[True, False], [False, True]]
    assert not any(map(in_memory, blocks))
    inside = {id(p) for block in blocks for p in block.parameters()}
    assert not any(p.is_meta for p in model.parameters() if id(p) not in inside)


def test_a_block_that_fails_is_dropped_and_read_again(checkpoint: Path) -> None:
    model = load_model(checkpoint, stream=True)
    ids, _ = some_ids()
    expected = model(ids)

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    handle = model.blocks[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError):
        model(ids)
    handle.remove()
    assert not any(map(in_memory, model.blocks.children()))
    assert torch.equal(model(ids), expected)


def test_leaving_an_iteration_early_drops_the_block(checkpoint: Path) -> None:
    model = load_model(checkpoint, stream=True)
    for block in model.blocks:
        assert in_memory(block)
        break
    assert not any(map(in_memory, model.blocks.children()))
    assert repr(model.blocks) == "StreamedBlocks(2 blocks, 0 of them kept in memory)"


def test_what_a_forward_reads_by_hand(llada: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two blocks of 2 norms, q and o [32, 32], k and v [16, 32], three MLP weights [48, 32], in bf16."""
    streamed = load_model(llada, dtype=torch.float32, stream=True)
    stored = 2 * 2 * (2 * 32 + 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32)
    assert streamed.blocks.bytes_per_forward == stored
    with caplog.at_level(logging.INFO, "dllmq"):
        log_reading(load_model(llada), "trajectories", 8)
        assert caplog.text == ""
        log_reading(streamed, "trajectories", 10**6)
    assert f"1000000 forwards, {in_bytes(1e6 * stored)} in all" in caplog.text


# Trajectories and measurements --------------------------------------------------------------------


def test_trajectories_and_fidelity_are_the_loaded_models(
    checkpoint: Path, states: list[CalibrationState]
) -> None:
    whole, streamed = (load_model(checkpoint, stream=s) for s in (False, True))
    sampler = SAMPLERS[type(whole).__name__]
    runs = [record_trajectories(m, some_prompts(), sampler, 2, observe="all") for m in (whole, streamed)]
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.score, b.score)
        assert torch.equal(a.final, b.final)
    references = [fidelity.reference(m, runs[0], sampler, 8, 4, 0) for m in (whole, streamed)]
    for model in (whole, streamed):
        quantize(model, [], replace(PLAIN, inputs=Grid(4)), states=states)
    results = [fidelity.measure(m, r) for m, r in zip((whole, streamed), references, strict=True)]
    assert results[0] == results[1] and results[0].values["kl"]["value"] > 0


# Quantization -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_quantization_is_the_loaded_models(
    checkpoint: Path, states: list[CalibrationState], name: str
) -> None:
    """The same codes, parameters, logits and report; only codes are kept."""
    whole, streamed = (load_model(checkpoint, stream=s) for s in (False, True))
    expected, report = (quantize(m, [], RECIPES[name], states=states) for m in (whole, streamed))
    assert_same(everything(streamed), everything(whole))
    assert torch.equal(streamed(*some_ids()), whole(*some_ids()))
    assert without_times(report) == without_times(expected)
    assert all(linear.is_compact for linear in quantized_linears(streamed).values())
    assert not any(p.dim() == 2 for block in streamed.blocks for p in block.parameters())


def test_a_loaded_model_can_be_compact(checkpoint: Path, states: list[CalibrationState]) -> None:
    whole, compact = (load_model(checkpoint) for _ in range(2))
    for model in (whole, compact):
        quantize(model, [], RECIPES["rtn, attention"], states=states, compact=model is compact)
    assert_same(everything(compact), everything(whole))
    assert torch.equal(compact(*some_ids()), whole(*some_ids()))
    held = [p.numel() for block in compact.blocks for p in block.parameters() if p.dim() == 2]
    assert held == [] and not any(m.is_compact for m in quantized_linears(whole).values())


def without_times(report: QuantizationReport) -> QuantizationReport:
    return replace(report, seconds={})


def test_bf16_models_are_quantized_alike(checkpoint: Path, states: list[CalibrationState]) -> None:
    whole, streamed = (load_model(checkpoint, dtype=torch.bfloat16, stream=s) for s in (False, True))
    for model in (whole, streamed):
        quantize(model, [], RECIPES["awq, symmetric"], states=states)
    assert_same(everything(streamed), everything(whole))
    assert torch.equal(streamed(*some_ids()), whole(*some_ids()))


def test_one_full_precision_block_at_a_time_while_quantizing(
    checkpoint: Path, states: list[CalibrationState]
) -> None:
    model = load_model(checkpoint, stream=True)
    loaded: list[list[int]] = []

    class Watched(RTN):
        def __call__(self, group: Any, stats: Any, grid: Grid) -> Any:
            dense = [
                i
                for i, block in enumerate(model.blocks.children())
                if any(p.dim() == 2 and not p.is_meta for p in block.parameters())
            ]
            loaded.append(dense)
            return super().__call__(group, stats, grid)

    quantize(model, [], replace(PLAIN, method=Watched()), states=states)
    assert loaded == [[i] for i in range(2) for _ in range(4)]


@pytest.mark.parametrize("stream", [True, False])
def test_blocks_can_be_taken_and_freed_one_by_one(
    checkpoint: Path, states: list[CalibrationState], stream: bool
) -> None:
    """What `on_block` gets is the finished block, before the next one is touched; report and result stay."""
    whole = load_model(checkpoint)
    expected = quantize(whole, [], RECIPES["awq, symmetric"], states=states)
    model, taken = load_model(checkpoint, stream=stream), {}

    def take(index: int, block: nn.Module) -> None:
        assert index == len(taken) and in_memory(block)
        taken[index] = {name: tensor.clone() for name, tensor in block.state_dict().items()}
        block.to("meta")

    report = quantize(model, [], RECIPES["awq, symmetric"], states=states, on_block=take)
    for index, block in enumerate(whole.blocks):
        assert_same(taken[index], dict(block.state_dict()))
    assert without_times(report) == without_times(expected)
    assert not any(in_memory(block) for block in model.blocks.children())


def test_rounding_reads_no_state(llada: Path) -> None:
    """RTN without attention makes no forward of a block at all, and gives what it gave."""
    model, calls = load_model(llada, stream=True), []
    states = states_for(model)
    for block in model.blocks.children():
        block.register_forward_hook(lambda *_: calls.append(1))
    quantize(model, [], PLAIN, states=states)
    assert calls == []


@pytest.mark.parametrize("backend", ["fake", "packed", "auto"])
@pytest.mark.parametrize("recipe", ["rows", "groups"])
def test_backends_are_the_same_from_codes_alone(llada: Path, backend: str, recipe: str) -> None:
    grids = {"weights": Grid(4), "inputs": Grid(8)}
    if recipe == "groups":
        grids = {"weights": Grid(4, 16), "inputs": Grid(8, 8)}
    whole, streamed = (load_model(llada, stream=s) for s in (False, True))
    states = states_for(whole)
    chosen = []
    for model in (whole, streamed):
        quantize(model, [], replace(PLAIN, **grids), states=states)
        chosen.append(set_backend(model, backend))
    assert [name.split(":")[0] for name in chosen] == [chosen[0].split(":")[0]] * 2
    if backend == "packed":
        assert chosen[1] == "packed:int4"  # half a byte a weight; what the whole model has takes one
    assert torch.equal(streamed(some_ids()[0]), whole(some_ids()[0]))


# Hidden states ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_states_on_disk_change_nothing_and_leave_nothing(
    llada: Path, tmp_path: Path, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = RECIPES["gptq, attention by IA-AQ"]
    held, spilled = (load_model(llada, dtype=dtype) for _ in range(2))
    states = states_for(held)
    quantize(held, [], recipe, states=states)
    with caplog.at_level(logging.INFO, "dllmq"):
        quantize(spilled, [], recipe, states=states, spill=Spill(0, tmp_path / "cell"))
    assert_same(everything(spilled), everything(held))
    assert "hidden states: " in caplog.text and f"on disk, in {tmp_path / 'cell'}" in caplog.text
    assert list((tmp_path / "cell").iterdir()) == []


@pytest.mark.parametrize(("limit", "on_disk"), [(None, False), (80, False), (79, True)])
def test_batches_come_back_in_any_order(tmp_path: Path, limit: int | None, on_disk: bool) -> None:
    shapes, device = [(1, 2, 5), (2, 3, 5)], torch.device("cpu")
    states = HiddenStates(shapes, torch.bfloat16, device, Spill(limit, tmp_path))
    assert (states.nbytes, len(states), states._file is not None) == (80, 2, on_disk)
    first, second, other = (torch.randn(s).bfloat16() for s in (*shapes, shapes[0]))
    states[1], states[0] = second, first
    assert torch.equal(states[0], first) and torch.equal(states[1], second)
    states[0] = other
    assert torch.equal(states[1], second) and torch.equal(states[0], other)
    states.close()


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.BytesIO):
        def write(self, _: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    states = HiddenStates([(1, 2, 5)], torch.float32, torch.device("cpu"), Spill(10, tmp_path))
    states.close()
    monkeypatch.setattr(states, "_file", Full())
    with pytest.raises(
        ValueError, match=r"more than max_state_bytes=10.*\(No space left on device\)"
    ) as told:
        states[0] = torch.zeros(1, 2, 5)
    assert str(tmp_path) in str(told.value) and "calibration.num_states" in str(told.value)


def test_a_folder_that_takes_no_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot be put on disk in .*file"):
        HiddenStates([(1, 2, 5)], torch.float32, torch.device("cpu"), Spill(0, tmp_path / "file" / "cell"))


# Files that change under a running program --------------------------------------------------------


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def other_shape(file: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file({name: x[..., :-1].contiguous() for name, x in load_file(file).items()}, file)


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut short": (cut, "cannot be read any more"),
    "gone": (Path.unlink, "cannot be read any more"),
    "another": (other_shape, "was changed while it was in use"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_shard_that_changes_after_the_check_is_one_sentence(llada: Path, change: str) -> None:
    model = load_model(llada, stream=True)
    states = states_for(model)
    shard = llada / "model-00002-of-00003.safetensors"
    make, said = CHANGES[change]
    make(shard)
    for use in (lambda: model(some_ids()[0]), lambda: quantize(model, [], PLAIN, states=states)):
        with pytest.raises(ValueError) as told:
            use()
        message = str(told.value)
        assert f"{shard} {said}" in message and message.endswith(".") and "\n" not in message


def test_loading_whole_tells_the_same(llada: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dllmq.models import loading

    check = loading.check_tensors

    def and_then_cut(*args: Any) -> Any:
        found = check(*args)
        cut(llada / "model-00002-of-00003.safetensors")
        return found

    monkeypatch.setattr(loading, "check_tensors", and_then_cut)
    with pytest.raises(ValueError, match=r"model-00002-of-00003\.safetensors cannot be read any more"):
        load_model(llada)


def test_nothing_of_a_file_stays_mapped(llada: Path) -> None:
    """Mapped pages count as resident memory, and a file cut short kills who reads them."""
    models = [load_model(llada, dtype=torch.bfloat16, stream=s) for s in (False, True)]

    def mapped() -> Iterator[str]:
        return (line for line in Path("/proc/self/maps").read_text().splitlines() if str(llada) in line)

    if Path("/proc/self/maps").exists():
        assert list(mapped()) == []
        for model in models:
            model(some_ids()[0])
            assert isinstance(model.blocks, nn.ModuleList) and list(mapped()) == []
    assert isinstance(models[1].blocks, StreamedBlocks)

"""A quantization that was stopped after some blocks goes on as if it had never been stopped, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import tiny_folders
import torch
from safetensors.torch import load_file

from dllmq.cache import Cache
from dllmq.methods import AWQ, GPTQ, RTN, Method
from dllmq.models import load_model
from dllmq.models.attention import QuantizedProduct
from dllmq.models.block_store import BlockStore
from dllmq.numerics import Grid
from dllmq.pipeline import quantize, quantized_linears
from dllmq.recipe import AttentionGrids, Recipe

SLOW = pytest.mark.slow
FULL = AttentionGrids(P=Grid(4), V=Grid(4), QK=Grid(4))


class Killed(BaseException):
    """In the place of a process that ends: nothing catches it."""


def recipe(method: Method, weights: Grid = Grid(4), attention: AttentionGrids = FULL) -> Recipe:  # noqa: B008
    return Recipe(method, weights, Grid(4), attention)


def run(
    made: Recipe, store: BlockStore | None, architecture: str = "llada", stop: int | None = None, **how: Any
) -> tuple[Any, dict[str, Any]]:
    """The quantized model and the method's notes; killed when block `stop` is finished."""
    model = load_model(tiny_folders.source(architecture), stream=how.pop("stream", False))

    def progress(done: int, total: int, what: str) -> None:
        if what == "blocks" and done == stop:
            raise Killed

    report = quantize(model, [], made, None, progress, tiny_folders.states(architecture), store=store, **how)
    return model, report.notes


def store(folder: Path, key: str = "k") -> BlockStore:
    return BlockStore(Cache(folder), key)


def everything(model: Any) -> dict[str, torch.Tensor]:
    """Codes, scales, zeros, indices, norms, biases, V's scales and the logits."""
    linears = quantized_linears(model)
    found = {n: p.data for n, p in model.named_parameters() if n.removesuffix(".weight") not in linears}
    for name, linear in linears.items():
        q = linear.quantized
        found |= {f"{name}.codes": q.codes, f"{name}.scale": q.scale, f"{name}.zero": q.zero}
        found |= {} if q.group_index is None else {f"{name}.index": q.group_index}
    for i, block in enumerate(model.blocks):
        if isinstance(block.product, QuantizedProduct) and block.product.v_params is not None:
            found |= {f"{i}.scale": block.product.v_params.scale, f"{i}.zero": block.product.v_params.zero}
    return found | {"logits": tiny_folders.logits(model)}


def assert_equal(a: Any, b: Any) -> None:
    one, other = everything(a), everything(b)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


CASES = {
    "gptq": recipe(GPTQ(act_order=True), Grid(4, 16)),
    "awq": recipe(AWQ(n_grid=3), Grid(3), AttentionGrids()),
    "rtn": recipe(RTN(), Grid(8, 0, True), AttentionGrids(P=Grid(8))),
}


@pytest.mark.parametrize(
    ("architecture", "case"),
    [("llada", "gptq"), ("dream", "awq"), ("llada", "rtn")]
    + [pytest.param(*pair, marks=SLOW) for pair in (("dream", "gptq"), ("llada", "awq"), ("dream", "rtn"))],
)
def test_a_stopped_quantization_goes_on_bit_for_bit(tmp_path: Path, architecture: str, case: str) -> None:
    whole, notes = run(CASES[case], None, architecture)
    with pytest.raises(Killed):
        run(CASES[case], store(tmp_path), architecture, stop=1)
    again = store(tmp_path)
    resumed, own = run(CASES[case], again, architecture)
    assert (again.restored, own) == (1, notes) and again.seconds > 0
    assert_equal(whole, resumed)


@pytest.mark.parametrize(
    "how", [{"compact": True}, {"stream": True}, {"on_block": lambda index, block: None}]
)
def test_compact_streamed_and_watched_blocks_too(tmp_path: Path, how: dict[str, Any]) -> None:
    whole, _ = run(CASES["gptq"], None)
    for stop in (1, 2, None):
        again = store(tmp_path)
        try:
            resumed, _ = run(CASES["gptq"], again, stop=stop, **how)
        except Killed:
            continue
        assert again.restored == 2
        assert_equal(whole, resumed)


def test_blocks_of_another_key_are_not_taken(tmp_path: Path) -> None:
    run(CASES["rtn"], store(tmp_path, "one"))
    other = store(tmp_path, "two")
    run(CASES["rtn"], other)
    assert other.restored == 0


@pytest.mark.parametrize(
    "damage", ["flip", "cut", *(pytest.param(d, marks=SLOW) for d in ("empty", "other"))]
)
def test_a_damaged_block_is_made_again(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    whole, _ = run(CASES["gptq"], store(tmp_path))
    first, second = sorted(f for f in tmp_path.glob("block/*/*") if len(f.name) == 64)
    raw = first.read_bytes()
    content = {"cut": raw[: len(raw) // 2], "empty": b"", "other": second.read_bytes()}
    flipped = raw[:-9] + bytes([raw[-9] ^ 4]) + raw[-8:]
    first.write_bytes(content.get(damage, flipped))
    again = store(tmp_path)
    resumed, _ = run(CASES["gptq"], again)
    assert again.restored == 1 and "is damaged" in caplog.text
    assert_equal(whole, resumed)


def test_a_block_that_does_not_fit_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The key would have to lie for it: entries of another architecture under the same name."""
    run(CASES["rtn"], store(tmp_path), "dream")
    again = store(tmp_path)
    resumed, _ = run(CASES["rtn"], again)
    assert again.restored == 0 and "of other sizes" in caplog.text
    assert_equal(run(CASES["rtn"], None)[0], resumed)


def test_what_is_stored_is_small(tmp_path: Path) -> None:
    """4-bit codes take half a byte each, not a float."""
    run(recipe(RTN(), Grid(4), AttentionGrids()), store(tmp_path))
    for file in (f for f in tmp_path.glob("block/*/*") if len(f.name) == 64):
        tensors = load_file(file)
        codes = sum(t.nbytes for name, t in tensors.items() if name.endswith(".packed"))
        linears = tiny_folders.LLADA["d_model"] * (64 + 2 * 32 + 64 + 3 * 96)
        assert codes == linears // 2

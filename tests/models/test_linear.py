"""QuantLinear is its definition, and moving a scale into the op before a group changes no function."""

import copy
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_llada import tiny_model
from torch import Tensor, nn

from dllmq.kernels import cpu_int8, cpu_onednn, cpu_weight_only
from dllmq.kernels.backends import find_backend
from dllmq.methods.rtn import round_to_nearest
from dllmq.models.attention import QuantizedProduct
from dllmq.models.base import (
    Block,
    GroupRow,
    _can_absorb,
    absorb_scale,
    linear_group,
    swapped_weights,
)
from dllmq.models.linear import InputQuantizer, QuantLinear
from dllmq.models.llada import TOPOLOGY
from dllmq.numerics import Grid, Params, fake_quant

O, I = 6, 16
ROWS = {row.name: row for row in TOPOLOGY.groups}


def quant_linear(grid: Grid, act_grid: Grid | None = None, bias: Tensor | None = None) -> QuantLinear:
    return QuantLinear(round_to_nearest(torch.randn(O, I), grid), bias, act_grid, torch.float32)


def dequantized(q: Any) -> Tensor:
    """(code - z) s, entry by entry."""
    groups = q.scale.shape[1]
    return torch.tensor(
        [
            [
                (float(q.codes[o, i]) - float(q.zero[o, i * groups // I]))
                * float(q.scale[o, i * groups // I])
                for i in range(I)
            ]
            for o in range(O)
        ]
    )


def per_token(x: Tensor, bits: int, group: int = -1) -> Tensor:
    """Dynamic asymmetric quantization of each token, or of each group of its channels."""
    width, out = group if group > 0 else x.shape[-1], x.clone()
    for row in out.view(-1, width):
        low, high = min(float(row.min()), 0.0), max(float(row.max()), 0.0)
        s = (high - low) / (2**bits - 1)
        z = round(-low / s)
        row.copy_(((row / s).round().add(z).clamp(0, 2**bits - 1) - z) * s)
    return out


@pytest.mark.parametrize("grid", [Grid(4), Grid(3, 4), Grid(4, 8, symmetric=True)], ids=str)
@pytest.mark.parametrize("act", [None, Grid(8), Grid(4, 4)], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_quant_linear_equals_its_definition(grid: Grid, act: Grid | None, biased: bool) -> None:
    bias = torch.randn(O) if biased else None
    linear, x = quant_linear(grid, act, bias), torch.randn(2, 5, I)
    x_hat = x if act is None else per_token(x, act.bits, act.group_size)
    expected = x_hat @ dequantized(linear.quantized).T + (0 if bias is None else bias)
    torch.testing.assert_close(linear(x), expected, atol=1e-5, rtol=1e-5)


def test_inputs_are_quantized_token_by_token() -> None:
    linear, x = quant_linear(Grid(4), Grid(4)), torch.randn(3, I)
    x[1] *= 100
    torch.testing.assert_close(linear(x)[[0, 2]], linear(x[[0, 2]]))


@pytest.mark.parametrize("grid", [Grid(4), Grid(3, 4), Grid(4, symmetric=True)], ids=str)
def test_scale_rows_is_exact(grid: Grid) -> None:
    """By powers of two bit for bit; by anything to an ulp; and the codes stay."""
    linear, x = quant_linear(grid, bias=torch.randn(O)), torch.randn(5, I)
    before, codes = linear(x), linear.quantized.codes.clone()
    linear.scale_rows(torch.tensor([0.5, 2.0, 1.0, 4.0, 0.25, 8.0]))
    assert torch.equal(linear(x), before * torch.tensor([0.5, 2.0, 1.0, 4.0, 0.25, 8.0]))
    assert torch.equal(linear.quantized.codes, codes)
    assert torch.equal(linear.weight, linear.quantized.dequantize())
    f = torch.rand(O) + 0.1
    before = linear(x)
    linear.scale_rows(f)
    torch.testing.assert_close(linear(x), before * f, atol=1e-5, rtol=1e-5)


# The packed backend -------------------------------------------------------------------------------

exact_only = pytest.mark.skipif(not cpu_int8.is_exact(), reason="this processor saturates int8 products")
FIRST = "onednn" if cpu_onednn.works() else "int_mm"


def in_double(linear: QuantLinear, x: Tensor) -> Tensor:
    """Q_a(x) Deq(Q_w)^T + b from dequantized values, multiplied in fp64."""
    assert linear.inputs.grid is not None
    y = fake_quant(x.float(), linear.inputs.grid).double() @ linear.quantized.dequantize().double().T
    return y if linear.bias is None else y + linear.bias.double()


@exact_only
@pytest.mark.parametrize("weight", [Grid(2), Grid(4), Grid(4, 0), Grid(8, symmetric=True)], ids=str)
@pytest.mark.parametrize("act", [Grid(2), Grid(4, symmetric=True), Grid(8)], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_packed_equals_the_definition_in_double(weight: Grid, act: Grid, biased: bool) -> None:
    linear = quant_linear(weight, act, torch.randn(O) if biased else None)
    assert linear.can_pack()
    linear.pack()
    assert linear.backend == f"packed:{FIRST}" and f"backend=packed:{FIRST}" in repr(linear)
    for shape in ((I,), (5, I), (2, 3, I), (2, 0, I)):
        x = torch.randn(shape)
        y = linear(x)
        assert y.dtype == torch.float32
        torch.testing.assert_close(y.double(), in_double(linear, x), atol=5e-6, rtol=1e-6)


@exact_only
def test_packed_bf16_is_the_definition_rounded_once() -> None:
    quantized = round_to_nearest(torch.randn(O, I), Grid(4))
    linear = QuantLinear(quantized, torch.randn(O), Grid(8), torch.bfloat16)
    linear.pack()
    x = torch.randn(2, 5, I).bfloat16()
    y, expected = linear(x), in_double(linear, x)
    assert y.dtype == torch.bfloat16
    assert bool(((y.double() - expected).abs() <= 2.0**-8 * expected.abs() + 1e-5).all())


@exact_only
def test_unpacking_gives_the_fake_backend_back_bit_for_bit() -> None:
    linear, x = quant_linear(Grid(4), Grid(4)), torch.randn(3, I)
    before = linear(x)
    linear.pack()
    assert not torch.equal(linear(x), before)
    linear.unpack()
    assert linear.backend == "fake" and torch.equal(linear(x), before)


@exact_only
@pytest.mark.parametrize("weight", [Grid(3, 8), Grid(4, 4, symmetric=True), Grid(8, 8)], ids=str)
@pytest.mark.parametrize("act", [Grid(4), Grid(8), Grid(8, 8), Grid(4, 4, symmetric=True)], ids=str)
@pytest.mark.parametrize("compact", [False, True])
def test_packed_groups_equal_the_definition_in_double(weight: Grid, act: Grid, compact: bool) -> None:
    linear, x = quant_linear(weight, act, torch.randn(O)), torch.randn(2, 5, I)
    if compact:
        linear.compact()
    linear.pack()
    assert linear.backend == f"packed:{'int4' if compact and weight.bits <= 4 else FIRST}"
    torch.testing.assert_close(linear(x).double(), in_double(linear, x), atol=5e-6, rtol=1e-6)


@pytest.mark.parametrize("weight", [Grid(4), Grid(3, 4), Grid(8, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("outputs", [1, 4, 100])
def test_packed_with_full_precision_inputs(
    weight: Grid, dtype: torch.dtype, outputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some outputs at a time, and no more of the weight than those is dequantized."""
    monkeypatch.setattr(cpu_weight_only, "OUTPUTS", outputs)
    monkeypatch.setattr(cpu_weight_only, "CACHED", 1)
    quantized, bias = round_to_nearest(torch.randn(O, I), weight), torch.randn(O)
    fake, packed = (QuantLinear(quantized, bias, None, dtype) for _ in range(2))
    packed.pack()
    assert packed.backend == "packed:weight_only"
    seen: list[tuple[int, ...]] = []

    def watched(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        seen.append(tuple(W.shape))
        return linear_product(x, W, b)

    linear_product = cpu_weight_only.linear
    monkeypatch.setattr(cpu_weight_only, "linear", watched)
    for shape in ((I,), (2, 3, I)):
        x = torch.randn(shape).to(dtype)
        torch.testing.assert_close(packed(x), fake(x))
    assert seen == 2 * [(min(outputs, O - o), I) for o in range(0, O, outputs)]


@pytest.mark.parametrize(("weight", "act"), [(Grid(4), Grid(4, 0)), (Grid(4, 1), Grid(4))], ids=str)
def test_what_cannot_be_packed(weight: Grid, act: Grid | None) -> None:
    linear = quant_linear(weight, act)
    assert not linear.can_pack()
    with pytest.raises(AssertionError, match="does not take QuantLinear"):
        linear.pack()


FORMS = [(Grid(4), Grid(8)), (Grid(3, 4), Grid(4)), (Grid(8, 8), Grid(8, 8)), (Grid(5), None)]


@exact_only
@pytest.mark.parametrize(("weight", "act"), FORMS, ids=str)
@pytest.mark.parametrize("compact", [False, True])
def test_one_form_of_a_weight_is_held_at_a_time(weight: Grid, act: Grid | None, compact: bool) -> None:
    """And everything comes back from it: codes, state dict, the fake backend's output bit for bit."""
    quantized = round_to_nearest(torch.randn(64, 64), weight)
    linear, x = QuantLinear(quantized, torch.randn(64), act, torch.float32), torch.randn(3, 64)
    if compact:
        linear.compact()
    before, fake = {n: t.clone() for n, t in linear.state_dict().items()}, linear(x)
    linear.pack()
    assert [n for n, _ in linear.named_parameters()] == ["bias"]
    again = linear.quantized
    for name in ("codes", "scale", "zero", "grid", "group_index"):
        left, right = getattr(again, name), getattr(quantized, name)
        assert torch.equal(left, right) if isinstance(left, Tensor) else left == right
    assert linear.nbytes == quantized.nbytes and linear.shape == (64, 64)
    after = linear.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[n], before[n]) for n in before)
    linear.unpack()
    assert linear.backend == "fake" and torch.equal(linear(x), fake)


@exact_only
def test_bytes_that_are_held() -> None:
    """Per weight: 4 (fp32) + 1 fake, half a byte compact, 1 packed, half packed and compact. Besides, for
    each group, a scale and a zero in fp32; an operand's zero has one byte, and with inputs of 8 bits it has
    the sum of the weights. oneDNN's chunks bring 8 bytes an output."""
    O, I, g = 256, 256, 64
    G = O * I // g
    quantized = round_to_nearest(torch.randn(O, I), Grid(4, g))
    linear = QuantLinear(quantized, None, Grid(8), torch.float32)
    assert linear.resident_bytes == 5 * O * I + 8 * G
    linear.pack()
    chunks = 8 * O if linear.backend == "packed:onednn" else 0
    assert linear.resident_bytes == O * I + (4 + 1 + 4) * G + chunks
    linear.compact()
    assert linear.backend == "packed:int4"
    assert linear.resident_bytes == O * I // 2 + (4 + 1 + 4 + 1) * G  # a byte moves codes to 0 and up
    linear.unpack()
    assert linear.resident_bytes == O * I // 2 + 8 * G


@exact_only
def test_a_packed_linear_that_leaves_its_device_is_fake_there() -> None:
    linear = quant_linear(Grid(4), Grid(8))
    linear.pack()
    linear.to("meta")
    assert linear.backend == "fake" and linear.quantized.scale.is_meta and linear.resident_bytes == 0


@exact_only
def test_a_packed_linear_in_another_type() -> None:
    """The operand stays, the output follows the input."""
    linear, x = quant_linear(Grid(4), Grid(8), torch.zeros(O)), torch.randn(3, I).bfloat16()
    linear.pack()
    expected = linear(x.float()).bfloat16()
    assert torch.equal(linear.to(torch.bfloat16)(x), expected) and linear.backend != "fake"
    assert linear.weight.dtype == torch.bfloat16


@exact_only
@pytest.mark.parametrize("compact", [False, True])
def test_a_packed_linear_can_be_copied(compact: bool) -> None:
    linear, x = quant_linear(Grid(4), Grid(8)), torch.randn(3, I)
    if compact:
        linear.compact()
    linear.pack()
    assert torch.equal(copy.deepcopy(linear)(x), linear(x))


def test_the_first_kernel_that_works_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def names() -> list[str | None]:
        found = [find_backend("cpu", Grid(4), Grid(8), O, I, small) for small in (False, True)]
        return [None if backend is None else backend.name for backend in found]

    for onednn, int8, expected in (
        (True, True, ["onednn", "int4"]),
        (False, True, ["int_mm", "int4"]),
        (True, False, ["onednn", "onednn"]),
        (False, False, [None, None]),
    ):
        monkeypatch.setattr(cpu_onednn, "works", lambda works=onednn: works)
        monkeypatch.setattr(cpu_int8, "is_exact", lambda works=int8: works)
        assert names() == expected
    assert find_backend("mps", Grid(4), Grid(8), O, I) is None


def test_reordered_groups_and_other_devices_cannot_be_packed() -> None:
    linear = quant_linear(Grid(4), Grid(4))
    assert linear.can_pack()
    index = torch.zeros(I, dtype=torch.long)
    assert not QuantLinear(
        replace(linear.quantized, group_index=index), None, Grid(4), torch.float32
    ).can_pack()
    assert not linear.to("meta").can_pack()


@exact_only
def test_scales_move_before_packing_only() -> None:
    linear = quant_linear(Grid(4), Grid(4))
    linear.scale_rows(torch.full((O,), 0.5))
    linear.pack()
    x = torch.randn(3, I)
    torch.testing.assert_close(linear(x).double(), in_double(linear, x), atol=5e-6, rtol=1e-6)
    with pytest.raises(AssertionError, match="before it is packed"):
        linear.scale_rows(torch.full((O,), 0.5))


# Shared inputs ------------------------------------------------------------------------------------


@pytest.fixture
def quantizations(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Copies of every input that was quantized."""
    seen: list[Tensor] = []

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(x: Tensor, *rest: Any) -> Any:
            seen.append(x.clone())
            return function(x, *rest)

        return call

    monkeypatch.setattr("dllmq.models.linear.fake_quant", watched(fake_quant))
    packed = watched(cpu_int8.quantize_for)
    for kernel in (cpu_int8, cpu_onednn):
        monkeypatch.setattr(kernel, "quantize_for", packed)
    return seen


def group_of_three(grid: Grid | None = None) -> tuple[InputQuantizer, list[QuantLinear]]:
    inputs = InputQuantizer(grid or Grid(4), readers=3)
    weights = [round_to_nearest(torch.randn(O, I), Grid(4)) for _ in range(3)]
    return inputs, [QuantLinear(W, None, inputs, torch.float32) for W in weights]


def alone(linear: QuantLinear) -> QuantLinear:
    """The same linear with an input quantizer of its own."""
    own = QuantLinear(linear.quantized, None, linear.inputs.grid, torch.float32)
    if linear.backend != "fake":
        own.pack()
    return own


@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=exact_only)])
def test_an_input_is_quantized_once_for_its_readers(quantizations: list[Tensor], packed: bool) -> None:
    _, linears = group_of_three()
    for linear in linears if packed else ():
        linear.pack()
    for count in (1, 2):
        x = torch.randn(4, I)
        outputs = [linear(x) for linear in linears]
        assert len(quantizations) == count
    expected = [alone(linear)(x) for linear in linears]
    assert all(torch.equal(y, z) for y, z in zip(outputs, expected, strict=True))
    assert len(quantizations) == 2 + 3  # one reader shares nothing


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "in place": lambda x: x.mul_(-3),
    "through a view": lambda x: (x[1].add_(5), x)[1],
    "another": torch.randn_like,
    "an equal one": torch.clone,
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", CHANGES)
def test_no_reader_is_served_a_stale_input(quantizations: list[Tensor], mode: Any, change: str) -> None:
    """In inference mode too, where tensors do not count their changes."""
    _, linears = group_of_three()
    with mode():
        x = torch.randn(4, I)
        linears[0](x)
        x = CHANGES[change](x)
        outputs = [linear(x) for linear in linears[1:]]
        assert torch.equal(quantizations[-1], x)
        assert all(torch.equal(y, alone(linear)(x)) for y, linear in zip(outputs, linears[1:], strict=True))


def test_a_reader_that_never_came_leaves_no_trace(quantizations: list[Tensor]) -> None:
    """As when a hook ends a forward inside a group."""
    _, linears = group_of_three()
    linears[0](torch.randn(4, I))
    x = torch.randn(4, I)
    outputs = [linear(x) for linear in linears]
    assert len(quantizations) == 2
    assert all(torch.equal(y, alone(linear)(x)) for y, linear in zip(outputs, linears, strict=True))


@exact_only
def test_readers_of_both_backends_each_get_their_own() -> None:
    _, linears = group_of_three()
    linears[1].pack()
    x = torch.randn(4, I)
    assert all(torch.equal(linear(x), alone(linear)(x)) for linear in linears)


@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=exact_only)])
def test_nothing_is_held_after_the_last_reader(packed: bool) -> None:
    inputs, linears = group_of_three()
    for linear in linears if packed else ():
        linear.pack()
    x = torch.randn(4, I)
    watched = weakref.ref(x)
    for linear in linears:
        linear(x)
    del x
    assert watched() is None and inputs._value is None


def test_nothing_outlives_the_input_where_a_reader_reads_a_window(quantizations: list[Tensor]) -> None:
    """As in the last block: the queries of some columns, keys and values of all."""
    inputs, (q, k, v) = group_of_three()
    x = torch.randn(4, I)
    for linear, tokens in ((q, x[1:3]), (k, x), (v, x)):
        linear(tokens)
    watched = weakref.ref(x)
    assert len(quantizations) == 2 and inputs._value is not None  # a third reader of x would be served
    quantizations.clear()
    del x, tokens
    assert watched() is None and inputs._value is None


def test_a_full_precision_input_is_passed_on() -> None:
    x = torch.randn(4, I)
    assert InputQuantizer(None, readers=3).fake(x) is x


# Scales -------------------------------------------------------------------------------------------


def rescale(block: Block, row: GroupRow, s: Tensor) -> None:
    """W -> W s and x -> x / s, what a method's update with a scale amounts to without rounding."""
    for name in row.linears:
        getattr(block, name).weight.data *= s
    absorb_scale(block, row, s)


@pytest.mark.parametrize(
    ("name", "quantized"),
    [*((name, False) for name in ROWS), ("attn_out", True), ("down", True)],  # norms are not quantized
)
def test_absorbing_a_scale_preserves_the_function(name: str, quantized: bool) -> None:
    """Also where the absorber was quantized before: v_proj is before attn_out, up_proj before ff_out."""
    model, ids = tiny_model(), torch.randint(0, 38, (2, 9))
    block, row = model.blocks[1], ROWS[name]
    if quantized:
        weight = getattr(block, row.absorber).weight
        setattr(
            block, row.absorber, QuantLinear(round_to_nearest(weight, Grid(4, 8)), None, None, torch.float32)
        )
    before, weight = model(ids), getattr(block, row.absorber).weight.clone()
    rescale(block, row, torch.rand(getattr(block, row.linears[0]).weight.shape[1]) * 3 + 0.2)
    torch.testing.assert_close(model(ids), before, atol=2e-4, rtol=0)
    assert not torch.allclose(getattr(block, row.absorber).weight, weight)  # something did move


def test_absorbing_divides_a_bias_too() -> None:
    block = tiny_model().blocks[0]
    block.v_proj.bias = nn.Parameter(torch.randn(32))
    h, s = torch.randn(3, 32), torch.rand(32) + 0.5
    before = block.v_proj(h)
    absorb_scale(block, ROWS["attn_out"], s)
    torch.testing.assert_close(block.v_proj(h), before / s)


def test_what_can_absorb() -> None:
    mha, gqa = tiny_model(), tiny_model(n_kv_heads=2)
    assert all(linear_group(mha, 0, row).can_scale for row in ROWS.values())
    assert [linear_group(gqa, 0, row).can_scale for row in ROWS.values()] == [True, False, True, True]


def test_a_quantizer_on_the_path_blocks_a_scale() -> None:
    block, grid = tiny_model().blocks[0], Grid(4)
    block.product = QuantizedProduct(grid, None, None)
    assert _can_absorb(block, ROWS["attn_out"])
    block.product = QuantizedProduct(None, grid, Params(torch.ones(1, 1, 1), torch.zeros(1, 1, 1)))
    assert not _can_absorb(block, ROWS["attn_out"])
    assert _can_absorb(block, ROWS["down"])


def test_one_scale_for_a_whole_weight_cannot_take_row_scales() -> None:
    block = tiny_model().blocks[0]
    for grid, absorbs in ((Grid(4, 0), False), (Grid(4), True), (Grid(4, 8), True)):
        quantized = round_to_nearest(tiny_model().blocks[0].up_proj.weight, grid)
        block.up_proj = QuantLinear(quantized, None, None, torch.float32)
        assert _can_absorb(block, ROWS["down"]) is absorbs


# LinearGroup --------------------------------------------------------------------------------------


def test_swapped_weights_act_inside_and_come_back() -> None:
    block, x = tiny_model().blocks[0], torch.randn(4, 32)
    kept, W = block.q_proj.weight.data, torch.randn(32, 32)
    before = kept.clone()
    with swapped_weights(block, {"q_proj": W}):
        assert torch.equal(block.q_proj(x), F.linear(x, W))
    assert block.q_proj.weight.data.data_ptr() == kept.data_ptr() and torch.equal(kept, before)


def test_swapped_weights_come_back_after_an_error() -> None:
    block = tiny_model().blocks[0]
    before = {name: getattr(block, name).weight.clone() for name in ("q_proj", "k_proj")}
    with (
        pytest.raises(RuntimeError, match="inside"),
        swapped_weights(block, {name: torch.zeros(32, 32) for name in before}),
    ):
        raise RuntimeError("inside")
    with (
        pytest.raises(AttributeError),
        swapped_weights(block, {"q_proj": torch.zeros(32, 32), "nothing": torch.zeros(1)}),
    ):
        pass
    assert all(torch.equal(getattr(block, name).weight, W) for name, W in before.items())


@pytest.mark.parametrize("name", ROWS)
def test_inspect_is_the_module_with_other_weights(name: str) -> None:
    """The group's own weights give the model's values; others give what a model with them would."""
    model, row = tiny_model(), ROWS[name]
    group, block = linear_group(model, 1, row), model.blocks[1]
    X = torch.randn(2, 6, getattr(block, row.linears[0]).weight.shape[1])
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[0, :2] = False
    module = {
        "qkv": lambda: block.attention(X, model.context(6, valid)),
        "attn_out": lambda: block.attn_out(X),
        "gate_up": lambda: block.mlp(X),
        "down": lambda: block.ff_out(X),
    }[name]
    assert torch.equal(group.inspect(group.weights, X, valid), module())
    others = {linear: W + torch.randn_like(W) for linear, W in group.weights.items()}
    found = group.inspect(others, X, valid)
    for linear, W in others.items():
        getattr(block, linear).weight.data = W
    assert torch.equal(found, module())


def test_group_weights_are_named_and_in_execution_order() -> None:
    group = linear_group(tiny_model(), 1, ROWS["qkv"])
    assert group.name == "blocks.1.qkv" and list(group.weights) == ["q_proj", "k_proj", "v_proj"]
    assert group.clip == {"v_proj"}


# Codes alone ------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [Grid(3), Grid(4, 4), Grid(8, 0), Grid(2, symmetric=True)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_compact_linear_is_the_same(grid: Grid, dtype: torch.dtype) -> None:
    """Output, weight, codes, state dict and bytes; but no parameter is left of the weight."""
    quantized, bias = round_to_nearest(torch.randn(O, I), grid), torch.randn(O)
    held, compact = (QuantLinear(quantized, bias, Grid(8), dtype) for _ in range(2))
    compact.compact()
    compact.compact()  # twice is once
    x = torch.randn(2, 5, I).to(dtype)
    assert torch.equal(compact(x), held(x)) and torch.equal(compact.weight, held.weight)
    assert torch.equal(compact.quantized.codes, held.quantized.codes)
    assert (compact.shape, compact.nbytes, repr(compact)) == (held.shape, held.nbytes, repr(held))
    left, right = compact.state_dict(), held.state_dict()
    assert left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in right)
    assert [n for n, _ in compact.named_parameters()] == ["bias"] and compact.is_compact
    assert not held.is_compact


@exact_only
@pytest.mark.parametrize("compact_first", [True, False])
def test_the_packed_backend_of_a_compact_linear(compact_first: bool) -> None:
    linear, x = quant_linear(Grid(4), Grid(8), torch.randn(O)), torch.randn(3, I)
    fake = linear(x)
    steps = [linear.compact, linear.pack] if compact_first else [linear.pack, linear.compact]
    own = QuantLinear(linear.quantized, linear.bias, Grid(8), torch.float32)
    own.pack()
    for step in steps:
        step()
    assert linear.backend == "packed:int4" and torch.equal(linear(x), own(x))
    linear.unpack()
    assert linear.backend == "fake" and torch.equal(linear(x), fake)


def test_rows_of_a_compact_linear_scale_like_any() -> None:
    held, factor = quant_linear(Grid(4, 4), bias=torch.randn(O)), torch.rand(O) + 0.1
    compact = QuantLinear(held.quantized, held.bias, None, torch.float32)
    compact.compact()
    held.scale_rows(factor)
    compact.scale_rows(factor)
    x = torch.randn(3, I)
    assert torch.equal(compact(x), held(x))


@pytest.mark.parametrize("compact", [True, False])
def test_codes_go_where_the_module_goes_and_keep_their_types(compact: bool) -> None:
    linear = quant_linear(Grid(4, 4), bias=torch.randn(O))
    if compact:
        linear.compact()
    assert linear.to(torch.bfloat16).quantized.scale.dtype == torch.float32
    assert linear.weight.dtype == linear(torch.randn(2, I).bfloat16()).dtype == torch.bfloat16
    linear.to("meta")
    assert linear.quantized.scale.is_meta and linear.shape == (O, I)

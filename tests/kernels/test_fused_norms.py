"""An RMSNorm in the kernel that quantizes its output: once for all linears behind it, the same numbers."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernel_cases import DEVICE, needs_triton
from torch import Tensor

from dllmq.kernels import triton_linear
from dllmq.kernels.backends import Backend
from dllmq.methods.rtn import round_to_nearest
from dllmq.models import linear
from dllmq.models.dream import Dream, DreamConfig
from dllmq.models.fused_norms import place_norms
from dllmq.models.linear import InputQuantizer, QuantLinear
from dllmq.models.llada import LLaDA, LLaDAConfig, RMSNorm
from dllmq.numerics import Grid
from dllmq.pipeline import set_backend

pytestmark = needs_triton
I, O = 64, 32


@pytest.fixture(autouse=True)
def triton_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's kernels, interpreted, in the place of the CPU's."""
    triton = Backend("triton", triton_linear, lambda: True, triton_linear.quantize_normed)
    monkeypatch.setattr(
        linear, "find_backend",
        lambda device, w, x, O, I, small=False: triton if triton_linear.supports(w, x, O, I) else None,
    )  # fmt: skip


@pytest.fixture
def quantizations(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of every quantized input, whether a norm was computed with it."""
    seen: list[bool] = []
    own = triton_linear.quantize_inputs

    def watched(x: Tensor, grid: Grid, layout: Any, norm: Any = None) -> Any:
        seen.append(norm is not None)
        return own(x, grid, layout, norm)

    monkeypatch.setattr(triton_linear, "quantize_inputs", watched)
    return seen


def quantized(weights: Grid, inputs: InputQuantizer | Grid | None, shape: Any = (O, I)) -> QuantLinear:
    W = round_to_nearest(torch.randn(*shape), weights)
    return QuantLinear(W, None, inputs, torch.float32).to(DEVICE)


def block(linears: list[Any], norm: Any) -> Any:
    """A model of one block with one group."""
    names = [f"l{i}" for i in range(len(linears))]
    row = SimpleNamespace(absorber="norm", linears=names)
    one = SimpleNamespace(norm=norm, **dict(zip(names, linears, strict=True)))
    blocks = SimpleNamespace(children=lambda: [one])
    return SimpleNamespace(blocks=blocks, topology=SimpleNamespace(groups=(row,)))


def make_norm(dtype: torch.dtype = torch.float32) -> RMSNorm:
    """With a scale folded into its weight, as AWQ leaves it."""
    norm = RMSNorm(I, 1e-5).to(dtype).requires_grad_(False)
    norm.weight.data = ((torch.rand(I) + 0.5) / torch.rand(I).clamp(0.1)).to(dtype)
    return norm.to(DEVICE)


def integers(*shape: int) -> Tensor:
    """Their squares have an exact sum in every order."""
    return torch.randint(-9, 10, shape).float().to(DEVICE)


@pytest.mark.parametrize(
    ("weights", "inputs", "dtype"),
    [
        (Grid(4), Grid(8), torch.float32),
        (Grid(8), Grid(4), torch.float16),
        (Grid(4, 32), Grid(8, symmetric=True), torch.float16),
    ],
    ids=str,
)
def test_fused_is_norm_then_quantize_then_linear_bit_for_bit(
    weights: Grid, inputs: Grid, dtype: torch.dtype, quantizations: list[bool]
) -> None:
    norm, shared = make_norm(dtype), InputQuantizer(inputs, readers=3)
    group = [quantized(weights, shared).to(dtype) for _ in range(3)]
    for member in group:
        member.pack()
    x = integers(1, 2, I).to(dtype)
    apart = [member(norm(x)) for member in group]
    assert not norm.is_moved and quantizations == 3 * [False]  # a new tensor each time
    quantizations.clear()
    assert place_norms(block(group, norm)) == 1 and norm(x) is x
    fused = [member(norm(x)) for member in group]
    assert quantizations == [True], "one quantization for the group, with the norm in it"
    assert all(torch.equal(a, b) for a, b in zip(apart, fused, strict=True)) and apart[0].dtype == dtype


def test_the_fake_backend_applies_a_norm_that_has_moved() -> None:
    """As when one linear is unpacked, or moves to another device, behind a fused norm."""
    norm, shared = make_norm(), InputQuantizer(Grid(8), readers=2)
    group = [quantized(Grid(4), shared) for _ in range(2)]
    x = torch.randn(3, I, device=DEVICE)
    expected = [member(norm(x)) for member in group]
    for member in group:
        member.pack()
    place_norms(block(group, norm))
    for member in group:
        member.unpack()
    assert norm(x) is x
    assert all(torch.equal(member(norm(x)), y) for member, y in zip(group, expected, strict=True))
    assert place_norms(block(group, norm)) == 0 and not norm.is_moved and shared.norm is None
    assert all(torch.equal(member(norm(x)), y) for member, y in zip(group, expected, strict=True))


def other_bits() -> list[Any]:
    """4 bits want their input in two planes, 8 do not."""
    shared = InputQuantizer(Grid(8), readers=2)
    return [quantized(Grid(bits), shared) for bits in (4, 8)]


def other_groups() -> list[Any]:
    shared = InputQuantizer(Grid(8), readers=2)
    return [quantized(grid, shared) for grid in (Grid(8), Grid(8, 32))]


UNSHARED: dict[str, Callable[[], list[Any]]] = {
    "bits": other_bits,
    "groups": other_groups,
    "quantizers": lambda: [quantized(Grid(8), Grid(8)) for _ in range(2)],
    "full-precision inputs": lambda: [quantized(Grid(4), None)],
    "a plain linear": lambda: [quantized(Grid(8), Grid(8)), linear.Linear(I, O)],
}


@pytest.mark.parametrize("case", UNSHARED)
def test_a_norm_stays_where_its_readers_do_not_share(case: str) -> None:
    group, norm = UNSHARED[case](), make_norm()
    for member in group:
        if isinstance(member, QuantLinear):
            member.pack()
    assert place_norms(block(group, norm)) == 0 and not norm.is_moved
    assert all(member.inputs.norm is None for member in group if isinstance(member, QuantLinear))


def llada() -> LLaDA:
    config = LLaDAConfig(d_model=32, n_layers=1, n_heads=2, mlp_hidden_size=32, vocab_size=40,
                         mask_token_id=39, eos_token_id=38)  # fmt: skip
    model = LLaDA(config)
    model.init_weights(torch.Generator().manual_seed(0), gain=3.0)
    return model


def dream() -> Dream:
    config = DreamConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                         intermediate_size=32, vocab_size=40, mask_token_id=39, eos_token_id=38,
                         rope_theta=1e4)  # fmt: skip
    return Dream(config)


def packed(make: Callable[[], Any]) -> Any:
    """With the packed backend, linears of a group sharing their quantizer."""
    model = make().requires_grad_(False).eval()
    for each in model.blocks:
        for row in model.topology.groups:
            shared = InputQuantizer(Grid(8), readers=len(row.linears))
            for name in row.linears:
                setattr(each, name, quantized(Grid(8), shared, getattr(each, name).weight.shape))
    assert set_backend(model.to(DEVICE), "packed") == "packed:triton"
    return model


def moved(model: Any) -> list[bool]:
    return [m.is_moved for m in model.modules() if isinstance(m, RMSNorm)]


@pytest.mark.parametrize("make", [llada, dream])
def test_backends_place_both_norms_of_a_block(make: Callable[[], Any]) -> None:
    """Not the one in front of the head, which reads it in full precision."""
    model = packed(make)
    assert sorted(moved(model)) == [False, True, True]
    assert set_backend(model, "fake") == "fake" and not any(moved(model))


def test_a_packed_model_quantizes_each_groups_input_once(quantizations: list[bool]) -> None:
    """Four groups a block, two of them behind a norm; the outputs are the fake backend's."""
    model, ids = packed(llada), torch.arange(2, device=DEVICE)[None]
    with torch.no_grad():
        fused = model(ids)
        assert quantizations == [True, False, True, False]
        set_backend(model, "fake")
        torch.testing.assert_close(fused, model(ids), rtol=1e-2, atol=2e-2)

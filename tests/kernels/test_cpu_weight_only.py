"""Full-precision inputs on CPU: weights are dequantized as `QuantizedTensor`'s, whatever the blocks."""

from itertools import product

import pytest
import torch
from torch import Tensor

from dllmq.kernels import cpu_weight_only
from dllmq.kernels.cpu_weight_only import Operand
from dllmq.methods.rtn import round_to_nearest
from dllmq.models.linear import QuantLinear
from dllmq.numerics import Grid

BLOCKS = [(256, 1 << 19), (6, 64), (5, 1)]  # outputs; values of a part


def whole(operand: Operand, dtype: torch.dtype) -> Tensor:
    blocks = [(at, W.clone()) for at, W in operand.dequantized(dtype)]
    assert [(at.start, at.stop - at.start) for at, _ in blocks] == [
        (operand.outputs * i, W.shape[1]) for i, (_, W) in enumerate(blocks)
    ]
    return torch.cat([W for _, W in blocks], 1).T


@pytest.mark.parametrize(("outputs", "cached"), BLOCKS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_weights_are_dequantized_bit_for_bit(
    bits: int, outputs: int, cached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every width, group and shape: full bytes and not, halved tiles, a last short block."""
    monkeypatch.setattr(cpu_weight_only, "OUTPUTS", outputs)
    monkeypatch.setattr(cpu_weight_only, "CACHED", cached)
    for group, symmetric, O in product((-1, 0, 3, 8, 24), (False, True), (1, 13)):
        q = round_to_nearest(torch.randn(O, 48) + 0.3, Grid(bits, group, symmetric))
        operand = cpu_weight_only.prepare(q, None)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert torch.equal(whole(operand, dtype), q.dequantize().to(dtype))
        zero = q.zero.long().expand(O, -1)
        steps = q.codes.long() - zero.repeat_interleave(48 // zero.shape[1], 1)
        assert torch.equal(operand.steps().long(), steps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_product_is_the_definition_up_to_rounding(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the weight, the sums and the output; two blocks of outputs, the last one short."""
    monkeypatch.setattr(cpu_weight_only, "CACHED", 1 << 12)
    q, bias = round_to_nearest(torch.randn(300, 64), Grid(4, 32)), torch.randn(300).to(dtype)
    x = torch.randn(2, 5, 64).to(dtype)
    y = cpu_weight_only.quant_linear(x, cpu_weight_only.prepare(q, None), None, bias)
    W = q.dequantize().double()
    expected = x.double() @ W.T + bias.double()
    unit, terms = torch.finfo(dtype).eps / 2, x.double().abs() @ W.abs().T
    assert y.dtype == dtype and y.shape == (2, 5, 300)
    assert bool(((y.double() - expected).abs() <= unit * (terms + expected.abs()) + 2.0**-18 * terms).all())


@pytest.mark.parametrize(("bits", "group"), [(2, -1), (3, 32), (4, -1), (4, 64), (8, 32)])
def test_bytes_that_are_held(bits: int, group: int) -> None:
    """Codes at their width; a group's scale in fp32; its zero in a byte, here and for the codes' way back."""
    O, I = 512, 128
    q = round_to_nearest(torch.randn(O, I), Grid(bits, group))
    linear = QuantLinear(q, None, None, torch.bfloat16)
    linear.pack()
    assert linear.backend == "packed:weight_only"
    assert linear.resident_bytes == O * I * bits // 8 + (4 + 1 + 1) * q.scale.numel()

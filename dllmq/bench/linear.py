"""Section `linear`: one linear of LLaDA-8B's sizes, bf16 `F.linear` against QuantLinear, packed and fake.

A packed product is checked against the definition y = Q_a(x) Deq(Q_w)^T in float64: its output may differ by
the rounding to bfloat16 and of the fp32 scalings, EXACT times the largest |y|. (That the integer sums are
exact is tested in tests/kernels.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dllmq.bench.generate import packs
from dllmq.bench.rows import Sheet, timed_row
from dllmq.bench.shapes import Setup
from dllmq.bench.timing import interleaved
from dllmq.methods.rtn import round_to_nearest
from dllmq.models.linear import QuantLinear
from dllmq.numerics import Grid, fake_quant
from dllmq.recipe import FULL_PRECISION_BITS, Bits

WIDTHS = ("w8a8", "w4a8", "w4a8 compact", "w4a4", "w4a16")
SIZES = ((4096, 12288), (12288, 4096))  # inputs, outputs: gate and up, down
TOKENS = (1, 32, 256, 1024)
CHECKED = 16  # tokens that are checked in float64
EXACT = 2.0**-8  # half a bfloat16 ulp is 2^-9 of the value


@dataclass(frozen=True)
class Case:
    """What is multiplied: T tokens of I inputs with a weight [O, I]."""

    bits: str
    backend: str
    I: int
    O: int
    T: int


def measure(setup: Setup, sheet: Sheet) -> None:
    """Adds the section's rows."""
    sizes, tokens = (((64, 96),), (1, 8)) if setup.quick else (SIZES, TOKENS)
    for I, O in sizes:
        W = torch.randn(O, I, generator=torch.Generator().manual_seed(0)) / I**0.5
        for bits in WIDTHS:
            fake, packed = (quant_linear(W, bits, setup.device) for _ in range(2))
            if not (backend := packs(packed, bits, sheet)):
                continue
            full = W.to(setup.device, torch.bfloat16)
            for T in tokens:
                compare(setup, sheet, Case(bits, backend, I, O, T), full, (fake, packed))


def quant_linear(W: Float[Tensor, "O I"], bits: str, device: torch.device) -> nn.Sequential:
    """A model of one quantized linear, "w4a8 compact": that keeps its codes at their width."""
    width = Bits.parse(bits.partition(" ")[0])
    inputs = None if width.activation == FULL_PRECISION_BITS else Grid(width.activation)
    quantized = round_to_nearest(W.to(device), Grid(width.weight))
    made = QuantLinear(quantized, None, inputs, torch.bfloat16)
    if bits.endswith("compact"):
        made.compact()
    return nn.Sequential(made)


@torch.no_grad()
def compare(
    setup: Setup, sheet: Sheet, case: Case, full: Tensor, linears: tuple[nn.Sequential, nn.Sequential]
) -> None:
    """bf16, fake, packed in the same rounds."""
    fake, packed = linears
    rng = torch.Generator().manual_seed(case.T)
    x = torch.randn(case.T, case.I, generator=rng).to(setup.device, torch.bfloat16)
    runs: dict[str, Callable[[], Tensor]] = {
        "bf16": lambda: F.linear(x, full),
        "fake": lambda: fake(x),
        "packed": lambda: packed(x),
    }
    found = interleaved(runs, setup.repeats, setup.device)
    key, size = f"linear.{case.bits.replace(' ', '_')}", f"{case.T} x {case.I} -> {case.O}"
    pair, equal = (found["bf16"], found["packed"]), is_exact(packed, x, found["packed"].output)
    names, fake_s = ("bf16 F.linear", case.backend), {"fake_s": found["fake"].median}
    sheet.add(timed_row(key, f"{case.bits} linear", size, names, pair, equal, numbers=fake_s))


def is_exact(packed: nn.Sequential, x: Tensor, y: Tensor) -> bool:
    """Whether the first tokens' outputs are the definition's, up to EXACT of the largest."""
    linear = packed[0]
    assert isinstance(linear, QuantLinear)
    x = x[:CHECKED]
    grid = linear.inputs.grid
    read = x.float().cpu()  # CUDA divides by a constant through its reciprocal, which moves some scales
    read = (read if grid is None else fake_quant(read, grid)).to(x.device).double()
    weight = linear.quantized.dequantize().double()
    expected = read @ weight.T
    error = (y[:CHECKED].double() - expected).abs().max()
    return bool(error <= EXACT * expected.abs().max())

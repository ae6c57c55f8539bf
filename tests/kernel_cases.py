"""What the tests of kernels share: where they run, and numbers that are hard to round."""

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # interpreted on the CPU
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed (pip install triton; Linux on x86-64)"
)
KINDS = ("normal", "ties", "equal", "zero", "subnormal", "ends", "positive", "negative", "outlier")


def row(kind: str, I: int, bits: int) -> Tensor:
    """A token or a row of weights: `ties` lie on grid points and half-way between two of them, `ends` holds
    the two ends of its range only."""
    top = 2**bits - 1
    halves = torch.randint(-top, top + 1, (I,))
    halves[:2] = torch.tensor([-top, top])
    return {
        "normal": torch.randn(I),
        "ties": halves / 2 * torch.rand(1),
        "equal": torch.randn(1).expand(I),
        "zero": torch.zeros(I),
        "subnormal": torch.full((I,), -1e-42),
        "ends": torch.randint(0, 2, (I,)) * 2.5 - 1,
        "positive": torch.rand(I) + 7,
        "negative": -torch.rand(I) * 1e-4 - 1e-2,
        "outlier": torch.randn(I) * (1 + 300 * (torch.arange(I) == I // 2)),
    }[kind]


def sparse_rows(I: int) -> Tensor:
    """Tokens whose codes mostly lie at one end of an asymmetric grid: products of codes are large and cancel.

    All zero, zeros in front of small values, every other one zero, a spike of either sign among zeros and
    among small values.
    """
    x = torch.randn(7, I) * 0.01
    x[0], x[1, : I // 32], x[2, ::2], x[3:5] = 0, 0, 0, 0
    x[3:, I // 3] = torch.tensor([1000.0, -1000.0, 3.0, -3.0])
    return x


def rows(I: int, bits: int) -> Tensor:
    """One of each kind."""
    return torch.stack([row(kind, I, bits) for kind in KINDS])

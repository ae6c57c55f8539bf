"""RMSNorm and RoPE by their formulas, one number after the other: what the models are compared with."""

import cmath
import math

import torch
from torch import Tensor


def reference_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.stack([row / math.sqrt(float((row * row).sum()) / len(row) + eps) * weight for row in x])


def reference_rope(x: Tensor, theta: float) -> Tensor:
    """x [L, h]: (x_i, x_{i + h/2}) turned by the angle position * theta^(-2i/h), as complex numbers."""
    out, half = x.clone(), x.shape[1] // 2
    for position in range(len(x)):
        for i in range(half):
            pair = complex(float(x[position, i]), float(x[position, i + half]))
            pair *= cmath.exp(1j * position * theta ** (-2 * i / x.shape[1]))
            out[position, i], out[position, i + half] = pair.real, pair.imag
    return out

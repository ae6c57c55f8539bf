"""QuantLinear, the only module that is ever swapped into a model.

One definition of its arithmetic: y = Q_a(x) Deq(Q_w)^T + b, where Q_w are the weight's codes under its grid
and Q_a quantizes the input under the activation grid, dynamically, per token or per group of channels. The
`fake` backend computes it in the input's dtype on dequantized values.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dllmq.kernels.cpu_linear import linear
from dllmq.numerics import Grid, QuantizedTensor, fake_quant


class Linear(nn.Linear):
    """A full-precision linear; inference on CPU takes the fast kernel."""

    def forward(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        return linear(x, self.weight, self.bias)


class QuantLinear(nn.Module):
    """A linear with quantized weight and, with `act_grid`, a dynamically quantized input.

    Args:
        quantized: codes, scales and zeros of the weight [O, I].
        bias: [O] or None.
        act_grid: grid of the input (group_size -1: one scale per token), None for a full-precision input.
        dtype: of the computation.
    """

    backend = "fake"

    def __init__(
        self, quantized: QuantizedTensor, bias: Tensor | None, act_grid: Grid | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.quantized = quantized
        self.act_grid = act_grid
        self.weight = nn.Parameter(quantized.dequantize().to(dtype), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().to(dtype), requires_grad=False)

    def forward(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        if self.act_grid is not None:
            x = fake_quant(x, self.act_grid)
        return linear(x, self.weight, self.bias)

    @torch.no_grad()
    def scale_rows(self, factor: Float[Tensor, " O"]) -> None:
        """y -> y * factor, exactly: the codes stay, the row scales change."""
        q = self.quantized
        self.quantized = replace(q, scale=q.scale * factor[:, None].to(q.scale))
        self.weight.data = self.quantized.dequantize().to(self.weight.dtype)
        if self.bias is not None:
            self.bias.data = (self.bias.data.float() * factor).to(self.bias.dtype)

    def extra_repr(self) -> str:
        O, I = self.weight.shape
        return f"in={I}, out={O}, weight={self.quantized.grid}, input={self.act_grid}, backend={self.backend}"

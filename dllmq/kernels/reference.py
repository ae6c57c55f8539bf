"""The definition every low-bit kernel must equal, written plainly: integers, segment by segment.

    y = sum over segments n of  s_x s_w sum_i (q_x,i - z_x)(q_w,i - z_w)  + b

Exact sums in int64, everything else in fp64: what is left between this and a kernel is the kernel's rounding.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dllmq.kernels.cpu_inputs import segment
from dllmq.numerics import Grid, Params, QuantizedTensor, fit, quantize


def reference_linear(
    x: Float[Tensor, "T I"], weight: QuantizedTensor, inputs: Grid | None, bias: Tensor | None = None
) -> Float[Tensor, "T O"]:
    """The linear in fp64."""
    if inputs is None:
        y = x.double() @ weight.dequantize().double().T
        return y if bias is None else y + bias.double()
    I, S, params = x.shape[1], segment(weight.grid, inputs, x.shape[1]), fit(x, inputs)
    sums = integer_sums(x, weight, inputs)
    s_x, s_w = _by_segment(params.scale, I // S), _by_segment(weight.scale, I // S)
    y = torch.einsum("tn,on,nto->to", s_x, s_w.expand(len(weight.codes), -1), sums.double())
    return y if bias is None else y + bias.double()


def integer_sums(x: Float[Tensor, "T I"], weight: QuantizedTensor, inputs: Grid) -> Int[Tensor, "N T O"]:
    """sum_i (q_x - z_x)(q_w - z_w) over each segment."""
    S, params = segment(weight.grid, inputs, x.shape[1]), fit(x, inputs)
    ours = _steps(quantize(x, params, inputs), params).unflatten(1, (-1, S)).transpose(0, 1)
    theirs = _steps(weight.codes, Params(weight.scale, weight.zero)).unflatten(1, (-1, S)).permute(1, 2, 0)
    return ours @ theirs


def _steps(codes: Tensor, params: Params) -> Int[Tensor, "R I"]:
    """q - z."""
    groups = codes.long().unflatten(1, (params.zero.shape[1], -1))
    return (groups - params.zero.long()[..., None]).flatten(1)


def _by_segment(groups: Float[Tensor, "R G"], N: int) -> Float[Tensor, "R N"]:
    """A group's number at each of its segments."""
    return groups.double().repeat_interleave(N // groups.shape[1], 1)

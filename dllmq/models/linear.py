"""QuantLinear, the only module that quantization swaps into a model.

One definition of its arithmetic: y = Q_a(x) Deq(Q_w)^T + b, where Q_w are the weight's codes under its grid
and Q_a quantizes the input under the activation grid, dynamically, per token or per group of channels. Two
backends compute it:

    fake     dequantized values, a product in the input's dtype; takes every grid
    packed   the integer product of the codes (kernels/), scaled once: equal up to the rounding of the output

Linears that read the same input share its quantization (`InputQuantizer`).

What a QuantLinear keeps in memory is settled by `compact`: beside its codes the dequantized weight (or the
operand of the packed backend), ready for the next product; or the codes alone, packed at their width, and the
rest is made again in each product. The numbers are the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dllmq.kernels import cpu_int8
from dllmq.kernels.cpu_linear import linear
from dllmq.numerics import Grid, QuantizedTensor, fake_quant
from dllmq.numerics.packed import PackedTensor

BACKENDS = ("auto", "fake", "packed")


class Linear(nn.Linear):
    """A full-precision linear; inference on CPU takes the fast kernel."""

    def forward(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        return linear(x, self.weight, self.bias)


class InputQuantizer:
    """Quantizes an input once for the `readers` linears of a group that read it one after the other.

    Args:
        grid: of the input, None leaves it in full precision.
        readers: how many linears read the same tensor; after the last one nothing is held.
    """

    def __init__(self, grid: Grid | None, readers: int = 1) -> None:
        self.grid, self.readers = grid, readers
        self._source: Tensor | None = None
        self._key, self._value, self._left = ("", 0), None, 0

    def fake(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... I"]:
        """Deq(Q_a(x))."""
        grid = self.grid
        return x if grid is None else self._once(x, "fake", lambda: fake_quant(x, grid))

    def packed(self, x: Float[Tensor, "... I"]) -> cpu_int8.Operand:
        """Codes and scales of x's tokens."""
        grid = self.grid
        assert grid is not None, "a packed product has a quantized input"
        return self._once(x, "packed", lambda: cpu_int8.input_operand(x.reshape(-1, x.shape[-1]), grid))

    def _once(self, x: Tensor, kind: str, make: Callable[[], Any]) -> Any:
        if self.readers == 1 or x.is_inference():  # inference tensors do not tell when they are changed
            return make()
        key = (kind, x._version)
        if self._source is not x or self._key != key:
            self._source, self._key, self._value, self._left = x, key, make(), self.readers
        value = self._value
        self._left -= 1
        if self._left <= 0:
            self._source = self._value = None
        return value


class InputQuantLinear(Linear):
    """A linear with plain weights (dequantized ones, read from a file) and a quantized input."""

    def __init__(self, weight: Tensor, bias: Tensor | None, inputs: InputQuantizer) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=False)
        self.inputs = inputs

    def forward(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        return super().forward(self.inputs.fake(x))


class QuantLinear(nn.Module):
    """A linear with quantized weight and, where its input grid says so, a dynamically quantized input.

    Args:
        quantized: codes, scales and zeros of the weight [O, I].
        bias: [O] or None.
        inputs: grid of the input (group_size -1: one scale per token), None for a full-precision input; or
            the quantizer shared with the group's other linears.
        dtype: of the computation.
    """

    def __init__(
        self,
        quantized: QuantizedTensor,
        bias: Tensor | None,
        inputs: Grid | InputQuantizer | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self._stored: QuantizedTensor | PackedTensor = quantized
        self._dtype = dtype
        self.inputs = inputs if isinstance(inputs, InputQuantizer) else InputQuantizer(inputs)
        self.weight = nn.Parameter(quantized.dequantize().to(dtype), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().to(dtype), requires_grad=False)
        self.backend = "fake"
        self._operand: cpu_int8.Operand | None = None

    def __getattr__(self, name: str) -> Any:
        """`weight` of a compact linear is dequantized each time it is asked for."""
        if name == "weight" and self.is_compact:
            return self.quantized.dequantize().to(self._dtype)
        return super().__getattr__(name)

    @property
    def quantized(self) -> QuantizedTensor:
        """Codes, scales and zeros; of a compact linear unpacked each time they are asked for."""
        return self._stored.unpacked()

    @property
    def is_compact(self) -> bool:
        """Whether the packed codes are all there is of the weight."""
        return isinstance(self.__dict__.get("_stored"), PackedTensor)

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I), without unpacking anything."""
        return self._stored.shape

    @property
    def nbytes(self) -> int:
        """Bytes that store the weight exactly."""
        return self._stored.nbytes

    @torch.no_grad()
    def compact(self) -> None:
        """Keeps the codes alone, packed at their width; nothing to do where they were given away (meta)."""
        if not self.is_compact and not self._stored.scale.is_meta:
            self._stored = PackedTensor.of(self.quantized)
            self._operand = None
            del self.weight

    def forward(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        if self.backend == "fake":
            return linear(self.inputs.fake(x), self.weight, self.bias)
        y = cpu_int8.int8_linear(self.inputs.packed(x), self._weight_operand(), self.bias)
        return y.to(x.dtype).reshape(*x.shape[:-1], y.shape[-1])

    def can_pack(self) -> bool:
        """Whether the packed backend takes these grids on this device."""
        stored = self._stored
        on_cpu = stored.scale.device.type == "cpu" and stored.group_index is None
        return on_cpu and cpu_int8.supports(stored.grid, self.inputs.grid, self.shape[1])

    @torch.no_grad()
    def pack(self) -> None:
        """Changes to the packed backend."""
        assert self.can_pack(), f"the packed backend does not take {self}"
        self.backend = "packed"
        self._operand = None if self.is_compact else self._weight_operand()

    def unpack(self) -> None:
        """Changes back to the fake backend."""
        self.backend, self._operand = "fake", None

    @torch.no_grad()
    def scale_rows(self, factor: Float[Tensor, " O"]) -> None:
        """y -> y * factor, exactly: the codes stay, the row scales change."""
        assert self.backend == "fake", "scales move while a model is quantized, before it is packed"
        scale = self._stored.scale
        self._stored = replace(self._stored, scale=scale * factor[:, None].to(scale))
        if not self.is_compact:
            self.weight.data = self.quantized.dequantize().to(self._dtype)
        if self.bias is not None:
            self.bias.data = (self.bias.data.float() * factor).to(self.bias.dtype)

    def _weight_operand(self) -> cpu_int8.Operand:
        return cpu_int8.weight_operand(self.quantized) if self._operand is None else self._operand

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """The state dict has the weight whether or not it is held."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.is_compact:
            destination[prefix + "weight"] = self.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Codes go to the device the parameters go to (torch moves only those); their types never change."""
        super()._apply(fn, recurse)
        here = self._stored.scale.device
        moved = fn(torch.empty(0, dtype=self._dtype, device=here))
        self._dtype = moved.dtype
        if moved.device != here:
            self._stored, self._operand = self._stored.to(moved.device), None
        return self

    def extra_repr(self) -> str:
        O, I = self.shape
        grids = f"weight={self._stored.grid}, input={self.inputs.grid}"
        return f"in={I}, out={O}, {grids}, backend={self.backend}"

"""QuantLinear, the only module that quantization swaps into a model.

One definition of its arithmetic: y = Q_a(x) Deq(Q_w)^T + b, where Q_w are the weight's codes under its grid
and Q_a quantizes the input under the activation grid, dynamically, per token or per group of channels. Two
backends compute it:

    fake     dequantized values, a product in the input's dtype; takes every grid
    packed   the product of the codes by one of the device's kernels (kernels/backends.py): exact integer sums
             between two changes of a scale, scaled and added in fp32; equal up to that rounding

Linears that read the same input share its quantization (`InputQuantizer`).

What a QuantLinear holds of its weight:

    fake                 codes, a byte each, and the dequantized weight, ready for the next product
    fake, compact        the codes alone, packed at their width; a product dequantizes the whole weight
    packed               the kernel's operand alone: on CPU a byte a weight, in oneDNN's order
    packed, compact      the same, at half a byte where weights have up to 4 bits; a product widens them

Scales and zeros are held besides. Compact or not the numbers are the same bit for bit.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dllmq.kernels.backends import Backend, find_backend, pays
from dllmq.kernels.cpu_linear import linear
from dllmq.numerics import Grid, QuantizedTensor, fake_quant
from dllmq.numerics.grid import stored_bytes
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

    Some readers may never come (the last block's queries read a window of the columns, a tensor of its own):
    the tensor is not held at all, and what was made of it goes with it.

    Attributes:
        norm: an RMSNorm that is computed here, as its kernel quantizes in the same pass (fused_norms.py).
    """

    def __init__(self, grid: Grid | None, readers: int = 1) -> None:
        self.grid, self.readers = grid, readers
        self._source: weakref.ref[Tensor] | None = None
        self._key: object = None
        self._value, self._left = None, 0
        self.norm: Any = None

    def take_norm(self, norm: Any) -> None:
        """From here on inputs are what this norm (None: no norm) reads."""
        self.norm = norm
        self._source = self._value = None

    def fake(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... I"]:
        """Deq(Q_a(x))."""
        grid = self.grid
        return x if grid is None else self._once(x, "fake", lambda: fake_quant(self._normed(x), grid))

    def packed(self, x: Float[Tensor, "... I"], backend: Backend, operand: Any) -> Any:
        """x's tokens as a kernel's operand wants them."""
        grid, kernel = self.grid, backend.kernel
        assert grid is not None, "a packed product has a quantized input"

        def quantize() -> Any:
            if self.norm is None or backend.quantize_normed is None:
                return kernel.quantize_for(_rows(self._normed(x)), operand, grid)
            return backend.quantize_normed(_rows(x), operand, grid, self.norm.weight, self.norm.eps)

        return self._once(x, (backend.name, operand.layout), quantize)

    def _normed(self, x: Tensor) -> Tensor:
        return x if self.norm is None else self.norm.normed(x)

    def _once(self, x: Tensor, kind: object, make: Callable[[], Any]) -> Any:
        if self.readers == 1 or x.is_inference():  # inference tensors do not tell when they are changed
            return make()
        key = (kind, x._version)
        if self._source is None or self._source() is not x or self._key != key:
            self._value, self._left = make(), self.readers
            self._source, self._key = weakref.ref(x, self._forget), key
        value = self._value
        self._left -= 1
        if self._left <= 0:
            self._source = self._value = None
        return value

    def _forget(self, source: weakref.ref[Tensor]) -> None:
        """What was made of a tensor that is no more."""
        if self._source is source:
            self._source = self._value = None


def _rows(x: Float[Tensor, "*rows I"]) -> Float[Tensor, "T I"]:
    return x.reshape(-1, x.shape[-1])


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


@dataclass(frozen=True)
class Prepared:
    """A weight that a kernel holds: its operand, and what gives the codes back.

    Attributes:
        operand: of `backend`'s kernel.
        scale: as `QuantizedTensor`'s, the operand's own where they are the same numbers; zero: in uint8.
        grid, shape: as `QuantizedTensor`'s.
    """

    backend: Backend
    operand: Any
    scale: Tensor
    zero: Tensor
    grid: Grid
    shape: tuple[int, int]
    group_index: None = None  # kernels take groups of neighbours

    @classmethod
    def of(cls, q: QuantizedTensor, backend: Backend, inputs: Grid | None) -> Prepared:
        operand = backend.kernel.prepare(q, inputs)
        scale = operand.scale.T if operand.scale.T.shape == q.scale.shape else q.scale
        return cls(backend, operand, scale, q.zero.to(torch.uint8), q.grid, q.shape)

    def unpacked(self) -> QuantizedTensor:
        """The tensor this was made of, bit for bit."""
        zero = self.zero.to(torch.int16)
        steps = self.operand.steps().to(torch.int16).unflatten(1, (zero.shape[1], -1))
        codes = (steps + zero[..., None]).flatten(1).to(self.grid.dtype)
        return QuantizedTensor(codes, self.scale.contiguous(), self.zero.float(), self.grid)

    @property
    def nbytes(self) -> int:
        """As `QuantizedTensor.nbytes`."""
        return stored_bytes(self.shape, self.scale, self.zero, self.grid, None)


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
        self._stored: QuantizedTensor | PackedTensor | Prepared = quantized
        self._dtype = dtype
        self.is_compact = False  # whether as little as possible is held of the weight
        self.inputs = inputs if isinstance(inputs, InputQuantizer) else InputQuantizer(inputs)
        self.weight = nn.Parameter(quantized.dequantize().to(dtype), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().to(dtype), requires_grad=False)
        self._prepared: Prepared | None = None  # `_stored`, where a kernel holds it

    def __getattr__(self, name: str) -> Any:
        """`weight`, where it is not held, is dequantized each time it is asked for."""
        if name == "weight" and not self.holds_weight:
            stored = self._stored
            whole = stored if isinstance(stored, PackedTensor) else PackedTensor.of(stored.unpacked())
            return whole.dequantize(self._dtype)
        return super().__getattr__(name)

    @property
    def quantized(self) -> QuantizedTensor:
        """Codes, scales and zeros; of a compact or packed linear unpacked each time they are asked for."""
        return self._stored.unpacked()

    @property
    def grid(self) -> Grid:
        """Of the weight."""
        return self._stored.grid

    @property
    def holds_weight(self) -> bool:
        """Whether the dequantized weight is a parameter."""
        return isinstance(self.__dict__.get("_stored"), QuantizedTensor)

    @property
    def backend(self) -> str:
        """fake, or packed and the kernel's name: packed:onednn."""
        return "fake" if self._prepared is None else f"packed:{self._prepared.backend.name}"

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I), without unpacking anything."""
        return self._stored.shape

    @property
    def nbytes(self) -> int:
        """Bytes that store the weight exactly."""
        return self._stored.nbytes

    @property
    def resident_bytes(self) -> int:
        """Bytes of memory that the linear takes now, whatever form its weight has."""
        held = [x for x in (*_tensors(self._stored), *self.parameters()) if not x.is_meta]
        return sum({id(x) if x.is_mkldnn else x.data_ptr(): x.nbytes for x in held}.values())

    @torch.no_grad()
    def compact(self) -> None:
        """Keeps as little as possible of the weight; nothing to do where it was given away (meta)."""
        if self.is_compact or self._stored.scale.is_meta:
            return
        packed = self._prepared is not None
        self.is_compact = True
        self._hold(self.quantized)
        if packed:
            self.pack()

    def forward(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        prepared, grid = self._prepared, self.inputs.grid
        if prepared is None:
            return linear(self.inputs.fake(x), self.weight, self.bias)
        kernel, operand = prepared.backend.kernel, prepared.operand
        if grid is None:
            return kernel.quant_linear(x, operand, None, self.bias)
        rows = self.inputs.packed(x, prepared.backend, operand)
        y = kernel.integer_linear(rows, operand, self.bias, x.dtype)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    @property
    def prepared(self) -> Prepared | None:
        """What its kernel reads; None with the fake backend."""
        return self._prepared

    def find_backend(self) -> Backend | None:
        """The kernel that the packed backend would use for these grids on this device, None without one."""
        stored = self._stored
        if stored.group_index is not None:
            return None
        device = stored.scale.device.type
        return find_backend(device, stored.grid, self.inputs.grid, *self.shape, small=self.is_compact)

    def can_pack(self) -> bool:
        """Whether the packed backend takes these grids on this device and processor."""
        return self.find_backend() is not None

    @property
    def pays(self) -> bool:
        """Whether the packed backend is the faster one, where there is a kernel."""
        device = self._stored.scale.device.type
        return pays(device, self.grid, self.inputs.grid, self.shape[1], self._dtype)

    @torch.no_grad()
    def pack(self) -> None:
        """Changes to the packed backend: from here on its operand is all there is of the weight."""
        if self._prepared is not None:
            return
        backend = self.find_backend()
        assert backend is not None, f"the packed backend does not take {self}"
        self._prepared = Prepared.of(self.quantized, backend, self.inputs.grid)
        self._stored = self._prepared
        self._parameters.pop("weight", None)

    @torch.no_grad()
    def unpack(self) -> None:
        """Changes back to the fake backend."""
        if self._prepared is not None:
            self._hold(self.quantized)

    def _hold(self, quantized: QuantizedTensor) -> None:
        """Holds the weight as the fake backend does."""
        self._prepared = None
        if self.is_compact:
            self._stored = PackedTensor.of(quantized)
            self._parameters.pop("weight", None)
        else:
            self._stored = quantized
            self.weight = nn.Parameter(quantized.dequantize().to(self._dtype), requires_grad=False)

    @torch.no_grad()
    def scale_rows(self, factor: Float[Tensor, " O"]) -> None:
        """y -> y * factor, exactly: the codes stay, the row scales change."""
        assert self.backend == "fake", "scales move while a model is quantized, before it is packed"
        scale = self._stored.scale
        self._stored = replace(self._stored, scale=scale * factor[:, None].to(scale))
        if self.holds_weight:
            self.weight.data = self.quantized.dequantize().to(self._dtype)
        if self.bias is not None:
            self.bias.data = (self.bias.data.float() * factor).to(self.bias.dtype)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """The state dict has the weight whether or not it is held."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.holds_weight:
            destination[prefix + "weight"] = self.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Codes go to the device the parameters go to (torch moves only those); their types never change.

        On another device another kernel would compute it: there the linear starts with the fake backend.
        """
        here = self._stored.scale.device
        moved = fn(torch.empty(0, dtype=self._dtype, device=here))
        if moved.device != here:
            self.unpack()
        super()._apply(fn, recurse)
        self._dtype = moved.dtype
        if moved.device != here:
            assert not isinstance(self._stored, Prepared)
            self._stored = self._stored.to(moved.device)
        return self

    def extra_repr(self) -> str:
        O, I = self.shape
        grids = f"weight={self._stored.grid}, input={self.inputs.grid}"
        return f"in={I}, out={O}, {grids}, backend={self.backend}"


def _tensors(value: object) -> Iterator[Tensor]:
    """Every tensor in dataclasses and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))
    elif isinstance(value, tuple):
        for item in value:
            yield from _tensors(item)

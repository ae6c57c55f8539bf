"""Finished blocks of a quantization that is under way, so that one that was killed goes on where it stopped.

Each is an entry of a `Cache`: whole or absent, checked against its sha256, made by one process at a time. An
entry holds what quantization changed in the block (packed codes, scales, zeros and group indices, biases,
norms that absorbed a scale, V's static scales), the method's notes and the seconds it took; what is
quantized dynamically is in the recipe. Restored, the block is the one that was stored, bit for bit:
`QuantLinear` makes its weight from the same numbers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dllmq.cache import Cache, load_tensors, save_tensors
from dllmq.models.attention import QuantizedProduct
from dllmq.models.base import Block, Topology
from dllmq.models.linear import InputQuantizer, QuantLinear
from dllmq.numerics import Grid, Params
from dllmq.numerics.packed import PackedTensor

Notes = dict[str, dict[str, float]]
_ABOUT = "about"  # the tensor that holds the JSON
_OWN = "own."  # in front of the names of parameters that belong to no quantized linear


@dataclass(frozen=True)
class Grids:
    """What the recipe says about a block beside its weights: grids of inputs and of the attention product."""

    inputs: Grid | None
    P: Grid | None = None
    V: Grid | None = None
    QK: Grid | None = None


@dataclass
class BlockStore:
    """Blocks of one quantization.

    Attributes:
        cache: where; key: of everything the quantized model depends on.
        restored: blocks that were read; seconds: that they had taken when they were made.
    """

    cache: Cache
    key: str
    restored: int = 0
    seconds: float = 0.0

    def settle(
        self, index: int, block: Block, topology: Topology, grids: Grids, quantize: Callable[[], Notes]
    ) -> tuple[Notes, bool]:
        """Quantizes a block by `quantize`, or makes it what it had become before.

        Returns:
            The method's notes, and whether the block was restored.
        """

        def make() -> dict[str, Tensor]:
            start = time.perf_counter()
            notes = quantize()
            return block_tensors(block, topology, {"notes": notes, "seconds": time.perf_counter() - start})

        def load(path: Path) -> dict[str, Tensor]:
            return check_fit(load_tensors(path), block, topology)

        parts = {"quantization": self.key, "block": index}
        tensors, found = self.cache.get("block", parts, make, save_tensors, load)
        about = _about(tensors)
        if found:
            restore(block, topology, grids, tensors)
            self.restored += 1
            self.seconds += about["seconds"]
        return about["notes"], found


def block_tensors(block: Block, topology: Topology, about: dict[str, Any]) -> dict[str, Tensor]:
    """Everything quantization may have changed in a block, by name; `about` are JSON values."""
    tensors: dict[str, Tensor] = {}
    linears = {}
    quantized = _linears(block, topology, QuantLinear)
    for name, linear in quantized.items():
        q = PackedTensor.of(linear.quantized)
        linears[name] = {"shape": list(linear.shape), "grid": asdict(q.grid)}
        tensors |= {f"{name}.packed": q.packed, f"{name}.scale": q.scale, f"{name}.zero": q.zero}
        extra = {"group_index": q.group_index, "bias": linear.bias}
        tensors |= {f"{name}.{part}": x for part, x in extra.items() if x is not None}
    tensors |= {_OWN + name: p.data for name, p in _own_parameters(block, quantized)}
    product: Any = block.product
    has_product = isinstance(product, QuantizedProduct)
    if has_product and product.v_params is not None:
        tensors |= {"product.scale": product.v_params.scale, "product.zero": product.v_params.zero}
    text = json.dumps(about | {"linears": linears, "product": has_product})
    return tensors | {_ABOUT: torch.tensor(list(text.encode()), dtype=torch.uint8)}


def check_fit(tensors: dict[str, Tensor], block: Block, topology: Topology) -> dict[str, Tensor]:
    """The same tensors, if this full-precision block can be restored from them.

    Raises:
        ValueError: they are of another block, or of another version of this file.
    """
    about = _about(tensors)
    linears = {n: m for n, m in _linears(block, topology, nn.Module).items() if n in about["linears"]}
    shapes = {name: list(linear.weight.shape) for name, linear in linears.items()}
    if shapes != {name: of["shape"] for name, of in about["linears"].items()}:
        raise ValueError("its linears are of other sizes")
    needed = {f"{name}.{part}" for name in linears for part in ("packed", "scale", "zero")}
    needed |= {_OWN + name for name, _ in _own_parameters(block, linears)}
    if not needed <= tensors.keys() or not {"notes", "seconds", "product"} <= about.keys():
        raise ValueError("a part of the block is not there")
    return tensors


@torch.no_grad()
def restore(block: Block, topology: Topology, grids: Grids, tensors: dict[str, Tensor]) -> None:
    """Makes a full-precision block what the stored one had become; it stays on its device."""
    about = _about(tensors)
    device, dtype = next((p.device, p.dtype) for p in block.parameters())
    here = {name: tensor.to(device) for name, tensor in tensors.items() if name != _ABOUT}
    for row in topology.groups:
        names = [name for name in row.linears if name in about["linears"]]
        inputs = InputQuantizer(grids.inputs, readers=len(names))
        for name in names:
            of = about["linears"][name]
            codes, scale, zero = (here[f"{name}.{part}"] for part in ("packed", "scale", "zero"))
            index, bias = here.get(f"{name}.group_index"), here.get(f"{name}.bias")
            q = PackedTensor(codes, of["shape"][1], scale, zero, Grid(**of["grid"]), index)
            setattr(block, name, QuantLinear(q.unpacked(), bias, inputs, dtype))
    for name, p in block.named_parameters():
        if _OWN + name in here:
            p.data = here[_OWN + name]
    if about["product"]:
        found = "product.scale" in here
        params = Params(here["product.scale"], here["product.zero"]) if found else None
        block.product = QuantizedProduct(grids.P, grids.V, params, grids.QK)


def _linears(block: Block, topology: Topology, kind: type[nn.Module]) -> dict[str, Any]:
    """The block's linears of a kind, by their names in the topology."""
    named = {name: getattr(block, name) for row in topology.groups for name in row.linears}
    return {name: module for name, module in named.items() if isinstance(module, kind)}


def _own_parameters(block: Block, linears: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """Parameters of the block that belong to none of the linears."""
    inside = {id(p) for linear in linears.values() for p in linear.parameters()}
    return [(name, p) for name, p in block.named_parameters() if id(p) not in inside]


def _about(tensors: dict[str, Tensor]) -> dict[str, Any]:
    about: dict[str, Any] = json.loads(bytes(tensors[_ABOUT].tolist()))
    return about

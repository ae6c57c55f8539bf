"""Quantized folders back to models: the logits of the model that was saved, bit for bit in fp32.

Everything that can be wrong is found from the JSON files and the safetensors headers, before a weight is
read; a packed tensor's own contradictions (such as zeros of a symmetric grid) when its turn comes.

A folder of another program has no record of ours. Then a linear is quantized where its packed tensors are,
and the attention product is in full precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from dllmq.models.attention import QuantizedProduct
from dllmq.models.linear import InputQuantizer, InputQuantLinear, QuantLinear
from dllmq.models.loading import (
    FULL_PRECISION,
    Header,
    check_headers,
    read_config,
    skeleton,
    tensor_headers,
    weight_files,
)
from dllmq.models.stored import DENSE, RECORD, Stored
from dllmq.numerics import Params
from dllmq.numerics.layouts import Spec, decode, specs


@dataclass(frozen=True)
class Checked:
    """A quantized folder that has passed every check that needs no weights.

    Attributes:
        model: on the meta device, linears not swapped yet.
        headers: every tensor of the folder.
        packed: quantized linear's dotted name -> suffixes of its stored tensors; empty for dequantized ones.
    """

    model: Any
    stored: Stored
    headers: dict[str, Header]
    packed: dict[str, dict[str, Spec]]


def load_stored(
    folder: Path, stored: Stored, device: str | torch.device, dtype: torch.dtype, compact: bool = False
) -> Any:
    """The model of a quantized folder, in eval mode and without gradients.

    Args:
        compact: linears keep their codes alone, packed at their width, from the moment they are read; what is
            in memory is what is on disk. Dequantized folders have no codes, and are loaded as they are.

    Raises:
        ValueError: one sentence.
    """
    checked = check_folder(folder, stored)
    model = checked.model
    packed = {f"{name}.{suffix}" for name, suffixes in checked.packed.items() for suffix in suffixes}
    extra = {f"{name}.bias" for name in checked.packed} - model.state_dict().keys()
    with _reader(checked.headers, device) as read:
        plain = {n: read(n).to(dtype) for n in checked.headers if n not in packed and n not in extra}
        found = model.load_state_dict(plain, strict=False, assign=True)
        swapped = {f"{name}.weight" for name, suffixes in checked.packed.items() if suffixes}
        assert set(found.missing_keys) == swapped and not found.unexpected_keys
        _swap_linears(checked, read, dtype, compact)
    for index, block in enumerate(model.blocks):
        if stored.has_product:
            params = Params(*(x.to(device) for x in stored.values[index])) if stored.values else None
            block.product = QuantizedProduct(stored.P, stored.V, params, stored.QK)
    model.stored = stored
    return model.requires_grad_(False).eval()


def check_folder(folder: Path, stored: Stored) -> Checked:
    """Compares config.json, our record and the headers.

    Raises:
        ValueError: a tensor that is missing, extra, or of another shape or type; a record that disagrees.
    """
    model = skeleton(*read_config(folder))
    headers = tensor_headers(weight_files(folder))
    shapes = {name: tuple(linear.weight.shape) for name, linear in block_linears(model).items()}
    packed = _packed(stored, headers, shapes)
    expected = {name: Spec(tuple(p.shape), FULL_PRECISION) for name, p in model.state_dict().items()}
    for name, suffixes in packed.items():
        if suffixes:
            del expected[f"{name}.weight"]
        expected |= {f"{name}.{suffix}": spec for suffix, spec in suffixes.items()}
        if f"{name}.bias" in headers:  # AutoGPTQ writes one, of zeros, where the model has none
            expected[f"{name}.bias"] = Spec(shapes[name][:1], FULL_PRECISION)
    _check_record(stored, packed, headers)
    check_headers(headers, expected)
    _check_values(stored, model)
    return Checked(model, stored, headers, packed)


def block_linears(model: Any) -> dict[str, Any]:
    """Every linear of the blocks by its dotted name, in execution order."""
    names = {id(module): name for name, module in model.named_modules()}
    linears = (getattr(b, n) for b in model.blocks for row in model.topology.groups for n in row.linears)
    return {names[id(linear)]: linear for linear in linears}


def _packed(
    stored: Stored, headers: dict[str, Header], shapes: dict[str, tuple[int, ...]]
) -> dict[str, dict[str, Spec]]:
    """Quantized linears with the tensors each must have."""
    out: dict[str, dict[str, Spec]] = {}
    for name in shapes if stored.linears is None else stored.linears:
        if name not in shapes:
            raise ValueError(
                f"{RECORD} names {name}, which is no linear of a block: take both from one export."
            )
        O, I = shapes[name]
        try:
            suffixes = {} if stored.layout == DENSE else specs(stored.layout, stored.weights, O, I)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        own = [suffix for suffix in suffixes if suffix != "weight"]
        if stored.linears is not None or any(f"{name}.{suffix}" in headers for suffix in own):
            out[name] = suffixes
    if not out and stored.layout != DENSE:
        raise ValueError(
            f"config.json has a quantization_config ({stored.layout}), but no linear of a block has such "
            "tensors: take config.json and the weights from the same checkpoint."
        )
    return out


def _check_record(stored: Stored, packed: dict[str, dict[str, Spec]], headers: dict[str, Header]) -> None:
    """Names the first linear that our record calls quantized and the tensors do not."""
    if stored.linears is None:
        return
    for name, suffixes in packed.items():
        lacking = [f"{name}.{suffix}" for suffix in suffixes if f"{name}.{suffix}" not in headers]
        if lacking:
            raise ValueError(
                f"{RECORD} says {name} is quantized, but the checkpoint lacks {lacking[0]}: take both "
                "from one export."
            )


def _check_values(stored: Stored, model: Any) -> None:
    """Whether V's parameters fit the model's blocks and heads."""
    config = model.config
    if stored.V is None or not stored.values:
        if (stored.V is None) != (not stored.values):
            raise ValueError(f"{RECORD} has a grid of V or V's scales, but not both: export the model again.")
        return
    target = (config.kv_heads, 1, config.head_dim)
    fits = len(stored.values) == len(model.blocks)
    for params in stored.values:
        for x in params:
            fits = fits and x.dim() == 3 and all(a in (1, b) for a, b in zip(x.shape, target, strict=True))
    if not fits:
        raise ValueError(
            f"{RECORD} holds scales of V for another model; this one has {len(model.blocks)} blocks of "
            f"{config.kv_heads} value heads of {config.head_dim}: take both from one export."
        )


@contextmanager
def _reader(headers: dict[str, Header], device: str | torch.device) -> Iterator[Callable[[str], Tensor]]:
    """Reads tensors by name; every file is mapped once."""
    with ExitStack() as stack:
        files = {
            file: stack.enter_context(safe_open(file, framework="pt", device=str(device)))
            for file in {header.file for header in headers.values()}
        }
        yield lambda name: files[headers[name].file].get_tensor(name)


def _swap_linears(checked: Checked, read: Callable[[str], Tensor], dtype: torch.dtype, compact: bool) -> None:
    """Puts the quantized linears in; those that read the same input share its quantizer, as when saved."""
    model, stored = checked.model, checked.stored
    names = {id(linear): name for name, linear in block_linears(model).items()}
    for block in model.blocks:
        for row in model.topology.groups:
            group = {n: names[id(getattr(block, n))] for n in row.linears}
            group = {n: name for n, name in group.items() if name in checked.packed}
            inputs = InputQuantizer(stored.inputs, readers=len(group))
            for attribute, name in group.items():
                linear = _linear(name, getattr(block, attribute), checked, read, inputs, dtype)
                if compact and isinstance(linear, QuantLinear):
                    linear.compact()
                setattr(block, attribute, linear)


def _linear(
    name: str,
    linear: Any,
    checked: Checked,
    read: Callable[[str], Tensor],
    inputs: InputQuantizer,
    dtype: torch.dtype,
) -> Any:
    stored, suffixes, bias = checked.stored, checked.packed[name], linear.bias
    if not suffixes:
        return linear if inputs.grid is None else InputQuantLinear(linear.weight.data, bias, inputs)
    if bias is None and f"{name}.bias" in checked.headers:
        bias = read(f"{name}.bias")
    O, I = linear.weight.shape
    try:
        quantized = decode({s: read(f"{name}.{s}") for s in suffixes}, stored.layout, stored.weights, O, I)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return QuantLinear(quantized, bias, inputs, dtype)

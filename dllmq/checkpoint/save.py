"""Saving a quantized model: its tensors in a format's layout, config, tokenizer, and our record.

`save_quantized` is the whole. A loop that never has the whole model puts the same parts together itself, a
block at a time, each under its dotted name ("model.layers.3."):

    with ShardWriter(folder) as writer:
        for block, prefix in ...:                       # quantized
            settings.append(block_settings(block, topology, prefix))
            for name, tensor in stored_tensors(block, prefix, layout):
                writer.add(name, tensor)
        ...                                             # embedding, norm, head: stored_tensors too
        write_companions(writer, describe(settings, layout), topology.head, source_folder, record)
        writer.finish()
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dllmq import __version__
from dllmq.checkpoint.formats import layout_of
from dllmq.checkpoint.writer import MAX_SHARD_BYTES, ShardWriter
from dllmq.models.attention import QuantizedProduct
from dllmq.models.base import Block, Topology
from dllmq.models.linear import QuantLinear
from dllmq.models.loading import weight_files
from dllmq.models.memory import in_bytes
from dllmq.models.stored import DENSE, RECORD, Stored, stored_values, to_config, to_record
from dllmq.numerics import Grid, Params
from dllmq.numerics.layouts import encode

log = logging.getLogger(__name__)
_NOT_COPIED = ("config.json", "quantize_config.json", RECORD)
_COPIED = (".json", ".jinja", ".txt", ".model", ".py")  # .py: what the published config.json's auto_map names


@dataclass(frozen=True)
class BlockSettings:
    """What is quantized in a block.

    Attributes:
        linears: dotted names of the quantized ones, and their sizes (O, I).
        weights, inputs: their grids; ordered: a group_index is there.
        product: the attention product's grids (P, V, QK) and V's parameters.
    """

    linears: dict[str, tuple[int, int]]
    weights: Grid
    inputs: Grid | None
    ordered: bool
    product: tuple[Grid | None, Grid | None, Grid | None]
    values: Params | None


def save_quantized(
    model: Any,
    folder: str | Path,
    format: str,
    source_folder: str | Path,
    record: dict[str, Any] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> int:
    """Writes a quantized model into a folder that other programs, and `load_model`, read.

    Args:
        model: as `pipeline.quantize` leaves it.
        folder: new, empty, or an earlier export.
        format: compressed_tensors | gptq | dequantized.
        source_folder: the full-precision checkpoint, whose config, tokenizer and generation files go along.
        record: how the model was made (config, command, versions), JSON values.
        max_shard_bytes: of a safetensors file.

    Returns:
        Bytes on disk.

    Raises:
        ValueError: the model is not quantized, the format cannot hold it, or the folder holds something else.
    """
    names = {id(module): name for name, module in model.named_modules()}
    settings = [block_settings(b, model.topology, f"{names[id(b)]}.") for b in model.blocks]
    first, sizes = settings[0], {name: size for s in settings for name, size in s.linears.items()}
    layout = layout_of(format, first.weights, first.inputs, sizes, any(s.ordered for s in settings))
    if Path(folder).resolve() == Path(source_folder).resolve():
        raise ValueError(
            f"the export folder {folder} is the source's own; give a folder that is new or empty."
        )
    with ShardWriter(folder, max_shard_bytes) as writer:
        for name, tensor in stored_tensors(model, "", layout):
            writer.add(name, tensor)
        stored = describe(settings, layout)
        write_companions(writer, stored, model.topology.head, source_folder, record)
        size = writer.finish()
    log.info("exported %s: %s, %s; %s", folder, in_bytes(size), layout, seen_by_others(stored))
    return size


def block_settings(block: Block, topology: Topology, prefix: str) -> BlockSettings:
    """Reads a quantized block; `prefix` is its dotted name with a dot."""
    names = {id(module): name for name, module in block.named_modules()}
    every = [getattr(block, name) for row in topology.groups for name in row.linears]
    linears = [m for m in every if isinstance(m, QuantLinear)]
    if not linears:
        raise ValueError(f"{prefix[:-1]} is in full precision: quantize the model before it is exported.")
    weights = [m.quantized for m in linears]
    grids = {(q.grid, m.inputs.grid) for q, m in zip(weights, linears, strict=True)}
    assert len(grids) == 1, "all linears have the same grids"
    product: Any = block.product
    quantized = isinstance(product, QuantizedProduct)
    return BlockSettings(
        linears={
            prefix + names[id(m)]: (q.codes.shape[0], q.codes.shape[1])
            for q, m in zip(weights, linears, strict=True)
        },
        weights=weights[0].grid,
        inputs=linears[0].inputs.grid,
        ordered=any(q.group_index is not None for q in weights),
        product=(product.p_grid, product.v_grid, product.qk_grid) if quantized else (None, None, None),
        values=product.v_params if quantized else None,
    )


def describe(settings: Sequence[BlockSettings], layout: str) -> Stored:
    """The folder's description from those of its blocks, which all have the same grids."""
    first = settings[0]
    grids = {(s.weights, s.inputs, s.product) for s in settings}
    assert len(grids) == 1, "all blocks have the same grids"
    P, V, QK = first.product
    return Stored(
        layout=layout,
        weights=first.weights,
        inputs=first.inputs,
        linears=tuple(name for s in settings for name in s.linears),
        P=P,
        V=V,
        QK=QK,
        values=stored_values([s.values for s in settings]),
        ordered=any(s.ordered for s in settings),
    )


def stored_tensors(module: nn.Module, prefix: str, layout: str) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of everything in a module, quantized weights in the layout's own tensors.

    Beside packed weights the other tensors are stored in bf16 where that loses nothing: those of a published
    bf16 checkpoint that was loaded in fp32, except norms and biases that AWQ changed.
    """
    for name, part in module.named_modules(prefix=prefix.removesuffix(".")):
        own = dict(part.named_parameters(recurse=False))
        if isinstance(part, QuantLinear):
            own.pop("weight", None)  # asked for below: a linear may hold its codes alone
            stored = {"weight": part.weight} if layout == DENSE else encode(part.quantized, layout)
            yield from ((f"{name}.{suffix}", t) for suffix, t in stored.items())
        for key, tensor in own.items():
            yield f"{name}.{key}".lstrip("."), tensor if layout == DENSE else _shortened(tensor)


def _shortened(tensor: Tensor) -> Tensor:
    """In bf16 where that loses nothing."""
    short = tensor.to(torch.bfloat16)
    return short if torch.equal(short.to(tensor.dtype), tensor) else tensor


def write_companions(
    writer: ShardWriter,
    stored: Stored,
    head: str,
    source_folder: str | Path,
    record: dict[str, Any] | None = None,
) -> None:
    """config.json, our record, and what the source has beside its weights: tokenizer, generation, code.

    Code is copied for programs that run what config.json's auto_map names; dllmq never does.
    """
    source = Path(source_folder)
    for file in sorted(source.iterdir()):
        other = file.name in _NOT_COPIED or file.name.endswith(".index.json")
        if file.is_file() and file.suffix in _COPIED and not other:
            writer.add_file(file)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    quantization = to_config(stored, head, __version__)
    config.pop("quantization_config", None)
    if quantization is not None:
        config["quantization_config"] = quantization
    writer.add_text("config.json", _json(config))
    if quantization is not None and quantization["quant_method"] == "gptq":
        writer.add_text("quantize_config.json", _json(quantization))
    whole = to_record(stored) | {"source": source_of(source), "dllmq": __version__, "run": record or {}}
    lines = (
        f" {json.dumps(k)}: {json.dumps(v, ensure_ascii=False, allow_nan=False)}" for k, v in whole.items()
    )
    writer.add_text(RECORD, "{\n" + ",\n".join(lines) + "\n}\n")  # a line a key: V's scales can be many


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def source_of(folder: Path) -> dict[str, Any]:
    """Name of the full-precision checkpoint, and sha256 of its weight files."""
    cached = folder.parent.name == "snapshots"  # of a hub: models--<owner>--<name>/snapshots/<commit>
    name = (
        folder.parents[1].name.removeprefix("models--").replace("--", "/")
        if cached
        else folder.resolve().name
    )
    return {"name": name, "sha256": {file.name: _sha256(file) for file in weight_files(folder)}}


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def seen_by_others(stored: Stored) -> str:
    """What a program without our record takes from the folder, in words for the log and the record."""
    hidden = ["the attention product's grids"] if stored.has_product else []
    if stored.layout == DENSE:
        hidden += ["the inputs' grid"] if stored.inputs is not None else []
        what = "other programs see plain weights"
    else:
        what = "other programs see the quantized linears"
    return (
        f"{what} only ({' and '.join(hidden)} are in {RECORD})"
        if hidden
        else f"{what}, which is all there is"
    )

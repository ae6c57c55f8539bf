"""Blocks that stream from the checkpoint: in memory only while the model runs through them.

A streamed model is the same model: embedding, final norm and LM head are loaded, and `model.blocks` is a list
whose iteration reads each block's tensors from the memory-mapped safetensors when it comes to it, and drops
them when it goes on. Everything that walks the blocks in order (a forward, the block loop of quantization)
works as on a loaded model and gives the same bits; one block is in memory at a time.

    for block in model.blocks:        # block i is read here
        x = block(x, ctx)             # and dropped before block i + 1 is read

A tensor is copied out of its file, which is then closed: mapped pages would count as resident memory, and a
mapped file that is cut short kills the program that reads it.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dllmq.models.base import Block
from dllmq.models.linear import QuantLinear
from dllmq.models.memory import in_bytes

log = logging.getLogger(__name__)
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class TensorFiles:
    """Where the tensors of a checked checkpoint are, and what they become.

    Attributes:
        where: name -> file; shapes: name -> shape, as config.json implies them.
        device, dtype: of the tensors that are read.
    """

    where: dict[str, Path]
    shapes: dict[str, torch.Size]
    device: torch.device
    dtype: torch.dtype

    def read(self, name: str) -> Tensor:
        """A copy of one tensor, in memory of its own.

        Raises:
            ValueError: the file cannot be read any more, or holds something else by now.
        """
        file = self.where[name]
        try:
            with safe_open(file, framework="pt") as tensors:
                found = tensors.get_tensor(name)
                if found.shape != self.shapes[name]:
                    raise ValueError(f"{file} was changed while it was in use: start the run again.")
                return found.to(self.device, self.dtype, copy=True)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{file} cannot be read any more: it was whole when the run began, and is damaged, cut "
                f"short or gone now ({error}). Restore it and start the run again."
            ) from error

    def stored_bytes(self, names: list[str]) -> int:
        """Bytes of some tensors in their files."""
        total = 0
        for file in {self.where[name] for name in names}:
            with safe_open(file, framework="pt") as tensors:
                here = [name for name in names if self.where[name] == file]
                total += sum(self.shapes[n].numel() * _BYTES[tensors.get_slice(n).get_dtype()] for n in here)
        return total


class StreamedBlocks(nn.ModuleList):
    """The blocks of a streamed model; iterating reads one after the other (see on top of this file).

    Indexing reads nothing. Blocks that were quantized are kept, as they hold what no file does.

    Args:
        blocks: on the meta device.
        files: the checkpoint's tensors; name: of this list in the model, "model.transformer.blocks".
    """

    def __init__(self, blocks: nn.ModuleList, files: TensorFiles, name: str) -> None:
        super().__init__(blocks.children())
        self.files, self.name = files, name
        self.kept: set[int] = set()

    def __iter__(self) -> Iterator[Any]:
        for index in range(len(self)):
            with self.resident(index) as block:
                yield block

    def __repr__(self) -> str:
        return f"StreamedBlocks({len(self)} blocks, {len(self.kept)} of them kept in memory)"

    @contextmanager
    def resident(self, index: int) -> Iterator[Block]:
        """Block `index` with its weights in memory; inside the context, and after `keep`, they stay."""
        block: Any = self[index]
        there = index in self.kept or not any(p.is_meta for p in block.parameters())
        if there:
            yield block
            return
        block.load_state_dict(self._read(index), assign=True)
        try:
            yield block
        finally:
            if index not in self.kept:
                block.to("meta")

    def keep(self, index: int) -> None:
        """Block `index` stays as it is now; nothing is read for it again."""
        self.kept.add(index)

    @property
    def bytes_per_forward(self) -> int:
        """What one forward of the model reads: the blocks that are not kept."""
        left = [self._names(index) for index in range(len(self)) if index not in self.kept]
        return self.files.stored_bytes([full for names in left for full in names.values()])

    def _names(self, index: int) -> dict[str, str]:
        """Parameter of block `index` -> its name in the checkpoint."""
        block: Any = self[index]
        return {own: f"{self.name}.{index}.{own}" for own, _ in block.named_parameters()}

    def _read(self, index: int) -> dict[str, Tensor]:
        return {own: self.files.read(full) for own, full in self._names(index).items()}


def stream_blocks(model: Any, files: TensorFiles) -> None:
    """Turns a model on the meta device into a streamed one: loads all but the blocks, which will stream."""
    blocks = model.blocks
    name = next(n for n, module in model.named_modules() if module is blocks)
    parent, _, key = name.rpartition(".")
    model.get_submodule(parent).add_module(key, StreamedBlocks(blocks, files, name))
    rest = [n for n in model.state_dict() if not n.startswith(f"{name}.")]
    model.load_state_dict({n: files.read(n) for n in rest}, strict=False, assign=True)


def is_streamed(model: Any) -> bool:
    """Whether the model's blocks are read from files when they are needed."""
    return isinstance(model.blocks, StreamedBlocks)


def compact_block(model: Any, index: int) -> None:
    """Keeps a quantized block in memory for good, its quantized weights as packed codes alone."""
    blocks = model.blocks
    for module in blocks[index].modules():
        if isinstance(module, QuantLinear):
            module.compact()
    if is_streamed(model):
        blocks.keep(index)
    give_back_freed_memory()


def give_back_freed_memory() -> None:
    """Returns freed pages to the system. Codes that stay lie between temporaries that went, and glibc holds
    the gaps: without this a block of 103 MB adds up to 115 MB instead of its 26 MB of codes."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def log_reading(model: Any, what: str, forwards: int | None) -> None:
    """One line about what full precision reads where its blocks stream; nothing where they are loaded."""
    if not is_streamed(model):
        return
    each = model.blocks.bytes_per_forward
    total = "" if forwards is None else f", {forwards} forwards, {in_bytes(each * forwards)} in all"
    log.info(
        "%s: the blocks stream from the checkpoint, %s a forward%s; a larger batch makes fewer forwards",
        *(what, in_bytes(each), total),
    )

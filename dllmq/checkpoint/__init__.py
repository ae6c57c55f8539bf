"""Quantized models on disk: saving in formats that other programs read, and loading them back."""

from dllmq.checkpoint.formats import EXPORTS, layout_of
from dllmq.checkpoint.load import load_quantized
from dllmq.checkpoint.save import (
    block_settings,
    describe,
    save_quantized,
    stored_tensors,
    write_companions,
)
from dllmq.checkpoint.writer import ShardWriter

__all__ = [
    "EXPORTS",
    "ShardWriter",
    "block_settings",
    "describe",
    "layout_of",
    "load_quantized",
    "save_quantized",
    "stored_tensors",
    "write_companions",
]

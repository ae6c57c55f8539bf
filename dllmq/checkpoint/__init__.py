"""Quantized models on disk: saving in formats that other programs read, and loading them back."""

from dllmq.checkpoint.writer import ShardWriter

__all__ = ["ShardWriter"]

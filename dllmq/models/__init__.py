"""Mask predictors written natively, loaded from published checkpoints by their own tensor names."""

from typing import Any

from dllmq.models.base import Block, BlockContext, GroupRow, LinearGroup, MaskPredictor, Topology

__all__ = ["Block", "BlockContext", "GroupRow", "LinearGroup", "MaskPredictor", "Topology", "load_model"]


def __getattr__(name: str) -> Any:
    """`load_model` is found lazily: loading walks this package for architectures."""
    if name == "load_model":
        from dllmq.models.loading import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

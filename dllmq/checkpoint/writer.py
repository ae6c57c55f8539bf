"""ShardWriter: a checkpoint folder written tensor by tensor, whole or not at all.

    with ShardWriter(folder, max_shard_bytes) as writer:
        writer.add("model.norm.weight", tensor)
        writer.add_text("config.json", text)
        size = writer.finish()

At most one shard is held in memory. Everything is written into a hidden folder inside the target and moved
into place by `finish`, config.json last: a folder without it is no checkpoint, so a run that was killed
leaves none that could be taken for one.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from types import TracebackType

import torch
from safetensors.torch import save_file
from torch import Tensor

from dllmq.durable import replace, sync_file
from dllmq.models.stored import RECORD

MAX_SHARD_BYTES = 2**31
INDEX = "model.safetensors.index.json"
_STAGING = ".writing-"
_OF_AN_EXPORT = (INDEX, "quantize_config.json")  # that not every export writes anew


class ShardWriter:
    """Writes model.safetensors, or shards with their index where one file would exceed `max_shard_bytes`.

    Args:
        folder: made where it is not there; otherwise empty or an earlier export, which `finish` replaces.
        max_shard_bytes: of the tensors in a shard; a larger tensor has a shard of its own.

    Raises:
        ValueError: the folder holds something else, or max_shard_bytes is not positive.
    """

    def __init__(self, folder: str | Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        if max_shard_bytes < 1:
            raise ValueError(f"max_shard_bytes={max_shard_bytes} is too small; it is a number of bytes >= 1.")
        self.folder = Path(folder)
        check_target(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.folder)
        self.max_shard_bytes = max_shard_bytes
        self._staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=self.folder))
        self._held: dict[str, Tensor] = {}
        self._held_bytes, self._total_bytes = 0, 0
        self._shards: list[list[str]] = []
        self._names: set[str] = set()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()

    def add(self, name: str, tensor: Tensor) -> None:
        """Takes a tensor into the current shard, which is written when the next tensor does not fit."""
        assert name not in self._names, f"{name} is written twice"
        size = tensor.numel() * tensor.element_size()
        if self._held and self._held_bytes + size > self.max_shard_bytes:
            self._flush()
        self._held[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)  # it may change
        self._names.add(name)
        self._held_bytes += size
        self._total_bytes += size

    def add_text(self, name: str, text: str) -> None:
        """Puts a text file into the folder."""
        (self._staging / name).write_text(text, encoding="utf-8")

    def add_file(self, path: Path) -> None:
        """Copies a file into the folder, under its own name."""
        shutil.copyfile(path, self._staging / path.name)

    def finish(self) -> int:
        """Moves everything into place; returns the bytes of all files.

        Raises:
            AssertionError: no tensor was added.
        """
        self._flush()
        assert self._shards, "a checkpoint has tensors"
        self._name_shards()
        size = sum(file.stat().st_size for file in self._staging.iterdir())
        for file in self._staging.iterdir():
            sync_file(file)
        (self.folder / "config.json").unlink(missing_ok=True)
        for old in (*self.folder.glob("*.safetensors"), *map(self.folder.joinpath, _OF_AN_EXPORT)):
            old.unlink(missing_ok=True)
        for file in sorted(self._staging.iterdir(), key=lambda file: file.name == "config.json"):
            replace(file, self.folder / file.name)
        self.discard()
        return size

    def discard(self) -> None:
        """Removes what was not finished."""
        shutil.rmtree(self._staging, ignore_errors=True)
        self._held.clear()

    def _flush(self) -> None:
        if not self._held:
            return
        file = self._staging / f"{len(self._shards)}.shard"
        file.touch()
        mode = file.stat().st_mode  # safetensors' files are the owner's only, whatever the umask
        save_file(self._held, file, metadata={"format": "pt"})
        file.chmod(mode)
        self._shards.append(list(self._held))
        self._held.clear()
        self._held_bytes = 0

    def _name_shards(self) -> None:
        """Final names, now that their number is known, and the index."""
        count = len(self._shards)
        if count == 1:
            (self._staging / "0.shard").rename(self._staging / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for n, names in enumerate(self._shards):
            file = f"model-{n + 1:05}-of-{count:05}.safetensors"
            (self._staging / f"{n}.shard").rename(self._staging / file)
            weight_map |= dict.fromkeys(names, file)
        index = {
            "metadata": {"total_size": self._total_bytes},
            "weight_map": dict(sorted(weight_map.items())),
        }
        self.add_text(INDEX, json.dumps(index, indent=2) + "\n")


def remove_leftovers(folder: Path) -> None:
    """Removes what a killed run has not finished in an export's folder; nobody else may write there."""
    for leftover in folder.glob(f"{_STAGING}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def check_target(folder: Path) -> None:
    """Whether an export may be written into `folder`.

    Raises:
        ValueError: it is a file, or holds files that are no earlier export of dllmq.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"the export folder {folder} is a file; give a folder that is new or empty.")
    if not folder.is_dir() or (folder / RECORD).is_file():
        return
    others = sorted(p.name for p in folder.iterdir() if not p.name.startswith(_STAGING))
    if others:
        raise ValueError(
            f"the export folder {folder} holds {others[0]} and no {RECORD}, so it is no earlier export; give "
            "a folder that is new or empty."
        )

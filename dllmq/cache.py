"""A content-addressed cache: what the same inputs have made before is read, not made again.

    value, hit = cache.get("trajectories", {"weights": sha, "prompts": 128, "seed": 0}, make, save, load)

    <folder>/<kind>/<first two digits of key>/<key>          the payload, as `save` wrote it
    <folder>/<kind>/<first two digits of key>/<key>.json     its parts and sha256; with it the entry exists

The key is a hash of everything the value depends on, so an entry is right or absent, and deleting the folder
is always safe. Entries appear whole (temporary folder beside them, fsync, rename), are checked against their
sha256 before `load` sees them, and are made by one process at a time: the others wait for it and read. What
took long to make may be kept in parts meanwhile (`unfinished`), for the process that comes after a kill. The
cache never fails a run: what cannot be stored is returned all the same, with a warning.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dllmq.durable import replace, sync_file
from dllmq.locks import locked

log = logging.getLogger(__name__)
T = TypeVar("T")

FORMAT = 1  # part of every key: raise it when entries are laid out differently, and no older one is found


@dataclass(frozen=True)
class Cache:
    """The entries below `folder`, which several processes may share.

    Attributes:
        folder: made when the first entry is; may be read-only, then only what is there is used.
    """

    folder: Path

    @staticmethod
    def key(kind: str, parts: Mapping[str, Any]) -> str:
        """sha256 (hex) of kind and parts as canonical JSON, in which the order of keys does not matter.

        Raises:
            ValueError: parts that JSON cannot hold, or a kind that is not [a-z0-9_-]+.
        """
        if not re.fullmatch(r"[a-z0-9_-]+", kind):
            raise ValueError(
                f"kind={kind!r} names a folder of the cache: use lower-case letters, digits, _ and -."
            )
        content = {"format": FORMAT, "kind": kind, "parts": dict(parts)}
        try:
            text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"parts of {kind} must be JSON (finite numbers, strings, booleans, null, lists, dicts with "
                f"string keys): {error}. Give the hash or the name of anything else."
            ) from error
        return hashlib.sha256(text.encode()).hexdigest()

    def get(
        self,
        kind: str,
        parts: Mapping[str, Any],
        make: Callable[[], T],
        save: Callable[[T, Path], None],
        load: Callable[[Path], T],
    ) -> tuple[T, bool]:
        """The value of (kind, parts): (read from its entry, True), or (made and stored, False).

        Args:
            kind: names the folder: "trajectories".
            parts: everything the value depends on; stored beside it for inspection.
            make: computes the value; runs under the entry's lock, so it must not ask for the same entry.
            save: writes one file; load: the exact inverse. An entry that load refuses is made again.

        Raises:
            ValueError: from `key`. Whatever `make` raises: then nothing is stored.
        """
        entry = _Entry(self.folder, kind, dict(parts), self.key(kind, parts))
        with suppress(_Damaged):  # told and removed under the lock, where it may be whole by then
            if found := entry.read(load):
                entry.clean()
                return found[0], True
        with entry.locked() as problem:
            try:
                if found := entry.read(load):
                    return found[0], True
            except _Damaged as error:
                log.warning("cache: %s is damaged (%s) and computed again.", entry, error)
                entry.remove()
            value = make()
            try:
                if problem is not None:
                    raise problem
                entry.write(value, save)
            except Exception as error:
                log.warning("cache: %s is computed but could not be stored (%s).", entry, _told(error))
            return value, False

    def unfinished(self, kind: str, parts: Mapping[str, Any]) -> Path:
        """A folder in which `make` may keep what it has so far; it is removed when the entry is stored.

        Only the process that runs `make` may write there: it holds the entry's lock.
        """
        return _Entry(self.folder, kind, dict(parts), self.key(kind, parts)).unfinished


class _Damaged(Exception):
    """An entry that is there but cannot be used; says why."""


@dataclass(frozen=True)
class _Entry:
    root: Path
    kind: str
    parts: dict[str, Any]
    key: str

    def __str__(self) -> str:
        return f"{self.kind}/{self.key[:12]}"

    @property
    def payload(self) -> Path:
        return self.root / self.kind / self.key[:2] / self.key

    @property
    def description(self) -> Path:
        return self.payload.with_name(f"{self.key}.json")

    @property
    def unfinished(self) -> Path:
        return self.payload.with_name(f".{self.key}.unfinished")

    def read(self, load: Callable[[Path], T]) -> tuple[T] | None:
        """The value in a tuple, None where there is no entry.

        Raises:
            _Damaged: it is not what was written, or `load` refuses it.
        """
        try:
            text = self.description.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None
        try:
            if self.describe(self.payload) != text:
                raise ValueError("its content is not what was written")
            value = load(self.payload)
        except Exception as error:
            raise _Damaged(_told(error)) from error
        log.info("%s: read from the cache", self)
        return (value,)

    def describe(self, payload: Path) -> str:
        """What is to be written beside this payload."""
        content = {"kind": self.kind, "bytes": payload.stat().st_size, "sha256": _sha256(payload)}
        return json.dumps(content | {"parts": self.parts}, indent=2, sort_keys=True) + "\n"

    def write(self, value: T, save: Callable[[T, Path], None]) -> None:
        """Stores both files, the description last; the caller holds the lock, so leftovers are nobody's."""
        self._remove_leftovers()
        with TemporaryDirectory(
            prefix=f".{self.key}.", suffix=".tmp", dir=self.payload.parent, ignore_cleanup_errors=True
        ) as temporary:
            payload, description = Path(temporary) / "payload", Path(temporary) / "description"
            save(value, payload)
            sync_file(payload)
            description.write_text(self.describe(payload), encoding="utf-8", newline="\n")
            sync_file(description)
            shutil.copymode(description, payload)  # safetensors' are the owner's only, whatever the umask
            os.replace(payload, self.payload)  # without its description it is no entry
            replace(description, self.description)
        self.clean()

    def clean(self) -> None:
        """Removes what was kept for an entry that is there by now; a kill may have come in between."""
        if self.unfinished.is_dir():
            shutil.rmtree(self.unfinished, ignore_errors=True)
        self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        for leftover in self.payload.parent.glob(f".{self.key}.*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)

    def remove(self) -> None:
        """Description first: a payload without one is no entry."""
        with suppress(OSError):
            self.description.unlink(missing_ok=True)
            self.payload.unlink(missing_ok=True)

    def locked(self) -> AbstractContextManager[Exception | None]:
        """Holds the entry's lock, waiting for it; or gives why the folder allows none."""
        lock = self.payload.with_name(f".{self.key}.lock")
        return locked(lock, f"{self}: another process is computing it; waiting")


def _sha256(path: Path) -> str:
    """sha256 (hex) of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


# ------------------------------------------------------------------ pairs of save and load


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes named tensors as safetensors; views of one storage are stored each for itself."""
    own = {n: t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}
    save_file(own, path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Named tensors on the CPU, in memory of their own: the file may go."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)


def save_json(value: Any, path: Path) -> None:
    """Writes a JSON value; tuples come back as lists, keys as strings, NaN and floats exactly."""
    path.write_text(json.dumps(value), encoding="utf-8")


def load_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))

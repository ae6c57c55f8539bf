"""What a model has answered so far, problem by problem, so that an evaluation that was killed goes on.

    <folder>/<task>.<rank>.jsonl      a line that names the key, then one line a problem, in the order of work

A batch is answered whole or again: its shape decides roundings, so half a batch is worth nothing. Its lines
are appended together and synced; a batch counts when all of them are there and whole, each with its own
checksum. What a kill or a damaged disk left of a batch is passed over, and the batch is answered again.

Processes that share a task's batches write a file each (`rank`) and read everybody's: what is known is the
union of the files, as a batch has the same answers whoever computes them.

The key names everything an answer depends on but the batch: the model, its quantization, the task's settings.
A batch is known by its kind, its place and its content. Values are JSON values; floats come back bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dllmq import interrupt
from dllmq.durable import sync_folder

log = logging.getLogger(__name__)
_FORMAT = 1


@dataclass(frozen=True)
class Batch:
    """A batch's answers: one JSON value a row, and what they took.

    Attributes:
        counts: of the harness's other counters.
    """

    values: list[Any]
    forwards: int = 0
    seconds: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class AnswerFolder:
    """Where the logs of a model's tasks lie, or nowhere (`folder` None): then nothing is kept.

    Attributes:
        key: fingerprint of the model and of how it is asked.
        rank: of this process among those that share the batches.
    """

    folder: Path | None = None
    key: str = ""
    rank: int = 0

    def of(self, task: str) -> AnswerLog:
        """The log of one task, with what is there already."""
        if self.folder is None:
            return AnswerLog(None, "")
        return AnswerLog(self.folder / f"{task}.{self.rank}.jsonl", f"{self.key}/{task}").read()


@dataclass
class AnswerLog:
    """The answers to one task.

    Attributes:
        file: this process's own; the others' lie beside it under the same task. None: nothing is kept.
        key: of everything but the batch.
        restored: problems whose answers were read; seconds: that they had taken.
    """

    file: Path | None
    key: str
    restored: int = 0
    seconds: float = 0.0
    _known: dict[str, Batch] = field(default_factory=dict)
    _started: bool = False  # the file has been made, or looked at and continued

    def batch(
        self,
        kind: str,
        index: int,
        content: Any,
        answer: Callable[[], Batch],
        problems: Sequence[Any] = (),
    ) -> Batch:
        """A batch's answers: those that are known, or answer()'s, which are kept before they are returned.

        Args:
            kind: of request; index: of the batch among the task's.
            content: JSON values that the answers depend on beside the key.
            problems: what names each row for a reader of the file.

        Raises:
            Interrupted: after a signal, when the batch is kept.
        """
        name = batch_name(kind, index, content)
        known = self.find(name)
        if known is not None:
            self.restored += len(known.values)
            self.seconds += known.seconds
            return known
        start = time.perf_counter()
        made = answer()
        made = replace(made, seconds=time.perf_counter() - start)
        self.add(name, made, problems)
        interrupt.check()
        return made

    def halved(self, kind: str, index: int, size: int) -> None:
        """Memory ran out: batches of this kind have another size from here on. For those who share them."""

    def find(self, name: str) -> Batch | None:
        """What is known of a batch; `name` is batch_name's."""
        return self._known.get(name)

    def add(self, name: str, batch: Batch, problems: Sequence[Any] = ()) -> None:
        """Appends a batch's lines and syncs them. A file that cannot be written costs one warning."""
        self._known[name] = batch
        if self.file is None:
            return
        lines = [_sealed(self._line(name, batch, row, problems)) for row in range(len(batch.values))]
        try:
            self._append("".join(lines))
        except OSError as error:
            log.warning("%s cannot be written (%s): its answers are not kept", self.file, error)
            self.file = None

    def read(self) -> AnswerLog:
        """Takes what all processes' files hold by now; itself."""
        if self.file is not None:
            task = self.file.name.rpartition(".")[0].rpartition(".")[0]
            for file in sorted(self.file.parent.glob(f"{task}.*.jsonl")):
                self._known |= _batches(file, self.key)
        return self

    def _line(self, name: str, batch: Batch, row: int, problems: Sequence[Any]) -> dict[str, Any]:
        line: dict[str, Any] = {"batch": name, "row": row, "of": len(batch.values)}
        if row < len(problems):
            line["problem"] = problems[row]
        if row == 0:
            line |= {"forwards": batch.forwards, "seconds": batch.seconds, "counts": batch.counts}
        return line | {"value": batch.values[row]}

    def _append(self, text: str) -> None:
        assert self.file is not None
        self.file.parent.mkdir(parents=True, exist_ok=True)
        if not self._started:
            text = self._beginning() + text
        with self.file.open("ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        if not self._started:
            sync_folder(self.file.parent)
            self._started = True

    def _beginning(self) -> str:
        """What goes in front of the first lines: the key's, or the end of a line that was cut off."""
        assert self.file is not None
        raw = self.file.read_bytes() if self.file.is_file() else b""
        if _is_header(raw.partition(b"\n")[0], self.key):
            return "" if raw.endswith(b"\n") else "\n"
        self.file.unlink(missing_ok=True)
        return _sealed({"answers": _FORMAT, "key": self.key})


def batch_name(kind: str, index: int, content: Any) -> str:
    """32 hex digits of a batch's kind, place and content."""
    return digest([kind, index, content])[:32]


def digest(value: Any) -> str:
    """sha256 (hex) of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _sealed(line: dict[str, Any]) -> str:
    """A line that carries its own checksum."""
    return json.dumps(line | {"sha256": _checksum(line)}, ensure_ascii=False) + "\n"


def _opened(raw: bytes) -> dict[str, Any] | None:
    """The content of a line, None where it is cut short or damaged."""
    try:
        line = json.loads(raw)
        if isinstance(line, dict) and line.pop("sha256", None) == _checksum(line):
            return line
    except ValueError:
        pass
    return None


def _checksum(line: dict[str, Any]) -> str:
    return digest(line)[:16]


def _is_header(raw: bytes, key: str) -> bool:
    return _opened(raw) == {"answers": _FORMAT, "key": key}


def _batches(file: Path, key: str) -> dict[str, Batch]:
    """The whole batches of one file; none where it is of another key."""
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError:
        return {}
    if not _is_header(lines[0], key):
        return {}
    rows: dict[str, dict[int, dict[str, Any]]] = {}
    for line in (line for line in _whole(lines[1:]) if "row" in line):
        rows.setdefault(line["batch"], {})[line["row"]] = line
    found = {name: batch_of(lines) for name, lines in rows.items()}
    return {name: batch for name, batch in found.items() if batch is not None}


def batch_of(lines: dict[int, dict[str, Any]]) -> Batch | None:
    """A batch from its lines by row; None where some are not there."""
    if 0 not in lines or set(lines) != set(range(lines[0]["of"])):
        return None
    first = lines[0]
    values = [lines[row]["value"] for row in range(len(lines))]
    return Batch(values, first["forwards"], first["seconds"], first["counts"])


def _whole(lines: list[bytes]) -> Iterator[dict[str, Any]]:
    return (line for raw in lines if (line := _opened(raw)) is not None)

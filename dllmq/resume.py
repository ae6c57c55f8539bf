"""What a cell has finished so far, in <cell>/.resume: the same command goes on where the last one stopped.

    key.json       everything the cell's numbers depend on; another key starts fresh, and says what differs
    block/         quantized blocks (models/block_store.py)
    own_runs/      batches of the quantized model's runs on the held-out prompts
    answers/       its answers by task (evaluation/answers.py)

Full precision's share is not here but in the cache, which keeps its own half-made entries. The folder goes
when the cell's results are written.
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dllmq.cache import Cache
from dllmq.calibration.states import KeepBatch
from dllmq.config import fingerprint_of
from dllmq.evaluation.answers import AnswerFolder
from dllmq.full_precision import keep_batches
from dllmq.models.block_store import BlockStore
from dllmq.report.results import to_plain, write_json_atomic

log = logging.getLogger(__name__)
FOLDER = ".resume"
_KEY = "key.json"
_UNKNOWN = "code, machine or data"


@dataclass(frozen=True)
class Resume:
    """Of one cell.

    Attributes:
        folder: <cell>/.resume; parts: what the numbers depend on (config.fingerprint_parts, the machine).
    """

    folder: Path
    parts: dict[str, Any]

    @property
    def key(self) -> str:
        return fingerprint_of(self.parts)

    def begin(self, go_on: bool = True) -> None:
        """Keeps what is there of the same key, and removes what is of another.

        Args:
            go_on: whether anything may be kept at all.

        Raises:
            OSError: the folder cannot be written.
        """
        parts, old = to_plain(self.parts), self._read()
        if old is not None and not (go_on and old == parts):
            why = "resume=false" if not go_on else f"now {difference(flat(old), flat(parts))} differs"
            log.info("what an earlier run has finished of this cell is not used: %s", why)
        if old is None or not go_on or old != parts:
            self.end()
        write_json_atomic(self.folder / _KEY, parts)

    def end(self) -> None:
        """Removes everything."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def blocks(self) -> BlockStore:
        return BlockStore(Cache(self.folder), self.key)

    def answers(self) -> AnswerFolder:
        return AnswerFolder(self.folder / "answers", self.key)

    def own_runs(self, num_steps: int) -> KeepBatch:
        """For measure_divergence."""
        return keep_batches(Cache(self.folder), "own_runs", num_steps)

    def _read(self) -> dict[str, Any] | None:
        """The key that is there; {} where it cannot be read, None where nothing is."""
        if not self.folder.is_dir():
            return None
        try:
            found = json.loads((self.folder / _KEY).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}


def flat(parts: dict[str, Any]) -> dict[str, Any]:
    """The config's keys beside the other parts, under the names a user gives them."""
    config, tasks = parts.get("config", {}), parts.get("tasks", {})
    rest = {key: value for key, value in parts.items() if key not in ("config", "tasks")}
    return rest | config | {"tasks": {**(config.get("tasks") or {}), **tasks}}


def difference(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> str:
    """The keys in which two configs differ, "code, machine or data" where none does."""
    keys = []
    for key in old.keys() | new.keys():
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            inner = difference(a, b, f"{prefix}{key}.")
            keys += [] if inner == _UNKNOWN else inner.split(", ")
        elif a != b:
            keys.append(f"{prefix}{key}")
    return ", ".join(sorted(keys)) or _UNKNOWN

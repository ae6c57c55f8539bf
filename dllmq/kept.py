"""What a cell's folder holds: results of its own fingerprint, which are taken, or of another, set aside."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dllmq.checkpoint.writer import remove_leftovers
from dllmq.models.stored import RECORD
from dllmq.report.results import RESULTS, RunRecord, load_record, read_json, to_plain
from dllmq.resume import difference, flat

log = logging.getLogger(__name__)
MODEL = "model"  # folder of the export, in the cell's
_STALE = {RESULTS: "results.stale.json", MODEL: "model.stale"}


@dataclass(frozen=True)
class Kept:
    """A cell's folder.

    Attributes:
        name: the cell's; key, parts: its fingerprint, and what that is of.
        export: the format that is asked for; None: nothing is exported.
    """

    folder: Path
    name: str
    key: str
    parts: dict[str, Any]
    export: str | None

    def finished(self) -> RunRecord | None:
        """The cell's results, export included; None where they are to be made, which is said."""
        file = self.folder / RESULTS
        if not file.is_file():
            return None
        try:
            record = load_record(file)
        except ValueError as error:
            log.warning("%s: not readable (%s); the cell is run again", file, error)
            return None
        if record.fingerprint != self.key:
            log.info("%s: has results of another configuration, code or machine (%s); it is run again",
                     self.name, self._differs(record))  # fmt: skip
            return None
        if not self._is_exported(record):
            log.info("%s: finished, but export=%s is not there; it is run again", self.name, self.export)
            return None
        log.info("%s: finished already, with the same fingerprint", self.name)
        return record

    def clean(self) -> None:
        """What another configuration or code has left is not taken for this one's, nor what a kill has."""
        remove_leftovers(self.folder / MODEL)
        if (self.folder / RESULTS).exists() and _key_of(self.folder / RESULTS) != self.key:
            self.set_aside(RESULTS)
        made = self.folder / MODEL / RECORD
        if made.is_file() and _key_of(made) != self.key:
            log.info("%s: its export is of another run and now in %s", self.name, _STALE[MODEL])
            self.set_aside(MODEL)

    def set_aside(self, name: str) -> None:
        """Moves a file or folder out of the way, over what was moved there before."""
        source, target = self.folder / name, self.folder / _STALE[name]
        if source.exists():
            if target.is_dir():
                shutil.rmtree(target)
            source.replace(target)

    def _differs(self, record: RunRecord) -> str:
        """The keys in which a record is of something else."""
        own, identity = to_plain(self.parts), record.notes.get("identity")
        config = {k: v for k, v in record.config.items() if k in own["config"]}
        if not isinstance(identity, dict):
            return difference(config, own["config"])
        return difference(flat(identity | {"config": config}), flat(own))

    def _is_exported(self, record: RunRecord) -> bool:
        """Whether the folder holds the export that is asked for, of this record."""
        if self.export is None:
            return True
        made = record.notes.get("export") or {}
        file = self.folder / MODEL / RECORD
        there = file.is_file() and _key_of(file) == self.key
        return there and made.get("format") == self.export


def _key_of(file: Path) -> str | None:
    """The fingerprint in results.json, or in the record of an export; None where there is none."""
    try:
        found = read_json(file)
    except ValueError:
        return None
    found = found.get("run") if isinstance(found, dict) and file.name == RECORD else found
    return found.get("fingerprint") if isinstance(found, dict) else None

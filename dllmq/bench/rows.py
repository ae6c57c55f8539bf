"""What a comparison leaves behind (Row), and results.json: the sections with their machine and command.

    {"format": 1, "sections": [{section, shape, quick, command, date, machine, rows, left_out, finished},
                               ...]}

A section is identified by its name, shape and device, and by whether it is a trial: measured again into the
same file, it replaces itself and leaves the others alone, so a long measurement can be made in parts. It is
written after every row; `finished` is false until the last one is there.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from dllmq.bench.timing import Measured, ratio
from dllmq.report.results import read_json, write_json_atomic

FORMAT, RESULTS = 1, "results.json"
Number = int | float


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        key: what it is, for programs: "generate.exact".
        what: the same for people; shape: sizes.
        baseline, ours: what was compared; baseline is "" where there is nothing to compare with.
        unit: "s" or "B".
        baseline_value, ours_value: medians.
        ratio, low, high: baseline / ours, per round: median, lowest, highest; above 1 is faster, or smaller.
        repeats: rounds.
        equal: whether the outputs are equal as the row claims; None where nothing is claimed.
        share: of tokens, or codes, that are equal; None where that means nothing.
        note: what else a reader must know ("approximate").
        numbers: further measurements, by name.
    """

    key: str
    what: str
    shape: str
    baseline: str
    ours: str
    unit: str
    baseline_value: Number | None
    ours_value: Number
    ratio: Number | None
    low: Number | None
    high: Number | None
    repeats: int
    equal: bool | None = None
    share: Number | None = None
    note: str = ""
    numbers: dict[str, Number] = field(default_factory=dict)


def timed_row(
    key: str,
    what: str,
    shape: str,
    names: tuple[str, str],
    pair: tuple[Measured, Measured],
    equal: bool | None = None,
    share: float | None = None,
    note: str = "",
    numbers: Mapping[str, Number] | None = None,
) -> Row:
    """A row of seconds; `names` and `pair` are (baseline, ours)."""
    base, ours = pair
    found = ratio(base, ours)
    return Row(
        key, what, shape, *names, "s", base.median, ours.median, found.median, found.low, found.high,
        len(ours.seconds), equal, share, note, dict(numbers or {}),
    )  # fmt: skip


@dataclass
class Sheet:
    """The rows of a section as they come; `changed` is called after each."""

    changed: Callable[[Sheet], None] = lambda sheet: None
    rows: list[Row] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.changed(self)

    def leave_out(self, sentence: str) -> None:
        """Says once what is not measured, and why."""
        if sentence not in self.left_out:
            self.left_out.append(sentence)
            self.changed(self)


@dataclass(frozen=True)
class Section:
    """One section as it lies in results.json.

    Attributes:
        quick: toy sizes: a trial of the program, and no measurement.
        machine: as in machine.py.
        left_out: sentences on what is not measured, and why.
        finished: whether it came to its end; false: it was stopped (killed, out of time, failed) after these
            rows, and others are missing.
    """

    section: str
    shape: str
    quick: bool
    command: str
    date: str
    machine: dict[str, Any]
    rows: tuple[Row, ...]
    left_out: tuple[str, ...] = ()
    finished: bool = True

    @property
    def identity(self) -> tuple[str, ...]:
        quick = ("quick",) if self.quick else ()
        return self.section, self.shape, str(self.machine.get("device")), *quick

    @property
    def unequal(self) -> list[Row]:
        """Rows whose claim of equality failed."""
        return [row for row in self.rows if row.equal is False]


def read_sections(file: Path) -> list[Section]:
    """The sections of a results.json; none where there is no such file.

    Raises:
        ValueError: the file is not one of the bench's.
    """
    if not file.is_file():
        return []
    plain = read_json(file)
    try:
        if plain["format"] != FORMAT:
            raise ValueError(f"{file} has format {plain['format']}; this version reads {FORMAT}: run again.")
        return [_section(entry) for entry in plain["sections"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file} is not a results.json of dllmq.bench ({error}): delete it.") from None


def _section(entry: dict[str, Any]) -> Section:
    unknown = set(entry) - {f.name for f in fields(Section)}
    if unknown:
        raise KeyError(*sorted(unknown))
    rows = tuple(Row(**row) for row in entry["rows"])
    finished = entry.get("finished", _is_even(rows))
    return Section(**entry | {"rows": rows, "left_out": tuple(entry["left_out"]), "finished": finished})


def _is_even(rows: tuple[Row, ...]) -> bool:
    """Whether every comparison was made at as many sizes, as in a section that came to its end.

    It decides of files from before `finished` was recorded; rows that nobody can miss are not found missing.
    """
    return len(set(Counter(row.key for row in rows).values())) <= 1


def check_folder(folder: Path) -> None:
    """Makes a folder for results and sees that files can be written there, before anything is measured.

    Raises:
        ValueError: it cannot be written, or its results.json is another program's.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise ValueError(
            f"results cannot be written to {folder} ({why}): give a folder that can be, --out FOLDER."
        ) from None
    read_sections(folder / RESULTS)


def write_section(file: Path, section: Section) -> list[Section]:
    """Puts a section into results.json, in the place of an earlier one of the same identity; all of them."""
    kept = read_sections(file)
    places = [s.identity for s in kept]
    if section.identity in places:
        kept[places.index(section.identity)] = section
    else:
        kept.append(section)
    write_json_atomic(file, to_plain(kept))
    return kept


def to_plain(sections: list[Section]) -> dict[str, Any]:
    """What results.json holds; every number finite."""
    plain = {"format": FORMAT, "sections": [asdict(s) for s in sections]}
    json.dumps(plain, allow_nan=False)  # a NaN is a mistake of the bench, and raises here
    return plain

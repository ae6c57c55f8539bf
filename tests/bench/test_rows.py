"""results.json: what is written is read back; a section replaces itself; foreign files are refused."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
from bench.rows_factory import row, section

from dllmq.bench.rows import (
    Row,
    Section,
    Sheet,
    check_folder,
    read_sections,
    timed_row,
    to_plain,
    write_section,
)
from dllmq.bench.timing import Measured


def test_sections_are_read_back_as_written(tmp_path: Path) -> None:
    first, second = (
        section(row(), row(equal=None, ratio=None, low=None, high=None)),
        section(section="memory"),
    )
    write_section(tmp_path / "results.json", first)
    write_section(tmp_path / "results.json", second)
    assert read_sections(tmp_path / "results.json") == [first, second]


def test_keys_of_the_file(tmp_path: Path) -> None:
    write_section(tmp_path / "results.json", section(row()))
    plain = json.loads((tmp_path / "results.json").read_text())
    assert set(plain) == {"format", "sections"} and plain["format"] == 1
    assert set(plain["sections"][0]) == {f.name for f in fields(Section)}
    assert set(plain["sections"][0]["rows"][0]) == {f.name for f in fields(Row)}


def test_a_section_replaces_itself_in_its_place(tmp_path: Path) -> None:
    file, old, other = tmp_path / "r.json", section(row()), section(section="linear")
    for entry in (old, other):
        write_section(file, entry)
    new = section(row(ratio=4.0))
    assert write_section(file, new) == [new, other] == read_sections(file)
    gpu = replace(new, machine=new.machine | {"device": "cuda"})
    assert write_section(file, gpu) == [new, other, gpu]
    trial = replace(new, quick=True)  # which is no measurement, and takes the place of none
    assert write_section(file, trial) == [new, other, gpu, trial]


@pytest.mark.parametrize(("second", "finished"), [("batch 1", True), (None, False)])
def test_files_from_before_the_mark_are_finished_unless_rows_are_missing(
    tmp_path: Path, second: str | None, finished: bool
) -> None:
    """A width at batch 8, and another one only at batch 1: the rest was cut off."""
    rows = [row(), row(shape="batch 1"), row(key="generate.w8a8")]
    rows += [row(key="generate.w8a8", shape=second)] if second else []
    plain = to_plain([section(*rows)])
    assert plain["sections"][0].pop("finished") is True
    (tmp_path / "r.json").write_text(json.dumps(plain))
    (found,) = read_sections(tmp_path / "r.json")
    assert found.finished is finished and len(found.rows) == len(rows)


def test_what_is_recorded_is_not_guessed(tmp_path: Path) -> None:
    for finished in (True, False):
        uneven = section(row(), row(), row(key="other"), finished=finished)
        write_section(tmp_path / "r.json", uneven)
        assert read_sections(tmp_path / "r.json") == [uneven]


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/speed")):
        with pytest.raises(ValueError, match=rf"cannot be written to {folder} \(.+\): give a folder"):
            check_folder(folder)
    check_folder(tmp_path / "new" / "one")
    assert list((tmp_path / "new" / "one").iterdir()) == []
    (tmp_path / "results.json").write_text('{"scores": 1}')
    with pytest.raises(ValueError, match=r"not a results\.json of dllmq\.bench"):
        check_folder(tmp_path)


@pytest.mark.parametrize("text", ['{"format": 2, "sections": []}', '{"sections": []}', "[]", "{"])
def test_other_files_are_refused_in_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ValueError, match=r"r\.json"):
        read_sections(tmp_path / "r.json")


def test_fields_of_another_version_are_refused(tmp_path: Path) -> None:
    plain = to_plain([section(row())])
    plain["sections"][0]["colour"] = "blue"
    (tmp_path / "r.json").write_text(json.dumps(plain))
    with pytest.raises(ValueError, match="colour"):
        read_sections(tmp_path / "r.json")


def test_no_file_has_no_sections(tmp_path: Path) -> None:
    assert read_sections(tmp_path / "none.json") == []


def test_a_number_that_is_not_finite_never_reaches_the_file() -> None:
    with pytest.raises(ValueError):
        to_plain([section(row(ratio=float("nan")))])


def test_timed_row_takes_medians_and_the_ratio_of_rounds() -> None:
    pair = Measured((2.0, 9.0, 4.0), None), Measured((1.0, 3.0, 1.0), None)
    made = timed_row("k", "what", "size", ("theirs", "ours"), pair, equal=False)
    assert (made.baseline_value, made.ours_value) == (4.0, 1.0)
    assert (made.ratio, made.low, made.high, made.repeats) == (3.0, 2.0, 4.0, 3)
    assert section(made, row()).unequal == [made]


def test_a_sheet_tells_of_each_row_and_says_a_sentence_once() -> None:
    lengths: list[tuple[int, int]] = []
    sheet = Sheet(lambda s: lengths.append((len(s.rows), len(s.left_out))))
    sheet.add(row())
    sheet.leave_out("why")
    sheet.leave_out("why")
    sheet.add(row())
    assert lengths == [(1, 0), (1, 1), (2, 1)] and sheet.left_out == ["why"]

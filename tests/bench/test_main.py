"""The command line: what it refuses, prints and writes, and its exit code."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.rows_factory import row, section

from dllmq.bench import __main__ as bench
from dllmq.bench import sections
from dllmq.bench.rows import Sheet, read_sections, write_section
from dllmq.bench.shapes import Setup, device_of


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Results go to outputs/bench of the folder that a command is given in."""
    monkeypatch.chdir(tmp_path)


def told(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert bench.main(list(argv)) == 1
    error = capsys.readouterr().err
    assert error.startswith("dllmq.bench: ") and error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["speed"], "unknown section 'speed': use generate, quantize, linear, evaluate, memory"),
        (["--shape", "mini,llada_7b"], "unknown --shape 'llada_7b': use mini, tiny, llada_1b_shape"),
        (["--shape", ","], "unknown --shape ''"),
        (["--device", "tpu"], "unknown --device 'tpu'"),
        (["--device", "cpu:3"], "unknown --device 'cpu:3': use auto, cpu, cuda or cuda:<index>."),
        (["--device", "cuda:x"], "unknown --device 'cuda:x'"),
        (["--out", "/proc/speed", "--quick"], "results cannot be written to /proc/speed (No such file"),
        (
            ["--out", __file__, "--quick"],
            "test_main.py (File exists): give a folder that can be, --out FOLDER.",
        ),
        (["--repeats", "0"], "--repeats must be an integer >= 1; got 0."),
        (["--threads", "0"], "--threads must be an integer >= 1; got 0."),
        (["--dtype", "float16"], "unknown --dtype 'float16': use auto, float32 or bfloat16."),
        (["generate", "--shape", "llada_8b_shape", "--device", "cpu"], "measured on a CUDA device"),
        (["--report", "nowhere"], "nowhere has no results.json: measure first"),
    ],
)
def test_wrong_input_is_one_sentence_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argv: list[str], words: str
) -> None:
    setups = fake(monkeypatch, equal=True)
    assert words in told(capsys, *argv)
    assert setups == [] and not Path("outputs").exists()


def test_there_are_as_many_cuda_devices_as_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert str(device_of("cuda:1")) == "cuda:1" and str(device_of("auto")) == "cuda"
    with pytest.raises(ValueError, match=r"--device cuda:2: torch sees 2 CUDA device"):
        device_of("cuda:2")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert "torch sees no CUDA device here; use --device cpu." in told(capsys, "--device", "cuda")


def fake(monkeypatch: pytest.MonkeyPatch, equal: bool) -> list[Setup]:
    """Sections that measure nothing; the setups they were told."""
    setups: list[Setup] = []

    def measure(setup: Setup, sheet: Sheet) -> None:
        setups.append(setup)
        sheet.add(row(equal=equal))
        sheet.leave_out("Not measured: that.")

    for name in sections.SECTIONS:
        monkeypatch.setitem(sections.SECTIONS, name, measure)
    return setups


def test_json_is_all_that_is_printed(monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    setups = fake(monkeypatch, equal=True)
    assert (
        bench.main(["linear", "generate", "--json", "--repeats", "2", "--shape", "tiny", "--device", "cpu"])
        == 0
    )
    printed = capsys.readouterr()
    plain = json.loads(printed.out)
    assert "In outputs/bench: report.html, table.md, results.json, figures." in printed.err
    assert [s["section"] for s in plain["sections"]] == ["linear", "generate"]
    assert [(s.repeats, s.dtype_name) for s in setups] == [(2, "bfloat16"), (2, "float32")]
    assert plain["sections"][1]["command"].startswith("python -m dllmq.bench linear generate --json")
    assert {"device", "processor", "threads", "versions", "git"} <= set(plain["sections"][0]["machine"])


def test_outputs_that_differ_are_the_exit_code_and_stand_out(
    monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    fake(monkeypatch, equal=False)
    assert bench.main(["generate", "--shape", "tiny"]) == 1
    assert "NO" in capsys.readouterr().out


def test_a_folder_gets_results_table_and_figures_and_keeps_what_it_had(
    monkeypatch: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake(monkeypatch, equal=True)
    kept = section(row(), section="evaluate")
    write_section(tmp_path / "results.json", kept)
    assert bench.main(["memory", "--quick", "--shape", "tiny", "--out", str(tmp_path)]) == 0
    found = read_sections(tmp_path / "results.json")
    assert found[0] == kept and (found[1].section, found[1].shape) == ("memory", "tiny bfloat16")
    told_so = "memory, tiny bfloat16 (a trial of the program, no measurement)"
    assert f"## {told_so}" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "figures" / "memory-tiny-bfloat16-cpu-quick.png").is_file()
    out = capsys.readouterr().out
    assert told_so in " ".join(out.split())
    assert "exact generation" in out and "Not measured: that." in out and "3.00 x" in out


def test_a_section_that_breaks_off_leaves_its_rows(monkeypatch: Any, tmp_path: Path) -> None:
    def measure(setup: Setup, sheet: Sheet) -> None:
        sheet.add(row())
        raise ValueError("no more")

    monkeypatch.setitem(sections.SECTIONS, "linear", measure)
    assert bench.main(["linear", "--out", str(tmp_path)]) == 1
    assert [(s.rows, s.finished) for s in read_sections(tmp_path / "results.json")] == [((row(),), False)]
    assert "(stopped after 1 row)" in (tmp_path / "table.md").read_text()
    assert "Stopped after 1 row." in (tmp_path / "report.html").read_text()


def test_results_go_to_a_folder_of_their_own_by_default(
    monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """The trial of a section keeps the measurement that is there."""
    fake(monkeypatch, equal=True)
    assert (
        bench.main(["memory", "--shape", "tiny"]) == 0 == bench.main(["memory", "--shape", "tiny", "--quick"])
    )
    assert "In outputs/bench: report.html, table.md, results.json, figures.\n" in capsys.readouterr().out
    found = read_sections(Path("outputs/bench/results.json"))
    assert [(s.quick, s.finished) for s in found] == [(False, True), (True, True)]
    page = Path("outputs/bench/report.html").read_text()
    assert page.count("<svg") == 2 and page.count("A trial of the program, no measurement.") == 1


def test_a_disk_that_fails_is_one_sentence(monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    fake(monkeypatch, equal=True)
    monkeypatch.setattr(sections, "write_section", full)
    assert "No space left on device" in told(capsys, "memory", "--shape", "tiny")


def test_sections_with_sizes_of_their_own_run_once_for_several_shapes() -> None:
    args = bench.arguments(["--shape", "mini,tiny", "--quick", "--device", "cpu"])
    names = [name for name, _ in bench.setups(args)]
    assert names == ["generate", "generate", "quantize", "linear", "evaluate", "memory", "memory"]


def test_report_prints_the_page_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_section(tmp_path / "results.json", section(row()))
    assert bench.main(["--report", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == (tmp_path / "README.md").read_text().strip()

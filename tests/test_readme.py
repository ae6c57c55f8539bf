"""Every command of the README runs, as written but for sizes; what make runs is what the README says."""

import io
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import forked
import pytest
from rich.console import Console

from dllmq.bench.rows import read_sections
from dllmq.bench.sections import SECTIONS
from dllmq.report.results import load_sweep
from dllmq.report.table import print_tables
from dllmq.report.tables import sweep_tables

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Sizes that keep a run to seconds; everything else is the README's.
SMALL = [
    *("eval.limit=2", "eval.batch_size=2", "eval.mc_num=2", "eval.mc_batch_size=2"),
    *("eval.fidelity_states=4", "eval.fidelity_prompts=2", "calibration.num_prompts=2"),
    *("calibration.num_states=4", "sampler.gen_length=48", "sampler.block_length=16"),
    *("sampler.steps=6", "tracker=none", "threads=1"),
]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    """Every line of a bash block, comments cut."""
    lines = [line.split("  #")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line]


RUNS = [c for c in commands() if c.startswith("python -m dllmq.run")]


def test_every_command_is_covered_here() -> None:
    others = [c for c in commands() if c not in RUNS]
    assert [c.split("  ")[0].strip() for c in others] == [
        "make demo",
        "make test",
        'python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e ".[dev]"',
        ".venv/bin/python -m dllmq.run -m method=awq,gptq tmas=true,false",
        "python -m dllmq.report outputs/bitwidth",
        "python -m dllmq.generate --side-by-side method=rtn bits=w2a4",  # run by tests/test_docs.py
        "python -m dllmq.bench --quick",
        "python -m dllmq.status outputs/bitwidth",
    ]
    assert len(RUNS) >= 8


@pytest.mark.parametrize("target", ["demo", "test"])
def test_make_runs_what_the_readme_says(target: str, tmp_path: Path) -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    outside = {k: v for k, v in os.environ.items() if not k.startswith("MAKE") and k != "MFLAGS"}
    plan = subprocess.run(
        ["make", "--no-print-directory", "-n", f"VENV={tmp_path}/.venv", target],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=outside,  # also where these tests were started by make
    )
    assert plan.returncode == 0, plan.stderr
    assert "-m venv" in plan.stdout and 'install  -c constraints.txt -e ".[dev]"' in plan.stdout
    last = plan.stdout.strip().splitlines()[-1].replace(f"{tmp_path}/", "")
    assert (
        last
        == {
            "demo": ".venv/bin/python -m dllmq.run -m method=awq,gptq tmas=true,false",
            "test": ".venv/bin/python -m pytest -n auto --dist loadgroup --no-loadscope-reorder",
        }[target]
    )


def test_the_demo_of_the_readme_is_that_of_its_records(monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"<!-- demo:begin -->\n```text\n(.*?)```", README, flags=re.DOTALL)
    console = Console(width=100, file=io.StringIO(), record=True)
    monkeypatch.setenv("COLUMNS", "100")
    print_tables(sweep_tables(load_sweep(ROOT / "experiments" / "demo")), console)
    printed = {line.rstrip() for line in console.export_text().splitlines()}
    assert [line for line in block.splitlines() if line not in printed] == []
    assert sum(line.startswith((" awq ", " gptq ")) for line in block.splitlines()) == 4


def run(command: str, folder: Path, extra: Sequence[str] = ()) -> str:
    """What it prints; it warns of nothing."""
    words = shlex.split(command)
    assert words[:2] == ["python", "-m"]
    done = forked.run(folder, *words[2:], *extra)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert re.findall(r"\w+Warning: .*", done.stderr) == []
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("command", RUNS)
def test_run_commands(command: str, tmp_path: Path) -> None:
    if "/ckpts/LLaDA-8B-Base" in command:  # a checkpoint in the published format, made here
        command = command.replace("/ckpts/LLaDA-8B-Base", str(ROOT / "dllmq" / "mini" / "weights"))
    if "data_dir=data" in command:  # GSM8K in its data set's columns
        (tmp_path / "data" / "gsm8k").mkdir(parents=True)
        lines = [f'{{"question": "What is {i} + 1?", "answer": "#### {i + 1}"}}\n' for i in range(6)]
        for split in ("train", "test"):
            (tmp_path / "data" / "gsm8k" / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    extra = [] if "dry_run=true" in command else SMALL
    extra = [o for o in extra if o.partition("=")[0] not in command]
    if "experiment=bitwidth" in command:  # with overrides beside it an experiment has a folder of its own
        extra += ["name=bitwidth", "bits=w8a8,w4a4"]
    if "experiment=ablation" in command:
        extra.append("seed=0")
    run(command, tmp_path, extra)
    if "dry_run=true" in command:
        assert not list(tmp_path.rglob("results.json"))
        return
    records = list(tmp_path.rglob("results.json"))
    assert len(records) == cells_of(" ".join([command, *extra]))
    folder = records[0].parent.parent
    assert {"baseline.json", "summary.json", "table.md", "report.html"} <= {f.name for f in folder.iterdir()}
    if "experiment=bitwidth" in command:
        run("python -m dllmq.report outputs/bitwidth", tmp_path)
        run("python -m dllmq.status outputs/bitwidth", tmp_path)


@pytest.mark.slow
def test_the_bench_measures_every_section(tmp_path: Path) -> None:
    here = ["--threads", "1", "--device", "cpu", "--out", "measured"]
    assert "textbook" in run("python -m dllmq.bench --quick", tmp_path, here)
    found = read_sections(tmp_path / "measured" / "results.json")
    assert [s.section for s in found] == list(SECTIONS) and all(s.rows for s in found)


def cells_of(command: str) -> int:
    cells = 3 if "experiment=bitwidth" in command else 1  # its methods
    for word in shlex.split(command):
        key, _, value = word.partition("=")
        if key and "," in value and "[" not in value:
            cells *= len(value.split(","))
    return cells


def test_the_python_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = blocks("python")
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()

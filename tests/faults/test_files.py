"""Nothing is written under its final name before it is whole, and nothing depends on the clock."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2] / "dllmq"
WRITERS = {
    "write_text",
    "write_bytes",
    "save_file",
    "savefig",
    "copyfile",
    "copy",
    "copytree",
    "dump",
    "touch",
}
# function -> why its file is not under a final name, or is no result
ALLOWED = {
    "cache.py:write": "a temporary folder, renamed",
    "cache.py:save_tensors": "`Cache.write`'s temporary folder",
    "cache.py:save_json": "`Cache.write`'s temporary folder",
    "checkpoint/writer.py:add_text": "the staging folder, renamed",
    "checkpoint/writer.py:add_file": "the staging folder, renamed",
    "checkpoint/writer.py:_flush": "the staging folder, renamed",
    "evaluation/answers.py:_append": "a log: lines have checksums",
    "evaluation/fidelity.py:write_tensors": "renamed",
    "machine.py:reset_peak_memory": "/proc",
    "durable.py:_write": "renamed",
}
# modules whose files are no results: the sandbox's, training's of the embedded model, figures in memory
OTHERS = (
    "evaluation/sandbox.py",
    "evaluation/sandbox_runner.py",
    "mini/train.py",
    "bench/",
    "report/figures.py",
)


def writes(path: Path) -> Iterator[str]:
    """module:function of every call that may create a file."""
    module = path.relative_to(ROOT).as_posix()
    for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
            name = getattr(call.func, "attr", getattr(call.func, "id", ""))
            if name in WRITERS or (name in ("open", "fdopen") and _mode(call) & set("wax")):
                yield f"{module}:{function.name}"


def _mode(call: ast.Call) -> set[str]:
    given = [*call.args, *(k.value for k in call.keywords if k.arg == "mode")]
    texts = [a.value for a in given if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    return set().union(*(set(t) for t in texts if len(t) <= 3 and set(t) <= set("rwaxbt+")))


def test_files_are_written_by_the_few_functions_that_write_them_whole() -> None:
    sources = [p for p in ROOT.rglob("*.py") if not p.relative_to(ROOT).as_posix().startswith(OTHERS)]
    found = {where for path in sources for where in writes(path)}
    assert found - ALLOWED.keys() == set()
    assert ALLOWED.keys() - found == set()  # the list is not older than the code


def test_the_scan_finds_writes(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "a.py").write_text(
        "def f(p):\n    p.write_text('x')\n    open(p, 'w')\n    p.open('ab')\n    open(p, mode='x')\n"
        "def g(p):\n    open(p)\n    p.open('rb')\n    p.read_text()\n"
    )
    assert list(writes(tmp_path / "a.py")) == ["a.py:f"] * 4


def test_durations_and_orders_do_not_come_from_the_clock() -> None:
    """time.time goes back when a clock is set; times of files are compared for equality alone."""
    found = []
    for path in ROOT.rglob("*.py"):
        # status: how old heartbeats are, by the clock of their file system; bench: the date on its page
        if path.relative_to(ROOT).as_posix() in ("status.py", "bench/sections.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in (
                "st_mtime",
                "st_ctime",
                "getmtime",
                "now",
                "utcnow",
            ):
                found.append(f"{path.relative_to(ROOT).as_posix()}: {node.attr}")
            clock = isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "time"
            if clock and node.attr in ("time", "time_ns", "localtime", "ctime"):
                found.append(f"{path.relative_to(ROOT).as_posix()}: time.{node.attr}")
    assert found == []

"""A program passes only by running to its end; nothing it does on the way there counts."""

import os
import time

import pytest

from dllmq.evaluation.sandbox import Outcome, run_program, run_programs

GOOD = "def f(x):\n    return x + 1\n\ndef check(c):\n    assert c(1) == 2\n\ncheck(f)\n"
BAD = GOOD.replace("x + 1", "x + 2")


def test_correct_program_passes_and_wrong_one_fails() -> None:
    assert run_program(GOOD) == Outcome("passed")
    assert run_program(BAD) == Outcome("failed", "AssertionError:")


@pytest.mark.parametrize(
    "first",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "raise SystemExit",
        "print('passed\\ndone'); import os; os._exit(0)",
        "import sys; print('0' * 32, flush=True); print('done', file=sys.stderr); sys.exit(0)",
        # every descriptor is told that the program is done, and gets a guess for a nonce
        "import os\n"
        "for fd in range(3, 64):\n"
        "    try:\n        os.write(fd, b'done\\n' + b'0' * 16)\n"
        "    except OSError:\n        pass\n"
        "os._exit(0)",
    ],
    ids=["sys.exit", "os._exit", "SystemExit", "stdout", "stderr", "descriptors"],
)
def test_leaving_early_fails_whatever_was_said(first: str) -> None:
    assert run_program(first + "\n" + BAD).status == "failed"
    assert run_program(first + "\n" + GOOD).status == "failed"


@pytest.mark.parametrize(
    ("source", "detail"),
    [
        ("def f(:", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("raise ValueError('a\\nb' * 10**6)", "ValueError: a b"),
        ("class E(Exception):\n    def __str__(self): raise self\nraise E", "status 1"),
        ("import os; os.kill(os.getpid(), 11)", "SIGSEGV"),
        ("\ud800", "SyntaxError"),
        ("open('/dev/stdin').read() or 1 / 0", "ZeroDivisionError"),  # no input
        ("import numpy", "ModuleNotFoundError"),  # the standard library only
        ("import dllmq", "ModuleNotFoundError"),
    ],
)
def test_errors_are_named_in_one_bounded_line(source: str, detail: str) -> None:
    outcome = run_program(source)
    assert outcome.status == "failed" and detail in outcome.detail
    assert len(outcome.detail) <= 1024 and "\n" not in outcome.detail


@pytest.mark.parametrize(
    "source",
    ["while True: pass", "import time; time.sleep(60)", "while True: print('x' * 10**6)"],
    ids=["loop", "sleep", "output"],
)
def test_endless_program_is_stopped_by_the_clock(source: str) -> None:
    start = time.monotonic()
    assert run_program(source, timeout_s=1.0).status == "timeout"
    assert time.monotonic() - start < 2


def test_memory_is_limited() -> None:
    hog = "x = []\nwhile True: x.append(bytes(2**24))"
    assert run_program(hog, timeout_s=20.0, memory_bytes=2**27).status == "memory"
    assert run_program("x = [0] * 10**10").status == "memory"


def test_large_output_is_thrown_away() -> None:
    assert run_program("for _ in range(100): print('x' * 10**5)\n" + GOOD).status == "passed"


def test_environment_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "1")
    assert run_program("import os; assert not os.environ and os.getenv('SECRET') is None").status == "passed"


def test_files_are_small_temporary_and_the_working_folder_empty() -> None:
    big = "with open('f', 'wb') as f: f.write(bytes(2**21))"
    assert "File too large" in run_program(big).detail
    assert run_program("import os; assert os.listdir() == []; open('f', 'w').write('x')").status == "passed"
    assert run_program("import os; assert os.listdir() == []").status == "passed"
    assert not os.path.exists("f")


def test_children_in_its_session_die_with_the_program() -> None:
    """A child is told apart by its argument, and looked for after the program's end."""
    if os.geteuid() != 0:
        assert "BlockingIOError" in run_program("import os; os.fork()").detail
        return
    mark = f"dllmq-sandbox-child-{os.getpid()}"
    child = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'input()', '{mark}'], stdin=-1)"
    assert run_program(child).status == "passed"
    deadline = time.monotonic() + 5
    while mark in _commands() and time.monotonic() < deadline:  # a killed process takes a moment to go
        time.sleep(0.02)
    assert mark not in _commands()


def _commands() -> str:
    texts = []
    for pid in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else []):
        try:
            with open(f"/proc/{pid}/cmdline") as file:
                texts.append(file.read())
        except OSError:
            continue
    return "\n".join(texts)


def test_strings_hash_alike_in_every_run() -> None:
    order = "assert list({'a', 'b', 'c', 'd', 'e'})[0] == "
    first = [c for c in "abcde" if run_program(order + repr(c)).status == "passed"]
    assert len(first) == 1


def test_many_programs_keep_their_order_and_report_progress() -> None:
    seen: list[tuple[int, int, str]] = []
    outcomes = run_programs([GOOD, BAD] * 10, progress=lambda *args: seen.append(args))
    assert [o.status for o in outcomes] == ["passed", "failed"] * 10
    assert seen == [(i + 1, 20, "programs") for i in range(20)]
    assert run_programs([]) == []


def test_interpreter_that_cannot_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/nonexistent/python")
    assert run_program(GOOD).status == "error"

"""A verdict rests on values alone; a program that attacks the machine, the judge or the clock gets nowhere.

Everything runs at both levels where bubblewrap works.
"""

import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dllmq.evaluation import sandbox
from dllmq.evaluation.code_scoring import pass_at_1, run_tests
from dllmq.evaluation.sandbox import Outcome, Program, Protection, run_program, run_programs

pytestmark = pytest.mark.slow

GOOD = "def f(x):\n    return x + 1\n"
BAD = "def f(x):\n    return x + 2\n"
TEST = "assert f(1) == 2"
MEASURE = sandbox.protection.__wrapped__


def measured(bubblewrap: str | None) -> Protection:
    """protection(), not remembered, on a machine that has this bwrap."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "which", lambda name: bubblewrap)
        return MEASURE()


@pytest.fixture(params=["bubblewrap", "rlimits"], scope="module", autouse=True)
def found(request: pytest.FixtureRequest) -> Iterator[Protection]:
    """What the module's tests run under."""
    command = shutil.which("bwrap")
    if request.param == "bubblewrap" and command is None:
        pytest.skip("bubblewrap (bwrap) is not installed")
    found = measured(command if request.param == "bubblewrap" else None)
    if found.level != request.param:
        pytest.skip(found.reason)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox, "protection", lambda: found)
        yield found


def needs(found: Protection, *names: str) -> None:
    for name in names:
        if name in found.open:
            pytest.skip(
                f"at {found.level!r} this kernel leaves {name} open: no seccomp filter or no Landlock"
            )


def run(source: str, test: str = TEST, timeout_s: float = 20.0, **limits: int) -> Outcome:
    return run_program(Program(source, test, "f"), timeout_s, **limits)


def assert_refused(attempts: dict[str, str], error: str = "OSError", **others: str) -> None:
    """Each attempt, an expression, ends in `error` or in what `others` says of it ("done": it worked)."""
    source = (
        "import os, socket, subprocess, threading\n"
        "def f(attempt):\n"
        "    try:\n        eval(attempt)\n"
        "    except OSError:\n        return 'OSError'\n"
        "    except Exception as error:\n        return type(error).__name__\n"
        "    return 'done'\n"
    )
    expected = {name: error for name in attempts} | others
    test = f"ends = {{name: f(attempt) for name, attempt in {attempts!r}.items()}}\n"
    assert run(source, f"{test}assert ends == {expected!r}, ends") == Outcome("passed")


# Verdicts


def test_correct_program_passes_and_wrong_one_fails() -> None:
    assert run(GOOD) == Outcome("passed")
    assert run(BAD) == Outcome("failed", "AssertionError:")


@pytest.mark.parametrize(
    "leave",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "raise SystemExit",
        "print('passed\\nready\\npassed ' + '0' * 32, flush=True); import os; os._exit(0)",
        # every descriptor is told that all is well
        "import os\n"
        "for fd in range(3, 1024):\n"
        "    try:\n        os.write(fd, b'passed ' + b'0' * 32 + b'\\n')\n"
        "    except OSError:\n        pass\n"
        "os._exit(0)",
    ],
    ids=["sys.exit", "os._exit", "SystemExit", "stdout", "descriptors"],
)
@pytest.mark.parametrize("when", ["at once", "when called"])
def test_leaving_early_fails_whatever_was_said(leave: str, when: str) -> None:
    if when == "when called":
        leave = "def f(x):\n" + "".join(f"    {line}\n" for line in leave.splitlines())
        assert run(leave).status == "failed"
    else:
        assert run(f"{leave}\n{GOOD}").status == "failed"


@pytest.mark.parametrize(
    "trick",
    [
        "class Same(int):\n    __eq__ = __le__ = __bool__ = lambda *_: True\ndef f(x): return Same(3)",
        "class Same:\n    __eq__ = __le__ = __bool__ = lambda *_: True\ndef f(x): return Same()",
        "import builtins, operator\nbuiltins.abs = builtins.isinstance = operator.eq = lambda *_: True\n"
        + BAD,
        "__debug__ or 1\nimport sys\nsys.exit = sys.excepthook = lambda *_: None\n" + BAD,
        "import atexit, os\natexit.register(os._exit, 0)\n" + BAD,
        "import sys\nsys.settrace(lambda *_: None)\nsys.modules.clear()\n" + BAD,
        "def check(f): pass\n" + BAD,
    ],
    ids=["equal int", "equal object", "builtins", "hooks", "atexit", "modules", "check"],
)
def test_what_the_program_patches_does_not_reach_the_test(trick: str) -> None:
    test = "def check(f):\n    assert isinstance(f(1), int) and abs(f(1) - 2) == 0 and f(1) == 2\ncheck(f)"
    assert run(GOOD, test).status == "passed"
    assert run(trick, test).status == "failed"


def test_program_never_holds_test_nonce_or_channel() -> None:
    """It looks through its memory, frames, command, environment and descriptors."""
    source = (
        "import gc, os, sys\n"
        "def f(x):\n"
        "    mark, seen, frame = 'kram'[::-1] + '-4711', [], sys._getframe()\n"
        "    while frame:\n"
        "        seen += [*frame.f_locals.values(), *frame.f_globals.values()]\n"
        "        frame = frame.f_back\n"
        "    for path in ['cmdline', 'environ']:\n"
        "        for pid in ['self', str(os.getppid()), '1']:\n"
        "            try:\n                seen.append(open(f'/proc/{pid}/{path}', 'rb').read())\n"
        "            except OSError:\n                pass\n"
        "    seen += [v for o in gc.get_objects() if isinstance(o, (dict, list, tuple)) and o is not seen\n"
        "             for v in (o.values() if isinstance(o, dict) else o)]\n"
        "    texts = [v if isinstance(v, bytes) else v.encode('utf-8', 'replace')\n"
        "             for v in seen if isinstance(v, (str, bytes))]\n"
        "    files = []\n"
        "    for fd in range(1024):\n"
        "        try:\n            os.fstat(fd); files.append(fd)\n"
        "        except OSError:\n            pass\n"
        "    found = sum(mark.encode() in t and t != mark.encode() for t in texts)\n"
        "    return found, len(files), len(texts) > 500\n"
    )
    test = (
        "secret = 'mark-4711 of the test'\nassert f(1) == (0, 5, True), f(1)"  # 0, 1, 2 and the judge's pipes
    )
    assert run(source, test) == Outcome("passed")


def test_program_that_speaks_for_its_judge_is_only_a_wrong_answer() -> None:
    """It finds the pipe in the runner's frames and answers before it is asked."""
    find = "import os, sys\nframe = sys._getframe()\n"
    find += "while 'answers' not in frame.f_locals: frame = frame.f_back\n"
    find += "answers, pack = frame.f_locals['answers'], frame.f_globals['pack']\n"
    text = "pack(['value', {}, []])"
    send = f"{find}t = {text}\nfor _ in range(9): os.write(answers, len(t).to_bytes(8, 'big') + t)\n"
    assert run(send.format(3) + BAD).status == "failed"
    for junk in ("b'passed'", "b'l' + b'\\xff' * 4", "b''", "bytes(5) * 9", "b'l\\0\\0\\0\\1' * 10**5"):
        outcome = run(f"{find}t = {junk}\nos.write(answers, len(t).to_bytes(8, 'big') + t)\n{GOOD}")
        assert outcome.status == "failed", outcome
    assert "bytes" in run(f"{find}os.write(answers, b'\\0' * 4 + b'\\xff' * 4)\n{GOOD}").detail


@pytest.mark.parametrize(
    ("source", "detail"),
    [
        ("def f(:", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def g(x): pass", "NameError: the program does not define f"),
        ("raise ValueError('a\\nb' * 10**6)", "ValueError: a b"),
        ("class E(Exception): pass\nraise E('x')", "E: x"),
        ("class E(Exception):\n    def __str__(self): raise self\nraise E", "status 1"),
        ("import os; os.kill(os.getpid(), 11)", "SIGSEGV"),
        ("\ud800", "SyntaxError"),
        ("input()", "EOFError"),  # no input
        ("import numpy", "ModuleNotFoundError"),  # the standard library only
        ("import dllmq", "ModuleNotFoundError"),
        ("def f(x): return object()", "only plain data can be passed and returned, not object"),
        ("def f(x): return 'x' * 2**25", "more than 16777216 bytes"),
        ("def f(x): return f(x)", "RecursionError"),
    ],
)
def test_errors_are_named_in_one_bounded_line(source: str, detail: str) -> None:
    outcome = run(source)
    assert outcome.status == "failed" and detail in outcome.detail
    assert len(outcome.detail) <= 1024 and "\n" not in outcome.detail


# What a test may ask


def test_values_and_types_survive_the_way_there_and_back() -> None:
    values: list[object] = [
        None,
        True,
        0,
        -(10**30),
        1.5,
        -0.0,
        float("1e-320"),
        2j,
        "",
        "ä\ud800",
        b"\0",
        (),
        [],
    ]
    values += [
        {},
        {(1, "a"): [None]},
        {1, 2},
        frozenset({3}),
        range(1, 9, 2),
        [[1, (2.0, False)], {"a": {1}}],
    ]
    test = f"for v in {values!r}:\n    assert f(v) == v and type(f(v)) is type(v) and repr(f(v)) == repr(v)\n"
    test += "import math\nassert math.isnan(f(math.nan)) and f(math.inf) == math.inf\n"
    test += "assert list(f(iter('ab'))) == ['a', 'b'] != f(iter('ab'))"
    assert run("def f(x): return x", test) == Outcome("passed")


def test_calls_behave_like_calls() -> None:
    """Arguments changed in place, state, names, defaults, generators and errors."""
    source = (
        "n = 0\ndef f(xs, *, k=1):\n    global n\n    n += k\n    xs.append(n)\n    return (x for x in xs)\n"
    )
    assert (
        run(source, "a = []\nassert list(f(a)) == [1] and f(a, k=3) != [1, 4] and a == [1, 4]").status
        == "passed"
    )
    test = (
        "try:\n    f(0)\nexcept ZeroDivisionError as e:\n    assert 'zero' in str(e)\nelse:\n    assert False"
    )
    assert run("def f(x): return 1 / x", test).status == "passed"
    assert run("def f(x): return x", test).status == "failed"


PAIR = "class Pair:\n    def __init__(self, a, b=0):\n        self.a, self.b = a, b\n"


def test_objects_that_only_the_program_can_build_are_handed_over_by_name() -> None:
    """As some of MBPP's asserts do: the class is the answer's."""
    longest = "def f(pairs, n):\n    return sum(p.b - p.a for p in pairs) + n\n"
    test = "assert f([Pair(5, 24), Pair(a=15, b=25)], 2) == 31\n"
    assert run(PAIR + longest, test).status == "passed"
    assert run(PAIR + longest.replace("+ n", ""), test).status == "failed"
    assert "does not define Pair" in run(longest, test).detail


@pytest.mark.parametrize(
    "check", ["Pair(1)", "Pair(1) == Pair(1)", "Pair(1) != 2", "f(1) == Pair(2)", "not Pair(1)"]
)
def test_nothing_can_be_asserted_of_an_object_that_stays_with_the_program(check: str) -> None:
    """A program that compares as it likes gains nothing."""
    outcome = run(
        PAIR + "    __eq__ = __ne__ = __bool__ = lambda *_: True\ndef f(x): return x", f"assert {check}"
    )
    assert outcome.status == "failed" and "Pair is the program's own" in outcome.detail


def test_a_program_cannot_answer_with_an_object_for_the_judge_to_build() -> None:
    """The tag that carries such objects has a meaning in the program's process alone."""
    forged = (
        "import os, gc\n"
        "def f(x):\n"
        "    for fd in range(3, 64):\n"
        "        try:\n"
        "            body = b'l' + (3).to_bytes(4, 'big') + b'S' + (5).to_bytes(4, 'big') + b'value'"
        " + b'o' + (3).to_bytes(4, 'big') + b'S' + (4).to_bytes(4, 'big') + b'Pair'"
        " + b'l' + bytes(4) + b'd' + bytes(4) + b'l' + bytes(4)\n"
        "            os.write(fd, len(body).to_bytes(8, 'big') + body)\n"
        "        except OSError: pass\n"
    )
    assert run(forged, "assert f(1) == 1").status == "failed"


def test_humaneval_scores_with_helpers_and_signatures_without_a_body() -> None:
    prompt = "import math\n\ndef double(x):\n    return 2 * x\n\ndef f(x: int) -> int:\n"
    doc = {"prompt": prompt, "entry_point": "f"}
    doc["test"] = "def check(c):\n    assert c(2) == double(2) and math.isclose(c(3), 6)\n"
    (outcomes,) = run_tests(
        [["    return double(x)", "    return x", "    return double(x)\n\nprint(f(1))"]], [doc]
    )
    assert [outcome["status"] for outcome in outcomes] == ["passed", "failed", "passed"]
    assert pass_at_1(doc, [outcomes]) == {"pass@1": 2 / 3}


# Time, memory, output


@pytest.mark.parametrize(
    "source",
    [
        "while True: pass",
        "while True: print('x' * 10**6)",
        "def f(x):\n    while True: pass",
        "import time\ndef f(x): time.sleep(60)",
        "import os\ndef f(x):\n    os.closerange(0, 99)\n    while True: pass",
    ],
    ids=["loop", "output", "call", "sleep", "closed"],
)
def test_endless_program_is_stopped_by_the_clock_and_leaves_nothing_behind(source: str) -> None:
    mark = 2**29 + os.getpid()  # an argument of the command
    start = time.monotonic()
    assert run(source, timeout_s=1.5, memory_bytes=mark).status == "timeout"
    assert time.monotonic() - start < 30  # the program would take a minute, or for ever
    deadline = time.monotonic() + 30
    while str(mark) in commands() and time.monotonic() < deadline:  # a killed process takes a moment to go
        time.sleep(0.02)
    assert str(mark) not in commands()


def commands() -> str:
    texts = []
    for pid in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else []):
        try:
            texts.append(Path(f"/proc/{pid}/cmdline").read_text(errors="replace"))
        except OSError:
            continue
    return "\n".join(texts)


def test_memory_is_limited() -> None:
    hog = "x = []\nwhile True: x.append(bytes(2**24))"
    assert run(hog, memory_bytes=2**27).status == "memory"
    assert run("def f(x): return [0] * 10**10").status == "memory"


def test_large_output_is_thrown_away() -> None:
    noise = "import sys\nfor _ in range(100): print('x' * 10**5); print('y' * 10**5, file=sys.stderr)\n"
    assert run(noise + GOOD).status == "passed"


def test_files_are_small_temporary_and_the_working_folder_empty() -> None:
    big = "with open('f', 'wb') as f: f.write(bytes(2**21))"
    assert "File too large" in run(big).detail
    assert (
        run(
            "import os\ndef f(x): open('f', 'w').write('x'); return os.listdir()", "assert f(1) == ['f']"
        ).status
        == "passed"
    )
    assert run("import os\ndef f(x): return os.listdir()", "assert f(1) == []").status == "passed"
    assert not os.path.exists("f")


# Attacks on the machine


def test_network_is_out_of_reach(found: Protection, tmp_path: Path) -> None:
    needs(found, "network")
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as unix,
        tempfile.TemporaryDirectory() as folder,  # not tmp_path: a socket's path has at most 107 characters
    ):
        path = f"{folder}/socket"
        unix.bind(path)
        unix.listen()
        attempts = {
            "tcp": f"socket.create_connection(('127.0.0.1', {tcp.getsockname()[1]}), 2)",
            "udp": "socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))",
            "unix": f"socket.socket(socket.AF_UNIX).connect({path!r})",
            "pair": f"socket.socketpair(type=socket.SOCK_DGRAM)[0].sendto(b'x', {path!r})",
            "name": "socket.gethostbyname('localhost') and socket.socket()",
        }
        assert_refused(attempts)


def test_files_are_out_of_reach(found: Protection, tmp_path: Path) -> None:
    needs(found, "files")
    secret = tmp_path / "secret"
    secret.write_text("x")
    attempts = {
        "read": f"open({str(secret)!r}).read()",
        "list": f"os.listdir({str(tmp_path)!r})",
        "passwords": "open('/etc/shadow').read()",
        "this file": f"open({os.path.abspath(__file__)!r}).read()",
        "repository": f"os.listdir({os.path.dirname(os.path.abspath(__file__))!r})",
        "home": f"open({os.path.expanduser('~/.profile')!r}).read()",
        "parent": "open(f'/proc/{os.getppid()}/mem', 'r+b')",
        "us": f"open('/proc/{os.getpid()}/environ', 'rb').read()",
        "write": f"open({str(secret)!r}, 'w')",
        "create": f"open({str(tmp_path / 'new')!r}, 'w')",
        "remove": f"os.remove({str(secret)!r})",
        "move": f"os.rename({str(secret)!r}, {str(tmp_path / 'moved')!r})",
        "truncate": f"os.truncate({str(secret)!r}, 0)",
        "link": f"os.link({str(secret)!r}, 'here')",
        "library": f"open({os.path.join(os.path.dirname(os.__file__), 'dllmq_new.py')!r}, 'w')",
        "disk": "os.open('/dev/sda', os.O_RDONLY)",
    }
    assert_refused(attempts)
    assert os.listdir(tmp_path) == ["secret"] and secret.read_text() == "x"


def test_names_and_modes_of_files_are_hidden_by_bubblewrap_alone(found: Protection, tmp_path: Path) -> None:
    attempts = {"stat": f"os.stat({str(tmp_path)!r})", "mode": f"os.chmod({str(tmp_path)!r}, 0o700)"}
    assert_refused(attempts, "OSError" if found.level == "bubblewrap" else "done")


def test_no_new_process_or_thread_even_for_root(found: Protection) -> None:
    needs(found, "processes")
    attempts = {
        "fork": "os.fork()",
        "spawn": "os.posix_spawn('/bin/sh', ['sh'], {})",
        "subprocess": "subprocess.run(['/bin/sh', '-c', 'true'])",
        "session": "os.setsid()",
        "thread": "threading.Thread(target=print).start()",
    }
    assert_refused(attempts, thread="RuntimeError")
    bomb = "import os\ndef f(x):\n    n = 0\n    for _ in range(1000):\n"
    bomb += (
        "        try:\n            os.fork(); n += 1\n        except OSError:\n            pass\n    return n"
    )
    assert run(bomb, "assert f(1) == 0") == Outcome("passed")


def test_no_other_process_can_be_signalled(found: Protection) -> None:
    """Signal 0 asks whether one could; the judge is the parent."""
    needs(found, "processes")
    pids = {"judge": "os.getppid()", "us": str(os.getpid()), "everyone": "-1", "init": "1"}
    attempts = {name: f"os.kill({pid}, 0)" for name, pid in pids.items()}
    attempts["handle"] = "os.pidfd_open(os.getppid())"
    assert_refused(attempts)
    assert run("import os\nos.kill(0, 9)\n" + GOOD).status == "failed"  # itself and, at "rlimits", its judge


def test_no_privileges_and_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "1")
    assert run("import os\ndef f(x): return len(os.environ)", "assert f(1) == 0").status == "passed"
    assert_refused({"root": "os.chroot('.')"})


# The runner itself


def test_strings_hash_alike_in_every_run() -> None:
    test = "assert f(1) == {!r}"
    first = "def f(x): return list({'a', 'b', 'c', 'd', 'e'})[0]"
    assert sum(run(first, test.format(c)).status == "passed" for c in "abcde") == 1


def test_many_programs_keep_their_order_and_report_progress() -> None:
    seen: list[tuple[int, int, str]] = []
    programs = [Program(source, TEST, "f") for source in [GOOD, BAD] * 6]
    outcomes = run_programs(programs, workers=3, timeout_s=20.0, progress=lambda *args: seen.append(args))
    assert [o.status for o in outcomes] == ["passed", "failed"] * 6
    assert seen == [(i + 1, 12, "programs") for i in range(12)]
    assert run_programs([]) == []


def test_interpreter_that_cannot_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/nonexistent/python")
    outcome = run(GOOD)
    assert outcome.status == "error" and "/nonexistent/python" in outcome.detail


def test_level_says_once_why_it_is_the_weaker_one(
    found: Protection, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    assert sandbox.level() == found.level
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: setting up uid map: Permission denied' >&2; exit 1\n")
    broken.chmod(0o755)
    with caplog.at_level(logging.INFO, sandbox.__name__):
        weaker = measured(str(broken))
    assert weaker.level == "rlimits" and "uid map: Permission denied" in weaker.reason
    (line,) = [record.getMessage() for record in caplog.records]
    assert weaker.reason in line and "names and modes of files" in line
    assert measured(None).reason == "bubblewrap (bwrap) is not installed"

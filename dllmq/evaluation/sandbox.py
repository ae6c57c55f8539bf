"""Runs one untrusted program away from this process and says whether it passes a test.

A program (what a model wrote) and its test (from the dataset) run in two processes. The *judge* holds the
test and asks the *program* for the value of each call, so a verdict rests on plain values: nothing the
program prints, patches, compares or exits with counts. The judge gets a nonce only after the program's
process has split off, and gives it back after the last assert; the program's process never holds the nonce,
the test or the channel to this process. Arguments and results are plain data (None, bool, int, float,
complex, str, bytes, list, tuple, set, frozenset, dict, range, iterators of these); anything else fails and
is named. So does a test that relies on the identity of objects, or passes functions.

protection() measures once which of two levels this machine gives:

"bubblewrap"  Namespaces of its own: no network, no process of ours in sight, no home or working folder; only
              Python's own files, read-only, and an empty /tmp in memory. Killing it kills the whole tree.
              Needs bubblewrap 0.7 or newer and user namespaces.
"rlimits"     An ordinary process in a temporary folder, killed as a process group.

At both levels, without privileges, so for root and in containers too: limits on CPU, address space, file size
and descriptors; a wall clock; no capabilities; a seccomp filter (x86-64 and ARM64) against sockets, new
processes and threads, and signals and debuggers aimed at other processes; Landlock (Linux 5.13 or newer)
against opening files outside Python's and the program's folder. protection() finds out what
a kernel without one of the two leaves open: at "rlimits" the network, processes (RLIMIT_NPROC does not bind
root) or the user's files, through /proc the memory of the user's processes among them; at "bubblewrap", for
root, new processes, which still die with the rest. At "rlimits" a program always sees names, sizes and modes
of files, may change modes and times of the user's, and can fill the disk in steps of 1 MiB.
"""

import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from math import ceil
from pathlib import Path
from typing import Literal

from dllmq.evaluation import sandbox_runner as runner
from dllmq.evaluation.sandbox_runner import READY, REPORT_BYTES

TIMEOUT_S, MEMORY_BYTES = 3.0, 512 * 2**20
_FOLDER_BYTES, _NONCE_BYTES = 64 * 2**20, 16
_RUNNER = Path(runner.__file__).read_text(encoding="utf-8")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Program:
    """What to run: `source` is untrusted, the rest is the dataset's.

    Attributes:
        test: asserts that call `entry_point`, a function of the program.
        prelude: what the test needs besides (imports, helpers); an unfinished last function is completed.
    """

    source: str
    test: str
    entry_point: str
    prelude: str = ""


@dataclass(frozen=True)
class Outcome:
    """How a program ended; `detail` says why it did not pass ("error": the sandbox itself did not start)."""

    status: Literal["passed", "failed", "timeout", "memory", "error"]
    detail: str = ""


@dataclass(frozen=True)
class Protection:
    """What keeps a program from this machine, as measured.

    Attributes:
        open: what it can reach all the same, out of "network", "files" and "processes".
        reason: why the level is not "bubblewrap".
        bubblewrap: the command; landlock: whether the standard library can be used under its rules.
    """

    level: Literal["bubblewrap", "rlimits"]
    open: tuple[str, ...] = ()
    reason: str = ""
    bubblewrap: str | None = None
    landlock: bool = True


_LIBRARY = Program(
    "import ctypes, decimal, hashlib, json, random, re, typing\ndef f(): return 1", "assert f() == 1", "f"
)


def level() -> Literal["bubblewrap", "rlimits"]:
    """The level that programs run at on this machine, for a record's notes."""
    return protection().level


@cache
def protection() -> Protection:
    """Measures what holds on this machine, by running programs that try it; said once in the log."""
    command = shutil.which("bwrap")
    reason = "bubblewrap (bwrap) is not installed"
    if command:
        found = Protection("bubblewrap", bubblewrap=command)
        outcome = _run(_LIBRARY, found)
        if outcome.status == "passed":
            found = replace(found, open=_reachable(found))
            log.info(
                "programs run in bubblewrap; open to them: %s", ", ".join(found.open) or "nothing of ours"
            )
            return found
        reason = f"bubblewrap does not work here: {outcome.detail}"
    usable = _run(_LIBRARY, Protection("rlimits")).status == "passed"
    found = Protection("rlimits", reason=reason, landlock=usable)
    found = replace(found, open=_reachable(found))
    log.warning(
        "programs run in a plain process with limits (%s); open to them: %s. For a full sandbox install "
        "bubblewrap 0.7 or newer and allow user namespaces.",
        reason,
        ", ".join([*found.open, "names and modes of files"]),
    )
    return found


def _reachable(found: Protection) -> tuple[str, ...]:
    """What a program that tries can reach."""
    with tempfile.NamedTemporaryFile() as file, socket.create_server(("127.0.0.1", 0)) as server:
        attacks = {
            "network": f"import socket; socket.create_connection({server.getsockname()!r}, 1).close()",
            "files": f"open({file.name!r}).close()",
            "processes": "import os\nif os.fork() == 0: os._exit(0)",
        }
        outcomes = {name: _run(Program(source, "", "f"), found) for name, source in attacks.items()}
    return tuple(name for name, outcome in outcomes.items() if outcome.status == "passed")


def run_program(program: Program, timeout_s: float = TIMEOUT_S, memory_bytes: int = MEMORY_BYTES) -> Outcome:
    """Runs a program and its test.

    Args:
        timeout_s: wall clock, start of the sandbox included (about 0.03 s).
        memory_bytes: of address space, for the program and for its judge.
    """
    return _run(program, protection(), timeout_s, memory_bytes)


def run_programs(
    programs: Sequence[Program],
    workers: int | None = None,
    timeout_s: float = TIMEOUT_S,
    memory_bytes: int = MEMORY_BYTES,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Outcome]:
    """run_program for many, `workers` at a time (one per processor, at most 8); in order."""
    outcomes = []
    protection()  # measured before the machine is busy
    with ThreadPoolExecutor(workers or min(os.cpu_count() or 1, 8)) as pool:
        for outcome in pool.map(lambda program: run_program(program, timeout_s, memory_bytes), programs):
            outcomes.append(outcome)
            if progress is not None:
                progress(len(outcomes), len(programs), "programs")
    return outcomes


def _run(
    program: Program, found: Protection, timeout_s: float = 10.0, memory_bytes: int = MEMORY_BYTES
) -> Outcome:
    ours, theirs = socket.socketpair()
    with ours, tempfile.TemporaryDirectory(prefix="dllmq-", ignore_cleanup_errors=True) as folder:
        with theirs:
            try:
                process = _start(found, theirs.fileno(), ceil(timeout_s) + 1, memory_bytes, folder)
            except OSError as error:
                return Outcome("error", f"the sandbox could not be started: {error}")
        try:
            return _judge(process, _Channel(ours, time.monotonic() + timeout_s), program)
        except TimeoutError:
            return Outcome("timeout", f"still running after {timeout_s:g} s")
        finally:
            _kill(process)


@dataclass(frozen=True)
class _Channel:
    """A socket with a deadline, after which both calls raise TimeoutError. A closed other end is no error."""

    socket: socket.socket
    deadline: float  # on the monotonic clock

    def left(self) -> float:
        return max(self.deadline - time.monotonic(), 1e-3)

    def send(self, *texts: bytes) -> None:
        self.socket.settimeout(self.left())
        with suppress(ConnectionError):  # what the other end said before it closed can still be read
            self.socket.sendall(b"".join(len(text).to_bytes(8, "big") + text for text in texts))

    def line(self) -> bytes:
        """Reads up to a newline, REPORT_BYTES or the other end's close, whichever comes first."""
        data = b""
        while len(data) < REPORT_BYTES and not data.endswith(b"\n"):
            self.socket.settimeout(self.left())
            try:
                part = self.socket.recv(REPORT_BYTES - len(data))
            except ConnectionError:
                part = b""
            if not part:
                break
            data += part
        return data


def _start(
    found: Protection, channel: int, cpu_s: int, memory_bytes: int, folder: str
) -> subprocess.Popen[bytes]:
    # -P -s -S and an environment of our own isolate as -I -S does, but strings hash alike in every run: a
    # program that depends on the order of a set gets the same verdict twice.
    python, readable = os.path.realpath(sys.executable), _readable()
    command = [python, "-P", "-s", "-S", "-B", "-c", _RUNNER, str(channel), str(cpu_s), str(memory_bytes)]
    if found.bubblewrap:
        command = [found.bubblewrap, *_namespaces(readable), "--", *command]
    return subprocess.Popen(
        command + (readable if found.landlock else []),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd=folder,
        env={"PYTHONHASHSEED": "0"},
        start_new_session=True,
        pass_fds=[channel],
    )


def _readable() -> list[str]:
    """What a program needs to see: interpreter, standard library and the system's shared libraries."""
    python = os.path.realpath(sys.executable)
    libraries = [
        os.path.join(prefix, name)
        for prefix in (sys.base_prefix, os.path.dirname(os.path.dirname(python)), "/usr", "/")
        for name in ("lib", "lib64")
    ]
    paths = [python, *libraries, sysconfig.get_path("stdlib"), "/etc/ld.so.cache", "/dev/urandom"]
    return [path for path in dict.fromkeys(paths) if os.path.exists(path)]


def _namespaces(readable: list[str]) -> list[str]:
    """bubblewrap's options. No /proc and no /dev but null and urandom; the judge is process 1."""
    options = ["--unshare-all", "--unshare-user", "--uid", "65534", "--gid", "65534", "--cap-drop", "ALL"]
    options += ["--as-pid-1", "--die-with-parent", "--new-session"]
    options += ["--clearenv", "--setenv", "PYTHONHASHSEED", "0"]
    options += ["--size", str(_FOLDER_BYTES), "--tmpfs", "/tmp", "--dev-bind", "/dev/null", "/dev/null"]
    for path in readable:
        options += ["--dev-bind" if path.startswith("/dev/") else "--ro-bind", path, path]
    return [*options, "--remount-ro", "/", "--chdir", "/tmp"]


def _judge(process: subprocess.Popen[bytes], channel: _Channel, program: Program) -> Outcome:
    if channel.line() != READY:
        return Outcome("error", f"the sandbox did not start: {_last_words(process, channel)}")
    nonce = secrets.token_hex(_NONCE_BYTES).encode()
    texts = (program.prelude, program.test, program.entry_point)
    channel.send(program.source.encode("utf-8", "replace"), nonce, *(text.encode() for text in texts))
    verdict, _, rest = channel.line().strip().partition(b" ")
    if verdict == b"passed" and secrets.compare_digest(rest, nonce):
        return Outcome("passed")
    if verdict == b"memory":
        return Outcome("memory", "MemoryError")
    if verdict == b"failed":
        return Outcome("failed", rest.decode("utf-8", "replace"))
    return _ended_early(int(rest) if verdict == b"ended" else _wait(process, channel))


def _ended_early(code: int) -> Outcome:
    """The verdict on a program that left before it had answered every call."""
    if code == -signal.SIGXCPU:
        return Outcome("timeout", "used up its CPU time")
    if code < 0:
        return Outcome("failed", f"killed by {signal.Signals(-code).name}")
    return Outcome("failed", f"exited with status {code} before the end of the asserts")


def _wait(process: subprocess.Popen[bytes], channel: _Channel) -> int:
    try:
        return process.wait(channel.left())
    except subprocess.TimeoutExpired:
        raise TimeoutError from None


def _last_words(process: subprocess.Popen[bytes], channel: _Channel) -> str:
    _wait(process, channel)
    assert process.stderr is not None
    lines = process.stderr.read(4096).decode("utf-8", "replace").strip().splitlines()
    return lines[-1] if lines else f"exit status {process.returncode}"


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kills bubblewrap and with it all inside, or the process group, which a program cannot leave."""
    with suppress(ProcessLookupError, PermissionError):  # nothing left, or (macOS) only zombies
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.stderr is not None
    process.stderr.close()

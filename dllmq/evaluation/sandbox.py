"""Runs one untrusted program in a process of its own and says whether it ran to its end.

The program counts as passed only if it gets past its last statement: then the runner asks, on a private
channel, for a nonce that did not exist before, and gives it back. A return code of 0 or printed text count
for nothing, so `sys.exit(0)`, `os._exit(0)` and fake verdicts fail.

What holds: own session (killed as a group), CPU, address space, file size, descriptors, processes and core
dumps limited, no environment, no standard input or output, a temporary working directory, a wall clock. What
does not: the network and the readable file system are open, RLIMIT_NPROC does not bind root, and a program
written against this very runner could answer for it. So it is for what a language model writes by accident,
behind an opt-in.
"""

import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from math import ceil
from os import killpg
from typing import Literal

TIMEOUT_S, MEMORY_BYTES, FILE_BYTES, OPEN_FILES = 3.0, 512 * 2**20, 2**20, 64
_READY, _NONCE_BYTES, _REPORT_BYTES = b"done\n", 16, 1024

# Runs in the child before the program: limits are set here, not in preexec_fn, which may deadlock under
# threads. Messages on the channel: the program's length and text; then "done", answered by the nonce, which
# is echoed; or a line that says why the program ended early.
_RUNNER = f"""
import os, resource, sys

def run(channel, cpu_s, memory):
    read, write = os.read, os.write

    def take(n):
        parts = b""
        while len(parts) < n:
            part = read(channel, n - len(parts))
            if not part:
                sys.exit(1)
            parts += part
        return parts

    program = take(int.from_bytes(take(8), "big"))
    for name, value in dict(
        CPU=cpu_s, AS=memory, FSIZE={FILE_BYTES}, NOFILE={OPEN_FILES}, NPROC=0, CORE=0
    ).items():
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))
    os.environ.clear()
    try:
        exec(compile(program, "program", "exec", dont_inherit=True), {{"__name__": "__main__"}})
    except MemoryError:
        report = b"memory"
    except BaseException as error:
        text = " ".join((type(error).__name__ + ": " + str(error)[:{_REPORT_BYTES}]).split())
        report = b"failed " + text.encode("utf-8", "replace")[: {_REPORT_BYTES} - 20]
    else:
        write(channel, {_READY!r})
        write(channel, take({_NONCE_BYTES}))
        return
    write(channel, report + b"\\n")

run(*map(int, sys.argv[1:]))
"""


@dataclass(frozen=True)
class Outcome:
    """How a program ended; `detail` says why it did not pass ("error": the runner itself could not start)."""

    status: Literal["passed", "failed", "timeout", "memory", "error"]
    detail: str = ""


def run_program(source: str, timeout_s: float = TIMEOUT_S, memory_bytes: int = MEMORY_BYTES) -> Outcome:
    """Runs Python source that ends in asserts.

    Args:
        source: a whole program; standard library only.
        timeout_s: wall clock, start of the interpreter included (about 0.02 s).
        memory_bytes: of address space.
    """
    ours, theirs = socket.socketpair()
    with ours, tempfile.TemporaryDirectory(prefix="dllmq-", ignore_cleanup_errors=True) as folder:
        with theirs:
            try:
                process = _start(theirs.fileno(), ceil(timeout_s) + 1, memory_bytes, folder)
            except OSError as error:
                return Outcome("error", f"the Python interpreter could not be started: {error}")
        try:
            return _judge(process, _Channel(ours, time.monotonic() + timeout_s), source)
        except TimeoutError:
            return Outcome("timeout", f"still running after {timeout_s:g} s")
        finally:
            _kill(process)


def run_programs(
    sources: Sequence[str],
    workers: int = 2,
    timeout_s: float = TIMEOUT_S,
    memory_bytes: int = MEMORY_BYTES,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Outcome]:
    """run_program for many, `workers` at a time; outcomes in the order of the sources."""
    outcomes = []
    with ThreadPoolExecutor(workers) as pool:
        for outcome in pool.map(lambda source: run_program(source, timeout_s, memory_bytes), sources):
            outcomes.append(outcome)
            if progress is not None:
                progress(len(outcomes), len(sources), "programs")
    return outcomes


@dataclass(frozen=True)
class _Channel:
    """A socket with a deadline, after which both calls raise TimeoutError. A closed other end is no error."""

    socket: socket.socket
    deadline: float  # on the monotonic clock

    def left(self) -> float:
        return max(self.deadline - time.monotonic(), 1e-3)

    def send(self, data: bytes) -> None:
        self.socket.settimeout(self.left())
        with suppress(ConnectionError):  # what the other end said before it closed can still be read
            self.socket.sendall(data)

    def receive(self, end: bytes, limit: int) -> bytes:
        """Reads up to `end`, `limit` bytes or the other end's close, whichever comes first."""
        data = b""
        while len(data) < limit and not (end and data.endswith(end)):
            self.socket.settimeout(self.left())
            try:
                part = self.socket.recv(limit - len(data))
            except ConnectionError:
                part = b""
            if not part:
                break
            data += part
        return data


def _start(channel: int, cpu_s: int, memory_bytes: int, folder: str) -> subprocess.Popen[bytes]:
    # -P -s -S and an environment of our own isolate as -I -S does, but strings hash alike in every run: a
    # program that depends on the order of a set gets the same verdict twice.
    command = [
        sys.executable,
        "-P",
        "-s",
        "-S",
        "-B",
        "-c",
        _RUNNER,
        str(channel),
        str(cpu_s),
        str(memory_bytes),
    ]
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env={"PYTHONHASHSEED": "0"},
        start_new_session=True,
        pass_fds=[channel],
    )


def _judge(process: subprocess.Popen[bytes], channel: _Channel, source: str) -> Outcome:
    program = source.encode("utf-8", "replace")
    channel.send(len(program).to_bytes(8, "big") + program)
    report = channel.receive(b"\n", _REPORT_BYTES)
    if report == _READY:
        nonce = secrets.token_bytes(_NONCE_BYTES)
        channel.send(nonce)
        if channel.receive(b"", _NONCE_BYTES) == nonce:
            return Outcome("passed")
        return Outcome("failed", "gave a false verdict")
    if report == b"memory\n":
        return Outcome("memory", "MemoryError")
    if report.startswith(b"failed "):
        return Outcome("failed", report.removeprefix(b"failed ").decode("utf-8", "replace").strip())
    return _ended_early(process, channel)


def _ended_early(process: subprocess.Popen[bytes], channel: _Channel) -> Outcome:
    """The verdict on a program that said nothing."""
    try:
        code = process.wait(channel.left())
    except subprocess.TimeoutExpired:
        raise TimeoutError from None
    if code == -signal.SIGXCPU:
        return Outcome("timeout", "used up its CPU time")
    if code < 0:
        return Outcome("failed", f"killed by {signal.Signals(-code).name}")
    return Outcome("failed", f"exited with status {code} before the end of the asserts")


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kills the program and what it started, as far as that stayed in its session."""
    with suppress(ProcessLookupError, PermissionError):  # nothing left, or (macOS) only zombies
        killpg(process.pid, signal.SIGKILL)
    process.wait()

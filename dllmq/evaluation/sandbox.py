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
from typing import Literal

TIMEOUT_S, MEMORY_BYTES, FILE_BYTES, OPEN_FILES = 3.0, 512 * 2**20, 2**20, 64
_FOLDER_BYTES, _REPLY_BYTES, _REPORT_BYTES, _NONCE_BYTES = 64 * 2**20, 16 * 2**20, 1024, 16
_READY = b"ready\n"

log = logging.getLogger(__name__)

# Judge and program. Limits are set here, not in preexec_fn, which may deadlock under threads. The judge's
# channel carries: "ready" out; the program, the nonce, prelude, test and entry point in, each after its
# length; one line out: "passed" and the nonce, "failed" and why, "memory", or "ended" and a return code.
_RUNNER = (
    f"""
FILE_BYTES, OPEN_FILES = {FILE_BYTES}, {OPEN_FILES}
REPLY_BYTES, REPORT_BYTES = {_REPLY_BYTES}, {_REPORT_BYTES}
READY = {_READY!r}
"""
    + r'''
import builtins, os, resource, sys
try:
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    linux = sys.platform == "linux"
except (ImportError, OSError):
    linux = False

def syscall(number, *values):
    return libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, values))

def prctl(option, *values):
    return libc.prctl(option, *map(ctypes.c_ulong, (*values, 0, 0, 0, 0)[:4])) if linux else -1

class Ended(BaseException):
    """The program's process is gone."""

# Messages and values: a tag, a length in bytes or items, and that many of them.
SCALARS = {
    bool: ("B", lambda x: b"1" * x),
    int: ("I", lambda x: ("%x" % x).encode()),
    float: ("F", lambda x: x.hex().encode()),
    str: ("S", lambda x: x.encode("utf-8", "surrogatepass")),
    (bytes, bytearray): ("Y", bytes),
}
SEQUENCES = dict(l=list, t=tuple, s=set, f=frozenset)

def sized(tag, n, body):
    return tag.encode() + n.to_bytes(4, "big") + body

def pack(x):
    if x is None:
        return sized("N", 0, b"")
    for kind in SCALARS:
        if isinstance(x, kind):
            tag, text = SCALARS[kind]
            body = text(x)
            return sized(tag, len(body), body)
    if isinstance(x, dict):
        items, tag = [part for pair in x.items() for part in pair], "d"
    elif isinstance(x, (complex, range)):
        items = [x.real, x.imag] if isinstance(x, complex) else [x.start, x.stop, x.step]
        tag = "c" if isinstance(x, complex) else "r"
    else:
        tags = [tag for tag, kind in SEQUENCES.items() if isinstance(x, kind)]
        if not tags and not hasattr(type(x), "__next__"):
            raise TypeError("only plain data can be passed and returned, not " + type(x).__name__)
        tag, items = (tags or "i")[0], list(x)
    return sized(tag, len(items), b"".join(map(pack, items)))

def unpack(data):
    place = 0
    def part():
        nonlocal place
        tag, n = chr(data[place]), int.from_bytes(data[place + 1 : place + 5], "big")
        place += 5
        if tag in "NBIFSY":
            body, place = data[place : place + n], place + n
            if tag == "Y":
                return body
            text = body.decode("utf-8", "surrogatepass")
            return {"N": None, "B": text == "1", "S": text}[tag] if tag in "NBS" else (
                int(text, 16) if tag == "I" else float.fromhex(text))
        items = [part() for _ in range(n)]
        if tag == "d":
            return dict(zip(items[::2], items[1::2]))
        if tag in "cri":
            return {"c": complex, "r": range}[tag](*items) if tag != "i" else iter(items)
        return SEQUENCES[tag](items)
    return part()

def exactly(file, n):
    parts = bytearray()
    while len(parts) < n:
        more = os.read(file, min(n - len(parts), 2**20))
        if not more:
            raise Ended
        parts += more
    return bytes(parts)

def take(file, limit=2**32):
    n = int.from_bytes(exactly(file, 8), "big")
    if n > limit:
        raise ValueError("a result has more than %d bytes" % limit)
    return exactly(file, n)

def put(file, data):
    data = memoryview(len(data).to_bytes(8, "big") + data)
    try:
        while data:
            data = data[os.write(file, data) :]
    except BrokenPipeError:
        raise Ended from None

def limit(**values):
    for name, value in values.items():
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))

# Numbers of x86-64 and ARM64: refused; and allowed with this process (or 0) as first argument alone.
SAME = [424, 425, 426, 427, 434, 435, 438]  # pidfd_send_signal, io_uring_*, pidfd_open, clone3, pidfd_getfd
CALLS = {  # audit architecture; refused, in the order
    # socket connect bind sendto sendmsg sendmmsg clone setpgid setsid ptrace process_vm_readv
    # process_vm_writev rt_sigqueueinfo rt_tgsigqueueinfo shmget semget msgget unshare setns mount bpf
    # userfaultfd perf_event_open add_key request_key keyctl (fork vfork); kill tkill tgkill prlimit64
    "x86_64": (0xC000003E, [41, 42, 49, 44, 46, 307, 56, 109, 112, 101, 310, 311, 129, 297, 29, 64, 68, 272,
                            308, 165, 321, 323, 298, 248, 249, 250, 57, 58], [62, 200, 234, 302]),
    "aarch64": (0xC00000B7, [198, 203, 200, 206, 211, 269, 220, 154, 157, 117, 270, 271, 138, 240, 194, 190,
                             186, 97, 268, 40, 280, 282, 241, 217, 218, 219], [129, 130, 131, 261]),
}

def filter_calls():
    """A seccomp filter in classic BPF: opcode, jump if true, jump if false, operand."""
    if not linux or os.uname().machine not in CALLS:
        return
    load, equal, at_least, end, allow, refuse = 0x20, 0x15, 0x35, 0x06, 0x7FFF0000, 0x00050000 | 1
    architecture, refused, own = CALLS[os.uname().machine]
    code = [(load, 0, 0, 4), (equal, 1, 0, architecture), (end, 0, 0, refuse), (load, 0, 0, 0)]
    code += [(at_least, 0, 1, 0x40000000), (end, 0, 0, refuse)]  # x32
    for number in refused + SAME:
        code += [(equal, 0, 1, number), (end, 0, 0, refuse)]
    for number in own:
        code += [(equal, 0, 5, number), (load, 0, 0, 16), (equal, 2, 0, os.getpid()), (equal, 1, 0, 0)]
        code += [(end, 0, 0, refuse), (end, 0, 0, allow)]
    code.append((end, 0, 0, allow))
    text = b"".join(o.to_bytes(2, "little") + bytes((t, f)) + k.to_bytes(4, "little") for o, t, f, k in code)
    buffer = ctypes.create_string_buffer(text, len(text))
    class Program(ctypes.Structure):
        _fields_ = [("n", ctypes.c_ushort), ("code", ctypes.c_void_p)]
    program = Program(len(code), ctypes.addressof(buffer))
    prctl(22, 2, ctypes.addressof(program))

def filter_files(readable):
    """Landlock: opens for reading below `readable`, for anything below the working folder, nothing else."""
    version = syscall(444, 0, 0, 1) if linux else -1
    if version < 1:
        return
    everything, read, of_a_file = (1 << min(12 + version, 15)) - 1, 1 | 4 | 8, 1 | 2 | 4
    def bytes_at(*fields):
        return ctypes.create_string_buffer(b"".join(v.to_bytes(n, sys.byteorder) for v, n in fields))
    rules = bytes_at((everything, 8))
    ruleset = syscall(444, ctypes.addressof(rules), 8, 0)
    for path in [*readable, "/dev/null", os.getcwd()]:
        try:
            file = os.open(path, os.O_PATH)
        except OSError:
            continue
        allowed = read if path in readable else everything
        rule = bytes_at((allowed if os.path.isdir(path) else allowed & of_a_file, 8), (file, 4))
        syscall(445, ruleset, 1, ctypes.addressof(rule), 0)
        os.close(file)
    syscall(446, ruleset, 0)
    os.close(ruleset)

def confine(files, readable):
    """Takes from the program's process everything but `files`, its folder and Python's own files."""
    low, high = sorted(files)
    os.closerange(3, low)
    os.closerange(low + 1, high)
    os.closerange(high + 1, 2**16)
    os.environ.clear()
    prctl(1, 9)  # dies with the judge
    limit(NPROC=0)
    if linux:
        libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
    prctl(38, 1)  # no new privileges
    if readable:
        filter_files(readable)
    filter_calls()

def serve(source, asked, answers):
    """The program's process: runs it, then answers calls."""
    scope = {"__name__": "__main__"}
    def reply(compute):
        try:
            text = pack(["value", *compute()])
        except BaseException as error:
            text = pack(["error", type(error).__name__, str(error)[:REPORT_BYTES]])
        put(answers, text)
    def run():
        exec(compile(source, "program", "exec", dont_inherit=True), scope)
        return None, []
    def call(name, args, options):
        if name not in scope:
            raise NameError("the program does not define " + name)
        return scope[name](*args, **options), args
    reply(run)
    while True:
        reply(lambda request=unpack(take(asked)): call(*request))

def result(text):
    """The value of a reply and the arguments after the call; or raises what the program raised."""
    what, value, rest = unpack(text)
    if what == "value":
        return value, rest
    kind = getattr(builtins, value, Exception)
    if not (isinstance(kind, type) and issubclass(kind, Exception)):
        kind = Exception
    raise type(value, (kind,), {"__init__": lambda self: None, "__str__": lambda self: rest})()

def update(old, new):
    """Changes a list, dict or set argument as the program changed it."""
    if type(old) is type(new) and isinstance(old, (list, dict, set)) and old != new:
        old.clear()
        (old.extend if isinstance(old, list) else old.update)(new)

def judge(asks, answers, prelude, test, entry_point):
    """Runs the test; `prelude` defines the names that it shares with the program."""
    def candidate(*args, **options):
        put(asks, pack([entry_point, args, options]))
        value, after = result(take(answers, REPLY_BYTES))
        for old, new in zip(args, after):
            update(old, new)
        return value
    result(take(answers, REPLY_BYTES))  # of the program itself
    scope = {"__name__": "test"}
    for text in (prelude, prelude + "\n    pass", ""):  # a signature may lack its body
        try:
            code = compile(text, "prelude", "exec", dont_inherit=True)
            break
        except SyntaxError:
            continue
    exec(code, scope)
    scope[entry_point] = candidate
    exec(compile(test, "test", "exec", dont_inherit=True), scope)

def main(channel, cpu_s, memory, *readable):
    os.dup2(1, 2)
    limit(CPU=int(cpu_s), AS=int(memory), FSIZE=FILE_BYTES, NOFILE=OPEN_FILES, CORE=0)
    prctl(1, 9)  # dies with the thread that started it
    prctl(4, 0)  # before the fork: no one reads this memory through /proc
    os.write(channel, READY)
    source = take(channel)
    (asked, asks), (answers, answered) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            confine([asked, answered], readable)
            serve(source, asked, answered)
        except Ended:
            pass
        finally:
            os._exit(1)
    os.close(asked)
    os.close(answered)
    nonce, prelude, test, entry_point = (take(channel) for _ in range(4))
    try:
        judge(asks, answers, prelude.decode(), test.decode(), entry_point.decode())
        report = b"passed " + nonce
    except Ended:
        report = b"ended %d" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    except BaseException as error:
        text = " ".join((type(error).__name__ + ": " + str(error)[:REPORT_BYTES]).split())
        report = b"failed " + text.encode("utf-8", "replace")[: REPORT_BYTES - 20]
        if isinstance(error, MemoryError):
            report = b"memory"
    os.write(channel, report + b"\n")

main(int(sys.argv[1]), *sys.argv[2:])
'''
)


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
        """Reads up to a newline, _REPORT_BYTES or the other end's close, whichever comes first."""
        data = b""
        while len(data) < _REPORT_BYTES and not data.endswith(b"\n"):
            self.socket.settimeout(self.left())
            try:
                part = self.socket.recv(_REPORT_BYTES - len(data))
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
    if channel.line() != _READY:
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

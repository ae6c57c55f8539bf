"""What runs inside the sandbox: the judge, and the program it asks. sandbox.py hands Python this file's text.

It imports nothing of dllmq and must run under -S, where only the standard library is there. Limits are set
here, not in preexec_fn, which may deadlock under threads.

The judge's channel carries: "ready" out; the program, the nonce, prelude, test and entry point in, each after
its length; one line out: "passed" and the nonce, "failed" and why, "memory", or "ended" and a return code.
"""

import builtins
import os
import resource
import sys

FILE_BYTES, OPEN_FILES = 2**20, 64
REPLY_BYTES, REPORT_BYTES = 16 * 2**20, 1024
READY = b"ready\n"

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


class Made:
    """An object that the test builds by a name of the program's: Pair(5, 24). Only the program can have it,
    so it travels as name and arguments. Nothing about it can be asserted here."""

    def __init__(self, name, args, options):
        self.parts = [name, args, options]

    def unknown(self, *_):
        raise TypeError(self.parts[0] + " is the program's own; a test can only hand it over")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __len__ = __iter__ = unknown
    __hash__ = None  # type: ignore[assignment]


# Messages and values: a tag, a length in bytes or items, and that many of them.
SCALARS = {
    bool: ("B", lambda x: b"1" * x),
    int: ("I", lambda x: f"{int(x):x}".encode()),
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
        if isinstance(x, kind):  # type: ignore[arg-type]
            tag, text = SCALARS[kind]
            body = text(x)
            return sized(tag, len(body), body)
    if isinstance(x, dict):
        items, tag = [part for pair in x.items() for part in pair], "d"
    elif isinstance(x, (complex, range)):
        items = [x.real, x.imag] if isinstance(x, complex) else [x.start, x.stop, x.step]
        tag = "c" if isinstance(x, complex) else "r"
    elif type(x) is Made:
        items, tag = x.parts, "o"
    else:
        tags = [tag for tag, kind in SEQUENCES.items() if isinstance(x, kind)]
        if not tags and not hasattr(type(x), "__next__"):
            raise TypeError("only plain data can be passed and returned, not " + type(x).__name__)
        tag, items = (tags or "i")[0], list(x)
    return sized(tag, len(items), b"".join(map(pack, items)))


def unpack(data, make=None):
    """`make` builds what the program alone can: only its own process has one."""
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
            return (
                {"N": None, "B": text == "1", "S": text}[tag]
                if tag in "NBS"
                else (int(text, 16) if tag == "I" else float.fromhex(text))
            )
        items = [part() for _ in range(n)]
        if tag == "d":
            return dict(zip(items[::2], items[1::2], strict=True))
        if tag == "o":
            return make(*items)
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
        raise ValueError(f"a result has more than {limit} bytes")
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
    "x86_64": (
        0xC000003E,
        [
            41,
            42,
            49,
            44,
            46,
            307,
            56,
            109,
            112,
            101,
            310,
            311,
            129,
            297,
            29,
            64,
            68,
            272,
            308,
            165,
            321,
            323,
            298,
            248,
            249,
            250,
            57,
            58,
        ],
        [62, 200, 234, 302],
    ),
    "aarch64": (
        0xC00000B7,
        [
            198,
            203,
            200,
            206,
            211,
            269,
            220,
            154,
            157,
            117,
            270,
            271,
            138,
            240,
            194,
            190,
            186,
            97,
            268,
            40,
            280,
            282,
            241,
            217,
            218,
            219,
        ],
        [129, 130, 131, 261],
    ),
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
    scope: dict[str, object] = {"__name__": "__main__"}

    def reply(compute):
        try:
            value, args = compute()
            try:
                text = pack(["value", value, args])
            except (
                TypeError
            ):  # objects of the program's own among the arguments: what it did to them stays there
                text = pack(["value", value, []])
        except BaseException as error:
            text = pack(["error", type(error).__name__, str(error)[:REPORT_BYTES]])
        put(answers, text)

    def run():
        exec(compile(source, "program", "exec", dont_inherit=True), scope)
        return None, []

    def call(name, args, options):
        if name not in scope:
            raise NameError("the program does not define " + name)
        return scope[name](*args, **options), args  # type: ignore[operator]

    def make(name, args, options):
        return call(name, args, options)[0]

    reply(run)
    while True:
        request = take(asked)
        reply(lambda: call(*unpack(request, make)))  # noqa: B023 (called at once)


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
        for old, new in zip(args, after, strict=False):
            update(old, new)
        return value

    result(take(answers, REPLY_BYTES))  # of the program itself
    scope: dict[str, object] = {"__name__": "test"}
    for text in (prelude, prelude + "\n    pass", ""):  # a signature may lack its body
        try:
            code = compile(text, "prelude", "exec", dont_inherit=True)
            break
        except SyntaxError:
            continue
    exec(code, scope)
    scope[entry_point] = candidate
    checks = compile(test, "test", "exec", dont_inherit=True)
    for name in set(checks.co_names) - set(scope) - set(vars(builtins)):
        scope[name] = lambda *args, _name=name, **options: Made(_name, args, options)
    exec(checks, scope)


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


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])

"""`python -m <module> <words>` in a fork of a process that has imported everything: it starts at once.

A new process spends 2 to 7 seconds on its imports. Here one process makes them, on first use, and forks for
every command; the fork has its own folder, environment, output and exit code, and runs the module as
`python -m` does. Tests of what a new process itself does (its imports, its signals) start one.
"""

import atexit
import json
import os
import runpy
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
IMPORTED = ("datasets", "lm_eval.evaluator", "lm_eval.tasks", "transformers", "dllmq.cell", "dllmq.run",
            "dllmq.report.build", "dllmq.mini.tasks", "matplotlib.figure")  # fmt: skip


def run(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """python -m words[0] words[1:] in `folder`, with more environment variables."""
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    with tempfile.TemporaryDirectory() as outputs:
        files = [f"{outputs}/{name}" for name in ("stdout", "stderr")]
        asked: dict[str, Any] = {
            "words": words,
            "folder": str(folder),
            "files": files,
            "environment": os.environ | environment,
        }
        server.stdin.write(json.dumps(asked) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        assert answer, "the process that forks has ended"
        out, err = (Path(file).read_text(encoding="utf-8", errors="replace") for file in files)
    return subprocess.CompletedProcess(list(words), int(answer), out, err)


@cache
def _server() -> subprocess.Popen[str]:
    """The process that imports and forks; it ends with this one, whose end closes its input."""
    server = subprocess.Popen(
        [sys.executable, __file__],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(_end, server)
    return server


def _end(server: subprocess.Popen[str]) -> None:
    server.communicate()


def serve() -> None:
    """A line of JSON per command on standard input, its exit code on standard output."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in IMPORTED:
        __import__(name)
    for line in sys.stdin:
        asked = json.loads(line)
        pid = os.fork()
        if pid == 0:
            answers.close()
            os._exit(_command(**asked))
        answers.write(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n")
        answers.flush()
    os._exit(0)  # taking down what was imported takes a second


def _command(words: list[str], folder: str, files: list[str], environment: Mapping[str, str]) -> int:
    """Runs it in this process, which ends with the returned code."""
    for fd, file in zip((1, 2), files, strict=True):
        opened = os.open(file, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, fd)
        os.close(opened)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[0] = folder  # of this file until here
    sys.argv = words
    code = _exit_code(words[0])
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _exit_code(module: str) -> int:
    sys.modules.pop(module, None)  # as in a new process
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return _code_of(end.code)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _code_of(code: Any) -> int:
    """What the interpreter makes of sys.exit(code)."""
    if code is None or isinstance(code, int):
        return int(code or 0) & 255
    print(code, file=sys.stderr)
    return 1


if __name__ == "__main__":
    serve()

"""Bounds on seconds and memory of Python code that comes with a checkpoint: chat templates.

Jinja's sandbox keeps a template from Python's objects, and its range() from more than 100,000 numbers; a loop
inside a loop, or a text that is doubled forty times, passes it. Here the interpreter asks for the time at
every line, and in templates at every instruction, and the process may grow by a fixed amount only.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

T = TypeVar("T")
_TEMPLATE = "<template>"  # the file name that Jinja gives to what it compiles from a text
_one_at_a_time = threading.Lock()  # the limit is the process's


class Exceeded(BaseException):
    """A bound was reached. No Exception: Jinja's optimizer goes on after those."""


def bounded(call: Callable[[], T], seconds: float, growth: int) -> T:
    """call(), which is stopped after `seconds`, or where it needs `growth` bytes more than the process has.

    One instruction is not interrupted: a product of large integers can take a few times `seconds`. Memory is
    bounded on Linux only, and for all threads of the process while call() runs.

    Raises:
        Exceeded: with what it needs, as part of a sentence.
    """
    deadline, before = time.monotonic() + seconds, sys.gettrace()

    def watch(frame: FrameType, event: str, argument: Any) -> Any:
        if time.monotonic() > deadline:
            raise Exceeded(f"it takes more than {seconds:g} seconds")
        frame.f_trace_opcodes = frame.f_code.co_filename == _TEMPLATE
        return watch

    with _address_space(growth):
        sys._getframe().f_trace_opcodes = True  # 3.12 asks for instructions only where one was wanted before
        sys.settrace(watch)
        try:
            return call()
        except MemoryError:
            raise Exceeded(f"it needs more than {growth >> 20} MiB of memory") from None
        finally:
            sys.settrace(before)


@contextmanager
def _address_space(growth: int) -> Iterator[None]:
    """Memory that is asked for beyond the process's size and `growth` bytes is a MemoryError."""
    size = Path("/proc/self/statm")
    if resource is None or not size.is_file():
        yield
        return
    with _one_at_a_time:
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = int(size.read_text().split()[0]) * resource.getpagesize() + growth
        limits = [limit, *(x for x in (soft, hard) if x != resource.RLIM_INFINITY)]
        resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))

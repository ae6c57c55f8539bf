"""SIGINT and SIGTERM end a run between two units of its work, and what is finished is kept.

    with listening():            # an entry point, in the main thread
        for block in blocks:
            ...
            check()              # raises Interrupted after a signal

A unit is a block, a batch of answers or of trajectories, a stage. A second signal stops at once, wherever the
program is; a third one ends it as the system does. Outside the main thread (workers of launchers) and where
nobody listens, signals are left as they are and `check` does nothing.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to stop; not an Exception, so nothing takes it for a failure of its own."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def exit_code(self) -> int:
        """What a shell reports of a program that this signal ended: 130 or 143."""
        return 128 + self.number


@dataclass
class _State:
    """Of this process: signals are the process's too."""

    received: int | None = None


_state = _State()


@contextmanager
def listening() -> Iterator[None]:
    """Within the context a signal is noted for `check`, which is also asked at the end.

    A signal that was ignored before (SIGINT of a job in a shell's background) stays ignored.

    Raises:
        Interrupted: a signal came, and the body ended before it asked.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _state.received = None
    before = {number: signal.getsignal(number) for number in SIGNALS}
    ours = [number for number in SIGNALS if before[number] != signal.SIG_IGN]
    for number in ours:
        signal.signal(number, _note)
    try:
        yield
        check()
    finally:
        for number in ours:
            signal.signal(number, _handler(before[number]))
        _state.received = None


def check() -> None:
    """Call it when a unit of work is finished and kept.

    Raises:
        Interrupted: a signal has come since `listening` began.
    """
    if _state.received is not None:
        raise Interrupted(_state.received)


def farewell(stop: KeyboardInterrupt, command: str, resume: bool = True) -> str:
    """What to say when the run ends: how to continue it.

    Args:
        command: that was given; resume: whether it goes on with what it finds.
    """
    name = str(stop) or "SIGINT"
    if not resume:
        return f"stopped by {name}; resume=false begins again, without it this continues: {command}"
    return f"stopped by {name}; what is finished is kept, and this continues: {command}"


def exit_code(stop: KeyboardInterrupt) -> int:
    return stop.exit_code if isinstance(stop, Interrupted) else 128 + signal.SIGINT


def _note(number: int, frame: FrameType | None) -> None:
    """The handler. It writes to the file descriptor: a stream may be in the middle of a write just now."""
    if _state.received is None:
        _state.received = number
        name = signal.Signals(number).name
        os.write(2, f"\n{name}: the block or batch at hand is finished first; again to stop now\n".encode())
        return
    for each in SIGNALS:
        signal.signal(each, signal.SIG_DFL)
    raise Interrupted(number)


def _handler(before: Any) -> Any:
    """A handler that was not set from Python cannot be put back."""
    return signal.SIG_DFL if before is None else before

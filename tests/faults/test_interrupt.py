"""SIGINT and SIGTERM: between two units, then at once; not outside the main thread."""

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from dllmq import interrupt
from dllmq.interrupt import Interrupted, check, listening


@pytest.fixture(autouse=True)
def interrupts_reach_us() -> Iterator[None]:
    """A shell starts what it runs in the background with SIGINT ignored, and that is respected."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_unit_at_hand_is_finished(
    number: signal.Signals, code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    done = []
    with pytest.raises(Interrupted) as stop, listening():
        for unit in range(5):
            if unit == 2:
                os.kill(os.getpid(), number)
            done.append(unit)
            check()
    assert done == [0, 1, 2] and interrupt.exit_code(stop.value) == code
    assert f"{number.name}: the block or batch at hand is finished first" in capfd.readouterr().err
    said = interrupt.farewell(stop.value, "the command")
    assert said == f"stopped by {number.name}; what is finished is kept, and this continues: the command"


def test_a_second_signal_stops_at_once() -> None:
    done = []
    with pytest.raises(Interrupted), listening():
        for unit in range(5):
            if unit in (1, 2):
                os.kill(os.getpid(), signal.SIGTERM)
            done.append(unit)
    assert done == [0, 1]


def test_a_signal_that_nobody_asked_about_is_told_at_the_end() -> None:
    """Else a sweep would go on with its next cell."""
    with pytest.raises(Interrupted), listening():
        os.kill(os.getpid(), signal.SIGTERM)


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in interrupt.SIGNALS]
    with listening():
        assert [signal.getsignal(number) for number in interrupt.SIGNALS] != before
    assert [signal.getsignal(number) for number in interrupt.SIGNALS] == before
    with pytest.raises(Interrupted), listening():
        os.kill(os.getpid(), signal.SIGTERM)
    check()  # the signal is past


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with listening():
            os.kill(os.getpid(), signal.SIGINT)
            check()
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_leaves_signals_alone() -> None:
    seen = []

    def work() -> None:
        with listening():
            seen.append([signal.getsignal(number) for number in interrupt.SIGNALS])

    before = [signal.getsignal(number) for number in interrupt.SIGNALS]
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_an_interrupted_run_is_no_failure() -> None:
    """`except Exception` must not take it for one."""
    assert not issubclass(Interrupted, Exception) and issubclass(Interrupted, KeyboardInterrupt)

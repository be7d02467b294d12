"""Requests to stop: Ctrl-C, SIGTERM and SIGHUP, which act alike on the command line. Knows no command."""

from __future__ import annotations

import _thread
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

EXIT_CODE = 130
"""Exit code of a command that was asked to stop, whatever the signal."""

SIGNALS = tuple(signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Signals that ask a program to stop; Windows has no SIGHUP."""

_PATIENCE = 3.0
"""Seconds that a command may take to clean up before a further signal ends it at once."""

_RETRY = 0.02
"""Seconds between attempts to interrupt a command that is importing, and between looks at an answer."""

_ANSWER = 1.0
"""Seconds that a command waits for its answer to a signal to be written."""

_Handler = Callable[[int, FrameType | None], Any]


class Flag:
    """A request to stop. Unlike ``threading.Event``, it takes no lock, so that a signal handler may set it at any time."""

    def __init__(self) -> None:
        self._is_set = False

    def is_set(self) -> bool:
        """Whether the request was made."""
        return self._is_set

    def set(self) -> None:
        """Make the request."""
        self._is_set = True


class Interruption:
    """Signal handler that raises KeyboardInterrupt once.

    Signals that follow within seconds mean the same request: they are ignored while the command cleans up. A later one ends
    the process at once. An import is not interrupted, as extension modules turn KeyboardInterrupt into other errors or
    lose it: the interrupt follows right after it.

    Attributes:
        is_raised: whether KeyboardInterrupt was raised; another exception that leaves the command is its consequence.
        is_told: whether the command has printed how it ended; a signal before the process has ended adds no line.
    """

    def __init__(self) -> None:
        self._asked: float | None = None
        self.is_raised = self.is_told = self._is_over = self._is_own = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        is_own, self._is_own = self._is_own, False
        if self._is_over:
            return
        now = time.monotonic()
        if self._asked is None:
            self._asked = now
        elif now - self._asked > _PATIENCE and not is_own:
            exit_at_once(number, frame)
        if self.is_raised:
            return
        if _is_importing(frame):
            self._send_again(number)
            return
        self.is_raised = True
        raise KeyboardInterrupt

    def end(self) -> None:
        """Ignore all further signals: the outcome of the command is known."""
        self._is_over = True

    def repeat(self) -> None:
        """Raise KeyboardInterrupt once more: the first one was lost in a destructor or a callback."""
        self.is_raised = False
        self._send_again(signal.SIGINT)

    def _send_again(self, number: int) -> None:
        """Send a signal to the main thread a little later."""
        identity = threading.main_thread().ident

        def send() -> None:
            time.sleep(_RETRY)
            if identity is not None:
                self._is_own = True  # however long the import takes, nobody has asked once more
                signal.pthread_kill(identity, number)

        with suppress(RuntimeError):
            _thread.start_new_thread(send, ())


def exit_at_once(number: int, frame: FrameType | None) -> None:
    """Signal handler for times when there is nothing to clean up: before and after a command."""
    with suppress(OSError):
        os.write(2, b"engine: interrupted\n")
    _exit_silently(number, frame)


def _exit_silently(number: int, frame: FrameType | None) -> None:
    os._exit(EXIT_CODE)


def handle(handler: _Handler) -> dict[signal.Signals, Any]:
    """Install a handler for every stop signal that is not ignored, as nohup and background jobs ignore some.

    Returns:
        The former handlers; none outside the main thread, where Python delivers no signals.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    numbers = [number for number in SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    return {number: signal.signal(number, handler) for number in numbers}


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Let SIGTERM and SIGHUP act as Ctrl-C: the first signal raises KeyboardInterrupt, see ``Interruption``."""
    interruption = Interruption()
    before = handle(interruption)
    try:
        yield interruption
    finally:
        for number, former in before.items():
            is_second_line = interruption.is_told and former is exit_at_once
            signal.signal(number, _exit_silently if is_second_line else former)


@contextmanager
def deferred_interrupt(on_request: Callable[[], None] = lambda: None) -> Iterator[Flag]:
    """Turn the first signal into a flag; the second one raises KeyboardInterrupt at once.

    Defers the signals that raise KeyboardInterrupt at present: SIGINT, and on the command line SIGTERM and SIGHUP. A
    program's own handlers stay.

    Args:
        on_request: called once, in a thread, when the first signal arrives.

    Yields:
        The flag, for the block to test between units of work. Outside the main thread, where Python delivers no
        signals, it is never set.
    """
    requested, answered = Flag(), Flag()
    before: dict[signal.Signals, _Handler] = {}

    def request(number: int, frame: FrameType | None) -> None:
        if requested.is_set():
            before[signal.Signals(number)](number, frame)
            return
        requested.set()
        # In a thread: the signal may have interrupted a write to the same stream, which must not be entered twice.
        try:
            _thread.start_new_thread(answer, ())
        except RuntimeError:
            answered.set()

    def answer() -> None:
        try:
            on_request()
        finally:
            answered.set()

    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            handler = signal.getsignal(number)
            if handler is signal.default_int_handler or isinstance(handler, Interruption):
                before[number] = handler
        for number in before:
            signal.signal(number, request)
    try:
        yield requested
    finally:
        for number, former in before.items():
            signal.signal(number, former)
        # A process that ends at once would end before its answer is on the stream.
        deadline = time.monotonic() + _ANSWER
        while requested.is_set() and not answered.is_set() and time.monotonic() < deadline:
            time.sleep(_RETRY)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False

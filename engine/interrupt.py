"""Ctrl-C that waits for a safe point."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager


@contextmanager
def deferred_interrupt(
    signals: Sequence[signal.Signals] = (signal.SIGINT,), on_request: Callable[[], None] = lambda: None
) -> Iterator[threading.Event]:
    """Turn the first signal into a flag; the second one raises KeyboardInterrupt at once.

    Args:
        signals: signals to defer.
        on_request: called once, from the signal handler, when the first signal arrives.

    Yields:
        The flag, for the block to test between units of work. Outside the main thread, where Python delivers no
        signals, it is never set.
    """
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield requested
        return

    def request(number: int, frame: object) -> None:
        if requested.is_set():
            raise KeyboardInterrupt
        requested.set()
        on_request()

    before = {number: signal.signal(number, request) for number in signals}
    try:
        yield requested
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

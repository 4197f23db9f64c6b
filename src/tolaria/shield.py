"""Holding back Ctrl-C (and every other Python signal handler) while a submission is under way."""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any

Handler = Any


class Shield:
    """A context manager: signals that arrive inside are delivered, in order, when it is left.

    Python runs signal handlers in the main thread only, so elsewhere this does nothing. Handlers that are not Python
    functions (the system's defaults, faulthandler's) are not touched. Not re-entrant; make one per use.
    """

    def __init__(self) -> None:
        self._held: dict[int, Handler] = {}
        self._arrived: list[tuple[int, FrameType | None]] = []
        self._open = False

    def __enter__(self) -> Shield:
        if threading.current_thread() is threading.main_thread():
            try:
                for number in signal.valid_signals():
                    handler = signal.getsignal(number)
                    if callable(handler):
                        self._held[number] = handler
                        signal.signal(number, self._note)
            except BaseException:
                self._put_back()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        handlers = dict(self._held)
        self._put_back()
        for number, frame in self._arrived:
            handlers[number](number, frame)

    def _put_back(self) -> None:
        for number in list(self._held):
            signal.signal(number, self._held.pop(number))

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._open:
            self._held[number](number, frame)
        else:
            self._arrived.append((number, frame))

    @contextmanager
    def interruptible(self) -> Generator[None]:
        """Let signals through inside: for waits that may be long and have changed nothing yet."""
        arrived = list(self._arrived)
        self._arrived.clear()
        for number, frame in arrived:
            self._held[number](number, frame)
        self._open = True
        try:
            yield
        finally:
            self._open = False

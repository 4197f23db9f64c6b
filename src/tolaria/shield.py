"""Holding back Ctrl-C (and every other Python signal handler) while a submission is under way."""

from __future__ import annotations

import itertools
import signal
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

Handler = Any

_NUMBERS = tuple(int(number) for number in signal.valid_signals())  # asking takes longer than a small rollback
# what is under `signal` in CPython: asked for every signal at every submission, and enums are slow
_signal: Any = getattr(signal, "_signal", signal)
_handler_of: Callable[[int], Handler] = _signal.getsignal
_set_handler: Callable[[int, Handler], Any] = _signal.signal


class Shield:
    """A context manager: signals that arrive inside are delivered, in order and once each, when it is left.

    Python runs signal handlers in the main thread only, so elsewhere this does nothing. Handlers that are not Python
    functions (the system's defaults, faulthandler's) are not touched. Not re-entrant; make one per use.

    Attributes:
        lets_through: Signals are delivered at once. To set it calls nothing, so that no handler comes in between.
    """

    def __init__(self) -> None:
        self._held: dict[int, Handler] = {}
        self._arrived: list[tuple[int, FrameType | None]] = []
        self.lets_through = False

    def __enter__(self) -> Shield:
        if threading.current_thread() is threading.main_thread():
            try:
                handlers = list(map(_handler_of, _NUMBERS))
                for number, handler in itertools.compress(
                    zip(_NUMBERS, handlers, strict=True), map(callable, handlers)
                ):
                    self._held[number] = handler
                    before = _set_handler(number, self._note)
                    if callable(before):
                        self._held[number] = before  # another one, where a handler that has just run has set it
                    elif before is not None:  # that one has left it to the system; none: nothing that could be put back
                        self._held.pop(number)
                        _set_handler(number, before)
            except BaseException:
                self.__exit__()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        handlers = dict(self._held)
        try:
            self._put_back()
        finally:
            self._deliver(handlers)

    def _put_back(self) -> None:
        """Restore every handler. One that is back may run at once and raise; the others are restored all the same."""
        raised: BaseException | None = None
        while self._held:
            number = next(iter(self._held))
            try:
                if _handler_of(number) == self._note:  # else somebody who ran meanwhile wants another one from now on
                    _set_handler(number, self._held[number])
            except BaseException as error:
                raised = raised or error
            if _handler_of(number) != self._note:
                del self._held[number]
        if raised is not None:
            raise raised

    def _deliver(self, handlers: Mapping[int, Handler]) -> None:
        """Call the handlers of what has arrived. One that raises keeps none of the others from being called."""
        if self._arrived:
            number, frame = self._arrived.pop(0)
            try:
                handlers[number](number, frame)
            finally:
                self._deliver(handlers)

    @property
    def holds_any(self) -> bool:
        """Whether some signal has arrived that was not delivered yet."""
        return bool(self._arrived)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.lets_through:
            self._held[number](number, frame)
        else:
            self._arrived.append((number, frame))

    @contextmanager
    def interruptible(self) -> Generator[None]:
        """Let signals through inside: for waits that may be long and have changed nothing yet."""
        self.lets_through = True
        try:
            self._deliver(self._held)
            yield
        finally:
            self.lets_through = False

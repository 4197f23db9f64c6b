"""A gate for host threads: holds them where a test says, so that a race is forced and not hoped for."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Generator
from typing import Any
from unittest import mock

from tolaria.errors import QuiesceTimeout


class ThreadGate:
    """Threads that come to `hold` stay there until `open`.

    Args:
        limit_s: Seconds after which a watchdog opens it, so that a test that would hang fails instead: `was_forced`.
            Also the longest that `wait_held` waits.
    """

    def __init__(self, limit_s: float = 60.0) -> None:
        self._limit_s = limit_s
        self._changed = threading.Condition()
        self._held = 0
        self._is_open = False
        self.was_forced = False
        self._watchdog = threading.Timer(limit_s, self._force)
        self._watchdog.daemon = True

    def __enter__(self) -> ThreadGate:
        self._watchdog.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._watchdog.cancel()
        self.open()

    @property
    def is_open(self) -> bool:
        """Whether everybody is let through."""
        return self._is_open

    def hold(self, *_: Any) -> None:
        """The calling thread stays here until the gate is open. Takes any arguments, so that it can be a hook."""
        with self._changed:
            self._held += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._is_open)
            self._held -= 1

    def wait_held(self, threads: int = 1) -> None:
        """Block until that many threads are held.

        Raises:
            QuiesceTimeout: They do not come, or the gate was opened meanwhile.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._held >= threads or self._is_open, self._limit_s)
            if self._held < threads or self._is_open:
                now = "open" if self._is_open else "closed"
                raise QuiesceTimeout(
                    "waiting for threads to be held",
                    f"{self._held} are held and the gate is {now}, expected {threads} and closed",
                    "Start them first, and keep the gate closed.",
                )

    def open(self) -> None:
        """Let everybody through, from now on."""
        with self._changed:
            self._is_open = True
            self._changed.notify_all()

    @contextlib.contextmanager
    def before(self, owner: Any, name: str, *, calls: int = 0) -> Generator[None]:
        """Inside, whoever calls that function of an object, class or module is held before it.

        Args:
            owner: For example an optimizer, or `torch`.
            name: Of its function.
            calls: That many calls go through first.
        """
        original = getattr(owner, name)
        left = [calls]

        @functools.wraps(original)
        def held(*args: Any, **kwargs: Any) -> Any:
            with self._changed:
                passes = left[0] > 0
                left[0] -= 1
            if not passes:
                self.hold()
            return original(*args, **kwargs)

        with mock.patch.object(owner, name, held):
            yield

    def _force(self) -> None:
        self.was_forced = True
        self.open()

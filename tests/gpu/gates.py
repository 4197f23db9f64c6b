"""Gates that hold work back on the device until the host opens them, so that a race is forced and not hoped for."""

from __future__ import annotations

import threading
import time

import torch
from cuda.bindings import driver

_GREATER_OR_EQUAL = 0


class Gate:
    """Work that a stream is given after `close(stream)` does not begin before `open()`.

    The stream waits for a word of page-locked memory, which only the host writes. A watchdog opens the gate after
    `limit_s` seconds, so that a test that would hang fails instead; `was_forced` tells.
    """

    def __init__(self, limit_s: float = 60.0) -> None:
        self._word = torch.zeros(1, dtype=torch.int32).pin_memory()
        self._watchdog = threading.Timer(limit_s, self._force)
        self._watchdog.daemon = True
        self.was_forced = False

    def __enter__(self) -> Gate:
        self._watchdog.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._watchdog.cancel()
        self.open()
        torch.cuda.synchronize()

    def close(self, stream: torch.cuda.Stream) -> None:
        """Hold back what `stream` is given from now on."""
        (code,) = driver.cuStreamWaitValue32(stream.cuda_stream, self._word.data_ptr(), 1, _GREATER_OR_EQUAL)
        assert int(code) == 0, code

    @property
    def is_open(self) -> bool:
        return bool(self._word[0])

    def open(self) -> None:
        """Let everything through."""
        self._word[0] = 1

    def _force(self) -> None:
        self.was_forced = True
        self.open()


def distinct_streams(count: int) -> list[torch.cuda.Stream]:
    """Streams of torch's pool that are really different (it hands out 32 per priority, in turn)."""
    found: dict[int, torch.cuda.Stream] = {}
    while len(found) < count:
        stream = torch.cuda.Stream()
        found.setdefault(stream.cuda_stream, stream)
    return list(found.values())


def gets_through(stream: torch.cuda.Stream, limit_s: float = 10.0) -> bool:
    """Control: whether a tiny piece of work on `stream` ends although other streams are held back.

    Streams share hardware queues (CUDA_DEVICE_MAX_CONNECTIONS): one that stands behind a gate by accident would make an
    unprotected rollback look ordered.
    """
    with torch.cuda.stream(stream):
        torch.zeros(1, device="cuda").add_(1)
        event = torch.cuda.Event()
        event.record()
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if event.query():
            return True
    return False

"""Gates that hold work back on a CUDA device until the host opens them, so that a race is forced and not hoped for.

`run_in_subprocess` makes the trials of `trials` in processes of their own: they need settings that must be there before
CUDA starts, and one that hangs has to be ended from outside.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tolaria import TolariaGovernor
from tolaria.cuda import find_driver
from tolaria.errors import UnsupportedState

_GREATER_OR_EQUAL = 0  # CU_STREAM_WAIT_VALUE_GEQ
BARRIERS = ("context", "blocking")
_POOL = 32
_PROBE_S = 0.5  # what gets through does so in microseconds; to be slow here costs a stream, nothing else

# As many hardware queues as there are: streams that share one hide races. And every kernel loaded at once: loading one
# behind a closed gate may wait for ever.
ENVIRONMENT = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "32",
    "CUDA_MODULE_LOADING": "EAGER",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}


def driver() -> Any:
    """The bindings of the CUDA driver.

    Raises:
        UnsupportedState: They are not installed.
    """
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise UnsupportedState(
            "forcing races on the device", "the package cuda-bindings is missing", "pip install 'tolaria[cuda]'"
        ) from error


def make_current(stream: torch.cuda.Stream) -> None:
    """See to it that the calling thread has a CUDA context: one that has launched nothing yet has none.

    The driver refuses its calls then, and cuBLAS warns.
    """
    stream.record_event()


class Gate:
    """Work that a stream is given after `close(stream)` does not begin before `open()`.

    The stream waits for a word of page-locked memory, which only the host writes. A watchdog opens the gate after
    `limit_s` seconds, so that a test that would hang fails instead; `was_forced` tells.

    Load every kernel and take all memory that is needed *before* closing it: both may wait for the whole device.
    """

    def __init__(self, limit_s: float = 60.0) -> None:
        self._driver = driver()
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
        """Hold back what `stream` is given from now on. On any thread."""
        make_current(stream)
        (code,) = self._driver.cuStreamWaitValue32(stream.cuda_stream, self._word.data_ptr(), 1, _GREATER_OR_EQUAL)
        assert int(code) == 0, code

    @property
    def is_open(self) -> bool:
        """Whether everything is let through."""
        return bool(self._word[0])

    def open(self) -> None:
        """Let everything through."""
        self._word[0] = 1

    def _force(self) -> None:
        self.was_forced = True
        self.open()


def distinct_streams(count: int, apart_from: Sequence[torch.cuda.Stream] = ()) -> list[torch.cuda.Stream]:
    """Streams of torch's pool that are really different (it hands out 32 per priority, in turn).

    Args:
        count: How many; at most 32.
        apart_from: Streams that must go on while one of these is held back. Those that share a hardware queue with one
            of them come last, and only if there are too few others.
    """
    pool: dict[int, torch.cuda.Stream] = {}
    while len(pool) < (_POOL if apart_from else count):
        stream = torch.cuda.Stream()
        pool.setdefault(stream.cuda_stream, stream)
    if not apart_from:
        return list(pool.values())
    apart: list[torch.cuda.Stream] = []
    sharing: list[torch.cuda.Stream] = []
    for stream in pool.values():
        if len(apart) == count:
            break
        with Gate() as gate:
            gate.close(stream)
            passes = all(gets_through(other, _PROBE_S) for other in apart_from)
        (apart if passes else sharing).append(stream)
    return [*apart, *sharing][:count]


def own_streams(governor: TolariaGovernor) -> list[torch.cuda.Stream]:
    """The streams that a governor copies on; with the `blocking` barrier it has none."""
    handles = [getattr(port, "_stream", None) for port in governor._keeper.devices.values()]
    return [torch.cuda.ExternalStream(int(handle)) for handle in handles if handle is not None]


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


# ---------------------------------------------------------------- trials in processes of their own


@dataclass(frozen=True, slots=True)
class Trial:
    """One trial on the device.

    Attributes:
        test: What was tried, and with which barrier.
        control: What came of it without protection: it must be torn or lost, or nothing was shown.
        result: ``"ok"``, or what went wrong.
    """

    test: str
    control: str
    result: str


def run_in_subprocess(limit_s: float = 240.0, command: tuple[str, ...] = ()) -> list[Trial]:
    """Make every trial with each barrier that this machine has.

    Args:
        limit_s: Seconds after which a process is ended.
        command: What to run instead of the trials; for tests of this function.
    """
    found: list[Trial] = []
    for barrier in BARRIERS:
        if barrier == "context" and find_driver()[0] is None and not command:
            continue  # `capabilities` tells why; the blocking barrier is what a governor uses here
        found += _run_one(barrier, limit_s, command or (sys.executable, "-m", "tolaria.testing.trials", barrier))
    return found


def _run_one(barrier: str, limit_s: float, command: tuple[str, ...]) -> list[Trial]:
    lines, ended = lines_of(command, limit_s)
    trials = [Trial(**line) for line in lines]
    if not ended and not trials:
        ended = "made no trial"
    return [*trials, *([Trial(f"all trials [{barrier}]", "not known", ended)] if ended else [])]


def lines_of(command: tuple[str, ...], limit_s: float) -> tuple[list[dict[str, Any]], str]:
    """Run a program in a process of its own, with the settings that CUDA needs before it starts.

    Args:
        command: The program and its arguments. It prints one JSON object per line; other lines are passed over.
        limit_s: Seconds after which it is ended.

    Returns:
        What it printed, also before it was ended; and how it ended, empty if all is well.
    """
    process = subprocess.Popen(
        command, env={**os.environ, **ENVIRONMENT}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    ended = ""
    try:
        out, err = process.communicate(timeout=limit_s)
        if process.returncode:
            ended = f"ended with {process.returncode}: {(err.strip().splitlines() or ['no message'])[-1]}"
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        ended = f"hung for {limit_s:g} s and was ended"
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")], ended

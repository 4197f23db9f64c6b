"""What stands around a device port while it is checked: streams of the user's, and work that is held back."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from tolaria.testing.gates import Gate, distinct_streams, make_current


class Bench(Protocol):
    """What stands around a port that works asynchronously: streams of the user's, and work that is held back.

    `hold` may be called where work is launched (inside `launch`, `enqueue`, ...). What the stream is given behind it
    does not run before `returns` or `finish` has opened everything again.
    """

    def tensor(self, *, on_host: bool = False) -> torch.Tensor:
        """Zeros, shape [1024], float32, on the device; or page-locked, where a transfer arrives."""
        ...

    def stream(self) -> Any:
        """A stream of the user's, that the port was never told of."""
        ...

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """That stream is the caller's current one inside."""
        ...

    def current(self) -> Any:
        """What names the caller's current stream: equal for equal streams."""
        ...

    def launch(self, stream: Any, work: Callable[[], Any]) -> None:
        """The user calls `work` with that stream current."""
        ...

    def hold(self) -> None:
        """Hold back what the current stream is given from now on."""
        ...

    def wait(self, stream: Any) -> None:
        """Block the host until a stream of the user's is idle."""
        ...

    def returns(self, call: Callable[[], Any]) -> bool:
        """Whether `call` returns although something is held. Then let everything through and wait until it has."""
        ...

    def finish(self) -> None:
        """Let everything through, and wait until the device is idle."""
        ...


class CudaBench:
    """The `Bench` of a CUDA device.

    Args:
        name: Of the device; made current by whoever checks.
        patience_s: How long a call must not have returned to count as blocked. One that is not blocked returns in
            microseconds: longer only makes the check slower.
        limit_s: Seconds after which a call that ought to return counts as hung.
    """

    def __init__(self, name: str, patience_s: float = 0.2, limit_s: float = 30.0) -> None:
        self._device, self._patience_s, self._limit_s = torch.device(name), patience_s, limit_s
        self._streams = iter(distinct_streams(24))
        self._gate: Gate | None = None
        for on_host in (False, True):  # every kernel once: nothing may be loaded behind a closed gate
            self.tensor().fill_(1).copy_(self.tensor(on_host=on_host), non_blocking=True)
        torch.cuda.synchronize(self._device)

    def tensor(self, *, on_host: bool = False) -> torch.Tensor:
        made = torch.zeros(1024).pin_memory() if on_host else torch.zeros(1024, device=self._device)
        torch.cuda.synchronize(self._device)
        return made

    def stream(self) -> torch.cuda.Stream:
        return next(self._streams)

    def on(self, stream: torch.cuda.Stream) -> AbstractContextManager[Any]:
        return torch.cuda.stream(stream)

    def current(self) -> int:
        handle: int = torch.cuda.current_stream(self._device).cuda_stream
        return handle

    def launch(self, stream: torch.cuda.Stream, work: Callable[[], Any]) -> None:
        with torch.cuda.stream(stream):
            work()

    def hold(self) -> None:
        if self._gate is None:
            self._gate = Gate(self._limit_s)
            self._gate.__enter__()
        self._gate.close(torch.cuda.current_stream(self._device))

    def wait(self, stream: torch.cuda.Stream) -> None:
        stream.synchronize()

    def returns(self, call: Callable[[], Any]) -> bool:
        raised: list[BaseException] = []

        def run() -> None:
            try:
                make_current(torch.cuda.current_stream(self._device))
                call()
            except BaseException as error:
                raised.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(self._patience_s)
        early = not thread.is_alive()
        self._open()
        thread.join(self._limit_s)
        if thread.is_alive():
            raise TimeoutError(f"did not return within {self._limit_s:g} s although nothing was held back")
        if raised:
            raise raised[0]
        return early

    def finish(self) -> None:
        self._open()
        torch.cuda.synchronize(self._device)

    def _open(self) -> None:
        if self._gate is not None:
            gate, self._gate = self._gate, None
            gate.open()
            gate.__exit__()

"""CAPTURE: tells every governor of the process when a CUDA graph is captured or replayed.

A barrier of any kind, and a device synchronise too, invalidates every capture in progress on the device, whoever makes
it; and a replay writes governed memory without running a line of Python. So four methods of `torch.cuda.CUDAGraph`
are wrapped for the process while some governor wants to know, and put back when the last one is closed. Captures that
are not made through that class (in C++, or through another library) stay unknown.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch


class Listener(Protocol):
    """Somebody who must know. Called on the thread that captures or replays."""

    def begin_capture(self, token: int, thread: int) -> None:
        """A capture of that thread is about to begin. May wait, and may raise: then it does not begin."""

    def end_capture(self, token: int, *, succeeded: bool) -> None:
        """It is over, or never began."""

    def replaying(self) -> AbstractContextManager[Any]:
        """A section around one replay."""
        ...


_lock = threading.RLock()
_listeners: list[weakref.ref[Listener]] = []
_capturing: dict[int, tuple[int, list[weakref.ref[Listener]]]] = {}  # by token: the capture's thread, and who was told
# a number for each capture and not the graph's id, which the next graph may have
_numbers = itertools.count(1)
_tokens: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
_originals: dict[str, Callable[..., Any]] = {}
_dropped: deque[int] = deque()  # captures whose graphs are no more


def listen(listener: Listener, graph_class: Any = None) -> None:
    """Tell `listener` (held weakly) from now on; of captures already in progress at once."""
    with _lock:
        reference = weakref.ref(listener, lambda _: _remove(None))
        _listeners.append(reference)
        if not _originals:
            _install(graph_class or torch.cuda.CUDAGraph)
        # under the lock, so that none of them can end in between; nothing is being submitted yet, so nobody waits
        for token, (thread, told) in list(_capturing.items()):
            told.append(reference)
            listener.begin_capture(token, thread)


def ignore(listener: Listener) -> None:
    """Tell `listener` no more. Idempotent."""
    _remove(listener)


def drain() -> None:
    """Tell of captures whose graphs were dropped before they ended. Called at boundaries."""
    while _dropped:
        _over(_dropped.popleft(), succeeded=False)


def _remove(listener: Listener | None) -> None:
    with _lock:
        _listeners[:] = [one for one in _listeners if one() is not None and one() is not listener]
        if not _listeners and _originals:
            _uninstall()


def _live(references: list[weakref.ref[Listener]]) -> list[Listener]:
    return [listener for reference in list(references) if (listener := reference()) is not None]


_wrapped_class: Any = None


def _install(graph_class: Any) -> None:
    global _wrapped_class
    _wrapped_class = graph_class
    for name, wrapper in (
        ("capture_begin", _begin),
        ("capture_end", _end),
        ("replay", _replay),
        ("reset", _reset),
    ):
        original = getattr(graph_class, name)
        _originals[name] = original
        setattr(graph_class, name, _wrap(original, wrapper))


def _wrap(original: Callable[..., Any], wrapper: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(original, self, *args, **kwargs)

    vars(method)["_is_tolarias"] = True
    return method


def _uninstall() -> None:
    """Put every method back. One that somebody else has wrapped since stays: without listeners it passes calls on."""
    for name, original in list(_originals.items()):
        if getattr(vars(_wrapped_class).get(name), "_is_tolarias", False):
            setattr(_wrapped_class, name, original)
        del _originals[name]


def _begin(original: Callable[..., Any], graph: Any, *args: Any, **kwargs: Any) -> Any:
    token, thread = next(_numbers), threading.get_ident()
    with _lock:
        told = list(_listeners)
        _tokens[graph] = token
        _capturing[token] = thread, told
    # a graph that is dropped in the middle of its capture takes nobody with it; the collector may come at any moment,
    # also while a lock is held that `_over` needs
    weakref.finalize(graph, _dropped.append, token)
    try:
        for listener in _live(list(told)):
            listener.begin_capture(token, thread)
        return original(graph, *args, **kwargs)
    except BaseException:
        _over(token, succeeded=False)
        raise


def _end(original: Callable[..., Any], graph: Any, *args: Any, **kwargs: Any) -> Any:
    succeeded = False
    try:
        result = original(graph, *args, **kwargs)
        succeeded = True
        return result
    finally:
        _over(_tokens.get(graph, 0), succeeded=succeeded)


def _over(token: int, *, succeeded: bool) -> None:
    with _lock:
        _, told = _capturing.pop(token, (0, []))
    for listener in _live(told):
        listener.end_capture(token, succeeded=succeeded)


def _replay(original: Callable[..., Any], graph: Any, *args: Any, **kwargs: Any) -> Any:
    with contextlib.ExitStack() as sections:
        for listener in _live(_listeners):
            sections.enter_context(listener.replaying())
        return original(graph, *args, **kwargs)


def _reset(original: Callable[..., Any], graph: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        return original(graph, *args, **kwargs)
    finally:
        _over(_tokens.get(graph, 0), succeeded=False)

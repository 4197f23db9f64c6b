"""Programs with one thing about them changed: operations altered, left out, or performed late."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from typing import Any

from tolaria.gate import GateState
from tolaria.operations import Await, Change, HostState
from tolaria.testing.simulator import dispose
from tolaria.testing.world import Program

Instead = Callable[[Any], tuple[Any, ...]]
"""What is performed in the place of an operation; of None: when the program is over. Made anew for each run."""


def _rewritten(program: Program, begin: Callable[[], Instead]) -> Program:
    """The same program with other operations in the place of its own.

    The answer to an operation is that of the last one performed in its place. One without any answers None; a wait
    answers that there was nothing to wait for. What goes wrong is raised where the program stands.
    """

    def run() -> Iterator[Any]:
        inner: Any = program()
        instead = begin()
        try:
            op = next(inner)
            while True:
                result: Any = (None, 0.0) if isinstance(op, Await) else None
                try:
                    for one in instead(op):
                        result = yield one
                except Exception as error:
                    op = inner.throw(error)
                else:
                    op = inner.send(result)
        except StopIteration as end:
            for one in instead(None):
                yield one
            return end.value
        finally:
            dispose(inner)

    return run


def altered(program: Program, alter: Callable[[Any], Any]) -> Program:
    """The same program with each of its operations replaced."""
    return _rewritten(program, lambda: lambda op: () if op is None else (alter(op),))


def asking(label: str, blind: Callable[[HostState], HostState]) -> Callable[[Any], Any]:
    """For `altered`: waits of that label do not see part of the state, which stays as it is otherwise."""

    def alter(op: Any) -> Any:
        if not (isinstance(op, Await) and label in op.label):
            return op

        def function(state: HostState) -> Any:
            unseen = blind(state)
            answer = op.function(unseen)
            if answer is None:
                return None
            after, result = answer
            kept = {
                name: getattr(state, name)
                for name in ("gate", "captures")
                if getattr(unseen, name) != getattr(state, name) and getattr(after, name) == getattr(unseen, name)
            }
            return replace(after, **kept), result

        return Await(op.label, function, op.timeout_s)

    return alter


def delayed(program: Program, late: type[Any], until: Callable[[Any], bool]) -> Program:
    """The same program with one kind of operation performed later: before the first one that `until` picks, or last."""

    def begin() -> Instead:
        held: list[Any] = []

        def instead(op: Any) -> tuple[Any, ...]:
            if isinstance(op, late):
                held[:] = [op]
                return ()
            if op is not None and not (held and until(op)):
                return (op,)
            due = (*held, *(() if op is None else (op,)))
            held.clear()
            return due

        return instead

    return _rewritten(program, begin)


def skipping(program: Program, wanted: Callable[[Any], bool], number: int | None = None) -> Program:
    """The same program without some of its operations: all that are `wanted`, or the n-th of them. They answer None."""

    def begin() -> Instead:
        numbers = count()

        def instead(op: Any) -> tuple[Any, ...]:
            if op is None or (wanted(op) and number in (None, next(numbers))):
                return ()
            return (op,)

        return instead

    return _rewritten(program, begin)


def unfollowed(program: Program, first: Any, late: type[Any]) -> Program:
    """The same program without the operations of one kind that directly follow `first`. They answer None."""

    def begin() -> Instead:
        last: Any = None

        def instead(op: Any) -> tuple[Any, ...]:
            nonlocal last
            if op is None or (last == first and isinstance(op, late)):
                return ()
            last = op
            return (op,)

        return instead

    return _rewritten(program, begin)


def changing(label: str, function: Callable[[Any, HostState], Any]) -> Callable[[Any], Any]:
    """For `altered`: a `Change` of that label is made by ``function(op, state)`` instead."""

    def alter(op: Any) -> Any:
        if not (isinstance(op, Change) and op.label == label):
            return op
        return Change(op.label, lambda state: function(op, state))

    return alter


def blind_to_captures(op: Any) -> Any:
    """For `altered`: neither the announcement nor the wait for the gate sees graph captures."""
    if isinstance(op, Change) and op.label == "announce":

        def announce(state: HostState) -> tuple[HostState, Any]:
            after, result = op.function(replace(state, captures=()))
            return replace(after, captures=state.captures), result

        return Change(op.label, announce)
    return asking("wait for open sections", lambda state: replace(state, captures=()))(op)


def ungated(op: Any) -> Any:
    """For `altered`: sections open without asking the gate, and without being noticed."""
    if not (isinstance(op, Await) and op.label.startswith("open a")):
        return op

    def enter(state: HostState) -> Any:
        answer = op.function(replace(state, gate=GateState()))
        return None if answer is None else (replace(answer[0], gate=state.gate), answer[1])

    return Await(op.label, enter, op.timeout_s)

"""Programs with one thing about them changed: operations altered, left out, or performed late."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from tolaria.gate import GateState
from tolaria.operations import Await, Change, HostState
from tolaria.testing.simulator import dispose
from tolaria.testing.world import Program


def altered(program: Program, alter: Callable[[Any], Any]) -> Program:
    """The same program with each of its operations replaced."""

    def run() -> Iterator[Any]:
        inner: Any = program()
        try:
            op = next(inner)
            while True:
                try:
                    result = yield alter(op)
                except Exception as error:
                    op = inner.throw(error)
                else:
                    op = inner.send(result)
        except StopIteration as end:
            return end.value
        finally:
            dispose(inner)

    return run


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

    def run() -> Iterator[Any]:
        inner: Any = program()
        held: Any = None
        try:
            op = next(inner)
            while True:
                if isinstance(op, late):
                    held, op = op, inner.send(None)
                    continue
                if held is not None and until(op):
                    yield held
                    held = None
                try:
                    result = yield op
                except Exception as error:
                    op = inner.throw(error)
                else:
                    op = inner.send(result)
        except StopIteration as end:
            if held is not None:
                yield held
            return end.value
        finally:
            dispose(inner)

    return run


def skipping(program: Program, wanted: Callable[[Any], bool], number: int | None = None) -> Program:
    """The same program without some of its operations: all that are `wanted`, or the n-th of them. They answer None."""

    def run() -> Iterator[Any]:
        inner: Any = program()
        count = 0
        try:
            op = next(inner)
            while True:
                if wanted(op):
                    count += 1
                    if number is None or count - 1 == number:
                        op = inner.send((None, 0.0) if isinstance(op, Await) else None)
                        continue
                try:
                    result = yield op
                except Exception as error:
                    op = inner.throw(error)
                else:
                    op = inner.send(result)
        except StopIteration as end:
            return end.value
        finally:
            dispose(inner)

    return run


def unfollowed(program: Program, first: Any, late: type[Any]) -> Program:
    """The same program without the operations of one kind that directly follow `first`. They answer None."""

    def run() -> Iterator[Any]:
        inner: Any = program()
        last: Any = None
        try:
            op = next(inner)
            while True:
                if last == first and isinstance(op, late):
                    op = inner.send(None)
                    continue
                last = op
                try:
                    result = yield op
                except Exception as error:
                    op = inner.throw(error)
                else:
                    op = inner.send(result)
        except StopIteration as end:
            return end.value
        finally:
            dispose(inner)

    return run


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

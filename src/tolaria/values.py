"""VALUES: immutable records, and how a changed copy of one is made."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

_T = TypeVar("_T")


def replace(value: _T, /, **changes: Any) -> _T:
    """`dataclasses.replace`, several times as fast: the state of the protocol is a value, and changes often.

    Args:
        value: A record whose class does nothing at construction but take down what it is given.
        **changes: Fields, with what they hold in the copy.

    Raises:
        TypeError: There is no such field, or the class is another kind.
    """
    names, known, read = _shape(type(value))
    if not known.issuperset(changes):
        raise TypeError(f"{type(value).__name__} has no field {', '.join(sorted(changes.keys() - known))}")
    made: _T = object.__new__(type(value))
    # past the lock of a frozen one, as its own constructor does it; `any` only drives the loop
    any(map(object.__setattr__, itertools.repeat(made), names, map(changes.get, names, read(value))))
    return made


@functools.cache
def _shape(kind: type[Any]) -> tuple[tuple[str, ...], frozenset[str], Callable[[Any], tuple[Any, ...]]]:
    """The names of the fields of a class, twice, and what reads all of them."""
    if not is_dataclass(kind) or hasattr(kind, "__post_init__") or not all(one.init for one in fields(kind)):
        raise TypeError(f"{kind.__name__} is no dataclass that its fields alone make up")
    names = tuple(one.name for one in fields(kind))
    first, second, *_ = names  # of a single name the reader below would answer no tuple
    return names, frozenset(names), operator.attrgetter(first, second, *names[2:])

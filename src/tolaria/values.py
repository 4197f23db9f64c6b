"""VALUES: immutable records, and how a changed copy of one is made."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from types import MemberDescriptorType
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
    made: _T = _copier(type(value))(value, changes)
    return made


@functools.cache
def _copier(kind: type[Any]) -> Callable[[Any, dict[str, Any]], Any]:
    """What makes changed copies of one class: as its own constructor is, written out field by field and compiled."""
    if not is_dataclass(kind) or hasattr(kind, "__post_init__") or not all(one.init for one in fields(kind)):
        raise TypeError(f"{kind.__name__} is no dataclass that its fields alone make up")
    names = [one.name for one in fields(kind)]
    # a slot is set past the lock of a frozen class; without slots the values are in a dict
    setters = {name: _setter(kind, name) for name in names}

    def refuse(changes: dict[str, Any]) -> TypeError:
        return TypeError(f"{kind.__name__} has no field {', '.join(sorted(changes.keys() - set(names)))}")

    lines = [
        "def copy(value, changes):",
        "    made = new(kind)",
        *(f"    set_{name}(made, value.{name})" for name in names),
        "    try:",
        "        for name, change in changes.items():",
        "            setters[name](made, change)",
        "    except KeyError:",
        "        raise refuse(changes) from None",
        "    return made",
    ]
    known: dict[str, Any] = {f"set_{name}": setter for name, setter in setters.items()}
    known.update(new=object.__new__, kind=kind, setters=setters, refuse=refuse)
    exec("\n".join(lines), known)  # names of fields are identifiers: dataclasses sees to that
    copy: Callable[[Any, dict[str, Any]], Any] = known["copy"]
    return copy


def _setter(kind: type[Any], name: str) -> Callable[[Any, Any], None]:
    slot = getattr(kind, name, None)
    if isinstance(slot, MemberDescriptorType):
        found: Callable[[Any, Any], None] = slot.__set__
        return found
    return functools.partial(_set_past_the_lock, name)


def _set_past_the_lock(name: str, made: Any, value: Any) -> None:
    object.__setattr__(made, name, value)

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import pytest

from tolaria.gate import GateState
from tolaria.operations import HostState
from tolaria.ring import Slot, SlotPhase
from tolaria.values import replace


@dataclass(frozen=True, slots=True)
class Slotted:
    one: int
    two: tuple[int, ...] = ()
    three: str = field(default="three", compare=False)


@dataclass
class Open:
    one: int
    two: int = 2


@pytest.mark.parametrize(
    ("value", "changes"),
    [
        (Slotted(1), {}),
        (Slotted(1), {"two": (4,), "three": "other"}),
        (Slotted(1, (2,)), {"one": None}),
        (Open(1), {"two": 5}),
        (Slot(3), {"phase": SlotPhase.SEALED, "readers": 2}),
        (GateState(), {"owner": 7}),
        (HostState(epoch=4), {"streams": (), "ring": (Slot(0),)}),
    ],
)
def test_a_copy_is_that_of_the_standard_library(value, changes):
    before = dataclasses.astuple(value)
    made, expected = replace(value, **changes), dataclasses.replace(value, **changes)
    assert type(made) is type(expected)
    assert all(getattr(made, one.name) == getattr(expected, one.name) for one in dataclasses.fields(value))
    assert made is not value
    assert dataclasses.astuple(value) == before


def test_what_is_not_changed_is_the_same_object():
    value = Slotted(1, (1, 2))
    assert replace(value, one=2).two is value.two


def test_a_copy_of_a_frozen_record_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        replace(Slotted(1), one=2).one = 3


def test_an_unknown_field_is_refused_by_name():
    with pytest.raises(TypeError, match="Slotted has no field four"):
        replace(Slotted(1), one=2, four=4)


@dataclass
class Derived:
    one: int
    two: int = 0

    def __post_init__(self):
        self.two = self.one + 1


@dataclass
class Partial:
    one: int
    two: int = field(default=0, init=False)


@pytest.mark.parametrize("value", [Derived(1), Partial(1), object()])
def test_classes_that_do_more_at_construction_are_refused(value):
    with pytest.raises(TypeError, match="is no dataclass that its fields alone make up"):
        replace(value)

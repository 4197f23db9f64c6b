"""The public list: every name in `tolaria.__all__` resolves, is documented, and nothing else pretends to be there."""

from __future__ import annotations

import inspect

import pytest

import tolaria


@pytest.mark.parametrize("name", tolaria.__all__)
def test_name_resolves(name: str) -> None:
    value = getattr(tolaria, name)
    assert getattr(tolaria, name) is value
    if inspect.isclass(value) or inspect.isroutine(value):
        assert value.__module__.startswith("tolaria.")
        assert inspect.getdoc(value)


@pytest.mark.parametrize("name", [name for name in tolaria.__all__ if inspect.isclass(getattr(tolaria, name))])
def test_public_methods_are_documented(name: str) -> None:
    cls = getattr(tolaria, name)
    methods = inspect.getmembers(cls, lambda member: inspect.isroutine(member) or isinstance(member, property))
    missing = [m for m, value in methods if not m.startswith("_") and not inspect.getdoc(value)]
    assert missing == []


def test_names_are_public_and_listed_once() -> None:
    assert len(tolaria.__all__) == len(set(tolaria.__all__))
    assert not [name for name in tolaria.__all__ if name.startswith("_") and name != "__version__"]


def test_star_import_brings_exactly_the_list() -> None:
    namespace: dict[str, object] = {}
    exec("from tolaria import *", namespace)
    del namespace["__builtins__"]
    assert sorted(namespace) == sorted(tolaria.__all__)


def test_dir_shows_the_list() -> None:
    assert set(tolaria.__all__) <= set(dir(tolaria))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        getattr(tolaria, "no_such_" + "name")

"""A missing framework and an untested version are refused with the line that mends it."""

from __future__ import annotations

import importlib.metadata

import pytest

from tolaria import UnsupportedState, UsageError
from tolaria.frameworks import require


def test_a_missing_framework_is_named_with_its_fix() -> None:
    with pytest.raises(UsageError, match=r"pip install 'tolaria\[lightning\]'"):
        require(("no-such-framework",), ("1.0",), "lightning")


def test_one_of_several_packages_is_enough() -> None:
    require(("no-such-framework", "pytest"), (importlib.metadata.version("pytest"),), "lightning")


def test_an_untested_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.60.1")
    with pytest.raises(UnsupportedState, match=r"pytest 2\.60\.1 .* pip install 'pytest==2\.6\.\*'"):
        require(("pytest",), ("2.5", "2.6"), "lightning")


@pytest.mark.parametrize("version", ["2.6", "2.6.6", "2.5.0"])
def test_tested_versions_pass(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    require(("pytest",), ("2.5", "2.6"), "lightning")

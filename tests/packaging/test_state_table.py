"""The table of docs/state.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def _named() -> tuple[set[str], set[str]]:
    """Files and functions that the page names."""
    text = (ROOT / "docs" / "state.md").read_text()
    names = re.findall(r"`(?:governor/|optim/)?(test_\w+)(\.py)?", text)
    return {name for name, file in names if file}, {name for name, file in names if not file}


def test_every_test_in_the_table_exists() -> None:
    files, functions = _named()
    assert len(files) > 5, "the table was not found"
    assert len(functions) > 20, "the table was not found"
    sources = {path.stem: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    assert files <= set(sources)
    defined = {name for text in sources.values() for name in re.findall(r"^def (test_\w+)", text, re.MULTILINE)}
    prefixes = {name for name in functions if name.endswith("_")}  # `test_an_unsupported_…`: all that begin so
    assert functions - prefixes <= defined
    assert all(any(name.startswith(prefix) for name in defined) for prefix in prefixes)

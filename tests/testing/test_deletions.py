"""Deleting a line that implements an edge is noticed without a GPU: those of the protocol by the model checker."""

import os
import subprocess
import sys

import pytest
from testing.deletions import DELETIONS, EXPLORE, ROOT, Deletion, copy_of_the_source

SEEN = [deletion for deletion in DELETIONS if deletion.program]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return copy_of_the_source(tmp_path_factory.mktemp("source"))


def explore(source, program):
    """In a new process, so that the source is the copy. None: nothing was found."""
    done = subprocess.run(
        [sys.executable, "-c", EXPLORE, program],
        env={**os.environ, "PYTHONPATH": str(source.parent), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True, text=True, timeout=150,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = done.stdout.strip().removeprefix("violation: ")
    return None if found == "None" else found


@pytest.mark.parametrize("deletion", SEEN, ids=lambda deletion: deletion.name)
def test_the_checker_notices(deletion: Deletion, source):
    path = source / deletion.file
    before = path.read_text(encoding="utf-8")
    deletion.apply(source)
    try:
        assert explore(source, deletion.program) is not None
    finally:
        path.write_text(before, encoding="utf-8")


def test_nothing_deleted_is_nothing_noticed(source):
    assert explore(source, "one writer [context]") is None


def test_every_deletion_fits_the_source(tmp_path):
    for number, deletion in enumerate(DELETIONS):
        folder = tmp_path / str(number)
        target = folder / deletion.file
        target.parent.mkdir(parents=True)
        original = ROOT / "src" / "tolaria" / deletion.file
        target.write_text(original.read_text(encoding="utf-8"), encoding="utf-8")
        deletion.apply(folder)
        assert target.read_text(encoding="utf-8") != original.read_text(encoding="utf-8")
        compile(target.read_text(encoding="utf-8"), deletion.file, "exec")
    assert len({deletion.name for deletion in DELETIONS}) == len(DELETIONS)

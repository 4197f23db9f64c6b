"""One small drill through the command line, shared by the tests of what it prints and writes."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tolaria.cli import main
from tolaria.drill.records import RunAgain, RunRecord, Trained
from tolaria.records import Incident

STEPS = 400
DRILL = ["drill", "--workload", "digits"]


@dataclass(frozen=True)
class Finished:
    exit_code: int
    stdout: str
    stderr: str
    out: Path

    @property
    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = json.loads(self.stdout)
        return report


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    out = tmp_path_factory.mktemp("drill") / "report"
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        code = main([*DRILL, "--steps", str(STEPS), "--device", "cpu", "--json", "--out", str(out)])
    return Finished(code, stdout.getvalue(), stderr.getvalue(), out)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As in a drill: a small model gains nothing from more, and two busy threads on two busy cores lose a lot."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Deaf:
    """An audience that does not care."""

    def begin(self, run: str, steps: int) -> None: ...

    def trained(self, run: str, step: Trained) -> None: ...

    def incident(self, run: str, incident: Incident) -> None: ...

    def again(self, run: str, event: RunAgain) -> None: ...

    def end(self, record: RunRecord) -> None: ...


@pytest.fixture(scope="session")
def deaf() -> Deaf:
    return Deaf()

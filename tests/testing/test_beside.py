"""`scripts/beside`, which runs the GPU tests: processes of their own, output in order, no failure lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "beside"


def beside(files: list[str], program: str, at_once: int = 3, **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *files, "--", sys.executable, "-I", "-S", "-c", program, "FILE"],
        env={**os.environ, "AT_ONCE": str(at_once), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout


def meeting(folder: Path) -> str:
    """Each makes a pipe and waits until the other has opened its own: only at the same time do both end."""
    for name in ("a", "b"):
        os.mkfifo(folder / name)
    return f"""
import os, sys
me, other = sys.argv[1], {{"a": "b", "b": "a"}}[sys.argv[1]]
ends = sorted([(me, "w"), (other, "r")])
for name, mode in ends:
    open(os.path.join({str(folder)!r}, name), mode).close()
print("met", other)
"""


def test_several_run_beside_each_other(tmp_path: Path) -> None:
    assert beside(["a", "b"], meeting(tmp_path)) == (0, "== a\nmet b\n== b\nmet a\n")


def test_one_after_the_other_they_would_not_meet(tmp_path: Path) -> None:
    """Red twin. Each is ended, which is a failure."""
    code, output = beside(["a", "b"], meeting(tmp_path), at_once=1, LIMIT_S="0.5")
    assert code == 1
    assert output == "== a\nended after 0.5 s\n== b\nended after 0.5 s\n2 of 2 failed: a b\n"


def test_output_comes_in_the_order_of_the_files_whoever_ends_first(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    # the first waits for the last
    program = f"""
import sys
mode = {{"first": "r", "last": "w"}}.get(sys.argv[1])
print("begins", flush=True)
if mode:
    open({str(tmp_path / "pipe")!r}, mode).close()
print(sys.argv[1], "ends", file=sys.stderr)
"""
    code, output = beside(["first", "middle", "last"], program)
    assert code == 0
    assert output == "".join(f"== {name}\nbegins\n{name} ends\n" for name in ("first", "middle", "last"))


@pytest.mark.parametrize("at_once", [1, 3])
def test_one_that_fails_is_a_failure_of_all_and_stops_no_other(at_once: int) -> None:
    program = "import sys; print('was here'); sys.exit(sys.argv[1] == 'bad')"
    code, output = beside(["good", "bad", "better"], program, at_once)
    assert code == 1
    assert output == "== good\nwas here\n== bad\nwas here\n== better\nwas here\n1 of 3 failed: bad\n"


def test_one_that_dies_takes_no_other_along() -> None:
    program = "import os, signal, sys; sys.argv[1] == 'bad' and os.kill(os.getpid(), signal.SIGKILL); print('good')"
    assert beside(["bad", "good"], program) == (1, "== bad\n== good\ngood\n1 of 2 failed: bad\n")


def test_nothing_to_run_is_no_success() -> None:
    assert beside([], "pass")[0] == 1
    assert subprocess.run([sys.executable, str(SCRIPT), "a"], capture_output=True).returncode == 2

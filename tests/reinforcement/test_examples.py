"""The examples for reinforcement learning run as they are documented, and lose nothing to their faults."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.slow


def run(name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_stable_baselines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("sb3_ppo.py", monkeypatch=monkeypatch)
    mean, tail = re.fullmatch(r"mean return (\d+), (.*)\n", capsys.readouterr().out).groups()
    assert tail == "2 rollbacks, 0 rollouts dropped"
    assert int(mean) > 25  # a ruined policy falls over after nine steps


def test_a_single_file(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("ppo_single_file.py", "--updates", "10", monkeypatch=monkeypatch)
    mean, tail = re.fullmatch(r"mean return (\d+) afterwards, (.*)\n", capsys.readouterr().out).groups()
    assert tail == "2 rollbacks, 0 updates dropped"
    assert int(mean) > 30


def test_the_same_file_unguarded(monkeypatch: pytest.MonkeyPatch) -> None:
    # by the distribution; by torch where another package has told distributions not to look
    with pytest.raises((ValueError, RuntimeError), match=r"logits|probability"):
        run("ppo_single_file.py", "--updates", "10", "--unguarded", monkeypatch=monkeypatch)

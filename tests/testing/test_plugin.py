"""The pytest plugin, in processes of its own: the page's tests, and a run that asks for nothing.

The plugin is loaded by name, so that it does not matter whether tolaria is installed or stands on the path.
"""

import os
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")

OURS = """
import threading

import pytest
import torch


def test_forced(tolaria_thread_gate, monkeypatch):
    tolaria_thread_gate._force()


def test_never_struck(tolaria_faults):
    parameter = torch.nn.Linear(1, 1)
    tolaria_faults("nan_loss@3", parameter, torch.optim.SGD(parameter.parameters()))


def test_seeds(tolaria_turbulence, request):
    seeds = tolaria_turbulence(torch.nn.Linear(2, 2)).seed, tolaria_turbulence(torch.nn.Linear(2, 2), seed=5).seed
    assert seeds == (request.config.getoption("--tolaria-seed"), 5)
    assert [t.name for t in threading.enumerate()].count("turbulence-0") == 2


def test_ended():
    assert not [t.name for t in threading.enumerate() if t.name.startswith("turbulence")]
"""

QUIET = """
import sys, threading

def test_nothing_was_done(request):
    assert "torch" not in sys.modules and "numpy" not in sys.modules
    assert threading.active_count() == 1
    assert not [name for name in request.fixturenames if name.startswith("tolaria")]

def test_a_name_of_its_own(turbulence, seed):
    assert (turbulence, seed) == (1, 2)

import pytest

@pytest.fixture
def turbulence():
    return 1

@pytest.fixture
def seed():
    return 2
"""


def run(folder, *arguments):
    """Results by test, and the output."""
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", *arguments]
    found = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=150).stdout
    results = {(name, result) for result, name in re.findall(r"^(PASSED|FAILED|ERROR) \S+::(\S+)", found, re.MULTILINE)}
    return results, found


def blocks(kind):
    return "\n".join(re.findall(rf"```python {kind}\n(.*?)```", PAGE, re.DOTALL))


@pytest.mark.slow
def test_the_page_and_the_fixtures(tmp_path):
    (tmp_path / "test_page.py").write_text(blocks("fixtures"))
    (tmp_path / "test_gpu.py").write_text(blocks("gpu"))
    (tmp_path / "test_ours.py").write_text(OURS)
    results, found = run(tmp_path, "-p", "tolaria.testing.plugin", "--tolaria-seed=11", "-W", "error")
    expected = {
        ("test_a_step_that_is_half_done[hasty]", "FAILED"),
        ("test_a_step_that_is_half_done[mended]", "PASSED"),
        ("test_under_way[hasty]", "FAILED"),
        ("test_under_way[mended]", "PASSED"),
        ("test_the_run_survives", "PASSED"),
        ("test_contracts", "PASSED"),
        ("test_forced", "PASSED"),
        ("test_forced", "ERROR"),
        ("test_never_struck", "PASSED"),
        ("test_never_struck", "ERROR"),
        ("test_seeds", "PASSED"),
        ("test_ended", "PASSED"),
    }
    assert {one for one in results if one[0] not in GPU} == expected, found
    assert "the watchdog had to open the gate" in found
    assert "nan_loss@3 never struck" in found
    assert "seeded with 11: --tolaria-seed=11" in found
    assert "Torn(tensors=" in found


GPU = {
    "test_a_step_that_is_half_done[Hasty]",
    "test_a_step_that_is_half_done[Mended]",
    "test_the_next_step_comes_at_once[SyncBefore]",
    "test_the_next_step_comes_at_once[Mended]",
}
"""Skipped without a device; tests/gpu/test_testkit.py is about what they find on one."""


def test_a_run_that_asks_for_nothing_is_left_alone(tmp_path):
    (tmp_path / "test_quiet.py").write_text(QUIET)
    expected = {("test_nothing_was_done", "PASSED"), ("test_a_name_of_its_own", "PASSED")}
    with_plugin, found = run(tmp_path, "-p", "tolaria.testing.plugin", "-W", "error", "--strict-markers")
    assert with_plugin == expected, found


def test_the_entry_point_is_that_module():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["pytest11"] == {"tolaria": "tolaria.testing.plugin"}
    plugin = import_module("tolaria.testing.plugin")
    named = set(re.findall(r"^\| `(tolaria_\w+)` \|", plugin.__doc__, re.MULTILINE))
    assert named == {name for name in vars(plugin) if name.startswith("tolaria_")}
    assert all(name in PAGE for name in named)

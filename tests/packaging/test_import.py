"""What importing tolaria, and asking it for help, costs: no torch, no thread, no side effect."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from importlib.metadata import entry_points
from typing import Any

import pytest

HEAVY = ("torch", "numpy", "sklearn")
PROBE = """
import json, logging, sys, threading, warnings

def state():
    return {
        "threads": [t.name for t in threading.enumerate()],
        "handlers": [repr(h) for h in logging.getLogger().handlers],
        "filters": len(warnings.filters),
        "hooks": [repr(h) for h in (sys.excepthook, threading.excepthook, sys.gettrace(), sys.getprofile())],
    }

before = state()
exit_code = None
try:
    exec(sys.argv.pop(1))
except SystemExit as stop:
    exit_code = stop.code or 0
changed = sorted(k for k, v in state().items() if v != before[k])
print("\\n" + json.dumps({"modules": sorted(sys.modules), "changed": changed, "exit_code": exit_code}))
"""


def run_in_new_process(code: str, *args: str) -> dict[str, Any]:
    """Run `code` with `sys.argv[1:] == args`.

    Returns: the `modules` that are loaded afterwards, what `changed` in the process, the `exit_code` if there was one,
    and the `output`.
    """
    done = subprocess.run(
        [sys.executable, "-c", PROBE, textwrap.dedent(code), *args], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    *output, last = done.stdout.splitlines()
    return {**json.loads(last), "output": "\n".join(output)}


def heavy(seen: dict[str, Any]) -> list[str]:
    return [name for name in HEAVY if name in seen["modules"]]


def test_import_has_no_effect() -> None:
    seen = run_in_new_process("import tolaria")
    assert "tolaria" in seen["modules"]
    assert heavy(seen) == []
    assert {"rich", "tyro"}.isdisjoint(seen["modules"])
    assert seen["changed"] == []
    assert seen["output"].strip() == ""


@pytest.mark.slow
def test_public_names_have_no_effect() -> None:
    seen = run_in_new_process("import tolaria\nfor name in tolaria.__all__: getattr(tolaria, name)")
    assert {"rich", "tyro", "sklearn"}.isdisjoint(seen["modules"])
    assert "threads" not in seen["changed"]
    assert "handlers" not in seen["changed"]


@pytest.mark.parametrize(
    ("effect", "name"),
    [
        ("threading.Thread(target=threading.Event().wait, daemon=True).start()", "threads"),
        ("logging.basicConfig()", "handlers"),
        ("warnings.simplefilter('error')", "filters"),
        ("sys.excepthook = print", "hooks"),
    ],
)
def test_the_probe_sees_effects(effect: str, name: str) -> None:
    assert run_in_new_process(effect)["changed"] == [name]


@pytest.mark.slow
def test_the_probe_sees_torch() -> None:
    assert "torch" in heavy(run_in_new_process("import torch"))


@pytest.mark.parametrize("arguments", [["--help"], ["drill", "--help"]], ids=" ".join)
def test_help_leaves_torch_alone(arguments: list[str]) -> None:
    seen = run_in_new_process("sys.argv[0] = 'tolaria'\nfrom tolaria.cli import main\nsys.exit(main())", *arguments)
    assert seen["exit_code"] == 0
    assert "drill" in seen["output"]
    assert heavy(seen) == []


def test_module_runs_the_same_command_line() -> None:
    done = subprocess.run([sys.executable, "-m", "tolaria", "--help"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "drill" in done.stdout


def test_the_script_is_installed() -> None:
    (script,) = entry_points(group="console_scripts", name="tolaria")
    assert script.value == "tolaria.cli:main"
    assert callable(script.load())

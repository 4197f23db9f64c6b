"""What stands around the trials on a device: the process, the watchdog, and the judgement. The trials need a GPU."""

import sys

import pytest

from tolaria.errors import UnsupportedState
from tolaria.testing import gates, trials
from tolaria.testing.gates import Trial, run_in_subprocess

OK = """print('{"test": "a", "control": "torn 4 of 4", "result": "ok"}', flush=True)"""


def run(program, limit_s=60.0):
    return run_in_subprocess(limit_s, (sys.executable, "-c", program))


def test_trials_are_read_from_the_process():
    assert run(f"print('chatter')\n{OK}") == [Trial("a", "torn 4 of 4", "ok")] * len(gates.BARRIERS)


def test_a_process_that_hangs_is_ended_and_what_it_had_found_is_kept(monkeypatch):
    monkeypatch.setattr(gates, "BARRIERS", ("blocking",))
    found = run(f"{OK}\nimport threading; threading.Event().wait()", limit_s=5.0)
    assert [trial.result for trial in found] == ["ok", "hung for 5 s and was ended"]


def test_a_process_that_fails_is_a_finding():
    first, *_ = run("raise SystemExit('no such device')")
    assert first.result == "ended with 1: no such device"


def test_a_process_without_a_trial_is_a_finding():
    assert {trial.result for trial in run("pass")} == {"made no trial"}


def test_the_settings_are_there_before_cuda_starts():
    program = f"import os; assert os.environ['CUDA_DEVICE_MAX_CONNECTIONS'] == '32'; {OK}"
    assert {trial.result for trial in run(program)} == {"ok"}


def test_without_the_bindings_no_gate_is_made(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(UnsupportedState, match="cuda-bindings"):
        gates.driver()


@pytest.mark.parametrize(
    ("seen", "whole", "control", "result"),
    [
        ([[1.0, 2.0]] * 2, [True, True], "torn 2 of 2", "ok"),
        ([[1.0, 2.0]] * 2, [True, False], "torn 2 of 2", "torn 1 of 2"),
        ([[1.0, 2.0], [1.0, 1.0]], [True], "torn 1 of 2", "without protection nothing was torn in 1 rounds"),
    ],
)
def test_a_trial_that_cannot_fail_is_no_success(seen, whole, control, result):
    found = trials._judged(seen, [1.0, 2.0], whole)
    assert found[0] == control
    assert found[1].startswith(result)

"""The trials that `tolaria verify` makes on a device, in a process of their own; each with a control that is torn."""

import sys

import pytest

from tolaria.testing import gates, trials

# Copies that take tens of milliseconds: what a trial does not order, but leaves to time, comes out the other way round.
SLOW = """
import sys
from unittest import mock
import torch
from tolaria.route import DeviceRoute
from tolaria.testing import picture, trials

def slow(original):
    def copy(route, *answer):
        route._port.enqueue(lambda: torch.cuda._sleep(40_000_000))
        original(route, *answer)
    return copy

for name in ("capture", "restore"):
    setattr(DeviceRoute, name, slow(getattr(DeviceRoute, name)))
if sys.argv[1] == "hasty":
    trials.settle = lambda *_: None
trials.main("context", sys.argv[2:])
"""
FORCED = ("rollback over held steps, 1 stream", "snapshot of held steps", "graph replay", "step between the barriers")


@pytest.mark.cuda
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_trial_is_as_it_ought_to_be():
    found = gates.run_in_subprocess()
    wanted = {f"{name} [{b}]" for name, (_, barriers, _) in trials.TRIALS.items() for b in barriers}
    assert {trial.test for trial in found} <= wanted
    assert [trial for trial in found if trial.result != "ok"] == []
    assert any("context" in trial.test for trial in found)


@pytest.mark.cuda
@pytest.mark.slow
@pytest.mark.parametrize("how", ["patient", "hasty"])
def test_no_trial_is_left_to_how_long_the_copies_take(how):
    """The red twin opens its gates without waiting for the copies: a slow one then hides every race."""
    found, ended = gates.lines_of((sys.executable, "-c", SLOW, how, *FORCED), 120.0)
    assert ended == ""
    assert len(found) == len(FORCED)
    shown = [trial["test"] for trial in found if trial["result"] == "ok"]
    assert len(shown) == (len(FORCED) if how == "patient" else 0), found

"""The trials that `tolaria verify` makes on a device, in a process of their own; each with a control that is torn."""

import pytest

from tolaria.testing import gates, trials


@pytest.mark.cuda
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_trial_is_as_it_ought_to_be():
    found = gates.run_in_subprocess()
    wanted = {f"{name} [{b}]" for name, (_, barriers, _) in trials.TRIALS.items() for b in barriers}
    assert {trial.test for trial in found} <= wanted
    assert [trial for trial in found if trial.result != "ok"] == []
    assert any("context" in trial.test for trial in found)

"""`benchmarks/host_time.py`: what it prints of times, and that its idle device is governed like a real one."""

from __future__ import annotations

import sys

import host_time
import pytest
import torch
from idle_driver import on_an_idle_device
from torch import nn

from tolaria import GovernorConfig, TolariaGovernor, judge


@pytest.fixture(autouse=True)
def _alone(alone: None) -> None:
    """Every test here."""


def test_times_are_split_into_a_fixed_part_and_one_per_tensor() -> None:
    assert host_time.split([(400, 260.0), (4, 62.0), (4000, 2060.0)]) == pytest.approx((60.0, 0.5))
    assert host_time.split([(7, 9.0)]) == (9.0, 0.0)


@pytest.mark.parametrize("device", ["cpu", "idle"])
def test_it_prints_one_row_per_model_and_the_two_parts(
    device: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--device", device, "--tensors", "2", "30", "--layers", "1", "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", ["host_time.py", *arguments])
    host_time.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[3:]]
    assert [row[:2] for row in rows[:3]] == [["plain", "2"], ["plain", "30"], ["transformer", "48"]]
    assert all(float(number) > 0 for row in rows[:3] for number in row[2:])
    for what, row, column in (("snapshot", rows[3], 2), ("rollback", rows[4], 3)):
        assert row[:3] == [what, "of", "plain:"]
        short, long = (float(one[column]) for one in rows[:2])
        assert float(row[6]) == pytest.approx((long - short) / 28, abs=0.05)


def test_the_idle_device_has_the_barrier_of_cuda_and_is_gone_afterwards() -> None:
    model = nn.Linear(2, 2)
    with on_an_idle_device(), TolariaGovernor(model, detector=judge.non_finite()) as governor:
        assert governor.capabilities().barrier == "context"
        assert governor.snapshot().wait("sealed").state == "sealed"
        assert governor.execute_rollback().wait().verified
    with TolariaGovernor(model, config=GovernorConfig(), detector=judge.non_finite()) as governor:
        assert governor.capabilities().barrier == "host"
        governor.snapshot()
        with torch.no_grad(), governor.using():
            model.weight.add_(1)
        before = model.weight.clone()
        governor.execute_rollback()
        assert not torch.equal(model.weight, before)

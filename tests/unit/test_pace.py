"""How many steps apart snapshots are when their cost is measured. Times are given, never taken."""

import pytest

from tolaria.pace import LONGEST, SHARE, Pace


def paced(step_s, snapshot_s, *, shortest=2, steps=10, device_s=0.0):
    pace, now = Pace(shortest), 100.0
    for _ in range(steps):
        pace.stepped(now)
        now += step_s
    pace.took(snapshot_s)
    if device_s:
        pace.copied(device_s)
    return pace


@pytest.mark.parametrize(
    ("step_s", "snapshot_s", "expected"),
    [
        (1.0, 0.0, 2),  # free: as often as the slots allow
        (1.0, 0.02, 2),  # 2 steps x 1 % pay for it exactly
        (1.0, 0.0625, 7),  # rounded up: 6.25
        (0.125, 0.0625, LONGEST),  # exactly 50
        (0.125, 1.0, LONGEST),  # 800 would be right, and too far
    ],
)
def test_the_cadence_keeps_to_the_share(step_s, snapshot_s, expected):
    assert SHARE == 0.01
    assert paced(step_s, snapshot_s).cadence == expected


def test_device_time_counts_as_well():
    assert paced(1.0, 0.03125, device_s=0.03125).cadence == paced(1.0, 0.0625).cadence == 7


def test_device_times_that_come_later_are_no_snapshots_of_their_own():
    """Half of them would be those of the host alone, and the median half of what a snapshot costs."""
    pace = paced(1.0, 0.03125, device_s=0.03125)
    for _ in range(3):
        pace.took(0.03125)
        pace.took(0.03125)
        pace.copied(0.03125)
        pace.copied(0.03125)
    assert pace.cadence == 7


def test_never_shorter_than_the_slots_allow():
    assert paced(1.0, 0.0625, shortest=9).cadence == 9


def test_a_ring_that_asks_for_more_than_the_longest_gets_it():
    assert paced(0.125, 1.0, shortest=80).cadence == 80


@pytest.mark.parametrize(("steps", "known"), [(5, False), (6, True)])  # six ends bound five steps
def test_nothing_is_concluded_from_few_steps(steps, known):
    assert paced(1.0, 0.125, steps=steps).cadence == (13 if known else 2)


def test_nothing_is_concluded_without_a_snapshot():
    pace = Pace(3)
    for now in range(20):
        pace.stepped(float(now))
    assert pace.cadence == 3


def test_the_time_of_a_snapshot_is_no_time_of_a_step():
    pace, now = Pace(2), 0.0
    for _ in range(12):  # each step takes 1 s, and a snapshot of 1 s of the host comes with each
        pace.stepped(now)
        pace.took(1.0)
        now += 2.0
    assert pace.cadence == LONGEST  # 100 by steps of 1 s; steps of 2 s would give 50 as well, so look closer:
    assert set(pace._steps) == {1.0}


def test_device_time_does_not_shorten_the_step_it_overlaps():
    pace = Pace(2)
    pace.stepped(0.0)
    pace.took(0.25)
    pace.copied(5.0)
    pace.stepped(1.0)
    assert list(pace._steps) == [0.75]


def test_a_step_that_was_interrupted_says_nothing():
    pace = Pace(2)
    pace.stepped(0.0)
    pace.stepped(1.0)
    pace.interrupted()
    pace.stepped(1000.0)
    pace.stepped(1001.0)
    assert list(pace._steps) == [1.0, 1.0]


def test_one_slow_step_and_one_slow_snapshot_change_nothing():
    pace = paced(1.0, 0.0625)
    pace.stepped(10_000.0)
    for seconds in (0.0625, 30.0):
        pace.took(seconds)
    assert pace.cadence == 7


def test_old_measurements_are_forgotten():
    pace = paced(1.0, 5.0)
    assert pace.cadence == LONGEST
    for _ in range(8):
        pace.took(0.0625)
    assert pace.cadence == 7


def test_a_clock_that_stands_still():
    assert paced(0.0, 0.5).cadence == LONGEST
    pace = paced(1.0, 0.0625)
    pace.stepped(0.0)  # or goes back
    assert min(pace._steps) == 0.0

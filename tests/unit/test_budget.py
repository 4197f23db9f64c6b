"""Which tier, and how many slots: the arithmetic, at its edges, and what it says when nothing fits."""

import dataclasses

import pytest

from tolaria import BudgetExceeded
from tolaria.budget import Plan, Request, Room, plan
from tolaria.ring import Tier

MIB = 2**20
GPU = Request({"cuda:0": 10 * MIB}, host_bytes=10 * MIB, slots=3, host_slots=3)
HOST = Request({}, host_bytes=10 * MIB, slots=3, host_slots=0)


def asked(**changes):
    return dataclasses.replace(GPU, **changes)


@pytest.mark.parametrize(("used", "tier"), [(55, Tier.DEVICE), (55 + 1 / MIB, Tier.HOST), (0, Tier.DEVICE)])
def test_the_device_tier_leaves_fifteen_per_cent_above_the_peak(used, tier):
    """100 MiB less 15 less 55 used: 30 are left, which is what three slots need. Not one byte more."""
    found = plan(GPU, {"cuda:0": Room(100 * MIB, int(used * MIB))}, 10**12)
    assert found.tier is tier


def test_why_it_is_not_the_device():
    found = plan(GPU, {"cuda:0": Room(100 * MIB, 80 * MIB)}, 10**12)
    assert found == Plan(
        Tier.HOST,
        0,
        "3 slots x 10.0 MiB = 30.0 MiB on cuda:0, where 5.0 MiB are left: 100.0 MiB less 15% to stay free, "
        "less 80.0 MiB at the peak so far",
    )


def test_nothing_left_is_not_less_than_nothing():
    found = plan(GPU, {"cuda:0": Room(100 * MIB, 99 * MIB)}, 10**12)
    assert "where 0.0 MiB are left" in found.reason


@pytest.mark.parametrize(("budget", "tier"), [(30 * MIB, Tier.DEVICE), (30 * MIB - 1, Tier.HOST)])
def test_a_device_budget_takes_the_place_of_the_rule(budget, tier):
    full = {"cuda:0": Room(100 * MIB, 100 * MIB)}
    found = plan(asked(device_budget=budget), full, 10**12)
    assert found.tier is tier
    if tier is Tier.HOST:
        assert found.reason == "3 slots x 10.0 MiB = 30.0 MiB on cuda:0, where device_budget allows 30.0 MiB"


def test_a_device_whose_memory_is_not_known_is_tried():
    assert plan(GPU, {}, None) == Plan(Tier.DEVICE, 3)


def test_each_device_has_to_hold_its_part():
    two = asked(device_bytes={"cuda:0": MIB, "cuda:1": 10 * MIB})
    rooms = {"cuda:0": Room(100 * MIB, 0), "cuda:1": Room(20 * MIB, 0)}
    found = plan(two, rooms, 10**12)
    assert found.tier is Tier.HOST
    assert "cuda:1" in found.reason
    assert "cuda:0" not in found.reason


@pytest.mark.parametrize(
    ("available", "budget", "host_slots"),
    [
        (None, None, 3),
        (120 * MIB, None, 3),  # a quarter of it: 30
        (120 * MIB - 4, None, 2),
        (80 * MIB, None, 2),
        (39 * MIB, None, 0),
        (0, None, 0),
        (10**12, 20 * MIB, 2),  # what the user allows, not what is there
        (0, 30 * MIB, 3),
        (10**12, 10 * MIB - 1, 0),
        (10**12, 10**12, 3),  # never more than asked for
    ],
)
def test_drained_snapshots_take_a_quarter_of_main_memory_or_the_budget(available, budget, host_slots):
    assert plan(asked(host_budget=budget), {}, available) == Plan(Tier.DEVICE, host_slots)


def test_the_host_tier_asked_for():
    found = plan(asked(tier="host"), {"cuda:0": Room(10**12, 0)}, 30 * MIB)
    assert found == Plan(Tier.HOST, 0, 'tier="host" was asked for')


@pytest.mark.parametrize(("available", "budget"), [(30 * MIB - 1, None), (10**12, 30 * MIB - 1)])
def test_the_host_tier_that_does_not_fit(available, budget):
    with pytest.raises(BudgetExceeded) as caught:
        plan(asked(tier="host", host_budget=budget), {"cuda:0": Room(10**12, 0)}, available)
    allowed = "are available" if budget is None else "host_budget allows"
    assert f"3 slots x 10.0 MiB = 30.0 MiB in main memory, where 30.0 MiB {allowed}" in str(caught.value)
    assert "intact" in str(caught.value)


def test_the_device_tier_asked_for_is_not_replaced_by_another():
    with pytest.raises(BudgetExceeded, match=r"on cuda:0, where 0\.0 MiB are left") as caught:
        plan(asked(tier="device"), {"cuda:0": Room(MIB, MIB)}, 10**12)
    assert "main memory" not in str(caught.value)


@pytest.mark.parametrize(("budget", "tier"), [(35 * MIB, Tier.DEVICE), (35 * MIB - 1, Tier.HOST)])
def test_slots_have_what_notes_leave_of_a_device_budget(budget, tier):
    found = plan(asked(device_budget=budget, beside={"cuda:0": 5 * MIB}), {}, 10**12)
    assert found.tier is tier
    if tier is Tier.HOST:
        assert (
            found.reason
            == "3 slots x 10.0 MiB + 5.0 MiB of notes = 35.0 MiB on cuda:0, where device_budget allows 35.0 MiB"
        )


@pytest.mark.parametrize(("used", "tier"), [(50, Tier.DEVICE), (50 + 1 / MIB, Tier.HOST)])
def test_and_of_a_device(used, tier):
    found = plan(asked(beside={"cuda:0": 5 * MIB}), {"cuda:0": Room(100 * MIB, int(used * MIB))}, 10**12)
    assert found.tier is tier


@pytest.mark.parametrize(
    ("available", "budget", "host_slots"),
    [(125 * MIB, None, 3), (125 * MIB - 4, None, 2), (3 * MIB, None, 0), (0, 25 * MIB, 2), (0, 25 * MIB - 1, 1)],
)
def test_and_drained_snapshots_what_they_leave_of_main_memory(available, budget, host_slots):
    """A quarter of the rest, or the rest of what the user allows."""
    found = plan(asked(host_budget=budget, beside={"host": 5 * MIB}), {}, available)
    assert found == Plan(Tier.DEVICE, host_slots)


@pytest.mark.parametrize(("available", "budget"), [(35 * MIB, None), (0, 35 * MIB)])
def test_and_a_train_state_in_main_memory_as_well(available, budget):
    wanted = dataclasses.replace(HOST, host_budget=budget, beside={"host": 5 * MIB})
    assert plan(wanted, {}, available).tier is Tier.HOST
    with pytest.raises(BudgetExceeded, match=r"10\.0 MiB \+ 5\.0 MiB of notes = 35\.0 MiB in main memory"):
        plan(dataclasses.replace(wanted, beside={"host": 5 * MIB + 1}), {}, available)


def test_what_fits_nowhere_says_why_of_both():
    with pytest.raises(BudgetExceeded) as caught:
        plan(GPU, {"cuda:0": Room(MIB, MIB)}, MIB)
    assert "on cuda:0" in str(caught.value)
    assert "in main memory, where 1.0 MiB are available" in str(caught.value)


@pytest.mark.parametrize(("available", "budget"), [(None, None), (30 * MIB, None), (0, 30 * MIB)])
def test_a_train_state_in_main_memory_has_one_tier(available, budget):
    found = plan(dataclasses.replace(HOST, host_budget=budget), {}, available)
    assert found == Plan(Tier.HOST, 0, "")


@pytest.mark.parametrize(("available", "budget"), [(30 * MIB - 1, None), (10**12, 30 * MIB - 1)])
def test_a_train_state_in_main_memory_that_does_not_fit(available, budget):
    with pytest.raises(BudgetExceeded, match=r"30\.0 MiB in main memory"):
        plan(dataclasses.replace(HOST, host_budget=budget), {}, available)


def test_nothing_to_hold_fits_everywhere():
    assert plan(asked(device_bytes={"cuda:0": 0}, host_bytes=0), {"cuda:0": Room(MIB, 0)}, 0).tier is Tier.DEVICE

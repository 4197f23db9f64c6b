"""Two tiers on a device that is as late as it may be: draining beside training, what may go wrong with it, scrubbing.

The background thread is waited for with `Backlog.finish`, never slept for. What it does in between is brought about at
points where it has to come by: inside `ContextDevice.transfer`, or before it waits for the end of a transfer.
"""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch
from torch import nn

from tolaria import BudgetExceeded, SnapshotRejected, memory, protocol, snapshot
from tolaria.cuda import ContextDevice
from tolaria.errors import RollbackDisturbed
from tolaria.operations import SectionKind
from tolaria.ring import READABLE, SlotPhase, Tier, newest_good
from tolaria.shield import Shield

SETTINGS = {"cadence": 1, "probation": 1, "slots": 3, "host_slots": 2, "reach": 4}


def weights(number):
    model = nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        model.weight.fill_(number)
    return model


def write_to(governor, tensor, number):
    with governor.using(), torch.no_grad():
        tensor.fill_(number)


def write(governor, model, number):
    write_to(governor, model.weight, number)


def all_are(tensor, number):
    return bool((tensor.detach() == number).all())


def view(governor, index):
    """What a slot holds of the first tensor: shape [bytes]."""
    memory = governor._keeper.vault.slots[index]
    return memory.arena.views[memory.survey.leaves.leaves[0].storage]


def flip(governor, index, byte=5):
    view(governor, index)[byte] ^= 1


def swap(governor, index, one=0, other=5):
    """Two elements change places."""
    numbers = view(governor, index).view(torch.float32)
    assert numbers[one] != numbers[other]
    numbers[one], numbers[other] = numbers[other].clone(), numbers[one].clone()


def held(governor, serial):
    """Tier -> index of the slots that hold a snapshot, and may be read."""
    return {
        slot.tier: slot.index for slot in governor._keeper.ring if slot.snapshot == serial and slot.phase in READABLE
    }


def certified(governor, model, number):
    """Take a snapshot of these weights, certified at once. Answers its serial number."""
    if model is not None:
        write(governor, model, number)
    governor._course.take_first()
    return governor._keeper.driver.state.next_snapshot - 1


def drain(governor):
    """Let the background thread do one piece of work, and wait for it."""
    governor._keeper.backlog.tend(0, 1)
    governor._keeper.backlog.finish()


def drained(govern, **settings):
    """A governor whose only snapshot, of distinct numbers, is in both tiers: (governor, model, serial)."""
    model = nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.arange(9.0).view(3, 3))
    governor = govern(model, **{**SETTINGS, **settings})
    serial = certified(governor, None, 0)
    drain(governor)
    assert set(held(governor, serial)) == {Tier.DEVICE, Tier.HOST}
    return governor, model, serial


def expected():
    return torch.arange(9.0).view(3, 3)


# ------------------------------------------------------------ draining


def test_a_run_drains_and_goes_back_further_than_the_device_tier(late, govern, make_run):
    """The oldest snapshot held is in main memory only, and comes back bit for bit."""
    late.lag = 1
    run = make_run()
    governor = govern(run.model, run.optimizer, scheduler=run.scheduler, **{**SETTINGS, "host_slots": 3, "reach": 64})
    states = {}
    for batch in run.batches[:24]:
        run.step(governor, batch)
        states[governor.state_dict()["completed"]] = run.state()
        governor._keeper.backlog.finish()
    on_device = {slot.snapshot for slot in governor._keeper.ring if slot.tier is Tier.DEVICE}
    only = [s for s in governor._keeper.ring if s.tier is Tier.HOST and s.is_good and s.snapshot not in on_device]
    assert only != []
    oldest = min((slot for slot in only if slot.step > 0), key=lambda slot: slot.snapshot)
    report = governor.execute_rollback(to=oldest.step, verify="before").wait()
    assert (report.tier, report.snapshot_step, report.verified) == ("host", oldest.step, True)
    assert run.state() == states[oldest.step]


def test_a_certified_snapshot_is_restored_from_main_memory_after_its_device_slot_was_overwritten(late, govern):
    model = weights(1)
    governor = govern(model, **SETTINGS)
    first = certified(governor, model, 1)
    drain(governor)
    for number in (2, 3, 4):
        certified(governor, model, number)
    assert set(held(governor, first)) == {Tier.HOST}
    write(governor, model, 9)
    step = governor._keeper.ring[held(governor, first)[Tier.HOST]].step
    assert step == 0
    serial = governor._keeper.ring[held(governor, first)[Tier.HOST]].snapshot
    for slot in [slot for slot in governor._keeper.ring if slot.snapshot > serial]:
        forget(governor, slot)
    report = governor.execute_rollback().wait()
    assert (report.tier, report.verified) == ("host", True)
    assert all_are(model.weight, 1)


def forget(governor, slot):
    def change(state):
        slots = tuple(dataclasses.replace(s, phase=SlotPhase.FREE) if s.index == slot.index else s for s in state.ring)
        return dataclasses.replace(state, ring=slots), None

    governor._keeper.driver.change(change)


class Halted:
    """The background thread stops right after it has launched a transfer, until it is let go."""

    def __init__(self, monkeypatch):
        self.arrived, self.may_go = threading.Event(), threading.Event()
        transfer = ContextDevice.transfer

        def halt(port, work):
            event = transfer(port, work)
            self.arrived.set()
            assert self.may_go.wait(60)
            return event

        monkeypatch.setattr(ContextDevice, "transfer", halt)

    def begin(self, governor):
        governor._keeper.backlog.tend(0, 1)
        assert self.arrived.wait(60)

    def end(self, governor):
        self.may_go.set()
        governor._keeper.backlog.finish()


def test_the_source_of_a_transfer_is_pinned_until_it_has_ended(late, govern, monkeypatch):
    halted, model = Halted(monkeypatch), weights(1)
    governor = govern(model, **SETTINGS)
    serial = certified(governor, model, 1)
    source = held(governor, serial)[Tier.DEVICE]
    halted.begin(governor)
    assert governor._keeper.ring[source].readers == 1
    later = [certified(governor, model, number) for number in (2, 3, 4, 5, 6)]
    assert held(governor, serial) == {Tier.DEVICE: source}  # not overwritten, and the copy is not there yet
    assert len([one for one in later if held(governor, one)]) == 2
    halted.end(governor)
    assert governor._keeper.ring[source].readers == 0
    assert all_are(view(governor, held(governor, serial)[Tier.HOST]).view(torch.float32), 1)
    certified(governor, model, 7)
    certified(governor, model, 8)
    assert set(held(governor, serial)) == {Tier.HOST}


def test_a_rollback_during_a_transfer_drops_what_belongs_to_the_undone_future(late, govern, monkeypatch):
    model = weights(1)
    governor = govern(model, **SETTINGS)
    first = governor.snapshot()
    halted = Halted(monkeypatch)
    second = certified(governor, model, 2)
    halted.begin(governor)
    governor.execute_rollback(to=first)
    assert held(governor, second) == {}
    halted.end(governor)
    assert held(governor, second) == {}
    assert all(slot.readers == 0 for slot in governor._keeper.ring)
    assert [slot.phase for slot in governor._keeper.ring if slot.tier is Tier.HOST] == [SlotPhase.FREE] * 3
    assert all_are(model.weight, 1)


def test_a_rollback_to_the_snapshot_that_is_being_drained_keeps_it(late, govern, monkeypatch):
    halted, model = Halted(monkeypatch), weights(1)
    governor = govern(model, **SETTINGS)
    serial = certified(governor, model, 1)
    halted.begin(governor)
    write(governor, model, 9)
    assert governor.execute_rollback().wait().verified
    assert all_are(model.weight, 1)
    halted.end(governor)
    assert set(held(governor, serial)) == {Tier.DEVICE, Tier.HOST}


def test_a_capture_in_progress_delays_draining(late, govern, monkeypatch):
    model = weights(1)
    governor = govern(model, **SETTINGS)
    serial = certified(governor, model, 1)
    driver = governor._keeper.driver
    driver.begin_capture(1, threading.get_ident() + 1, False, 5.0)
    late.finish()
    late.clear()
    late.capturing.add(-1)
    waits, wait = threading.Event(), driver._changed.wait

    def seen(timeout=None):
        waits.set()
        return wait(timeout)

    monkeypatch.setattr(driver._changed, "wait", seen)
    governor._keeper.backlog.tend(0, 1)
    governor._keeper.backlog._work.add_done_callback(lambda _: waits.set())
    assert waits.wait(60)
    assert not governor._keeper.backlog._work.done()  # it waits for the end of the capture
    assert late.calls == []
    late.capturing.clear()
    driver.end_capture(1)
    governor._keeper.backlog.finish()
    assert set(held(governor, serial)) == {Tier.DEVICE, Tier.HOST}


def test_closing_waits_for_a_transfer_under_way(late, govern, monkeypatch):
    halted, model = Halted(monkeypatch), weights(1)
    governor = govern(model, **SETTINGS)
    certified(governor, model, 1)
    halted.begin(governor)
    second = governor._keeper.devices["cpu"]._second
    assert late.pending(second) == 1
    joins, ended, join = threading.Event(), threading.Event(), threading.Thread.join

    def seen(thread, timeout=None):
        if thread.name.startswith("tolaria-backlog"):
            joins.set()
        return join(thread, timeout)

    def close():
        try:
            governor.close()
        finally:
            ended.set()
            joins.set()

    monkeypatch.setattr(threading.Thread, "join", seen)
    closer = threading.Thread(target=close)
    closer.start()
    assert joins.wait(60)
    assert not ended.is_set()
    halted.may_go.set()
    assert ended.wait(60)
    assert late.pending(second) == 0
    assert late.contexts[0].retained == 0


# ------------------------------------------------------------ bits that change


@pytest.mark.parametrize(
    "damage", [flip, swap, lambda g, i: (flip(g, i, 5), flip(g, i, 6))], ids=["flip", "swap", "two"]
)
@pytest.mark.parametrize("tier", [Tier.DEVICE, Tier.HOST])
def test_damage_in_one_tier_is_mended_from_the_other(tier, damage, late, govern):
    governor, model, serial = drained(govern)
    late.finish()
    slots = held(governor, serial)
    damage(governor, slots[tier])
    write(governor, model, 77)
    report = governor.execute_rollback(verify="before").wait()
    assert torch.equal(model.weight, expected())
    assert report.verified
    seen = {governor._keeper.ring[index].phase for index in slots.values()}
    # the device slot comes first, so damage in main memory is not even met
    assert report.tier == ("host" if tier is Tier.DEVICE else "device")
    assert report.corrupted_steps == ((0,) if tier is Tier.DEVICE else ())
    assert seen == ({SlotPhase.FREE, SlotPhase.CERTIFIED} if tier is Tier.DEVICE else {SlotPhase.CERTIFIED})


@pytest.mark.parametrize("damage", [flip, swap], ids=["flip", "swap"])
def test_damage_in_main_memory_is_met_when_there_is_no_other_copy(damage, late, govern):
    governor, model, serial = drained(govern)
    slots = held(governor, serial)
    forget(governor, governor._keeper.ring[slots[Tier.DEVICE]])
    damage(governor, slots[Tier.HOST])
    write(governor, model, 77)
    with pytest.raises(SnapshotRejected):
        governor.execute_rollback(verify="before")
    assert all_are(model.weight, 77)  # nothing was written


@pytest.mark.parametrize("tiers", [(Tier.DEVICE, Tier.HOST), (Tier.DEVICE,)], ids=["both", "one"])
def test_damage_in_both_tiers_leads_to_an_older_snapshot(tiers, late, govern):
    model = weights(1)
    governor = govern(model, **SETTINGS)
    older, newer = certified(governor, model, 1), certified(governor, model, 2)
    drain(governor)
    assert set(held(governor, newer)) == {Tier.DEVICE, Tier.HOST}
    late.finish()
    for tier in tiers:
        flip(governor, held(governor, newer)[tier])
    report = governor.execute_rollback(verify="before").wait()
    assert report.corrupted_steps == (0,) * len(tiers)
    assert all_are(model.weight, 1 if len(tiers) == 2 else 2)
    assert held(governor, older) != {}


def test_a_bit_flipped_in_flight_is_noticed_when_it_is_restored(late, govern, monkeypatch):
    """What arrives in main memory is not what left the device."""
    transfer = ContextDevice.transfer

    def damaged(port, work):
        event = transfer(port, work)
        late.finish()
        target = next(s for s in governor._keeper.ring if s.tier is Tier.HOST and s.phase is SlotPhase.FILLING)
        flip(governor, target.index)
        return event

    monkeypatch.setattr(ContextDevice, "transfer", damaged)
    governor = govern(weights(1), **SETTINGS)
    serial = certified(governor, None, 1)
    drain(governor)
    host = held(governor, serial)[Tier.HOST]
    # with the device's copy there, that is the one which is used; without it the damage is met
    forget(governor, governor._keeper.ring[held(governor, serial)[Tier.DEVICE]])
    assert governor._keeper.ring[host].is_good
    report = governor.execute_rollback()
    with pytest.raises(SnapshotRejected):
        report.wait()
    assert report.verified is False
    assert governor._keeper.ring[host].phase is SlotPhase.FREE  # never chosen again


@pytest.mark.parametrize("damage", [flip, swap], ids=["flip", "swap"])
def test_damage_met_by_the_read_back_is_answered_by_the_next_step(damage, late, govern, make_run):
    """A rollback on request does not look first. The step after it does, and goes back to an intact copy."""
    late.lag = 0
    run = make_run()
    governor = govern(run.model, run.optimizer, scheduler=run.scheduler, **SETTINGS)
    states = {}
    for batch in run.batches[:8]:
        run.step(governor, batch)
        states[governor.state_dict()["completed"]] = run.state()
        governor._keeper.backlog.finish()
    late.finish()
    newest = newest_good(governor._keeper.ring)
    damage(governor, newest.index)
    governor.execute_rollback()
    result = run.step(governor, run.batches[8])
    assert result.rolled_back
    assert governor.statistics().snapshots_corrupted == 1
    assert run.state() in states.values()
    assert newest.index != newest_good(governor._keeper.ring).index


@pytest.mark.parametrize("scrubbed", [0, 1, 2])
def test_scrubbing_finds_damage_in_what_was_captured_into_main_memory(scrubbed, late, govern):
    """Its first scrub compares it with the digest that the device took; the next ones with one of its own."""
    governor = govern(weights(1), tier="host", scrub_every=1)
    info = governor.snapshot().wait("sealed")
    for tick in range(scrubbed):
        governor._keeper.backlog.tend(tick + 1, 10**6)
        governor._keeper.backlog.finish()
        assert info.state == "sealed"
    flip(governor, held(governor, info.serial)[Tier.HOST])
    governor._keeper.backlog.tend(9, 10**6)
    governor._keeper.backlog.finish()
    assert info.state == "dropped"


# ------------------------------------------------------------ read back


def test_a_disturbed_rollback_is_noticed_by_its_report_and_the_next_step_rolls_back_again(late, govern, make_run):
    late.lag = 0
    run = make_run()
    governor = govern(run.model, run.optimizer, scheduler=run.scheduler, cadence=4, probation=2)
    run.train(governor, run.batches[:6])
    late.finish()
    step = newest_good(governor._keeper.ring).step
    report = governor.execute_rollback()
    before = run.state()
    with torch.no_grad():
        run.model[0].weight[0, 0] += 1  # no section
    with pytest.raises(RollbackDisturbed):
        report.wait()
    assert (report.status, report.verified) == ("disturbed", False)
    assert run.step(governor, run.batches[0]).rolled_back
    assert run.state() == before
    assert governor.statistics().rollbacks_disturbed == 1
    assert newest_good(governor._keeper.ring).step == step  # its snapshot is as good as it was
    assert not run.step(governor, run.batches[0]).rolled_back


def test_a_disturbed_rollback_that_nobody_waits_for_is_noticed_by_the_next_step(late, govern, make_run):
    late.lag = 0
    run = make_run()
    governor = govern(run.model, run.optimizer, scheduler=run.scheduler, cadence=4, probation=2)
    run.train(governor, run.batches[:6])
    governor.execute_rollback()
    before = run.state()
    with torch.no_grad():
        run.model[0].weight[0, 0] += 1
    assert run.step(governor, run.batches[0]).rolled_back
    assert run.state() == before


def test_a_report_of_an_older_rollback_does_not_answer_for_a_newer_one(late, govern):
    model = weights(1)
    governor = govern(model)
    governor.snapshot()
    late.finish()
    first = governor.execute_rollback()
    second = governor.execute_rollback()
    with torch.no_grad():
        model.weight.fill_(2)  # disturbs the second one
    assert first.wait().verified is None  # nobody can tell any more
    with pytest.raises(RollbackDisturbed):
        second.wait()


def test_a_report_does_not_answer_for_a_slot_that_holds_another_snapshot_by_now(late, govern):
    """The other tier still holds the snapshot that was restored, and that is not the slot which was read."""
    governor, model, serial = drained(govern)
    write(governor, model, 7)
    report = governor.execute_rollback()
    for number in (2, 3, 4):
        certified(governor, model, number)
    assert set(held(governor, serial)) == {Tier.HOST}
    assert report.wait().verified is None


# ------------------------------------------------------------ the host tier


@pytest.mark.parametrize(("version", "calls"), [(13000, 2), (12090, 0)])
def test_many_storages_travel_in_one_call_where_the_driver_can(version, calls, late, govern):
    late.driver.version = version
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    model.register_parameter("nothing", nn.Parameter(torch.zeros(0)))  # which the driver takes no copy of
    before = [parameter.detach().clone() for parameter in model.parameters()]
    governor = govern(model, tier="host")
    governor.snapshot()
    for number, parameter in enumerate(model.parameters()):
        write_to(governor, parameter, number)
    governor.execute_rollback()
    late.finish()
    assert all(map(torch.equal, model.parameters(), before))
    # torch copies the last one
    assert [call for call in late.calls if "Batch" in call] == ["cuMemcpyBatchAsync 3"] * calls


def test_the_host_tier_trains_and_a_poisoned_batch_leaves_no_trace(late, govern, make_run):
    late.lag = 2
    clean = make_run()
    clean.plain()
    run = make_run()
    with govern(
        run.model, run.optimizer, scheduler=run.scheduler, cadence=4, probation=4, keep_batches=64, tier="host"
    ) as governor:
        run.train(governor, run.poisoned(17))
        assert governor.rollbacks >= 1
        assert governor.capabilities().tier == "host"
        assert {slot.tier for slot in governor._keeper.ring if slot.phase in READABLE} == {Tier.HOST}
        late.finish()
        assert run.state() == clean.state()


@pytest.mark.parametrize("kind", [SectionKind.WRITE, SectionKind.FOREIGN])
def test_writers_wait_for_copies_to_the_host_tier(kind, late, govern):
    model = weights(1)
    governor = govern(model, tier="host")
    info = governor.snapshot()
    assert (info.tier, info.held) == ("host", ("host",))
    with governor._keeper.sections.section(kind), torch.no_grad():
        model.weight.fill_(2)
    report = governor.execute_rollback()
    assert all_are(model.weight, 1)  # at once, on the current stream
    assert (report.tier, report.wait().verified) == ("host", True)


def test_without_their_wait_the_host_tier_would_hold_what_came_later(late, govern, monkeypatch):
    """Red twin."""
    monkeypatch.setattr(ContextDevice, "caller_wait", lambda self, event: None)
    model = weights(1)
    governor = govern(model, tier="host")
    governor.snapshot()
    with governor._keeper.sections.section(SectionKind.WRITE), torch.no_grad():
        model.weight.fill_(2)
    governor.execute_rollback()
    late.finish()
    assert all_are(model.weight, 2)


# ------------------------------------------------------------ scrubbing


@pytest.mark.parametrize("tier", [Tier.DEVICE, Tier.HOST])
@pytest.mark.parametrize("damage", [flip, swap], ids=["flip", "swap"])
def test_scrubbing_gives_up_what_has_changed(damage, tier, late, govern, caplog):
    governor, _, serial = drained(govern, scrub_every=1)
    index = held(governor, serial)[tier]
    tick = scrub_all(governor, 0)
    assert set(held(governor, serial)) == {Tier.DEVICE, Tier.HOST}  # nothing is wrong yet
    damage(governor, index)
    scrub_all(governor, tick)
    assert governor._keeper.ring[index].phase is SlotPhase.FREE
    assert set(held(governor, serial)) == {Tier.DEVICE, Tier.HOST} - {tier}
    assert governor.statistics().snapshots_corrupted == 1
    assert f"the snapshot in the {tier.value} tier has changed" in caplog.text


def scrub_all(governor, tick):
    """One round: each idle slot once, in turn. A cadence so long that nothing is drained again."""
    for _ in range(2):
        tick += 1
        governor._keeper.backlog.tend(tick, 10**6)
        governor._keeper.backlog.finish()
    return tick


def test_no_scrubbing_no_notice(late, govern):
    """Red twin."""
    governor, _, serial = drained(govern, scrub_every=0)
    flip(governor, held(governor, serial)[Tier.DEVICE])
    scrub_all(governor, 0)
    assert set(held(governor, serial)) == {Tier.DEVICE, Tier.HOST}
    assert governor.statistics().snapshots_corrupted == 0


def test_a_slot_of_main_memory_that_is_filled_again_is_compared_with_what_it_holds_now(late, govern):
    """Not with the digest of the bytes that were there before."""
    governor, model, first = drained(govern, host_slots=1)
    newest, keeper = certified(governor, model, 2), governor._keeper
    ground = dataclasses.replace(keeper.ground, drained=1)
    again = protocol.drain(threading.get_ident(), ground, held(governor, newest)[Tier.DEVICE], newest)
    assert keeper.driver.submit(again) == held(governor, newest)[Tier.HOST]
    assert Tier.HOST not in held(governor, first), "or it is another slot"
    governor._keeper.give_up(lambda slot: slot.tier is Tier.DEVICE)
    write(governor, model, 77)
    report = governor.execute_rollback(verify="before").wait()
    assert (report.tier, report.corrupted_steps, report.verified) == ("host", (), True)
    assert all_are(model.weight, 2)


def test_a_device_that_turns_out_to_be_full_leaves_the_snapshot_to_main_memory(late, govern, monkeypatch):
    model = weights(1)
    governor = govern(model, **SETTINGS)
    allocate, refused = memory.allocate, []

    def full(num_bytes, device, doing, *, on_host):
        if not on_host:
            refused.append(num_bytes)
            raise BudgetExceeded(doing, "the device is full", "Free some memory.")
        return allocate(num_bytes, device, doing, on_host=on_host)

    monkeypatch.setattr(memory, "allocate", full)
    info = governor.snapshot().wait("sealed")
    assert (info.tier, len(refused)) == ("host", 1)
    assert governor.capabilities().tier_reason.startswith("out of memory")
    write(governor, model, 2)
    governor.execute_rollback()
    assert all_are(model.weight, 1)


def test_page_locked_memory_beside_a_device_is_waited_for_on_the_host(late, govern, monkeypatch):
    """A transfer of somebody else's may be reading it."""
    model = weights(1)
    governor = govern(model, **SETTINGS)
    for is_pinned in (False, True):
        monkeypatch.setattr(snapshot, "any_page_locked", lambda storages, is_pinned=is_pinned: is_pinned)
        late.clear()
        governor.snapshot()
        governor.execute_rollback()
        waits = [call.split()[0] for call in late.calls if "Synchronize" in call]
        assert waits == ["cuEventSynchronize"] * 2 * is_pinned


def test_nothing_is_certified_before_the_last_rollback_was_read_back(late, govern):
    model = weights(1)
    governor = govern(model, **SETTINGS)
    keeper = governor._keeper
    governor.snapshot().wait("sealed")
    governor.execute_rollback()
    with Shield() as shield:
        candidate, _ = keeper.take(shield, None, manual=False)
    candidate.wait("sealed")
    keeper.advance(candidate.step + 1)
    assert candidate.state == "sealed"
    assert keeper.arrivals.read_back(wait=True).intact
    keeper.advance(candidate.step + 2)
    assert candidate.state == "certified"

"""What every call is for: leave it out, and the hostile machine shows wrong bytes.

Each scenario answers whether the data are right. It must be with the code as it is (green), and must not be once one
method of `ContextDevice` does nothing (red).
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import threading
from collections import deque
from typing import Any

import pytest
import torch
from cuda_driver import fake_driver, test_known
from cuda_driver.fake_driver import Machine, PageLockedRow
from cuda_driver.two_devices import Pair
from torch import nn

from tolaria import SnapshotRejected, TolariaGovernor, protocol, rollback, words
from tolaria.cuda import ContextDevice, Event
from tolaria.device import CpuDevice
from tolaria.errors import RollbackDisturbed
from tolaria.kernels import Tally
from tolaria.operations import Part, ReadLive, SectionKind, StreamRecord
from tolaria.ring import SlotPhase, Tier


def value(tensor: torch.Tensor) -> float:
    """The number that all elements are, or NaN."""
    first = float(tensor.detach().reshape(-1)[0])
    return first if bool((tensor.detach() == first).all()) else float("nan")


def filled(number: float) -> nn.Linear:
    model = nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        model.weight.fill_(number)
    return model


def fill(tensor: torch.Tensor, number: float) -> Any:
    def work() -> None:
        tensor.detach().fill_(number)

    return work


# ------------------------------------------------------------ scenarios


def a_snapshot_holds_work_launched_before_it(machine, govern):
    model = filled(1)
    governor = govern(model)
    side = machine.side_stream()
    machine.launch(side, fill(model.weight, 5))
    governor.snapshot()
    with governor.using(), torch.no_grad():
        model.weight.fill_(9)
    machine.finish()
    governor.execute_rollback()
    machine.finish()
    return value(model.weight) == 5


def a_snapshot_holds_nothing_written_after_it(machine, govern):
    model = filled(1)
    governor = govern(model)
    governor.snapshot()
    with governor._keeper.sections.section(SectionKind.WRITE), torch.no_grad():
        model.weight.fill_(2)
    governor.execute_rollback()
    machine.finish()
    return value(model.weight) == 1


def a_snapshot_holds_nothing_written_after_it_on_any_stream(machine, govern):
    """`using()` vouches for writers on streams that the governor has never heard of."""
    model = filled(1)
    governor = govern(model)
    side = machine.side_stream()
    governor.snapshot()
    with governor.using():
        machine.launch(side, fill(model.weight, 2))
    machine._force(side, side.launched)  # that stream alone moves on
    governor.execute_rollback()
    machine.finish()
    return value(model.weight) == 1


def the_same_while_another_thread_captures(machine, govern):
    """No context-wide wait may be made then, so the host waits."""
    model = filled(1)
    governor = govern(model)
    side = machine.side_stream()
    governor.snapshot()
    governor._keeper.driver.state = dataclasses.replace(governor._keeper.driver.state, captures=((1, -1),))
    machine.capturing.add(-1)
    with governor.using():
        machine.launch(side, fill(model.weight, 2))
    machine._force(side, side.launched)
    machine.capturing.clear()
    governor._keeper.driver.end_capture(1)
    governor.execute_rollback()
    machine.finish()
    return value(model.weight) == 1


def a_snapshot_holds_no_later_statistics(machine, govern):
    model = nn.BatchNorm1d(3)
    governor = govern(model)
    before = model.running_mean.clone()
    governor.snapshot()
    model(torch.ones(4, 3))  # a forward in train mode writes buffers
    governor.execute_rollback()
    machine.finish()
    return torch.equal(model.running_mean, before)


def an_optimizer_step_waits_for_the_copies(machine, govern):
    model = filled(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    governor = govern(model, optimizer)
    governor.snapshot()
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    governor.execute_rollback()
    machine.finish()
    return value(model.weight) == 1


def a_captured_graph_waits_before_it_is_captured(machine, govern):
    model = filled(1)
    governor = govern(model)
    governor.snapshot()
    governor._keeper.driver.begin_capture(1, threading.get_ident(), False, 5.0)
    with torch.no_grad():
        model.weight.fill_(2)
    governor._keeper.driver.end_capture(1)
    governor.execute_rollback()
    machine.finish()
    return value(model.weight) == 1


def a_reader_sees_what_was_restored(machine, govern):
    model = filled(1)
    governor = govern(model)
    governor.snapshot()
    with governor.using(), torch.no_grad():
        model.weight.fill_(2)
    governor.execute_rollback()
    return value(model.weight) == 1  # at once, on the current stream


def a_reader_on_another_stream_sees_what_was_restored(machine, govern):
    model = filled(1)
    governor = govern(model)
    side = machine.side_stream()
    seen: list[float] = []
    governor.snapshot()
    with governor.using(), torch.no_grad():
        model.weight.fill_(2)
    governor.execute_rollback()
    machine.launch(side, lambda: seen.append(value(model.weight)))
    machine._force(side, side.launched)  # that stream alone moves on
    return seen == [1]


def a_writer_launched_before_a_rollback_cannot_undo_it(machine, govern):
    model = filled(1)
    governor = govern(model)
    governor.snapshot()
    machine.finish()
    side = machine.side_stream()
    machine.launch(side, fill(model.weight, 7))
    governor.execute_rollback()
    machine.finish()
    return value(model.weight) == 1


def staged_means_copied(machine, govern):
    model = filled(1)
    governor = govern(model)
    info = governor.snapshot()
    info.wait("staged")
    return value(governor._keeper.vault.slots[0].arena.ranges[0][:9]) == 1


def a_bad_number_is_seen(machine, govern):
    governor = govern(filled(1), mode="observe")
    return governor.check_vital_signs(loss=torch.tensor(float("nan")))


def flip(governor, slot):
    """One bit of the first weight that a slot holds."""
    memory = governor._keeper.vault.slots[slot]
    memory.arena.views[memory.survey.leaves.leaves[0].storage][5] ^= 1


def a_digest_is_the_one_of_the_bytes(machine, govern):
    """Also when the slot has been read before: what is left of the last reading is not added to."""
    model = filled(1)
    governor = govern(model, slots=2, probation=0)
    digests = []
    for number in (1, 2, 3, 1):
        with governor.using(), torch.no_grad():
            model.weight.fill_(number)
        info = governor.snapshot()
        info.wait("sealed")
        slot = next(slot for slot in governor._keeper.ring if slot.snapshot == info.serial)
        digests.append(dict(governor._keeper.vault.slots[slot.index].digest)["cpu"])
    block = governor._keeper.vault.slots[slot.index].survey.leaves.storages[0].bytes
    expected = int(words.portable_digest([block]))
    return digests[0] == digests[3] == expected and len(set(digests)) == 3 and intact(governor, slot)


def intact(governor, slot):
    keeper = governor._keeper
    return keeper.driver.submit(protocol.reinspect(1, slot.index, slot.snapshot, keeper.ground)).intact


def a_flipped_bit_is_seen_before_it_is_restored(machine, govern):
    governor = govern(filled(1))
    governor.snapshot().wait("sealed")
    machine.finish()
    flip(governor, 0)
    try:
        governor.execute_rollback(verify="before")
    except SnapshotRejected:
        return True
    return False


def outcome(report):
    """What waiting for a rollback has shown."""
    try:
        return "verified" if report.wait().verified else "unknown"
    except RollbackDisturbed:
        return "disturbed"
    except SnapshotRejected:
        return "corrupted"


def a_restored_state_is_verified(machine, govern):
    model = filled(1)
    governor = govern(model)
    governor.snapshot()
    for number in (2, 3):  # also the second time
        with governor.using(), torch.no_grad():
            model.weight.fill_(number)
        if outcome(governor.execute_rollback()) != "verified":
            return False
    return value(model.weight) == 1


def no_disturbance_is_seen(machine, governor, write):
    """A rollback, then a writer who keeps the rules: what is read back is what was restored."""
    governor.snapshot()
    machine.finish()
    report = governor.execute_rollback()
    write()
    return outcome(report) == "verified"


def statistics_written_after_a_rollback_are_no_disturbance(machine, govern):
    model = nn.BatchNorm1d(3)
    seen = no_disturbance_is_seen(machine, govern(model), lambda: model(torch.ones(4, 3)))
    machine.finish()
    return seen and int(model.num_batches_tracked) == 1


def weights_written_after_a_rollback_are_no_disturbance(machine, govern):
    model = filled(1)
    governor = govern(model)

    def write():
        with governor._keeper.sections.section(SectionKind.WRITE), torch.no_grad():
            model.weight.fill_(2)

    seen = no_disturbance_is_seen(machine, governor, write)
    machine.finish()
    return seen and value(model.weight) == 2


def weights_written_on_any_stream_after_a_rollback_are_no_disturbance(machine, govern):
    model = filled(1)
    governor = govern(model)

    def write():
        side = machine.side_stream()
        with governor.using():
            machine.launch(side, fill(model.weight, 2))
        machine._force(side, side.launched)

    seen = no_disturbance_is_seen(machine, governor, write)
    machine.finish()
    return seen and value(model.weight) == 2


def a_write_that_keeps_no_rule_is_a_disturbance(machine, govern):
    model = filled(1)
    governor = govern(model)
    governor.snapshot()
    machine.finish()
    report = governor.execute_rollback()
    with torch.no_grad():
        model.weight.fill_(2)  # no section
    return outcome(report) == "disturbed"


def drained(machine, govern):
    """A governor with a certified snapshot of ones that is being copied to main memory, and its model."""
    model = filled(1)
    governor = govern(model, host_slots=1, slots=3, probation=0, cadence=1)
    governor._course.take_first()
    return governor, model


def a_transfer_reads_what_was_captured(machine, govern):
    """The second stream begins behind the copies of the first."""
    model = filled(1)
    governor = govern(model, host_slots=1)
    keeper = governor._keeper
    with governor.using(), torch.no_grad():
        model.weight.fill_(1)
    governor.snapshot()
    # as if it had been certified without anybody waiting for it: nothing has run yet
    certified = dataclasses.replace(keeper.ring[0], phase=SlotPhase.CERTIFIED)
    keeper.driver.state = dataclasses.replace(keeper.driver.state, ring=(certified, *keeper.ring[1:]))
    target = keeper.driver.submit(
        protocol.drain(1, dataclasses.replace(keeper.ground, drained=1), 0, certified.snapshot)
    )
    return value(keeper.vault.slots[target].arena.ranges[0][:9]) == 1


def a_drained_snapshot_is_the_one_that_was_taken(machine, govern):
    governor, _ = drained(machine, govern)
    keeper = governor._keeper
    keeper.backlog.tend(1, 1)
    keeper.backlog.finish()
    held = [slot for slot in keeper.ring if slot.tier is Tier.HOST and slot.phase is SlotPhase.CERTIFIED]
    return [value(keeper.vault.slots[slot.index].arena.ranges[0][:9]) for slot in held] == [1]


def the_host_tier_gives_back_all_that_it_took(machine, govern):
    model = nn.Sequential(filled(1), filled(1), filled(1))
    governor = govern(model, tier="host")
    governor.snapshot()
    with governor.using(), torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(2)
    governor.execute_rollback()
    machine.finish()
    return all(value(parameter) == 1 for parameter in model.parameters())


def a_closed_governor_leaves_no_transfer_under_way(machine, govern):
    governor, _ = drained(machine, govern)
    port = governor._keeper.devices["cpu"]
    port.transfer(lambda: None)
    second = port._second
    assert machine.pending(second) == 1
    governor.close()
    return machine.pending(second) == 0


class Average:
    """An extra of the user's that lives on the device and is no module."""

    def __init__(self) -> None:
        self.mean = torch.zeros(4)

    def state_dict(self) -> Any:
        return {"mean": self.mean}

    def load_state_dict(self, saved: Any) -> None:
        self.mean.copy_(saved["mean"])


def an_extra_is_captured_behind_work_launched_before(machine, govern):
    governor, extra = govern(filled(1)), Average()
    governor.register("average", extra)
    machine.launch(machine.side_stream(), fill(extra.mean, 5))
    governor.snapshot()
    machine.finish()
    extra.mean.fill_(9)
    governor.execute_rollback()
    machine.finish()
    return value(extra.mean) == 5


def an_extra_is_restored_behind_work_launched_before(machine, govern):
    governor, extra = govern(filled(1)), Average()
    governor.register("average", extra)
    governor.snapshot()
    machine.finish()
    machine.launch(machine.side_stream(), fill(extra.mean, 9))
    governor.execute_rollback()
    machine.finish()
    return value(extra.mean) == 0


def a_closed_governor_leaves_nothing_under_way(machine, govern):
    governor = govern(filled(1))
    governor.snapshot()
    governor.close()
    return machine.pending(machine.own()) == 0


def a_dropped_governor_leaves_nothing_under_way(machine, govern):
    model = filled(1)
    governor = TolariaGovernor(model)
    governor.snapshot()
    assert machine.pending(machine.own()) == 3  # copy, read, send
    del governor
    gc.collect()
    return machine.pending(machine.own()) == 0


def one_that_fails_leaves_nothing_that_waits(machine, govern):
    """A number that was sent is read from page-locked memory by who waits for it."""
    device = ContextDevice("cuda:0", machine.driver, machine.streams)
    row = PageLockedRow(machine, 1)
    row.copy_(torch.tensor([3.0], dtype=torch.float64), non_blocking=True)
    device.host_wait(device.mark())
    found = row.tolist()
    device.close()
    return found == [3.0]


SCENARIOS = [
    a_snapshot_holds_work_launched_before_it,
    a_snapshot_holds_nothing_written_after_it,
    a_snapshot_holds_nothing_written_after_it_on_any_stream,
    the_same_while_another_thread_captures,
    a_snapshot_holds_no_later_statistics,
    an_optimizer_step_waits_for_the_copies,
    a_captured_graph_waits_before_it_is_captured,
    a_reader_sees_what_was_restored,
    a_reader_on_another_stream_sees_what_was_restored,
    a_writer_launched_before_a_rollback_cannot_undo_it,
    staged_means_copied,
    a_bad_number_is_seen,
    a_digest_is_the_one_of_the_bytes,
    a_flipped_bit_is_seen_before_it_is_restored,
    a_restored_state_is_verified,
    statistics_written_after_a_rollback_are_no_disturbance,
    weights_written_after_a_rollback_are_no_disturbance,
    weights_written_on_any_stream_after_a_rollback_are_no_disturbance,
    a_write_that_keeps_no_rule_is_a_disturbance,
    a_transfer_reads_what_was_captured,
    a_drained_snapshot_is_the_one_that_was_taken,
    the_host_tier_gives_back_all_that_it_took,
    a_closed_governor_leaves_no_transfer_under_way,
    an_extra_is_captured_behind_work_launched_before,
    an_extra_is_restored_behind_work_launched_before,
    a_closed_governor_leaves_nothing_under_way,
    a_dropped_governor_leaves_nothing_under_way,
    one_that_fails_leaves_nothing_that_waits,
]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_green(scenario, late, govern):
    assert scenario(late, govern)


# ------------------------------------------------------------ mutants


def no_event(self: ContextDevice, *_: Any) -> Event:
    """An event that was never recorded, so that whoever waits for it does not."""
    return Event(fake_driver.Event(self.index), deque().append)


def nothing(self: ContextDevice, *_: Any) -> None:
    pass


def no_stream(self: ContextDevice, *_: Any) -> Any:
    return contextlib.nullcontext()


def on_the_callers(self: ContextDevice, work: Any) -> None:
    """Launched, but on the stream of the caller."""
    work()


def nothing_moved(self: ContextDevice, work: Any) -> Event:
    return no_event(self)


def without_a_wait(self: ContextDevice, work: Any) -> Event:
    """The second stream begins at once."""
    self._call = lambda name, *arguments: (
        None if name == "cuStreamWaitEvent" else ContextDevice._call(self, name, *arguments)
    )
    try:
        return REAL_TRANSFER(self, work)
    finally:
        del self._call


def without_the_second_stream(self: ContextDevice) -> None:
    self._second = None
    REAL_CLOSE(self)


REAL_TRANSFER, REAL_CLOSE = ContextDevice.transfer, ContextDevice.close

MUTANTS = [
    ("context_record", no_event, a_snapshot_holds_work_launched_before_it),
    ("context_record", no_event, a_writer_launched_before_a_rollback_cannot_undo_it),
    ("context_record", no_event, an_extra_is_captured_behind_work_launched_before),
    ("stream_wait", nothing, a_snapshot_holds_work_launched_before_it),
    ("stream_wait", nothing, a_writer_launched_before_a_rollback_cannot_undo_it),
    ("stream_record", no_event, a_snapshot_holds_nothing_written_after_it),
    ("stream_record", no_event, a_snapshot_holds_no_later_statistics),
    ("stream_record", no_event, a_reader_sees_what_was_restored),
    ("stream_record", no_event, staged_means_copied),
    ("stream_record", no_event, a_digest_is_the_one_of_the_bytes),
    ("caller_wait", nothing, a_snapshot_holds_nothing_written_after_it),
    ("caller_wait", nothing, a_snapshot_holds_no_later_statistics),
    ("caller_wait", nothing, an_optimizer_step_waits_for_the_copies),
    ("caller_wait", nothing, a_captured_graph_waits_before_it_is_captured),
    ("stream_record", no_event, a_snapshot_holds_nothing_written_after_it_on_any_stream),
    ("stream_record", no_event, the_same_while_another_thread_captures),
    ("context_wait", nothing, a_snapshot_holds_nothing_written_after_it_on_any_stream),
    ("host_wait", nothing, the_same_while_another_thread_captures),
    ("context_wait", nothing, a_reader_sees_what_was_restored),
    ("context_wait", nothing, a_reader_on_another_stream_sees_what_was_restored),
    ("host_wait", nothing, staged_means_copied),
    ("host_wait", nothing, a_bad_number_is_seen),
    ("host_wait", nothing, a_digest_is_the_one_of_the_bytes),
    ("host_wait", nothing, one_that_fails_leaves_nothing_that_waits),
    ("mark", no_event, a_bad_number_is_seen),
    ("mark", no_event, one_that_fails_leaves_nothing_that_waits),
    ("transfer", nothing_moved, a_drained_snapshot_is_the_one_that_was_taken),
    ("move", nothing, the_host_tier_gives_back_all_that_it_took),
    ("transfer", without_a_wait, a_transfer_reads_what_was_captured),
    ("host_wait", nothing, a_drained_snapshot_is_the_one_that_was_taken),
    ("host_wait", nothing, a_transfer_reads_what_was_captured),
    ("close", without_the_second_stream, a_closed_governor_leaves_no_transfer_under_way),
    ("host_wait", nothing, a_restored_state_is_verified),
    ("host_wait", nothing, a_write_that_keeps_no_rule_is_a_disturbance),
    ("stream_record", no_event, a_restored_state_is_verified),
    ("stream_record", no_event, statistics_written_after_a_rollback_are_no_disturbance),
    ("stream_record", no_event, weights_written_after_a_rollback_are_no_disturbance),
    ("caller_wait", nothing, statistics_written_after_a_rollback_are_no_disturbance),
    ("caller_wait", nothing, weights_written_after_a_rollback_are_no_disturbance),
    ("context_wait", nothing, weights_written_on_any_stream_after_a_rollback_are_no_disturbance),
    ("enqueue", nothing, a_restored_state_is_verified),
    ("enqueue", nothing, a_write_that_keeps_no_rule_is_a_disturbance),
    ("enqueue", nothing, a_digest_is_the_one_of_the_bytes),
    ("enqueue", nothing, a_snapshot_holds_nothing_written_after_it),
    ("enqueue", on_the_callers, a_snapshot_holds_work_launched_before_it),
    ("enqueue", on_the_callers, a_writer_launched_before_a_rollback_cannot_undo_it),
    ("on_stream", no_stream, an_extra_is_captured_behind_work_launched_before),
    ("on_stream", no_stream, an_extra_is_restored_behind_work_launched_before),
    ("synchronize", nothing, a_closed_governor_leaves_nothing_under_way),
    ("synchronize", nothing, a_dropped_governor_leaves_nothing_under_way),
    ("close", nothing, a_closed_governor_leaves_nothing_under_way),
    ("close", nothing, a_dropped_governor_leaves_nothing_under_way),
]


@pytest.mark.parametrize(
    ("method", "mutant", "scenario"), MUTANTS, ids=[f"{m[0]}-{m[1].__name__}-{m[2].__name__}" for m in MUTANTS]
)
def test_red(method, mutant, scenario, late, govern, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(ContextDevice, method, mutant)
        # how long something took is no byte, but asking raises where nobody has waited
        patch.setattr(ContextDevice, "elapsed_ms", lambda *_: 1.0)
        assert not scenario(late, govern)


@pytest.mark.parametrize(
    ("left_out", "scenario"),
    [
        ("clear", a_digest_is_the_one_of_the_bytes),
        ("clear", a_restored_state_is_verified),
        ("send", a_digest_is_the_one_of_the_bytes),
        ("send", a_restored_state_is_verified),
    ],
)
def test_red_without_a_part_of_an_examination(left_out, scenario, late, govern, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Tally, left_out, lambda *_: None)
        assert not scenario(late, govern)


@pytest.mark.parametrize(
    ("part", "scenario"),
    [
        (Part.BUFFERS, statistics_written_after_a_rollback_are_no_disturbance),
        (Part.REST, weights_written_after_a_rollback_are_no_disturbance),
        (Part.REST, weights_written_on_any_stream_after_a_rollback_are_no_disturbance),
    ],
)
def test_red_without_the_event_after_a_part_was_read_back(part, scenario, late, govern, monkeypatch):
    """Only that one event is never recorded."""
    original, after = rollback._read_back, []

    def read_back(slot, places, ground):
        inner = original(slot, places, ground)
        answer = None
        while True:
            try:
                op = inner.send(answer)
            except StopIteration as end:
                return end.value
            answer = yield op
            if isinstance(op, ReadLive):
                after.append(op.part)
            elif isinstance(op, StreamRecord) and after[-1] is part:
                answer = Event(fake_driver.Event(0), deque().append)

    monkeypatch.setattr(rollback, "_read_back", read_back)
    assert not scenario(late, govern)
    assert after == list(Part)


DELETED = [
    ("cuCtxRecordEvent", a_snapshot_holds_work_launched_before_it),
    ("cuCtxRecordEvent", a_writer_launched_before_a_rollback_cannot_undo_it),
    ("cuCtxWaitEvent", a_reader_sees_what_was_restored),
    ("cuCtxWaitEvent", a_reader_on_another_stream_sees_what_was_restored),
    ("cuEventRecord", a_snapshot_holds_nothing_written_after_it),
    ("cuEventRecord", a_bad_number_is_seen),
    ("cuStreamWaitEvent", a_snapshot_holds_work_launched_before_it),
    ("cuStreamWaitEvent", a_snapshot_holds_nothing_written_after_it),
    ("cuEventSynchronize", staged_means_copied),
    ("cuEventSynchronize", a_bad_number_is_seen),
    ("cuStreamSynchronize", a_closed_governor_leaves_nothing_under_way),
    ("cuStreamSynchronize", a_closed_governor_leaves_no_transfer_under_way),
    ("cuStreamWaitEvent", statistics_written_after_a_rollback_are_no_disturbance),
    ("cuStreamWaitEvent", weights_written_after_a_rollback_are_no_disturbance),
    ("cuStreamWaitEvent", a_transfer_reads_what_was_captured),
    ("cuEventSynchronize", a_drained_snapshot_is_the_one_that_was_taken),
    ("cuEventSynchronize", a_restored_state_is_verified),
    ("cuEventRecord", a_drained_snapshot_is_the_one_that_was_taken),
    ("cuMemcpyBatchAsync", the_host_tier_gives_back_all_that_it_took),
]


@pytest.mark.parametrize(("call", "scenario"), DELETED, ids=[f"{call}-{s.__name__}" for call, s in DELETED])
def test_red_without_the_driver_call(call, scenario, late, govern, monkeypatch):
    """The same from below: the driver says that all is well and does nothing."""
    monkeypatch.setattr(ContextDevice, "elapsed_ms", lambda *_: 1.0)
    late.fails[call] = 0
    try:
        assert not scenario(late, govern)
    finally:
        late.fails.clear()


def test_every_method_of_the_protocol_has_a_mutant():
    """A method that is added comes here first."""
    own = {name for name in vars(ContextDevice) if not name.startswith("_") and callable(getattr(ContextDevice, name))}
    # the first two change no byte: see test_calls; the others: see test_paths
    ours = own - {"has_passed", "elapsed_ms", "graph", "batch"}
    assert ours == {method for method, *_ in MUTANTS} | {method for method, *_ in test_known.MUTANTS}


def test_one_that_always_says_passed_makes_a_step_wait(late, govern, run, monkeypatch):
    """`has_passed` changes no byte, but who asks it first need not wait."""

    def waits() -> int:
        return sum(call.startswith("cuEventSynchronize") for call in late.calls)

    governor = govern(run.model, run.optimizer)
    run.step(governor, run.batches[0])
    late.clear()
    run.step(governor, run.batches[1])
    assert waits() == 0
    monkeypatch.setattr(ContextDevice, "has_passed", lambda self, event: True)
    run.step(governor, run.batches[2])
    assert waits() > 0


# ------------------------------------------------------------ captures and contexts


def wait_inside_a_capture(machine, govern):
    governor = govern(filled(1))
    governor.snapshot()
    governor._keeper.driver.begin_capture(1, threading.get_ident(), False, 5.0)
    machine.capturing.add(threading.get_ident())
    for kind in SectionKind:
        with governor._keeper.sections.section(kind):
            pass
    machine.capturing.clear()
    governor._keeper.driver.end_capture(1)
    return machine.violations == []


def test_no_wait_reaches_a_capturing_stream(late, govern):
    assert wait_inside_a_capture(late, govern)


def test_a_wait_on_a_capturing_stream_is_noticed(late, govern, monkeypatch):
    monkeypatch.setattr(late.streams, "is_capturing", lambda: False)
    assert not wait_inside_a_capture(late, govern)
    late.violations.clear()


@pytest.mark.parametrize("holds", [True, False])
def test_the_default_stream_is_the_one_of_our_device(holds, monkeypatch):
    """Its handle is 0 in every context: with another device's current, an event would land on that one's stream."""
    machine = Machine(2)
    device = ContextDevice("cuda:0", machine.driver, machine.streams)
    machine.base_device = 1
    if not holds:
        monkeypatch.setattr(ContextDevice, "_current", no_stream)
    assert one_row(machine, device) == ([3.0] if holds else [0.0])


def one_row(machine, device):
    row = PageLockedRow(machine, 1)
    row.copy_(torch.tensor([3.0], dtype=torch.float64), non_blocking=True)
    device.host_wait(device.mark())
    return row.tolist()


# ------------------------------------------------------------ two devices


def of_its_own_device_only(original):
    def method(self, event):
        if event.handle.device == self.index:
            original(self, event)

    return method


def work_of_the_other_device_is_captured(machine):
    """A tensor of one device, written by work that was launched on the other."""
    pair = Pair(machine)
    machine.launch(machine.side_stream(1), fill(pair.weight(0), 5))
    machine.launch(machine.side_stream(0), fill(pair.weight(1), 6))
    slot = pair.snapshot().slot
    for index in (0, 1):
        machine._force(machine.own(index), machine.own(index).launched)
    found = value(pair.held(slot, 0)), value(pair.held(slot, 1))
    pair.close()
    return found == (5, 6)


def work_of_the_other_device_sees_what_was_restored(machine):
    pair = Pair(machine)
    pair.snapshot()
    machine.finish()
    sides = [machine.side_stream(0), machine.side_stream(1)]
    seen: dict[int, float] = {}
    for index in (0, 1):
        pair.weight(index).fill_(9)
    pair.rollback()
    for index in (0, 1):
        machine.launch(sides[1 - index], lambda i=index: seen.update({i: value(pair.weight(i))}))
        machine._force(sides[1 - index], sides[1 - index].launched)
    pair.close()
    return seen == {0: 0, 1: 0}


def work_of_one_device_sees_what_was_restored_on_the_other(machine):
    """Only one stream of one device moves on, and reads a tensor of the other one."""
    pair = Pair(machine)
    pair.snapshot()
    machine.finish()
    side = machine.side_stream(1)
    pair.weight(0).fill_(9)
    monkey = machine.mains
    machine.mains = []  # no operator of a main stream forces anything
    pair.rollback()
    seen: list[float] = []
    machine.launch(side, lambda: seen.append(value(pair.weight(0))))
    machine._force(side, side.launched)
    machine.mains = monkey
    pair.close()
    return seen == [0]


@pytest.mark.parametrize("method", [None, "stream_wait", "context_record", "stream_wait across"])
def test_copies_of_each_device_wait_for_the_work_of_both(method, monkeypatch):
    machine = Machine(2)
    if method == "stream_wait across":
        monkeypatch.setattr(ContextDevice, "stream_wait", of_its_own_device_only(ContextDevice.stream_wait))
    elif method is not None:
        monkeypatch.setattr(ContextDevice, method, nothing if method == "stream_wait" else no_event)
    assert work_of_the_other_device_is_captured(machine) == (method is None)


@pytest.mark.parametrize("method", [None, "context_wait", "stream_record", "context_wait across"])
def test_work_of_each_device_waits_for_the_copies_of_both(method, monkeypatch):
    machine = Machine(2)
    if method == "context_wait across":
        monkeypatch.setattr(ContextDevice, "context_wait", of_its_own_device_only(ContextDevice.context_wait))
    elif method is not None:
        monkeypatch.setattr(ContextDevice, method, nothing if method == "context_wait" else no_event)
    assert work_of_one_device_sees_what_was_restored_on_the_other(machine) == (method is None)
    if method is None:
        assert work_of_the_other_device_sees_what_was_restored(Machine(2))


@pytest.mark.parametrize("waits", [True, False])
def test_page_locked_host_memory_is_copied_when_the_transfer_into_it_is_done(waits, monkeypatch):
    machine = Machine(1)
    device = ContextDevice("cuda:0", machine.driver, machine.streams)
    pair = Pair.on({"cuda:0": device, "cpu": CpuDevice("cpu")}, host=("cpu",), pinned=True)
    if not waits:
        monkeypatch.setattr(ContextDevice, "host_wait", nothing)
    weight = pair.tensor("cpu")
    machine.launch(machine.side_stream(), fill(weight, 5))  # a transfer into page-locked memory
    slot = pair.snapshot().slot
    machine.finish()
    assert (value(pair.slot_tensor(slot, "cpu")) == 5) == waits
    device.close()

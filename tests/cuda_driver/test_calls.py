"""What the driver is asked for, call by call: a call that goes missing, or comes too much, fails here without a GPU.

`test_deleted.py` shows what each of them is for.
"""

from __future__ import annotations

import contextlib
import gc
import threading

import pytest
import torch
from cuda_driver import fake_driver
from cuda_driver.fake_driver import Machine
from cuda_driver.two_devices import Pair
from torch import nn

from tolaria import TolariaGovernor, TolariaInternalError
from tolaria.cuda import ContextDevice, TorchStreams
from tolaria.kernels import Sweep
from tolaria.operations import SectionKind

SNAPSHOT = [
    # everything launched so far, then the copies
    "cuCtxRecordEvent ctx0 a",
    "cuStreamWaitEvent own0 a",
    "cuEventRecord own0 b",  # when it began, for the pace
    "launch own0 capture",  # buffers
    "cuEventRecord own0 c",
    "launch own0 capture",  # the rest
    "cuEventRecord own0 d",
    "launch own0 read",  # digest and search for non-finite values: buffers,
    "launch own0 read",  # and the rest
    "launch own0 _send",
    "cuEventRecord own0 e",
]
ROLLBACK = [
    "cuCtxRecordEvent ctx0 a",
    "cuStreamWaitEvent own0 a",
    "cuEventRecord own0 b",  # when it began, for the report
    "launch own0 restore",
    "launch own0 restore",
    "cuEventRecord own0 c",  # when it had copied
    "cuEventRecord own0 d",
    "cuCtxWaitEvent ctx0 d",
    # what was restored is read once more, behind the barrier: readers go on
    "launch own0 read",  # buffers
    "cuEventRecord own0 e",  # until then nobody may write buffers,
    "launch own0 read",  # the rest, and the answer travels
    "cuEventRecord own0 f",  # until then the answer is not there,
    "cuEventRecord own0 g",  # and nobody may write anything
]


def small():
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))


def test_opening_a_device(late, govern):
    with late.tape() as calls:
        govern(small())
    assert calls == [
        "cuDeviceGet 0",
        "cuDevicePrimaryCtxRetain 0",
        "cuCtxGetStreamPriorityRange",
        "cuStreamCreateWithPriority 1 -5 ctx0",  # non-blocking, highest priority
    ]


def test_one_snapshot(late, govern):
    governor = govern(small())
    with late.tape() as calls:
        governor.snapshot()
    assert calls == SNAPSHOT
    with late.tape() as calls:
        governor.snapshot()
    assert calls == SNAPSHOT


def test_one_rollback(late, govern):
    governor = govern(small())
    governor.snapshot()
    with late.tape() as calls:
        governor.execute_rollback()
    assert calls == ROLLBACK


def test_where_a_copy_reads_in_passing_the_slot_is_not_read_again(late, govern, monkeypatch):
    """As the compiled kernel does; here the plain operators stand in for it."""
    monkeypatch.setattr(Sweep, "is_compiled", True)
    governor = govern(small())
    with late.tape() as calls:
        info = governor.snapshot()
    assert calls == [call for call in SNAPSHOT if call != "launch own0 read"]
    with late.tape() as calls:
        governor.execute_rollback()
    assert calls == ROLLBACK
    assert info.wait("sealed").state == "sealed"


def test_nothing_has_run_when_a_snapshot_and_a_rollback_return(late, govern):
    governor = govern(small())
    governor.snapshot()
    assert late.pending(late.own()) == 5  # two copies, two readings, send
    with late.tape() as calls:
        late.finish()
    assert late.pending(late.own()) == 0
    assert calls == []


@pytest.mark.parametrize(
    ("kind", "event"), [(SectionKind.FORWARD, 2), (SectionKind.WRITE, 3), (SectionKind.READ, None)]
)
def test_a_section_waits_for_what_it_may_write(kind, event, late, govern):
    governor = govern(small())
    start = len(late.calls)
    governor.snapshot()
    recorded = [call.split()[-1] for call in late.calls[start:] if call.startswith("cuEventRecord own0")]
    late.clear()
    with governor._keeper.sections.section(kind):
        pass
    expected = [] if event is None else [f"cuStreamWaitEvent main0 {recorded[event - 1]}"]
    assert late.calls == expected


@pytest.mark.parametrize(
    ("kind", "event"), [(SectionKind.FORWARD, 4), (SectionKind.WRITE, 6), (SectionKind.READ, None)]
)
def test_a_section_after_a_rollback_waits_until_what_it_may_write_was_read_back(kind, event, late, govern):
    governor = govern(small())
    governor.snapshot()
    start = len(late.calls)
    governor.execute_rollback()
    recorded = [call.split()[-1] for call in late.calls[start:] if call.startswith("cuEventRecord own0")]
    assert len(recorded) == 6
    late.clear()
    with governor._keeper.sections.section(kind):
        pass
    assert late.calls == ([] if event is None else [f"cuStreamWaitEvent main0 {recorded[event - 1]}"])


def test_a_section_for_foreign_writers_makes_every_stream_wait_once(late, govern):
    governor = govern(small())
    with late.tape() as calls, governor.using():
        pass
    assert calls == []  # no snapshot, nothing to wait for
    start = len(late.calls)
    governor.snapshot()
    recorded = [call.split()[-1] for call in late.calls[start:] if call.startswith("cuEventRecord own0")]
    late.clear()
    with governor.using():
        pass
    assert late.calls == [f"cuCtxWaitEvent ctx0 {recorded[2]}"]
    late.clear()
    for kind in SectionKind:  # everything waits by itself now
        with governor._keeper.sections.section(kind):
            pass
    assert late.calls == []


def test_a_forward_leaves_the_copies_of_weights_under_way(late, govern):
    governor = govern(small())
    governor.snapshot()
    with governor._keeper.sections.section(SectionKind.FORWARD):
        assert late.pending(late.own()) == 4  # buffers are there; the rest, the readings and the answer are not
    with governor.using():
        assert late.pending(late.own()) == 3  # the readings and the answer
    with governor.using(write=False):
        assert late.pending(late.own()) == 3


def test_a_forward_of_the_model_is_a_forward_section(late, govern):
    model = small()
    governor = govern(model)
    governor.snapshot()
    with late.tape() as calls:
        model(torch.zeros(3, 2))
    assert calls == ["cuStreamWaitEvent main0 a"]
    assert late.pending(late.own()) == 4


def test_the_beginning_of_a_graph_capture_waits_for_all_copies(late, govern):
    governor = govern(small())
    start = len(late.calls)
    governor.snapshot()
    recorded = [call.split()[-1] for call in late.calls[start:] if call.startswith("cuEventRecord own0")]
    late.clear()
    governor._keeper.driver.begin_capture(1, threading.get_ident(), False, 5.0)
    assert late.calls == [f"cuStreamWaitEvent main0 {recorded[2]}"]
    late.capturing.add(threading.get_ident())
    late.clear()
    with governor._keeper.sections.section(SectionKind.WRITE):
        pass  # inside, waiting for work outside would invalidate the capture
    assert late.calls == []
    late.capturing.clear()
    governor._keeper.driver.end_capture(1)
    with late.tape() as calls, governor._keeper.sections.section(SectionKind.WRITE):
        pass
    assert calls == ["cuStreamWaitEvent main0 a"]


def test_waiting_for_a_report_waits_for_what_was_read_back_and_launches_nothing(late, govern):
    governor = govern(small())
    governor.snapshot().wait("sealed")
    report = governor.execute_rollback()
    with late.tape() as calls:
        report.wait()
    assert calls == [
        "cuEventSynchronize a",
        "cuEventElapsedTime b c",
        "cuEventSynchronize d",  # read back
    ]
    assert report.verified
    assert report.device_ms == 1.0  # events are a millisecond apart on this machine


def test_the_digest_of_a_snapshot_that_nobody_has_read_yet_is_waited_for_and_not_taken_twice(late, govern):
    governor = govern(small())
    info = governor.snapshot()
    with late.tape() as calls:
        info.wait("sealed")
    assert calls == [
        "cuEventSynchronize a",  # copied
        "cuEventSynchronize b",  # read
        "cuEventElapsedTime c a",  # for the pace
    ]


def test_a_step_asks_and_does_not_wait(late, govern, run):
    governor = govern(run.model, run.optimizer, scheduler=run.scheduler)
    run.step(governor, run.batches[0])  # the first one waits for the first snapshot
    loss = run.backward(run.batches[1])
    with late.tape() as calls:
        governor.step(loss=loss)
    assert calls == [
        "cuStreamWaitEvent main0 a",  # the whole step
        "cuStreamWaitEvent main0 a",  # the optimizer in it
        "cuEventRecord main0 b",  # its numbers
        "cuEventQuery c",  # those of the step before
    ]
    with late.tape() as calls:
        governor.observe(loss=torch.ones(()))
    assert [call.split()[0] for call in calls] == ["cuEventRecord", "cuEventQuery"]


def test_a_step_whose_numbers_have_arrived_waits_for_an_event_that_has_passed(late, govern, run):
    late.lag = 0
    governor = govern(run.model, run.optimizer)
    run.step(governor, run.batches[0])
    loss = run.backward(run.batches[1])
    with late.tape() as calls:
        governor.step(loss=loss)
    assert [call.split()[0] for call in calls][2:] == ["cuEventRecord", "cuEventQuery", "cuEventSynchronize"]


def test_closing(late, govern):
    governor = govern(small())
    governor.snapshot()
    with late.tape() as calls:
        governor.close()
    assert calls[:1] == ["cuStreamSynchronize own0"]
    assert calls[-1:] == ["cuDevicePrimaryCtxRelease 0"]
    assert set(calls[1:-1]) <= {"cuStreamDestroy own0"}
    assert late.contexts[0].retained == 0
    with late.tape() as calls:
        governor.close()
    assert calls == []


def test_every_event_is_given_back(late):
    """events that somebody still refers to when the device is closed are never destroyed."""
    governor = TolariaGovernor(small())
    governor.snapshot()
    governor.close()
    del governor
    gc.collect()
    assert [event.name for event in late.events if not event.is_destroyed] == []


def test_handles_are_used_again(late, govern):
    """Handles return to the pool: a thousand steps need no more events than a hundred."""
    late.lag = 1
    governor = govern(nn.Linear(2, 2), mode="observe")
    for _ in range(100):
        governor.observe(loss=torch.ones(()))
    made = len(late.events)
    for _ in range(900):
        governor.observe(loss=torch.ones(()))
    assert len(late.events) == made <= 5


# ------------------------------------------------------------ contexts and captures


@pytest.mark.parametrize("base", [None, 1])
def test_a_thread_with_no_context_or_another_borrows_ours_where_it_matters(base):
    machine = Machine(2)
    machine.base_device = base
    device = ContextDevice("cuda:0", machine.driver, machine.streams)
    with machine.tape() as calls:
        event = device.stream_record()
        device.stream_wait(event)
        device.context_wait(device.context_record())
    assert [call for call in calls if "Push" in call or "Pop" in call] == [
        "cuCtxPushCurrent ctx0",
        "cuCtxPopCurrent",
    ] * 2
    with machine.tape() as calls:
        mark = device.mark()
        device.caller_wait(mark)
    pushed = ["cuCtxPushCurrent ctx0", "cuCtxPopCurrent"]
    assert [call for call in calls if "Push" in call or "Pop" in call][-4:] == pushed * 2
    assert [call for call in calls if "main" in call] == ["cuEventRecord main0 a", "cuStreamWaitEvent main0 a"]
    assert not device.has_passed(mark)
    device.host_wait(mark)
    assert device.has_passed(mark)
    device.synchronize()
    device.close()
    assert (machine.depth(), machine.violations) == (0, [])


def test_a_green_context_of_the_same_device_is_not_ours():
    """`_current` compares devices, so with a green context current nothing is pushed.

    Our stream and events are then made in the green context, whose streams cover its own work only.
    """
    machine = Machine()
    machine.green[0] = fake_driver.Context("green0", 0)
    with machine.tape() as calls:
        ContextDevice("cuda:0", machine.driver, machine.streams)
    assert "cuStreamCreateWithPriority 1 -5 ctx0" in calls


def test_a_context_is_popped_although_the_call_failed():
    machine = Machine(2)
    device = ContextDevice("cuda:1", machine.driver, machine.streams)
    machine.fails["cuEventRecord"] = 400
    with pytest.raises(TolariaInternalError, match="cuEventRecord"):
        device.mark()
    assert machine.depth() == 0


def test_queries_and_waits_are_relaxed_while_somebody_captures(machine):
    device = ContextDevice("cuda:0", machine.driver, machine.streams)
    event = device.mark()
    machine.capturing.add(-1)  # some other thread
    device.has_passed(event)
    device.host_wait(event)
    device.synchronize()
    assert machine.mode() == 0  # as before
    assert machine.violations == []


ASKING = {
    "cuEventQuery": lambda device, event: device.has_passed(event),
    "cuEventSynchronize": lambda device, event: device.host_wait(event),
    "cuStreamSynchronize": lambda device, event: device.synchronize(),
}


@pytest.mark.parametrize("call", ASKING)
def test_the_capture_mode_comes_back_although_the_call_failed(call, machine):
    device = ContextDevice("cuda:0", machine.driver, machine.streams)
    event = device.mark()
    machine.fails[call] = 400
    with pytest.raises(TolariaInternalError, match=call):
        ASKING[call](device, event)
    assert machine.mode() == 0


def test_without_the_relaxed_mode_a_capture_would_be_invalid(monkeypatch):
    """Red twin: the machine would have noticed."""
    machine = Machine()
    monkeypatch.setattr(machine.driver, "cuThreadExchangeStreamCaptureMode", lambda mode: (0, 0))
    device = ContextDevice("cuda:0", machine.driver, machine.streams)
    event = device.mark()
    machine.capturing.add(-1)
    for ask in (lambda: device.has_passed(event), lambda: device.host_wait(event), device.synchronize):
        machine.violations.clear()
        ask()
        assert machine.violations != []


# ------------------------------------------------------------ two devices


def test_two_devices_snapshot_and_rollback():
    machine = Machine(2)
    pair = Pair(machine)
    with machine.tape() as calls:
        pair.snapshot()
    pushes = {"cuCtxPushCurrent ctx1", "cuCtxPopCurrent"}  # to make events of the second device
    assert [call for call in calls if call not in pushes] == [
        "cuCtxRecordEvent ctx0 a",
        "cuCtxRecordEvent ctx1 b",
        # every copy stream behind the work of both devices
        "cuStreamWaitEvent own0 a",
        "cuStreamWaitEvent own0 b",
        "cuStreamWaitEvent own1 a",
        "cuStreamWaitEvent own1 b",
        "cuEventRecord own0 c",
        "cuEventRecord own1 d",
        "launch own0 capture",
        "launch own1 capture",
        "cuEventRecord own0 e",
        "cuEventRecord own1 f",
        "launch own0 capture",
        "launch own1 capture",
        "cuEventRecord own0 g",
        "cuEventRecord own1 h",
    ]
    with machine.tape() as calls:
        done = pair.rollback()
    assert [call for call in calls if call not in pushes] == [
        "cuCtxRecordEvent ctx0 a",
        "cuCtxRecordEvent ctx1 b",
        "cuStreamWaitEvent own0 a",
        "cuStreamWaitEvent own0 b",
        "cuStreamWaitEvent own1 a",
        "cuStreamWaitEvent own1 b",
        "cuEventRecord own0 c",
        "cuEventRecord own1 d",
        "launch own0 restore",
        "launch own1 restore",
        "launch own0 restore",
        "launch own1 restore",
        "cuEventRecord own0 e",
        "cuEventRecord own1 f",
        "cuEventRecord own0 g",
        "cuEventRecord own1 h",
        # all work of both devices behind the copies of both
        "cuCtxWaitEvent ctx0 g",
        "cuCtxWaitEvent ctx0 h",
        "cuCtxWaitEvent ctx1 g",
        "cuCtxWaitEvent ctx1 h",
    ]
    assert [name for name, _ in done.done] == ["cuda:0", "cuda:1"]
    del done
    pair.close()
    assert (machine.violations, machine.depth()) == ([], 0)


def test_page_locked_host_memory_is_waited_for_on_the_host():
    machine = Machine(2)
    pair = Pair(machine, pinned=True)
    with machine.tape() as calls:
        pair.snapshot()
    waits = [call for call in calls if call.startswith("cuEventSynchronize")]
    assert waits == ["cuEventSynchronize a", "cuEventSynchronize b"]
    assert calls.index(waits[1]) < calls.index("launch own0 capture")
    pair.close()


def test_a_foreign_section_makes_both_devices_wait_for_both():
    machine = Machine(2)
    pair = Pair(machine)
    pair.snapshot()
    with machine.tape() as calls:
        pair.driver.open_section(SectionKind.FOREIGN, False, 5.0)
        pair.driver.close_section(0)
    assert calls == [
        "cuCtxWaitEvent ctx0 a",
        "cuCtxWaitEvent ctx0 b",
        "cuCtxWaitEvent ctx1 a",
        "cuCtxWaitEvent ctx1 b",
    ]
    pair.close()
    assert machine.violations == []


def test_a_section_waits_for_the_copies_of_both_devices():
    machine = Machine(2)
    pair = Pair(machine)
    pair.snapshot()
    with machine.tape() as calls:
        pair.driver.open_section(SectionKind.WRITE, False, 5.0)
        pair.driver.close_section(0)
    waits = [call for call in calls if call.startswith("cuStreamWaitEvent")]
    assert waits == ["cuStreamWaitEvent main0 a", "cuStreamWaitEvent main1 b"]
    pair.close()
    assert (machine.violations, machine.depth()) == ([], 0)


def test_closing_waits_for_transfers_as_well(machine):
    """Their memory is given back next."""
    device, arrived = ContextDevice("cuda:0", machine.driver, machine.streams), []
    device.transfer(lambda: arrived.append(1))
    assert arrived == []
    device.close()
    assert arrived == [1]


class TorchDevices:
    """What of torch says which device and which streams are current."""

    def __init__(self, monkeypatch, current):
        self.device, self.streams = current, {0: (10, 0, 1), 1: (11, 1, 1)}
        monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: self.device, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_getCurrentStream", self.streams.__getitem__, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_setDevice", lambda index: setattr(self, "device", index), raising=False)
        monkeypatch.setattr(torch._C, "_cuda_setStream", self.set_stream, raising=False)

    def set_stream(self, stream_id, device_index, device_type):
        self.streams[device_index] = stream_id, device_index, device_type
        self.device = device_index  # as torch's does


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("how", ["use", "enqueue"])
@pytest.mark.parametrize("current", [0, 1])
def test_a_stream_is_current_on_its_device_the_device_stays_and_all_is_put_back(current, how, fails, monkeypatch):
    devices = TorchDevices(monkeypatch, current)
    streams, seen = TorchStreams(), []
    streams._known[1, 0x77] = 77, 1, 1
    before = dict(devices.streams)

    def work():
        seen.append((devices.device, devices.streams[1]))
        if fails:
            raise ZeroDivisionError

    with contextlib.suppress(ZeroDivisionError):
        if how == "enqueue":
            streams.enqueue(1, 0x77, work)
        else:
            with streams.use(1, 0x77):
                work()
    assert seen == [(current, (77, 1, 1))]
    assert (devices.device, devices.streams) == (current, before)

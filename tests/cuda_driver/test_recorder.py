"""The race oracle, fed from a run of the real governor over the simulated driver.

Streams, threads, device and host memory are those of a run on a GPU; that each stream is as late as it may be changes
nothing, since what counts is what orders two accesses. Every edge has its red twin: without it the same program has a
race, and the report names the two actors.
"""

import contextlib
import threading

import pytest
import torch
from cuda_driver.fake_driver import FakeDriver
from cuda_driver.test_known import named
from cuda_driver.test_tiers import SETTINGS, certified, drain
from torch import nn

from tolaria import capture
from tolaria.cuda import ContextDevice
from tolaria.driver import Driver
from tolaria.errors import TolariaError
from tolaria.operations import HostWait, Reserve, Transfer
from tolaria.ring import Tier
from tolaria.route import DeviceRoute
from tolaria.testing import taps
from tolaria.testing.recorder import Recorder

COPIES = "cpu tolaria's copies"
TRANSFERS = "cpu tolaria's transfers"


def nothing(*_):
    """In the place of an edge."""


def ok(*_):
    """In the place of a driver call."""
    return (0,)


class Subject:
    """A model, its optimizer, and three streams of the user's."""

    def __init__(self, machine, govern, **settings):
        self.machine = machine
        self.model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.governor = govern(self.model, self.optimizer, **settings)
        self.step()
        self.governor.snapshot().wait("sealed")
        machine.finish()
        self.a, self.b, self.c = (machine.side_stream() for _ in range(3))

    def on(self, stream):
        return self.machine.streams.on_side(stream)

    def step(self):
        self.model(torch.randn(8, 4)).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def write(self, stream):
        """What a custom writer does, in a section."""
        with torch.no_grad(), self.governor.using(), self.on(stream):
            for parameter in self.model.parameters():
                parameter.add_(1)

    def read(self, stream):
        with torch.no_grad(), self.governor.using(write=False), self.on(stream):
            return [parameter.clone() for parameter in self.model.parameters()]


@pytest.fixture
def subject(late, govern):
    return Subject(late, govern)


def run(subject, whole=True):
    """Writers, snapshots, rollbacks and readers, everybody on a stream of his own, ordered by the governor alone.

    Without `whole` the governor may notice by itself that something is wrong, which ends the run early.
    """
    with contextlib.suppress(*[] if whole else [TolariaError]), Recorder(subject.governor) as recorder:
        subject.write(subject.a)
        subject.governor.snapshot()
        with subject.on(subject.a):
            subject.step()
        subject.governor.execute_rollback()
        subject.read(subject.b)
        subject.governor.execute_rollback()
        subject.write(subject.c)
        info = subject.governor.snapshot()
        info.wait("sealed")
        subject.write(subject.c)
        subject.governor.execute_rollback(to=info).wait()
        subject.read(subject.a)
    return recorder


def pairs(recorder):
    """Which actors race: the earlier one and the later one."""
    return {(race.first.actor, race.second.actor) for race in recorder.races}


def test_the_shipped_governor_has_no_race(subject):
    recorder = run(subject)
    assert [str(race) for race in recorder.races] == []
    # and not because nothing was seen
    actors = {access.actor for access in recorder.ledger._accesses.values()}
    names = {f"cpu stream {stream.handle:#x}" for stream in (subject.a, subject.b, subject.c)}
    assert names | {COPIES} <= actors
    assert any(actor.startswith("thread") for actor in actors)  # reads the answers of the device
    places = {access.what for access in recorder.ledger._accesses.values()}
    assert {"aten.add_ of model.0.weight", "aten.clone of model.1.bias"} <= places


def with_known_streams(machine, govern):
    subject = Subject(machine, govern, barrier="streams")
    with subject.governor.using(write=False, streams=[named(each) for each in (subject.a, subject.b, subject.c)]):
        return subject


def test_the_streams_barrier_is_followed_as_well(late, govern):
    """And without what orders its copies the report names them."""
    recorder = run(with_known_streams(late, govern))
    assert [str(race) for race in recorder.races] == []
    assert COPIES in {access.actor for access in recorder.ledger._accesses.values()}


def test_the_streams_barrier_without_its_waits_races(late, govern, monkeypatch):
    subject = with_known_streams(late, govern)
    monkeypatch.setattr(ContextDevice, "stream_wait", nothing)
    assert any(later == COPIES for _, later in pairs(run(subject, whole=False)))


def record_of_nothing(self):
    return self._event()


REMOVED = {
    "pre barrier": ("context_record", ContextDevice.stream_record, ("a", COPIES)),
    "the copies' wait": ("stream_wait", nothing, ("a", COPIES)),
    "post barrier": ("context_wait", nothing, (COPIES, "b")),
    "the mark behind the copies": ("stream_record", record_of_nothing, (COPIES, "b")),
    "the next optimizer step's wait": ("caller_wait", nothing, (COPIES, "a")),
    "the host's wait for an answer": ("host_wait", nothing, (COPIES, "thread")),
}


@pytest.mark.parametrize("edge", REMOVED)
def test_each_removed_edge_is_a_race(subject, monkeypatch, edge):
    name, instead, expected = REMOVED[edge]
    monkeypatch.setattr(ContextDevice, name, instead)
    named = {letter: f"cpu stream {getattr(subject, letter).handle:#x}" for letter in "abc"}
    first, second = (named.get(actor, actor) for actor in expected)
    found = pairs(run(subject, whole=False))
    assert any(one.startswith(first) and other.startswith(second) for one, other in found), found


@pytest.mark.parametrize("call", ["cuCtxRecordEvent", "cuCtxWaitEvent", "cuEventRecord", "cuStreamWaitEvent"])
def test_a_call_that_is_not_made_orders_nothing(subject, monkeypatch, call):
    """What is recorded is the driver's calls, not what was meant by them."""
    monkeypatch.setattr(ContextDevice, "_call", leaving_out(call, ContextDevice._call))
    assert run(subject, whole=False).races


def leaving_out(name, original):
    def call(self, asked, *arguments):
        return None if asked == name else original(self, asked, *arguments)

    return call


def test_a_call_that_fails_orders_nothing(subject, monkeypatch):
    monkeypatch.setattr(FakeDriver, "cuCtxWaitEvent", lambda *_: (999,))
    monkeypatch.setattr(ContextDevice, "_check", nothing)
    assert any(first == COPIES for first, _ in pairs(run(subject, whole=False)))


def test_copies_that_go_to_the_callers_stream_are_seen_there(subject, monkeypatch):
    """Launched on a stream of the user's, they are no longer in front of the mark on the governor's own."""

    def elsewhere(self, work):
        self._streams.enqueue(self.index, subject.b.handle, work)

    monkeypatch.setattr(ContextDevice, "enqueue", elsewhere)
    found = pairs(run(subject, whole=False))
    stream = f"cpu stream {subject.b.handle:#x}"
    assert any(stream == first for first, _ in found), found


@pytest.mark.parametrize("how", ["nothing", "the stream", "a query", "a query of what has not passed"])
def test_what_the_host_waits_for_is_over(subject, how):
    """By a wait for the governor's stream, or a query that says yes."""
    port = next(iter(subject.governor._keeper.devices.values()))
    subject.machine.lag = 1 if how == "a query" else None
    with Recorder(subject.governor) as recorder:
        subject.governor.execute_rollback()
        event = port.stream_record()
        if how == "the stream":
            port.synchronize()
        elif how != "nothing":
            port.mark()  # so that the event is passed where the machine says so
            assert port.has_passed(event) == (how == "a query")
        recorder.did(reads=[subject.model[0].weight], what="the host")
    assert bool(recorder.races) == (how in ("nothing", "a query of what has not passed"))


def test_a_device_that_appears_later_is_followed(subject):
    with Recorder(subject.governor) as recorder:
        port = subject.governor._keeper.devices._open("cpu")
        event = port.stream_record()
        assert taps.event_key(event.handle) in recorder.ledger._events
    port.close()


def test_a_replay_writes_the_whole_train_state(subject):
    with Recorder(subject.governor) as recorder:
        with subject.on(subject.a):
            for listener in capture._live(capture._listeners):
                with listener.replaying():
                    pass
        recorder.did(reads=[subject.model[1].bias], what="the host")
    (race,) = recorder.races
    assert race.first.what == "replay of a graph of model.1.bias"
    assert race.first.actor == f"cpu stream {subject.a.handle:#x}"


# ------------------------------------------------------------ host threads and the gate


def between_the_barriers(subject, monkeypatch, work):
    """Another thread does it when the copies of a rollback are about to be submitted."""
    original, thread = DeviceRoute.restore, threading.Thread(target=work, name="late")

    def restore(route):
        if thread.ident is None:
            thread.start()
            if not subject.governor._keeper.driver.state.gate.waiting and work.gets_in:
                thread.join()
        original(route)

    monkeypatch.setattr(DeviceRoute, "restore", restore)
    with Recorder(subject.governor) as recorder:
        subject.governor.execute_rollback()
        thread.join()
        subject.governor.execute_rollback()
    return recorder


class Late:
    def __init__(self, subject, gets_in):
        self.subject, self.gets_in = subject, gets_in

    def __call__(self):
        self.subject.write(self.subject.a)


def test_a_writer_of_another_thread_stays_behind_the_gate(subject, monkeypatch):
    assert [str(race) for race in between_the_barriers(subject, monkeypatch, Late(subject, False)).races] == []


def test_without_sections_it_gets_between_the_barriers(subject, monkeypatch):
    monkeypatch.setattr(Driver, "open_section", lambda self, *_: self.state.epoch)
    found = pairs(between_the_barriers(subject, monkeypatch, Late(subject, True)))
    assert (f"cpu stream {subject.a.handle:#x}", COPIES) in found


# ------------------------------------------------------------ two tiers


@pytest.mark.parametrize("edge", [None, "the transfer's wait", "the host's wait"])
def test_a_transfer_runs_behind_the_copies_on_a_stream_of_its_own(late, govern, monkeypatch, edge):
    """And the host reads what was transferred when it has arrived: page-locked memory has actors of its own."""
    governor = govern(nn.Linear(4, 4), **SETTINGS)
    driver, slots = governor._keeper.driver, governor._keeper.vault.slots
    goal = next(index for index, slot in enumerate(slots) if slot.tier is Tier.HOST)
    with Recorder(governor) as recorder:
        governor.snapshot()
        source = next(slot.index for slot in governor._keeper.ring if slot.snapshot == 0)
        driver.perform(Reserve(goal, like=source))
        if edge == "the transfer's wait":
            monkeypatch.setattr(ContextDevice, "stream_record", record_of_nothing)  # what it is to wait for
        ((device, event),) = driver.perform(Transfer(source, goal))
        if edge != "the host's wait":
            driver.perform(HostWait(device, event))
        for flat in slots[goal].arena.flat.values():
            recorder.watch("a slot in main memory", flat)
        recorder.did(reads=list(slots[goal].arena.flat.values()), what="digest")
    expected = {
        None: set(),
        "the transfer's wait": {(COPIES, TRANSFERS)},
        "the host's wait": {(TRANSFERS, recorder.thread())},
    }
    assert pairs(recorder) == expected[edge]
    assert TRANSFERS in {access.actor for access in recorder.ledger._accesses.values()}


def test_a_run_that_drains_has_no_race(late, govern):
    model = nn.Linear(4, 4)
    governor = govern(model, **SETTINGS)
    with Recorder(governor) as recorder:
        for number in range(1, 5):
            certified(governor, model, number)
            drain(governor)
        governor.execute_rollback().wait()
    assert [str(race) for race in recorder.races] == []
    assert TRANSFERS in {access.actor for access in recorder.ledger._accesses.values()}


# ------------------------------------------------------------ the report


def test_the_report_shows_both_accesses_with_their_stacks_and_the_missing_edge(subject, monkeypatch):
    monkeypatch.setattr(ContextDevice, "context_wait", nothing)
    recorder = run(subject)
    stream = f"cpu stream {subject.b.handle:#x}"
    race = next(race for race in recorder.races if (race.first.actor, race.second.actor) == (COPIES, stream))
    first, second, missing = (line for line in str(race).splitlines() if not line.startswith(" "))
    assert first.startswith(f"first: {COPIES} writes cpu[")
    assert "Copy(slot" in first
    assert second.startswith(f"second: {stream} reads cpu[")
    assert "aten.clone of model." in second
    assert missing.startswith(f"missing: {stream} does not wait for {COPIES}")
    assert "execute_rollback" in race.first.stack
    assert "in read" in race.second.stack
    assert "races.py" not in race.second.stack


def test_afterwards_nothing_is_left_of_it(subject):
    port = next(iter(subject.governor._keeper.devices.values()))
    driver = subject.governor._keeper.driver
    before = port._driver, port._streams, dict(driver._table), threading.Thread.start, threading.Thread.join
    run(subject)
    assert (port._driver, port._streams, dict(driver._table), threading.Thread.start, threading.Thread.join) == before
    assert "_change" not in vars(driver)
    assert "_open" not in vars(subject.governor._keeper.devices)

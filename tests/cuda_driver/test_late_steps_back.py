"""Notes and the way back on a device that is late: call by call, and bit for bit."""

import gc
import math
from types import SimpleNamespace

import pytest
import torch
from cuda_driver.conftest import Run, freeze
from torch import nn

from tolaria import memory, noting
from tolaria.barriers import record
from tolaria.cuda import ContextDevice
from tolaria.errors import BudgetExceeded, NoSnapshot
from tolaria.optim import AdamW
from tolaria.ring import Tier

NOTE = [
    # everything launched so far, then what the optimizer does not leave behind
    "cuCtxRecordEvent ctx0 a",
    "cuStreamWaitEvent own0 a",
    "launch own0 capture",  # buffers
    "cuEventRecord own0 b",
    "cuEventRecord own0 c",  # there is no rest
]
BACK = [
    "cuCtxRecordEvent ctx0 a",
    "cuStreamWaitEvent own0 a",
    "cuEventRecord own0 b",  # when it began, for the report
    "launch own0 copy",  # what the optimizer has left behind
    "launch own0 restore",  # buffers
    "cuEventRecord own0 c",  # when it had copied
    "cuEventRecord own0 d",
    "cuCtxWaitEvent ctx0 d",
]


class Stepped(Run):
    def __init__(self):
        super().__init__()
        self.optimizer = AdamW(self.model.parameters(), lr=0.05, history=6)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 4, gamma=0.7)

    def parts(self):
        return self.model, self.optimizer

    def read(self, late):
        late.finish()
        return self.state()


@pytest.fixture
def stepped():
    return Stepped()


def governed(govern, run, **settings):
    return govern(*run.parts(), scheduler=run.scheduler, cadence=1000, past_steps=6, **settings)


def test_call_by_call(late, govern, stepped):
    governor = governed(govern, stepped)
    for batch in stepped.batches[:3]:
        stepped.step(governor, batch)
    with late.tape() as calls:
        governor._stepping._note()
    assert calls == NOTE
    with late.tape() as calls:
        report = governor.step_back(2)
    assert calls == BACK
    with late.tape() as calls:
        report.wait()
    assert [call.split()[0] for call in calls] == ["cuEventSynchronize", "cuEventElapsedTime"]
    assert (report.verified, report.barrier) == (None, "context")


def test_nothing_is_launched_for_others(late, govern, stepped):
    """Whoever asks for no notes pays for none."""
    governor = govern(*stepped.parts(), scheduler=stepped.scheduler, cadence=1000)
    stepped.step(governor, stepped.batches[0])
    loss = stepped.backward(stepped.batches[1])
    with late.tape() as calls:
        governor.step(loss=loss)
    assert [call.split()[0] for call in calls] == [
        "cuStreamWaitEvent",
        "cuStreamWaitEvent",
        "cuEventRecord",
        "cuEventQuery",
    ]


def test_writers_of_buffers_wait_for_a_note(late, govern, stepped):
    governor = governed(govern, stepped)
    stepped.step(governor, stepped.batches[0])
    late.finish()
    governor._stepping._note()
    assert late.pending(late.own()) == 1
    stepped.model(stepped.batches[1][0])
    assert late.pending(late.own()) == 0


def test_a_stream_that_becomes_known_later_waits_for_a_note(late, govern, stepped):
    governor = governed(govern, stepped, barrier="streams")
    stepped.step(governor, stepped.batches[0])
    late.finish()
    governor._stepping._note()
    side = late.side_stream()
    with late.tape() as calls, governor.using(streams=[SimpleNamespace(device="cpu", cuda_stream=side.handle)]):
        pass
    assert [call.split()[:2] for call in calls].count(["cuStreamWaitEvent", "side0.0"]) == 1


def test_what_was_found_in_a_snapshot_of_its_future_is_no_news(late, govern, stepped):
    governor = govern(*stepped.parts(), scheduler=stepped.scheduler, cadence=4, past_steps=6)
    governor.snapshot()
    for batch in stepped.batches[:3]:
        stepped.step(governor, batch)
    with torch.no_grad():
        next(stepped.model.buffers()).fill_(float("inf"))
    stepped.step(governor, stepped.batches[3])
    late.finish()
    governor._keeper.arrivals.seal(wait=True)  # as somebody does who waits for a snapshot of his own
    assert [finding.taken.completed for finding in governor._keeper.arrivals._findings if finding.found.nonfinite] == [
        4
    ]
    governor.step_back(1)
    for batch in stepped.batches[3:6]:
        stepped.step(governor, batch)
    assert (governor.statistics().panics, governor.statistics().rollbacks) == (0, 1)


@pytest.mark.parametrize("registered", [True, False])
def test_what_is_written_outside_of_sections_waits_for_a_note(registered, late, govern, stepped):
    governor = governed(govern, stepped)
    if registered:
        governor.register("average", nn.Linear(2, 2))
    stepped.step(governor, stepped.batches[0])
    with late.tape() as calls:
        governor._stepping._note()
    assert any(call.startswith("cuCtxWaitEvent") for call in calls) == registered
    state = governor._keeper.driver.state
    assert (state.all_done == (), state.latest) == (registered, ())
    assert (state.buffers_done == state.all_done) == registered  # else whoever only reads the rest waits for less
    with late.tape() as calls:  # everything waits by itself already
        stepped.model(stepped.batches[1][0])
    assert any(call.startswith("cuStreamWaitEvent") for call in calls) != registered


@pytest.mark.parametrize("barrier", ["context", "streams"])
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("steps", [1, 3])
def test_bit_for_bit(barrier, ordered, steps, late, govern, stepped, monkeypatch):
    """A red twin: nothing makes what follows wait for the copies."""
    if not ordered:
        monkeypatch.setattr(noting, "post_barrier", lambda ground, places: record(places))
    governor, seen = governed(govern, stepped, barrier=barrier), []
    for batch in stepped.batches[:6]:
        seen.append(stepped.read(late))
        stepped.step(governor, batch)
    last = stepped.read(late)
    governor.step_back(steps)
    for number in range(6 - steps, 6):
        if ordered:
            assert freeze([stepped.optimizer.state_dict()["param_groups"]]) == [seen[number][1]["param_groups"]]
        stepped.step(governor, stepped.batches[number])
    assert (stepped.read(late) == last) == ordered


def test_a_late_verdict_is_answered_from_a_note(late, govern, stepped):
    """The veto is known some steps later, and costs those steps."""
    late.lag = 2
    batches, told = stepped.batches[:20], []
    plain = Stepped()
    plain.batches = batches
    plain_governor = governed(govern, plain, rng="restore")
    for batch in plain_governor.watch(range(20)):
        plain.step(plain_governor, batches[batch])
    expected = plain.read(late)
    plain_governor.close()
    again = Stepped()
    governor = governed(govern, again, past_first=True, rng="restore", on_incident=told.append)
    struck = False
    for batch in governor.watch(range(20)):
        loss = again.backward(batches[batch])
        if batch == 11 and not struck:
            struck = True
            next(again.model.parameters()).grad.fill_(float("nan"))
        governor.step(loss=loss)
    assert again.read(late) == expected
    (incident,) = told
    assert (incident.restored_step, incident.tier, incident.action) == (11, "past", "replay")
    assert 2 <= incident.steps_lost <= 6


def test_two_models_on_one_device_do_not_meet(late, govern, stepped):
    governor = governed(govern, stepped)
    other = nn.Linear(2, 2)
    govern(other, torch.optim.SGD(other.parameters(), lr=0.1))
    for batch in stepped.batches[:2]:
        stepped.step(governor, batch)
    governor.step_back(1)
    with pytest.raises(NoSnapshot):
        governor.step_back(4)


@pytest.mark.parametrize("missing", [0, 1])
def test_a_device_budget_holds_the_notes_as_well(missing, late, govern, stepped):
    """They stay beside the train state, so it is the slots that go to main memory."""
    loose = governed(govern, stepped, slots=3)
    for batch in stepped.batches[:8]:
        stepped.step(loose, batch)
    survey, held = loose._keeper.state.survey(), loose._keeper.notes.held_bytes()
    needed = 3 * sum(-(-storage.key[2] // 64) * 64 for storage in survey.leaves.storages) + held["cpu"]
    assert (loose.capabilities().tier, loose.capabilities().tier_reason) == ("device", "")
    loose.close()
    governor = governed(govern, stepped, slots=3, device_budget=needed - missing)
    assert governor.capabilities().tier == ("host" if missing else "device")
    assert ("of notes" in governor.capabilities().tier_reason) == bool(missing)


def test_a_governor_that_found_no_room_holds_no_device(late, govern, stepped, monkeypatch):
    """At once, and not when the collector comes by."""
    opened, open_port = [], ContextDevice.__init__
    monkeypatch.setattr(ContextDevice, "__init__", lambda self, *args: opened.append(self) or open_port(self, *args))
    gc.disable()
    try:
        with pytest.raises(BudgetExceeded):
            governed(govern, stepped, tier="device", device_budget=1)
        assert [port._stream for port in opened] == [None]
    finally:
        gc.enable()


def test_what_notes_have_taken_of_a_device_is_counted_once(late, govern, stepped, monkeypatch):
    """It is in the peak of what is in use already."""
    governor = governed(govern, stepped, slots=3)
    governor.snapshot()
    for batch in stepped.batches[:8]:
        stepped.step(governor, batch)
    governor.snapshot()
    vault, held = governor._keeper.vault, governor._keeper.notes.held_bytes()["cpu"]
    survey, others = governor._keeper.state.survey(), 1000
    used = others + held + vault.held_bytes()["cpu"]
    slots = 3 * sum(-(-storage.key[2] // 64) * 64 for storage in survey.leaves.storages)
    for missing in (0, 20):
        total = math.ceil((others + held + slots - missing) / 0.85)
        monkeypatch.setattr(memory, "device_memory", lambda device, total=total: (total, used))
        vault._planned = None
        vault.lay_plan(survey)
        assert vault.plan.tier is (Tier.HOST if missing else Tier.DEVICE)

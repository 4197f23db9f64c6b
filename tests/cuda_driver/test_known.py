"""The `streams` barrier on the hostile machine: which calls it makes, what they are for, and whom they leave alone."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from types import SimpleNamespace

import pytest
import torch
from cuda_driver.fake_driver import Stream
from torch import nn

from tolaria import GovernorConfig, UnsupportedState, UsageError
from tolaria.cuda import ContextDevice
from tolaria.device import DeviceSet
from tolaria.group import GovernorGroup
from tolaria.operations import SectionKind


@pytest.fixture
def streams(govern):
    """Builds governors with the `streams` barrier."""
    return lambda *args, **settings: govern(*args, barrier="streams", **settings)


def named(stream: Stream) -> SimpleNamespace:
    """What `torch.cuda.Stream` shows of itself; the fake's device is called "cpu"."""
    return SimpleNamespace(device="cpu", cuda_stream=stream.handle)


def filled(number: float) -> nn.Linear:
    model = nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        model.weight.fill_(number)
    return model


def fill(tensor: torch.Tensor, number: float):
    return lambda: tensor.detach().fill_(number)


def value(tensor: torch.Tensor) -> float:
    first = float(tensor.detach().reshape(-1)[0])
    return first if bool((tensor.detach() == first).all()) else float("nan")


# ------------------------------------------------------------ calls

PRE = ["cuEventRecord main0 a", "cuEventRecord side0.0 b", "cuStreamWaitEvent own0 a", "cuStreamWaitEvent own0 b"]


def test_the_calls_of_a_snapshot_and_a_rollback(late, streams):
    governor = streams(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    assert governor.capabilities().barrier == "streams"
    side = late.side_stream()
    with late.tape() as calls, governor.using(streams=[named(side)]):
        pass
    assert calls == []  # nothing to wait for yet
    with late.tape() as calls:
        governor.snapshot()
    assert calls == [
        *PRE,
        "cuEventRecord own0 c",
        "launch own0 capture",
        "cuEventRecord own0 d",
        "launch own0 capture",
        "cuEventRecord own0 e",
        "launch own0 read",
        "launch own0 read",
        "launch own0 _send",
        "cuEventRecord own0 f",
    ]
    with late.tape() as calls:
        governor.execute_rollback()
    assert calls == [
        *PRE,
        "cuEventRecord own0 c",
        "launch own0 restore",
        "launch own0 restore",
        "cuEventRecord own0 d",
        "cuEventRecord own0 e",
        "cuStreamWaitEvent main0 e",
        "cuStreamWaitEvent side0.0 e",
        "launch own0 read",
        "cuEventRecord own0 f",
        "launch own0 read",
        "cuEventRecord own0 g",
        "cuEventRecord own0 h",
    ]


@pytest.mark.parametrize(
    ("kind", "event"), [(SectionKind.FORWARD, 2), (SectionKind.WRITE, 3), (SectionKind.READ, None)]
)
def test_a_section_on_a_known_stream_waits_for_what_it_may_write(kind, event, late, streams):
    governor = streams(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    start = len(late.calls)
    governor.snapshot()  # the caller's stream is known from here on
    recorded = [call.split()[-1] for call in late.calls[start:] if call.startswith("cuEventRecord own0")]
    late.clear()
    with governor._keeper.sections.section(kind):
        pass
    assert late.calls == ([] if event is None else [f"cuStreamWaitEvent main0 {recorded[event - 1]}"])


@pytest.mark.parametrize("kind", list(SectionKind))
def test_a_section_on_a_new_stream_waits_for_all_that_the_governor_has_done(kind, late, streams):
    governor = streams(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    governor.snapshot()
    start = len(late.calls)
    governor.execute_rollback()
    last = [call.split()[-1] for call in late.calls[start:] if call.startswith("cuEventRecord own0")][-1]
    side = late.side_stream()
    late.clear()
    with late.streams.on_side(side), governor._keeper.sections.section(kind):
        pass
    assert f"cuStreamWaitEvent side0.0 {last}" in late.calls
    assert [call for call in late.calls if "side" in call] == [f"cuStreamWaitEvent side0.0 {last}"]
    assert ("cpu", side.handle) in governor._keeper.driver.state.streams


def test_a_neighbour_hears_nothing(late, streams):
    """Neither its stream nor the device as a whole is asked for anything."""
    mine, theirs = late.side_stream(), late.side_stream()
    late.launch(theirs, lambda: None)
    model = filled(1)
    with late.streams.on_side(mine):
        governor = streams(model)
        late.clear()
        with governor.using():
            pass
        governor.snapshot()
        governor.execute_rollback()
        with governor.using():
            pass
    assert [call for call in late.calls if "Ctx" in call.split()[0] and "Current" not in call] == []
    assert [call for call in late.calls if theirs.name in call or "main0" in call] == []
    assert late.pending(theirs) == 1


# ------------------------------------------------------------ bytes


def a_snapshot_holds_work_of_a_known_stream(machine, streams):
    model = filled(1)
    governor = streams(model)
    side = machine.side_stream()
    with governor.using(streams=[named(side)]):
        machine.launch(side, fill(model.weight, 5))
    governor.snapshot()
    with governor.using(), torch.no_grad():
        model.weight.fill_(9)
    machine.finish()
    governor.execute_rollback()
    machine.finish()
    return value(model.weight) == 5


def a_snapshot_holds_nothing_written_after_it_on_a_known_stream(machine, streams):
    model = filled(1)
    governor = streams(model)
    side = machine.side_stream()
    with governor.using(write=False, streams=[named(side)]):
        pass
    governor.snapshot()
    with governor.using():
        machine.launch(side, fill(model.weight, 2))
    machine._force(side, side.launched)  # that stream alone moves on
    governor.execute_rollback()
    machine.finish()
    return value(model.weight) == 1


def a_stream_that_becomes_known_reads_what_was_restored(machine, streams):
    model, seen = filled(1), []
    governor = streams(model)
    governor.snapshot()
    with governor.using(), torch.no_grad():
        model.weight.fill_(2)
    governor.execute_rollback()
    side = machine.side_stream()
    with governor.using(write=False, streams=[named(side)]):
        machine.launch(side, lambda: seen.append(value(model.weight)))
    machine._force(side, side.launched)
    return seen == [1]


def a_stream_that_writes_for_the_first_time_spares_the_snapshot(machine, streams):
    model = filled(1)
    governor = streams(model)
    governor.snapshot()
    side = machine.side_stream()
    with machine.streams.on_side(side), governor._keeper.sections.section(SectionKind.WRITE):
        machine.launch(side, fill(model.weight, 2))
    machine._force(side, side.launched)
    governor.execute_rollback()
    machine.finish()
    return value(model.weight) == 1


def a_rollback_covers_what_its_caller_has_launched(machine, streams):
    model = filled(1)
    governor = streams(model)
    governor.snapshot()
    side = machine.side_stream()
    with machine.streams.on_side(side):
        machine.launch(side, fill(model.weight, 7))  # no section
        governor.execute_rollback()
    machine.finish()
    return value(model.weight) == 1


def a_snapshot_waits_for_a_transfer_that_was_given_up(machine, streams):
    model, order = filled(1), []
    governor = streams(model)
    (port,) = governor._keeper.devices.values()
    port.transfer(lambda: order.append("transfer"))
    governor.snapshot()
    own = machine.by_handle[int(port._stream)]
    machine._force(own, own.launched)  # that stream alone moves on
    return order == ["transfer"]


SCENARIOS = [
    a_snapshot_holds_work_of_a_known_stream,
    a_snapshot_holds_nothing_written_after_it_on_a_known_stream,
    a_stream_that_becomes_known_reads_what_was_restored,
    a_stream_that_writes_for_the_first_time_spares_the_snapshot,
    a_rollback_covers_what_its_caller_has_launched,
    a_snapshot_waits_for_a_transfer_that_was_given_up,
]


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.__name__)
def test_green(scenario, late, streams):
    assert scenario(late, streams)


def nothing(*_: object) -> None:
    return None


MUTANTS = [
    ("known_record", ContextDevice.stream_record, a_snapshot_holds_work_of_a_known_stream),
    ("known_record", ContextDevice.stream_record, a_rollback_covers_what_its_caller_has_launched),
    ("known_wait", nothing, a_snapshot_holds_nothing_written_after_it_on_a_known_stream),
    ("known_wait", nothing, a_stream_that_becomes_known_reads_what_was_restored),
    ("known_wait", nothing, a_stream_that_writes_for_the_first_time_spares_the_snapshot),
    ("caller_stream", lambda self: 0, a_rollback_covers_what_its_caller_has_launched),
    ("transfer_record", nothing, a_snapshot_waits_for_a_transfer_that_was_given_up),
]


def _known_record_of_nothing(self, stream):
    return self.stream_record()


@pytest.mark.parametrize(
    ("method", "mutant", "scenario"), MUTANTS, ids=[f"{method}-{s.__name__}" for method, _, s in MUTANTS]
)
def test_red(method, mutant, scenario, late, streams, monkeypatch):
    if method == "known_record":
        mutant = _known_record_of_nothing
    with monkeypatch.context() as patch:
        patch.setattr(ContextDevice, method, mutant)
        assert not scenario(late, streams)


def test_where_somebody_else_captures_the_host_waits(late, streams):
    """A stream that a section names may be the one that is captured: no call may touch it."""
    model = filled(1)
    governor = streams(model)
    side = late.side_stream()
    with governor.using(write=False, streams=[named(side)]):
        pass
    governor.snapshot()
    driver = governor._keeper.driver
    driver.state = dataclasses.replace(driver.state, captures=((1, -1),))
    late.clear()
    with governor.using(streams=[named(side)]):
        assert [call.split()[0] for call in late.calls if "Thread" not in call] == ["cuEventSynchronize"]
    driver.end_capture(1)


def test_a_capture_makes_its_stream_known_before_it_begins(late, streams):
    governor = streams(filled(1))
    governor.snapshot()
    driver, side = governor._keeper.driver, late.side_stream()
    with late.streams.on_side(side):
        driver.begin_capture(1, threading.get_ident(), False, 5.0)
        late.capturing.add(threading.get_ident())
        late.clear()
        with governor._keeper.sections.section(SectionKind.WRITE):
            assert late.calls == []
        late.capturing.clear()
        driver.end_capture(1)
    assert ("cpu", side.handle) in driver.state.streams


# ------------------------------------------------------------ whole runs, and who is refused


def test_a_run_with_a_panic_is_the_run_without(late, streams, make_run):
    late.lag = 3
    clean = make_run()
    clean.plain()
    wanted = clean.state()
    run = make_run()
    with streams(run.model, run.optimizer, scheduler=run.scheduler, cadence=3, probation=2) as governor:
        side = late.side_stream()
        with governor.using(write=False, streams=[named(side)]):
            pass
        run.train(governor, run.poisoned(20))
        late.finish()
        assert governor.rollbacks == 2
        assert run.state() == wanted


def test_a_group_names_the_streams_of_each(late, make_run):
    with GovernorGroup(GovernorConfig(barrier="streams", host_slots=0, scrub_every=0)) as group:
        mine = [late.side_stream() for _ in range(2)]
        for stream in mine:
            run = make_run()
            group.add(run.model, run.optimizer, streams=[named(stream)])
        for number, stream in enumerate(mine):
            known = group[number]._keeper.driver.state.streams
            assert ("cpu", stream.handle) in known
            assert ("cpu", mine[1 - number].handle) not in known


def test_a_stream_of_another_device_is_refused_by_name(late, streams):
    governor = streams(filled(1))
    stranger = SimpleNamespace(device="cuda:7", cuda_stream=3)
    with pytest.raises(UsageError, match="cuda:7"), governor.using(streams=[stranger]):
        pass
    with pytest.raises(UsageError, match="expected CUDA streams of cpu"), governor.using(streams=["a stream"]):
        pass
    assert governor._keeper.driver.state.streams == ()


def test_other_barriers_take_names_and_need_none(late, govern):
    governor = govern(filled(1))
    with governor.using(streams=[named(late.side_stream())]):
        pass
    assert governor._keeper.driver.state.streams is None


def test_without_events_it_is_refused(monkeypatch):
    monkeypatch.setattr("tolaria.device.find_driver", lambda: (None, "there is no driver"))
    ports = DeviceSet("streams")
    with pytest.raises(UnsupportedState, match='barrier="streams" was asked for, but there is no driver'):
        ports._choose("cuda")


def test_an_error_on_the_way_leaves_the_stream_unknown(late, streams):
    governor = streams(filled(1))
    governor.snapshot()
    side = late.side_stream()
    late.fails["cuStreamWaitEvent"] = 400
    with contextlib.suppress(Exception), governor.using(write=False, streams=[named(side)]):
        raise AssertionError("it opened")
    late.fails.clear()
    state = governor._keeper.driver.state
    assert ("cpu", side.handle) not in state.streams
    assert state.ordering == 0
    assert state.gate.sections == ()

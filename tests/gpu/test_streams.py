"""Writers held back on many streams of another thread, readers on others right after a rollback returns.

Every test first shows that it can fail: without the barrier the same program is torn, every time.
"""

import threading

import pytest
import torch
from torch import nn

from tolaria import TolariaGovernor, judge
from tolaria.cuda import ContextDevice
from tolaria.testing.gates import Gate, gets_through
from tolaria.testing.picture import NEW, OLD, Picture, held, no_wait, raw_stream, settle

pytestmark = pytest.mark.cuda


@pytest.fixture
def picture(request):
    built = []

    def build(num_streams):
        picture = Picture(num_streams)
        built.append(picture)
        picture.warm_up()
        assert gets_through(picture.control)
        return picture

    yield build
    for picture in built:
        picture.governor.close()


def roll_back_behind_gates(picture, gate):
    """Writers gated, rollback submitted, reader launched. Answers what the reader saw and what is left at the end."""
    picture.write_gated(gate)
    assert gets_through(picture.control), "the control stream shares a queue with a gated one: nothing can be shown"
    picture.governor.execute_rollback()
    is_back_early = not gate.is_open
    seen = picture.read(picture.reader)
    gate.open()
    left = picture.values()  # waits for everything, the reader included
    return seen.tolist(), left, is_back_early


@pytest.mark.parametrize("num_streams", [1, 4, 8, 30])
def test_nothing_is_lost_and_nothing_torn(picture, num_streams):
    built = picture(num_streams)
    for _ in range(8):
        with Gate() as gate:
            seen, left, is_back_early = roll_back_behind_gates(built, gate)
        assert is_back_early, "the host waited for the writers"
        assert not gate.was_forced
        assert seen == left == [OLD] * 4


@pytest.mark.parametrize("num_streams", [1, 4, 8, 30])
def test_without_the_pre_barrier_the_rollback_is_lost_every_time(picture, num_streams, monkeypatch):
    built = picture(num_streams)
    # an event of the governor's own, idle stream in the place of one that covers all streams
    monkeypatch.setattr(ContextDevice, "context_record", ContextDevice.stream_record)
    monkeypatch.setattr(ContextDevice, "context_wait", no_wait)
    for _ in range(8):
        with Gate() as gate:
            built.write_gated(gate)
            built.governor.execute_rollback()
            settle(built.governor, "context")
            gate.open()
            assert built.values() == [OLD, OLD, NEW, NEW]
        built.governor.execute_rollback().wait()


def test_readers_and_writers_after_a_rollback_wait_for_its_copies(picture):
    """The post edge: the copies are held back, so whoever does not wait for them is seen."""
    built = picture(4)
    with Gate() as gate, held(gate):
        built.spoil()
        built.governor.execute_rollback()
        seen = built.read(built.reader)
        assert not gate.is_open
        built.writers[0].wait_stream(built.reader)
        with torch.no_grad(), built.governor.using(), torch.cuda.stream(built.writers[0]):
            built.model[0].add_(10)
        gate.open()
        assert built.values() == [OLD + 10, OLD + 10, OLD, OLD]
        assert seen.tolist() == [OLD] * 4


def test_without_the_post_barrier_a_reader_sees_the_past(picture, monkeypatch):
    built = picture(4)
    monkeypatch.setattr(ContextDevice, "context_wait", no_wait)
    with Gate() as gate, held(gate):
        built.spoil()
        built.governor.execute_rollback()
        seen = built.read(built.reader)
        built.reader.synchronize()
        assert not gate.is_open
        assert seen.tolist() == [NEW] * 4
        gate.open()
        assert built.values() == [OLD] * 4


def test_a_stream_made_after_the_rollback_waits_as_well(picture):
    built = picture(1)
    with Gate() as gate, held(gate):
        built.spoil()
        built.governor.execute_rollback()
        seen = built.read(raw_stream())
        assert not gate.is_open
        gate.open()
        torch.cuda.synchronize()
        assert seen.tolist() == [OLD] * 4


def take_behind_gates(picture, gate):
    """A snapshot while a step is half done on gated streams, then the next step. Answers what was snapshotted."""
    picture.write_gated(gate)
    info = picture.governor.snapshot()
    is_back_early = not gate.is_open
    with torch.no_grad(), picture.governor.using(), torch.cuda.stream(picture.reader):
        for parameter in picture.model:
            parameter.fill_(7.0)
    gate.open()
    torch.cuda.synchronize()
    picture.governor.execute_rollback(to=info).wait()
    return picture.values(), is_back_early


@pytest.mark.parametrize("num_streams", [1, 8])
def test_a_snapshot_holds_the_whole_step_and_nothing_of_the_next(picture, num_streams):
    built = picture(num_streams)
    with Gate() as gate:
        taken, is_back_early = take_behind_gates(built, gate)
    assert is_back_early
    assert taken == [NEW] * 4


def test_a_snapshot_without_the_pre_barrier_is_torn(picture, monkeypatch):
    built = picture(1)
    monkeypatch.setattr(ContextDevice, "context_record", ContextDevice.stream_record)
    with Gate() as gate:
        built.write_gated(gate)
        info = built.governor.snapshot()
        settle(built.governor, "context")
        gate.open()
        torch.cuda.synchronize()
        monkeypatch.undo()
        built.governor.execute_rollback(to=info).wait()
        assert built.values() == [NEW, NEW, OLD, OLD]


def test_a_snapshot_whose_next_writer_does_not_wait_is_torn(picture):
    """The lazy edge: the copies are held back, and the next step overwrites what they have not read yet."""
    for protected in (True, False):
        built = picture(1)
        with Gate() as gate, held(gate), pytest.MonkeyPatch.context() as patch:
            info = built.governor.snapshot()
            if not protected:
                patch.setattr(ContextDevice, "context_wait", no_wait)
            with torch.no_grad(), built.governor.using(), torch.cuda.stream(built.reader):
                for parameter in built.model:
                    parameter.fill_(NEW)
            if not protected:
                built.reader.synchronize()
            assert not gate.is_open
            gate.open()
            torch.cuda.synchronize()
        built.governor.execute_rollback(to=info).wait()
        assert built.values() == [OLD if protected else NEW] * 4
        built.governor.close()


def test_the_next_optimizer_step_waits_on_its_own_stream():
    """The same edge for an optimizer, whose stream alone waits; without it the snapshot holds the next step."""
    for protected in (True, False):
        model = nn.ParameterList([nn.Parameter(torch.full((1 << 20,), OLD, device="cuda")) for _ in range(2)])
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        stream = torch.cuda.Stream()
        with TolariaGovernor(model, optimizer, detector=judge.non_finite()) as governor:
            for parameter in model:
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            governor.snapshot(grads="drop").wait("sealed")
            for parameter in model:
                parameter.grad = torch.full_like(parameter, OLD - NEW)
            torch.cuda.synchronize()
            with Gate() as gate, held(gate), pytest.MonkeyPatch.context() as patch:
                info = governor.snapshot(grads="drop")
                if not protected:
                    patch.setattr(ContextDevice, "caller_wait", no_wait)
                with torch.cuda.stream(stream):
                    optimizer.step()
                if not protected:
                    stream.synchronize()
                assert not gate.is_open
                gate.open()
                torch.cuda.synchronize()
            governor.execute_rollback(to=info).wait()
            values = [float(v) for p in model for v in p.detach().aminmax()]
            assert values == [OLD if protected else NEW] * 4


def test_slots_of_a_governor_that_is_dropped_outlive_its_copies(picture):
    """The memory of a slot is given to nobody while a copy into it is under way."""
    import gc

    built = picture(1)
    threads = []
    with Gate() as gate, held(gate):
        built.governor.snapshot()
        opener = threading.Timer(0.2, gate.open)  # closing waits for the copies, which wait for the gate
        opener.start()
        threads.append(opener)
        built.governor.close()
        assert gate.is_open
        gc.collect()
        others = [torch.full((1 << 22,), 5.0, device="cuda") for _ in range(8)]
    assert all(bool((other == 5.0).all()) for other in others)
    for thread in threads:
        thread.join()

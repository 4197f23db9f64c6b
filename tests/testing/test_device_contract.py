"""`check_device`: every port of ours keeps its contract, and a port that breaks one sentence is told which."""

import contextlib

import pytest
import torch
from cuda_driver.fake_driver import Machine
from testing.bench import FakeBench

from tolaria.cuda import ContextDevice
from tolaria.device import BlockingDevice, CpuDevice
from tolaria.errors import UnsupportedState
from tolaria.operations import Barrier
from tolaria.testing.contract import ContractBroken
from tolaria.testing.device_contract import RULES, check_device


def context(port=ContextDevice):
    machine = Machine()
    check_device(port("cuda:0", machine.driver, machine.streams), FakeBench(machine))
    assert machine.violations == []


class LateBlocking(BlockingDevice):
    """The shipped port, over a device of which every stream is lazy."""

    def __init__(self, bench):
        super().__init__("cuda:0")
        self.bench = bench

    def enqueue(self, work):
        self.bench.launch(self.bench.machine.mains[0], lambda: super(LateBlocking, self).enqueue(work))

    def transfer(self, work):
        return super().transfer(lambda: self.bench.launch(self.bench.machine.mains[0], work))

    @contextlib.contextmanager
    def on_stream(self):
        main = self.bench.machine.mains[0]
        self.bench.machine.by_handle.setdefault(main.handle, main)
        with super().on_stream(), self.bench.machine.streams.use(0, main.handle):
            yield


def blocking(monkeypatch, port=LateBlocking):
    bench = FakeBench(Machine())

    def synchronize(device):
        assert device == torch.device("cuda:0")
        for stream in bench.machine.all_streams():
            bench.wait(stream)

    monkeypatch.setattr(torch.accelerator, "synchronize", synchronize)
    check_device(port(bench), bench)


def test_the_cpu_port_keeps_its_contract():
    check_device(CpuDevice())


def test_the_context_port_keeps_its_contract():
    context()


def test_the_blocking_port_keeps_its_contract(monkeypatch):
    blocking(monkeypatch)


def test_where_nothing_can_be_held_back_nothing_is_shown():
    with pytest.raises(UnsupportedState, match="xpu"):
        check_device(BlockingDevice("xpu:0"))


# ---------------------------------------------------------------- hostile ports: one sentence each


def _hostile_hosts():
    class Named(CpuDevice):
        def __init__(self):
            super().__init__("processor")

    class Kindless(CpuDevice):
        barrier = "host"

    class Incapable(CpuDevice):
        copy = None

    class Twice(CpuDevice):
        def enqueue(self, work):
            work()
            work()

    class Deaf(CpuDevice):
        def enqueue(self, work):
            with contextlib.suppress(Exception):
                work()

    class DeafInside(CpuDevice):
        def on_stream(self):
            return contextlib.suppress(Exception)

    class Untransferred(CpuDevice):
        def transfer(self, work):
            return None

    class Eventful(CpuDevice):
        def transfer(self, work):
            work()
            return "an event"

    class Swapped(CpuDevice):
        def copy(self, destinations, sources):
            super().copy(destinations, [*sources[:-2], *(source.flip(0) for source in sources[-2:])])

    class Short(CpuDevice):
        def copy(self, destinations, sources):
            super().copy([d[:-1] for d in destinations if len(d) > 1], [s[:-1] for s in sources if len(s) > 1])

    class Wide(CpuDevice):
        def copy(self, destinations, sources):
            super().copy(destinations, sources)
            for destination in destinations:
                torch.empty(0, dtype=torch.uint8).set_(destination.untyped_storage())[0] = 0

    class Destructive(CpuDevice):
        def copy(self, destinations, sources):
            super().copy(destinations, sources)
            for source in sources:
                source.zero_()

    class Once(CpuDevice):
        closed = False

        def close(self):
            assert not self.closed
            self.closed = True

    return [
        (Named, "name"),
        (Kindless, "barrier"),
        (Incapable, "barrier"),
        (Twice, "enqueue"),
        (Deaf, "enqueue: errors"),
        (DeafInside, "on_stream: errors"),
        (Untransferred, "transfer"),
        (Eventful, "transfer: end"),
        (Swapped, "copy"),
        (Short, "copy"),
        (Wide, "copy: nothing else"),
        (Destructive, "copy: nothing else"),
        (Once, "close: twice"),
    ]


def _hostile_contexts():
    def without(name, answer=None):
        return type(f"Without_{name}", (ContextDevice,), {name: lambda self, *_: answer})

    class Twice(ContextDevice):
        def enqueue(self, work):
            super().enqueue(work)
            super().enqueue(work)

    class Backwards(ContextDevice):
        """Every second launch overtakes the one before."""

        kept = None

        def enqueue(self, work):
            if self.kept is None:
                self.kept = work
            else:
                kept, self.kept = self.kept, None
                super().enqueue(work)
                super().enqueue(kept)

        def synchronize(self):
            if self.kept is not None:
                kept, self.kept = self.kept, None
                super().enqueue(kept)
            super().synchronize()

    class Deaf(ContextDevice):
        def enqueue(self, work):
            def quiet():
                with contextlib.suppress(Exception):
                    work()

            super().enqueue(quiet)

    class ElsewhereInside(ContextDevice):
        def on_stream(self):
            return contextlib.nullcontext()

    class DeafInside(ContextDevice):
        @contextlib.contextmanager
        def on_stream(self):
            with contextlib.suppress(Exception), super().on_stream():
                yield

    class Sticky(ContextDevice):
        @contextlib.contextmanager
        def on_stream(self):
            try:
                with super().on_stream():
                    yield
            except BaseException:
                self._streams._current()[0].append(int(self._stream))
                raise

    class Early(ContextDevice):
        """A transfer that does not stand behind the governor's copies."""

        def transfer(self, work):
            with self._current(self._context):
                self._second = self._second or self._take_stream()
            self._streams.enqueue(self.index, int(self._second), work)
            event = self._event()
            self._call("cuEventRecord", event.handle, self._second)
            return event

    class Endless(ContextDevice):
        def transfer(self, work):
            super().transfer(work)

    class InTheWay(ContextDevice):
        def transfer(self, work):
            self.enqueue(work)
            return self.stream_record()

    class Local(ContextDevice):
        """The event of one stream in the place of one of all."""

        def context_record(self):
            return self.stream_record()

    class Narrow(ContextDevice):
        """Only one of the user's streams is told to wait."""

        def context_wait(self, event):
            self.caller_wait(event)

    class Greedy(ContextDevice):
        def stream_record(self):
            return super().context_record()

    class Empty(ContextDevice):
        """An event of nothing: the port's second stream is idle."""

        def stream_record(self):
            with self._current(self._context):
                idle, event = self._take_stream(), self._event()
            self._call("cuEventRecord", event.handle, idle)
            return event

    class Broad(ContextDevice):
        def caller_wait(self, event):
            self.context_wait(event)

    class Marker(ContextDevice):
        def mark(self):
            return self.stream_record()

    class Patient(ContextDevice):
        """Answers only when the device is there."""

        def has_passed(self, event):
            self.host_wait(event)
            return True

    class Anxious(ContextDevice):
        def context_record(self):
            event = super().context_record()
            self.host_wait(event)
            return event

    class Negative(ContextDevice):
        def elapsed_ms(self, began, ended):
            return -super().elapsed_ms(began, ended)

    class Careless(ContextDevice):
        def close(self):
            pass

    class Once(ContextDevice):
        def close(self):
            assert self._stream is not None
            super().close()

    return [
        (Twice, "enqueue"),
        (Backwards, "enqueue: order"),
        (Deaf, "enqueue: errors"),
        (ElsewhereInside, "on_stream"),
        (DeafInside, "on_stream: errors"),
        (Sticky, "on_stream: errors"),
        (without("synchronize"), "synchronize"),
        (Early, "transfer"),
        (Endless, "transfer: end"),
        (InTheWay, "transfer: alone"),
        (Local, "context_record"),
        (without("context_wait"), "context_wait"),
        (Narrow, "context_wait"),
        (Greedy, "stream_record: alone"),
        (Empty, "stream_record"),
        (without("stream_wait"), "stream_wait"),
        (without("caller_wait"), "caller_wait"),
        (Broad, "caller_wait: alone"),
        (without("host_wait"), "host_wait"),
        (Marker, "mark"),
        (without("has_passed", False), "has_passed"),
        (without("has_passed", True), "has_passed"),
        (Patient, "has_passed"),
        (Anxious, "waits for nothing"),
        (Negative, "elapsed_ms"),
        (Careless, "close"),
        (Once, "close: twice"),
    ]


def _hostile_blockings():
    class Hasty(LateBlocking):
        def synchronize(self):
            """Waits for nothing."""

    class Own(LateBlocking):
        def synchronize(self):
            """Waits for the default stream alone."""
            self.bench.wait(self.bench.machine.mains[0])

    class Unawaited(LateBlocking):
        def transfer(self, work):
            self.enqueue(work)

    class Incapable(LateBlocking):
        barrier = Barrier.CONTEXT

    return [
        (Hasty, "synchronize"),
        (Own, "synchronize: all"),
        (Unawaited, "transfer: end"),
        (Incapable, "barrier"),
    ]


def named(port, rule):
    return pytest.param(port, rule, id=f"{port.__name__}: {rule}")


@pytest.mark.parametrize(("port", "rule"), [named(*pair) for pair in _hostile_hosts()])
def test_a_hostile_host_is_told_which_sentence(port, rule):
    with pytest.raises(ContractBroken) as caught:
        check_device(port())
    assert rule in caught.value.rules
    assert RULES[rule] in str(caught.value)


@pytest.mark.parametrize(("port", "rule"), [named(*pair) for pair in _hostile_contexts()])
def test_a_hostile_context_is_told_which_sentence(port, rule):
    with pytest.raises(ContractBroken) as caught:
        context(port)
    assert rule in caught.value.rules
    assert RULES[rule] in str(caught.value)


@pytest.mark.parametrize(("port", "rule"), [named(*pair) for pair in _hostile_blockings()])
def test_a_hostile_blocking_port_is_told_which_sentence(monkeypatch, port, rule):
    with pytest.raises(ContractBroken) as caught:
        blocking(monkeypatch, port)
    assert rule in caught.value.rules


def test_every_sentence_has_a_port_that_breaks_it():
    broken = {rule for _, rule in (*_hostile_hosts(), *_hostile_contexts(), *_hostile_blockings())}
    assert broken >= set(RULES)

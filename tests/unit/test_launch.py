"""What the kernel for vital signs is told: a stand-in does it over main memory (`kernel_on_host`)."""

import contextlib
import math
import threading
from collections import deque

import pytest
import torch
from torch import nn
from unit.kernel_on_host import HostLauncher

from tolaria import launch, measure, observe
from tolaria.measure import Measure

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128]


class OnDevice(Measure):
    """Takes tensors in main memory for those of a device."""

    def take(self, tensors, *, flagged=False):
        with self._lock:
            found = self._by_kernel(tensors, flagged)
        return measure.Measured(single=observe.norms(tensors)) if found is None else found


@pytest.fixture
def device(monkeypatch):
    made = HostLauncher()
    monkeypatch.setattr(launch, "launcher_of", lambda _: made)
    monkeypatch.setattr(launch, "_PART_BYTES", 64)  # so that small tensors have many parts
    return made


def expected(tensors):
    wide = [torch.view_as_real(t).double() if t.is_complex() else t.double() for t in tensors]
    return math.sqrt(sum(float((t * t).sum()) for t in wide))


def read(measured):
    assert not measured.single
    (totals,) = measured.totals
    return totals.tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_is_that_of_all_numbers(device, dtype):
    tensors = [torch.randn(n).to(dtype) for n in (1, 7, 16, 33, 640)]
    norm, bad = read(OnDevice().take(tensors))
    assert norm == pytest.approx(expected(tensors), rel=1e-12)
    assert bad == 0


def test_many_tensors_of_many_kinds_take_several_launches(device):
    tensors = [torch.randn(1 + number % 40).to(DTYPES[number % len(DTYPES)]) for number in range(500)]
    tensors[7:7] = [torch.zeros(0), torch.arange(5)]  # which hold nothing that could be bad
    found = OnDevice()
    norm, bad = read(found.take(tensors))
    assert norm == pytest.approx(expected([t for t in tensors if t.is_floating_point() or t.is_complex()]), rel=1e-12)
    assert (bad, len(device.launches)) == (0, 5)  # 160 tensors each, and the total
    for number in (3, 200, 201, 499):
        tensors[number][-1] = math.nan if number % 2 else math.inf
    norm, bad = read(found.take(tensors))
    assert not math.isfinite(norm)
    assert bad == 4


def test_large_tensors_have_larger_parts_and_not_more_of_them(device, monkeypatch):
    monkeypatch.setattr(launch, "_MOST_PARTS", 10)
    tensors = [torch.randn(999), torch.randn(3), torch.randn(1001)]
    norm, _ = read(OnDevice().take(tensors))
    assert norm == pytest.approx(expected(tensors), rel=1e-12)
    assert device.launches[0] <= 10 + len(tensors)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_flag_is_1_where_something_is_not_finite(device, bad):
    tensors = [torch.ones(50), torch.ones(3, dtype=torch.float16)]
    found = OnDevice()
    assert [flag.item() for flag in found.take(tensors, flagged=True).flags] == [0.0]
    tensors[0][20] = bad
    measured = found.take(tensors, flagged=True)
    assert [flag.item() for flag in measured.flags] == [1.0]
    assert read(measured)[1] == 1
    assert found.take(tensors).flags == []


def test_a_large_finite_number_is_no_alarm(device):
    assert read(OnDevice().take([torch.full((3,), 3e38)])) == [pytest.approx(math.sqrt(3) * 3e38, rel=1e-6), 0]


def test_addresses_are_read_each_time(device):
    tensors = [torch.randn(20) for _ in range(3)]
    found = OnDevice()
    before = read(found.take(tensors))
    moved = [torch.full_like(tensor, 2.0) for tensor in tensors]
    assert read(found.take(moved))[0] == pytest.approx(math.sqrt(60 * 4))
    assert read(found.take(tensors)) == before
    tensors[1].data = torch.full((20,), math.nan)
    assert read(found.take(tensors))[1] == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda some: [*some, torch.full((4,), 3.0)],
        lambda some: some[:-1],
        lambda some: [torch.full((6,), 2.0), *some[1:]],
        lambda some: [some[0].double(), *some[1:]],
        lambda some: [*some[1:], some[0][:0]],
    ],
)
def test_what_looks_different_is_laid_out_anew(device, change):
    some = [torch.full((5,), 1.5), torch.randn(7), torch.randn(2, 3)]
    found = OnDevice()
    read(found.take(some))
    other = change(some)
    assert read(found.take(other))[0] == pytest.approx(expected(other), rel=1e-12)


def test_dense_in_any_order_is_read_as_it_lies(device):
    tensors = [torch.randn(4, 5).t(), torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.randn(())]
    assert read(OnDevice().take(tensors))[0] == pytest.approx(expected(tensors), rel=1e-12)


@pytest.mark.parametrize(
    "strange",
    [
        lambda: torch.ones(4, 6)[:, ::2],
        lambda: torch.ones(3).expand(4, 3),
        lambda: torch.ones(8).to(torch.float8_e4m3fn),
        lambda: nn.Buffer(torch.ones(3)).as_subclass(type("Own", (torch.Tensor,), {})),
    ],
    ids=["strided", "expanded", "float8", "subclass"],
)
def test_what_the_kernel_cannot_read_is_left_to_torch(device, strange):
    tensors = [torch.ones(5), strange()]
    measured = OnDevice().take(tensors)
    assert not measured.totals
    assert not device.launches
    assert sum(len(part) for part in measured.single) == 2


def test_sparse_ones_too(device):
    with torch.sparse.check_sparse_tensor_invariants(True):
        grad = torch.sparse_coo_tensor([[0, 2]], [3.0, 4.0], (4,))
        measured = OnDevice().take([torch.ones(4), grad])
    assert sorted(norm for part in measured.single for norm in part.tolist()) == [2.0, 5.0]


def test_freed_memory_is_not_read(device):
    tensors = [torch.ones(5), torch.ones(7)]
    found = OnDevice()
    found.take(tensors)
    launched = len(device.launches)
    tensors[1].untyped_storage().resize_(0)
    with found._lock:
        assert found._by_kernel(tensors, False) is None
    assert len(device.launches) == launched


def test_a_driver_that_refuses_leaves_it_to_torch(device):
    found, tensors = OnDevice(), [torch.ones(4)]
    device.fails = True
    assert [part.tolist() for part in found.take(tensors, flagged=True).single] == [[2.0]]
    device.fails = False
    assert not found.take(tensors).totals  # not again for the same tensors


def test_lists_that_look_different_each_time_are_left_to_torch_mostly(device):
    found = OnDevice()
    by_kernel = [bool(found.take([torch.ones(1 + number)]).totals) for number in range(64)]
    assert 0 < sum(by_kernel) <= 20
    assert [bool(found.take([torch.ones(9)]).totals) for _ in range(20)][-1]


def test_tensors_in_main_memory_are_not_looked_at_by_a_kernel(device):
    assert not Measure().take([torch.ones(4)]).totals
    assert not device.launches


# -- sending


class Clock:
    def mark(self):
        return None

    def has_passed(self, event):
        raise AssertionError("the ticket tells")

    def host_wait(self, event):
        raise AssertionError("it has arrived")


def test_numbers_of_all_kinds_arrive_with_their_ticket(device):
    readings = observe.Readings({"cpu": Clock()})
    for number in range(70):  # more than there are rows
        reading = readings.send(
            {"a": torch.tensor(1.5 + number), "b": 2.0, "c": torch.tensor([0.25], dtype=torch.bfloat16), "d": None},
            {"e": [torch.tensor([3.0, 4.0], dtype=torch.float64), torch.tensor([5.0]).half()]},
        )
        assert reading.has_arrived()
        reading.wait()
        assert reading.numbers == {"a": 1.5 + number, "b": 2.0, "c": 0.25, "d": None}
        assert reading.lists == {"e": [3.0, 4.0, 5.0]}
    assert len(device.launches) == 70


def test_a_row_that_was_used_before_has_not_arrived(device, monkeypatch):
    readings = observe.Readings({"cpu": Clock()})
    for _ in range(len(readings._rows)):
        readings.send({"a": torch.tensor(1.0)}).wait()
    monkeypatch.setattr(device, "launch", lambda *_: None)
    assert not readings.send({"a": torch.tensor(1.0)}).has_arrived()


@pytest.mark.parametrize("strange", [torch.tensor(3), torch.tensor(True), torch.tensor(1 + 1j)])
def test_other_kinds_are_sent_by_torch(device, strange):
    sender = launch.Sender(device)
    assert sender.send([torch.ones(2), strange], torch.zeros(8, dtype=torch.float64)) is None
    assert sender.send([torch.ones(2, 2).t()[0]], torch.zeros(8, dtype=torch.float64)) is None
    assert not device.launches


class Switched:
    """Which device is current, as torch says it."""

    def __init__(self, monkeypatch, current):
        self.current, seen = current, self
        monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: seen.current, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
        monkeypatch.setattr(torch.cuda, "device", self.make_current)

    @contextlib.contextmanager
    def make_current(self, index):
        before, self.current = self.current, index
        try:
            yield
        finally:
            self.current = before


@pytest.mark.parametrize("current", [0, 1])
def test_the_device_of_the_kernel_is_current_at_the_launch(current, monkeypatch):
    """The default streams of all devices have one handle: the driver takes the one of the current context."""
    switched, launched = Switched(monkeypatch, current), []
    launcher = object.__new__(launch.Launcher)
    launcher.index, launcher._function = 1, None
    launcher._launch = lambda *_: launched.append(switched.current) or 0
    launcher.launch(None, 1)
    assert (launched, switched.current) == ([1], current)


def test_a_row_is_held_until_its_numbers_have_arrived(device, monkeypatch):
    """While another sender lets go of what has: it takes away what it has looked at, and nothing else."""
    monkeypatch.setattr(launch, "_under_way", deque())
    sender, rows = launch.Sender(device), torch.zeros(3, 4, dtype=torch.float64).unbind()
    sender.send([torch.ones(1)], rows[0])
    monkeypatch.setattr(device, "launch", lambda *_: None)  # the second one is still on its way
    sender.send([torch.ones(1)], rows[1])
    held = launch._under_way[-1]
    looked, go_on = threading.Event(), threading.Event()
    arrived = launch.Ticket.has_arrived

    def slowly(ticket):
        found = arrived(ticket)
        if threading.current_thread() is other and not looked.is_set():
            looked.set()
            go_on.wait()
        return found

    launch._under_way.appendleft((launch.Ticket(rows[0].data_ptr(), 1, 3, 0.5), rows[0]))
    monkeypatch.setattr(launch.Ticket, "has_arrived", slowly)
    other = threading.Thread(target=sender.send, args=([torch.ones(1)], rows[2]))
    other.start()
    try:
        looked.wait()
        assert launch._holding.locked()  # nobody else takes one away between its look and its removal
    finally:
        go_on.set()
        other.join()
    assert held in launch._under_way

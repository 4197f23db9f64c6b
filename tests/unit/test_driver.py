"""The driver's call table where no real device is needed: the wait for a device goes to the port of that name."""

import threading
from types import SimpleNamespace

import pytest

from tolaria.driver import Driver
from tolaria.errors import QuiesceTimeout
from tolaria.operations import Await, HostState, Synchronize
from tolaria.values import replace

VAULT = (
    "survey",
    "reserve",
    "capture_host",
    "check",
    "examine",
    "inspect",
    "restore_host",
    "copy",
    "read_live",
    "transfer",
)


def test_a_blocking_barrier_waits_for_the_device_that_it_names():
    waited = []
    ports = {name: SimpleNamespace(synchronize=lambda name=name: waited.append(name)) for name in ("a", "b")}
    driver = Driver(HostState(), SimpleNamespace(**dict.fromkeys(VAULT)), ports)
    driver.perform(Synchronize("b"))
    driver.perform(Synchronize("a"))
    assert waited == ["b", "a"]


class Opened(threading.Thread):
    """Waits until the state says `wanted`, and says itself when it waits."""

    def __init__(self, driver, wanted):
        super().__init__(daemon=True)
        self.driver, self.wanted, self.waits = driver, wanted, threading.Event()
        self.start()
        assert self.waits.wait(30)

    def run(self):
        def look(state):
            if state.epoch == self.wanted:
                return replace(state, epoch=state.epoch + 1), None
            self.waits.set()
            return None

        self.driver.perform(Await("wait", look, None))

    def has_gone_on(self):
        self.join(20)  # only a failing test waits that long
        return not self.is_alive()


def test_whoever_waits_is_told_of_every_change():
    """A change wakes one that waits; and so does the end of its waiting the next."""
    driver = Driver(HostState(), SimpleNamespace(**dict.fromkeys(VAULT)), {})
    second = Opened(driver, 2)
    first = Opened(driver, 1)
    driver.change(lambda state: (replace(state, epoch=1), None))
    assert first.has_gone_on()
    assert second.has_gone_on()
    assert driver.state.epoch == 3
    assert driver._num_waiting == 0


def test_one_that_is_answered_at_once_tells_those_that_wait():
    driver = Driver(HostState(), SimpleNamespace(**dict.fromkeys(VAULT)), {})
    other = Opened(driver, 1)
    driver.perform(Await("at once", lambda state: (replace(state, epoch=1), None), 30.0))
    assert other.has_gone_on()
    assert driver.state.epoch == 2


def test_one_that_gave_up_is_not_counted_any_more():
    driver = Driver(HostState(), SimpleNamespace(**dict.fromkeys(VAULT)), {})
    for _ in range(2):
        with pytest.raises(QuiesceTimeout):
            driver.perform(Await("never", lambda state: None, 1e-9))
    assert driver._num_waiting == 0

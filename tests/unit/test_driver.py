"""The driver's call table where no real device is needed: the wait for a device goes to the port of that name."""

from types import SimpleNamespace

from tolaria.driver import Driver
from tolaria.operations import HostState, Synchronize

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

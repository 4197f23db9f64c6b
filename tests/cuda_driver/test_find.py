"""Is there a driver with context-wide events? Found by looking; trying them out would invalidate a capture."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from cuda_driver.fake_driver import Machine

import tolaria.device
from tolaria import GovernorConfig, UnsupportedState
from tolaria.cuda import ContextDevice, find_driver
from tolaria.device import BlockingDevice, DeviceSet
from tolaria.operations import Barrier

NAME = "cuda.bindings.driver"


class Module(types.ModuleType):
    """`cuda.bindings.driver` that notes each call. Nothing but the version may be asked for."""

    def __init__(self, version=13000, code=0, error=None, symbols=("cuCtxRecordEvent", "cuCtxWaitEvent")):
        super().__init__(NAME)
        self.asked = []

        def cuDriverGetVersion():
            self.asked.append("cuDriverGetVersion")
            if error is not None:
                raise error
            return code, version

        self.cuDriverGetVersion = cuDriverGetVersion
        for symbol in symbols:
            setattr(self, symbol, lambda *_, symbol=symbol: self.asked.append(symbol))


class NoLibrary(Exception):
    """The bindings' own, different in each version."""


@pytest.fixture
def there(monkeypatch):
    """Put a module in the place of the bindings."""

    def put(module):
        monkeypatch.setitem(sys.modules, NAME, module)
        return module

    return put


@pytest.mark.parametrize("version", [12050, 12060, 13000])
def test_found(version, there):
    module = there(Module(version))
    assert find_driver() == (module, "")
    assert module.asked == ["cuDriverGetVersion"]


@pytest.mark.parametrize(
    ("version", "shown"), [(12040, "12.4"), (12049, "12.4"), (11080, "11.8"), (9020, "9.2"), (0, "0.0")]
)
def test_a_driver_that_is_too_old(version, shown, there):
    module = there(Module(version))
    driver, reason = find_driver()
    assert driver is None
    assert reason == f"the driver offers CUDA {shown}, context-wide events need 12.5"
    assert module.asked == ["cuDriverGetVersion"]


def test_rocm(there, monkeypatch):
    module = there(Module())
    monkeypatch.setattr(torch.version, "hip", "6.2")
    driver, reason = find_driver()
    assert driver is None
    assert "ROCm" in reason
    assert module.asked == []


def test_bindings_missing(there):
    there(None)  # how Python marks a module that cannot be imported
    driver, reason = find_driver()
    assert driver is None
    assert "pip install 'tolaria[cuda]'" in reason


@pytest.mark.parametrize("symbols", [(), ("cuCtxWaitEvent",)])
def test_bindings_that_do_not_know_it(symbols, there):
    module = there(Module(symbols=symbols))
    driver, reason = find_driver()
    assert driver is None
    assert "cuCtxRecordEvent" in reason
    assert module.asked == []


@pytest.mark.parametrize("error", [RuntimeError("libcuda.so.1"), NoLibrary(), OSError("no such file")])
def test_no_driver_library(error, there):
    module = there(Module(error=error))
    driver, reason = find_driver()
    assert driver is None
    assert type(error).__name__ in reason
    assert module.asked == ["cuDriverGetVersion"]


def test_a_driver_that_answers_an_error_is_no_driver(there):
    there(Module(version=0, code=100))
    assert find_driver()[0] is None


# ------------------------------------------------------------ which port is opened


@pytest.fixture
def one_gpu(monkeypatch):
    """A machine with a GPU, as far as opening a port looks."""
    machine = Machine()
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_, **__: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tolaria.device, "TorchStreams", lambda: machine.streams)
    monkeypatch.setattr(tolaria.device, "find_driver", lambda: (machine.driver, ""))
    return machine


GPU = torch.device("cuda:0")


@pytest.mark.parametrize("wanted", [None, "context"])
def test_the_best_there_is(wanted, one_gpu):
    devices = DeviceSet(wanted)
    devices.open({GPU, torch.device("cpu")})
    assert isinstance(devices["cuda:0"], ContextDevice)
    assert devices.barrier is Barrier.CONTEXT
    assert devices.reason == ""
    assert [call for call in one_gpu.calls if call.startswith("cuCtxRecord")] == []


def test_blocking_is_looked_for_nowhere(one_gpu, monkeypatch):
    monkeypatch.setattr(tolaria.device, "find_driver", lambda: pytest.fail("nobody asked"))
    devices = DeviceSet("blocking")
    devices.open({GPU, torch.device("cpu")})
    assert isinstance(devices["cuda:0"], BlockingDevice)
    assert devices.barrier is Barrier.BLOCKING
    assert devices.reason == 'barrier="blocking" was asked for'
    assert one_gpu.calls == []


def test_where_it_is_missing_the_host_waits_and_the_reason_is_told(one_gpu, monkeypatch):
    asked = []
    monkeypatch.setattr(tolaria.device, "find_driver", lambda: (asked.append(1), "it rains")[0:0] or (None, "it rains"))
    devices = DeviceSet()
    devices.open({GPU})
    devices.open({torch.device("cuda:1")})
    assert all(isinstance(port, BlockingDevice) for port in devices.values())
    assert devices.reason == "it rains"


def test_asked_for_and_missing(one_gpu, monkeypatch):
    monkeypatch.setattr(tolaria.device, "find_driver", lambda: (None, "it rains"))
    devices = DeviceSet("context")
    with pytest.raises(UnsupportedState, match="it rains"):
        devices.open({GPU})
    assert dict(devices) == {}


def test_asked_for_and_missing_is_said_each_time(one_gpu, monkeypatch):
    """once the reason is known, `_choose` returns before it looks at what was wanted."""
    monkeypatch.setattr(tolaria.device, "find_driver", lambda: (None, "it rains"))
    devices = DeviceSet("context")
    for _ in range(2):
        with pytest.raises(UnsupportedState, match="it rains"):
            devices.open({GPU})
    assert dict(devices) == {}


def test_asked_for_on_another_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_, **__: torch.device("xpu"))
    with pytest.raises(UnsupportedState, match="xpu has no context-wide events"):
        DeviceSet("context").open({torch.device("xpu:0")})
    devices = DeviceSet()
    devices.open({torch.device("xpu:0")})
    assert devices.reason == "xpu has no context-wide events"


@pytest.mark.parametrize("wanted", [None, "context", "blocking"])
def test_a_cpu_needs_none(wanted):
    devices = DeviceSet(GovernorConfig(barrier=wanted).barrier)
    devices.open({torch.device("cpu")})
    assert devices.barrier is Barrier.HOST
    assert devices.reason == ""


def test_every_device_is_searched_for_once(one_gpu, monkeypatch):
    asked = []

    def find():
        asked.append(1)
        return one_gpu.driver, ""

    monkeypatch.setattr(tolaria.device, "find_driver", find)
    devices = DeviceSet()
    one_gpu.contexts.append(type(one_gpu.contexts[0])("ctx1", 1))
    devices.open({GPU, torch.device("cuda:1")})
    assert len(devices) == 2
    assert asked == [1]

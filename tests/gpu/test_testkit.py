"""`tolaria.testing` for other people's code on a device: the page's example, ports, tags, turbulence."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tolaria import GovernorConfig, TolariaGovernor, judge
from tolaria.cuda import ContextDevice, TorchStreams, find_driver
from tolaria.device import BlockingDevice
from tolaria.testing.contract import ContractBroken
from tolaria.testing.device_contract import check_device
from tolaria.testing.gates import Gate, gets_through
from tolaria.testing.tags import Tags
from tolaria.testing.turbulence import Turbulence

pytestmark = pytest.mark.cuda

PAGE = Path(__file__).parents[2] / "docs" / "testing.md"


def test_the_page_finds_the_races_and_passes_what_is_mended(tmp_path):
    code = "\n".join(re.findall(r"```python gpu\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))
    (tmp_path / "test_page.py").write_text(code)
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "tolaria.testing.plugin", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=150,
    ).stdout
    results = re.findall(r"^(PASSED|FAILED) test_page.py::\w+\[(\w+)\]", found, re.MULTILINE)
    expected = [("FAILED", "Hasty"), ("FAILED", "SyncBefore"), ("PASSED", "Mended"), ("PASSED", "Mended")]
    assert sorted(results) == expected, found
    assert found.count("Torn(") >= 2, found


def context(port=ContextDevice):
    return port("cuda:0", find_driver()[0], TorchStreams())


class Local(ContextDevice):
    """The event of one stream in the place of one of all."""

    def context_record(self):
        return self.stream_record()


class Unwaited(ContextDevice):
    def stream_wait(self, event):
        pass


class OnlyTheCaller(ContextDevice):
    def context_wait(self, event):
        self.caller_wait(event)


class InTheWay(ContextDevice):
    def transfer(self, work):
        self.enqueue(work)
        return self.stream_record()


class Hasty(BlockingDevice):
    def synchronize(self):
        pass


class Own(BlockingDevice):
    def synchronize(self):
        torch.cuda.current_stream().synchronize()


@pytest.mark.parametrize("make", [context, lambda: BlockingDevice("cuda:0")], ids=["context", "blocking"])
def test_our_ports_keep_their_contract(make):
    check_device(make())


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda: context(Local), "context_record"),
        (lambda: context(Unwaited), "stream_wait"),
        (lambda: context(OnlyTheCaller), "context_wait"),
        (lambda: context(InTheWay), "transfer: alone"),
        (lambda: Hasty("cuda:0"), "synchronize"),
        (lambda: Own("cuda:0"), "synchronize: all"),
    ],
    ids=["Local", "Unwaited", "OnlyTheCaller", "InTheWay", "Hasty", "Own"],
)
def test_hostile_ports_are_told_which_sentence(make, rule):
    with pytest.raises(ContractBroken) as caught:
        check_device(make())
    assert rule in caught.value.rules


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_read_beside_a_held_write_is_torn(dtype):
    model, reader = nn.Linear(256, 256).to("cuda", dtype), torch.cuda.Stream()
    tags = Tags(model)
    with torch.cuda.stream(reader):
        copy = {name: tensor.clone() for name, tensor in tags.tensors.items()}  # takes the memory
    torch.cuda.synchronize()
    del copy

    def halfway():
        torch.cuda.current_stream().synchronize()
        gate.close(torch.cuda.current_stream())

    with Gate() as gate, torch.no_grad():
        tags.write(2, halfway=halfway)
        with torch.cuda.stream(reader):
            copy = {name: tensor.clone() for name, tensor in tags.tensors.items()}
        gets_through(reader, 2.0)
        gate.open()
    assert tags.torn() is None
    assert tags.torn(copy).tensors == {"weight": (2.0, 2.0), "bias": (1.0, 1.0)}


@pytest.mark.parametrize("barrier", ["context", "blocking"])
@pytest.mark.parametrize("registered", [True, False])
def test_rollbacks_in_turbulence(barrier, registered):
    """Registered writers are kept out; of others each snapshot meets one half-way."""
    model = nn.Sequential(nn.Linear(256, 256), nn.BatchNorm1d(256), nn.Linear(256, 8)).cuda().eval()
    config = GovernorConfig(rng="keep", barrier=barrier, host_slots=0)
    x = torch.zeros(16, 256, device="cuda")
    with TolariaGovernor(model, config=config, detector=judge.non_finite()) as governor:
        section = governor.using if registered else None
        with Turbulence(model, section=section, work=lambda: model(x), streams=16, seed=5) as turbulence:
            for _ in range(5):
                info = turbulence.during(governor.snapshot)
                report = turbulence.during(lambda info=info: governor.execute_rollback(to=info))
                assert report.success
        governor.execute_rollback(to=info).wait()
        assert bool(turbulence.torn(model.state_dict())) == (not registered)
    found = turbulence.found
    assert min(found.writes, found.reads, found.calls) > 0
    assert not (registered and found.torn)

"""A train state over two GPUs: one snapshot and one rollback, and each device ordered by a barrier of its own."""

import threading

import pytest
import torch
from torch import nn

from tolaria import GovernorConfig, TolariaGovernor, judge
from tolaria.cuda import ContextDevice
from tolaria.testing.gates import Gate
from tolaria.testing.picture import NEW, OLD, no_wait

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

DEVICES = ("cuda:0", "cuda:1")
SIZE = 1 << 22


@pytest.fixture(params=["context", "blocking"])
def barrier(request):
    return request.param


def synchronize():
    for device in DEVICES:
        torch.cuda.synchronize(device)


# ------------------------------------------------------------ training


class Halves(nn.Module):
    """Half of it on each device, with statistics and dropout on both."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.2)).to(DEVICES[0])
        self.second = nn.Sequential(nn.BatchNorm1d(64), nn.Dropout(0.2), nn.Linear(64, 4)).to(DEVICES[1])

    def forward(self, x):
        return self.second(self.first(x).to(DEVICES[1]))


class Run:
    def __init__(self, **settings):
        torch.manual_seed(0)
        self.model = Halves()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, fused=True)
        config = GovernorConfig(**{"cadence": 4, "probation": 4, **settings})
        self.governor = TolariaGovernor(self.model, self.optimizer, config=config, detector=judge.non_finite())
        generator = torch.Generator().manual_seed(1)
        self.batches = [torch.randn(32, 16, generator=generator).to(DEVICES[0]) for _ in range(30)]

    def train(self, batches):
        for x in self.governor.watch(batches):
            loss = self.model(x).square().mean()
            loss.backward()
            self.governor.step(loss=loss)


@pytest.fixture
def make():
    torch.use_deterministic_algorithms(True)
    made = []

    def build(**settings):
        made.append(Run(**settings))
        return made[-1]

    yield build
    for run in made:
        run.governor.close()
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("tier", ["device", "host"])
def test_a_poisoned_batch_leaves_no_trace_on_either_device(make, barrier, tier):
    digests = []
    for poisoned in (True, False):
        run = make(barrier=barrier, tier=tier)
        batches = list(run.batches)
        if poisoned:
            batches.insert(17, torch.full_like(batches[0], float("nan")))
        run.train(batches)
        assert run.governor.rollbacks == (2 if poisoned else 0)
        assert run.governor.capabilities().barrier == barrier
        digests.append(run.governor.digest())
        run.governor.close()
    assert digests[0] == digests[1]


def test_a_bit_that_flips_in_a_slot_of_the_second_device_is_noticed(make):
    run = make(host_slots=0)
    run.train(run.batches[:9])
    run.governor.snapshot().wait("sealed")
    older = run.governor.digest()
    run.train(run.batches[9:12])
    run.governor.snapshot().wait("sealed")
    newest = max(run.governor._keeper.ring, key=lambda slot: slot.snapshot)
    flat = run.governor._keeper.vault.slots[newest.index].arena.flat[torch.device(DEVICES[1])]
    flat[flat.numel() // 2] ^= 4
    synchronize()
    report = run.governor.execute_rollback(verify="before").wait()
    assert report.corrupted_steps
    assert run.governor.digest() == older


# ------------------------------------------------------------ races


class Pair:
    """A parameter on each device whose every element tells which step it is from."""

    def __init__(self):
        self.model = nn.ParameterList([nn.Parameter(torch.full((SIZE,), OLD, device=d)) for d in DEVICES])
        config = GovernorConfig(rng="keep", barrier="context")
        self.governor = TolariaGovernor(self.model, config=config, detector=judge.non_finite())
        self.writers = [torch.cuda.Stream(d) for d in DEVICES]
        self.readers = [torch.cuda.Stream(d) for d in DEVICES]

    def write_gated(self, gate, value=NEW):
        """From another thread, on both devices: half of a parameter, a wait for the gate, the other half."""

        def run():
            with torch.no_grad(), self.governor.using():
                for parameter, stream in zip(self.model, self.writers, strict=True):
                    with torch.cuda.stream(stream):
                        parameter[: SIZE // 2].fill_(value)
                        gate.close(stream)
                        parameter[SIZE // 2 :].fill_(value)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()

    def read(self):
        seen = []
        for parameter, stream in zip(self.model, self.readers, strict=True):
            with torch.no_grad(), self.governor.using(write=False), torch.cuda.stream(stream):
                seen.append(torch.stack(parameter.detach().aminmax()))
        return seen

    def values(self):
        synchronize()
        return [float(v) for p in self.model for v in p.detach().aminmax()]

    def warm_up(self):
        self.governor.snapshot().wait("sealed")
        for _ in range(2):
            with Gate(20.0) as gate:
                gate.open()
                self.write_gated(gate, OLD)
                self.read()
                self.governor.execute_rollback().wait()
            synchronize()


@pytest.fixture
def pair():
    made = Pair()
    made.warm_up()
    yield made
    made.governor.close()


def test_half_done_steps_on_both_devices_are_lost_on_neither(pair):
    for _ in range(5):
        with Gate(20.0) as gate:
            pair.write_gated(gate)
            pair.governor.execute_rollback()
            assert not gate.is_open, "the host waited for the writers"
            seen = pair.read()
            gate.open()
            left = pair.values()
        assert not gate.was_forced
        assert left == [OLD] * 4
        assert [v for each in seen for v in each.tolist()] == [OLD] * 4


@pytest.mark.parametrize("index", [0, 1])
def test_without_the_barrier_of_one_device_that_one_is_lost(pair, index, monkeypatch):
    wait, context_wait = ContextDevice.stream_wait, ContextDevice.context_wait

    def unless_it(original):
        return lambda device, event: (no_wait if device.index == index else original)(device, event)

    # its copies wait for nothing: not for its own streams, and not for the other's, which would hold them up as well
    monkeypatch.setattr(ContextDevice, "stream_wait", unless_it(wait))
    monkeypatch.setattr(ContextDevice, "context_wait", unless_it(context_wait))
    for _ in range(3):
        with Gate(20.0) as gate:
            pair.write_gated(gate)
            pair.governor.execute_rollback()
            pair.governor._keeper.devices[DEVICES[index]].synchronize()  # its copies are over, the other's wait
            assert not gate.was_forced
            gate.open()
            left = pair.values()
        assert left[2 * index :][:2] == [OLD, NEW]
        assert left[2 - 2 * index :][:2] == [OLD] * 2
        pair.governor.execute_rollback().wait()


def test_a_snapshot_holds_the_half_done_steps_of_both_devices_whole(pair):
    with Gate(20.0) as gate:
        pair.write_gated(gate)
        info = pair.governor.snapshot()
        assert not gate.is_open
        with torch.no_grad(), pair.governor.using():
            for parameter, stream in zip(pair.model, pair.readers, strict=True):
                with torch.cuda.stream(stream):
                    parameter.fill_(7.0)
        gate.open()
        synchronize()
    pair.governor.execute_rollback(to=info).wait()
    assert pair.values() == [NEW] * 4

"""Device slots and page-locked host slots in one ring; what was restored is read back."""

import logging

import pytest
import torch
from torch import nn

from tolaria import GovernorConfig, RollbackDisturbed, SnapshotRejected, TolariaGovernor, judge
from tolaria.ring import SlotPhase, Tier
from tolaria.route import DeviceRoute

pytestmark = pytest.mark.cuda


class Run:
    """A few steps of a small model with AdamW."""

    def __init__(self, **config):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.BatchNorm1d(300), nn.Linear(300, 7)).cuda()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, fused=True)
        config = GovernorConfig(**{"cadence": 4, "probation": 2, "scrub_every": 0, **config})
        self.governor = TolariaGovernor(self.model, self.optimizer, config=config, detector=judge.non_finite())
        generator = torch.Generator().manual_seed(1)
        self.batches = [torch.randn(32, 64, generator=generator).cuda() for _ in range(80)]

    def train(self, count, start=0):
        for x in self.governor.watch(self.batches[start : start + count]):
            self.governor.step(loss=self.backward(x))

    def backward(self, x):
        loss = self.model(x).square().mean()
        loss.backward()
        return loss

    @property
    def backlog(self):
        return self.governor._keeper.backlog

    def slots(self, tier):
        keeper = self.governor._keeper
        return [
            (s, keeper.vault.slots[s.index]) for s in keeper.ring if s.tier is tier and s.phase is not SlotPhase.FREE
        ]


@pytest.fixture
def make():
    torch.use_deterministic_algorithms(True)
    made = []

    def build(**config):
        made.append(Run(**config))
        return made[-1]

    yield build
    for run in made:
        run.governor.close()
    torch.use_deterministic_algorithms(False)


def flip(flat):
    """One bit in the middle of a slot."""
    flat[flat.numel() // 2] ^= 4


def test_certified_snapshots_are_drained_and_come_back_from_main_memory(make):
    run = make(host_slots=3, reach=30)
    digests = {}
    for x in run.governor.watch(run.batches[:60]):
        digests.setdefault(run.governor.statistics().steps, run.governor.digest())
        run.governor.step(loss=run.backward(x))
        run.backlog.finish()  # so that the run does not depend on the clock
    drained = run.slots(Tier.HOST)
    assert len(drained) == 3
    assert run.governor.statistics().snapshots_drained >= 4
    ages = sorted(60 - slot.completed for slot, _ in drained)
    assert ages[-1] >= 30, ages
    assert all(memory.arena.flat[torch.device("cuda", 0)].is_pinned() for _, memory in drained)
    for slot, _ in sorted(drained, key=lambda pair: -pair[0].snapshot):
        report = run.governor.execute_rollback(to=slot.step).wait()
        assert (report.tier, report.verified, report.status) == (
            "host" if slot.completed < 48 else report.tier,
            True,
            "done",
        )
        assert run.governor.digest() == digests[slot.step]


def test_a_state_that_does_not_fit_the_device_lives_in_main_memory(make):
    run = make(device_budget=1 << 20)
    found = run.governor.capabilities()
    run.train(20)
    found = run.governor.capabilities()
    assert found.tier == "host"
    assert "device_budget allows 1.0 MiB" in found.tier_reason
    assert not run.slots(Tier.DEVICE)[1:]  # at most the first one, of before the optimizer had state
    info = run.governor.snapshot().wait("sealed")
    assert info.tier == "host"
    before = run.governor.digest()
    run.train(5, start=20)
    assert run.governor.digest() != before
    report = run.governor.execute_rollback(to=info).wait()
    assert (report.tier, report.verified) == ("host", True)
    assert run.governor.digest() == before


def test_training_from_main_memory_equals_training_without_faults(make):
    digests = []
    for bad in (False, True):
        run = make(tier="host")
        batches = list(run.batches[:30])
        if bad:
            batches.insert(17, torch.full_like(batches[0], float("nan")))
        for x in run.governor.watch(batches):
            run.governor.step(loss=run.backward(x))
        assert bool(run.governor.rollbacks) == bad
        digests.append(run.governor.digest())
    assert digests[0] == digests[1]


@pytest.mark.parametrize("tier", ["device", "host"])
@pytest.mark.parametrize("verify", ["before", None])
def test_a_flipped_bit_in_a_slot_never_stays(make, tier, verify):
    run = make(tier=tier, host_slots=0, cadence=50, slots=4)
    run.train(6)
    older = run.governor.snapshot().wait("sealed")
    before = run.governor.digest()
    run.train(6, start=6)
    newer = run.governor.snapshot().wait("sealed")
    keeper = run.governor._keeper
    index = next(slot.index for slot in keeper.ring if slot.snapshot == newer.serial)
    flip(keeper.vault.slots[index].arena.flat[torch.device("cuda", 0)])
    torch.cuda.synchronize()
    report = run.governor.execute_rollback(verify=verify)
    if verify is None:
        with pytest.raises(SnapshotRejected):
            report.wait()
        report = run.governor.execute_rollback()
    else:
        assert report.corrupted_steps == (newer.step,)
    assert report.wait().verified
    assert report.snapshot_step == older.step
    assert run.governor.digest() == before


def test_swapped_elements_are_noticed_too(make):
    run = make(host_slots=0)
    run.train(6)
    info = run.governor.snapshot().wait("sealed")
    keeper = run.governor._keeper
    index = next(slot.index for slot in keeper.ring if slot.snapshot == info.serial)
    words = keeper.vault.slots[index].arena.flat[torch.device("cuda", 0)].view(torch.int32)
    one, other = words[100].clone(), words[101].clone()
    assert one != other
    words[100], words[101] = other, one
    torch.cuda.synchronize()
    assert run.governor.execute_rollback(verify="before").corrupted_steps == (info.step,)


def test_the_other_tier_stands_in_for_a_corrupted_slot(make):
    run = make(host_slots=2, probation=1)
    run.train(6)
    run.backlog.finish()
    keeper = run.governor._keeper
    both = {slot.snapshot for slot, _ in run.slots(Tier.HOST)} & {slot.snapshot for slot, _ in run.slots(Tier.DEVICE)}
    serial = max(both)
    for slot, memory in run.slots(Tier.DEVICE):
        if slot.snapshot >= serial:
            flip(memory.arena.flat[torch.device("cuda", 0)])
    torch.cuda.synchronize()
    report = run.governor.execute_rollback(verify="before").wait()
    assert (report.tier, report.verified) == ("host", True)
    assert keeper.ring[0].tier is Tier.DEVICE


def test_scrubbing_finds_a_flipped_bit_in_an_idle_slot(make, caplog):
    run = make(host_slots=2, scrub_every=1, cadence=50)
    run.train(3)
    run.backlog.finish()
    slot, memory = run.slots(Tier.HOST)[0]
    flip(memory.arena.flat[torch.device("cuda", 0)])
    with caplog.at_level(logging.WARNING, logger="tolaria"):
        for number in range(8):
            run.train(1, start=3 + number)
            run.backlog.finish()
    assert run.governor.statistics().snapshots_corrupted == 1
    assert "has changed in memory" in caplog.text
    # the device still has it, so the host tier was given it again
    assert slot.snapshot in {one.snapshot for one, _ in run.slots(Tier.DEVICE)}
    for one, _ in run.slots(Tier.HOST):
        assert run.governor.execute_rollback(to=one.step, verify="before").corrupted_steps == ()


@pytest.mark.parametrize("registered", [True, False])
def test_a_writer_that_nobody_knows_is_noticed_when_it_lands_before_the_reading(make, monkeypatch, registered):
    from tolaria.testing.gates import Gate, gets_through

    run = make(host_slots=0)
    run.train(6)
    run.governor.snapshot().wait("sealed")
    before = run.governor.digest()
    run.governor.execute_rollback().wait()
    stream, read = torch.cuda.Stream(), DeviceRoute.read
    with Gate() as gate:

        def held(route, side, tally, **how):
            gate.close(torch.cuda.ExternalStream(int(route._port._stream)))
            read(route, side, tally, **how)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DeviceRoute, "read", held)
            report = run.governor.execute_rollback()
        with torch.no_grad(), torch.cuda.stream(stream):
            if registered:
                with run.governor.using():
                    run.model[0].weight.add_(1)
            else:
                run.model[0].weight.add_(1)
        assert gets_through(stream, limit_s=1.0) != registered  # who is known waits for the reading
        gate.open()
    if registered:
        assert report.wait().verified
        return
    with pytest.raises(RollbackDisturbed):
        report.wait()
    assert (report.status, report.verified) == ("disturbed", False)
    rolled_back = run.governor.step(loss=run.backward(run.batches[7])).rolled_back
    assert rolled_back
    assert run.governor.statistics().rollbacks_disturbed == 1
    assert run.governor.digest() == before

"""A captured step decides for itself: refused, and back at the last certified snapshot, before the host knows."""

import copy
import itertools

import pytest
import torch
from torch import nn

from tolaria import GovernorConfig, StateMismatch, TolariaGovernor, judge
from tolaria.in_graph import CapturedStep, Recorder
from tolaria.latch import Latch, PredicatedCopy
from tolaria.testing.gates import Gate

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")]


def lr():
    return torch.tensor(1e-2, device="cuda")


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=lr(), fused=True, capturable=True),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=lr(), amsgrad=True, weight_decay=0.1, fused=True, capturable=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=lr(), momentum=0.9, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=lr(), foreach=True, capturable=True),
    "for-loop": lambda p: torch.optim.AdamW(p, lr=lr(), amsgrad=True, foreach=False, capturable=True),
}


@pytest.fixture(autouse=True)
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Run:
    def __init__(self, name="adamw", *, scaler=False, ema=True, **settings):
        torch.manual_seed(0)
        body = [nn.Linear(16, 64), nn.BatchNorm1d(64), nn.Tanh(), nn.Dropout(0.1), nn.Linear(64, 4)]
        self.model = nn.Sequential(*body).cuda()
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = OPTIMIZERS[name](self.model.parameters())
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 5, gamma=0.7)
        self.scaler = torch.amp.GradScaler("cuda", init_scale=256.0, growth_interval=6) if scaler else None
        generator = torch.Generator().manual_seed(1)
        self.batches = [torch.randn(32, 16, generator=generator).cuda() for _ in range(28)]
        self.x = torch.zeros(32, 16, device="cuda")
        self.poison, self.shift = torch.zeros((), device="cuda"), torch.zeros(16, device="cuda")
        self.governor = TolariaGovernor(
            self.model,
            self.optimizer,
            scheduler=self.scheduler,
            scaler=self.scaler,
            config=GovernorConfig(**{"cadence": 4, "probation": 4, "keep_batches": 64, **settings}),
            detector=judge.non_finite(),
        )
        self.noise = torch.Generator("cuda").manual_seed(5)
        self.governor.register("average", self.average)
        self.governor.register("noise", self.noise)
        self.step = CapturedStep(self.governor, self.train, after=self.follow if ema else None)

    def train(self):
        self.shift.normal_(generator=self.noise)
        dtype = torch.float16 if self.scaler is not None else torch.float32
        with torch.autocast("cuda", dtype, enabled=self.scaler is not None, cache_enabled=False):
            loss = self.model(self.x + self.shift).float().square().mean()
        if self.scaler is None:
            loss.backward()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.unscale_(self.optimizer)  # so that the scaler does not see what comes next
        self.model[4].weight.grad[1, 2] += self.poison
        return loss

    def follow(self):
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 0.1)

    def go(self, poisoned=(), after=lambda delivered: None):
        for delivered, batch in enumerate(self.governor.watch(self.batches)):
            self.feed(batch, delivered in poisoned)
            self.step.step()
            after(delivered)

    def feed(self, batch, bad):
        self.x.copy_(batch)
        self.poison.fill_(float("nan") if bad else 0.0)

    def written(self):
        """What the device writes in a step; without the learning rate, which schedules change."""
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        found = [*self.model.state_dict().values(), *self.average.state_dict().values(), *moments]
        return [tensor.detach().clone() for tensor in found]

    def finish(self):
        torch.cuda.synchronize()
        state = [t.cpu().view(-1).view(torch.uint8).tolist() for t in self.written()]
        scale = None if self.scaler is None else self.scaler.state_dict()
        self.governor.close()
        return state, self.scheduler.state_dict(), scale


def same(now, before):
    return all(torch.equal(a, b) for a, b in zip(now, before, strict=True))


CASES = [*((name, False) for name in OPTIMIZERS), ("adamw", True), ("momentum", True)]


@pytest.mark.parametrize(("name", "scaler"), CASES)
def test_the_run_is_the_clean_one(name, scaler):
    ends = []
    for poisoned in ([13], []):
        run = Run(name, scaler=scaler)
        run.go(poisoned)
        assert run.step.is_captured
        assert (run.governor.rollbacks, run.governor.statistics().vetoes) == (len(poisoned), len(poisoned))
        ends.append(run.finish())
    assert ends[0] == ends[1]


def behind_a_gate(run, bad):
    """Train some steps; then five replays while the device stands still, the second of which is `bad`.

    Answers what the device had written before those, and at the snapshot that it was aimed at.
    """
    for batch in run.batches[:12]:
        run.feed(batch, False)
        run.step.step()
    run.governor.state_dict()
    torch.cuda.synchronize()
    target = run.step._target()
    leaves = {id(leaf.tensor): leaf for leaf in run.step._survey.leaves.leaves}
    moments = [value for state in run.optimizer.state.values() for value in state.values()]
    tensors = [*run.model.parameters(), *run.model.buffers(), *run.average.parameters(), *moments]
    held = [target.leaf(leaves[id(tensor)]).clone() for tensor in tensors]
    before = [tensor.detach().clone() for tensor in tensors]
    torch.cuda.synchronize()
    with Gate(limit_s=10.0) as gate:
        gate.close(torch.cuda.current_stream())
        torch.cuda.set_sync_debug_mode("error")
        try:
            for number, batch in enumerate(run.batches[12:15]):
                run.feed(batch, bad and number == 0)
                assert not run.step.step().rolled_back
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert not gate.is_open
    assert not gate.was_forced
    torch.cuda.synchronize()
    return tensors, before, held


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_device_goes_back_alone_and_stays_there(name):
    run = Run(name, cadence=100, probation=8)
    tensors, before, held = behind_a_gate(run, bad=True)
    assert same(tensors, held)
    assert not same(before, held)
    run.governor.close()


@pytest.mark.parametrize("name", ["adamw", "foreach"])
def test_without_the_copy_it_does_not(name, monkeypatch):
    monkeypatch.setattr(PredicatedCopy, "run", lambda *_, **__: None)
    run = Run(name, cadence=100, probation=8)
    tensors, _, held = behind_a_gate(run, bad=True)
    assert not same(tensors, held)
    run.governor.close()


@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_kept_veto_leaves_nothing_of_the_step(name, ema):
    """Bit for bit: weights, moments, counters, and the average; BatchNorm has seen the batch."""
    run = Run(name, ema=ema, on_veto="keep", cadence=100)
    for number, batch in enumerate(run.batches):
        run.feed(batch, number == 13)
        before = run.written()
        run.step.step()
        if number == 13:
            names = itertools.chain(run.model.state_dict(), itertools.repeat(""))
            pairs = zip(names, run.written(), before, strict=False)
            moved = {name for name, now, then in pairs if not torch.equal(now, then)}
            assert moved == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    run.governor.state_dict()
    assert (run.governor.statistics().vetoes, run.governor.rollbacks) == (1, 0)
    run.governor.close()


def test_a_graph_whose_memory_has_moved_is_not_replayed():
    run = Run()
    run.go()
    run.optimizer.state[run.model[0].weight]["exp_avg"] = torch.zeros(64, 16, device="cuda")
    before = run.written()
    with pytest.raises(StateMismatch, match="other memory"):
        run.step.step()
    assert same(run.written(), before)
    run.governor.close()


# ------------------------------------------------------------ the kernels

SIZES = [0, 1, 3, 15, 16, 17, 4095, 32768, 32769, 65535, 300_001, 1 << 21]


@pytest.mark.parametrize("parked", [False, True])
@pytest.mark.parametrize("to_live", [False, True])
def test_blocks_of_every_shape_are_copied_if_the_latch_says_so(to_live, parked):
    generator = torch.Generator().manual_seed(2)
    slot = torch.randint(0, 256, (sum(SIZES) + 64 * len(SIZES),), generator=generator).to(torch.uint8).cuda()
    live, offsets, at = [], [], 0
    for number, size in enumerate(SIZES):
        at += number % 5  # most of them are not aligned
        offsets.append(at)
        at += size
        memory = torch.full((size + 16,), 0xA5, dtype=torch.uint8, device="cuda")
        live.append(memory[number % 3 : number % 3 + size])
    held = [slot[offset : offset + size] for offset, size in zip(offsets, SIZES, strict=True)]
    latch = Latch(torch.device("cuda:0"))
    if parked:
        latch.aim(slot.data_ptr())
        copies = PredicatedCopy(latch, live, offsets, parked=True)
    else:
        copies = PredicatedCopy(latch, live, [block.data_ptr() for block in held])
    before = [block.clone() for block in (*live, *held)]
    for bad in (0.0, 1.0):
        latch.decide(torch.tensor(bad, device="cuda"))
        copies.run(to_live=to_live)
        if not bad:
            assert same([*live, *held], before)
    source = before[len(SIZES) :] if to_live else before[: len(SIZES)]
    assert same(live, source)
    assert same(held, source)
    whole = torch.cat([block._base for block in live if block._base is not None])
    assert int((whole == 0xA5).sum()) >= 16 * sum(size > 0 for size in SIZES)  # nothing beside the blocks


@pytest.mark.parametrize("protected", [True, False])
def test_the_decision_is_latched(protected):
    latch = Latch(torch.device("cuda:0"))
    state, slot = torch.zeros(2, 100_000, device="cuda"), torch.ones(2, 100_000, device="cuda")
    copies = [PredicatedCopy(latch, [a.view(torch.uint8)], [b.data_ptr()]) for a, b in zip(state, slot, strict=True)]
    bad = torch.ones((), device="cuda")

    def work():
        latch.decide(bad)
        copies[0].run(to_live=True)
        bad.zero_()
        if not protected:
            latch.decide(bad)
        copies[1].run(to_live=True)

    Recorder(torch.device("cuda:0")).record(work)()
    assert (bool(state[0].all()) == bool(state[1].all())) == protected

"""The kernels of `tolaria.optim` against torch's fused optimizers, bit for bit, and the way back on a device."""

import contextlib

import pytest
import torch
from torch import nn

from tolaria import GovernorConfig, TolariaGovernor, judge
from tolaria.errors import NoSnapshot, UnsupportedState
from tolaria.optim import SGD, AdamW

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")]

# whole chunks, parts of one, odd ends, nothing, a number
SHAPES = [(8192,), (64, 257), (3,), (2, 8192), (0,), (), (1023, 33)]
ADAMS = {
    "plain": {},
    "no decay": {"weight_decay": 0.0},
    "amsgrad": {"amsgrad": True, "weight_decay": 0.3},
    "maximize": {"maximize": True, "betas": (0.5, 0.95), "eps": 1e-3},
    "capturable": {"capturable": True},
}
SGDS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    # without decay torch's compiler fuses the other product, where a tensor is stepped four elements at a time
    "turned": {"momentum": 0.9, "dampening": 0.3, "maximize": True},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "dampening": {"momentum": 0.8, "dampening": 0.3, "maximize": True, "weight_decay": 0.01},
}


def parameters(dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator("cuda").manual_seed(0)
    return [nn.Parameter(torch.randn(s, device="cuda", generator=generator).to(dtype)) for s in shapes]


def feed(number, *lists):
    """The same gradients for each list, of very different sizes."""
    generator = torch.Generator("cuda").manual_seed(number)
    for of_each in zip(*lists, strict=True):
        scale = 10.0 ** torch.randint(-6, 2, (), device="cuda", generator=generator)
        grad = torch.randn(of_each[0].shape, device="cuda", generator=generator) * scale
        for parameter in of_each:  # each its own: a scaler divides them in place
            parameter.grad = grad.to(parameter.dtype, copy=True)


def held(optimizer):
    own = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    return [t.clone() for t in (*own, *(v for s in optimizer.state.values() for v in s.values() if v is not None))]


def differing(one, other):
    """Elements that differ by a bit, and by how many units in the last place at most."""
    assert len(one) == len(other)
    words = {4: torch.int32, 2: torch.int16}
    apart = [(a.view(words[a.itemsize]) - b.view(words[b.itemsize])).abs() for a, b in zip(one, other, strict=True)]
    return sum(int((a != 0).sum()) for a in apart), max(int(a.max()) for a in apart if a.numel())


def pair(kind, settings, dtype=torch.float32, **own):
    mine, theirs = parameters(dtype), parameters(dtype)
    ours, torchs = (AdamW, torch.optim.AdamW) if kind == "adamw" else (SGD, torch.optim.SGD)
    return mine, theirs, ours(mine, lr=0.01, **settings, **own), torchs(theirs, lr=0.01, fused=True, **settings)


CASES = [*(("adamw", name, s) for name, s in ADAMS.items()), *(("sgd", name, s) for name, s in SGDS.items())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("kind", "name", "settings"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_as_torchs_fused_one(kind, name, settings, dtype):
    mine, theirs, ours, torchs = pair(kind, settings, dtype)
    for number in range(1000 if name == "plain" and dtype is torch.float32 else 40):
        feed(number, mine, theirs)
        ours.step()
        torchs.step()
    assert ours.kept().compiled
    assert ours.kept().alternates == (name != "capturable")
    assert differing(held(ours), held(torchs)) == (0, 0)


def test_moments_wider_than_parameters():
    mine, wide = parameters(torch.bfloat16), [p.detach().float() for p in parameters(torch.bfloat16)]
    ours = AdamW(mine, lr=0.01, moment_dtype=torch.float32)
    torchs = torch.optim.AdamW(wide, lr=0.01, fused=True)
    for number in range(30):
        feed(number, mine)
        for narrow, one in zip(mine, wide, strict=True):
            one.copy_(narrow.detach())
            one.grad = narrow.grad.float()
        ours.step()
        torchs.step()
        for one in wide:
            one.copy_(one.bfloat16())
    assert ours.kept().compiled
    assert {v.dtype for s in ours.state.values() for v in s.values()} == {torch.float32}
    expected = [w.bfloat16() for w in wide] + [v for s in torchs.state.values() for v in s.values()]
    assert differing(held(ours), expected) == (0, 0)


def test_memory_that_is_not_aligned():
    flat = torch.randn(40_000, device="cuda")
    mine = [nn.Parameter(flat[1:20_001].clone()[1:]), nn.Parameter(flat.clone()[3:])]
    theirs = [nn.Parameter(p.detach().clone()) for p in mine]
    ours, torchs = AdamW(mine, lr=0.01), torch.optim.AdamW(theirs, lr=0.01, fused=True)
    for number in range(10):
        feed(number, mine, theirs)
        ours.step()
        torchs.step()
    assert ours.kept().compiled
    assert differing(held(ours), held(torchs)) == (0, 0)


@pytest.mark.parametrize("alternate", [True, False])
@pytest.mark.parametrize(("kind", "name", "settings"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_back_by_one_and_by_several(kind, name, settings, alternate):
    mine, _, ours, _ = pair(kind, settings, history=3, alternate=alternate)
    states = []
    for number in range(7):
        states.append(held(ours))
        feed(number, mine)
        ours.step()
    last = held(ours)
    assert ours.kept().compiled
    for number in (6, 5, 4):
        ours.undo()
        assert differing(held(ours), states[number]) == (0, 0)
    with pytest.raises(NoSnapshot):
        ours.undo()
    for number in (4, 5, 6):
        feed(number, mine)
        ours.step()
    assert differing(held(ours), last) == (0, 0)
    ours.undo()
    assert differing(held(ours), states[6]) == (0, 0)


@pytest.mark.parametrize("alternate", [True, False])
@pytest.mark.parametrize(("kind", "name", "settings"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_a_flag_on_the_device_refuses_the_step(kind, name, settings, alternate):
    mine, theirs, ours, torchs = pair(kind, settings, alternate=alternate)
    for number in range(9):
        feed(number, mine, theirs)
        bad = number in (3, 4, 7)
        before = held(ours)
        ours.found_inf = torch.full((), float(bad), device="cuda")
        if bad:
            mine[0].grad[5] = float("nan")
        else:
            torchs.step()
        ours.step()
        if number:  # the first one makes the state
            assert (differing(held(ours), before) == (0, 0)) == bad
    assert differing(held(ours), held(torchs)) == (0, 0)
    ours.undo()
    with contextlib.suppress(NoSnapshot):
        ours.undo()


@pytest.mark.parametrize(("kind", "name", "settings"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_under_a_scaler(kind, name, settings):
    mine, theirs, ours, torchs = pair(kind, settings)
    scalers = [torch.amp.GradScaler("cuda", init_scale=512.0) for _ in range(2)]
    for number in range(8):
        feed(number, mine, theirs)
        for some, optimizer, scaler in zip((mine, theirs), (ours, torchs), scalers, strict=True):
            scaler.scale(torch.ones((), device="cuda"))
            for p in some:
                p.grad.mul_(512.0)
            if number == 4:
                some[1].grad[0, 0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
    assert differing(held(ours), held(torchs)) == (0, 0)
    assert differing([p.grad for p in mine], [p.grad for p in theirs]) == (0, 0)


def test_a_step_waits_for_nothing():
    mine, _, ours, _ = pair("adamw", {})
    for number in range(4):
        feed(number, mine)
        torch.cuda.synchronize()
        if number:
            torch.cuda.set_sync_debug_mode("error")
        try:
            ours.step()
            ours.undo()
            ours.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def captured(optimizer):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph


@pytest.mark.parametrize(("kind", "settings"), [("adamw", {"capturable": True}), ("sgd", {"momentum": 0.9})])
def test_captured(kind, settings):
    mine, theirs, ours, torchs = pair(kind, settings)
    for number in range(3):
        feed(number, mine, theirs)
        ours.step()
        torchs.step()
    static = [p.grad for p in mine]
    alternated = ours.kept().alternates
    graph = captured(ours)
    assert not ours.kept().alternates
    assert ours.kept().reason
    assert alternated == (kind == "sgd")
    with pytest.raises(NoSnapshot):
        ours.undo()  # a capture launches nothing
    moments = [v for s in ours.state.values() for v in s.values()]
    for number in range(3, 8):
        feed(number, theirs)
        torchs.step()
        for p, q, grad in zip(mine, theirs, static, strict=True):
            p.grad = grad
            grad.copy_(q.grad)
        before = held(ours)
        if number % 2:
            graph.replay()
        else:
            ours.step()  # beside the graph, over the same memory
        ours.undo()
        assert differing(held(ours), before) == (0, 0)
        with pytest.raises(NoSnapshot):
            ours.undo()
        graph.replay()
    assert differing(held(ours), held(torchs)) == (0, 0)
    assert all(a is b for a, b in zip(moments, (v for s in ours.state.values() for v in s.values()), strict=True))


def test_a_first_step_is_not_captured():
    mine = parameters()
    ours = SGD(mine, lr=0.1, momentum=0.9)
    feed(0, mine)
    something = torch.zeros(3, device="cuda")
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        something.add_(1)
        with pytest.raises(UnsupportedState):
            ours.step()
    ours.step()


@pytest.mark.parametrize("steps", [1, 2])
def test_governed(steps):
    """A rollback over moments that have changed their place since the snapshot, or have come back to it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 8)).cuda()
    optimizer = AdamW(model.parameters(), lr=0.01)
    batches = [torch.randn(16, 32, device="cuda") for _ in range(12)]

    def train(x):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    with TolariaGovernor(model, optimizer, config=GovernorConfig(rng="keep"), detector=judge.non_finite()) as governor:
        for x in batches[:3]:
            train(x)
        optimizer.zero_grad()
        governor.snapshot().wait("sealed")
        before = held(optimizer)
        for x in batches[3 : 3 + steps]:
            train(x)
        after = held(optimizer)
        governor.execute_rollback().wait()
        assert differing(held(optimizer), before) == (0, 0)
        with pytest.raises(NoSnapshot):
            optimizer.undo()  # what it holds is not of the state that is there now
        for x in batches[3 : 3 + steps]:
            train(x)
        assert differing(held(optimizer), after) == (0, 0)
        assert optimizer.kept().compiled


# ---------------------------------------------------------------- a governor goes back by single steps


class Stepped:
    """Buffers, random state, a schedule; gradients on other streams than the governor's."""

    def __init__(self, steps, alternate=True, **settings):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.Dropout(0.2), nn.Linear(64, 8)).cuda()
        self.optimizer = AdamW(self.model.parameters(), lr=0.01, history=steps, alternate=alternate)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 3, gamma=0.5)
        self.batches = [torch.randn(16, 32, device="cuda") for _ in range(40)]
        self.governor = TolariaGovernor(
            self.model,
            self.optimizer,
            scheduler=self.scheduler,
            config=GovernorConfig(cadence=1000, past_steps=steps, rng="restore", **settings),
            detector=judge.non_finite(),
        )

    def loss(self, number):
        loss = self.model(self.batches[number]).square().mean()
        loss.backward()
        return loss

    def step(self, number):
        return self.governor.step(loss=self.loss(number))

    def state(self):
        own = [t.detach().clone() for t in self.model.state_dict().values()]
        return own, held(self.optimizer), self.scheduler.state_dict(), torch.cuda.get_rng_state()


def alike(one, other):
    return (
        all(torch.equal(a, b) for a, b in zip(one[0], other[0], strict=True))
        and differing(one[1], other[1]) == (0, 0)
        and one[2] == other[2]
        and torch.equal(one[3], other[3])
    )


@pytest.mark.parametrize("alternate", [True, False])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_governor_goes_back_by_steps(steps, alternate):
    run, states = Stepped(4, alternate), []
    with run.governor:
        for number in range(9):
            states.append(run.state())
            run.step(number)
        last = run.state()
        assert run.optimizer.kept().compiled
        report = run.governor.step_back(steps)
        assert alike(run.state(), states[9 - steps])
        assert report.wait().device_ms is not None
        for number in range(9 - steps, 9):
            run.step(number)
        assert alike(run.state(), last)
        run.governor.step_back(1)
        run.governor.step_back(1)
        assert alike(run.state(), states[7])
        run.governor.execute_rollback().wait()
        with pytest.raises(NoSnapshot):
            run.governor.step_back(1)


def test_a_step_back_beside_work_of_another_stream():
    """What was launched before, on a stream that nobody knows, reads what was there; what comes after, the other."""
    run, side = Stepped(4), torch.cuda.Stream()
    with run.governor:
        for number in range(5):
            before = run.state()
            run.step(number)
        now = run.state()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)
            early = [p.detach().clone() for p in run.model.parameters()]
        run.governor.step_back(1)
        with torch.cuda.stream(side):
            late = [p.detach().clone() for p in run.model.parameters()]
        torch.cuda.synchronize()
        names = [name for name, _ in run.model.named_parameters()]
        keys = list(run.model.state_dict())
        for name, first, second in zip(names, early, late, strict=True):
            assert torch.equal(first, now[0][keys.index(name)])
            assert torch.equal(second, before[0][keys.index(name)])


def test_a_step_with_notes_waits_for_nothing():
    run = Stepped(4)
    with run.governor:
        for number in range(8):  # each set of moments was there before
            run.step(number)
        run.governor.step_back(1)
        run.step(7)
        torch.cuda.synchronize()
        loss = run.loss(8)
        torch.cuda._sleep(400_000_000)  # the host has to be back before this is over
        behind = torch.cuda.Event()
        behind.record()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run.governor.step(loss=loss)
            run.governor.step_back(1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert not behind.query()


def test_a_veto_is_answered_from_a_note():
    ends, told = [], []
    for strikes in (False, True):
        run = Stepped(26, past_first=True, on_incident=told.append)
        struck = not strikes
        with run.governor:
            for number in run.governor.watch(range(30)):
                loss = run.loss(number)
                if number == 20 and not struck:
                    struck = True
                    run.model[0].weight.grad.fill_(float("nan"))
                run.governor.step(loss=loss)
            ends.append(run.state())
    assert alike(*ends)
    (incident,) = told
    assert (incident.tier, incident.restored_step, incident.action) == ("past", 20, "replay")
    assert incident.steps_lost <= 26

"""A captured step under guard: the device decides in each replay, and the host learns of it later."""

import contextlib
import copy
from collections.abc import Iterator

import pytest
import torch
from cuda_driver import taped
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from tolaria import (
    Detector,
    GovernorConfig,
    Health,
    PhaseError,
    StateMismatch,
    TolariaGovernor,
    UnsupportedState,
    UsageError,
    Verdict,
    in_graph,
    judge,
)
from tolaria.in_graph import CapturedStep
from tolaria.latch import PARKED, TARGET, Latch, PredicatedCopy
from tolaria.optim import AdamW

NAN = float("nan")


def adam(parameters, **settings):
    return torch.optim.Adam(parameters, lr=torch.tensor(0.05), capturable=True, **settings)


class Momentum(torch.optim.Optimizer):
    """An optimizer of somebody else's: no flag, a counter of its own, all of it on the device."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": torch.tensor(0.05)})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["moment"], state["step"] = torch.zeros_like(p), torch.zeros(())
                state["step"].add_(1)
                state["moment"].mul_(0.9).add_(p.grad)
                p.sub_(state["moment"] * group["lr"] / state["step"].sqrt())


OPTIMIZERS = {
    "adam": lambda p: adam(p, fused=True),
    "amsgrad": lambda p: adam(p, fused=True, amsgrad=True, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=torch.tensor(0.05), momentum=0.9, fused=True),
    "another": Momentum,
}


class Run:
    """A model with BatchNorm and dropout, an average of its weights, a schedule."""

    def __init__(
        self,
        late,
        monkeypatch,
        make=OPTIMIZERS["adam"],
        *,
        ema=True,
        plateau=False,
        detector=None,
        scaler=None,
        **settings,
    ):
        torch.manual_seed(3)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.25), nn.Linear(8, 3))
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = make(self.model.parameters())
        self.scheduler = ReduceLROnPlateau(self.optimizer) if plateau else StepLR(self.optimizer, 4, gamma=0.7)
        generator = torch.Generator().manual_seed(3)
        self.batches = [torch.randn(16, 6, generator=generator) for _ in range(22)]
        self.x = torch.zeros(16, 6)
        self.poison = torch.zeros(())
        config = {"cadence": 4, "probation": 4, "host_slots": 0, "scrub_every": 0, "keep_batches": 64, **settings}
        self.governor = TolariaGovernor(
            self.model,
            self.optimizer,
            scheduler=self.scheduler,
            scaler=scaler,
            config=GovernorConfig(**config),
            detector=detector or judge.non_finite(),
        )
        self.governor.register("average", self.average)
        taped.install(monkeypatch, lambda: self.governor._keeper.sections)
        self.step = CapturedStep(self.governor, self.train, after=self.follow if ema else None)

    def train(self):
        loss = self.model(self.x).square().mean()
        loss.backward()
        self.model[4].weight.grad[1, 2] += self.poison  # the loss stays finite
        return loss

    def follow(self):
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 0.1)

    def go(self, poisoned=(), after=lambda delivered: None):
        """Train; in each of the `poisoned` delivered steps a gradient is not finite."""
        for delivered, batch in enumerate(self.governor.watch(self.batches)):
            self.x.copy_(batch)
            self.poison.fill_(NAN if delivered in poisoned else 0.0)
            self.step.step()
            after(delivered)

    def plain(self):
        """The loop without a governor and without a graph."""
        self.governor.close()
        for batch in self.batches:
            self.x.copy_(batch)
            self.train()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.follow()
            self.scheduler.step()

    def written(self):
        """What the device writes in a step, bit for bit; without the learning rate, which schedules change."""
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        found = [*self.model.state_dict().values(), *self.average.state_dict().values(), *moments]
        found = [torch.as_tensor(each) for each in found]
        return [tensor.detach().clone().view(-1).view(torch.uint8).tolist() for tensor in found]

    def state(self):
        return self.written(), self.scheduler.state_dict(), torch.get_rng_state().tolist()


@pytest.fixture
def make_step(late, monkeypatch):
    made = []

    def make(*args, **settings):
        made.append(Run(late, monkeypatch, *args, **settings))
        return made[-1]

    yield make
    for run in made:
        run.governor.close()


@pytest.mark.parametrize(
    ("name", "lag"), [("adam", 1), ("adam", None), ("amsgrad", 2), ("momentum", 3), ("another", 3)]
)
def test_the_run_is_the_clean_one(name, lag, late, make_step):
    late.lag, make = lag, OPTIMIZERS[name]
    clean = make_step(make)
    clean.plain()
    expected = clean.state()
    run = make_step(make)
    run.go(poisoned=[14])
    assert run.step.is_captured
    assert (run.governor.rollbacks, run.governor.statistics().vetoes) == (1, 1)
    assert run.state() == expected


# ------------------------------------------------------------ what the device does alone


def at_the_target(run):
    """What the device writes in a step, as the snapshot holds it that a replay would go back to now."""
    target, leaves = run.step._target(), run.step._survey.leaves.leaves
    held = {leaf.name: target.leaf(leaf).clone() for leaf in leaves if "param_groups" not in leaf.name}
    return held


def live(run):
    leaves = run.step._survey.leaves.leaves
    return {leaf.name: leaf.tensor.detach().clone() for leaf in leaves if "param_groups" not in leaf.name}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def feed(run, batch, bad=False):
    run.x.copy_(batch)
    run.poison.fill_(NAN if bad else 0.0)
    return run.step.step()


def warmed(make_step, *args, steps=12, **settings):
    run = make_step(*args, **settings)
    for batch in run.batches[:steps]:
        feed(run, batch)
    return run


@pytest.mark.parametrize("name", ["amsgrad", "momentum", "another"])
def test_a_refused_replay_is_at_the_snapshot_before_the_host_knows_and_stays_there(name, late, make_step):
    late.lag = 1
    run = warmed(make_step, OPTIMIZERS[name])
    run.governor.state_dict()
    late.lag = None  # from here on nothing arrives
    held = at_the_target(run)
    assert not same(live(run), held)
    assert not feed(run, run.batches[12], bad=True).rolled_back
    assert same(live(run), held)
    assert int(run.step._latch.words[PARKED]) == run.step._latch._aimed != 0
    assert not feed(run, run.batches[13]).rolled_back  # good, and void all the same
    assert same(live(run), held)
    run.governor.state_dict()  # the host learns of it,
    assert feed(run, run.batches[14]).rolled_back  # and rolls back
    assert (run.governor.rollbacks, run.governor.statistics().vetoes) == (1, 1)
    feed(run, run.batches[15])
    assert not int(run.step._latch.words[PARKED])
    assert not same(live(run), held)


def test_without_the_copy_it_is_not(late, make_step, monkeypatch):
    """Red twin: the optimizer alone is refused."""
    monkeypatch.setattr(PredicatedCopy, "run", lambda *_, **__: None)
    late.lag = 1
    run = warmed(make_step)
    run.governor.state_dict()
    late.lag = None
    held = at_the_target(run)
    feed(run, run.batches[12], bad=True)
    assert not same(live(run), held)


def test_a_latch_that_is_not_released_stays_for_ever(late, make_step, monkeypatch):
    """Red twin: of the host's part after its rollback."""
    monkeypatch.setattr(Latch, "release", lambda _: None)
    late.lag = 1
    run = warmed(make_step)
    feed(run, run.batches[12], bad=True)
    for batch in run.batches[13:18]:
        feed(run, batch)
    assert run.governor.rollbacks >= 1
    assert int(run.step._latch.words[PARKED])


@pytest.mark.parametrize("protected", [True, False])
def test_the_decision_is_latched(protected, late, monkeypatch):
    """Condition 1: what was decided from may change between two launches that follow the decision."""
    monkeypatch.setattr("tolaria.latch.compiled", lambda device: taped.KERNELS)
    latch = Latch(torch.device("cpu"))
    state, slot = [torch.zeros(40_000), torch.zeros(5)], [torch.ones(40_000), torch.ones(5)]
    copies = [PredicatedCopy(latch, [a.view(torch.uint8)], [b.data_ptr()]) for a, b in zip(state, slot, strict=True)]
    bad = torch.ones(())
    latch.decide(bad)
    copies[0].run(to_live=True)
    bad.zero_()
    if not protected:
        latch.decide(bad)  # reads the flag once more
    copies[1].run(to_live=True)
    assert (bool(state[0].all()) == bool(state[1].all())) == protected


def is_latch(call):
    return call.__qualname__.startswith("_latch.")


def is_copy(call):
    return call.__qualname__.startswith("_copy_if.")


@pytest.mark.parametrize("protected", [True, False])
def test_the_decision_stands_behind_the_gradients_and_before_the_optimizer(protected, late, make_step):
    """Condition 2."""
    late.lag = 1
    run = warmed(make_step, on_veto="keep", ema=False)
    calls = run.step._recorder.calls
    [decision] = filter(is_latch, calls)
    if not protected:
        calls.remove(decision)
        calls.insert(0, decision)
    run.governor.state_dict()
    late.lag = None
    feed(run, run.batches[12], bad=True)
    assert all(bool(p.isfinite().all()) for p in run.model.parameters()) == protected


@pytest.mark.parametrize("protected", [True, False])
def test_the_copy_stands_behind_everything_that_writes(protected, late, make_step):
    """Condition 6."""
    late.lag = 1
    run = warmed(make_step)
    run.governor.state_dict()
    late.lag = None
    calls = run.step._recorder.calls
    [copy_back] = filter(is_copy, calls)
    if not protected:
        [decision] = filter(is_latch, calls)
        calls.remove(copy_back)
        calls.insert(calls.index(decision) + 1, copy_back)
    held = at_the_target(run)
    feed(run, run.batches[12], bad=True)
    assert same(live(run), held) == protected


@pytest.mark.parametrize("protected", [True, False])
def test_the_device_is_aimed_at_the_newest_certified_snapshot(protected, late, make_step, monkeypatch):
    """Condition 4: a slot is written again once a newer snapshot is certified."""
    aim = Latch.aim

    def once(latch, base):
        if protected or not latch._aimed:
            aim(latch, base)

    monkeypatch.setattr(Latch, "aim", once)
    late.lag = 1
    run = warmed(make_step, steps=20)
    run.governor.state_dict()
    late.lag = None
    feed(run, run.batches[20])
    newest = max(slot.step for slot in run.governor._keeper.ring if slot.phase.value == "certified")
    held = at_the_target(run)
    feed(run, run.batches[21], bad=True)
    assert newest > 10
    assert same(live(run), held) == protected


def test_a_healthy_replay_copies_nothing(late, make_step):
    """Condition 7: whatever is in the slot."""
    late.lag = 1
    states = []
    for spoilt in (False, True):
        run = warmed(make_step)
        if spoilt:
            run.step._target().flat[torch.device("cpu")].fill_(0x7F)
        for batch in run.batches[12:14]:
            feed(run, batch)
        states.append(run.written())
        run.governor.close()
    assert states[0] == states[1]


# ------------------------------------------------------------ what it is kept from


def move_weight(run):
    run.model[0].weight.data = run.model[0].weight.detach().clone()


def replace_moment(run):
    state = run.optimizer.state[run.model[0].weight]
    state["exp_avg"] = state["exp_avg"].clone()


def reload_optimizer(run):
    run.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))


def set_to_numbers(run):
    run.optimizer.param_groups[0]["lr"] = 0.1


def change_beta(run):
    run.optimizer.param_groups[0]["betas"] = (0.8, 0.99)


CHANGES = [
    (move_weight, StateMismatch, "model.0.weight"),
    (replace_moment, StateMismatch, "other memory than the train state now: optimizer.*exp_avg"),
    (reload_optimizer, StateMismatch, "other memory"),
    (set_to_numbers, StateMismatch, "lr"),
    (change_beta, UnsupportedState, "0.8, 0.99"),
]


@pytest.mark.parametrize(("change", "error", "match"), CHANGES)
def test_a_graph_that_no_longer_fits_is_not_replayed(change, error, match, late, make_step):
    """Condition 3."""
    late.lag = 1
    run = warmed(make_step, steps=5)
    change(run)
    before, replays = run.written(), run.step._recorder.num_replays
    with pytest.raises(error, match=match):
        feed(run, run.batches[5])
    assert run.written() == before
    assert run.step._recorder.num_replays == replays


def test_unchecked_it_trains_memory_that_nobody_reads(late, make_step, monkeypatch):
    """Red twin."""
    monkeypatch.setattr(CapturedStep, "_require_unchanged", lambda *_: None)
    late.lag = 1
    run = warmed(make_step, steps=5)
    move_weight(run)
    before = run.model[0].weight.detach().clone()
    feed(run, run.batches[5])
    assert torch.equal(run.model[0].weight, before)


REFUSED = [
    (lambda p: torch.optim.Adam(p, lr=torch.tensor(0.05), fused=True), {}, "capturable=False"),
    (lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True), {}, "is a number"),
    (OPTIMIZERS["adam"], {"update_ratio_every": 3}, "update_ratio_every"),
    (OPTIMIZERS["adam"], {"by_group": True}, "by_group"),
    (OPTIMIZERS["adam"], {"reexecute_every": 4}, "reexecute_every"),
    (lambda p: AdamW(p, lr=torch.tensor(0.05), capturable=True, history=2), {"past_steps": 2}, "past_steps"),
]


@pytest.mark.parametrize(("make", "settings", "match"), REFUSED)
def test_what_no_graph_can_hold_is_refused_at_once(make, settings, match, late, make_step):
    """Condition 5."""
    with pytest.raises(UnsupportedState, match=match):
        make_step(make, **settings)


def test_a_number_for_a_learning_rate_would_be_held_for_ever(late, make_step, monkeypatch):
    """Red twin: the schedule has no effect on replays; the check of hyper-parameters is the second line."""
    monkeypatch.setattr(in_graph, "_refuse_set_up", lambda _: None)
    late.lag = 1
    run = make_step(lambda p: torch.optim.SGD(p, lr=0.05, fused=True))
    for batch in run.batches[:4]:
        feed(run, batch)
    with pytest.raises(UnsupportedState, match="hyper-parameters"):
        feed(run, run.batches[4])


class Counting(Momentum):
    """Counts on the host."""

    def step(self, closure=None):
        super().step()
        for state in self.state.values():
            state["seen"] = state.get("seen", 0) + 1


class Late(Momentum):
    """Makes more state in its fourth step."""

    def step(self, closure=None):
        super().step()
        for p, state in self.state.items():
            state["calls"] = state.get("calls", torch.zeros(())) + 1
            if len(state) < 4 and self.taken == 3:
                state["slow"] = p.detach().clone()
        self.taken += 1

    taken = 0


@pytest.mark.parametrize(("make", "match"), [(Counting, "numbers of the host"), (Late, "inside the capture.*slow")])
def test_state_of_the_wrong_kind_is_refused_and_nothing_is_lost(make, match, late, make_step):
    late.lag = 1
    run = make_step(make, ema=False)
    for batch in run.batches[:3]:
        feed(run, batch)
    before = run.written()
    with pytest.raises(UnsupportedState, match=match):
        feed(run, run.batches[3])
    assert run.written() == before
    assert not run.step.is_captured
    assert all(p.grad is None for p in run.model.parameters())


def test_a_step_that_reads_the_device_cannot_be_captured_and_leaves_all_as_it_was(late, make_step):
    late.lag = 1
    run = make_step()
    run.train, seen = run.step._train, []
    run.step._train = lambda: (loss := run.train(), seen.append(float(loss.detach())))[0]
    for batch in run.batches[:3]:
        feed(run, batch)
    before = run.written()
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        feed(run, run.batches[3])
    assert run.written() == before
    assert all(p.grad is None for p in run.model.parameters())
    run.step._train = run.train
    feed(run, run.batches[3])
    assert run.step.is_captured


# ------------------------------------------------------------ kept vetoes


@pytest.mark.parametrize(("name", "ema"), [("adam", True), *((name, False) for name in OPTIMIZERS)])
def test_a_kept_veto_leaves_nothing_of_the_step(name, ema, late, make_step):
    """Bit for bit: weights, moments, counters, the average. What the forward has moved stays moved."""
    late.lag = 1
    run = warmed(make_step, OPTIMIZERS[name], on_veto="keep", ema=ema)
    before = live(run)
    feed(run, run.batches[12], bad=True)
    after = live(run)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        "model.1.running_mean",
        "model.1.running_var",
        "model.1.num_batches_tracked",
    }
    feed(run, run.batches[13])
    moved = [name for name, now in live(run).items() if not torch.equal(after[name], now)]
    assert {"model.0.weight", "model.4.weight"} < set(moved)
    assert ema == any(name.startswith("average") for name in moved)
    run.governor.state_dict()
    assert (run.governor.statistics().vetoes, run.governor.rollbacks) == (1, 0)


def test_without_setting_the_state_aside_another_optimizer_moves(late, make_step, monkeypatch):
    """Red twin."""
    monkeypatch.setattr(PredicatedCopy, "run", lambda *_, **__: None)
    late.lag = 1
    run = warmed(make_step, Momentum, on_veto="keep", ema=False)
    run.governor.state_dict()
    late.lag = None
    feed(run, run.batches[12], bad=True)
    assert not bool(run.model[4].weight.isfinite().all())


def test_twenty_kept_vetoes_in_a_row_are_a_panic(late, make_step):
    late.lag = 1
    run = warmed(make_step, steps=8, on_veto="keep")
    results = [feed(run, run.batches[8], bad=True) for _ in range(24)]
    assert [result.rolled_back for result in results].count(True) == 1


# ------------------------------------------------------------ the host's books


def test_a_batch_that_is_always_bad_is_left_out(late, make_step):
    late.lag = 2
    run = make_step()
    bad = run.batches[13]
    for batch in run.governor.watch(run.batches):
        feed(run, batch, bad=batch is bad)
    counted = run.governor.statistics()
    assert (run.governor.rollbacks, counted.skipped_batches) == (2, 1)
    assert run.governor._course.completed == len(run.batches) - 1
    assert all(bool(value.isfinite().all()) for value in run.model.state_dict().values())
    assert run.scheduler.last_epoch == len(run.batches) - 1


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_panic_around_the_capture(at, late, make_step):
    late.lag = 3
    clean = make_step()
    clean.plain()
    expected = clean.state()
    run = make_step()
    run.go(poisoned=[at])
    assert run.governor.rollbacks == 1
    assert run.step.is_captured
    assert run.state() == expected


@pytest.mark.parametrize("protected", [True, False])
def test_a_snapshot_by_hand_waits_for_what_the_device_has_decided(protected, late, make_step):
    late.lag = 1
    run = warmed(make_step)
    run.governor.state_dict()
    late.lag = None
    before = live(run)
    feed(run, run.batches[12], bad=True)
    if protected:
        with pytest.raises(PhaseError, match="have panicked"):
            run.governor.snapshot()
        assert feed(run, run.batches[13]).rolled_back
        assert run.governor.snapshot().step == run.governor._course.completed
    else:
        run.governor._keeper.before_manual = lambda: None
        info = run.governor.snapshot()  # says that it is of step 13, with weights of an earlier one
        assert info.step == 13
        assert not same(live(run), before)


def test_a_rollback_by_hand_releases_what_the_host_never_learnt_of(late, make_step):
    late.lag = 1
    run = warmed(make_step)
    taken = run.governor.snapshot()
    held = live(run)
    late.lag = None
    feed(run, run.batches[12], bad=True)
    run.governor.execute_rollback(to=taken)
    assert same(live(run), held)
    feed(run, run.batches[13])
    assert not int(run.step._latch.words[PARKED])
    assert not same(live(run), held)
    run.governor.state_dict()
    assert run.governor.rollbacks == 1


def test_in_main_memory_the_device_refuses_and_the_host_rolls_back(late, make_step):
    late.lag = 1
    clean = make_step()
    clean.plain()
    expected = clean.state()
    run = make_step(tier="host")
    run.go(poisoned=[14])
    assert run.step._back is None
    assert run.governor.rollbacks == 1
    assert run.state() == expected


def test_signs_of_the_caller_arrive(late, make_step):
    seen = []

    def update(state, vital):
        seen.append(dict(vital.extra))
        return state, Verdict(Health.HEALTHY, vital.step)

    late.lag = 1
    run = make_step(detector=Detector(lambda: 0, update))
    for batch in run.batches[:8]:
        run.x.copy_(batch)
        run.step.step(size=run.x.abs().max(), metric=1.0)
    run.governor.state_dict()
    assert [each["size"] for each in seen] == [float(batch.abs().max()) for batch in run.batches[:8]]


def test_a_plateau_without_a_metric_is_refused(late, make_step):
    late.lag = 1
    run = make_step(plateau=True)
    for batch in run.batches[:3]:
        run.x.copy_(batch)
        run.step.step(metric=1.0)
    with pytest.raises(UnsupportedState, match="ReduceLROnPlateau"):
        run.step.step()
    for _ in range(12):
        run.step.step(metric=1.0)
    assert float(run.optimizer.param_groups[0]["lr"]) < 0.05


@pytest.mark.parametrize("settings", [{"mode": "observe"}, {}])
def test_where_nothing_is_governed_it_runs_as_written(settings, late, make_step, monkeypatch):
    if not settings:
        monkeypatch.setenv("TOLARIA_DISABLE", "1")
    run = make_step(**settings)
    for batch in run.batches[:6]:
        feed(run, batch)
    assert not run.step.is_captured
    assert run.governor._course.completed == 6
    assert bool((run.model[0].weight != run.average[0].weight).any())


# ------------------------------------------------------------ what else is part of the step


def test_clipping_is_part_of_the_graph(late, make_step):
    late.lag = 1
    clean, run = make_step(ema=False), None
    clean.governor.close()
    for batch in clean.batches[:8]:
        clean.x.copy_(batch)
        clean.train()
        torch.nn.utils.clip_grad_norm_(clean.model.parameters(), 0.01)
        clean.optimizer.step()
        clean.optimizer.zero_grad()
        clean.scheduler.step()
    expected = clean.state()
    run = make_step(ema=False)
    run.step = CapturedStep(run.governor, run.train, clip=0.01)
    for batch in run.batches[:8]:
        feed(run, batch)
    assert run.state() == expected


def test_a_cooled_learning_rate_reaches_replays(late, make_step, monkeypatch):
    late.lag = 1
    moved = []
    for factor in (1.0, 0.5):
        run = warmed(make_step, OPTIMIZERS["momentum"], steps=5)
        monkeypatch.setattr(run.governor._course, "learning_rate_factor", lambda factor=factor: factor)
        before, rate = run.model[0].weight.detach().clone(), run.optimizer.param_groups[0]["lr"].clone()
        feed(run, run.batches[5])
        moved.append(run.model[0].weight.detach() - before)
        assert torch.equal(run.optimizer.param_groups[0]["lr"], rate)
        run.governor.close()
    torch.testing.assert_close(moved[1], moved[0] / 2)
    assert bool(moved[0].any())


def scaled(make_step, **settings):
    """A run over a scaler, whose gradients overflow where the first number of a batch is large."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=5)
    run = make_step(ema=False, scaler=scaler, **settings)

    def train():
        loss = run.model(run.x).square().mean()
        scaler.scale(loss).backward()
        run.model[4].bias.grad[0] += torch.where(run.x[0, 0] > 100.0, float("inf"), 0.0)
        scaler.unscale_(run.optimizer)
        run.model[4].weight.grad[1, 2] += run.poison  # the scaler has not seen it
        return loss

    run.step._train = train
    return run


@pytest.mark.parametrize("lag", [1, None])
def test_what_a_scaler_skips_is_routine_and_what_it_has_not_seen_is_not(lag, late, make_step):
    late.lag = lag
    ends = []
    for poisoned in ([], [14]):
        run = scaled(make_step, check_weights_every=3)
        run.batches[9][0, 0] = 1000.0
        run.go(poisoned)
        assert (run.governor.rollbacks, run.governor.statistics().vetoes) == (len(poisoned), len(poisoned))
        assert run.scheduler.last_epoch == len(run.batches)
        assert int(run.optimizer.state[run.model[0].weight]["step"]) == len(run.batches) - 1
        ends.append((run.state(), run.governor._update.scaler.state_dict()))
        run.governor.close()
    assert ends[0] == ends[1]


def test_weights_are_looked_at_where_the_configuration_asks_for_it(late, make_step):
    late.lag = 1
    run = warmed(make_step, steps=6, check_weights_every=4, cadence=100, ema=False)
    run.step._recorder.calls.clear()  # replays that write nothing and look at nothing
    with torch.no_grad(), run.governor.using():
        run.model[0].bias[0] = NAN
    assert not feed(run, run.batches[6]).rolled_back
    run.governor.state_dict()
    assert run.governor.statistics().panics == 0
    feed(run, run.batches[7])  # the eighth step
    run.governor.state_dict()
    assert run.governor.statistics().panics == 1


def test_a_norm_of_the_callers_own_is_judged_in_the_place_of_ours(late, make_step):
    norms = []

    def update(state, vital):
        norms.append(vital.grad_norm)
        return state, Verdict(Health.HEALTHY, vital.step)

    late.lag = 1
    run = make_step(detector=Detector(lambda: 0, update))
    for number, batch in enumerate(run.batches[:6]):
        run.x.copy_(batch)
        run.step.step(grad_norm=torch.tensor(float(number)))
    run.governor.state_dict()
    assert norms == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def test_a_replay_waits_for_the_one_before_it(late, make_step, monkeypatch):
    """Its caller may launch on another stream by now, and both use the latch."""
    late.lag = 1
    run = warmed(make_step, steps=5)
    port, events = run.step._port, []
    mark, wait = port.mark, port.caller_wait
    monkeypatch.setattr(type(port), "mark", lambda self: (events.append(["mark", mark()]), events[-1][1])[1])
    monkeypatch.setattr(type(port), "caller_wait", lambda self, event: (events.append(["wait", event]), wait(event))[1])
    feed(run, run.batches[5])
    last = run.step._last
    events.clear()
    feed(run, run.batches[6])
    assert events[0] == ["wait", last] or ["wait", last] in events[: events.index(["mark", run.step._last])]


def test_where_no_snapshot_is_left_on_the_device_it_is_aimed_at_none(late, make_step):
    late.lag = 1
    run = warmed(make_step, steps=6)
    assert int(run.step._latch.words[TARGET])
    run.governor._keeper.give_up(lambda slot: True)
    feed(run, run.batches[6])
    assert not int(run.step._latch.words[TARGET])


@pytest.mark.parametrize(
    ("named", "is_on"), [("cuda", True), ("cuda:0", True), ("cuda:1", False), ("cpu", False), ("meta", False)]
)
def test_a_generator_may_not_know_the_number_of_its_device(named, is_on):
    assert in_graph._is_on(torch.device(named), torch.device("cuda:0")) == is_on


def test_registered_generators_are_registered_with_the_graph(late, make_step):
    late.lag = 1
    run, noise = make_step(), torch.Generator()
    run.governor.register("noise", noise)
    for batch in run.batches[:4]:
        feed(run, batch)
    assert run.step._recorder.generators == [noise]


# ------------------------------------------------------------ refusals


def test_on_a_cpu_there_are_no_graphs(alone):
    model = nn.Linear(2, 2)
    governor = TolariaGovernor(model, adam(model.parameters(), fused=True))
    with governor, pytest.raises(UnsupportedState, match="barrier is 'host'"):
        CapturedStep(governor, lambda: None)


def test_without_an_optimizer_there_is_no_step(late, monkeypatch):
    with TolariaGovernor(nn.Linear(2, 2)) as governor, pytest.raises(UnsupportedState, match="no optimizer"):
        CapturedStep(governor, lambda: None)


def test_a_scaler_over_an_optimizer_without_a_flag_is_refused(late, make_step):
    with pytest.raises(UnsupportedState, match="reads its flag on the host"):
        scaled(make_step, make=Momentum)


def test_state_on_another_device_is_refused(late, make_step):
    run = make_step()
    with pytest.raises(UnsupportedState, match=r"not on meta: model\.0\.weight"):
        in_graph._refuse_state(run.governor, run.governor._keeper.state.survey(), torch.device("meta"))


def test_a_step_without_gradients_is_refused(late, make_step):
    late.lag = 1
    run = make_step()
    for batch in run.batches[:3]:
        feed(run, batch)
    run.step._train = lambda: run.model(run.x).detach().mean()
    with pytest.raises(UnsupportedState, match="no gradient"):
        feed(run, run.batches[3])


@pytest.mark.parametrize("at", ["before any gradient", "behind the unscaling"])
def test_a_capture_that_fails_leaves_the_scaler_as_it_was(at, late, make_step):
    """Else the next step would take its gradients for unscaled, and apply them as they are."""
    late.lag = 1
    ends = []
    for fails in (False, True):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=5)
        run = make_step(ema=False, scaler=scaler)

        def train(run=run, scaler=scaler):
            loss = run.model(run.x).square().mean()
            scaler.scale(loss).backward()
            return loss

        def broken(run=run, scaler=scaler):
            if at == "before any gradient":
                return run.model(run.x).detach().mean()
            loss = train(run, scaler)
            scaler.unscale_(run.optimizer)
            float(loss)
            return loss

        run.step._train = train
        for batch in run.batches[:3]:
            feed(run, batch)
        if fails:
            run.step._train = broken
            with pytest.raises((UnsupportedState, RuntimeError), match=r"no gradient|not permitted"):
                feed(run, run.batches[3])
            run.step._train = train
        for batch in run.batches[3:8]:
            feed(run, batch)
        ends.append((run.state(), scaler.state_dict()))
        run.governor.close()
    assert ends[0] == ends[1]


@pytest.mark.parametrize("warm_up", [0, True, 1.5])
def test_a_warm_up_that_makes_no_sense_is_refused(warm_up, late, make_step):
    run = make_step()
    with pytest.raises(UsageError, match="warm_up"):
        CapturedStep(run.governor, run.train, warm_up=warm_up)


def test_what_follows_a_capture_stands_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch sets the offset of random numbers on the stream of a capture, and once more on that of the replay."""
    order: list[tuple[str, ...]] = []

    class Stream:
        def __init__(self, device: torch.device, name: str = "the capture's") -> None:
            self.device, self.name = device, name

        def wait_stream(self, other: "Stream") -> None:
            order.append((self.name, "waits for", other.name))

    @contextlib.contextmanager
    def capturing(graph: object, *, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        order.append((stream.name, "captures"))
        yield
        order.append((stream.name, "has captured"))

    class Graph:
        def replay(self) -> None:
            order.append(("replayed",))

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(device, "the caller's"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    in_graph.Recorder(torch.device("cuda:0")).record(lambda: order.append(("work",)))()
    assert order == [
        ("the capture's", "captures"),
        ("work",),
        ("the capture's", "has captured"),
        ("the caller's", "waits for", "the capture's"),
        ("replayed",),
    ]

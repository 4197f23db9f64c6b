"""The race oracle, fed from a real run on a CPU: host threads are the actors, and the gate is all that orders them.

No thread here gets in another's way: a missing edge shows although each of them is done before the next begins.
"""

import threading

import pytest
import torch
from torch import nn

from tolaria import GovernorConfig, TolariaGovernor, judge
from tolaria.driver import Driver
from tolaria.testing.recorder import Recorder, range_of


@pytest.fixture(autouse=True)
def _alone(alone):
    """Every test here."""


@pytest.fixture
def governed():
    model = nn.Linear(4, 4)
    with TolariaGovernor(model, config=GovernorConfig(rng="keep"), detector=judge.non_finite()) as governor:
        yield model, governor


class Helper(threading.Thread):
    """A thread that does one thing after another, when it is told to, and is never joined in between.

    What orders it and others are events that the recorder does not know: nothing, as far as the oracle can see.
    """

    def __init__(self):
        super().__init__(name="helper")
        self.work, self.goes, self.done = None, threading.Semaphore(0), threading.Semaphore(0)

    def run(self):
        while self.goes.acquire() and self.work is not None:
            self.work()
            self.done.release()

    def does(self, work):
        self.work = work
        self.goes.release()
        assert self.done.acquire(timeout=60)

    def ends(self):
        self.work = None
        self.goes.release()
        self.join()


def write(model, governor=None, number=1.0):
    if governor is None:
        with torch.no_grad():
            model.weight.fill_(number)
    else:
        with torch.no_grad(), governor.using():
            model.weight.fill_(number)


def run(governed, gated, roll_back=True):
    model, governor = governed
    with Recorder(governor) as recorder:
        helper = Helper()
        helper.start()
        governor.snapshot()
        helper.does(lambda: write(model, governor if gated else None))
        if roll_back:
            governor.execute_rollback()
        helper.ends()
    return recorder


def test_a_thread_that_asks_for_a_section_does_not_race(governed):
    recorder = run(governed, gated=True)
    assert [str(race) for race in recorder.races] == []
    names = {access.actor for access in recorder.ledger._accesses.values()}
    assert len(names) == 2, "both threads were seen"
    told = [access.what for access in recorder.ledger._accesses.values()]
    assert any(what.startswith("Copy(slot") for what in told)
    assert not any("_foreach_copy_" in what for what in told), "the governor's copies were told of twice"


def test_one_that_asks_nobody_does(governed):
    recorder = run(governed, gated=False)
    found = {(race.first.actor, race.second.actor) for race in recorder.races}
    helper = next(name for pair in found for name in pair if "helper" in name)
    main = recorder.thread()
    # with the snapshot before and the rollback behind
    assert {(main, helper), (helper, main)} <= found
    assert any("fill_ of model.weight" in race.second.what for race in recorder.races)


@pytest.mark.parametrize("side", ["open_section", "submit"])
def test_each_side_of_the_gate_is_an_edge(governed, monkeypatch, side):
    """Sections that are never opened; and submissions that take the gate from nobody."""
    if side == "open_section":
        monkeypatch.setattr(Driver, "open_section", lambda self, *_: self.state.epoch)
    else:
        from tolaria.testing import recorder as module

        # who holds the exclusive side is not told of
        monkeypatch.setattr(module, "tell_gate", sections_only(module.tell_gate))
    assert run(governed, gated=True).races


def sections_only(original):
    def tell(ledger, thread, number, before, after):
        if before.owner == after.owner:
            original(ledger, thread, number, before, after)

    return tell


def test_starting_and_joining_a_thread_orders_it(governed):
    model, governor = governed
    with Recorder(governor) as recorder:
        write(model)
        thread = threading.Thread(target=write, args=(model,))
        thread.start()
        thread.join()
        write(model)
    assert [str(race) for race in recorder.races] == []


@pytest.mark.parametrize("missing", ["start", "join"])
def test_without_the_start_or_the_join_it_does_not(governed, missing):
    model, governor = governed
    with Recorder(governor) as recorder:
        helper = Helper()
        if missing == "join":
            helper.start()
            helper.does(lambda: write(model))
            write(model)
        else:
            helper.start()
            write(model)
            helper.does(lambda: write(model))
        helper.ends()
    (race,) = recorder.races
    assert "helper" in (race.second if missing == "start" else race.first).actor


def test_operators_of_a_backward_pass_are_seen(governed):
    model, governor = governed
    with Recorder(governor) as recorder:
        model(torch.randn(2, 4, requires_grad=True)).sum().backward()
    places = {(access.what, access.writes) for access in recorder.ledger._accesses.values()}
    assert ("aten.mm of model.weight", False) in places or ("aten.addmm of model.weight", False) in places
    assert not any(writes for _, writes in places)


def test_what_torch_does_not_see_can_be_told(governed):
    _, governor = governed
    buffer = torch.zeros(8)
    with Recorder(governor) as recorder:
        recorder.watch("a buffer", buffer)
        helper = Helper()
        helper.start()
        recorder.did(writes=[buffer[:4]], what="fill")
        helper.does(lambda: recorder.did(reads=[buffer[4:]], what="read"))
        assert recorder.races == []
        helper.does(lambda: recorder.did(reads=[buffer[3:]], what="read"))
        helper.ends()
    (race,) = recorder.races
    assert "fill of a buffer" in str(race)
    assert race.missing.endswith("nothing orders 'read of a buffer' behind 'fill of a buffer'")
    assert race.second.where == ("cpu", buffer.data_ptr() + 12, 20)


def test_optimizer_state_that_appears_is_watched(governed):
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    governed[1].close()
    with (
        TolariaGovernor(model, optimizer, config=GovernorConfig(rng="keep")) as governor,
        Recorder(governor) as recorder,
    ):
        for _ in range(2):
            model(torch.randn(2, 4)).sum().backward()
            optimizer.step()
            governor.snapshot(grads="drop")
    names = {access.what for access in recorder.ledger._accesses.values()}
    assert any("momentum_buffer" in name for name in names)


def test_bytes_of_views():
    base = torch.zeros(4, 4)
    assert range_of(base) == ("cpu", base.data_ptr(), 64)
    assert range_of(base[:, 1]) == ("cpu", base.data_ptr() + 4, 4 * (3 * 4 + 1))
    assert range_of(base[1:1])[2] == 0

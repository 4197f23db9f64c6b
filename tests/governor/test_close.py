"""`close()` leaves no trace, a second governor is refused, and nothing keeps models or governors alive."""

from __future__ import annotations

import gc
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tolaria import GovernorConfig, PhaseError, TolariaGovernor, UnsupportedState, UsageError, living

Govern = Callable[..., TolariaGovernor]


def traces(run: Any) -> Any:
    """What hangs on model and optimizer, by identity. `_opt_called` is the scheduler's own note."""
    values = {**vars(run.model), **{f"optimizer.{name}": value for name, value in vars(run.optimizer).items()}}
    return {
        name: value.__func__ if inspect.ismethod(value) else id(value)
        for name, value in values.items()
        if name not in ("training", "optimizer._opt_called")
    }


# ------------------------------------------------------------ no trace


@pytest.mark.parametrize("how", ["close", "with", "with error"])
def test_close_leaves_no_trace(how: str, govern: Govern, kit: Any) -> None:
    run = kit.Run()
    before = traces(run)
    governor = govern(run.model, run.optimizer, scheduler=run.scheduler, config=GovernorConfig(cadence=2, probation=1))
    assert "forward" in vars(run.model)
    assert traces(run) != before
    if how == "close":
        run.train(governor, run.batches[:5])
        governor.close()
    else:
        try:
            with governor:
                run.train(governor, run.batches[:5])
                if how == "with error":
                    raise KeyError("the user's own")
        except KeyError:
            pass
    assert traces(run) == before
    assert governor not in living.governors()
    governor.close()  # a second time does nothing


def test_close_puts_back_what_the_instance_had_before(govern: Govern, kit: Any) -> None:
    """Accelerate and others replace `forward` on the instance too; a scheduler does so with `step`."""
    run = kit.Run()
    own = run.model.forward
    run.model.forward = lambda x: own(x) * 2
    torch.optim.lr_scheduler.StepLR(run.optimizer, 3)
    before = traces(run)
    x = run.batches[0][0]
    run.model.eval()
    expected = run.model(x)
    governor = govern(run.model, run.optimizer)
    assert torch.equal(run.model(x), expected)
    governor.close()
    assert traces(run) == before
    assert torch.equal(run.model(x), expected)


def test_what_others_wrapped_since_stays_and_passes_straight_through(govern: Govern, kit: Any) -> None:
    run = kit.Run()
    governor = govern(run.model, run.optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(run.optimizer, 3)
    calls = []
    governed = run.model.forward
    run.model.forward = lambda x: (calls.append("outer"), governed(x))[1]
    governor.close()
    state = governor._keeper.driver.state
    run.backward(run.batches[0])
    run.optimizer.step()
    scheduler.step()
    assert calls == ["outer"]
    assert governor._keeper.driver.state is state  # no section was opened


def test_close_frees_the_slots(govern: Govern, kit: Any) -> None:
    run = kit.Run()
    governor = govern(run.model, run.optimizer)
    governor.snapshot()
    [arena] = [slot.arena for slot in governor._keeper.vault.slots if slot.arena is not None]
    held = [weakref.ref(flat) for flat in arena.flat.values()]
    del arena
    governor.close()
    gc.collect()
    assert [reference() for reference in held] == [None]


def test_a_closed_governor_refuses_by_name(govern: Govern, kit: Any) -> None:
    run = kit.Run()
    governor = govern(run.model, run.optimizer)
    info = governor.snapshot()
    governor.close()
    before = run.state()
    calls: list[Callable[[], Any]] = [
        governor.snapshot,
        governor.execute_rollback,
        lambda: governor.snapshot(when="boundary"),
        lambda: governor.execute_rollback(when="boundary"),
        lambda: governor.step(loss=1.0),
        lambda: governor.observe(loss=1.0),
        lambda: governor.check_vital_signs(1.0),
        lambda: governor.register("later", run.scheduler),
        lambda: list(governor.watch([1])),
        governor.digest,
    ]
    for call in calls:
        with pytest.raises(PhaseError, match="closed") as caught:
            call()
        assert caught.value.state_intact
    with governor.using():  # passes through
        pass
    assert governor.statistics().snapshots == 1
    governor.capabilities()
    governor.state_dict()
    assert info.state in ("staged", "sealed", "dropped")
    assert run.state() == before


# ------------------------------------------------------------ one governor per model


def test_a_second_governor_is_refused_and_the_first_goes_on(govern: Govern, kit: Any) -> None:
    run = kit.Run()
    first = govern(run.model, run.optimizer)
    with pytest.raises(UsageError, match="governed already"):
        govern(run.model)
    first.snapshot()
    before = run.state(with_rng=False)
    run.step(first, run.batches[0])
    first.execute_rollback()
    assert run.state(with_rng=False) == before


def test_a_governor_that_was_dropped_in_a_cycle_is_in_nobodys_way(kit: Any) -> None:
    """As where an exception of a notebook holds it."""
    run = kit.Run()
    gc.collect()
    gc.disable()
    try:
        held: list[Any] = [TolariaGovernor(run.model, run.optimizer)]
        held.append(held)
        del held
        TolariaGovernor(run.model, run.optimizer).close()
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", ["a part of it", "a whole around it", "another model with a shared layer"])
def test_one_governor_trains_a_parameter(kind: str, govern: Govern, kit: Any) -> None:
    """A rollback of one would change weights under the other. What neither trains they may share."""
    run = kit.Run()
    others = {
        "a part of it": lambda: run.model[4],
        "a whole around it": lambda: nn.Sequential(run.model, nn.Linear(2, 2)),
        "another model with a shared layer": lambda: nn.Sequential(run.model[4], nn.Linear(2, 2)),
    }
    other = others[kind]()
    first = govern(run.model, run.optimizer)
    with pytest.raises(UsageError, match="trains some of this model's parameters"):
        govern(other)
    govern(other, config=GovernorConfig(mode="observe")).close()
    run.model[4].requires_grad_(False)
    if kind != "a whole around it":
        govern(other).close()
    run.model[4].requires_grad_(True)
    first.close()
    govern(other)


def test_reattach_after_close(govern: Govern, kit: Any) -> None:
    run = kit.Run()
    clean = kit.Run()
    torch.manual_seed(5)
    for batch in clean.batches[:6]:
        clean.plain_step(batch)
    torch.manual_seed(5)
    for part in (run.batches[:2], run.batches[2:4], run.batches[4:6]):
        governor = govern(run.model, run.optimizer, scheduler=run.scheduler)
        run.train(governor, part)
        governor.snapshot()
        governor.execute_rollback()
        governor.close()
    assert run.state() == clean.state()


def test_two_models_have_two_governors(govern: Govern, kit: Any) -> None:
    """One panics; the other does not notice. Random state is nobody's: each keeps it as it runs."""
    one, two = kit.Run(1), kit.Run(2)
    governors = [govern(run.model, run.optimizer) for run in (one, two)]
    assert [governor.capabilities().rng for governor in governors] == ["keep", "keep"]
    for run, governor in zip((one, two), governors, strict=True):
        governor.snapshot()
        run.step(governor, run.batches[0])
    other, random_state = two.state(with_rng=False), torch.get_rng_state()
    governors[0].execute_rollback()
    assert two.state(with_rng=False) == other
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [governor.statistics().rollbacks for governor in governors] == [1, 0]
    governors[1].close()
    assert governors[0].capabilities().rng == "restore"


# ------------------------------------------------------------ refused constructions


class Meta(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 3, device="meta")


def test_a_refused_construction_attaches_nothing(govern: Govern) -> None:
    model = Meta()
    before = dict(vars(model))
    with pytest.raises(UnsupportedState, match="body"):
        govern(model)
    assert vars(model) == before
    assert living.governors() == []


def test_a_refused_optimizer_attaches_nothing(govern: Govern, kit: Any) -> None:
    run = kit.Run()
    before = traces(run)
    with pytest.raises(UnsupportedState, match="optimizer"):
        govern(run.model, run.optimizer.state_dict())
    assert traces(run) == before
    govern(run.model, run.optimizer)


def test_a_coordinator_is_refused_for_now(govern: Govern, kit: Any) -> None:
    run = kit.Run()
    before = traces(run)
    with pytest.raises(UnsupportedState, match="coordinator"):
        govern(run.model, run.optimizer, coordinator=object())
    assert traces(run) == before


# ------------------------------------------------------------ garbage


@pytest.mark.parametrize("closed", [False, True])
def test_governor_and_model_are_collected(closed: bool, kit: Any) -> None:
    run = kit.Run()
    governor = TolariaGovernor(run.model, run.optimizer, scheduler=run.scheduler, detector=kit.non_finite())
    run.train(governor, run.batches[:3])
    governor.snapshot()
    governor.execute_rollback()
    if closed:
        governor.close()
    references = [weakref.ref(one) for one in (governor, run.model, run.optimizer, governor._keeper.sections)]
    del governor, run
    gc.collect()
    assert [reference() for reference in references] == [None] * 4


def test_a_governor_that_was_dropped_leaves_a_working_model(kit: Any) -> None:
    run, clean = kit.Run(), kit.Run()
    torch.manual_seed(3)
    for batch in clean.batches[:3]:
        clean.plain_step(batch)
    governor = TolariaGovernor(run.model, run.optimizer, detector=kit.non_finite())
    dropped = weakref.ref(governor)
    del governor
    gc.collect()
    assert dropped() is None
    torch.manual_seed(3)
    for batch in run.batches[:3]:
        run.plain_step(batch)
    assert run.state() == clean.state()
    again = TolariaGovernor(run.model, run.optimizer, detector=kit.non_finite())
    again.snapshot()
    again.close()


def test_a_graph_that_is_kept_keeps_no_governor(kit: Any) -> None:
    """The hook on the output follows gradients; it must not tie the governor to a loss that somebody logs."""
    run = kit.Run()
    governor = TolariaGovernor(run.model, run.optimizer, detector=kit.non_finite())
    losses = [run.loss(batch) for batch in run.batches[:3]]
    reference = weakref.ref(governor)
    governor.close()
    del governor
    gc.collect()
    assert reference() is None
    sum(losses, torch.zeros(())).backward()

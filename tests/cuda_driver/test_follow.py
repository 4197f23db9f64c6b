"""`FollowingGovernor` on a device that is as late as it may be: a framework's loop never waits for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tolaria import GovernorConfig, SnapshotRejected
from tolaria.follow import FollowingGovernor
from tolaria.judge import non_finite


@pytest.fixture
def follow(late: Any) -> Iterator[Callable[..., FollowingGovernor]]:
    made: list[FollowingGovernor] = []

    def make(run: Any, **parts: Any) -> FollowingGovernor:
        # draining waits for the device on a thread of its own
        config = GovernorConfig(cadence=4, probation=4, keep_batches=64, host_slots=0, scrub_every=0)
        made.append(
            FollowingGovernor(
                run.model, run.optimizer, scheduler=run.scheduler, config=config, detector=non_finite(), **parts
            )
        )
        return made[-1]

    yield make
    for governor in made:
        governor.close()


def train(run: Any, governor: FollowingGovernor, batches: list[Any], waits_at_the_end: bool = True) -> None:
    for batch in governor.watch(batches):
        run.optimizer.zero_grad()
        loss = run.backward(batch)
        governor.gradients_ready(run.optimizer)
        run.optimizer.step()
        run.scheduler.step()
        governor.stepped(loss=loss, is_last=waits_at_the_end and batch[1] is batches[-1][1])


def num_waits(machine: Any) -> int:
    return sum(call.startswith(("cuEventSynchronize", "cuStreamSynchronize")) for call in machine.calls)


@pytest.mark.parametrize("at", [0, 17, 39])
@pytest.mark.parametrize("lag", [0, 3, None])
def test_a_poisoned_batch_leaves_no_trace(lag: Any, at: int, late: Any, follow: Any, make_run: Any) -> None:
    late.lag = lag
    clean = make_run()
    del clean.batches[at]
    clean.plain()
    expected = clean.state()
    run = make_run()
    governor = follow(run)
    batches = list(run.batches)
    batches[at] = (batches[at][0] * float("nan"), batches[at][1])
    train(run, governor, batches)
    assert governor.rollbacks == 2
    assert run.state() == expected


def test_no_step_waits_but_the_last_one(late: Any, follow: Any, make_run: Any) -> None:
    late.lag = None  # nothing arrives unless it is waited for
    run = make_run()
    governor = follow(run)
    governor.begin()
    seen = []
    for number, batch in enumerate(run.batches[:10], start=1):
        before = num_waits(late)
        loss = run.backward(batch)
        governor.gradients_ready(run.optimizer)
        run.optimizer.step()
        run.optimizer.zero_grad()
        governor.stepped(loss=loss, is_last=number == 10)
        seen.append(num_waits(late) > before)
    assert seen == [False] * 9 + [True]


def test_a_fence_waits_for_its_snapshot_and_is_never_poisoned(late: Any, follow: Any, make_run: Any) -> None:
    late.lag = None
    run = make_run()
    governor = follow(run)
    train(run, governor, run.batches[:9])
    with governor.using(), torch.no_grad():
        next(run.model.parameters()).fill_(float("nan"))
    governor.fence()
    assert governor.rollbacks == 1
    assert all(bool(torch.isfinite(p).all()) for p in run.model.parameters())
    assert governor.execute_rollback().steps_lost == 0


def test_a_late_verdict_is_waited_for_before_a_file_is_written(late: Any, follow: Any, make_run: Any) -> None:
    late.lag = None
    run = make_run()
    governor = follow(run)
    governor.begin()
    run.backward((run.batches[0][0] * float("nan"), run.batches[0][1]))
    governor.gradients_ready()
    run.optimizer.step()
    assert not governor.stepped().rolled_back  # nothing has arrived
    assert not governor.is_trusted()
    assert governor.finish()
    assert governor.is_trusted()


def test_begin_refuses_what_is_not_finite(late: Any, follow: Any, make_run: Any) -> None:
    run = make_run()
    governor = follow(run)
    with torch.no_grad():
        next(run.model.parameters()).fill_(float("nan"))
    with pytest.raises(SnapshotRejected):
        governor.begin()


@pytest.mark.parametrize("unscaled", [True, False])
@pytest.mark.parametrize("overflows", [True, False])
def test_an_overflow_that_the_scaler_skips_is_no_incident(
    unscaled: bool, overflows: bool, late: Any, follow: Any, make_run: Any
) -> None:
    """`unscaled`: as the framework hands the gradients over; a fused optimizer unscales them by itself."""
    late.lag = None
    run = make_run()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    governor = follow(run, scaler=scaler)
    governor.begin()
    loss = torch.nn.functional.cross_entropy(run.model(run.batches[0][0]), run.batches[0][1])
    scaler.scale(loss).backward()
    if overflows:
        run.model[0].weight.grad.fill_(float("inf"))
    if unscaled:
        scaler.unscale_(run.optimizer)
    governor.gradients_ready(run.optimizer)
    scaler.step(run.optimizer)
    scaler.update()
    governor.stepped(loss=loss)
    assert governor.is_trusted()
    assert governor.rollbacks == 0
    assert scaler.get_scale() == (2.0 if overflows else 4.0)


def test_an_overflow_without_a_scaler_is_an_incident(late: Any, follow: Any, make_run: Any) -> None:
    run = make_run()
    governor = follow(run)
    governor.begin()
    loss = run.backward(run.batches[0])
    run.model[0].weight.grad.fill_(float("inf"))
    governor.gradients_ready(run.optimizer)
    governor.stepped(loss=loss)  # the step was not even made
    assert not governor.is_trusted()

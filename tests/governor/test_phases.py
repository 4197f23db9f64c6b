"""Asked for inside a section, a hook or a backward: `PhaseError` and no change, or with `when="boundary"` later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tolaria import GovernorConfig, NoSnapshot, PhaseError, QuiesceTimeout, TolariaGovernor
from tolaria.testing.thread_gate import ThreadGate

Govern = Callable[..., TolariaGovernor]
Act = Callable[[], Any]


# Each place calls `act` once from inside, and then reaches a boundary.


def in_write_section(run: Any, governor: TolariaGovernor, act: Act) -> None:
    with governor.using(write=True):
        act()


def in_read_section(run: Any, governor: TolariaGovernor, act: Act) -> None:
    with governor.using(write=False), governor.using(write=True):
        act()


def in_forward_hook(run: Any, governor: TolariaGovernor, act: Act) -> None:
    hook = run.model[0].register_forward_hook(lambda *_: act() and None)
    try:
        with torch.no_grad():
            run.model.eval()(run.batches[0][0])
    finally:
        hook.remove()
        run.model.train()


def in_optimizer_pre_hook(run: Any, governor: TolariaGovernor, act: Act) -> None:
    hook = run.optimizer.register_step_pre_hook(lambda *_: act() and None)
    try:
        run.optimizer.step()
    finally:
        hook.remove()


def in_optimizer_post_hook(run: Any, governor: TolariaGovernor, act: Act) -> None:
    hook = run.optimizer.register_step_post_hook(lambda *_: act() and None)
    try:
        run.optimizer.step()
    finally:
        hook.remove()


def in_closure(run: Any, governor: TolariaGovernor, act: Act) -> None:
    def closure() -> torch.Tensor:
        act()
        return torch.zeros(())

    run.optimizer.step(closure)


PLACES = [
    in_write_section,
    in_read_section,
    in_forward_hook,
    in_optimizer_pre_hook,
    in_optimizer_post_hook,
    in_closure,
]


def in_tensor_hook(run: Any, governor: TolariaGovernor, act: Act) -> None:
    loss = run.loss(run.batches[0])
    loss.register_hook(lambda _: act() and None)
    loss.backward()


def in_module_backward_hook(run: Any, governor: TolariaGovernor, act: Act) -> None:
    hook = run.model[4].register_full_backward_hook(lambda *_: act() and None)
    try:
        run.backward(run.batches[0])
    finally:
        hook.remove()


def in_accumulate_hook(run: Any, governor: TolariaGovernor, act: Act) -> None:
    hook = run.model[4].weight.register_post_accumulate_grad_hook(lambda _: act() and None)
    try:
        run.backward(run.batches[0])
    finally:
        hook.remove()


BACKWARD_PLACES = [in_tensor_hook, in_module_backward_hook, in_accumulate_hook]
Place = Callable[[Any, TolariaGovernor, Act], None]


@pytest.fixture
def run(kit: Any) -> Any:
    run = kit.Run()
    run.plain_step(run.batches[0])
    return run


@pytest.fixture
def governor(govern: Govern, run: Any) -> TolariaGovernor:
    return govern(run.model, run.optimizer)


# ------------------------------------------------------------ refused


@pytest.mark.parametrize("operation", ["snapshot", "execute_rollback", "step", "observe", "digest"])
@pytest.mark.parametrize("place", [*PLACES, *BACKWARD_PLACES])
def test_refused_from_inside(place: Place, operation: str, governor: TolariaGovernor, run: Any) -> None:
    info = governor.snapshot()
    arguments: dict[str, Any] = {"loss": 1.0} if operation in ("step", "observe") else {}
    tried = []

    def act() -> None:
        before, host = run.state(), governor._keeper.driver.state
        with pytest.raises(PhaseError, match="boundary") as caught:
            getattr(governor, operation)(**arguments)
        assert caught.value.state_intact
        assert run.state() == before
        assert governor._keeper.driver.state is host  # not one change, not even an announcement
        tried.append(1)

    place(run, governor, act)
    assert tried == [1]
    assert info.state == "sealed"
    run.optimizer.zero_grad()
    governor.snapshot()
    assert governor.execute_rollback().success


@pytest.mark.parametrize("operation", ["snapshot", "execute_rollback"])
@pytest.mark.parametrize("during", ["capture", "restore"])
def test_refused_from_inside_another_submission(
    during: str, operation: str, governor: TolariaGovernor, run: Any
) -> None:
    """A registered object that calls the governor from its `state_dict` or `load_state_dict`."""
    errors: list[PhaseError] = []

    def act() -> None:
        with pytest.raises(PhaseError, match="inside another") as caught:
            getattr(governor, operation)()
        errors.append(caught.value)

    governor.register(
        "nosy",
        (lambda: act() if during == "capture" else None, lambda _: act() if during == "restore" else None),
    )
    governor.snapshot()
    good = run.state(with_rng=False)
    run.step(governor, run.batches[1])
    assert governor.execute_rollback().success
    assert len(errors) == 1
    assert run.state(with_rng=False) == good


def test_a_hook_of_the_governed_module_itself_is_a_boundary(governor: TolariaGovernor, run: Any) -> None:
    """It runs after `forward` has returned, so its section is closed."""
    taken = []
    run.model.register_forward_hook(lambda *_: taken.append(governor.snapshot()))
    run.model(run.batches[0][0])
    assert [info.state for info in taken] == ["sealed"]


# ------------------------------------------------------------ queued


@pytest.mark.parametrize("place", [*PLACES, *BACKWARD_PLACES])
def test_a_queued_snapshot_is_taken_after_the_step(place: Place, governor: TolariaGovernor, run: Any) -> None:
    """Not before: the gradients that a backward left may be alive until then."""
    receipts: list[Any] = []

    def act() -> None:
        receipt = governor.snapshot(step=77, when="boundary")
        assert (receipt.state, receipt.step) == ("pending", None)
        with pytest.raises(PhaseError, match="pending"):
            receipt.wait()
        receipts.append(receipt)

    run.optimizer.zero_grad()
    place(run, governor, act)
    [receipt] = receipts
    writes = place not in (in_read_section, in_forward_hook, *BACKWARD_PLACES)
    assert receipt.state == ("sealed" if writes else "pending")
    if not writes:
        run.step(governor, run.batches[1])
    assert (receipt.state, receipt.step) == ("sealed", 77)
    assert receipt.bytes > 0
    assert receipt.wait("sealed") is receipt
    after = run.state(with_rng=False)
    run.step(governor, run.batches[2])
    assert governor.execute_rollback(to=receipt).snapshot_step == 77
    assert run.state(with_rng=False) == after


@pytest.mark.parametrize("place", PLACES)
def test_a_queued_rollback_is_done_at_the_boundary(place: Place, governor: TolariaGovernor, run: Any) -> None:
    governor.snapshot(step=5)
    good = run.state(with_rng=False)
    run.step(governor, run.batches[1])
    assert run.state(with_rng=False) != good
    run.backward(run.batches[2])
    reports: list[Any] = []

    def act() -> None:
        before = run.state()
        report = governor.execute_rollback(when="boundary", env_id=3, reason="because")
        assert (report.status, report.success) == ("pending", False)
        with pytest.raises(PhaseError, match="pending"):
            report.wait()
        assert run.state() == before
        reports.append(report)

    place(run, governor, act)
    [report] = reports
    assert (report.status, report.success, report.snapshot_step) == ("submitted", True, 5)
    assert (report.env_id, report.reason) == (3, "because")
    assert run.state(with_rng=False) == good
    assert all(parameter.grad is None for parameter in run.model.parameters())
    report.wait()
    assert (report.status, report.verified) == ("done", True)


@pytest.mark.parametrize("place", BACKWARD_PLACES)
def test_a_rollback_queued_in_a_backward_precedes_the_step(place: Place, governor: TolariaGovernor, run: Any) -> None:
    """The next boundary is where the optimizer would have applied these gradients: they are dropped instead."""
    governor.snapshot()
    good = run.state(with_rng=False)
    run.step(governor, run.batches[1])
    reports: list[Any] = []
    place(run, governor, lambda: reports.append(governor.execute_rollback(when="boundary")))
    assert reports[0].status == "pending"
    run.optimizer.step()
    assert reports[0].status == "submitted"
    assert run.state(with_rng=False) == good
    assert governor.statistics().stale_vetoes == 0


def test_requests_are_done_in_order(governor: TolariaGovernor, run: Any) -> None:
    governor.snapshot(step=1)
    good = run.state(with_rng=False)
    run.step(governor, run.batches[1])
    with governor.using():
        early = governor.snapshot(step=2, when="boundary")
        report = governor.execute_rollback(to=1, when="boundary")
        late = governor.snapshot(step=3, when="boundary")
    assert report.status == "submitted"
    assert (early.state, late.state) == ("dropped", "sealed")
    assert run.state(with_rng=False) == good


def test_when_boundary_at_a_boundary_acts_at_once(governor: TolariaGovernor, run: Any) -> None:
    assert governor.snapshot(when="boundary").state == "sealed"
    assert governor.execute_rollback(when="boundary").status == "submitted"


def test_a_request_of_one_thread_is_done_by_the_next_that_reaches_a_boundary(
    governor: TolariaGovernor, run: Any, kit: Any
) -> None:
    governor.snapshot()
    queued, leave = kit.Flag(), kit.Flag()
    reports: list[Any] = []

    def inside() -> None:
        with governor.using():
            reports.append(governor.execute_rollback(when="boundary"))
            queued.set()
            leave.wait()

    worker = kit.Worker(inside)
    queued.wait()
    gate = kit.Gate(governor)
    other = kit.Worker(lambda: run.model(run.batches[0][0]))
    gate.until_blocked(other)  # it has taken up the request, and waits for the section it was made in
    assert reports[0].status == "pending"
    leave.set()
    worker.join()
    other.join()
    assert reports[0].status == "submitted"


def test_a_queued_rollback_that_cannot_be_done_says_so(governor: TolariaGovernor, run: Any) -> None:
    reports: list[Any] = []
    with pytest.raises(NoSnapshot), governor.using():
        reports.append(governor.execute_rollback(when="boundary"))
    assert (reports[0].status, reports[0].success) == ("failed", False)
    before = run.state()
    with governor.using():  # it is not tried for ever
        pass
    assert run.state() == before


# ------------------------------------------------------------ live gradients


def test_a_snapshot_with_live_gradients_is_refused_unless_told(governor: TolariaGovernor, run: Any, kit: Any) -> None:
    run.optimizer.zero_grad()
    run.backward(run.batches[1])
    gradients = kit.freeze([parameter.grad for parameter in run.model.parameters()])
    with pytest.raises(PhaseError, match="gradients"):
        governor.snapshot()
    dropped = governor.snapshot(step=1, grads="drop")
    captured = governor.snapshot(step=2, grads="capture")
    assert kit.freeze([parameter.grad for parameter in run.model.parameters()]) == gradients  # the live ones stay
    assert captured.bytes > dropped.bytes
    run.optimizer.step()
    run.optimizer.zero_grad()
    governor.execute_rollback(to=captured)
    assert kit.freeze([parameter.grad for parameter in run.model.parameters()]) == gradients
    governor.execute_rollback(to=dropped)
    assert all(parameter.grad is None for parameter in run.model.parameters())


def test_captured_gradients_step_as_if_nothing_had_happened(govern: Govern, kit: Any) -> None:
    def finish(run: Any) -> Any:
        run.optimizer.step()
        run.scheduler.step()
        return run.state()

    plain = kit.Run()
    plain.backward(plain.batches[0])
    expected = finish(plain)
    run = kit.Run()
    governor = govern(run.model, run.optimizer, scheduler=run.scheduler)
    run.backward(run.batches[0])
    governor.snapshot(grads="capture")
    finish(run)
    governor.execute_rollback()
    assert finish(run) == expected
    assert governor.statistics().stale_vetoes == 0


def test_a_snapshot_of_another_thread_leaves_the_gradients_of_this_one_to_it(govern: Govern, kit: Any) -> None:
    """Whether gradients are held is a matter of each snapshot: one that comes to nothing beside it changes nothing."""
    run = kit.Run()
    governor = govern(run.model, run.optimizer, config=GovernorConfig(gate_timeout_s=0.05))
    run.backward(run.batches[0])
    gradients = kit.freeze([parameter.grad for parameter in run.model.parameters()])
    with ThreadGate() as gate, gate.before(governor._keeper.state, "survey"):
        other = kit.Worker(lambda: governor.snapshot(grads="capture"))
        gate.wait_held()  # the other thread's snapshot is under way, and has not looked for gradients yet
        with pytest.raises(QuiesceTimeout):
            governor.snapshot(grads="drop")
    captured = other.join()
    run.optimizer.zero_grad()
    governor.execute_rollback(to=captured)
    assert kit.freeze([parameter.grad for parameter in run.model.parameters()]) == gradients


def test_zeroed_gradients_are_no_obstacle(governor: TolariaGovernor, run: Any) -> None:
    run.backward(run.batches[1])
    run.optimizer.zero_grad(set_to_none=False)
    assert governor.snapshot().state == "sealed"

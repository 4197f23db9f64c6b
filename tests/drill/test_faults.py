"""What each fault does to a run, when it strikes, and when it comes again."""

from __future__ import annotations

import pytest
import torch

from tolaria.drill.digits import Digits
from tolaria.drill.faults import KINDS, Fault, FaultKind, Injector, Moment, fewest_steps, plan, spoil
from tolaria.drill.workloads import Batch, CannotRun, Training, Workload

BY_NAME = {kind.name: kind for kind in KINDS}
MIN_STEPS = 400
SPACE = 10 + 10 + 5  # cadence, probation, and steps until detection


@pytest.fixture(scope="module")
def workload() -> Digits:
    return Digits(0, 40, torch.device("cpu"))


@pytest.fixture
def training(workload: Digits) -> Training:
    """After a few steps, with gradients."""
    training = workload.build()
    for batch in workload.batches[:3]:
        training.optimizer.zero_grad()
        workload.loss(training.model, batch).backward()
        training.optimizer.step()
    return training


def strike(name: str, workload: Workload, training: Training) -> None:
    Fault(BY_NAME[name], 3, 0).act(workload, training, workload.batches[3])


# -- the plan


def test_the_seven_kinds() -> None:
    assert list(BY_NAME) == [
        "gradient_explosion",
        "zeroed_moments",
        "foreign_write",
        "bit_flip",
        "garbage_batches",
        "returning_bit_flip",
        "nan_batch",
    ]
    assert BY_NAME["garbage_batches"].length >= 8


@pytest.mark.parametrize("steps", [MIN_STEPS, 600, 2000])
def test_plan_leaves_room_for_a_certified_snapshot(steps: int) -> None:
    for seed in range(50):
        faults = plan(seed, steps, KINDS)
        assert [fault.kind.name for fault in faults] == list(BY_NAME)
        ends = [0, *(fault.batch + fault.kind.length for fault in faults)]
        starts = [*(fault.batch for fault in faults), steps]
        assert min(start - end for start, end in zip(starts, ends, strict=True)) >= SPACE


def test_plan_depends_on_the_seed_alone() -> None:
    assert plan(1, 600, KINDS) == plan(1, 600, KINDS)
    assert len({tuple(fault.batch for fault in plan(seed, 600, KINDS)) for seed in range(20)}) > 10


def test_too_few_steps_are_refused() -> None:
    assert fewest_steps(KINDS) == MIN_STEPS
    with pytest.raises(CannotRun, match=f"--steps {MIN_STEPS}"):
        plan(0, MIN_STEPS - 1, KINDS)


def nowhere(_: object) -> None: ...


def test_a_fault_that_would_come_too_soon_is_put_off() -> None:
    kinds = [FaultKind(name, name, Moment.UPDATE, nowhere, at=0.5, length=4) for name in ("one", "two", "three")]
    batches = [fault.batch for fault in plan(0, 600, kinds)]
    assert batches[1:] == [batches[0] + 4 + 28, batches[0] + 2 * (4 + 28)]


@pytest.mark.parametrize(
    ("at", "beat", "batch"),
    [(0.5, (10, 2), {292, 302}), (0.5, (100, 93), {293}), (0.34, (100, 93), {193}), (0.405, (100, 93), {193, 293})],
)
def test_beats(at: float, beat: tuple[int, int], batch: set[int]) -> None:
    kind = FaultKind("beat", "on the beat", Moment.UPDATE, nowhere, at=at, beat=beat)
    found = {plan(seed, 600, [kind])[0].batch for seed in range(40)}
    assert found >= batch if beat[0] == 10 else found == batch
    after = FaultKind("before", "just before", Moment.UPDATE, nowhere, at=at)
    first, second = plan(0, 600, [after, kind])
    assert second.batch >= first.batch + 1 + 28
    assert second.batch % beat[0] == beat[1]


# -- what they do


def test_gradient_explosion_is_finite(workload: Digits, training: Training) -> None:
    before = [p.grad.clone() for p in training.model.parameters() if p.grad is not None]
    strike("gradient_explosion", workload, training)
    after = [p.grad for p in training.model.parameters() if p.grad is not None]
    assert all(bool(grad.isfinite().all()) for grad in after)
    assert all(torch.equal(now, was * 1e6) for now, was in zip(after, before, strict=True))


def test_zeroed_moments_are_the_second_ones_only(workload: Digits, training: Training) -> None:
    strike("zeroed_moments", workload, training)
    states = list(training.optimizer.state.values())
    assert states
    assert not any(bool(values["exp_avg_sq"].any()) for values in states)
    assert all(bool(values["exp_avg"].any()) for values in states)


def test_bit_flip_is_one_bit_of_one_weight(workload: Digits, training: Training) -> None:
    weight = workload.exposed_weight(training.model)
    before = weight.detach().clone()
    strike("bit_flip", workload, training)
    changed = weight.detach().view(torch.int32) ^ before.view(torch.int32)
    assert changed.count_nonzero() == 1
    assert changed.sum() == 1 << 30
    assert weight.isfinite().all()
    assert weight.max() > 1e30


def test_foreign_write_leaves_no_version_counter(workload: Digits, training: Training) -> None:
    parameters = list(training.model.parameters())
    versions = [p._version for p in parameters]
    strike("foreign_write", workload, training)
    assert [p._version for p in parameters] == versions
    written = [p for p in parameters if p.abs().max() > 5]
    assert len(written) >= 3
    assert all(bool(p.isfinite().all()) for p in parameters)


def test_bad_data_is_in_its_batches_only(workload: Digits) -> None:
    faults = [Fault(BY_NAME["garbage_batches"], 5, 0), Fault(BY_NAME["nan_batch"], 30, 0)]
    spoilt = spoil(workload.batches, faults, workload)
    changed = [now.index for now, was in zip(spoilt, workload.batches, strict=True) if now is not was]
    assert changed == [*range(5, 5 + BY_NAME["garbage_batches"].length), 30]
    assert bool(spoilt[30].inputs.isnan().any())
    assert all(bool(batch.inputs.isfinite().all()) for batch in spoilt if batch.index != 30)
    agree = sum(float((spoilt[i].targets == workload.batches[i].targets).float().mean()) for i in changed[:-1])
    assert agree / (len(changed) - 1) < 0.2
    again = spoil(workload.batches, faults, workload)
    assert all(torch.equal(a.targets, b.targets) for a, b in zip(spoilt, again, strict=True))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.moment is not Moment.DATA], ids=lambda kind: kind.name)
def test_a_run_that_is_dead_already_goes_on(kind: FaultKind, workload: Digits, training: Training) -> None:
    with torch.no_grad():
        for parameter in training.model.parameters():
            parameter.fill_(torch.nan)
    Fault(kind, 3, 0).act(workload, training, workload.batches[3])


# -- when they come again


def visit(injector: Injector, batch: Batch) -> tuple[str, ...]:
    injector.begin(batch)
    injector.strike(Moment.FORWARD, batch)
    injector.strike(Moment.UPDATE, batch)
    injector.strike(Moment.STEP, batch)
    return injector.struck


@pytest.mark.parametrize("name", ["gradient_explosion", "zeroed_moments", "foreign_write", "bit_flip"])
def test_transient_faults_do_not_return(name: str, workload: Digits, training: Training) -> None:
    kind = BY_NAME[name]
    injector = Injector([Fault(kind, 3, 0)], workload, training)
    first = [visit(injector, batch) for batch in workload.batches[2:10]]
    assert first == [(), *[(name,)] * kind.length, *[()] * (7 - kind.length)]
    assert not any(visit(injector, batch) for batch in workload.batches[2:10])


def test_a_transient_fault_cut_short_does_not_go_on_after_a_rollback(workload: Digits, training: Training) -> None:
    injector = Injector([Fault(BY_NAME["zeroed_moments"], 3, 0)], workload, training)
    assert visit(injector, workload.batches[3])
    assert not any(visit(injector, batch) for batch in workload.batches[3:8])


def test_the_returning_fault_returns_once(workload: Digits, training: Training) -> None:
    weight = workload.exposed_weight(training.model)
    before = weight.detach().clone()
    injector = Injector([Fault(BY_NAME["returning_bit_flip"], 3, 0)], workload, training)
    assert visit(injector, workload.batches[3]) == ("returning_bit_flip",)
    assert not torch.equal(weight, before)
    assert visit(injector, workload.batches[3]) == ("returning_bit_flip",)
    assert torch.equal(weight, before), "the same bit was flipped back"
    assert visit(injector, workload.batches[3]) == ()


def test_bad_data_is_noted_each_time(workload: Digits, training: Training) -> None:
    injector = Injector([Fault(BY_NAME["nan_batch"], 3, 0)], workload, training)
    assert [visit(injector, workload.batches[3]) for _ in range(3)] == [("nan_batch",)] * 3


def test_a_kind_is_one_row() -> None:
    """What it takes to add one: a function, and a place in time."""

    def halve(scene: object) -> None:
        assert scene is not None

    kind = FaultKind("halved", "everything halved", Moment.UPDATE, halve, at=0.5)
    (fault,) = plan(0, 600, [kind])
    assert 280 <= fault.batch <= 320


def test_inside_the_step_means_behind_the_clipping(workload: Digits, training: Training) -> None:
    """The optimizer itself calls; what is done before its step would be clipped away."""
    injector = Injector([Fault(BY_NAME["gradient_explosion"], 3, 0)], workload, training)
    norms = []
    training.optimizer.register_step_post_hook(
        lambda *_: norms.append(torch.nn.utils.get_total_norm([p.grad for p in training.model.parameters()]))  # type: ignore[misc]
    )
    for batch in workload.batches[2:5]:
        injector.begin(batch)
        training.optimizer.zero_grad()
        workload.loss(training.model, batch).backward()
        torch.nn.utils.clip_grad_norm_(training.model.parameters(), 1e-3)
        training.optimizer.step()
    assert [float(norm) for norm in norms] == pytest.approx([1e-3, 1e3, 1e-3], rel=1e-3)

"""The other members of the governor, each with the meaning that the design gives it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from tolaria import (
    Detector,
    GovernorConfig,
    Health,
    NoSnapshot,
    Recovery,
    SnapshotRejected,
    TolariaGovernor,
    UsageError,
    Verdict,
    VitalSigns,
)

Govern = Callable[..., TolariaGovernor]


def drifting() -> Detector[tuple[tuple[float, ...], int]]:
    """Panics on a loss of more than twice the median of the last five. Its state is a nested tuple."""

    def update(state: Any, signs: VitalSigns) -> tuple[Any, Verdict]:
        (history, count), loss = state, signs.loss or 0.0
        if len(history) == 5 and loss > 2 * sorted(history)[2]:
            return (history, count + 1), Verdict(Health.PANIC, signs.step, "drift", signs.step, {"count": count})
        return ((*history, loss)[-5:], count), Verdict(Health.HEALTHY, signs.step)

    return Detector(lambda: ((), 0), update)


# ------------------------------------------------------------ register


def test_registered_things_come_back(govern: Govern, kit: Any) -> None:
    run = kit.Run()
    ema = torch.optim.swa_utils.AveragedModel(run.model)
    generator = torch.Generator().manual_seed(3)
    head = nn.Linear(3, 3)
    own = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
    box = {"best": 1.0}
    stateful = torch.optim.lr_scheduler.ExponentialLR(own, 0.5)
    governor = govern(run.model, run.optimizer)
    governor.register("ema", ema)
    governor.register("generator", generator)
    governor.register("head's optimizer", own)
    governor.register("schedule", stateful)
    governor.register("box", (lambda: dict(box), box.update))

    def seen() -> Any:
        parts = (run.model, ema, own, stateful, head)
        return kit.freeze([*[part.state_dict() for part in parts], generator.get_state(), box])

    governor.snapshot()
    good = seen()
    run.step(governor, run.batches[0])
    ema.update_parameters(run.model)
    torch.randn(3, generator=generator)
    head(torch.randn(2, 3)).sum().backward()
    own.step()
    stateful.step()
    box["best"] = 2.0
    assert seen() != good
    governor.execute_rollback()
    assert seen() == good


def test_register_refuses(govern: Govern, kit: Any) -> None:
    run = kit.Run()
    governor = govern(run.model, run.optimizer)
    governor.register("twice", torch.Generator())
    for name, obj in (("twice", torch.Generator()), ("model", nn.Linear(1, 1)), ("number", 3), ("pair", (1, 2))):
        with pytest.raises(UsageError, match=name):
            governor.register(name, obj)
    governor.snapshot()
    governor.execute_rollback()


# ------------------------------------------------------------ observe and check_vital_signs


def test_check_vital_signs_is_true_when_a_rollback_is_demanded(govern: Govern, kit: Any) -> None:
    run = kit.Run()
    governor = govern(run.model, run.optimizer)
    governor.snapshot()
    before = run.state()
    assert governor.check_vital_signs(1.0) is False
    assert governor.check_vital_signs(torch.tensor(float("nan"))) is True
    assert run.state() == before  # it judges and does nothing
    assert governor.statistics().rollbacks == 0
    assert governor.statistics().panics == 1
    governor.execute_rollback()
    assert governor.check_vital_signs(loss=1.0) is False  # the history came back with the state


def test_a_loop_of_the_original_kind(govern: Govern, kit: Any) -> None:
    """`snapshot`, `check_vital_signs`, `execute_rollback`: as the governor that this one descends from was used."""
    clean = kit.Run()
    for batch in clean.batches[:6]:
        clean.plain_step(batch)
    run = kit.Run()
    governor = govern(run.model, run.optimizer, scheduler=run.scheduler)
    for number, batch in enumerate(run.batches[:6]):
        governor.snapshot()
        if number == 3:
            run.plain_step(kit.nan_batch(batch))
            if governor.check_vital_signs(float("nan")):
                report = governor.execute_rollback(env_id=2, optimizer=run.optimizer)
                assert (report.success, report.env_id, report.optimizer) == (True, 2, "restored")
        loss = run.plain_step(batch)
        assert not governor.check_vital_signs(loss)
    assert run.state() == clean.state()


def test_observe_certifies_and_reads_its_signs(govern: Govern, kit: Any) -> None:
    run, heard = kit.Run(), []

    def update(state: int, signs: VitalSigns) -> tuple[int, Verdict]:
        heard.append(signs)
        return state, Verdict(Health.HEALTHY, signs.step)

    governor = govern(run.model, run.optimizer, detector=Detector(lambda: 0, update))
    run.backward(run.batches[0])
    run.model[0].weight.grad[0, 0] = float("inf")
    verdict = governor.observe(loss=2.0, grad_norm=7.0, metric=0.5, entropy=0.1)
    assert (verdict.health, verdict.step) == (Health.HEALTHY, 1)
    assert dataclasses.asdict(heard[0]) == {
        "step": 1,
        "loss": 2.0,
        "grad_norm": 7.0,
        "nonfinite_gradients": 0,  # a norm that is handed in stands for the gradients
        "nonfinite_weights": 0,
        "metric": 0.5,
        "extra": {"entropy": 0.1},
    }
    run.poison()
    governor.observe()
    assert (heard[1].loss, heard[1].nonfinite_gradients, heard[1].nonfinite_weights) == (None, 1, 1)


# ------------------------------------------------------------ snapshot


def test_a_snapshot_is_a_handle(govern: Govern, kit: Any) -> None:
    run = kit.Run()
    governor = govern(run.model, run.optimizer)
    run.step(governor, run.batches[0])
    info = governor.snapshot()
    tensors = [*run.model.parameters(), *run.model.buffers()]
    tensors += [value for values in run.optimizer.state.values() for value in values.values()]
    assert (info.step, info.tier, info.state) == (1, "host", "sealed")
    assert info.bytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert info.wait() is info
    assert info.wait("sealed") is info
    assert governor.snapshot(step=7).step == 7


def test_a_manual_snapshot_of_a_poisoned_state_is_the_callers_word(govern: Govern, kit: Any) -> None:
    """Vouched for: it is kept although it is not finite."""
    run = kit.Run()
    governor = govern(run.model, run.optimizer)
    run.poison()
    info = governor.snapshot()
    poisoned = run.state()
    assert info.state == "sealed"
    with torch.no_grad():
        run.model[0].weight.zero_()
    report = governor.execute_rollback()
    assert not report.certified
    assert run.state() == poisoned


def test_the_first_snapshot_of_watch_must_be_finite(govern: Govern, kit: Any) -> None:
    run = kit.Run()
    governor = govern(run.model, run.optimizer)
    run.poison()
    with pytest.raises(SnapshotRejected, match=r"0\.weight"):
        next(iter(governor.watch(run.batches)))
    with pytest.raises(NoSnapshot):
        governor.execute_rollback()


# ------------------------------------------------------------ execute_rollback


def test_the_report_of_a_rollback(govern: Govern, kit: Any) -> None:
    run = kit.Run()
    governor = govern(run.model, run.optimizer, scheduler=run.scheduler, config=GovernorConfig(slots=5))
    feed = iter(governor.watch(run.batches))
    good = []
    for _ in range(3):
        run.step(governor, next(feed))
        good.append(run.state(with_rng=False))
        governor.snapshot()
    run.step(governor, next(feed))
    report = governor.execute_rollback(env_id=4, reason="too slow", to=2)
    assert report.success
    assert (report.status, report.env_id, report.reason) == ("submitted", 4, "too slow")
    assert (report.snapshot_step, report.panic_step, report.steps_lost) == (2, 4, 2)
    assert (report.certified, report.optimizer, report.barrier) == (False, "restored", "host")
    assert (report.device_ms, report.verified) == (None, None)
    assert report.host_ms > 0
    assert run.state(with_rng=False) == good[1]
    assert report.wait() is report
    assert (report.status, report.verified) == ("done", True)
    assert governor.execute_rollback(to=0).certified  # the one that `watch` took
    assert governor.execute_rollback(reason=None).reason == "manual"


def test_a_rollback_without_anything_to_go_back_to(govern: Govern, kit: Any) -> None:
    run = kit.Run()
    governor = govern(run.model, run.optimizer)
    before = run.state()
    with pytest.raises(NoSnapshot):
        governor.execute_rollback()
    governor.snapshot(step=3)
    gone = governor.snapshot(step=4)
    governor.execute_rollback(to=3)
    for to in (4, gone, 17):
        with pytest.raises(NoSnapshot, match=r"held are steps \[3\]"):
            governor.execute_rollback(to=to)
    assert run.state() == before
    assert gone.state == "dropped"
    with pytest.raises(SnapshotRejected):
        gone.wait("sealed")


def test_an_optimizer_given_only_to_the_rollback_is_reset(govern: Govern, kit: Any) -> None:
    run = kit.Run()
    governor = govern(run.model)
    governor.snapshot()
    good = kit.freeze(run.model.state_dict())
    run.plain_step(run.batches[0])
    state, groups = run.optimizer.state, run.optimizer.param_groups
    assert len(state) == 6
    report = governor.execute_rollback(optimizer=run.optimizer)
    assert report.optimizer == "reset"
    assert kit.freeze(run.model.state_dict()) == good
    assert run.optimizer.state is state  # cleared in place
    assert len(state) == 0
    assert run.optimizer.param_groups is groups
    assert governor.execute_rollback().optimizer == "none"
    run.plain_step(run.batches[1])


def test_wait_raises_when_the_slot_has_rotted(govern: Govern, kit: Any) -> None:
    run = kit.Run()
    governor = govern(run.model, run.optimizer)
    info = governor.snapshot()
    slot = next(slot for slot in governor._keeper.ring if slot.snapshot == info.serial)
    arena = governor._keeper.vault.slots[slot.index].arena
    assert arena is not None
    next(iter(arena.flat.values()))[0] ^= 1
    report = governor.execute_rollback()
    with pytest.raises(SnapshotRejected, match="changed since"):
        report.wait()
    with pytest.raises(SnapshotRejected, match="none is older"):
        governor.execute_rollback(verify="before")


def test_on_a_cpu_streams_may_be_named_and_say_nothing(govern: Govern, kit: Any) -> None:
    governor = govern(kit.Run().model, config=GovernorConfig(barrier="streams"))
    assert governor.capabilities().barrier == "host"
    opened = False
    with governor.using(streams=[object()]):
        opened = True
    assert opened


# ------------------------------------------------------------ facts


def test_capabilities(govern: Govern, kit: Any) -> None:
    run = kit.Run()
    governor = govern(run.model, run.optimizer, config=GovernorConfig(cadence=5, probation=4))
    before = governor.capabilities()
    assert (before.barrier, before.devices, before.tier) == ("host", ("cpu",), "host")
    assert (before.slots, before.cadence, before.cadence_stretched) == (3, 5, False)
    assert (before.rng, before.state_bytes) == ("restore", 0)
    assert governor.capabilities().state_bytes == 0
    info = governor.snapshot()
    assert governor.capabilities() == dataclasses.replace(before, state_bytes=info.bytes)
    with pytest.raises(dataclasses.FrozenInstanceError):
        before.tier = "device"  # type: ignore[misc]


def test_statistics_count_what_happened(govern: Govern, kit: Any) -> None:
    run = kit.Run()
    governor = govern(run.model, run.optimizer, scheduler=run.scheduler, config=GovernorConfig(cadence=2, probation=1))
    bad = {5}
    for number, batch in governor.watch(list(enumerate(run.batches[:10]))):
        run.step(governor, kit.nan_batch(batch) if number in bad else batch)
        bad.discard(number)
    statistics = governor.statistics()
    assert statistics.steps == 12  # ten, and the two after step 4, the last certified at the panic, once more
    assert (statistics.panics, statistics.rollbacks, governor.rollbacks) == (1, 1, 1)
    assert (statistics.vetoes, statistics.stale_vetoes) == (1, 0)
    assert (statistics.steps_lost, statistics.replayed_batches) == (2, 2)
    assert statistics.skipped_batches == 0
    assert statistics.snapshots == 6
    assert statistics.rollback_s > 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        statistics.steps = 0  # type: ignore[misc]


def test_time_spent_on_snapshots_is_counted(govern: Govern, kit: Any) -> None:
    run = kit.Run()
    governor = govern(run.model, run.optimizer)
    governor.snapshot()
    assert governor.statistics().snapshot_s > 0


def test_equal_digests_mean_equal_states(govern: Govern, kit: Any) -> None:
    run = kit.Run()
    governor = govern(run.model, run.optimizer)
    random_state = torch.get_rng_state()
    digests = {governor.digest(), governor.digest()}
    assert len(digests) == 1
    assert torch.equal(torch.get_rng_state(), random_state)
    with torch.no_grad():
        run.model[0].weight.view(-1)[[0, 1]] = run.model[0].weight.view(-1)[[1, 0]]  # swapped, not changed
    digests.add(governor.digest())
    run.optimizer.param_groups[0]["lr"] *= 2
    digests.add(governor.digest())
    run.model[1].running_mean[0] = 5
    digests.add(governor.digest())
    assert len(digests) == 4


# ------------------------------------------------------------ resume, reset


@pytest.mark.parametrize("make", [drifting, lambda: None], ids=["drifting", "default"])
def test_a_resumed_run_judges_like_the_uninterrupted_one(make: Any, govern: Govern, kit: Any) -> None:
    losses = [1.0, 1.1, 0.9, 1.0, 1.2, 1.0, 1.1, 1.3, 0.8, 1.0, 5.0, 1.0, float("nan"), 1.1, 1.0, 9.0, 1.0] * 2

    def judge(governor: TolariaGovernor, part: list[float]) -> list[Verdict]:
        return [governor.observe(loss=loss) for loss in part]

    whole = govern(kit.Run().model, detector=make())
    expected = judge(whole, losses)
    first = govern(kit.Run().model, detector=make())
    found = judge(first, losses[:13])
    saved = json.loads(json.dumps(first.state_dict()))
    second = govern(kit.Run().model, detector=make())
    second.load_state_dict(saved)
    found += judge(second, losses[13:])
    assert found == expected
    assert any(verdict.is_panic for verdict in expected)
    assert second.state_dict() == whole.state_dict()
    assert second.statistics() == whole.statistics()


class Count(NamedTuple):
    """The state of a detector of one's own; `inner` has no place in `init`."""

    steps: int
    losses: list[float]
    by_name: dict[str, tuple[int, ...]]
    inner: tuple[Any, ...]


def test_a_detector_of_ones_own_finds_its_state_as_it_made_it(govern: Govern, kit: Any, tmp_path: Any) -> None:
    """Named tuples and lists, directly and through a file of JSON or of torch."""
    states = []

    def update(state: Count, signs: VitalSigns) -> tuple[Count, Verdict]:
        states.append(state)
        more = {"seen": (*state.by_name.get("seen", ()), signs.step)}
        now = Count(state.steps + 1, [*state.losses, signs.loss or 0.0], more, (*state.inner, (signs.step, 2)))
        return now, Verdict(Health.HEALTHY, signs.step)

    detector = Detector(lambda: Count(0, [], {}, ()), update)
    first = govern(kit.Run().model, detector=detector)
    for loss in (1.0, 2.0, 3.0):
        first.observe(loss=loss)
    saved = first.state_dict()
    torch.save({"governor": saved}, tmp_path / "checkpoint.pt")
    by_torch = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["governor"]
    first.observe(loss=4.0)
    expected = states[-1]
    for each in (saved, json.loads(json.dumps(saved)), by_torch):
        other = govern(kit.Run().model, detector=detector)
        other.load_state_dict(each)
        other.observe(loss=4.0)
        assert states[-1] == expected
        assert (type(states[-1]), type(states[-1].losses)) == (Count, list)


@pytest.mark.parametrize(
    ("first", "later"),
    [
        ({}, {"w": [1.0]}),
        ({"w": None}, {"w": [1.0, 2.0]}),
        ([], [[1], [2]]),
        ([[]], [(1, 2)]),
        ((), ((1.0, [2.0]), {3: [4]})),
    ],
    ids=str,
)
def test_a_state_that_grows_what_it_did_not_begin_with(
    first: Any, later: Any, govern: Govern, kit: Any, tmp_path: Any
) -> None:
    """Directly and through a file of torch, which keep lists and tuples apart."""
    seen = []

    def update(state: Any, signs: VitalSigns) -> tuple[Any, Verdict]:
        seen.append(state)
        return later, Verdict(Health.HEALTHY, signs.step)

    detector = Detector(lambda: first, update)
    governor = govern(kit.Run().model, detector=detector)
    governor.observe(loss=1.0)
    torch.save(governor.state_dict(), tmp_path / "state.pt")
    for saved in (governor.state_dict(), torch.load(tmp_path / "state.pt", weights_only=True)):
        other = govern(kit.Run().model, detector=detector)
        other.load_state_dict(saved)
        other.observe(loss=1.0)
        assert repr(seen[-1]) == repr(later)


def test_a_checkpoint_is_read_without_being_trusted(govern: Govern, kit: Any, tmp_path: Any) -> None:
    """`torch.load` as it is by default; after a panic, so that there is something to remember."""
    run = kit.Run()
    governor = govern(run.model, run.optimizer, scheduler=run.scheduler)
    for number, batch in governor.watch(list(enumerate(run.batches[:8]))):
        run.step(governor, kit.nan_batch(batch) if number == 4 else batch)
    torch.save({"model": run.model.state_dict(), "governor": governor.state_dict()}, tmp_path / "checkpoint.pt")
    back = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["governor"]
    assert back == governor.state_dict()


def test_counters_and_retry_budget_survive_a_resume(govern: Govern, kit: Any) -> None:
    run = kit.Run()
    config = GovernorConfig(recovery=Recovery(max_retries=3))
    governor = govern(run.model, run.optimizer, scheduler=run.scheduler, config=config)
    bad = 2
    for number, batch in governor.watch(list(enumerate(run.batches[:6]))):
        run.step(governor, kit.nan_batch(batch) if bad and number == 4 else batch)
        bad -= number == 4
    saved = json.loads(json.dumps(governor.state_dict()))
    governor.close()
    second = govern(run.model, run.optimizer, scheduler=run.scheduler, config=config)
    second.load_state_dict(saved)
    assert second.statistics() == governor.statistics()
    assert second.state_dict()["tick"] == governor.state_dict()["tick"]
    # the budget is spent as far as it was; what the trouble was is not known by number in a new process
    assert second.state_dict()["recovery"]["ticks"] == governor.state_dict()["recovery"]["ticks"]
    assert run.step(second, run.batches[7]).verdict.step == saved["completed"] + 1
    assert second.snapshot().step == saved["completed"] + 1


def test_another_schema_is_refused(govern: Govern, kit: Any) -> None:
    governor = govern(kit.Run().model)
    before = governor.state_dict()
    for bad in ({}, {**before, "schema_version": 99}):
        with pytest.raises(UsageError, match="schema_version"):
            governor.load_state_dict(bad)
    assert governor.state_dict() == before


def test_a_damaged_state_dict_is_refused_whole(govern: Govern, kit: Any) -> None:
    governor = govern(kit.Run().model)
    governor.observe(loss=1.0)
    before = governor.state_dict()
    saved = {**json.loads(json.dumps(before)), "completed": 77}
    for bad in (
        {key: value for key, value in saved.items() if key != "recovery"},
        {**saved, "statistics": {"nonsense": 1}},
    ):
        with pytest.raises(UsageError):
            governor.load_state_dict(bad)
        assert governor.state_dict() == before


def test_reset_begins_a_new_episode(govern: Govern, kit: Any) -> None:
    governor = govern(kit.Run().model, detector=drifting())
    for _ in range(6):
        governor.observe(loss=1.0)
    governor.snapshot()
    statistics = governor.statistics()
    governor.reset()
    assert not governor.observe(loss=50.0).is_panic  # it has no history to compare with
    assert governor.statistics().steps == statistics.steps + 1
    assert governor.execute_rollback().snapshot_step == 6

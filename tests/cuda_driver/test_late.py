"""The whole governor on a device that is as late as it may be."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from torch import nn

from tolaria import Detector, Health, Recovery, SlotsBusy, SnapshotRejected, TolariaGovernor, Verdict, moments
from tolaria.config import MOST_OUTSTANDING
from tolaria.cuda import ContextDevice
from tolaria.judge import non_finite
from tolaria.keeper import Keeper
from tolaria.ring import SlotPhase, Tier, newest_good

EXACT = Recovery(cool_lr=1.0)  # the learning rate stays, whatever lasts


def waits(machine):
    return sum(call.startswith(("cuEventSynchronize", "cuStreamSynchronize")) for call in machine.calls)


def weights(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def equal(model, before):
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def poison(governor, model):
    with governor.using(), torch.no_grad():
        next(model.parameters()).fill_(float("nan"))


def flip(governor, slot, byte=5):
    """One bit of the first weight that a slot holds. (A slot has bytes between storages that belong to nobody.)"""
    leaf = governor._keeper.vault.slots[slot].survey.leaves.leaves[0]
    governor._keeper.vault.slots[slot].arena.views[leaf.storage][byte] ^= 1


def recorder(seen):
    """A detector that judges like `non_finite` and notes which steps it has judged."""
    inner = non_finite()

    def update(state, signs):
        seen.append(signs.step)
        return inner.update(state, signs)

    return Detector(inner.init, update)


# ------------------------------------------------------------ runs


@pytest.mark.parametrize("at", [0, 2, 17, 39, 40])
@pytest.mark.parametrize("lag", [0, 1, 3, 7, None])
def test_a_poisoned_batch_leaves_no_trace(lag, at, late, govern, make_run):
    """Trained with a NaN batch under guard, and without it and without a governor: the same state, bit for bit."""
    late.lag = lag
    clean = make_run()
    clean.plain()
    expected = clean.state()
    run = make_run()
    with govern(run.model, run.optimizer, scheduler=run.scheduler, cadence=4, probation=4, keep_batches=64) as governor:
        run.train(governor, run.poisoned(at))
        assert governor.rollbacks == 2  # replayed once, then skipped
        assert run.state() == expected
        assert governor.statistics().skipped_batches == 1


@pytest.mark.parametrize("lag", [0, 3, None])
def test_a_guarded_run_without_trouble_is_the_run_without_a_guard(lag, late, govern, make_run):
    late.lag = lag
    clean = make_run()
    clean.plain()
    expected = clean.state()
    run = make_run()
    with govern(run.model, run.optimizer, scheduler=run.scheduler, cadence=3, probation=2) as governor:
        results = run.train(governor)
        assert len(results) == len(run.batches)
        assert governor.rollbacks == 0
        assert run.state() == expected


@pytest.mark.parametrize("disturbed", [False, True])
@pytest.mark.parametrize("lag", [0, 3, None])
def test_steps_that_are_run_again_are_waited_for(lag, disturbed, late, govern, make_run):
    """What is compared is what the device has come to, not what it happens to hold when the host asks."""
    late.lag = lag
    clean = make_run()
    clean.plain()
    expected = clean.state()
    run = make_run()
    left = [17] if disturbed else []
    settings = {"cadence": 4, "probation": 4, "keep_batches": 64, "reexecute_every": 8}
    with govern(run.model, run.optimizer, scheduler=run.scheduler, **settings) as governor:
        for batch in governor.watch(run.batches):
            step = run.step(governor, batch).step
            if left and step == 23:
                left.clear()
                with governor.using(), torch.no_grad():
                    next(run.model.parameters()).mul_(1.001)
        found = governor.statistics()
        assert governor.capabilities().reexecution == "on"
        assert (found.rollbacks, found.reexecutions) == (int(disturbed), 6)
    assert run.state() == expected


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_enough_batches_are_kept_for_verdicts_as_late_as_is_the_rule(lag, late, govern, make_run):
    late.lag = lag
    clean = make_run()
    clean.plain()
    expected = clean.state()
    run = make_run()
    with govern(run.model, run.optimizer, scheduler=run.scheduler, cadence=4, probation=4) as governor:
        run.train(governor, run.poisoned(25))
        assert governor.rollbacks == 2
        assert run.state() == expected


def test_two_poisoned_batches(late, govern, make_run):
    late.lag = 2
    clean = make_run()
    clean.plain()
    expected = clean.state()
    run = make_run()
    batches = run.poisoned(12)
    batches.insert(30, batches[12])
    with govern(run.model, run.optimizer, scheduler=run.scheduler, cadence=4, probation=4, recovery=EXACT) as governor:
        run.train(governor, batches)
        assert governor.rollbacks == 4
        assert run.state() == expected


def test_verdicts_that_arrive_only_with_the_end_of_the_loader(late, govern, run):
    seen: list[int] = []
    governor = govern(run.model, run.optimizer, detector=recorder(seen), cadence=4, probation=4)
    watched = iter(governor.watch(run.batches[:20]))
    for _ in range(20):
        run.step(governor, next(watched))
        assert seen == []
    assert next(watched, None) is None
    assert seen == list(range(1, 21))


def test_a_panic_that_arrives_only_with_the_end_of_the_loader(late, govern, make_run):
    clean = make_run()
    clean.batches = clean.batches[:10]
    clean.plain()
    expected = clean.state()
    run = make_run()
    run.batches = run.batches[:10]
    governor = govern(run.model, run.optimizer, scheduler=run.scheduler, cadence=4, probation=4)
    for delivered, batch in enumerate(governor.watch(run.poisoned(5))):
        if delivered < 11:  # all of them, before the end was asked for
            assert governor.rollbacks == 0
        run.step(governor, batch)
    assert governor.rollbacks == 2
    assert run.state() == expected


def test_more_outstanding_steps_than_there_may_be_wait_for_the_oldest(late, govern):
    seen: list[int] = []
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    governor = govern(model, optimizer, detector=recorder(seen), cadence=1000)
    governor.snapshot().wait("sealed")
    for _ in range(MOST_OUTSTANDING):
        governor.step(loss=1.0 * model(torch.ones(1, 2)).sum())
    assert seen == []
    late.clear()
    governor.step(loss=model(torch.ones(1, 2)).sum())
    assert seen == [1]
    assert waits(late) == 1
    governor.step(loss=model(torch.ones(1, 2)).sum())
    assert seen == [1, 2]


def test_check_vital_signs_waits(late, govern):
    seen: list[int] = []
    governor = govern(nn.Linear(2, 2), detector=recorder(seen), mode="observe")
    assert governor.observe(loss=torch.tensor(float("nan"))).health is Health.HEALTHY  # nothing has arrived
    assert seen == []
    assert governor.check_vital_signs(loss=torch.ones(()))  # the gravest of all that it waited for
    assert seen == [1, 2]
    for _ in range(3):
        assert not governor.check_vital_signs(loss=torch.ones(()))
    assert governor.check_vital_signs(loss=torch.tensor(float("inf")))


# ------------------------------------------------------------ manual snapshots


def test_a_snapshot_and_a_rollback_before_the_device_has_done_anything(late, govern, run):
    governor = govern(run.model, run.optimizer, scheduler=run.scheduler)
    before = run.state()
    late.clear()
    governor.snapshot()
    governor.execute_rollback()
    assert waits(late) == 0
    assert run.state() == before


def test_many_snapshots_and_rollbacks_before_the_host_waits_once(late, govern, run):
    governor = govern(run.model, run.optimizer, scheduler=run.scheduler, slots=3)
    run.step(governor, run.batches[0])
    late.clear()
    for batch in run.batches[1:9]:
        governor.snapshot()
        before = run.state()
        run.backward(batch)
        run.optimizer.step()
        run.optimizer.zero_grad()
        assert run.state() != before
        governor.execute_rollback()
        assert run.state() == before
    assert waits(late) == 0


def test_wait_for_staged_and_sealed(late, govern):
    governor = govern(nn.Linear(3, 3))
    info = governor.snapshot()
    assert info.state == "staged"
    assert late.pending(late.own()) == 3  # copy, read, send
    assert info.wait() is info
    assert (info.state, late.pending(late.own())) == ("staged", 2)  # the reading goes on
    assert info.wait("sealed").state == "sealed"
    assert late.pending(late.own()) == 0


def test_wait_for_sealed_names_a_snapshot_that_is_gone(late, govern):
    governor = govern(nn.Linear(3, 3))
    first = governor.snapshot()
    second = governor.snapshot()
    governor.execute_rollback(to=first)
    second.wait("staged")
    with pytest.raises(SnapshotRejected, match="undone by a rollback"):
        second.wait("sealed")
    assert first.wait("sealed").state == "sealed"


def test_a_manual_snapshot_that_is_not_finite_is_kept_and_said_to_be_so(late, govern, run, caplog):
    late.lag = 0
    governor = govern(run.model, run.optimizer)
    poison(governor, run.model)
    info = governor.snapshot()
    assert caplog.records == []
    governor.observe()
    assert "a manual snapshot is not finite: model.0.weight" in caplog.text
    assert info.state == "sealed"


def test_a_receipt_waits_as_its_snapshot_does(late, govern):
    model = nn.Sequential(nn.Linear(3, 3))
    governor = govern(model)
    receipts = []
    model[0].register_forward_hook(lambda *_: receipts.append(governor.snapshot(when="boundary")))
    model(torch.ones(1, 3))
    (receipt,) = receipts
    assert receipt.state == "pending"
    with governor.using():
        pass  # a write section ends
    assert receipt.state == "staged"
    assert receipt.wait("sealed").state == "sealed"


# ------------------------------------------------------------ automatic snapshots


class Stomp:
    """Damage that no sign of the step shows: a governed tensor that nothing reads, written after the observation."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, governor: TolariaGovernor) -> None:
        with governor.using(), torch.no_grad():
            self.model.hidden.fill_(float("nan"))


@pytest.mark.parametrize("lag", [1, 3, None])
def test_a_non_finite_automatic_snapshot_noticed_late_rolls_back(lag, late, govern, run):
    late.lag = lag
    run.model.hidden = nn.Parameter(torch.ones(3))
    stomp = Stomp(run.model)
    governor = govern(
        run.model,
        run.optimizer,
        scheduler=run.scheduler,
        cadence=4,
        probation=4,
        keep_batches=64,
        check_weights_every=10_000,
    )
    done = False
    for batch in governor.watch(run.batches):
        run.step(governor, batch)
        if governor.statistics().steps == 8 and not done:
            done = True
            stomp(governor)  # in the loop body, after `step`: the snapshot that is due holds it
    assert governor.statistics().snapshots_rejected >= 1  # the one, or its successors too
    assert governor.rollbacks == 1
    assert bool(torch.isfinite(run.model.hidden).all())
    good = [slot for slot in governor._keeper.ring if slot.is_good]
    for slot in good:
        for stretch in governor._keeper.vault.slots[slot.index].arena.ranges:
            assert bool(torch.isfinite(stretch).all())


def test_a_snapshot_is_certified_only_when_it_has_been_read(late, govern, run):
    governor = govern(run.model, run.optimizer, cadence=2, probation=2)
    for batch in run.batches[:8]:
        run.step(governor, batch)
    good = [slot.step for slot in governor._keeper.ring if slot.is_good]
    assert good == [0]  # the first one; nothing else has arrived
    late.lag = 0
    for batch in run.batches[8:16]:
        run.step(governor, batch)
    assert max(slot.step for slot in governor._keeper.ring if slot.is_good) >= 8


def test_the_newest_good_snapshot_survives(late, govern, run):
    """Whatever arrives late, at every moment there is a good one, and its bytes are the ones it was taken with."""
    governor = govern(run.model, run.optimizer, scheduler=run.scheduler, cadence=1, probation=2, slots=3)
    late.lag = 2
    newest = -1
    taken = {}
    for i, batch in enumerate(governor.watch(run.batches)):
        slot = newest_good(governor._keeper.ring)
        assert slot is not None
        assert slot.snapshot >= newest
        newest = slot.snapshot
        taken[i] = run.state()
        run.step(governor, batch)
    step = newest_good(governor._keeper.ring).step
    assert step > 20
    governor.execute_rollback()
    assert run.state() == taken[step]


def test_a_manual_snapshot_in_a_full_ring_reads_candidates_first(late, govern, run):
    governor = govern(run.model, run.optimizer, cadence=1, probation=1, slots=3)
    for batch in run.batches[:6]:
        run.step(governor, batch)
    late.clear()
    try:
        governor.snapshot()
    except SlotsBusy:
        pass
    else:
        assert newest_good(governor._keeper.ring).manual
    assert newest_good(governor._keeper.ring) is not None


# ------------------------------------------------------------ verification


def test_verify_before(late, govern, run):
    governor = govern(run.model, run.optimizer, scheduler=run.scheduler)
    before = run.state()
    governor.snapshot()
    poison(governor, run.model)
    report = governor.execute_rollback(verify="before").wait()
    assert report.verified
    assert run.state() == before


@pytest.mark.parametrize("sealed", [True, False])
def test_a_flipped_bit_in_a_slot_is_noticed(sealed, late, govern, run):
    """Also one that nobody has sealed yet; see "who looks first" below."""
    governor = govern(run.model, run.optimizer, scheduler=run.scheduler)
    info = governor.snapshot()
    late.finish()  # the device has copied and read the slot, though nobody has asked yet
    if sealed:
        info.wait("sealed")
    before = run.state()
    flip(governor, 0)
    with pytest.raises(SnapshotRejected):
        governor.execute_rollback(verify="before")
    assert run.state() == before


def test_a_flipped_bit_is_noticed_by_the_report(late, govern, run):
    governor = govern(run.model, run.optimizer)
    governor.snapshot().wait("sealed")
    flip(governor, 0)
    report = governor.execute_rollback()
    with pytest.raises(SnapshotRejected, match="changed since"):
        report.wait()
    assert report.verified is False


def test_a_corrupted_slot_is_passed_over_for_an_older_one(late, govern, run):
    governor = govern(run.model, run.optimizer, slots=4)
    older = governor.snapshot()
    before = run.state()
    poison(governor, run.model)
    governor.snapshot()
    late.finish()
    flip(governor, 1)
    governor._keeper.arrivals.seal(wait=True)
    flip(governor, 1, 6)
    report = governor.execute_rollback(verify="before")
    assert report.corrupted_steps == (0,)
    assert run.state() == before
    assert older.wait("sealed").state == "sealed"


# ------------------------------------------------------------ who looks first


def unread_poisoned_candidate(late, run, govern):
    """An automatic snapshot of step 2 that is not finite, which nobody knows yet."""
    run.model.hidden = nn.Parameter(torch.ones(3))
    governor = govern(run.model, run.optimizer, cadence=2, probation=2, slots=5, check_weights_every=10_000)
    for batch in run.batches[:2]:
        loss = run.backward(batch)
        if governor.statistics().steps == 1:
            with governor.using(), torch.no_grad():
                run.model.hidden.fill_(float("nan"))
        governor.step(loss=loss)
    slot = next(slot for slot in governor._keeper.ring if slot.step == 2)
    assert slot.phase is SlotPhase.STAGED
    assert not slot.is_good
    return governor, slot


def test_a_poisoned_candidate_is_rejected(late, govern, run):
    governor, slot = unread_poisoned_candidate(late, run, govern)
    governor._course.catch_up(wait=True)
    assert governor._keeper.ring[slot.index].phase is SlotPhase.FREE
    assert governor.statistics().snapshots_rejected == 1


@pytest.mark.parametrize("verify", ["before", None])
def test_a_poisoned_candidate_is_rejected_also_when_a_rollback_has_read_it_first(verify, late, govern, run):
    """`reinspect` and verify="before" take what the examination found and drop `nonfinite`.

    `seal` then finds a digest, answers an Inspection without `nonfinite`, and the poisoned slot becomes sealed.
    """
    governor, slot = unread_poisoned_candidate(late, run, govern)
    report = governor.execute_rollback(to=2, verify=verify)
    if verify is None:
        report.wait()
    governor._keeper.arrivals.seal(wait=True)
    phase = governor._keeper.ring[slot.index].phase
    assert phase is SlotPhase.FREE, f"a snapshot with a NaN is {phase.value}"


def test_a_step_after_a_report_was_waited_for_does_not_wait(late, govern, run):
    """the reading was taken by the report, so the seal reads the slot again and blocks the step."""
    governor = govern(run.model, run.optimizer)
    governor.snapshot()
    governor.execute_rollback().wait()
    loss = run.backward(run.batches[0])
    late.clear()
    governor.step(loss=loss)
    assert waits(late) == 0


def test_a_bit_flipped_before_a_first_reading_by_a_report_is_noticed(late, govern, run):
    """the report takes the examination for its own reading, so it compares nothing.

    What it ought to verify is that the bytes still have the digest that was taken behind the copies.
    """
    governor = govern(run.model, run.optimizer)
    governor.snapshot()
    late.finish()  # copied and read, though nobody has asked yet
    flip(governor, 0)
    report = governor.execute_rollback()
    with pytest.raises(SnapshotRejected):
        report.wait()


def test_a_bit_that_flips_after_the_restore_is_the_next_ones_business(late, govern, run):
    """What was restored is right, and that is what the report answers for. The slot is not."""
    governor = govern(run.model, run.optimizer)
    before = run.state()
    governor.snapshot().wait("sealed")
    poison(governor, run.model)
    report = governor.execute_rollback()
    late.finish()
    flip(governor, 0)
    assert report.wait().verified
    assert run.state() == before
    with pytest.raises(SnapshotRejected):
        governor.execute_rollback(verify="before")


def test_a_poisoned_candidate_is_a_panic_also_when_a_waiting_handle_has_found_it(late, govern, run):
    """What `SnapshotInfo.wait("sealed")` comes across on its way is not lost."""
    run.model.hidden = nn.Parameter(torch.ones(3))
    governor = govern(run.model, run.optimizer, cadence=2, probation=2, slots=5, check_weights_every=10_000)
    info = governor.snapshot()
    for batch in run.batches[:2]:
        loss = run.backward(batch)
        if governor.statistics().steps == 1:
            with governor.using(), torch.no_grad():
                run.model.hidden.fill_(float("nan"))
        governor.step(loss=loss)
    info.wait("sealed")
    late.lag = 0
    run.step(governor, run.batches[2])
    assert governor.statistics().snapshots_rejected == 1
    assert governor.rollbacks == 1


def test_what_was_found_in_an_undone_future_is_no_panic(late, govern, run):
    """`Keeper._findings` survives the rollback that undid them, and a clean state is rolled back.

    A handle came across a poisoned candidate; a rollback on request has undone it before the next step.
    """
    run.model.hidden = nn.Parameter(torch.ones(3))
    governor = govern(run.model, run.optimizer, cadence=2, probation=2, slots=5, check_weights_every=10_000)
    info = governor.snapshot()
    for batch in run.batches[:2]:
        loss = run.backward(batch)
        if governor.statistics().steps == 1:
            with governor.using(), torch.no_grad():
                run.model.hidden.fill_(float("nan"))
        governor.step(loss=loss)
    info.wait("sealed")
    governor.execute_rollback()
    assert bool(torch.isfinite(run.model.hidden).all())
    late.lag = 0
    result = run.step(governor, run.batches[2])
    assert not result.rolled_back
    assert governor.rollbacks == 1


def test_a_poisoned_candidate_is_counted_also_when_a_manual_snapshot_needs_its_slot(late, govern, run):
    """The same where `Keeper._stage` finds no free slot."""
    run.model.hidden = nn.Parameter(torch.ones(3))
    governor = govern(run.model, run.optimizer, cadence=4, probation=1, slots=3, check_weights_every=10_000)
    for batch in run.batches[:9]:
        loss = run.backward(batch)
        if governor.statistics().steps == 6:
            with governor.using(), torch.no_grad():
                run.model.hidden.fill_(float("nan"))
        governor.step(loss=loss)
    assert [slot.step for slot in governor._keeper.ring if slot.tier is Tier.DEVICE] == [0, 4, 8]  # no free slot
    governor.snapshot()  # reads both candidates to get one
    late.lag = 0
    run.step(governor, run.batches[9])
    assert governor.statistics().snapshots_rejected == 1


def test_a_manual_snapshot_that_is_not_finite_is_named_also_when_a_waiting_handle_has_found_it(
    late, govern, run, caplog
):
    governor = govern(run.model, run.optimizer)
    poison(governor, run.model)
    governor.snapshot().wait("sealed")
    late.lag = 0
    governor.observe()  # at the latest
    assert "a manual snapshot is not finite" in caplog.text


# ------------------------------------------------------------ captures


def test_while_another_thread_captures_steps_go_on_and_snapshots_wait(late, govern, run):
    late.lag = 1
    governor = govern(run.model, run.optimizer, cadence=2, probation=2)
    for batch in run.batches[:3]:
        run.step(governor, batch)
    began, end = threading.Event(), threading.Event()

    def capture():
        governor._keeper.sections.begin_capture(7, threading.get_ident())
        late.capturing.add(threading.get_ident())
        began.set()
        end.wait(60)
        late.capturing.clear()
        governor._keeper.sections.end_capture(7, succeeded=False)

    thread = threading.Thread(target=capture)
    thread.start()
    assert began.wait(60)
    late.clear()
    for batch in run.batches[3:9]:
        run.step(governor, batch)
    assert governor.statistics().snapshots_deferred > 0
    assert [call for call in late.calls if call.startswith("cuCtx")] == []
    end.set()
    thread.join(60)
    for batch in run.batches[9:12]:
        run.step(governor, batch)
    assert [call for call in late.calls if call.startswith("cuCtxRecordEvent")] != []
    assert late.violations == []


# ------------------------------------------------------------ the end


def test_closing_waits_for_copies_under_way(late, govern, run):
    governor = govern(run.model, run.optimizer)
    governor.snapshot()
    assert late.pending(late.own()) == 5
    governor.close()
    assert late.pending(late.own()) == 0


def test_a_dropped_governor_waits_for_copies_under_way_and_frees_its_slots(late, run):
    governor = TolariaGovernor(run.model, run.optimizer, detector=non_finite())
    governor.snapshot()
    flat = weakref.ref(governor._keeper.vault.slots[0].arena.flat[torch.device("cpu")])
    stream = late.own()
    assert late.pending(stream) == 5
    del governor
    gc.collect()
    assert late.pending(stream) == 0
    assert flat() is None
    assert late.contexts[0].retained == 0


def test_a_handle_outlives_its_governor(late, govern, run):
    """Waiting for what was done before the end asks nothing of what is gone."""
    governor = govern(run.model, run.optimizer)
    info = governor.snapshot()
    governor.close()
    info.wait("staged")
    assert late.violations == []


def test_each_governor_waits_for_its_own_work_only(late, govern):
    """And for what was launched before it: a context-wide event covers the other one's copies as well."""
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    first, second = govern(one), govern(two)
    streams = list(late.by_handle.values())
    before = weights(two)
    first.snapshot()
    second.snapshot()
    assert [late.pending(stream) for stream in streams] == [3, 3]
    first.close()
    assert [late.pending(stream) for stream in streams] == [0, 3]
    with second.using(), torch.no_grad():
        two.weight.fill_(3)
    second.execute_rollback()
    assert equal(two, before)


def test_copies_that_are_made_at_once_would_not_be_noticed_to_be_late(late, govern, monkeypatch):
    """Red twin of the lateness: with an eager enqueue nothing is pending."""
    monkeypatch.setattr(ContextDevice, "enqueue", lambda self, work: work())
    governor = govern(nn.Linear(2, 2))
    governor.snapshot()
    assert late.pending(late.own()) == 0


def test_verdicts_are_counted_once(late, govern, run):
    verdicts: list[Verdict] = []
    seen: list[int] = []
    governor = govern(run.model, run.optimizer, detector=recorder(seen))
    late.lag = 2
    verdicts += [result.verdict for result in run.train(governor, run.batches[:12])]
    assert seen == list(range(1, 13))
    assert all(verdict.health is Health.HEALTHY for verdict in verdicts)


# ------------------------------------------------------------ recovery policies


@pytest.mark.parametrize("lag", [0, 2, None])
def test_moments_are_changed_behind_the_reading_back(lag, late, govern, make_run):
    """What a rollback restored is read back as it was, and the change comes after: nobody is taken for a disturber."""
    late.lag = lag
    run, incidents = make_run(), []
    policy = Recovery(moments="reset")
    with govern(
        run.model,
        run.optimizer,
        scheduler=run.scheduler,
        cadence=4,
        probation=4,
        recovery=policy,
        on_incident=incidents.append,
    ) as governor:
        run.train(governor, run.poisoned(17))
        assert [incident.moments for incident in incidents] == ["keep", "reset"]
        assert governor.statistics().rollbacks_disturbed == 0
        restored = incidents[1].restored_step
        mine = run.state()
    by_hand = make_run()
    for step, batch in enumerate(by_hand.batches):
        if step == restored:
            by_hand.optimizer.state.clear()
        by_hand.backward(batch)
        by_hand.optimizer.step()
        by_hand.scheduler.step()
        by_hand.optimizer.zero_grad()
    assert by_hand.state() == mine


def test_a_change_that_is_no_section_disturbs(late, govern, make_run, monkeypatch):
    """The red twin: the same change, but of a writer that asks nobody."""

    def bare(keeper, how):
        if how != "keep":
            moments.treat([part.optimizer for part in keeper.state.optimizers], how, 0.0)

    monkeypatch.setattr(Keeper, "treat_moments", bare)
    late.lag = None
    run = make_run()
    policy = Recovery(moments="reset")
    with govern(run.model, run.optimizer, cadence=4, probation=4, recovery=policy) as governor:
        run.train(governor, run.poisoned(17))
        assert governor.statistics().rollbacks_disturbed > 0


def test_another_default_device_changes_nothing(late, govern, make_run):
    """What is made without saying where would be on `meta`, where nothing has bytes."""
    late.lag = 2
    ends = []
    for default in (None, "meta"):
        run = make_run()
        for batch in run.batches[:2]:  # torch's optimizers make their counters on the default device
            run.backward(batch)
            run.optimizer.step()
            run.optimizer.zero_grad()
        torch.set_default_device(default)
        try:
            governor = govern(run.model, run.optimizer, scheduler=run.scheduler, cadence=4, probation=3, host_slots=2)
            run.train(governor, run.poisoned(14))
            governor.snapshot().wait("sealed")
            governor.execute_rollback().wait()
        finally:
            torch.set_default_device(None)
        ends.append((run.state(), governor.rollbacks))
        governor.close()
    assert ends[0] == ends[1]
    assert ends[0][1] > 1

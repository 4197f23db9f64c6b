"""What late verdicts may not break: snapshots by hand, rollbacks by hand, labels, gradients and registered objects."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from tolaria import Detector, Health, QuiesceTimeout, Recovery, Verdict
from tolaria.snapshot import Vault


def is_finite(run):
    return all(bool(torch.isfinite(parameter).all()) for parameter in run.model.parameters())


def same(before, now):
    return all(torch.equal(a, b) for a, b in zip(before, now, strict=True))


def test_a_snapshot_by_hand_after_a_bad_step_is_not_gone_back_to(late, govern, make_run):
    """Its caller vouched for it before anybody could know."""
    late.lag = 2
    run = make_run()
    with govern(run.model, run.optimizer, cadence=4, probation=4) as governor:
        for number, batch in enumerate(governor.watch(run.poisoned(10))):
            result = run.step(governor, batch)
            if number == 10:
                assert not result.verdict.is_panic
                governor.snapshot()
        assert governor.rollbacks == 2
    assert is_finite(run)


def test_one_bad_step_is_one_panic_also_for_a_loop_that_rolls_back_by_hand(late, govern, make_run):
    late.lag = 4
    run = make_run()
    with govern(run.model, run.optimizer, cadence=4, probation=4, recovery=Recovery(max_retries=1000)) as governor:
        governor.snapshot()
        panics = 0
        for batch in run.poisoned(10):
            loss = run.backward(batch)
            run.optimizer.step()
            verdict = governor.observe(loss=loss)
            run.optimizer.zero_grad()
            if verdict.is_panic:
                panics += 1
                governor.execute_rollback()
        assert panics == 1
    assert is_finite(run)


def test_no_step_after_a_rollback_tells_of_a_panic_before_it(late, govern, make_run):
    late.lag = 3
    run = make_run()
    with govern(run.model, run.optimizer, cadence=4, probation=4) as governor:
        for result in run.train(governor, run.poisoned(10)):
            assert result.verdict.is_panic == result.rolled_back


@pytest.mark.parametrize("label", [None, 10**6, 0])
def test_the_number_that_a_caller_gives_a_snapshot_means_nothing_to_us(label, late, govern, make_run):
    late.lag = 2
    run = make_run()
    with govern(run.model, run.optimizer, cadence=4, probation=4) as governor:
        for number, batch in enumerate(governor.watch(run.batches)):
            run.step(governor, batch)
            if number == 5:
                governor.snapshot(step=label)
        certified = [slot.completed for slot in governor._keeper.ring if slot.phase.value == "certified"]
        assert max(certified) >= 32


@pytest.mark.parametrize("protected", [True, False])
def test_captured_gradients_are_those_of_the_snapshot(protected, late, govern, make_run, monkeypatch):
    """The next backward accumulates into them, and no backward is a section."""
    late.lag = 3
    run = make_run()
    with govern(run.model, run.optimizer, cadence=100, probation=4) as governor:
        run.step(governor, run.batches[0])
        run.backward(run.batches[1])
        before = [parameter.grad.clone() for parameter in run.model.parameters()]
        if not protected:
            monkeypatch.setattr("tolaria.protocol.order_behind", lambda *_: iter(()))
        governor.snapshot(grads="capture")
        monkeypatch.undo() if not protected else None
        run.backward(run.batches[2])
        governor.execute_rollback()
        late.finish()
        assert same(before, [parameter.grad for parameter in run.model.parameters()]) is protected


def test_an_average_that_is_updated_before_the_step_comes_back_as_it_was(late, govern, make_run):
    late.lag = 3
    run = make_run()
    ema = torch.optim.swa_utils.AveragedModel(run.model)
    with govern(run.model, run.optimizer, cadence=2, probation=0) as governor:
        governor.register("ema", ema)
        seen = {}
        for batch in run.batches[:12]:
            loss = run.backward(batch)
            ema.update_parameters(run.model)
            governor.step(loss=loss)
            seen[governor.statistics().steps] = [parameter.clone() for parameter in ema.parameters()]
        report = governor.execute_rollback()
        late.finish()
        assert same(seen[report.snapshot_step], list(ema.parameters()))


class Counting(nn.Module):
    """A forward that writes a tensor which is neither parameter nor buffer."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.count = torch.zeros(1)

    def forward(self, x):
        self.count.add_(1)
        return self.linear(x)

    def get_extra_state(self):
        return {"count": self.count}

    def set_extra_state(self, state):
        self.count.copy_(state["count"])


def test_extra_state_that_a_forward_writes(late, govern):
    late.lag = 3
    model = Counting()
    with govern(model, cadence=100, probation=4) as governor:
        model(torch.randn(2, 6))
        governor.snapshot()
        model(torch.randn(2, 6))
        governor.execute_rollback()
        late.finish()
        assert float(model.count) == 1


def test_a_snapshot_that_cannot_be_read_is_given_up_and_training_goes_on(late, govern, make_run, monkeypatch):
    late.lag = 1
    run = make_run()
    read, calls = Vault._conclude, []

    def fails_twice(self, slot, held, survey):
        calls.append(slot)
        if len(calls) in (2, 3):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return read(self, slot, held, survey)

    monkeypatch.setattr(Vault, "_conclude", fails_twice)
    with govern(run.model, run.optimizer, cadence=3, probation=3) as governor:
        for batch in run.batches:
            governor.step(loss=run.backward(batch))
        assert governor.statistics().snapshots_failed == 2
        assert all(slot.phase.value != "staged" or slot.completed > 30 for slot in governor._keeper.ring)


def test_a_panic_whose_rollback_could_not_be_made_is_answered_by_the_next_step(late, govern, make_run):
    late.lag = 1
    run = make_run()
    with govern(run.model, run.optimizer, cadence=4, probation=4, gate_timeout_s=0.2) as governor:
        inside, leave = threading.Event(), threading.Event()

        def other():
            with governor.using(write=False):
                inside.set()
                leave.wait()

        thread = threading.Thread(target=other)
        raised = 0
        for number, batch in enumerate(run.poisoned(10)):
            if number == 10:
                thread.start()
                inside.wait()
            try:
                governor.step(loss=run.backward(batch))
            except QuiesceTimeout:
                raised += 1
                leave.set()
                thread.join()
        assert (raised, governor.rollbacks) == (1, 1)
    assert is_finite(run)


def test_a_write_that_raises_is_blamed_on_the_step_that_follows_it(late, govern, make_run):
    late.lag = 6
    run = make_run()
    incidents = []
    with govern(run.model, run.optimizer, cadence=4, probation=4, on_incident=incidents.append) as governor:
        for number, batch in enumerate(governor.watch(run.batches)):
            if number == 12 and not incidents:
                with pytest.raises(ValueError, match="half-way"), governor.using():
                    raise ValueError("half-way")
            run.step(governor, batch)
    assert [(incident.step, incident.reason) for incident in incidents] == [(13, "a write raised half-way")]


def test_rows_of_forgotten_numbers_are_used_again(late, govern, make_run):
    late.lag = 5
    run = make_run()
    with govern(run.model, run.optimizer, cadence=4, probation=4) as governor:
        governor.snapshot()
        had = len(governor._readings._rows)
        for _ in range(20):
            for batch in run.batches[:6]:
                run.step(governor, batch)
            governor.execute_rollback()
        late.finish()
        run.step(governor, run.batches[0])
        assert len(governor._readings._rows) + len(governor._readings._abandoned) >= had - 8


def test_a_new_episode_and_a_resumed_run_know_no_old_numbers(late, govern, make_run):
    late.lag = 3
    run = make_run()
    with govern(run.model, run.optimizer, cadence=4, probation=4) as governor:
        for batch in run.batches[:11]:
            run.step(governor, batch)
        governor.reset()
        assert not governor._course._outstanding
        for batch in run.batches[:3]:
            run.step(governor, batch)
        saved = governor.state_dict()
        assert not governor._course._outstanding  # everything before it was judged
        governor.load_state_dict({**saved, "completed": 500})
        assert governor.observe(loss=1.0).step <= 501


def test_a_report_that_is_waited_for_after_close(late, govern, make_run):
    run = make_run()
    governor = govern(run.model, run.optimizer)
    governor.snapshot()
    report = governor.execute_rollback()
    governor.close()
    assert (report.wait().status, report.verified) == ("done", None)


@pytest.mark.parametrize("asks", ["state_dict", "re-execution"])
def test_no_snapshot_is_taken_of_what_has_turned_out_suspect_meanwhile(asks, late, govern, make_run):
    """It was due by the verdicts that had arrived when its step was made."""
    late.lag = 2
    run, judged = make_run(), []

    def update(state, signs):
        judged.append(signs.step)
        health = Health.SUSPECT if signs.step == 8 else Health.HEALTHY
        return state, Verdict(health, signs.step, "scripted" if signs.step == 8 else "")

    settings = {"cadence": 4, "probation": 4, "reexecute_every": 4 if asks == "re-execution" else 0}
    with govern(run.model, run.optimizer, detector=Detector(lambda: 0, update), **settings) as governor:
        for batch in governor.watch(run.batches[:20]):
            step = run.step(governor, batch).step
            if step == 8 and asks == "state_dict":
                assert 8 not in judged
                governor.state_dict()
            if step == 9 and 9 not in judged:
                assert 8 in judged
                assert 8 not in {slot.completed for slot in governor._keeper.ring}
                break
        assert step == 9

"""A gradient that is not finite, on a device that is late: it never reaches the weights, and the host does not wait."""

import contextlib

import pytest
import torch
from cuda_driver.poisoned import FUSED, NAN, PLAIN, freeze, is_finite, poison, stepped, waits
from torch import nn

from tolaria import Detector, Health, Verdict, veto
from tolaria.observe import Readings
from tolaria.update import Update
from tolaria.vitals import Sent


def prepared(make_run, make):
    run = make_run(batches=24)
    run.optimizer = make(run.model.parameters())
    run.scheduler = torch.optim.lr_scheduler.StepLR(run.optimizer, 4, gamma=0.7)
    return run


def train(run, governor, poisoned, after=lambda _: None, value=NAN):
    """Poison a gradient in the `poisoned`-th delivered step, once; `after` is called right behind that step."""
    for delivered, batch in enumerate(governor.watch(run.batches)):
        loss = run.backward(batch)
        if delivered == poisoned:
            poison(run, value)
            before = stepped(run)
            governor.step(loss=loss)
            after(before)
        else:
            governor.step(loss=loss)


# ------------------------------------------------------------ fused optimizers


@pytest.mark.parametrize(("lag", "value"), [(1, NAN), (3, float("inf")), (None, NAN)])
@pytest.mark.parametrize("make", FUSED.values(), ids=FUSED)
def test_the_device_refuses_the_step_and_the_run_is_the_clean_one(make, lag, value, late, govern, make_run):
    late.lag = lag
    clean = prepared(make_run, make)
    clean.plain()
    expected = clean.state()
    run, seen = prepared(make_run, make), []
    with govern(run.model, run.optimizer, scheduler=run.scheduler, cadence=4, probation=4, keep_batches=64) as governor:
        train(run, governor, 12, lambda before: seen.append(stepped(run) == before), value)
        assert seen == [True]  # nothing of it was applied, and the host did not know yet
        assert (governor.rollbacks, governor.statistics().vetoes) == (1, 1)
        assert run.state() == expected


@pytest.mark.parametrize("make", FUSED.values(), ids=FUSED)
def test_without_the_flag_it_reaches_the_weights(make, late, govern, make_run, monkeypatch):
    """Red twin: only the rollback is left."""
    monkeypatch.setattr(veto, "predicated", lambda *_: contextlib.nullcontext())
    run, seen = prepared(make_run, make), []
    with govern(run.model, run.optimizer, cadence=4, probation=4, keep_batches=64) as governor:
        train(run, governor, 12, lambda _: seen.append(is_finite(run.model)))
        assert seen == [False]
        assert is_finite(run.model)


@pytest.mark.parametrize("make", FUSED.values(), ids=FUSED)
def test_a_healthy_run_is_the_run_without_a_guard(make, late, govern, make_run):
    late.lag = 2
    clean = prepared(make_run, make)
    clean.plain()
    expected = clean.state()
    run = prepared(make_run, make)
    with govern(run.model, run.optimizer, scheduler=run.scheduler, cadence=4, probation=4) as governor:
        run.train(governor)
        assert run.state() == expected
        assert governor.statistics().vetoes == 0
    assert not run.optimizer._optimizer_step_pre_hooks
    assert not run.optimizer._optimizer_step_post_hooks
    assert "found_inf" not in vars(run.optimizer)


@pytest.mark.parametrize("make", FUSED.values(), ids=FUSED)
def test_a_veto_in_the_first_step_of_all(make, late, govern, make_run):
    clean = prepared(make_run, make)
    clean.plain()
    expected = clean.state()
    run = prepared(make_run, make)
    weights = freeze(list(run.model.parameters()))
    seen = []
    with govern(run.model, run.optimizer, scheduler=run.scheduler, cadence=4, probation=4) as governor:
        train(run, governor, 0, lambda _: seen.append(freeze(list(run.model.parameters()))))
        assert seen == [weights]
        assert run.state() == expected


def test_a_detector_that_overlooks_it_does_not_keep_what_is_not_exact(late, govern, make_run):
    late.lag = 1
    content = Detector(lambda: 0, lambda state, signs: (state, Verdict(Health.HEALTHY, signs.step)))
    clean = prepared(make_run, FUSED["adamw"])
    clean.plain()
    expected = clean.state()
    run = prepared(make_run, FUSED["adamw"])
    with govern(
        run.model, run.optimizer, scheduler=run.scheduler, detector=content, cadence=4, probation=4
    ) as governor:
        train(run, governor, 9)
        assert (governor.rollbacks, governor.statistics().panics) == (1, 1)
        assert run.state() == expected


def test_observing_vetoes_nothing(late, govern, make_run):
    run = prepared(make_run, FUSED["adamw"])
    with govern(run.model, run.optimizer, mode="observe") as governor:
        train(run, governor, 3)
        assert governor.statistics().vetoes == 0
    assert not is_finite(run.model)


# ------------------------------------------------------------ kept


class Bare:
    """No buffers, no dropout: what is left of a refused step is nothing."""

    def __init__(self, make, scaler=None):
        torch.manual_seed(5)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        self.optimizer = make(self.model.parameters())
        self.batches = [torch.randn(8, 6) for _ in range(24)]
        self.scaler = scaler

    def backward(self, x, share=1):
        loss = self.model(x).square().mean() / share
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        return loss

    def state(self):
        scale = None if self.scaler is None else self.scaler.state_dict()
        return freeze([self.model.state_dict(), self.optimizer.state_dict(), scale])


def without_the_tenth(make):
    """A run that no governor has seen, and that leaves batch 10 out."""
    plain = Bare(make)
    for number, x in enumerate(plain.batches):
        if number != 10:
            plain.backward(x)
            plain.optimizer.step()
            plain.optimizer.zero_grad()
    return plain


@pytest.mark.parametrize("make", FUSED.values(), ids=FUSED)
def test_a_kept_veto_leaves_the_step_out_without_a_wait(make, late, govern):
    plain = without_the_tenth(make)
    run = Bare(make)
    governor = govern(run.model, run.optimizer, on_veto="keep", cadence=100, probation=0)
    results = []
    for number, x in enumerate(run.batches):
        loss = run.backward(x)
        if number == 1:
            late.clear()  # the first snapshot is waited for, and the first step of SGD decided on the host
        if number == 10:
            run.model[2].bias.grad[1] = NAN
        results.append(governor.step(loss=loss))
        assert number == 0 or waits(late) == 0
    governor.state_dict()  # waits for all verdicts
    assert run.state() == plain.state()
    assert (governor.rollbacks, governor.statistics().vetoes, governor.statistics().panics) == (0, 1, 0)
    assert not any(result.rolled_back for result in results)


@pytest.mark.parametrize("make", PLAIN.values(), ids=PLAIN)
def test_a_kept_veto_of_any_other_optimizer_is_decided_on_the_host(make, late, govern):
    plain = without_the_tenth(make)
    run = Bare(make)
    governor = govern(run.model, run.optimizer, on_veto="keep", cadence=100, probation=0)
    for number, x in enumerate(run.batches):
        loss = run.backward(x)
        if number == 10:
            run.model[2].bias.grad[1] = NAN
        governor.step(loss=loss)
    governor.state_dict()
    assert run.state() == plain.state()
    assert (governor.rollbacks, governor.statistics().vetoes) == (0, 1)


@pytest.mark.parametrize("bad", range(3))
@pytest.mark.parametrize("lag", [2, None])
def test_the_whole_window_of_an_accumulation_is_dropped(lag, bad, late, govern):
    late.lag = lag
    plain = Bare(FUSED["adamw"])
    for start in range(0, 24, 3):
        if start != 9:
            for x in plain.batches[start : start + 3]:
                plain.backward(x, 3)
            plain.optimizer.step()
            plain.optimizer.zero_grad()
    run = Bare(FUSED["adamw"])
    governor = govern(run.model, run.optimizer, on_veto="keep", cadence=100, probation=0)
    for start in range(0, 24, 3):
        losses = []
        for number, x in enumerate(run.batches[start : start + 3]):
            losses.append(run.backward(x, 3))
            if start == 9 and number == bad:
                run.model[0].weight.grad[3, 3] = float("inf")
        governor.step(loss=losses)
    governor.state_dict()
    assert run.state() == plain.state()
    assert governor.statistics().vetoes == 1


# ------------------------------------------------------------ any other optimizer


@pytest.mark.parametrize("lag", [1, None])
@pytest.mark.parametrize("make", PLAIN.values(), ids=PLAIN)
def test_others_step_on_zero_gradients_and_the_rollback_makes_it_exact(make, lag, late, govern, make_run):
    late.lag = lag
    clean = prepared(make_run, make)
    clean.plain()
    expected = clean.state()
    run, seen = prepared(make_run, make), []
    with govern(run.model, run.optimizer, scheduler=run.scheduler, cadence=4, probation=4, keep_batches=64) as governor:
        train(run, governor, 12, lambda before: seen.append((is_finite(run.model), stepped(run) == before)))
        assert seen == [(True, False)]  # moments and decay have moved, the weights are finite
        assert (governor.rollbacks, governor.statistics().vetoes) == (1, 1)
        assert run.state() == expected


@pytest.mark.parametrize("make", PLAIN.values(), ids=PLAIN)
def test_without_the_zeros_it_reaches_the_weights(make, late, govern, make_run, monkeypatch):
    """Red twin."""
    monkeypatch.setattr(veto, "blank", lambda *_: None)
    run, seen = prepared(make_run, make), []
    with govern(run.model, run.optimizer, cadence=4, probation=4, keep_batches=64) as governor:
        train(run, governor, 12, lambda _: seen.append(is_finite(run.model)))
        assert seen == [False]


# ------------------------------------------------------------ scaler


def scaler_of(**settings):
    return torch.amp.GradScaler("cpu", **{"init_scale": 256.0, "growth_interval": 5, **settings})


@pytest.mark.parametrize("make", FUSED.values(), ids=FUSED)
def test_what_a_scaler_skips_is_routine(make, late, govern):
    """From the second step on: a first step that it skips ruins torch's own SGD, see below."""
    late.lag = 2
    plain = Bare(make, scaler_of())
    for number, x in enumerate(plain.batches):
        plain.backward(x)
        if number in (4, 5, 12):
            plain.model[0].bias.grad[0] = float("inf")
        plain.scaler.step(plain.optimizer)
        plain.scaler.update()
        plain.optimizer.zero_grad()
    run = Bare(make, scaler_of())
    governor = govern(run.model, run.optimizer, scaler=run.scaler, cadence=4, probation=2)
    for number, x in enumerate(run.batches):
        loss = run.backward(x)
        if number in (4, 5, 12):
            run.model[0].bias.grad[0] = float("inf")
        governor.step(loss=loss)
    governor.state_dict()
    assert run.state() == plain.state()
    assert (governor.rollbacks, governor.statistics().vetoes, governor.statistics().panics) == (0, 0, 0)


def test_twenty_of_them_in_a_row_are_a_panic(late, govern):
    late.lag = 1
    run = Bare(FUSED["adamw"], scaler_of(backoff_factor=0.999))
    governor = govern(run.model, run.optimizer, scaler=run.scaler, cadence=4, probation=2)
    governor.snapshot()
    reasons = []
    for x in run.batches:
        loss = run.backward(x)
        run.model[0].bias.grad[0] = float("inf")
        result = governor.step(loss=loss)
        if result.rolled_back:
            reasons.append((result.verdict.reason, result.verdict.step))
    assert reasons == [("GradScaler skips every step", 20)]


@pytest.mark.parametrize("protected", [True, False])
def test_what_a_scaler_has_not_seen_is_vetoed(protected, late, govern, monkeypatch):
    """Gradients that go wrong after they were unscaled: by a hand-made clipping, a hook, a flipped bit."""
    if not protected:
        monkeypatch.setattr(Update, "_refusal", lambda *_: None)
    late.lag = 2
    plain = Bare(FUSED["adamw"], scaler_of())
    for x in plain.batches:
        plain.backward(x)
        plain.scaler.step(plain.optimizer)
        plain.scaler.update()
        plain.optimizer.zero_grad()
    run = Bare(FUSED["adamw"], scaler_of())
    governor = govern(run.model, run.optimizer, scaler=run.scaler, cadence=4, probation=2, keep_batches=64)
    for delivered, x in enumerate(governor.watch(run.batches)):
        loss = run.backward(x)
        run.scaler.unscale_(run.optimizer)
        if delivered == 11:
            run.model[0].bias.grad[0] = NAN
        governor.step(loss=loss)
        if delivered == 11:
            assert is_finite(run.model) == protected
    assert run.state() == plain.state()
    assert (governor.rollbacks, governor.statistics().vetoes) == (1, int(protected))


@pytest.mark.parametrize("protected", [True, False])
def test_a_first_step_that_a_scaler_skips_leaves_no_momentum_behind(protected, late, govern, monkeypatch):
    """Torch's fused SGD would keep buffers that nobody has written, and go on from them."""
    if not protected:
        monkeypatch.setattr(veto, "unwritten_momenta", lambda _: [])
    run = Bare(FUSED["momentum"], scaler_of())
    governor = govern(run.model, run.optimizer, scaler=run.scaler)
    loss = run.backward(run.batches[0])
    run.model[0].bias.grad[0] = float("inf")
    governor.step(loss=loss)
    assert (len(run.optimizer.state) == 0) == protected


# ------------------------------------------------------------ several optimizers, several devices


def pair_of(model):
    return [FUSED["adamw"](model[0].parameters()), FUSED["momentum"](model[2].parameters())]


class Two(Bare):
    def __init__(self, scaler=None):
        super().__init__(lambda p: None, scaler)
        self.optimizers = pair_of(self.model)

    def state(self):
        scale = None if self.scaler is None else self.scaler.state_dict()
        return freeze([self.model.state_dict(), [each.state_dict() for each in self.optimizers], scale])

    def step(self):
        for optimizer in self.optimizers:
            (optimizer.step if self.scaler is None else lambda o=optimizer: self.scaler.step(o))()
        if self.scaler is not None:
            self.scaler.update()
        self.model.zero_grad()


@pytest.mark.parametrize("layer", [0, 2])
def test_one_bad_gradient_stops_every_optimizer(layer, late, govern):
    plain = Two()
    for number, x in enumerate(plain.batches):
        if number != 7:
            plain.backward(x)
            plain.step()
    run = Two()
    governor = govern(run.model, run.optimizers, on_veto="keep", cadence=100, probation=0)
    for number, x in enumerate(run.batches):
        loss = run.backward(x)
        if number == 7:
            run.model[layer].bias.grad[0] = NAN
        governor.step(loss=loss)
    governor.state_dict()
    assert run.state() == plain.state()
    assert governor.statistics().vetoes == 1


@pytest.mark.parametrize("layer", [0, 2])
def test_a_scaler_skips_one_optimizer_and_not_the_other(layer, late, govern):
    plain = Two(scaler_of())
    for number, x in enumerate(plain.batches):
        plain.backward(x)
        if number == 7:
            plain.model[layer].bias.grad[0] = float("inf")
        plain.step()
    run = Two(scaler_of())
    governor = govern(run.model, run.optimizers, scaler=run.scaler, cadence=100, probation=0)
    for number, x in enumerate(run.batches):
        loss = run.backward(x)
        if number == 7:
            run.model[layer].bias.grad[0] = float("inf")
        governor.step(loss=loss)
    governor.state_dict()
    assert run.state() == plain.state()
    assert (governor.rollbacks, governor.statistics().vetoes) == (0, 0)


def test_what_a_scaler_skips_does_not_hide_what_it_has_not_seen(late, govern):
    run = Two(scaler_of())
    governor = govern(run.model, run.optimizers, scaler=run.scaler, cadence=100, probation=0)
    for x in run.batches[:3]:
        loss = run.backward(x)
        governor.step(loss=loss)
    before = freeze(list(run.model.parameters()))
    loss = run.backward(run.batches[3])
    run.model[0].bias.grad[0] = float("inf")
    for optimizer in run.optimizers:
        run.scaler.unscale_(optimizer)
    run.model[2].bias.grad[0] = NAN
    governor.step(loss=loss)
    assert freeze(list(run.model.parameters())) == before
    governor.state_dict()
    assert governor.statistics().vetoes == 1


@pytest.mark.parametrize("protected", [True, False])
def test_an_overflow_that_two_devices_have_found_is_skipped(protected, late, govern, monkeypatch):
    """`GradScaler` adds their flags up to 2, which the kernels of torch do not take for a flag."""
    if not protected:
        monkeypatch.setattr(veto, "predicated", lambda *_: contextlib.nullcontext())
    unscale = torch.amp.GradScaler._unscale_grads_

    def on_two(self, *args):
        [found] = unscale(self, *args).values()
        return {torch.device("cpu"): found, torch.device("cpu", 0): found.clone()}

    monkeypatch.setattr(torch.amp.GradScaler, "_unscale_grads_", on_two)
    run = Bare(FUSED["adamw"], scaler_of())
    governor = govern(run.model, run.optimizer, scaler=run.scaler)
    for x in run.batches[:3]:
        governor.step(loss=run.backward(x))
    before = freeze(list(run.model.parameters()))
    loss = run.backward(run.batches[3])
    run.model[0].bias.grad[0] = float("inf")
    governor.step(loss=loss)
    assert (freeze(list(run.model.parameters())) == before) == protected
    governor.state_dict()
    assert governor.rollbacks == 0


def test_where_the_host_would_have_to_wait_nothing_is_vetoed_and_the_rollback_answers(
    late, govern, make_run, monkeypatch
):
    """Parameters in main memory beside a decision that falls on a device."""
    late.lag = 1
    monkeypatch.setattr(veto.Choice, "of", lambda *_: veto.Means.NONE)
    clean = prepared(make_run, FUSED["adamw"])
    clean.plain()
    expected = clean.state()
    run, seen = prepared(make_run, FUSED["adamw"]), []
    with govern(run.model, run.optimizer, scheduler=run.scheduler, cadence=4, probation=4) as governor:
        train(run, governor, 12, lambda _: seen.append(is_finite(run.model)))
        assert seen == [False]
        assert (governor.rollbacks, governor.statistics().vetoes) == (1, 0)
        assert run.state() == expected


def test_a_kept_veto_counts_for_no_probation(late, govern, monkeypatch):
    late.lag = 1
    run, counted = Bare(FUSED["adamw"]), []
    governor = govern(run.model, run.optimizer, on_veto="keep", cadence=4, probation=2)
    advance = governor._keeper.advance
    monkeypatch.setattr(governor._keeper, "advance", lambda step: (counted.append(step), advance(step)))
    for number, x in enumerate(run.batches[:8]):
        loss = run.backward(x)
        if number == 4:
            run.model[2].bias.grad[1] = NAN
        governor.step(loss=loss)
    governor.state_dict()
    assert counted == [1, 2, 3, 4, 6, 7, 8]


@pytest.mark.parametrize(("vetoed", "keeps"), [(0.0, False), (1.0, False), (1.0, True)])
def test_a_veto_beside_what_a_scaler_skips_is_not_routine(vetoed, keeps):
    numbers = {"scaler_skipped": 1.0, "vetoed": vetoed, "nonfinite_gradients": 2.0, "loss": NAN}
    arrived = Sent(step=3, reading=Readings({}).send(numbers), keeps_vetoes=keeps).read()
    assert (arrived.by_scaler, arrived.vetoed, arrived.kept) == (not vetoed, bool(vetoed), keeps)
    assert arrived.signs.nonfinite_gradients == (2 if vetoed and not keeps else 0)
    assert (arrived.signs.loss is None) == keeps

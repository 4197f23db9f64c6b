"""`step`: clip, accumulation, schedulers, closures, scaler and veto, each against the loop that a user would write."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tolaria import Detector, GovernorConfig, Health, PhaseError, TolariaGovernor, Verdict, VitalSigns, veto

Govern = Callable[..., TolariaGovernor]


class Listening:
    """A detector that calls everything healthy and keeps the signs."""

    def __init__(self) -> None:
        self.heard: list[VitalSigns] = []
        self.detector: Detector[int] = Detector(lambda: 0, self._update)

    def _update(self, state: int, signs: VitalSigns) -> tuple[int, Verdict]:
        self.heard.append(signs)
        return state + 1, Verdict(Health.HEALTHY, signs.step)


def poison_gradient(run: Any) -> None:
    """One NaN in one gradient; the loss is finite."""
    run.model[4].weight.grad[1, 2] = float("nan")


# ------------------------------------------------------------ results and signs


def test_a_healthy_step(govern: Govern, kit: Any) -> None:
    run = kit.Run()
    governor = govern(run.model, run.optimizer)
    result = run.step(governor, run.batches[0])
    assert (result.rolled_back, result.skipped) == (False, False)
    assert (result.verdict.health, result.verdict.step) == (Health.HEALTHY, 1)
    assert run.step(governor, run.batches[1]).verdict.step == 2
    assert all(parameter.grad is None for parameter in run.model.parameters())


def test_the_signs_are_those_of_the_step(govern: Govern, kit: Any) -> None:
    run, listening = kit.Run(), Listening()
    governor = govern(run.model, run.optimizer, detector=listening.detector)
    loss = run.backward(run.batches[0])
    norm = torch.nn.utils.get_total_norm([p.grad for p in run.model.parameters()])
    governor.step(loss=loss, clip=0.01, metric=0.25, entropy=torch.tensor([1.0, 2.0]), kl=3)
    [signs] = listening.heard
    assert signs == VitalSigns(
        step=1,
        loss=float(loss.detach()),
        grad_norm=float(norm),  # before clipping
        nonfinite_gradients=0,
        nonfinite_weights=0,
        metric=0.25,
        extra={"entropy": 1.5, "kl": 3.0},
    )


def test_losses_in_all_forms(govern: Govern, kit: Any) -> None:
    run, listening = kit.Run(), Listening()
    governor = govern(run.model, run.optimizer, detector=listening.detector)
    one, two = torch.tensor(1.0, requires_grad=True), torch.tensor(2.0, dtype=torch.bfloat16)
    for loss in (3, 3.5, one, torch.tensor([1.0, 4.0]), [one, two, 3.0], (), None):
        governor.step(loss=loss)
    assert [signs.loss for signs in listening.heard] == [3.0, 3.5, 1.0, 2.5, 2.0, None, None]


def test_non_finite_weights_are_looked_for_as_often_as_asked(govern: Govern, kit: Any) -> None:
    run, listening = kit.Run(), Listening()
    governor = govern(
        run.model, run.optimizer, detector=listening.detector, config=GovernorConfig(check_weights_every=3)
    )
    governor.step(loss=1.0)
    run.poison()
    for _ in range(5):
        governor.step(loss=1.0)
    assert [signs.nonfinite_weights for signs in listening.heard] == [None, None, 1, None, None, 1]


# ------------------------------------------------------------ clip


def mixed(dtypes: tuple[torch.dtype, ...]) -> nn.Module:
    torch.manual_seed(2)
    return nn.ModuleList(nn.Linear(5, 3).to(dtype) for dtype in dtypes)


@pytest.mark.parametrize("clip", [1e-3, 0.7, 1e6])
@pytest.mark.parametrize(
    "dtypes",
    [(torch.float32,), (torch.float64,), (torch.bfloat16,), (torch.float16,), (torch.float32, torch.bfloat16)],
    ids=lambda dtypes: "+".join(str(dtype).removeprefix("torch.") for dtype in dtypes),
)
def test_clip_equals_clip_grad_norm_bit_for_bit(
    dtypes: tuple[torch.dtype, ...], clip: float, govern: Govern, kit: Any
) -> None:
    models = [mixed(dtypes), mixed(dtypes)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in models]
    governor = govern(models[1], optimizers[1])
    for i in range(4):
        generator = torch.Generator().manual_seed(i)
        for parameter, twin in zip(models[0].parameters(), models[1].parameters(), strict=True):
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            twin.grad = parameter.grad.clone()
        torch.nn.utils.clip_grad_norm_(models[0].parameters(), clip)
        optimizers[0].step()
        governor.step(loss=1.0, clip=clip)
        assert kit.freeze(models[1].state_dict()) == kit.freeze(models[0].state_dict())
        assert kit.freeze(optimizers[1].state_dict()) == kit.freeze(optimizers[0].state_dict())


# ------------------------------------------------------------ accumulation


def test_accumulation_equals_the_plain_loop(govern: Govern, kit: Any) -> None:
    plain = kit.Run()
    for i, batch in enumerate(plain.batches[:12]):
        (plain.loss(batch) / 3).backward()
        if i % 3 == 2:
            plain.optimizer.step()
            plain.scheduler.step()
            plain.optimizer.zero_grad()
    run, listening = kit.Run(), Listening()
    governor = govern(run.model, run.optimizer, scheduler=run.scheduler, detector=listening.detector)
    losses: list[torch.Tensor] = []
    for batch in governor.watch(run.batches[:12]):
        losses.append(run.loss(batch))
        (losses[-1] / 3).backward()
        if len(losses) == 3:
            governor.step(loss=losses)
            expected = sum(float(loss.detach()) for loss in losses) / 3
            assert listening.heard[-1].loss == pytest.approx(expected)
            losses = []
    assert run.state() == plain.state()
    assert governor.statistics().steps == 4


@pytest.mark.parametrize("bad", [6, 7, 8])
def test_a_panic_returns_the_whole_accumulation_window(bad: int, govern: Govern, kit: Any) -> None:
    clean, run = kit.Run(), kit.Run()

    def train(run: Any, governor: TolariaGovernor, poisoned: int | None) -> list[int]:
        torch.manual_seed(9)
        delivered, window = [], []
        for number, batch in governor.watch(list(enumerate(run.batches[:15]))):
            delivered.append(number)
            if number == poisoned:
                poisoned = None  # a transient fault
                batch = kit.nan_batch(batch)
            window.append(run.loss(batch))
            (window[-1] / 3).backward()
            if len(window) == 3:
                governor.step(loss=window)
                window = []
        return delivered

    first = govern(clean.model, clean.optimizer, scheduler=clean.scheduler, config=GovernorConfig(rng="restore"))
    assert train(clean, first, None) == list(range(15))
    second = govern(run.model, run.optimizer, scheduler=run.scheduler, config=GovernorConfig(rng="restore"))
    assert train(run, second, bad) == [*range(9), *range(15)]
    assert run.state() == clean.state()
    assert second.statistics().replayed_batches == 9


# ------------------------------------------------------------ schedulers


@pytest.mark.parametrize("by", ["metric", "loss", "closure"])
def test_reduce_lr_on_plateau(by: str, govern: Govern, kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    values = [1.0, 2.0, 2.0, 2.0, 1.5, 1.5, 1.5, 1.5, 3.0]
    runs = [kit.Run(), kit.Run(), kit.Run()]
    for run in runs:
        run.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            run.optimizer, "max" if by == "metric" else "min", patience=1, factor=0.5
        )
    for value in values:
        runs[0].optimizer.step()
        runs[0].scheduler.step(value)
    governed = govern(runs[1].model, runs[1].optimizer, scheduler=runs[1].scheduler)
    monkeypatch.setenv("TOLARIA_DISABLE", "1")
    disabled = govern(runs[2].model, runs[2].optimizer, scheduler=runs[2].scheduler)
    for governor in (governed, disabled):
        for value in values:
            if by == "closure":
                governor.step(loss=None, closure=lambda value=value: torch.tensor(value))
            else:
                governor.step(loss=value if by == "loss" else 1.0, metric=value if by == "metric" else None)
    states = [kit.freeze(run.scheduler.state_dict()) for run in runs]
    assert states[0] == states[1] == states[2]
    assert runs[0].optimizer.param_groups[0]["lr"] < 0.05


def test_several_optimizers_and_schedulers(govern: Govern, kit: Any) -> None:
    def parts(run: Any) -> tuple[list[Any], list[Any]]:
        layers = [[*run.model[:2].parameters()], [*run.model[2:].parameters()]]
        optimizers = [torch.optim.SGD(layers[0], lr=0.1, momentum=0.9), torch.optim.Adam(layers[1], lr=0.01)]
        return optimizers, [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in optimizers]

    plain = kit.Run()
    optimizers, schedulers = parts(plain)
    for batch in plain.batches[:5]:
        plain.backward(batch)
        for part in (*optimizers, *schedulers):
            part.step()
        plain.model.zero_grad()
    expected = kit.freeze([plain.model.state_dict(), *[part.state_dict() for part in (*optimizers, *schedulers)]])
    run = kit.Run()
    optimizers, schedulers = parts(run)
    governor = govern(run.model, optimizers, scheduler=schedulers)
    for batch in run.batches[:5]:
        run.step(governor, batch)
    assert kit.freeze([run.model.state_dict(), *[p.state_dict() for p in (*optimizers, *schedulers)]]) == expected
    assert governor.execute_rollback(to=governor.snapshot()).optimizer == "restored"


# ------------------------------------------------------------ closures


def lbfgs(params: Any) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(params, lr=0.5, max_iter=3, history_size=4)


def closure_of(run: Any, batch: Any) -> Callable[[], torch.Tensor]:
    def closure() -> torch.Tensor:
        run.optimizer.zero_grad()
        loss: torch.Tensor = run.backward(batch)
        return loss

    return closure


def test_lbfgs_equals_the_plain_loop(govern: Govern, kit: Any) -> None:
    plain, listening = kit.Run(optimizer=lbfgs), Listening()
    losses = [plain.optimizer.step(closure_of(plain, batch)).item() for batch in plain.batches[:4]]
    run = kit.Run(optimizer=lbfgs)
    governor = govern(run.model, run.optimizer, detector=listening.detector)
    for batch in run.batches[:4]:
        governor.step(loss=None, closure=closure_of(run, batch))
    assert kit.freeze(run.model.state_dict()) == kit.freeze(plain.model.state_dict())
    assert kit.freeze(run.optimizer.state_dict()["state"]) == kit.freeze(plain.optimizer.state_dict()["state"])
    assert [signs.loss for signs in listening.heard] == losses
    assert governor.statistics().stale_vetoes == 0


def test_a_closure_that_goes_wrong_is_rolled_back(govern: Govern, kit: Any) -> None:
    run = kit.Run(optimizer=lbfgs)
    governor = govern(run.model, run.optimizer)
    governor.step(loss=None, closure=closure_of(run, run.batches[0]))
    governor.snapshot()
    good = run.state(with_rng=False)
    result = governor.step(loss=None, closure=closure_of(run, kit.nan_batch(run.batches[1])))
    assert result.rolled_back
    assert run.state(with_rng=False) == good


# ------------------------------------------------------------ scaler


def make_scaler(**kwargs: Any) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", **kwargs)


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("user_unscales", [False, True])
def test_a_scaler_equals_the_plain_loop(clip: float | None, user_unscales: bool, govern: Govern, kit: Any) -> None:
    """From a scale that overflows: the first steps are skipped, and the schedule waits for the first that is not."""

    def overflows(run: Any) -> bool:
        return any(not bool(torch.isfinite(p.grad).all()) for p in run.model.parameters())

    plain, scaler = kit.Run(), make_scaler(init_scale=2.0**127, growth_interval=3)
    for batch in plain.batches[:12]:
        scaler.scale(plain.loss(batch) * 2).backward()
        skips = overflows(plain)
        if clip is not None:
            scaler.unscale_(plain.optimizer)
            torch.nn.utils.clip_grad_norm_(plain.model.parameters(), clip)
        scaler.step(plain.optimizer)
        scaler.update()
        if not skips:
            plain.scheduler.step()
        plain.optimizer.zero_grad()
    expected = (plain.state(), kit.freeze(scaler.state_dict()))

    run, scaler = kit.Run(), make_scaler(init_scale=2.0**127, growth_interval=3)
    governor = govern(run.model, run.optimizer, scheduler=run.scheduler, scaler=scaler)
    skipped = []
    for batch in run.batches[:12]:
        loss = run.loss(batch) * 2
        scaler.scale(loss).backward()
        if user_unscales:
            scaler.unscale_(run.optimizer)
        result = governor.step(loss=loss, clip=clip)
        skipped.append(result.skipped)
        assert not result.rolled_back
    assert (run.state(), kit.freeze(scaler.state_dict())) == expected
    assert 1 <= skipped.count(True) < 12
    assert governor.statistics().vetoes == 0
    assert governor.statistics().panics == 0


@pytest.mark.parametrize("other", [None, torch.float32, torch.float64], ids=str)
def test_gradients_of_complex_parameters_are_clipped_as_torch_does(other: torch.dtype | None, govern: Govern) -> None:
    """Alone and beside real ones."""

    def build() -> nn.ParameterList:
        torch.manual_seed(3)
        real = [] if other is None else [torch.randn(4, dtype=other)]
        return nn.ParameterList([torch.randn(3, dtype=torch.complex64), *real])

    def loss(model: nn.ParameterList) -> torch.Tensor:
        return torch.stack([parameter.abs().square().sum().double() for parameter in model]).sum()

    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        loss(model).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    expected = [parameter.tolist() for parameter in model]

    model = build()
    governor = govern(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(3):
        value = loss(model)
        value.backward()
        governor.step(loss=value, clip=0.5)
    assert [parameter.tolist() for parameter in model] == expected


def test_twenty_skips_in_a_row_are_a_panic(govern: Govern, kit: Any) -> None:
    run, scaler = kit.Run(batches=80), make_scaler(init_scale=1e4, backoff_factor=0.999)
    governor = govern(run.model, run.optimizer, scaler=scaler)
    governor.snapshot()
    good, scale = run.state(with_rng=False), scaler.get_scale()
    results = []
    for batch in run.batches[:45]:
        scaler.scale(run.loss(batch)).backward()
        for parameter in run.model.parameters():
            parameter.grad.fill_(float("inf"))
        results.append(governor.step(loss=1.0))
    panics = [number for number, result in enumerate(results, start=1) if result.rolled_back]
    assert panics == [20, 40]  # each needs twenty of its own
    assert {results[number - 1].verdict.reason for number in panics} == {"GradScaler skips every step"}
    assert all(result.skipped for result in results)
    governor.execute_rollback()
    assert (run.state(with_rng=False), scaler.get_scale()) == (good, scale)


def test_a_row_of_skips_that_nobody_answers_is_one_panic(govern: Govern, kit: Any) -> None:
    run, scaler = kit.Run(), make_scaler(init_scale=1e4, backoff_factor=0.999)
    governor = govern(run.model, run.optimizer, scaler=scaler, config=GovernorConfig(mode="observe"))
    healths = []
    for batch in run.batches[:30]:
        scaler.scale(run.loss(batch)).backward()
        for parameter in run.model.parameters():
            parameter.grad.fill_(float("inf"))
        healths.append(governor.step(loss=1.0).verdict.health)
    assert healths == [Health.HEALTHY] * 19 + [Health.PANIC] + [Health.SUSPECT] * 10
    assert governor.statistics().panics == 1


def test_twenty_vetoes_in_a_row_are_a_panic_also_where_they_are_kept(govern: Govern, kit: Any) -> None:
    run = kit.Run(batches=80)
    governor = govern(run.model, run.optimizer, config=GovernorConfig(on_veto="keep"))
    governor.snapshot()
    results = []
    for number, batch in enumerate(run.batches[:30], start=1):
        run.loss(batch).backward()
        if number != 5:  # a good one between them begins the count anew
            for parameter in run.model.parameters():
                parameter.grad.fill_(float("nan"))
        results.append(governor.step(loss=1.0))
    panics = [number for number, result in enumerate(results, start=1) if result.rolled_back]
    assert panics == [25]
    assert results[24].verdict.reason == "every step is vetoed"


def test_a_scaler_that_is_switched_off(govern: Govern, kit: Any) -> None:
    plain, run = kit.Run(), kit.Run()
    torch.manual_seed(4)
    for batch in plain.batches[:3]:
        plain.plain_step(batch)
    torch.manual_seed(4)
    governor = govern(run.model, run.optimizer, scheduler=run.scheduler, scaler=make_scaler(enabled=False))
    for batch in run.batches[:3]:
        run.step(governor, batch)
    assert run.state() == plain.state()
    governor.snapshot()
    run.backward(run.batches[3])
    poison_gradient(run)
    assert governor.step(loss=1.0).rolled_back  # its veto is ours again


# ------------------------------------------------------------ veto


def test_a_non_finite_gradient_never_reaches_the_weights(govern: Govern, kit: Any) -> None:
    """Seen from inside: no optimizer writes between the veto and the rollback."""
    run = kit.Run()
    governor = govern(run.model, run.optimizer, scheduler=run.scheduler)
    run.step(governor, run.batches[0])
    governor.snapshot()
    good = run.state()
    stepped: list[int] = []
    run.optimizer.register_step_pre_hook(lambda *_: stepped.append(1))
    run.backward(run.batches[1])
    poison_gradient(run)
    result = governor.step(loss=1.0)
    assert (result.skipped, result.rolled_back, stepped) == (True, True, [])
    assert result.verdict.reason == "non-finite gradients"
    assert run.state() == good  # BatchNorm, schedule and random state too
    assert governor.statistics().vetoes == 1


@pytest.mark.parametrize("loss", [1.0, float("nan")])
def test_a_veto_may_be_kept(loss: float, govern: Govern, kit: Any) -> None:
    run = kit.Run()
    governor = govern(
        run.model, run.optimizer, scheduler=run.scheduler, config=GovernorConfig(on_veto="keep", cadence=1)
    )
    governor.snapshot()
    for i in range(2):
        run.step(governor, run.batches[i])
    run.backward(run.batches[2])
    poison_gradient(run)
    before = run.state()
    result = governor.step(loss=loss)
    assert (result.skipped, result.rolled_back) == (True, False)
    assert not result.verdict.is_panic
    assert run.state() == before  # weights, moments, `step` counters and the schedule did not move
    assert all(parameter.grad is None for parameter in run.model.parameters())
    assert governor.statistics().vetoes == 1
    assert governor.statistics().rollbacks == 0
    run.step(governor, run.batches[3])
    assert run.state() != before


def test_a_veto_in_the_very_first_step(govern: Govern, kit: Any) -> None:
    run = kit.Run()
    governor = govern(run.model, run.optimizer)
    run.backward(run.batches[0])
    poison_gradient(run)
    before = run.state()
    result = governor.step(loss=1.0)
    assert (result.skipped, result.rolled_back) == (True, True)
    assert run.state() == before
    assert len(run.optimizer.state) == 0


# ------------------------------------------------------------ not now


def test_a_step_inside_a_section_is_refused_before_anything_is_done(govern: Govern, kit: Any) -> None:
    run = kit.Run()
    governor = govern(run.model, run.optimizer)
    run.backward(run.batches[0])
    before = run.state()
    with governor.using(), pytest.raises(PhaseError):
        governor.step(loss=1.0)
    assert run.state() == before
    assert all(parameter.grad is not None for parameter in run.model.parameters())


@pytest.mark.parametrize("on_veto", ["rollback", "keep"])
def test_a_scaler_does_not_hide_what_it_has_not_seen(on_veto: Any, govern: Govern, kit: Any) -> None:
    """Gradients that go wrong after they were unscaled; the next ones are unscaled again."""
    plain, scaler = kit.Run(), make_scaler(init_scale=256.0)
    run, guarded = kit.Run(), make_scaler(init_scale=256.0)
    governor = govern(run.model, run.optimizer, scaler=guarded, config=GovernorConfig(on_veto=on_veto))
    for one, its in ((plain, scaler), (run, guarded)):
        torch.manual_seed(4)
        for number, batch in enumerate(one.batches[:5]):
            if one is run and number == 3:
                governor.snapshot()
            loss = one.loss(batch)
            its.scale(loss).backward()
            its.unscale_(one.optimizer)
            if number == 3:
                poison_gradient(one)
            if one is run:
                result = governor.step(loss=loss)
                assert (result.skipped, result.rolled_back) == (number == 3, number == 3 and on_veto == "rollback")
            elif number != 3:
                its.step(one.optimizer)
                its.update()
            else:
                its._per_optimizer_states.clear()
            one.optimizer.zero_grad()
    parameters = [kit.freeze(list(one.model.parameters())) for one in (plain, run)]
    if on_veto == "keep":
        assert parameters[0] == parameters[1]
        assert kit.freeze(scaler.state_dict()) == kit.freeze(guarded.state_dict())
    assert all(bool(p.isfinite().all()) for p in run.model.parameters())
    assert governor.statistics().vetoes == 1


@pytest.mark.parametrize("first", [True, False])
def test_a_fused_sgd_whose_step_a_scaler_skips(first: bool, govern: Govern, kit: Any) -> None:
    """Torch leaves buffers behind that nobody has written, when it is the first step."""

    def make(params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.05, momentum=0.9, fused=True)

    bad = 0 if first else 2
    plain, run = kit.Run(optimizer=make), kit.Run(optimizer=make)
    torch.manual_seed(4)
    for number, batch in enumerate(plain.batches[:5]):
        plain.backward(batch)
        if number != bad:
            plain.optimizer.step()
        plain.optimizer.zero_grad()
    torch.manual_seed(4)
    scaler = make_scaler(init_scale=1.0, growth_interval=1000)
    governor = govern(run.model, run.optimizer, scaler=scaler)
    for number, batch in enumerate(run.batches[:5]):
        loss = run.loss(batch)
        scaler.scale(loss).backward()
        if number == bad:
            poison_gradient(run)
            scaler._scale.fill_(2.0)  # back to 1.0 after the skip
        governor.step(loss=loss)
        assert number != 0 or not first or not run.optimizer.state
    assert run.state() == plain.state()


def test_gradients_that_nobody_steps_are_none_of_a_scalers_business(govern: Govern, kit: Any) -> None:
    """They stay scaled, so they overflow where all others are finite."""
    run, scaler = kit.Run(), make_scaler(init_scale=256.0)
    optimizer = torch.optim.AdamW(run.model[0].parameters())
    governor = govern(run.model, optimizer, scaler=scaler)
    before = kit.freeze(run.model[0].weight)
    scaler.scale(run.loss(run.batches[0]).square()).backward()
    poison_gradient(run)
    assert not governor.step(loss=1.0).rolled_back
    assert kit.freeze(run.model[0].weight) != before
    assert governor.statistics().vetoes == 0


@pytest.mark.parametrize("protected", [True, False])
def test_an_overflow_that_two_devices_have_found_is_skipped(
    protected: bool, govern: Govern, kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`GradScaler` adds their flags up to 2, which torch's fused optimizers do not take for a flag."""
    unscale = torch.amp.GradScaler._unscale_grads_

    def on_two(self: Any, *args: Any) -> Any:
        [found] = unscale(self, *args).values()
        return {torch.device("cpu"): found, torch.device("cpu", 0): found.clone()}

    monkeypatch.setattr(torch.amp.GradScaler, "_unscale_grads_", on_two)
    if not protected:
        monkeypatch.setattr(veto, "predicated", lambda *_: contextlib.nullcontext())
    run = kit.Run(optimizer=lambda params: torch.optim.AdamW(params, lr=0.05, fused=True))
    scaler = make_scaler(init_scale=256.0)
    governor = govern(run.model, run.optimizer, scaler=scaler, config=GovernorConfig(check_weights_every=10))
    before = None
    for number, batch in enumerate(run.batches[:3]):
        loss = run.loss(batch)
        scaler.scale(loss).backward()
        if number == 2:
            poison_gradient(run)
            before = kit.freeze(list(run.model.parameters()))
        assert governor.step(loss=loss).skipped == (number == 2)
    assert (kit.freeze(list(run.model.parameters())) == before) == protected
    assert governor.statistics().vetoes == 0

"""Signs of every kind travel with their step: nothing waits, and what arrives is what a CPU run reads at once."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from tolaria import Detector, GovernorConfig, Health, TolariaGovernor, Verdict
from tolaria.follow import FollowingGovernor


def recorder(seen):
    def update(state, signs):
        seen.append(signs)
        return state, Verdict(Health.HEALTHY, signs.step)

    return Detector(lambda: 0, update)


def waits(machine):
    return sum(
        call.startswith(("cuEventSynchronize", "cuStreamSynchronize", "cuCtxSynchronize")) for call in machine.calls
    )


CONFIG = {"update_ratio_every": 1, "by_group": True, "cadence": 4, "probation": 2}


def steps(run, governor, count):
    """Losses by name, a norm of the caller's own, tensors and numbers as signs."""
    for number, batch in enumerate(run.batches[:count]):
        loss = run.backward(batch)
        norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), 0.5)
        governor.step(
            loss={"policy": loss, "value": 2.0 * loss.detach()},
            grad_norm=norm,
            approx_kl=torch.tensor(number / 8),
            entropy=torch.full((2,), 0.5, dtype=torch.bfloat16),
            explained_variance=0.25,
            seen=torch.tensor(2**40 + number),
        )
    governor.check_vital_signs(1.0, grad_norm=1.0)


def by_value(seen):
    return [
        (signs.loss, signs.grad_norm, signs.nonfinite_gradients, signs.nonfinite_weights, signs.extra) for signs in seen
    ]


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float32),
        (torch.complex64, torch.float32),
        (torch.complex128, torch.complex64),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float64),
    ],
    ids=str,
)
def test_gradients_of_any_type_are_clipped_as_torch_does(dtypes, late, govern):
    late.lag = 3
    draw = torch.Generator().manual_seed(5)
    model = nn.ParameterList([torch.randn(37, generator=draw).to(dtype) for dtype in dtypes])
    plain = copy.deepcopy(model)
    governor = govern(model, torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(3):
        loss = torch.stack([parameter.abs().square().sum().double() for parameter in model]).sum()
        loss.backward()
        governor.step(loss=loss, clip=0.5)
        torch.stack([parameter.abs().square().sum().double() for parameter in plain]).sum().backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    assert [parameter.tolist() for parameter in model] == [parameter.tolist() for parameter in plain]


@pytest.mark.parametrize("clip", [0.05, 1e6])
def test_gradients_of_two_optimizers_behind_a_scaler_are_clipped_as_torch_does(clip, late, govern):
    """Their parameters stand in another order than in the model; none of the steps overflows."""
    late.lag = 3
    draw = torch.Generator().manual_seed(5)
    model = nn.ParameterList([torch.randn(size, generator=draw) for size in (37, 5, 64, 11, 3)])

    def optimizers(of):
        second = torch.optim.Adam([of[4], of[2], of[0]], lr=0.1, fused=True)
        return [torch.optim.AdamW([of[3], of[1]], lr=0.1, fused=True), second]

    def loss_of(of):
        return torch.stack([parameter.square().sum() * number for number, parameter in enumerate(of, 1)]).sum()

    plain = copy.deepcopy(model)
    scaler, other = (torch.amp.GradScaler("cpu", init_scale=64.0) for _ in range(2))
    steps = optimizers(plain)
    governor = govern(model, [*optimizers(model)], scaler=scaler)
    for _ in range(4):
        loss = loss_of(model)
        scaler.scale(loss).backward()
        governor.step(loss=loss, clip=clip)
        other.scale(loss_of(plain)).backward()
        for each in steps:
            other.unscale_(each)
        torch.nn.utils.clip_grad_norm_(plain.parameters(), clip)
        for each in steps:
            other.step(each)
            each.zero_grad()
        other.update()
    assert [parameter.tolist() for parameter in model] == [parameter.tolist() for parameter in plain]


def test_signs_that_arrive_late_are_those_that_are_read_at_once(late, govern, make_run, monkeypatch):
    late.lag = 3
    seen: list = []
    run = make_run()
    governor = govern(run.model, run.optimizer, scheduler=run.scheduler, detector=recorder(seen), **CONFIG)
    steps(run, governor, 12)
    monkeypatch.undo()  # and now without that device
    at_once: list = []
    other = make_run()
    with TolariaGovernor(
        other.model,
        other.optimizer,
        scheduler=other.scheduler,
        detector=recorder(at_once),
        config=GovernorConfig(**CONFIG),
    ) as plain:
        assert plain.capabilities().barrier == "host"
        steps(other, plain, 12)
    assert len(seen) == 13
    for mine, theirs in zip(by_value(seen), by_value(at_once), strict=True):
        assert mine[:2] == pytest.approx(theirs[:2], rel=1e-6)
        assert mine[2:4] == theirs[2:4]
        assert mine[4] == pytest.approx(theirs[4], rel=1e-5)
    assert seen[3].extra["seen"] == 2**40 + 3  # brought to float64 before it meets 32-bit numbers
    assert {"loss/policy", "loss/value", "update_ratio", "update_ratio/0", "grad_norm/0", "entropy"} < set(
        seen[3].extra
    )


def test_nothing_waits_for_them(late, govern, make_run):
    late.lag = None
    run = make_run()
    governor = govern(run.model, run.optimizer, scheduler=run.scheduler, detector=recorder([]), **CONFIG)
    governor.snapshot()
    late.clear()
    for batch in run.batches[:12]:
        loss = run.backward(batch)
        governor.step(loss={"policy": loss, "value": 2.0 * loss.detach()}, approx_kl=loss.detach())
    assert waits(late) == 0
    late.clear()
    governor.check_vital_signs(1.0)
    assert waits(late) > 0  # the count counts


def test_a_framework_s_steps_wait_for_nothing_either(late, make_run):
    late.lag = None
    run, seen = make_run(), []
    config = GovernorConfig(host_slots=0, scrub_every=0, **CONFIG)
    with FollowingGovernor(run.model, run.optimizer, config=config, detector=recorder(seen)) as governor:
        governor.begin()
        late.clear()
        for batch in run.batches[:6]:
            loss = run.backward(batch)
            governor.gradients_ready(run.optimizer)
            run.optimizer.step()
            run.optimizer.zero_grad()
            governor.stepped(loss=loss)
        assert waits(late) == 0
        governor.is_trusted()
        assert [set(signs.extra) for signs in seen] == [{"update_ratio", "update_ratio/0", "grad_norm/0"}] * 6
        assert all(math.isfinite(value) and value > 0 for signs in seen for value in signs.extra.values())

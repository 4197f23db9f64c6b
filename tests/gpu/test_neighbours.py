"""Many governed models on one device: a panic in one changes no bit of the others, and with `streams` holds none up."""

import contextlib
import threading
from unittest import mock

import pytest
import torch
from torch import nn

from tolaria import GovernorConfig, TolariaGovernor, judge
from tolaria.cuda import ContextDevice
from tolaria.group import GovernorGroup

pytestmark = pytest.mark.cuda

MODELS, STEPS, EVERY = 8, 60, 20
OLD, NEW = 1.0, 2.0
BARRIERS = ["context", "streams"]


class Environment:
    """One small run that draws from a generator of its own, on a stream of its own."""

    def __init__(self, number, stream):
        self.stream = stream
        self.generator = torch.Generator(device="cuda").manual_seed(number)
        with torch.random.fork_rng(devices=[0]):
            torch.manual_seed(number)
            self.model = nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 8)).cuda()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)

    def train(self, governor, panics):
        """Without `watch`: nothing comes again, so all but the panicking one draw the same numbers in every run."""
        torch.cuda.set_device(0)
        with torch.cuda.stream(self.stream):
            for step in range(STEPS):
                x = torch.randn(64, 32, device="cuda", generator=self.generator)
                loss = (self.model(x) - x[:, :8]).square().mean()
                if panics and step % EVERY == EVERY - 1:
                    loss = loss * float("nan")
                loss.backward()
                governor.step(loss=loss)

    def bits(self):
        state = self.optimizer.state_dict()["state"]
        moments = [value for entry in state.values() for value in entry.values()]
        tensors = [*self.model.state_dict().values(), *moments]
        return [tensor.detach().cpu().clone().reshape(-1).view(torch.uint8) for tensor in tensors]


def trained(barrier, panicking):
    """The environments after all steps, and the rollbacks of each."""
    from tolaria.testing.gates import distinct_streams

    environments = [Environment(number, stream) for number, stream in enumerate(distinct_streams(MODELS))]
    torch.cuda.synchronize()
    with torch.random.fork_rng(devices=[0]), GovernorGroup(GovernorConfig(barrier=barrier, cadence=5)) as group:
        for one in environments:
            group.add(one.model, one.optimizer, generator=one.generator, streams=[one.stream])
        runs = [
            threading.Thread(target=one.train, args=(group[number], panicking and number == 0))
            for number, one in enumerate(environments)
        ]
        for run in runs:
            run.start()
        for run in runs:
            run.join()
        torch.cuda.synchronize()
        assert group[0].capabilities().barrier == barrier
        return [one.bits() for one in environments], [group[number].rollbacks for number in group]


@pytest.mark.parametrize("barrier", BARRIERS)
def test_seven_neighbours_of_a_model_that_panics_end_as_without_its_panics(barrier):
    with_panics, rollbacks = trained(barrier, panicking=True)
    without, none = trained(barrier, panicking=False)
    assert rollbacks[0] >= STEPS // EVERY - 1
    assert rollbacks[1:] == none[1:] == [0] * (MODELS - 1)
    for mine, other in zip(with_panics[1:], without[1:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))
    changed = [not torch.equal(a, b) for a, b in zip(with_panics[0], without[0], strict=True)]
    assert any(changed)  # what the first lost shows, so the comparison can fail


# ------------------------------------------------------------ who waits


class Picture:
    """A model of two parameters whose every element tells which step it is from."""

    def __init__(self, barrier, stream, elements=1 << 20):
        self.model = nn.ParameterList([nn.Parameter(torch.full((elements,), OLD, device="cuda")) for _ in range(2)])
        config = GovernorConfig(rng="keep", barrier=barrier)
        self.governor = TolariaGovernor(self.model, config=config, detector=judge.non_finite())
        self.stream = stream
        torch.cuda.synchronize()

    def write_gated(self, gate):
        with torch.no_grad(), self.governor.using(write=True, streams=[self.stream]), torch.cuda.stream(self.stream):
            self.model[0].fill_(NEW)
            gate.close(self.stream)
            self.model[1].fill_(NEW)

    def values(self):
        torch.cuda.synchronize()
        return [float(value) for parameter in self.model for value in parameter.detach().aminmax()]

    def warm_up(self, gate_class):
        self.governor.snapshot().wait("sealed")
        with gate_class() as gate:
            gate.open()
            self.write_gated(gate)
        self.governor.execute_rollback().wait()
        self.values()


def gets_through_beside_a_rollback(barrier):
    """Whether a neighbour's stream goes on while a rollback of this model waits for a step that is held back."""
    from tolaria.testing.gates import Gate, distinct_streams, gets_through

    mine, neighbour = distinct_streams(2)
    picture = Picture(barrier, mine)
    with picture.governor:
        picture.warm_up(Gate)
        assert gets_through(neighbour)
        with Gate(limit_s=20.0) as gate:
            picture.write_gated(gate)
            assert gets_through(neighbour)  # the control: it shares no hardware queue with what is held back
            report = picture.governor.execute_rollback()
            passed = gets_through(neighbour, limit_s=2.0)
            assert not gate.was_forced
            gate.open()
        report.wait()
        assert picture.values() == [OLD] * 4
    return passed


def test_with_streams_a_neighbour_goes_on_while_a_rollback_waits():
    assert gets_through_beside_a_rollback("streams")


def test_red_with_the_context_barrier_it_waits():
    assert not gets_through_beside_a_rollback("context")


def _of_nothing(self, stream):
    return self.stream_record()


@pytest.mark.parametrize("protected", [True, False])
def test_a_rollback_is_ordered_behind_held_steps_of_known_streams(protected):
    from tolaria.testing.gates import Gate, distinct_streams

    (mine,) = distinct_streams(1)
    picture = Picture("streams", mine)
    with picture.governor, contextlib.ExitStack() as stack:
        picture.warm_up(Gate)
        if not protected:
            stack.enter_context(mock.patch.object(ContextDevice, "known_record", _of_nothing))
        gate = stack.enter_context(Gate(limit_s=20.0))
        picture.write_gated(gate)
        picture.governor.execute_rollback()
        for device in picture.governor._keeper.devices.values():
            if not protected:
                device.synchronize()  # the copies are made before the step goes on
        gate.open()
        values = picture.values()
        assert not gate.was_forced
    assert (values == [OLD] * 4) is protected

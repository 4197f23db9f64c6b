"""Tags, turbulence and gates for threads: what they show on a CPU, and that they can fail."""

import threading

import pytest
import torch
from torch import nn

from tolaria import GovernorConfig, TolariaGovernor, judge
from tolaria.errors import InvalidConfig, QuiesceTimeout, UnsupportedState
from tolaria.testing.tags import Tags
from tolaria.testing.thread_gate import ThreadGate
from tolaria.testing.turbulence import Turbulence

pytestmark = pytest.mark.usefixtures("alone")

# ---------------------------------------------------------------- tags

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.complex64,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_tag_of_a_type_is_told_from_its_neighbours(dtype):
    tensor = torch.zeros(3, 5, dtype=dtype)
    tags = Tags(tensor)
    for tag in (1, 2, tags.most - 1, tags.most):
        tags.write(tag)
        assert tags.torn() is None
        assert float(tags.look().max()) == tag
        tensor[2, 4] = tags.after(tag)
        assert tags.torn() is not None
    assert tags.after(tags.most) == 1


def test_one_odd_element_anywhere_is_seen():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    tags = Tags(model)
    for name, tensor in tags.tensors.items():
        for element in range(tensor.numel()):
            tags.write(5)
            tensor.data.view(-1)[element] = 6
            torn = tags.torn()
            assert torn is not None
            assert torn.tensors[name] == ((5.0, 6.0) if tensor.numel() > 1 else (6.0, 6.0))


def test_two_whole_tensors_of_different_steps_are_torn():
    one, other = torch.zeros(3), torch.zeros(3)
    tags = Tags(one, other)
    other.fill_(2)
    assert str(tags.torn()) == "steps in one reading: tensor 0 1, tensor 1 2"


def test_models_and_optimizers_are_taken_as_they_are():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model.register_buffer("mask", torch.ones(4, dtype=torch.bool))
    model.tied = model[0]
    optimizer = torch.optim.Adam(model.parameters())
    model[0](torch.ones(2, 4)).sum().backward()
    optimizer.step()
    tags = Tags(model, optimizer)
    assert tags.left_out == ["mask"]
    assert len({id(tensor) for tensor in tags.tensors.values()}) == len(tags.tensors)
    assert sum(name.startswith("optimizer 1: exp_avg of") for name in tags.tensors) == 2
    tags.write(3)
    assert all(bool((value == 3).all()) for state in optimizer.state.values() for value in state.values())


def test_a_copy_is_judged_by_the_names_that_it_has():
    model = nn.Linear(4, 4)
    tags = Tags(model)
    copy = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tags.write(2)
    assert tags.torn(copy) is None
    copy["bias"][0] = 2
    assert tags.torn(copy) is not None
    with pytest.raises(UnsupportedState, match="same names"):
        tags.torn({"other": torch.zeros(1)})


@pytest.mark.parametrize("source", [torch.zeros(0), torch.zeros(3, dtype=torch.bool), object()])
def test_what_cannot_hold_a_tag_is_refused(source):
    with pytest.raises(UnsupportedState):
        Tags(source)


@pytest.mark.parametrize("sources", [[torch.zeros(6)], [torch.zeros(2), torch.zeros(2), torch.zeros(2)]])
def test_half_way_is_half_written(sources):
    tags, seen = Tags(*sources), []
    tags.write(2, halfway=lambda: seen.append(tags.torn()))
    assert len(seen) == 1
    assert seen[0] is not None
    assert tags.torn() is None


# ---------------------------------------------------------------- turbulence


def governed():
    model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16)).eval()
    return model, TolariaGovernor(model, config=GovernorConfig(rng="keep"), detector=judge.non_finite())


@pytest.mark.parametrize("registered", [True, False])
def test_a_snapshot_in_turbulence(registered):
    """Registered writers are kept out. The red twin: of others each snapshot meets one half-way."""
    model, governor = governed()
    section = governor.using if registered else None
    with governor:
        with Turbulence(model, section=section, work=lambda: model(torch.zeros(2, 16)), seed=3) as turbulence:
            for _ in range(3):
                info = turbulence.during(governor.snapshot)
                assert turbulence.during(lambda info=info: governor.execute_rollback(to=info)).success
        governor.execute_rollback(to=info)
        assert bool(turbulence.torn(model.state_dict())) == (not registered)
    found = turbulence.found
    assert min(found.writes, found.reads) > 0
    assert not (registered and found.torn)


def test_a_call_meets_a_writer_half_way_each_time():
    model = nn.Linear(8, 8)
    with Turbulence(model, groups=1, seed=1) as turbulence:
        copies = [turbulence.during(lambda: _copied(model)) for _ in range(5)]
    assert [len(turbulence.torn(copy)) for copy in copies] == [1] * 5


def test_readers_see_what_tears_the_live_state():
    model = nn.Linear(8, 8)
    with Turbulence(model, groups=1, threads=1, seed=1) as turbulence:
        while not turbulence.found.torn:  # each time it is written over by the next step, or looked at first
            with turbulence._groups[0].turn.lock, torch.no_grad():
                model.weight.view(-1)[0] = 77


def _copied(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_what_goes_wrong_in_a_worker_comes_out():
    def fail():
        raise ZeroDivisionError

    turbulence = Turbulence(nn.Linear(2, 2), work=fail).__enter__()
    for worker in turbulence._workers:
        worker.join()
    with pytest.raises(ZeroDivisionError):
        turbulence.__exit__(None)


def test_without_a_writer_nothing_is_called():
    with Turbulence(nn.Linear(2, 2), most=1) as turbulence:
        for worker in turbulence._workers:
            worker.join()
        with pytest.raises(QuiesceTimeout, match="0 of 3 workers"):
            turbulence.during(lambda: pytest.fail("called"))


def test_a_seed_fixes_what_a_worker_does():
    def written(seed):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        with Turbulence(model, threads=1, most=40, seed=seed) as turbulence:
            turbulence._workers[0].join()
        return [group.tag for group in turbulence._groups], turbulence.found

    assert written(4) == written(4)
    assert len({str(written(seed)) for seed in range(6)}) > 1


@pytest.mark.parametrize("settings", [{"threads": 0}, {"groups": 0}, {"most": 0}, {"streams": -1}])
def test_bad_settings_are_refused(settings):
    with pytest.raises(InvalidConfig, match=next(iter(settings))):
        Turbulence(nn.Linear(2, 2), **settings)


# ---------------------------------------------------------------- gates for threads


def test_a_thread_is_held_until_the_gate_is_open():
    done = []
    with ThreadGate() as gate:
        thread = threading.Thread(target=lambda: (gate.hold(), done.append(1)))
        thread.start()
        gate.wait_held()
        assert done == []
        gate.open()
        thread.join()
        assert done == [1]
        gate.hold()  # open: nobody is held any more
    assert not gate.was_forced


def test_whoever_calls_a_function_is_held_before_it():
    class Counter:
        count = 0

        def add(self):
            self.count += 1
            return self.count

    counter, answers = Counter(), []
    with ThreadGate() as gate:
        with gate.before(counter, "add", calls=1):
            thread = threading.Thread(target=lambda: answers.extend((counter.add(), counter.add())))
            thread.start()
            gate.wait_held()
            assert counter.count == 1
            gate.open()
            thread.join()
        assert answers == [1, 2]
        assert counter.add() == 3


def test_a_watchdog_opens_the_gate_and_says_so():
    with ThreadGate(limit_s=0.01) as gate:
        gate.hold()
        assert gate.was_forced
        with pytest.raises(QuiesceTimeout, match="expected 1 and closed"):
            gate.wait_held()

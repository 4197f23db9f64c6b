"""The parameters of a train state are found once, and found again when anything has come, gone or changed places."""

import copy

import pytest
import torch
from torch import nn

from tolaria.state.roster import Roster, find
from tolaria.state.train_state import TrainState


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(2, 3)
        self.rest = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.ModuleList([nn.Linear(3, 1, bias=False)]))
        self.register_parameter("mask", nn.Parameter(torch.full((2,), -torch.inf), requires_grad=False))


@pytest.fixture
def state():
    model = Small()
    return TrainState(model, [torch.optim.SGD(model.head.parameters(), lr=0.1)])


def ids(found):
    return [list(map(id, each)) for each in found]


def add_parameter(state):
    state.model.module.extra = nn.Parameter(torch.ones(1))


def replace_parameter(state):
    state.model.module.head.weight = nn.Parameter(torch.ones(3, 2))


def add_module(state):
    state.model.module.rest.append(nn.Linear(1, 1))


def replace_module(state):
    state.model.module.rest[0] = nn.Linear(3, 3)


def drop_module(state):
    state.model.module.rest[2] = nn.Identity()


def fill_an_empty_one(state):
    state.model.module.rest[1].scale = nn.Parameter(torch.ones(1))


def another_table(state):
    head = state.model.module.head
    head._parameters = {"weight": nn.Parameter(torch.ones(1)), "bias": None}


def another_group(state):
    state.optimizers[0].optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})


def another_member(state):
    state.optimizers[0].optimizer.param_groups[0]["params"][0] = nn.Parameter(torch.ones(2))


def another_list(state):
    group = state.optimizers[0].optimizer.param_groups[0]
    group["params"] = [*group["params"], nn.Parameter(torch.ones(2))]


def other_groups(state):
    optimizer = state.optimizers[0].optimizer
    optimizer.param_groups = [{**optimizer.param_groups[0], "params": [nn.Parameter(torch.ones(2))]}]


def rename_a_constant(state):
    """Under its new name it is a weight like any other."""
    parameters = state.model.module._parameters
    parameters["other"] = parameters.pop("mask")


def register(state):
    state.register("ema", nn.Linear(2, 2))


def another_constant(state):
    """Known from the next survey on."""
    state.model.module.late = nn.Parameter(torch.full((2,), torch.inf), requires_grad=False)
    state.roster()
    state.survey()


CHANGES = [
    add_parameter,
    replace_parameter,
    add_module,
    replace_module,
    drop_module,
    fill_an_empty_one,
    another_table,
    another_group,
    another_member,
    another_list,
    other_groups,
    rename_a_constant,
    register,
    another_constant,
]


@pytest.mark.parametrize("change", CHANGES)
def test_it_is_found_again_after_any_change(state, change):
    before = state.roster()
    assert ids(before) == ids(find(state.parts))
    assert state.roster() is before
    change(state)
    after = state.roster()
    assert ids(after) == ids(find(state.parts))
    assert ids(after) != ids(before)
    assert state.roster() is after


@pytest.mark.parametrize("change", CHANGES)
def test_without_the_comparison_it_would_be_the_old_one(state, change, monkeypatch):
    before = state.roster()
    monkeypatch.setattr(Roster, "stands", lambda *_: True)
    change(state)
    assert state.roster() is before
    assert ids(before) != ids(find(state.parts))


def test_masks_are_no_weights(state):
    everything, trained = state.roster()
    assert [p for p in everything if all(p is not q for q in trained)] == [state.model.module.mask]


def test_what_cannot_be_compared_is_walked_each_time():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden = [nn.Linear(1, 1)]

        def named_modules(self, *args, **kwargs):
            yield from super().named_modules(*args, **kwargs)
            yield "hidden", self.hidden[0]

    model = Own()
    state = TrainState(model)
    for _ in range(20):
        assert len(state.roster()[0]) == 2
    model.hidden[0] = nn.Linear(1, 1, bias=False)
    assert state.roster()[0] == [model.hidden[0].weight]


def test_lazy_modules_are_walked_until_their_first_batch():
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 1))
    state = TrainState(model)
    assert [len(each) for each in state.roster()] == [4, 2]
    model(torch.ones(1, 2))
    assert [len(each) for each in state.roster()] == [4, 4]
    assert state.roster() is state.roster()


def test_an_optimizer_around_another_is_walked():
    model = nn.Linear(1, 1)

    class Around(torch.optim.SGD):
        def __init__(self, inner):
            super().__init__(inner.param_groups[0]["params"], lr=0.1)
            self.inner = inner

    around = Around(torch.optim.SGD(model.parameters(), lr=0.1))
    state = TrainState(model, [around])
    assert len(state.roster()[0]) == 2
    other = copy.deepcopy(model)
    around.inner = torch.optim.SGD(other.parameters(), lr=0.1)
    assert len(state.roster()[0]) == 4


def test_an_optimizer_that_is_put_around_another_later_is_walked_from_then_on(state):
    before = state.roster()
    state.optimizers[0].optimizer.inner = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    assert ids(state.roster()) == ids(find(state.parts)) != ids(before)

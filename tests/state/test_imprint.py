"""The survey that is proven and not walked: it notices whatever a survey from the start would see, and only then walks.

Each change below is made between two snapshots. `walked` is the same survey with nothing known from before.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tolaria.errors import UnsupportedState
from tolaria.state import imprint, standing
from tolaria.state.leaves import Identity, Ref
from tolaria.state.structure import Blank, ModuleRecord
from tolaria.state.train_state import SurveyResult, TrainState


class Extra(nn.Module):
    """A layer with state of its own besides tensors, plain attributes of several kinds, and a cached tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("seen", torch.zeros(3), persistent=False)
        self.register_buffer("window", torch.zeros(8)[2:5])
        self.register_buffer("hollow", torch.zeros(8)[2:2])
        self.register_buffer("phase", torch.tensor([1j, 2j]))
        self.calls, self.names, self.table = 0, ["a", ["b"]], {"x": 1}
        self.activation = nn.functional.relu
        self.cached = torch.zeros(2)
        self.mixed = [1, [object()]]

    def get_extra_state(self) -> Any:
        return {"calls": self.calls}

    def set_extra_state(self, state: Any) -> None:
        self.calls = state["calls"]


class World:
    """A model, two optimizers, a scheduler and a scaler, all of them used once."""

    def __init__(self) -> None:
        self.model = nn.Sequential(
            OrderedDict(first=nn.Linear(3, 4), norm=nn.BatchNorm1d(4), extra=Extra(), last=nn.Linear(4, 2, bias=False))
        )
        self.model.register_buffer("none", None)
        self.tie = self.model.last.weight
        self.model.register_parameter("tied", self.tie)
        self.adam = torch.optim.AdamW(
            [
                {"params": list(self.model.first.parameters()), "betas": (0.8, 0.9)},
                {"params": list(self.model.norm.parameters()), "lr": torch.tensor(1e-3)},
            ],
            lr=1e-2,
            foreach=False,
        )
        self.sgd = torch.optim.SGD([self.model.extra.scale, self.tie], lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.sgd, 2)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        self.scaler.scale(torch.ones(()))
        for parameter in self.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        self.adam.step()
        self.sgd.step()
        for parameter in self.model.parameters():
            parameter.grad = None
        self.sgd.state[self.tie].update(mean=torch.zeros(2), note="n", history=[1, 2])
        self.state = TrainState(self.model, [self.adam, self.sgd], [self.scheduler], self.scaler)


def _replace_storage(world: World) -> None:
    """The same address in another storage: torch cannot tell it from `data_ptr`."""
    weight = world.model.first.weight
    memory = weight.data.numpy()
    weight.data = torch.from_numpy(memory)


def _swap(live: dict[Any, Any], one: Any, other: Any) -> None:
    live[one], live[other] = live[other], live[one]


def _drop(live: dict[Any, Any], key: Any) -> None:
    del live[key]


def _rename(live: dict[Any, Any], old: Any, new: Any) -> None:
    items = [(new if key == old else key, value) for key, value in live.items()]
    live.clear()
    live.update(items)


def _state_of(world: World) -> dict[str, Any]:
    return world.adam.state[world.model.first.weight]


CHANGES: dict[str, Callable[[World], Any]] = {
    "nothing": lambda w: None,
    "bytes": lambda w: w.model.first.weight.data.fill_(7.0),
    # tensors
    "other data": lambda w: setattr(w.model.first.weight, "data", torch.zeros(4, 3)),
    "another storage at the same address": _replace_storage,
    "other dtype": lambda w: setattr(w.model.norm.running_mean, "data", w.model.norm.running_mean.view(torch.int32)),
    "other shape": lambda w: setattr(w.model.first.weight, "data", w.model.first.weight.data.view(3, 4)),
    "other strides": lambda w: setattr(
        w.model.last.weight, "data", w.model.last.weight.data.as_strided((2, 4), (1, 2))
    ),
    "other offset": lambda w: setattr(w.model.norm.running_mean, "data", w.model.norm.running_mean.data[1:]),
    "a buffer shifted": lambda w: w.model.norm.running_mean.set_(w.model.norm.running_mean.untyped_storage(), 1, (3,)),
    "a window shifted": lambda w: w.model.extra.window.set_(w.model.extra.window.untyped_storage(), 3, (3,)),
    "an empty window shifted": lambda w: w.model.extra.hollow.set_(w.model.extra.hollow.untyped_storage(), 5, (0,)),
    "memory of an empty window freed and taken again": lambda w: [
        w.model.extra.hollow.untyped_storage().resize_(0),
        w.model.extra.hollow.untyped_storage().resize_(32),
    ],
    "conjugated": lambda w: setattr(w.model.extra.phase, "data", w.model.extra.phase.data.conj()),
    "negated": lambda w: setattr(w.model.extra.seen, "data", torch._neg_view(w.model.extra.seen.data)),
    "storage grown": lambda w: w.model.norm.running_mean.untyped_storage().resize_(1 << 16),
    "storage shrunk": lambda w: w.model.norm.running_var.untyped_storage().resize_(4),
    "storage freed and taken again": lambda w: [
        w.model.norm.running_var.untyped_storage().resize_(0),
        w.model.norm.running_var.untyped_storage().resize_(16),
    ],
    "flag": lambda w: w.model.first.weight.requires_grad_(False),
    "class of a tensor": lambda w: setattr(w.model.norm.running_mean, "__class__", nn.Buffer),
    "swapped contents": lambda w: torch.utils.swap_tensors(w.model.norm.running_mean, w.model.norm.running_var),
    # modules
    "parameter replaced": lambda w: setattr(w.model.first, "weight", nn.Parameter(torch.zeros(4, 3))),
    "parameter added": lambda w: w.model.first.register_parameter("more", nn.Parameter(torch.zeros(2))),
    "parameter removed": lambda w: _drop(w.model.first._parameters, "bias"),
    "parameter set to None": lambda w: setattr(w.model.first, "bias", None),
    "parameter renamed": lambda w: _rename(w.model.first._parameters, "bias", "offset"),
    "parameters change places": lambda w: _swap(w.model.norm._parameters, "weight", "bias"),
    "tie cut": lambda w: setattr(w.model, "tied", nn.Parameter(w.tie.detach().clone())),
    "table replaced by an equal one": lambda w: setattr(w.model.first, "_parameters", dict(w.model.first._parameters)),
    "table of another kind": lambda w: setattr(
        w.model.first, "_parameters", defaultdict(list, w.model.first._parameters)
    ),
    "buffer replaced": lambda w: setattr(w.model.norm, "running_mean", torch.zeros(4)),
    "buffer filled in": lambda w: setattr(w.model, "none", torch.zeros(1)),
    "buffer becomes persistent": lambda w: w.model.extra._non_persistent_buffers_set.clear(),
    "buffer is no longer": lambda w: w.model.norm._non_persistent_buffers_set.add("running_mean"),
    "layer replaced": lambda w: setattr(w.model, "first", nn.Linear(3, 4)),
    "layer added": lambda w: w.model.add_module("more", nn.Linear(2, 2)),
    "layer removed": lambda w: _drop(w.model._modules, "norm"),
    "layers change places": lambda w: _swap(w.model._modules, "first", "last"),
    "layer in two places": lambda w: w.model.add_module("again", w.model.first),
    "class of a layer": lambda w: setattr(w.model.first, "__class__", nn.Bilinear),
    "attributes of a layer replaced as a whole": lambda w: setattr(
        w.model.extra, "__dict__", dict(vars(w.model.extra))
    ),
    "parametrization": lambda w: nn.utils.parametrizations.weight_norm(w.model.last),
    # values of modules
    "counter": lambda w: setattr(w.model.extra, "calls", w.model.extra.calls + 1),
    "an equal value of another type": lambda w: setattr(w.model.extra, "calls", False),
    "list changed inside": lambda w: w.model.extra.names[1].append("c"),
    "dict changed inside": lambda w: w.model.extra.table.update(x=2),
    "list becomes plain": lambda w: w.model.extra.mixed[1].clear(),
    "list replaced": lambda w: setattr(w.model.extra, "names", ["z"]),
    "attribute added": lambda w: setattr(w.model.first, "note", 5),
    "attribute removed": lambda w: delattr(w.model.extra, "table"),
    "attribute renamed": lambda w: _rename(vars(w.model.extra), "calls", "counts"),
    "function replaced": lambda w: setattr(w.model.extra, "activation", nn.functional.gelu),
    "method replaced": lambda w: setattr(w.model.first, "forward", lambda x: x),
    "hook added": lambda w: w.model.first.register_forward_hook(lambda *_: None),
    "evaluation": lambda w: w.model.eval(),
    # optimizers
    "learning rate": lambda w: w.sgd.param_groups[0].update(lr=0.05),
    "learning rate filled": lambda w: w.adam.param_groups[1]["lr"].fill_(0.5),
    "learning rate becomes a tensor": lambda w: w.sgd.param_groups[0].update(lr=torch.tensor(0.05)),
    "learning rate becomes a number": lambda w: w.adam.param_groups[1].update(lr=0.05),
    "option becomes a list with a tensor": lambda w: w.sgd.param_groups[0].update(betas=[torch.zeros(1)]),
    "option added": lambda w: w.sgd.param_groups[0].update(cooled=True),
    "option removed": lambda w: w.adam.param_groups[0].pop("maximize"),
    "betas": lambda w: w.adam.param_groups[0].update(betas=(0.7, 0.9)),
    "group added": lambda w: w.sgd.add_param_group({"params": [nn.Parameter(torch.zeros(1))]}),
    "groups change places": lambda w: w.adam.param_groups.reverse(),
    "group replaced by an equal one": lambda w: w.sgd.param_groups.__setitem__(0, dict(w.sgd.param_groups[0])),
    "list of groups replaced": lambda w: setattr(w.sgd, "param_groups", list(w.sgd.param_groups)),
    "member replaced": lambda w: w.sgd.param_groups[0]["params"].__setitem__(0, nn.Parameter(torch.zeros(3))),
    "members change places": lambda w: w.sgd.param_groups[0]["params"].reverse(),
    "list of members replaced": lambda w: w.sgd.param_groups[0].update(params=list(w.sgd.param_groups[0]["params"])),
    "state created": lambda w: w.sgd.state[w.model.extra.scale].update(momentum_buffer=torch.zeros(3)),
    "number becomes a tensor": lambda w: w.sgd.state[w.tie].update(note=torch.zeros(2)),
    "tensor becomes a number": lambda w: w.sgd.state[w.tie].update(mean=None),
    "list in a state": lambda w: w.sgd.state[w.tie]["history"].append(3),
    "tensor in a list of a state": lambda w: w.sgd.state[w.tie]["history"].append(torch.zeros(1)),
    "number in a state": lambda w: w.sgd.state[w.tie].update(note="m"),
    "state tensor replaced": lambda w: _state_of(w).update(exp_avg=torch.zeros(4, 3)),
    "state tensor given other data": lambda w: setattr(_state_of(w)["exp_avg"], "data", torch.zeros(4, 3)),
    "step becomes another kind": lambda w: _state_of(w).update(step=_state_of(w)["step"].double()),
    "state tensors change places": lambda w: _swap(_state_of(w), "exp_avg", "exp_avg_sq"),
    "state key renamed": lambda w: _rename(_state_of(w), "exp_avg", "mean"),
    "state of a parameter dropped": lambda w: _drop(w.adam.state, w.model.first.weight),
    "state of a parameter replaced": lambda w: w.adam.state.__setitem__(w.model.first.weight, dict(_state_of(w))),
    "state is no dict": lambda w: w.adam.state.__setitem__(w.model.first.weight, [1]),
    "state replaced as a whole": lambda w: setattr(w.adam, "state", defaultdict(dict, w.adam.state)),
    "optimizer attribute": lambda w: setattr(w.sgd, "budget", 3),
    "optimizer tensor attribute": lambda w: setattr(w.sgd, "estimate", torch.zeros(2)),
    "optimizer inside": lambda w: setattr(w.sgd, "inner", torch.optim.SGD([w.tie], lr=0.1)),
    # the rest
    "scale replaced": lambda w: setattr(w.scaler, "_scale", torch.ones(())),
    "scale gone": lambda w: setattr(w.scaler, "_scale", None),
    "scaler's attributes replaced as a whole": lambda w: (
        setattr(w.scaler, "__dict__", dict(vars(w.scaler))),
        w.scaler.set_growth_factor(5.0),
    ),
    "growth": lambda w: w.scaler.set_growth_factor(3.0),
    "scheduler": lambda w: w.scheduler.step(),
    "registered": lambda w: w.state.register("ema", nn.Linear(2, 2)),
}
DO_NOT_MOVE = {
    "nothing", "bytes", "buffer becomes persistent", "buffer is no longer", "counter", "an equal value of another type",
    "list changed inside", "dict changed inside", "list becomes plain", "list replaced", "attribute added",
    "attribute removed", "attribute renamed", "function replaced", "method replaced", "hook added", "evaluation",
    "learning rate", "learning rate filled", "betas", "list in a state", "number in a state", "optimizer attribute",
    "growth", "scheduler", "scaler's attributes replaced as a whole",
}  # fmt: skip


NOT_TOLD = {
    "class of a tensor", "table replaced by an equal one", "table of another kind",
    "attributes of a layer replaced as a whole", "state of a parameter replaced", "state replaced as a whole",
}  # fmt: skip
"""Surveys do not tell of these. An imprint has to notice them, because it looks into the containers that it knows."""
HOST_VALUES = {"tensor in a list of a state", "optimizer tensor attribute"}
"""No tensor of the former survey has moved: a rollback takes these away like any other value."""
RESTORED = HOST_VALUES | {
    "learning rate", "betas", "list in a state", "number in a state", "optimizer attribute", "growth",
    "scaler's attributes replaced as a whole",
}  # fmt: skip
OF_TENSORS = tuple(CHANGES)[: 1 + tuple(CHANGES).index("swapped contents")]


def walked(state: TrainState) -> SurveyResult:
    """A survey from the start, that leaves the state's own imprint alone."""
    known = state._imprint, state._last_survey
    state.forget_survey()
    try:
        return state.survey()
    finally:
        state._imprint, state._last_survey = known


def told(survey: SurveyResult) -> Any:
    """Everything that a survey says, with objects by their identity."""
    leaves = survey.leaves
    return (
        [(leaf.name, id(leaf.tensor), leaf.storage, leaf.geometry, leaf.bits, leaf.trained) for leaf in leaves.leaves],
        [
            (each.key, each.bytes.untyped_storage()._cdata, each.has_buffers, each.dtype, each.trained)
            for each in leaves.storages
        ],
        [_plain(saved) for saved in survey.saved],
    )


def _plain(tree: Any) -> Any:
    if isinstance(tree, Identity):
        return "object", _identity(tree.value)
    if isinstance(tree, ModuleRecord):
        return {name: _plain(getattr(tree, name)) for name in ModuleRecord.__slots__ if name != "laziness"}
    if isinstance(tree, (nn.Module, torch.Tensor, Blank)):
        return "object", id(tree)
    if isinstance(tree, dict):
        return "dict", [(_plain(key), _plain(value)) for key, value in tree.items()]
    if isinstance(tree, (list, tuple)):
        return type(tree).__name__, [_plain(item) for item in tree]
    if isinstance(tree, set):
        return "set", sorted(map(repr, tree))
    if isinstance(tree, Ref):
        return tree
    return (type(tree).__name__, id(tree)) if callable(tree) else (type(tree).__name__, repr(tree))


def _identity(value: Any) -> int:
    return id(value)


@pytest.mark.parametrize("change", OF_TENSORS)
def test_tensors_are_compared_without_torch_s_guards_as_well(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert imprint._guards() is not None, "or only this way would be tested"
    monkeypatch.setattr(imprint, "_guards", lambda: None)
    test_whatever_changes_is_seen_as_by_a_survey_from_the_start(change)


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_is_seen_as_by_a_survey_from_the_start(change: str) -> None:
    world = World()
    before = world.state.survey()
    assert world.state.survey().leaves is before.leaves
    known = told(before)
    CHANGES[change](world)
    expected = walked(world.state)
    for _ in range(2):  # the second one is made with what the first has noted
        assert told(world.state.survey()) == told(expected)
    assert (world.state.survey().leaves is before.leaves) == (change in DO_NOT_MOVE)
    assert told(before) == known, "an earlier snapshot must keep what it was told"


@pytest.mark.parametrize("change", sorted(set(CHANGES) - DO_NOT_MOVE - NOT_TOLD - HOST_VALUES - {"registered"}))
def test_an_imprint_that_believes_without_comparing_misses_it(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The red twin: with every comparison answered by yes, the survey tells of what was."""
    world = World()
    world.state.survey()
    CHANGES[change](world)
    expected = told(walked(world.state))
    for kind in (standing.ModuleImprint, standing.OptimizerImprint, standing.ScalerImprint, imprint.Whereabouts):
        monkeypatch.setattr(kind, "stands", lambda self: True)
    assert told(world.state.survey()) != expected


@pytest.mark.parametrize("change", CHANGES)
def test_a_rollback_believes_nothing_either(change: str) -> None:
    """`check` answers that everything stands only where a survey would meet the very same tensors and modules."""
    world = World()
    survey = world.state.survey()
    assert world.state.check(survey, "testing") is True
    CHANGES[change](world)
    try:
        stands = world.state.check(survey, "testing")
    except Exception:
        stands = False
    assert stands == (change in DO_NOT_MOVE | HOST_VALUES)


@pytest.mark.parametrize("change", sorted(DO_NOT_MOVE | HOST_VALUES))
def test_a_rollback_of_what_stands_puts_every_host_value_back(change: str) -> None:
    world = World()
    state = world.state
    survey, host = state.survey(), state.capture([torch.device("cpu")], with_rng=True, journal=None)
    optimizers = told(survey)[2][1:]
    CHANGES[change](world)
    world.model.first.weight.grad = torch.ones(4, 3)
    assert (told(walked(state))[2][1:] != optimizers) == (change in RESTORED)
    for _ in range(2):
        state.restore(survey, host, [torch.device("cpu")], standing=state.check(survey, "testing"))
        assert told(walked(state))[2][1:] == optimizers
        assert world.model.first.weight.grad is None
        for each in survey.saved[0][0]:
            assert each.module._non_persistent_buffers_set == each.transient
        assert world.scheduler.state_dict() == host.captured[3]


@settings(max_examples=40)
@given(st.lists(st.sampled_from(sorted(set(CHANGES) - {"registered"})), min_size=1, max_size=6))
def test_any_sequence_of_changes(names: list[str]) -> None:
    world = World()
    world.state.survey()
    for name in names:
        try:
            CHANGES[name](world)
        except (KeyError, RuntimeError, AttributeError, ValueError, TypeError):
            continue  # what it changes is no longer there
        try:
            expected = told(walked(world.state))
        except Exception as refused:
            with pytest.raises(type(refused)):
                world.state.survey()
        else:
            assert told(world.state.survey()) == expected


def test_a_state_that_stands_is_not_walked(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    first = world.state.survey()
    for part in world.state.parts:
        monkeypatch.setattr(part, "survey", lambda leaves: pytest.fail("was walked"))
    world.sgd.param_groups[0]["lr"] = 0.25
    assert world.state.survey().leaves is first.leaves


def test_gradients_are_surveyed_and_leave_the_imprint_alone() -> None:
    world = World()
    first = world.state.survey()
    world.model.first.weight.grad = torch.ones(4, 3)
    assert len(world.state.survey(gradients=True).gradients) == 1
    assert world.state.survey().leaves is first.leaves


@pytest.mark.parametrize("removed", [False, True])
def test_extra_state_is_captured_of_the_modules_that_an_imprint_knows(removed: bool) -> None:
    """Also after a survey that took none, because of gradients, has met others."""
    world = World()
    if removed:
        world.model.add_module("more", Extra())
    before = world.state.survey()
    more = world.model._modules.pop("more") if removed else Extra()
    if not removed:
        world.model.add_module("more", more)
    world.state.survey(gradients=True)
    if removed:
        world.model.add_module("more", more)
    else:
        del world.model._modules["more"]
    survey, host = world.state.survey(), world.state.capture([], with_rng=False, journal=None)
    assert survey.leaves is before.leaves
    world.model.extra.calls = 7
    world.state.restore(survey, host, [], standing=world.state.check(survey, "testing"))
    assert world.model.extra.calls == 0


def test_a_survey_that_is_refused_leaves_no_imprint_that_knows_half() -> None:
    world = World()
    group = world.sgd.param_groups[0]
    group["note"] = None
    world.state.survey()
    group.update(lr=0.5, note=[torch.zeros(2).to_sparse()])
    with pytest.raises(UnsupportedState):
        world.state.survey()
    group["note"] = None
    assert told(world.state.survey()) == told(walked(world.state))


def test_modules_that_only_a_method_of_their_own_tells_of_are_walked() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [nn.Linear(2, 2)]

        def named_modules(self, memo: Any = None, prefix: str = "", remove_duplicate: bool = True) -> Any:
            yield from super().named_modules(memo, prefix, remove_duplicate)
            for i, layer in enumerate(self.layers):
                yield from layer.named_modules(memo, f"{prefix}.{i}", remove_duplicate)

    model = Hidden()
    state = TrainState(nn.Sequential(model))
    state.survey()
    model.layers.append(nn.Linear(2, 2))
    assert len(state.survey().leaves.leaves) == 4


@pytest.mark.parametrize("lazily", [torch.conj, torch._neg_view])
@pytest.mark.parametrize("before", [False, True])
def test_bytes_that_are_taken_otherwise_are_taken_as_before(lazily: Callable[..., torch.Tensor], before: bool) -> None:
    model, values = nn.Module(), torch.tensor([1j, 2j])
    model.register_buffer("phase", lazily(values) if before else values)
    held = model.get_buffer("phase").resolve_conj().resolve_neg().clone()
    state = TrainState(model)
    survey, host = state.survey(), state.capture([], with_rng=False, journal=None)
    model.phase.data = lazily(model.phase.data)
    state.restore(survey, host, [], standing=state.check(survey, "testing"))
    assert torch.equal(model.get_buffer("phase").resolve_conj().resolve_neg(), held)


def test_a_forgotten_survey_holds_nothing() -> None:
    world = World()
    world.state.survey()
    world.state.forget_survey()
    assert world.state._imprint is None


def test_guards_that_notice_too_little_are_not_used() -> None:
    assert not imprint._notices(lambda tensors: lambda *_: True)
    assert not imprint._notices(lambda tensors: lambda *_: False)
    assert not imprint._notices(lambda tensors: lambda *now: [t.shape for t in now] == [t.shape for t in tensors])


def test_many_tensors_are_compared_to_the_last() -> None:
    """They are compared block by block."""
    model = nn.ParameterList([nn.Parameter(torch.zeros(2)) for _ in range(3 * imprint._BLOCK + 1)])
    state = TrainState(model)
    first = state.survey()
    assert state.survey().leaves is first.leaves
    for index in (0, imprint._BLOCK - 1, imprint._BLOCK, len(model) - 1):
        known = state.survey().leaves
        model[index].data = torch.zeros(2)
        assert state.survey().leaves is not known


def test_no_imprint_is_taken_of_what_moves_each_time() -> None:
    """But for a few in sixteen, so that a state that comes to rest is found to stand."""
    model = nn.Linear(2, 2)
    state = TrainState(model)
    taken = []
    for _ in range(48):
        model.weight.data = torch.zeros(2, 2)
        state.survey()
        taken.append(state._imprint is not None)
    assert taken[0]
    assert sum(taken) < 16
    assert any(taken[24:])
    for _ in range(20):
        state.survey()
    known = state.survey().leaves
    assert state.survey().leaves is known


def test_the_size_of_a_storage_counts_where_its_address_stays() -> None:
    """Some allocators grow memory in place."""
    state = TrainState(nn.Linear(2, 2))
    state.survey()
    assert state._imprint is not None
    memory = state._imprint._whereabouts._blocks[0]._memory
    there, device, size = memory[0].data_ptr(), memory[0].device, memory[0].nbytes()
    for found, stands in ((size, True), (size - 4, False), (size + 4, False)):
        memory[0] = torch._C._construct_storage_from_data_pointer(there, device, found)
        assert state._imprint.stands() == stands


def test_a_survey_in_between_does_not_lend_its_imprint_to_a_rollback() -> None:
    """As a digest takes one, from any thread: a rollback that has found its own imprint standing restores by that."""
    model = nn.Linear(2, 2)
    state = TrainState(model)
    taken = state.survey()
    host = state.capture((), with_rng=False, journal=None)
    assert state.check(taken, "rolling back")
    spare = nn.Parameter(torch.zeros(2))
    model.bias, bias = spare, model.bias
    other = state.survey()
    assert other.leaves is not taken.leaves
    state.restore(taken, host, (), standing=True)
    assert model.bias is bias

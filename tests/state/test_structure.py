"""Rollbacks across added, removed and replaced layers, parameters and groups: exact, or refused before any write."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import tolaria
from tolaria import TolariaGovernor
from tolaria.state.structure import ModuleRecord

Govern = Callable[..., TolariaGovernor]
Freeze = Callable[..., Any]
Change = Callable[[nn.Sequential, torch.optim.Optimizer], object]


class LowRank(nn.Module):
    """An adapter: a frozen layer and a low-rank term beside it."""

    def __init__(self, base: nn.Linear, rank: int = 1) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, base.in_features))
        self.up = nn.Parameter(torch.randn(base.out_features, rank) * 0.1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.base(inputs) + inputs @ self.down.T @ self.up.T

    def merged(self) -> nn.Linear:
        with torch.no_grad():
            self.base.weight.add_(self.up @ self.down)
        return self.base.requires_grad_(True)


def _world() -> tuple[nn.Sequential, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    groups = [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters()), "weight_decay": 0.1}]
    return model, torch.optim.AdamW(groups, lr=0.01)


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        model(torch.randn(4, 3, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        model.zero_grad()


def _look(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """Every object in every place, by identity and address, and what else decides what the model computes."""
    modules = list(model.named_modules(remove_duplicate=False))
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return (
        [(name, id(module), type(module), str(module)) for name, module in modules],
        [(name, list(m._modules), list(m._parameters), list(m._buffers)) for name, m in modules],
        [(name, id(t), t.data_ptr(), t.requires_grad, t.grad is None) for name, t in tensors],
        [(id(group), list(map(id, group["params"]))) for group in optimizer.param_groups],
        [(id(key), [id(value) for value in values.values()]) for key, values in optimizer.state.items()],
    )


# ---------------------------------------------------------------- exact


def _grow(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    model.append(nn.Linear(3, 3))
    optimizer.add_param_group({"params": model[3].parameters(), "lr": 0.5})


def _shrink(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    del model[2], optimizer.param_groups[1]


def _insert(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    model.insert(1, nn.Linear(3, 3))
    optimizer.param_groups[0]["params"].extend(model[1].parameters())


def _replace_layer(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    model[2] = nn.Linear(3, 3)
    optimizer.param_groups[1]["params"] = list(model[2].parameters())


def _replace_parameter(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    model[0].weight = nn.Parameter(torch.zeros(3, 3))
    optimizer.param_groups[0]["params"][0] = model[0].weight


def _widen(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    """Net2Net: the same modules with larger parameters, and the numbers that say so."""
    first, norm, last = model
    first.weight, first.bias = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.zeros(5))
    norm.weight, norm.bias = nn.Parameter(torch.ones(5)), nn.Parameter(torch.zeros(5))
    norm.running_mean, norm.running_var = torch.zeros(5), torch.ones(5)
    last.weight = nn.Parameter(torch.randn(3, 5))
    first.out_features = norm.num_features = last.in_features = 5
    optimizer.param_groups[0]["params"] = list(first.parameters())
    optimizer.param_groups[1]["params"] = list(last.parameters())


def _remove_bias(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    del optimizer.param_groups[0]["params"][1]
    model[0].bias = None


def _delete_bias(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    """The name is gone, not only its value; an optimizer that kept the parameter is left alone."""
    model[0].register_parameter("spare", model[0]._parameters.pop("bias"))
    model[0].register_parameter("bias", None)
    optimizer.param_groups.reverse()


def _swap(model: nn.Sequential, _: torch.optim.Optimizer) -> None:
    model[0], model[2] = model[2], model[0]


def _move_between_groups(_: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    first, second = (group["params"] for group in optimizer.param_groups)
    second.insert(0, first.pop())


def _reverse_group(_: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0]["params"].reverse()


def _adapt(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    for index in (0, 2):
        model[index] = LowRank(model[index])
    optimizer.param_groups.clear()
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer.add_param_group({"params": adapters})


def _parametrize(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    parametrizations.weight_norm(model[0])
    optimizer.param_groups[0]["params"] = list(model[0].parameters())


CHANGES: dict[str, Change] = {
    "layer added": _grow,
    "layer removed": _shrink,
    "layer inserted": _insert,
    "layer replaced": _replace_layer,
    "layers swapped": _swap,
    "widened": _widen,
    "parameter replaced": _replace_parameter,
    "parameter removed": _remove_bias,
    "parameter renamed": _delete_bias,
    "parameter in another group": _move_between_groups,
    "group reordered": _reverse_group,
    "adapters attached": _adapt,
    "parametrization attached": _parametrize,
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_structure_is_taken_back(name: str, govern: Govern, freeze: Freeze) -> None:
    """Same objects, same addresses, same bytes; and the run that goes on from there is the undisturbed one."""
    model, optimizer = _world()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    governor = govern(model, optimizer, scheduler=scheduler)
    _train(model, optimizer)
    governor.snapshot()
    before, seen, digest = freeze(model, optimizer, scheduler), _look(model, optimizer), governor.digest()
    _train(model, optimizer, seed=1)
    reference = freeze(model, optimizer)
    for _ in range(2):
        CHANGES[name](model, optimizer)
        assert _look(model, optimizer) != seen, "the change changed nothing"
        _train(model, optimizer, seed=2)
        scheduler.step()
        model(torch.randn(4, 3)).sum().backward()  # gradients on both sides of the change
        governor.execute_rollback()
        assert freeze(model, optimizer, scheduler) == before
        assert _look(model, optimizer) == seen
        assert governor.digest() == digest
        _train(model, optimizer, seed=1)
        assert freeze(model, optimizer) == reference
        governor.execute_rollback()


@pytest.mark.parametrize("name", CHANGES)
def test_without_the_module_records_the_change_stays(
    name: str, govern: Govern, freeze: Freeze, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red twin: bytes, optimizer and buffers alone do not bring the model back."""
    monkeypatch.setattr(ModuleRecord, "restore", lambda *_: None)
    monkeypatch.setattr(ModuleRecord, "restore_rest", lambda *_: None)
    model, optimizer = _world()
    governor = govern(model, optimizer)
    governor.snapshot()
    seen = _look(model, optimizer)
    CHANGES[name](model, optimizer)
    governor.execute_rollback()
    in_the_optimizer_only = name in ("parameter in another group", "group reordered")
    assert (_look(model, optimizer) == seen) == in_the_optimizer_only


@pytest.mark.parametrize("verify", [None, "before"])
def test_adapters_attached_trained_and_removed(verify: Any, govern: Govern, freeze: Freeze) -> None:
    """Snapshots on every side of an adapter's life; each is gone back to from the end."""
    model, optimizer = _world()
    governor = govern(model, optimizer, slots=4)
    _train(model, optimizer)
    stages = [(governor.snapshot(), freeze(model, optimizer), _look(model, optimizer))]
    _adapt(model, optimizer)
    stages.append((governor.snapshot(), freeze(model, optimizer), _look(model, optimizer)))
    _train(model, optimizer)
    stages.append((governor.snapshot(), freeze(model, optimizer), _look(model, optimizer)))
    for index in (0, 2):
        model[index] = model[index].merged()
    optimizer.param_groups[0]["params"] = [*model.parameters()]
    assert not any("down" in name for name, _ in model.named_parameters())
    _train(model, optimizer)
    for info, frozen, seen in reversed(stages):
        governor.execute_rollback(to=info, verify=verify)
        assert freeze(model, optimizer) == frozen
        assert _look(model, optimizer) == seen


def test_a_parametrization_removed_since_comes_back(govern: Govern, freeze: Freeze) -> None:
    model, optimizer = _world()
    _parametrize(model, optimizer)
    governor = govern(model, optimizer)
    _train(model, optimizer)
    governor.snapshot()
    before, seen, weight = freeze(model, optimizer), _look(model, optimizer), model[0].weight.detach().clone()
    _train(model, optimizer)
    parametrize.remove_parametrizations(model[0], "weight")
    assert type(model[0]) is nn.Linear
    optimizer.param_groups[0]["params"] = list(model[0].parameters())
    _train(model, optimizer)
    governor.execute_rollback()
    assert freeze(model, optimizer) == before
    assert _look(model, optimizer) == seen
    assert torch.equal(model[0].weight, weight)


def test_a_second_parametrization_of_one_module_is_taken_off(govern: Govern, freeze: Freeze) -> None:
    model, optimizer = _world()
    _parametrize(model, optimizer)
    governor = govern(model, optimizer)
    governor.snapshot()
    bias = model[0].bias
    parametrizations.weight_norm(model[0], "bias")
    governor.execute_rollback()
    assert model[0].bias is bias
    assert parametrize.is_parametrized(model[0], "weight")
    _train(model, optimizer)


def test_flags_and_numbers_of_modules_stay_where_the_structure_stays(govern: Govern) -> None:
    """They belong to the user's loop; they come back only together with the modules that they belong to."""
    model, optimizer = _world()
    model[0].note = ["a"]
    governor = govern(model, optimizer)
    governor.snapshot()

    def change() -> None:
        model[0].requires_grad_(False)
        model[0].note, model[0].late = ["b"], 1

    change()
    governor.execute_rollback()
    assert (model[0].weight.requires_grad, model[0].note, model[0].late) == (False, ["b"], 1)
    change()
    model.append(nn.Identity())
    governor.execute_rollback()
    assert (model[0].weight.requires_grad, model[0].note) == (True, ["a"])
    assert not hasattr(model[0], "late")
    assert len(model) == 3


def test_gradients_of_a_layer_that_was_out_are_dropped_when_it_comes_back(govern: Govern) -> None:
    model, _ = _world()
    governor = govern(model)  # an optimizer would still know the layer
    governor.snapshot()
    model(torch.randn(4, 3)).sum().backward()
    last = model.pop(2)
    assert last.weight.grad is not None
    governor.execute_rollback()
    assert model[2] is last
    assert last.weight.grad is None


def test_whoever_holds_the_list_of_members_sees_it_go_back(govern: Govern) -> None:
    model, optimizer = _world()
    governor = govern(model, optimizer)
    governor.snapshot()
    held, members = optimizer.param_groups[0]["params"], list(model[0].parameters())
    held.extend(model[1].parameters())
    governor.execute_rollback()
    assert optimizer.param_groups[0]["params"] is held
    assert list(map(id, held)) == list(map(id, members))


def test_lists_that_were_shared_by_mistake_are_two_again(govern: Govern) -> None:
    model, optimizer = _world()
    other = torch.optim.SGD(model[1].parameters(), lr=0.1)
    governor = govern(model, [optimizer, other])
    governor.snapshot()
    before = _look(model, optimizer), _look(model, other)
    optimizer.param_groups[1]["params"] = optimizer.param_groups[0]["params"]
    other.param_groups = optimizer.param_groups
    governor.execute_rollback()
    assert (_look(model, optimizer), _look(model, other)) == before


def test_an_attribute_that_was_no_plain_value_is_left_alone(govern: Govern) -> None:
    model, _ = _world()
    model[0].cache = torch.zeros(2)
    governor = govern(model)
    governor.snapshot()
    model[0].cache = None
    model.append(nn.Identity())
    governor.execute_rollback()
    assert len(model) == 3
    assert model[0].cache is None


def test_the_log_says_what_was_taken_back(govern: Govern, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever grew the model is not called again, so it is said aloud."""
    model, optimizer = _world()
    governor = govern(model, optimizer)
    governor.snapshot()
    _grow(model, optimizer)
    model[0].bias = None
    model[2] = nn.Linear(3, 3)
    governor.execute_rollback()
    told = next(record.getMessage() for record in caplog.records if "structure" in record.getMessage())
    assert "model.3 removed" in told
    assert "model.0.bias put back" in told
    assert "model.2 replaced by its former self" in told


def test_snapshots_of_both_structures_in_one_ring(govern: Govern, freeze: Freeze) -> None:
    model, optimizer = _world()
    governor = govern(model, optimizer, slots=4)
    stages = []
    for change in (_grow, _remove_bias, _replace_parameter):
        _train(model, optimizer)
        stages.append((governor.snapshot(), freeze(model, optimizer), _look(model, optimizer)))
        change(model, optimizer)
    for info, frozen, seen in reversed(stages):
        governor.execute_rollback(to=info)
        assert (freeze(model, optimizer), _look(model, optimizer)) == (frozen, seen)


def test_a_registered_module_grows_with_the_model(govern: Govern, freeze: Freeze) -> None:
    model, optimizer = _world()
    average = torch.optim.swa_utils.AveragedModel(model)
    governor = govern(model, optimizer)
    governor.register("average", average)
    governor.snapshot()
    before = freeze(model, optimizer, average)
    _grow(model, optimizer)
    average.module.append(nn.Linear(3, 3))
    governor.execute_rollback()
    assert freeze(model, optimizer, average) == before


class Drawing(nn.Linear):
    """Hostile: handing its extra state back draws random numbers."""

    def get_extra_state(self) -> Any:
        return {"calls": 1}

    def set_extra_state(self, state: Any) -> None:
        torch.rand(3)


def test_random_state_is_kept_when_a_removed_module_with_extra_state_comes_back(
    govern: Govern, read_random: Callable[[], Any]
) -> None:
    model = nn.Sequential(nn.Linear(3, 3), Drawing(3, 3))
    governor = govern(model, rng="keep")
    governor.snapshot()
    removed = model.pop(1)
    random_state = read_random()
    governor.execute_rollback()
    assert model[1] is removed
    assert read_random() == random_state


def test_a_compiled_model_goes_on_with_its_former_layers(govern: Govern, freeze: Freeze) -> None:
    """What is compiled looks at the tree of modules before each call."""
    model, optimizer = _world()
    compiled = torch.compile(model, backend="eager")
    governor = govern(compiled, optimizer)
    _train(compiled, optimizer)
    governor.snapshot()
    _train(compiled, optimizer, seed=1)
    reference = freeze(model, optimizer)
    governor.execute_rollback()
    _grow(model, optimizer)
    _train(compiled, optimizer, seed=2)
    governor.execute_rollback()
    _train(compiled, optimizer, seed=1)
    assert freeze(model, optimizer) == reference


# ---------------------------------------------------------------- refused


def _hook(model: nn.Sequential, _: torch.optim.Optimizer) -> Callable[[], object]:
    model.append(nn.Identity())
    handle = model[0].register_forward_hook(lambda *_: None)
    return handle.remove


def _prune(model: nn.Sequential, _: torch.optim.Optimizer) -> Callable[[], object]:
    prune.l1_unstructured(model[0], "weight", 0.5)

    def undo() -> None:  # `prune.remove` would move the weight
        model[0]._forward_pre_hooks.clear()
        del vars(model[0])["weight"]

    return undo


def _replace_forward(model: nn.Sequential, _: torch.optim.Optimizer) -> Callable[[], object]:
    extra = nn.Parameter(torch.zeros(3))
    model[0].register_parameter("extra", extra)
    model[0].forward = lambda inputs: nn.functional.linear(inputs, model[0].weight) + extra
    return lambda: delattr(model[0], "forward")


def _become(model: nn.Sequential, _: torch.optim.Optimizer) -> Callable[[], object]:
    model[2].__class__ = Drawing

    def undo() -> None:
        model[2].__class__ = nn.Linear

    return undo


def _hide(model: nn.Sequential, _: torch.optim.Optimizer) -> Callable[[], object]:
    del model[0].bias
    model[0].bias = torch.zeros(3)
    return lambda: delattr(model[0], "bias")


def _move_while_out(model: nn.Sequential, _: torch.optim.Optimizer) -> Callable[[], object]:
    last = model.pop(2)
    data = last.weight.data
    last.weight.data = data.clone()

    def undo() -> None:
        last.weight.data = data

    return undo


OBSTACLES: dict[str, tuple[Callable[..., Callable[[], object]], str]] = {
    "hook": (_hook, r"model\.0 has other forward hooks"),
    "pruned": (_prune, r"model\.0 has other forward pre hooks; model\.0\.weight is hidden by an attribute"),
    "forward replaced": (_replace_forward, r"model\.0\.forward was replaced on the instance"),
    "class": (_become, r"model\.2 became a Drawing, was a Linear"),
    "hidden": (_hide, r"model\.0\.bias is hidden by an attribute"),
    "moved while out": (_move_while_out, r"model\.2\.weight was given other storage"),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_what_stands_in_the_way_is_named_and_nothing_is_written(name: str, govern: Govern, freeze: Freeze) -> None:
    change, message = OBSTACLES[name]
    model, optimizer = _world()
    governor = govern(model, optimizer)
    _train(model, optimizer)
    governor.snapshot()
    before, seen, digest = freeze(model, optimizer), _look(model, optimizer), governor.digest()
    _train(model, optimizer)
    undo = change(model, optimizer)
    changed, now, versions = freeze(model, optimizer), _look(model, optimizer), [p._version for p in model.parameters()]
    for verify in (None, "before"):
        with pytest.raises(tolaria.StateMismatch, match=message) as caught:
            governor.execute_rollback(verify=verify)
        assert caught.value.state_intact
        assert (freeze(model, optimizer), _look(model, optimizer)) == (changed, now)
        assert [p._version for p in model.parameters()] == versions
    undo()
    governor.execute_rollback()
    assert freeze(model, optimizer) == before
    assert _look(model, optimizer) == seen
    assert governor.digest() == digest


def _wiring(model: nn.Sequential) -> Any:
    """What the model computes, or why it cannot, and what hangs on its modules."""
    try:
        result = model(torch.ones(1, 3)).tolist()
    except Exception as error:
        result = repr(error)
    return result, [(set(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]


@pytest.mark.parametrize("name", ["hook", "pruned", "forward replaced", "hidden"])
def test_without_the_search_for_obstacles_the_model_is_another(
    name: str, govern: Govern, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red twin: let through, each of them leaves a model with something foreign on it."""
    monkeypatch.setattr(ModuleRecord, "obstacles", lambda _: iter(()))
    model, optimizer = _world()
    governor = govern(model.eval(), optimizer)
    governor.snapshot()
    before = _wiring(model)
    OBSTACLES[name][0](model, optimizer)
    governor.execute_rollback()
    assert _wiring(model) != before


def test_a_scripted_module_is_refused(govern: Govern) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.Linear(2, 2), torch.jit.script(nn.Linear(2, 2)))
    attributes = set(vars(model))
    with pytest.raises(tolaria.UnsupportedState, match=r"model\.1 is a RecursiveScriptModule.*torch\.compile"):
        govern(model)
    assert set(vars(model)) == attributes


def test_hooks_alone_are_no_change_of_structure(govern: Govern, freeze: Freeze) -> None:
    model, optimizer = _world()
    governor = govern(model, optimizer)
    governor.snapshot()
    before = freeze(model)
    handle = model[0].register_forward_hook(lambda *_: None)
    _train(model, optimizer)
    governor.execute_rollback()
    assert freeze(model) == before
    handle.remove()


def test_layers_inside_ddp_are_refused(one_rank: None, govern: Govern, freeze: Freeze) -> None:
    """Its buckets hold the gradients of the parameters that it was built with."""
    model, optimizer = _world()
    wrapped = nn.parallel.DistributedDataParallel(model)
    governor = govern(wrapped, optimizer)
    _train(wrapped, optimizer)
    governor.snapshot()
    before = freeze(wrapped, optimizer)
    _train(wrapped, optimizer)
    changed = freeze(wrapped, optimizer)
    model.append(nn.Identity())
    with pytest.raises(tolaria.StateMismatch, match=r"model is a DistributedDataParallel"):
        governor.execute_rollback()
    del model[3]
    assert freeze(wrapped, optimizer) == changed
    governor.execute_rollback()
    assert freeze(wrapped, optimizer) == before

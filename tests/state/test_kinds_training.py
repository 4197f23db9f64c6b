"""Ways of training: parametrizations, sparse gradients, several optimizers, steps inside backward, several devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import tolaria
from tolaria import TolariaGovernor

Govern = Callable[..., TolariaGovernor]
Freeze = Callable[..., Any]
Optimizers = list[torch.optim.Optimizer]


def _train(model: nn.Module, optimizers: Optimizers, inputs: list[torch.Tensor]) -> None:
    for batch in inputs:
        model(batch).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()


def _addresses(model: nn.Module) -> list[tuple[int, int]]:
    return [(id(t), t.data_ptr()) for t in (*model.parameters(), *model.buffers())]


def _replays(
    governor: TolariaGovernor, freeze: Freeze, model: nn.Module, optimizers: Optimizers, inputs: list[torch.Tensor]
) -> None:
    """Train, snapshot, train; then twice: roll back (the state is back), train again (the run is the same)."""
    _train(model, optimizers, inputs[:2])
    governor.snapshot()
    before, seen, digest = freeze(model, *optimizers), _addresses(model), governor.digest()
    _train(model, optimizers, inputs[2:])
    reference = freeze(model, *optimizers)
    assert reference != before
    for verify in (None, "before"):
        governor.execute_rollback(verify=verify)
        assert (freeze(model, *optimizers), _addresses(model), governor.digest()) == (before, seen, digest)
        _train(model, optimizers, inputs[2:])
        assert freeze(model, *optimizers) == reference


# ---------------------------------------------------------------- parametrizations


class Symmetric(nn.Module):
    """A parametrization of the user's own with a buffer that it writes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        return weight.triu() + weight.triu(1).T


PARAMETRIZATIONS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,  # power iterations in buffers
    "orthogonal": parametrizations.orthogonal,
    "orthogonal by Householder": lambda layer: parametrizations.orthogonal(layer, orthogonal_map="householder"),
    "one of the user's": lambda layer: nn.utils.parametrize.register_parametrization(layer, "weight", Symmetric()),
    "two on one weight": lambda layer: parametrizations.spectral_norm(
        nn.utils.parametrize.register_parametrization(layer, "weight", Symmetric())
    ),
}


@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_parametrizations(name: str, govern: Govern, freeze: Freeze) -> None:
    model = nn.Sequential(PARAMETRIZATIONS[name](nn.Linear(4, 4)), nn.Linear(4, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    inputs = list(torch.randn(5, 6, 4))
    _replays(govern(model, optimizer), freeze, model, [optimizer], inputs)
    assert nn.utils.parametrize.is_parametrized(model[0], "weight")


def test_a_parametrization_that_moves_its_weight_is_refused(govern: Govern, freeze: Freeze) -> None:
    """`orthogonal` gives the weight other memory when it is attached: its old place could be put back by nobody."""
    model = nn.Sequential(nn.Linear(4, 4))
    governor = govern(model)
    governor.snapshot()
    parametrizations.orthogonal(model[0])
    changed, seen = freeze(model), _addresses(model)
    with pytest.raises(tolaria.StateMismatch, match=r"model\.0\.weight was given other storage"):
        governor.execute_rollback()
    assert (freeze(model), _addresses(model)) == (changed, seen)
    governor.snapshot()  # from here on it is governed
    before = freeze(model)
    with torch.no_grad():
        model[0].parametrizations.weight.original.add_(1.0)
    governor.execute_rollback()
    assert freeze(model) == before


# ---------------------------------------------------------------- sparse gradients


def test_sparse_gradients(govern: Govern, freeze: Freeze) -> None:
    """Their optimizer's state is dense; live ones are dropped by a rollback, as dense ones are."""
    model = nn.Embedding(8, 3, sparse=True)
    optimizer = torch.optim.SparseAdam(model.parameters(), lr=0.1)
    inputs = [torch.tensor([1, 2, 2]), torch.tensor([3, 0]), torch.tensor([7, 1]), torch.tensor([5])]
    governor = govern(model, optimizer)
    _replays(governor, freeze, model, [optimizer], inputs)
    governor.execute_rollback()
    before = freeze(model, optimizer)
    model(inputs[0]).sum().backward()
    assert model.weight.grad.is_sparse
    governor.execute_rollback()
    assert model.weight.grad is None
    assert freeze(model, optimizer) == before


def test_a_governed_run_over_sparse_gradients(govern: Govern, freeze: Freeze) -> None:
    """A non-finite value in one of them is seen, and the run after its rollback is the undisturbed one."""
    ends = []
    for bad in (False, True):
        torch.manual_seed(5)
        model = nn.Embedding(8, 3, sparse=True)
        optimizer = torch.optim.SparseAdam(model.parameters(), lr=0.1)
        governor, rollbacks = govern(model, optimizer, cadence=1, probation=1), 0
        for number in governor.watch(range(5)):
            loss = model(torch.tensor([number, 1])).square().sum()
            loss.backward()
            if bad and number == 3 and not rollbacks:
                model.weight.grad._values()[0, 0] = float("nan")
            rollbacks += governor.step(loss=loss).rolled_back
        assert rollbacks == int(bad)
        ends.append(freeze(model, optimizer))
        governor.close()
    assert ends[0] == ends[1]


# ---------------------------------------------------------------- several optimizers, steps inside backward


def test_several_optimizers_over_one_model(govern: Govern, freeze: Freeze) -> None:
    """Matrices with one, the rest with another, and a third over what the first has too."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    matrices = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2]
    optimizers: Optimizers = [
        torch.optim.SGD(matrices, lr=0.1, momentum=0.9, nesterov=True),
        torch.optim.AdamW(rest, lr=0.01),
        torch.optim.RMSprop([model[0].weight], lr=1e-3),
    ]
    _replays(govern(model, optimizers), freeze, model, optimizers, list(torch.randn(5, 6, 4)))


def test_parameters_that_change_their_optimizer(govern: Govern, freeze: Freeze) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    optimizers: Optimizers = [torch.optim.Adam(layer.parameters()) for layer in model]
    governor = govern(model, optimizers)
    inputs = list(torch.randn(4, 6, 4))
    _train(model, optimizers, inputs)
    governor.snapshot()
    before = freeze(model, *optimizers)
    members = [list(map(id, o.param_groups[0]["params"])) for o in optimizers]
    first, second = (o.param_groups[0]["params"] for o in optimizers)
    second.append(first.pop())
    _train(model, optimizers, inputs)
    assert freeze(*optimizers) != before[1:]
    governor.execute_rollback()
    assert freeze(model, *optimizers) == before
    assert [list(map(id, o.param_groups[0]["params"])) for o in optimizers] == members


def _step_in_backward(model: nn.Module) -> Optimizers:
    """One optimizer for each parameter, stepped by a hook as soon as its gradient is complete."""
    by_parameter = {p: torch.optim.Adam([p], lr=0.05) for p in model.parameters()}

    def step(parameter: torch.Tensor) -> None:
        by_parameter[parameter].step()
        by_parameter[parameter].zero_grad()

    for parameter in by_parameter:
        parameter.register_post_accumulate_grad_hook(step)
    return list(by_parameter.values())


def test_optimizers_in_backward(govern: Govern, freeze: Freeze) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    optimizers = _step_in_backward(model)
    _replays(govern(model, optimizers), freeze, model, [*optimizers], list(torch.randn(5, 6, 4)))
    assert all(values["step"] == 5 for o in optimizers for values in o.state.values())


def test_an_optimizer_in_backward_that_was_not_passed_in_is_not_restored(govern: Govern, freeze: Freeze) -> None:
    """Red twin: its moments stay those of the undone steps, and the run goes another way."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    optimizers = _step_in_backward(model)
    with pytest.raises(AssertionError):
        _replays(govern(model, optimizers[1:]), freeze, model, optimizers, list(torch.randn(5, 6, 4)))


def test_a_governed_run_with_optimizers_in_backward(govern: Govern, freeze: Freeze) -> None:
    """`step` finds no gradient left: it judges the loss and keeps the books. The rollback undoes what the hooks did."""
    ends = []
    for bad in (False, True):
        torch.manual_seed(5)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        optimizers = _step_in_backward(model)
        governor, rollbacks = govern(model, optimizers, cadence=1, probation=1), 0
        for batch in governor.watch(list(torch.randn(6, 3, 4))):
            poison = float("nan") if bad and not rollbacks and governor.statistics().steps == 3 else 1.0
            loss = model(batch * poison).square().mean()
            loss.backward()
            rollbacks += governor.step(loss=loss).rolled_back
        assert rollbacks == int(bad)
        assert {float(values["step"]) for o in optimizers for values in o.state.values()} == {6.0}
        ends.append(freeze(model, *optimizers))
        governor.close()
    assert ends[0] == ends[1]


def test_a_rollback_from_inside_a_hook_of_backward_is_refused(govern: Govern, freeze: Freeze) -> None:
    model = nn.Linear(3, 2)
    governor = govern(model)
    governor.snapshot()
    refused: list[BaseException] = []

    def hook(_: torch.Tensor) -> None:
        with pytest.raises(tolaria.PhaseError) as caught:
            governor.execute_rollback()
        refused.append(caught.value)

    model.weight.register_post_accumulate_grad_hook(hook)
    before = freeze(model)
    model(torch.ones(1, 3)).sum().backward()
    assert len(refused) == 1
    assert freeze(model) == before


# ---------------------------------------------------------------- devices


def test_a_part_on_the_meta_device_is_refused(govern: Govern) -> None:
    """A layer that was never brought to memory has no bytes to hold."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2, device="meta"))
    attributes = set(vars(model))
    with pytest.raises(tolaria.UnsupportedState, match=r"model\.1\.weight is on the meta device.*Materialise"):
        govern(model)
    assert set(vars(model)) == attributes


def test_a_part_that_went_to_the_meta_device_is_refused(govern: Govern, freeze: Freeze) -> None:
    """As an offloader does that frees a layer: the snapshot is refused; older ones put the layer back."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    governor = govern(model)
    governor.snapshot()
    before, seen = freeze(model), _addresses(model)
    model[1].to("meta")
    with pytest.raises(tolaria.UnsupportedState, match=r"model\.1\.weight is on the meta device"):
        governor.snapshot()
    governor.execute_rollback()
    assert (freeze(model), _addresses(model)) == (before, seen)


@pytest.fixture(params=["context", "blocking"])
def barrier(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Split(nn.Module):
    """The first layer on the host, the second on a GPU."""

    def __init__(self, pinned: bool) -> None:
        super().__init__()
        self.host, self.device = nn.Linear(4, 4), nn.Linear(4, 2).cuda()
        self.register_buffer("table", torch.arange(4.0))
        if pinned:
            for tensor in (*self.host.parameters(), self.table):
                tensor.data = tensor.data.pin_memory()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.device(self.host(inputs + self.table).cuda(non_blocking=True))


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def _host_freeze(freeze: Freeze) -> Freeze:
    """`freeze` reads memory by address: bring what is on a device to the host first."""

    def frozen(*values: Any) -> Any:
        torch.cuda.synchronize()
        return freeze(
            *(
                [tensor.detach().cpu() for tensor in (*value.parameters(), *value.buffers())]
                if isinstance(value, nn.Module)
                else [[t.detach().cpu() if torch.is_tensor(t) else t for t in s.values()] for s in value.state.values()]
                for value in values
            )
        )

    return frozen


@pytest.mark.cuda
@pytest.mark.parametrize("pinned", [False, True])
def test_parameters_on_the_host_and_on_a_device(
    pinned: bool, barrier: str, deterministic: None, govern: Govern, freeze: Freeze
) -> None:
    model = Split(pinned)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    governor = govern(model, optimizer, barrier=barrier)
    _replays(governor, _host_freeze(freeze), model, [optimizer], list(torch.randn(5, 6, 4)))
    assert set(governor.capabilities().devices) == {"cpu", f"cuda:{torch.cuda.current_device()}"}
    assert model.host.weight.is_pinned() == pinned


@pytest.mark.cuda
def test_a_layer_that_was_offloaded_since_is_refused(govern: Govern, freeze: Freeze) -> None:
    """The memory that it had is held by the snapshot, but whoever offloaded it decides where it lies now."""
    model = Split(pinned=False)
    governor = govern(model)
    governor.snapshot()
    model.device.cpu()
    changed = freeze(model)
    with pytest.raises(tolaria.StateMismatch, match=r"model\.device\.weight was given other storage"):
        governor.execute_rollback()
    assert freeze(model) == changed


@pytest.mark.cuda
def test_an_adapter_on_a_device_attached_since(barrier: str, govern: Govern, freeze: Freeze) -> None:
    model = Split(pinned=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    governor = govern(model, optimizer, barrier=barrier)
    frozen = _host_freeze(freeze)
    inputs = list(torch.randn(4, 6, 4))
    _train(model, [optimizer], inputs)
    governor.snapshot()
    before, seen = frozen(model, optimizer), _addresses(model)
    model.device = nn.Sequential(model.device, nn.Linear(2, 2).cuda())
    optimizer.add_param_group({"params": model.device[1].parameters()})
    _train(model, [optimizer], inputs)
    governor.execute_rollback()
    assert (frozen(model, optimizer), _addresses(model)) == (before, seen)

"""`nn.DataParallel`: governed as a whole; refused where it makes replicas of a governed module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

from tolaria import TolariaGovernor, UnsupportedState

Govern = Callable[..., TolariaGovernor]


class TwoDevices(nn.DataParallel):
    """Does on the CPU what the real one does on two devices: a replica and a thread for each."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.device_ids, self.src_device_obj, self.output_device = [0, 1], torch.device("cpu"), None

    def scatter(self, inputs: Any, kwargs: Any, device_ids: Sequence[Any]) -> Any:
        return [(part,) for part in inputs[0].chunk(len(device_ids))], [{} for _ in device_ids]

    def replicate(self, module: nn.Module, device_ids: Sequence[Any]) -> list[Any]:
        made = []
        for number in device_ids:
            replicas = {each: each._replicate_for_data_parallel() for each in module.modules()}
            for each, replica in replicas.items():
                for key, child in each._modules.items():
                    setattr(replica, key, None if child is None else replicas[child])
                for key, parameter in each._parameters.items():
                    setattr(replica, key, None if parameter is None else parameter * 1.0)
                for key, buffer in each._buffers.items():  # the first device's are those of the module
                    setattr(replica, key, buffer if number == 0 or buffer is None else buffer.clone())
            made.append(replicas[module])
        return made

    def parallel_apply(self, replicas: Sequence[Any], inputs: Any, kwargs: Any) -> list[Any]:
        with ThreadPoolExecutor(len(replicas)) as pool:
            return list(pool.map(lambda replica, given: replica(*given), replicas, inputs))

    def gather(self, outputs: Any, output_device: Any) -> torch.Tensor:
        return torch.cat(outputs)


def make_model() -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def backward(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    loss = model(batch).square().mean()
    loss.backward()
    return loss


def test_it_is_governed_as_a_whole(govern: Govern, kit: Any) -> None:
    batches = [torch.randn(8, 6) for _ in range(12)]
    states = []
    for bad in (None, 5):
        model = TwoDevices(make_model())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        given = list(batches) if bad is None else [*batches[:bad], batches[bad] * float("nan"), *batches[bad:]]
        governor = govern(model, optimizer)
        for batch in governor.watch(given):
            governor.step(loss=backward(model, batch))
        assert governor.rollbacks == (0 if bad is None else 2)  # replayed, then skipped
        states.append(kit.freeze([model.state_dict(), optimizer.state_dict()]))
        governor.close()
    assert states[0] == states[1]


@pytest.mark.parametrize("inside", [False, True], ids=["around it", "around what holds it"])
def test_replicas_of_a_governed_module_are_refused(govern: Govern, kit: Any, inside: bool) -> None:
    """They would share its `forward`, which is bound to the original: another device's parameters, in no section."""
    model, x = make_model(), torch.ones(4, 6)
    governor = govern(model, torch.optim.SGD(model.parameters(), lr=0.1))
    parallel = TwoDevices(nn.Sequential(model, nn.Tanh()) if inside else model)
    before = kit.freeze(model.state_dict())
    with pytest.raises(UnsupportedState, match=r"TolariaGovernor\(nn\.DataParallel\(model\)"):
        parallel(x)
    assert kit.freeze(model.state_dict()) == before
    governor.close()
    assert parallel(x).shape == (4, 3)


def test_on_one_device_nothing_is_replicated(govern: Govern) -> None:
    model = make_model()
    govern(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert nn.DataParallel(model)(torch.ones(4, 6)).shape == (4, 3)

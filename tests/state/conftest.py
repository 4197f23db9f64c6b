"""Builders and bit-exact comparison for the tests of captured and restored state.

`freeze` reads a train state without any help of tolaria, so that a fault in `governor.digest()` cannot hide another.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tolaria import GovernorConfig, TolariaGovernor, judge


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The models are tiny: waking a second thread costs more than it computes, many times so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def govern() -> Iterator[Callable[..., TolariaGovernor]]:
    """Attach a governor with a small ring; every one is closed after the test, so that none changes the next one's."""
    opened: list[TolariaGovernor] = []

    def attach(model: nn.Module, optimizer: Any = None, **options: Any) -> TolariaGovernor:
        given = {name: options.pop(name) for name in ("scheduler", "scaler", "sections") if name in options}
        config = GovernorConfig(**{"slots": 3, "rng": "restore", **options})
        governor = TolariaGovernor(model, optimizer, config=config, detector=judge.non_finite(), **given)
        opened.append(governor)
        return governor

    yield attach
    for governor in opened:
        governor.close()


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A process group of one, in this process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def freeze() -> Callable[..., Any]:
    """A function from any objects to a nested tuple; two of them are equal only if every bit of the state is."""
    return lambda *values: tuple(_freeze(value) for value in values)


@pytest.fixture
def raw() -> Callable[[torch.Tensor], bytes]:
    """A function from a tensor to all bytes of the storage under it."""
    return _storage_bytes


@pytest.fixture
def read_random() -> Callable[[], Any]:
    """A function that reads Python's, NumPy's and torch's global random state, without tolaria."""

    def read() -> Any:
        kind, keys, *rest = np.random.get_state(legacy=True)
        return random.getstate(), (kind, bytes(keys), *rest), _storage_bytes(torch.get_rng_state())

    return read


def _storage_bytes(tensor: torch.Tensor) -> bytes:
    flat = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    return bytes(flat.numpy().tobytes())


def _freeze(value: Any) -> Any:
    if isinstance(value, torch.nn.parameter.UninitializedTensorMixin):
        return type(value).__name__, str(value.dtype), value.requires_grad
    if isinstance(value, torch.Tensor) and hasattr(value, "__tensor_flatten__"):
        keys, context = value.__tensor_flatten__()
        return type(value).__name__, tuple((key, _freeze(getattr(value, key))) for key in keys), repr(context)
    if isinstance(value, torch.Tensor):
        dense = value.detach().resolve_conj().clone(memory_format=torch.contiguous_format)
        return "tensor", str(value.dtype), tuple(value.shape), value.requires_grad, _storage_bytes(dense)
    if isinstance(value, nn.Module):
        return tuple(_freeze_module(name, module) for name, module in value.named_modules())
    if isinstance(value, torch.optim.Optimizer):
        return _freeze_optimizer(value)
    if isinstance(value, torch.amp.GradScaler):
        return _freeze([value._scale, value._growth_tracker, value.state_dict()])
    if isinstance(value, torch.Generator):
        return _freeze(value.get_state())
    if isinstance(value, dict):
        return tuple((repr(key), _freeze(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return type(value).__name__, tuple(map(_freeze, value))
    if callable(getattr(value, "state_dict", None)):
        return _freeze(value.state_dict())
    return repr(value)


def _freeze_module(name: str, module: nn.Module) -> Any:
    extra = type(module).get_extra_state is not nn.Module.get_extra_state
    return (
        name,
        tuple((key, _freeze(parameter)) for key, parameter in module._parameters.items()),
        tuple((key, _freeze(buffer)) for key, buffer in module._buffers.items()),
        tuple(sorted(module._non_persistent_buffers_set)),
        _freeze(module.get_extra_state()) if extra else None,
    )


def _freeze_optimizer(optimizer: torch.optim.Optimizer) -> Any:
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    numbers = {parameter: i for i, group in enumerate(optimizer.param_groups) for parameter in group["params"]}
    state = [(numbers.get(key, key), values) for key, values in optimizer.state.items()]
    plain = (int, float, str, bool, list, tuple, dict, torch.Tensor)
    rest = {k: v for k, v in vars(optimizer).items() if isinstance(v, plain) and k not in ("state", "param_groups")}
    return _freeze([groups, state, {k: v for k, v in rest.items() if not k.startswith("_")}])

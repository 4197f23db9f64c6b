"""Global random state: Python's, NumPy's (if it is loaded), torch's on the CPU and on every governed device."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, slots=True, eq=False)
class RngState:
    """One reading of all global generators.

    Attributes:
        python: `random.getstate()`.
        numpy: ``numpy.random.get_state()``, None where NumPy was not loaded.
        cpu: State of torch's CPU generator, shape [5056], uint8.
        devices: The same for each accelerator device, on the host.
    """

    python: Any
    numpy: Any
    cpu: torch.Tensor
    devices: tuple[tuple[torch.device, torch.Tensor], ...]

    def equals(self, other: RngState) -> bool:
        """Whether both readings are the same, bit for bit."""
        return (
            self.python == other.python
            and torch.equal(self.cpu, other.cpu)
            and _numpy_key(self.numpy) == _numpy_key(other.numpy)
            and len(self.devices) == len(other.devices)
            and all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(self.devices, other.devices, strict=True))
        )


def _numpy_key(state: Any) -> Any:
    return None if state is None else (state[0], state[1].tobytes(), *state[2:])


def read(devices: Iterable[torch.device]) -> RngState:
    """Read every global generator; draws nothing."""
    numpy = sys.modules.get("numpy")
    return RngState(
        python=random.getstate(),
        numpy=numpy.random.get_state() if numpy is not None else None,
        cpu=torch.get_rng_state(),
        devices=tuple(
            (device, torch.get_device_module(device).get_rng_state(device))
            for device in devices
            if device.type != "cpu"
        ),
    )


def write(state: RngState) -> None:
    """Set every global generator to a reading. The reading may be written any number of times."""
    random.setstate(state.python)
    numpy = sys.modules.get("numpy")
    if state.numpy is not None and numpy is not None:
        numpy.random.set_state(state.numpy)
    torch.set_rng_state(state.cpu)
    for device, saved in state.devices:
        torch.get_device_module(device).set_rng_state(saved, device)


def rekey(salt: int) -> None:
    """Move every global generator to a stream of its own that depends on its present state and on `salt`.

    Deterministic: the same state and salt give the same stream. Used where restored draws must not repeat.
    """
    seed = (random.getrandbits(64) ^ int(torch.randint(2**62, ())) ^ (salt * 0x9E3779B97F4A7C15)) % 2**63
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def hidden_draws(model: nn.Module) -> list[str]:
    """Names of the RNNs in `model` whose dropout cuDNN draws.

    Its state is seeded by torch's generator at the first forward, and anew whenever somebody sets that generator; in
    between it goes on by itself, and torch has no way to read it.
    """
    if not torch.backends.cudnn.enabled:
        return []
    return [
        name or type(module).__name__
        for name, module in model.named_modules()
        if isinstance(module, nn.RNNBase)
        and module.dropout > 0.0
        and module.num_layers > 1
        and any(parameter.device.type == "cuda" for parameter in module.parameters())
    ]

"""What comes with torch."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch

from tolaria.bench.peers.state import load, state_dicts
from tolaria.bench.workload import Workload


class DeepCopies:
    """A deep copy where the state is."""

    def __init__(self, work: Workload, folder: Path) -> None:
        self._work = work
        self._held: dict[str, Any] = {}

    def snapshot(self) -> None:
        """Of both."""
        self._held = copy.deepcopy(state_dicts(self._work))

    def complete(self) -> None:
        """It is."""

    def rollback(self) -> None:
        """From another copy: the optimizer would train in the one it is given."""
        load(self._work, {"model": self._held["model"], "optimizer": copy.deepcopy(self._held["optimizer"])})

    def close(self) -> None:
        """Nothing is left."""


class Files:
    """One file in memory."""

    def __init__(self, work: Workload, folder: Path) -> None:
        self._work, self._file = work, folder / "state.pt"

    def snapshot(self) -> None:
        """Written."""
        torch.save(state_dicts(self._work), self._file)

    def complete(self) -> None:
        """It is."""

    def rollback(self) -> None:
        """Read, onto the device."""
        load(self._work, torch.load(self._file, map_location=self._work.device))

    def close(self) -> None:
        """The folder is removed by its owner."""


class Items:
    """The usual few lines: two numbers that the host waits for."""

    def __init__(self, work: Workload, folder: Path) -> None:
        self._parameters = list(work.model.parameters())

    def healthy(self, loss: torch.Tensor) -> None:
        """Loss and gradient norm."""
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, math.inf)
        if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
            raise ValueError("a step of the benchmark is not finite")

    def reference(self, loss: torch.Tensor) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing is left."""

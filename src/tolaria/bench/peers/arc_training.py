"""arc-training, by the calls of its README alone: `Controller(model, optimizer, config=...)`, `step(loss)`, `close()`.

It offers no call that takes a snapshot or rolls back. So a snapshot is timed as a step that takes one (`step`, then
`optimizer.step`, which it hooks) less the same step of an optimizer that it does not know, and a rollback as a `step`
whose loss is not a number. Judging the step is contained in both.
"""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from typing import Any

import torch

from tolaria.bench.workload import Workload

_LOSS = 5.0


class Arc:
    """Snapshots of every step; the next healthy step makes one a target."""

    def __init__(self, work: Workload, folder: Path) -> None:
        self._arc = importlib.import_module("arc")
        self._work = work
        self._controller = _controller(self._arc, work, checkpoint_frequency=1, adaptive_frequency=False)
        self._loss = torch.tensor(_LOSS, device=work.device)
        self._unknown = torch.optim.AdamW(work.model.parameters(), lr=0.0, weight_decay=0.0, fused=True)
        work.backward()

    def snapshot(self) -> None:
        """A whole healthy step with one."""
        self._controller.step(self._loss)
        self._work.optimizer.step()

    def reference(self) -> None:
        """The optimizer's own part of that: as many weights and moments, none of them changed that count."""
        self._unknown.step()

    def complete(self) -> None:
        """The next healthy step: only then would it go back there."""
        self._controller.step(self._loss)

    def rollback(self) -> None:
        """By a loss that is not a number.

        Raises:
            RuntimeError: It did not roll back.
        """
        action = self._controller.step(self._loss * float("nan"))
        if not action.rolled_back:
            raise RuntimeError(f"step() on a NaN loss did not roll back: {action}")

    def close(self) -> None:
        """Its hooks and threads."""
        self._controller.close()


class Steps:
    """Healthy steps at default settings."""

    def __init__(self, work: Workload, folder: Path) -> None:
        self._controller = _controller(importlib.import_module("arc"), work)

    def healthy(self, loss: torch.Tensor) -> None:
        """Judge one."""
        action = self._controller.step(loss)
        if action.should_skip:
            raise RuntimeError(f"step() on a healthy step said skip: {action}")

    def reference(self, loss: torch.Tensor) -> None:
        """Nothing."""

    def close(self) -> None:
        """Its hooks and threads."""
        self._controller.close()


def _controller(arc: Any, work: Workload, **settings: Any) -> Any:
    warnings.filterwarnings("ignore")
    return arc.Controller(work.model, work.optimizer, config=arc.ControllerConfig(verbose=False, **settings))

"""OLMo-core's SkipStepAdamW: a step scaled to nothing where loss or gradient norm leap, decided on the device."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import torch

from tolaria.bench.workload import Workload


class SkipSteps:
    """Its optimizer step, beside that of torch's AdamW over the same gradients."""

    def __init__(self, work: Workload, folder: Path) -> None:
        parameters = list(work.model.parameters())
        self._skipping: Any = importlib.import_module("olmo_core.optim").SkipStepAdamW(
            parameters, lr=1e-6, foreach=True
        )
        self._plain = torch.optim.AdamW(parameters, lr=1e-6, foreach=True)
        self._parameters = parameters

    def healthy(self, loss: torch.Tensor) -> None:
        """Norm, and its step."""
        self._skipping.latest_loss = loss
        self._skipping.latest_grad_norm = torch.nn.utils.clip_grad_norm_(self._parameters, math.inf)
        self._skipping.step()

    def reference(self, loss: torch.Tensor) -> None:
        """The step alone."""
        self._plain.step()

    def close(self) -> None:
        """Nothing is left."""

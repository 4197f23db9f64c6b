"""Lightning's SpikeDetection callback, on a fabric of one process."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch

from tolaria.bench.workload import Workload


class Spikes:
    """One loss after the other."""

    def __init__(self, work: Workload, folder: Path) -> None:
        fabric = importlib.import_module("lightning.fabric")
        detection = importlib.import_module("lightning.fabric.utilities.spike").SpikeDetection
        accelerator = "cuda" if work.device.type == "cuda" else "cpu"
        self._fabric: Any = fabric.Fabric(accelerator=accelerator, devices=1)
        self._detection: Any = detection(exclude_batches_path=str(folder / "skip.json"))
        self._batch = 0

    def healthy(self, loss: torch.Tensor) -> None:
        """As `Fabric.call` would."""
        self._detection.on_train_batch_end(self._fabric, loss, None, self._batch)
        self._batch += 1

    def reference(self, loss: torch.Tensor) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing is left."""

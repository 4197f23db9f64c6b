"""lm-resiliency (GEMINI): page-locked slots in main memory, one rank, no replica."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from tolaria.bench.peers.state import load, state_dicts
from tolaria.bench.workload import Workload


class InMemory:
    """`save`, behind which weights may change after `maybe_wait`; `load` and `load_state_dict`."""

    def __init__(self, work: Workload, folder: Path) -> None:
        settings = importlib.import_module("lm_resiliency.checkpointing.config").InMemoryCkptConfig(
            disk_flush_interval=0, disk_folder=str(folder), pin_memory=work.device.type == "cuda"
        )
        experimental = importlib.import_module("lm_resiliency.experimental")
        self._manager: Any = experimental.InMemoryCheckpointManager(settings)
        self._work, self._step = work, 0

    def snapshot(self) -> None:
        """Started. The copy must be over before the optimizer writes; that wait is counted as completion."""
        self._step += 1
        self._manager.save(state_dicts(self._work), self._step)

    def complete(self) -> None:
        """Copied."""
        self._manager.maybe_wait()

    def rollback(self) -> None:
        """Out of the slot.

        Raises:
            RuntimeError: It holds none.
        """
        found = self._manager.load()
        if found is None:
            raise RuntimeError("load() found no checkpoint")
        load(self._work, found[0])

    def close(self) -> None:
        """Its threads end with the process."""

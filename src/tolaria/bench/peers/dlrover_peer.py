"""dlrover's Flash Checkpoint: shared memory, no agent, one rank."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

from tolaria.bench.peers.state import load, state_dicts
from tolaria.bench.workload import Workload


class Flash:
    """`save_checkpoint` to memory; `load_checkpoint` and `load_state_dict`."""

    def __init__(self, work: Workload, folder: Path) -> None:
        module = importlib.import_module("dlrover.trainer.torch.flash_checkpoint.ddp")
        self._memory: Any = module.StorageType.MEMORY
        self._checkpointer: Any = module.DdpCheckpointer(str(folder))
        self._folder, self._work, self._step = folder, work, 0

    def snapshot(self) -> None:
        """Copied to shared memory."""
        self._step += 1
        path = str(self._folder / f"{self._step}.pt")
        self._checkpointer.save_checkpoint(self._step, state_dicts(self._work), path, storage_type=self._memory)

    def complete(self) -> None:
        """It is."""

    def rollback(self) -> None:
        """Out of shared memory.

        Raises:
            RuntimeError: It holds none.
        """
        found = self._checkpointer.load_checkpoint()
        if not found:
            raise RuntimeError("load_checkpoint() found nothing")
        # the optimizer would go on training in the shared memory that it is given
        load(self._work, {"model": found["model"], "optimizer": copy.deepcopy(found["optimizer"])})

    def close(self) -> None:
        """Its processes and shared memory."""
        close = getattr(getattr(self._checkpointer, "_engine", None), "close", None)
        if close is not None:
            close()

"""nvidia-resiliency-ext: local checkpoints, asynchronous, to a folder in memory. CUDA tensors only."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from tolaria.bench.peers.state import load, state_dicts
from tolaria.bench.workload import Workload

_CHECKPOINTING = "nvidia_resiliency_ext.checkpointing"


class Local:
    """`LocalCheckpointManager` in one process."""

    def __init__(self, work: Workload, folder: Path) -> None:
        managers = importlib.import_module(f"{_CHECKPOINTING}.local.ckpt_managers.local_manager")
        self._wrap: Any = importlib.import_module(f"{_CHECKPOINTING}.local.basic_state_dict").BasicTensorAwareStateDict
        self._queue: Any = importlib.import_module(f"{_CHECKPOINTING}.async_ckpt.core").AsyncCallsQueue()
        self._manager: Any = managers.LocalCheckpointManager(str(folder))
        self._work, self._step = work, 0

    def snapshot(self) -> None:
        """Copied to main memory."""
        self._step += 1
        request = self._manager.save(self._wrap(state_dicts(self._work)), self._step, is_async=True)
        self._queue.schedule_async_request(request)

    def complete(self) -> None:
        """Written by its process."""
        self._queue.maybe_finalize_async_calls(blocking=True)

    def rollback(self) -> None:
        """Read."""
        self._manager.find_latest()
        found, _ = self._manager.load()
        found.restore_tensor_device()
        load(self._work, found.to_state_dict() if hasattr(found, "to_state_dict") else found.state_dict)

    def close(self) -> None:
        """Its process."""
        self._queue.close()

"""nvidia-resiliency-ext: local checkpoints, one process, to a folder in memory. CUDA tensors only."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from torch.utils import _pytree

from tolaria.bench.peers.dcp import join_alone
from tolaria.bench.peers.state import load, state_dicts
from tolaria.bench.workload import Workload


class Local:
    """`LocalCheckpointManager.save`, waited for."""

    def __init__(self, work: Workload, folder: Path) -> None:
        checkpointing = "nvidia_resiliency_ext.checkpointing.local"
        managers = importlib.import_module(f"{checkpointing}.ckpt_managers.local_manager")
        self._wrap: Any = importlib.import_module(f"{checkpointing}.basic_state_dict").BasicTensorAwareStateDict
        self._leave = join_alone(folder)
        self._manager: Any = managers.LocalCheckpointManager(str(folder / "local"))
        self._work, self._step = work, 0

    def snapshot(self) -> None:
        """Written. It puts copies into the dictionaries that it is given, which must not be the optimizer's own."""
        self._step += 1
        containers = _pytree.tree_unflatten(*_pytree.tree_flatten(state_dicts(self._work)))
        self._manager.save(self._wrap(containers), self._step, is_async=False)

    def complete(self) -> None:
        """It is."""

    def rollback(self) -> None:
        """Read, and moved to the device."""
        self._manager.find_latest()
        found, _ = self._manager.load()
        found.restore_tensor_device()
        load(self._work, found.state_dict)

    def close(self) -> None:
        """Its group."""
        self._leave()

"""torchsnapshot, to a folder in memory."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from tolaria.bench.workload import Workload


class TorchSnapshot:
    """`async_take`, whose return lets training go on; `restore` in place."""

    def __init__(self, work: Workload, folder: Path) -> None:
        self._snapshots: Any = importlib.import_module("torchsnapshot").Snapshot
        self._work, self._folder, self._count = work, folder, 0
        self._pending: Any = None
        self._held: Any = None

    @property
    def _state(self) -> dict[str, Any]:
        return {"model": self._work.model, "optimizer": self._work.optimizer}

    def snapshot(self) -> None:
        """Its promise: the state may change when it has returned."""
        self._count += 1
        path = str(self._folder / str(self._count % 2))
        self._pending = self._snapshots.async_take(path=path, app_state=self._state)

    def complete(self) -> None:
        """Written."""
        self._held = self._pending.wait()

    def rollback(self) -> None:
        """Read."""
        self._held.restore(app_state=self._state)

    def close(self) -> None:
        """The folder is removed by its owner."""

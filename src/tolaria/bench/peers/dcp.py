"""torch.distributed.checkpoint, in one process and without a group; a group of one for those that cannot do without."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch.distributed
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from tolaria.bench.workload import Workload


def join_alone(folder: Path) -> Callable[[], None]:
    """Make a process group of this process alone. Answers what to call in the end."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)
    return torch.distributed.destroy_process_group


class Saved:
    """Saved to a folder in memory, and loaded from there in place."""

    def __init__(self, work: Workload, folder: Path) -> None:
        warnings.filterwarnings("ignore")  # of one process, which is meant
        self._work, self._folder, self._count = work, folder, 0

    def _state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self._work.model, self._work.optimizer)
        return {"model": model, "optimizer": optimizer}

    @property
    def _place(self) -> str:
        return str(self._folder / str(self._count % 2))

    def snapshot(self) -> None:
        """Written."""
        self._count += 1
        dcp.save(self._state(), checkpoint_id=self._place)

    def complete(self) -> None:
        """It is."""

    def rollback(self) -> None:
        """Read into the live tensors, and given back to their owners."""
        state = self._state()
        dcp.load(state, checkpoint_id=self._place)
        set_state_dict(
            self._work.model,
            self._work.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )

    def close(self) -> None:
        """The folder is removed by its owner."""


class SavedAsync(Saved):
    """Copied first, written by a thread."""

    def __init__(self, work: Workload, folder: Path) -> None:
        super().__init__(work, folder)
        self._written: Any = None

    def snapshot(self) -> None:
        """Copied to main memory."""
        self._count += 1
        self._written = dcp.async_save(self._state(), checkpoint_id=self._place)

    def complete(self) -> None:
        """Written."""
        assert isinstance(self._written, Future)
        self._written.result()

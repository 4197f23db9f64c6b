"""tolaria itself."""

from __future__ import annotations

from pathlib import Path

import torch

from tolaria import GovernorConfig, SnapshotInfo, TolariaGovernor, judge
from tolaria.bench.workload import Workload
from tolaria.budget import TierChoice


class Ours:
    """Manual snapshots, sealed; rollbacks to them."""

    tier: TierChoice | None = None

    def __init__(self, work: Workload, folder: Path) -> None:
        config = GovernorConfig(probation=0, slots=2, host_slots=0, tier=self.tier)
        self._governor = TolariaGovernor(work.model, work.optimizer, config=config, detector=judge.non_finite())
        self._taken: SnapshotInfo | None = None

    def snapshot(self) -> None:
        """Submitted: writers wait for the copies by themselves."""
        self._taken = self._governor.snapshot()

    def complete(self) -> None:
        """Sealed."""
        assert self._taken is not None
        self._taken.wait("sealed")

    def rollback(self) -> None:
        """To it."""
        self._governor.execute_rollback(to=self._taken)

    def close(self) -> None:
        """Detach."""
        self._governor.close()


class OursOnHost(Ours):
    """The same in page-locked main memory."""

    tier = "host"


class Observes:
    """The default detectors, on everything they look at."""

    def __init__(self, work: Workload, folder: Path) -> None:
        config = GovernorConfig(probation=0, slots=2, host_slots=0)
        self._governor = TolariaGovernor(work.model, work.optimizer, config=config)

    def healthy(self, loss: torch.Tensor) -> None:
        """Send off the numbers of this step, and judge those that have arrived."""
        self._governor.observe(loss=loss)

    def reference(self, loss: torch.Tensor) -> None:
        """Nothing."""

    def close(self) -> None:
        """Detach."""
        self._governor.close()

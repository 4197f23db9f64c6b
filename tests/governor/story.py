"""A governed run over numbered batches, with everything that happened."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from tolaria import GovernorConfig, TolariaGovernor
from tolaria.records import Incident

Govern = Callable[..., TolariaGovernor]


class Story:
    """Trains on batches by number; notes what was delivered, and each incident."""

    def __init__(self, kit: Any, govern: Govern, detector: Any = None, optimizer: Any = None, **config: Any) -> None:
        random.seed(5)  # re-keying draws from it
        self.kit, self.run = kit, kit.Run(optimizer=optimizer)
        self.incidents: list[Incident] = []
        self.delivered: list[int] = []
        self.governor = govern(
            self.run.model,
            self.run.optimizer,
            scheduler=self.run.scheduler,
            config=GovernorConfig(
                **{"cadence": 2, "probation": 1, "on_incident": self.incidents.append, "rng": "restore", **config}
            ),
            **({} if detector is None else {"detector": detector}),
        )

    def train(self, numbers: Any, bad: dict[int, int] | None = None) -> Story:
        """Train on these batches; `bad`: how many deliveries of a batch are poisoned."""
        left = dict(bad or {})
        for number in self.governor.watch(numbers):
            self.delivered.append(number)
            batch = self.run.batches[number]
            poisoned = left.get(number, 0) > 0
            left[number] = left.get(number, 0) - 1
            self.run.step(self.governor, self.kit.nan_batch(batch) if poisoned else batch)
        return self

    @property
    def actions(self) -> list[str]:
        return [incident.action for incident in self.incidents]

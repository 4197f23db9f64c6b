"""The workloads by name, each with its faults and the settings of its governor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tolaria.config import GovernorConfig, Recovery
from tolaria.drill import gpt_faults
from tolaria.drill.digits import Digits
from tolaria.drill.faults import KINDS, FaultKind
from tolaria.drill.gpt import Gpt
from tolaria.drill.in_flight import CudaForeign, Foreign, foreign_kernel
from tolaria.drill.workloads import Workload


@dataclass(frozen=True, slots=True)
class Entry:
    """One workload.

    Attributes:
        build: From seed, steps and device.
        kinds: What goes wrong on any device, in order.
        foreign_kernel_at: When one fault more strikes on a device that works asynchronously, as a share of the steps.
        moved: Shares of other faults, by name, that make room for it.
        reexecute_every: Setting of the governor.
    """

    build: Callable[[int, int, torch.device], Workload]
    kinds: tuple[FaultKind, ...]
    foreign_kernel_at: float
    moved: tuple[tuple[str, float], ...] = ()
    reexecute_every: int = 0

    def with_foreign_kernel(self, foreign: Foreign) -> tuple[FaultKind, ...]:
        """`kinds` with `in_flight.overwrite_in_flight` as the last of the transient faults.

        Each still has a certified snapshot's time to itself, and the three steps by which verdicts may be late.
        """
        moved = dict(self.moved)
        others = [replace(kind, at=moved.get(kind.name, kind.at)) for kind in self.kinds]
        kinds = (*others, foreign_kernel(foreign, self.foreign_kernel_at))
        return tuple(sorted(kinds, key=lambda kind: kind.at))

    def kinds_for(self, device: torch.device) -> tuple[FaultKind, ...]:
        """What goes wrong on that device. On CUDA a kernel is compiled there."""
        return self.with_foreign_kernel(CudaForeign(device)) if device.type == "cuda" else self.kinds

    def config(self, ledger: Path | None = None) -> GovernorConfig:
        """The governor's defaults, with every policy off that would make a recovery differ from the reference run.

        Those are the cool-down of the learning rate and nothing else: moments and random state are restored by default.
        """
        path = None if ledger is None else str(ledger)
        return GovernorConfig(recovery=Recovery(cool_lr=1.0), reexecute_every=self.reexecute_every, ledger=path)


_MOVED = (("gradient_explosion", 0.14), ("zeroed_moments", 0.245), ("foreign_write", 0.355), ("bit_flip", 0.46))

WORKLOADS: dict[str, Entry] = {
    "gpt": Entry(Gpt, gpt_faults.KINDS, gpt_faults.FOREIGN_KERNEL_AT, reexecute_every=gpt_faults.REEXECUTE_EVERY),
    "digits": Entry(Digits, KINDS, 0.565, moved=_MOVED),
}
"""By name on the command line (`tolaria.cli.Drill.workload` lists the same names without importing torch)."""

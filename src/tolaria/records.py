"""The facts that flow through one governed step, in flow order. Pure host values: no tensor, no torch.

observe -> `VitalSigns` -> judge -> `Verdict` -> snapshot | rollback -> recover -> report -> `Incident`
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any, NamedTuple

SCHEMA_VERSION = 1
"""Version of every JSON object that tolaria writes. A change of a field's name or meaning raises it."""


def _empty() -> Mapping[str, float]:
    return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class VitalSigns:
    """What is known of one optimizer step, as host numbers.

    Attributes:
        step: Number of the optimizer step, counted by the governor from 1 (rolled back steps are counted again).
        loss: Loss of the step, a float (NaN and infinities allowed); None when the caller gave none. With several
            losses or accumulated micro-batches: their mean.
        grad_norm: L2 norm over all gradients before clipping; None where there was no gradient.
        nonfinite_gradients: Number of gradient tensors that hold a NaN or an infinity; 0 where nobody looked, because
            `observe` was given a norm, which then tells.
        nonfinite_weights: Number of parameter tensors that hold one, None when not looked at in this step.
        metric: The caller's own figure of merit, higher is better; None when not given.
        extra: Further signs by name (approximate KL, entropy, ...).
    """

    step: int
    loss: float | None = None
    grad_norm: float | None = None
    nonfinite_gradients: int = 0
    nonfinite_weights: int | None = None
    metric: float | None = None
    extra: Mapping[str, float] = field(default_factory=_empty)


class Health(Enum):
    """The three answers of a detector, in rising order of alarm."""

    HEALTHY = "healthy"
    SUSPECT = "suspect"  # nothing is certified or snapshotted while it lasts
    PANIC = "panic"  # demands a rollback


@dataclass(frozen=True, slots=True)
class Verdict:
    """A detector's answer for one step.

    Attributes:
        health: `HEALTHY`, `SUSPECT` or `PANIC`.
        reason: Short and stable, for example ``"non-finite loss"``; empty when healthy.
        step: The step that was judged.
        onset: First step of the episode this verdict belongs to (equal to `step` where the trouble is new).
        evidence: The numbers behind the answer, by name.
    """

    health: Health
    step: int
    reason: str = ""
    onset: int | None = None
    evidence: Mapping[str, float] = field(default_factory=_empty)

    @property
    def is_panic(self) -> bool:
        """True when a rollback is demanded."""
        return self.health is Health.PANIC


class Journal(NamedTuple):
    """What of the governor itself rolls back with the train state.

    Attributes:
        completed: Optimizer steps in the past of the state.
        judgement: State of the detector.
        position: Index of the first batch that no completed step has consumed.
    """

    completed: int
    judgement: Any
    position: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What `TolariaGovernor.step` did.

    Attributes:
        verdict: The judgement of this step; where numbers are read late, of the newest step whose numbers have arrived.
        rolled_back: The train state was put back, to before the step of `verdict` and so before this one.
        skipped: The optimizer step was not applied (a veto, or a `GradScaler` that skipped), as far as that is known: a
            fused optimizer skips on the device.
        step: Number of the optimizer step just made, as the governor counts: undone ones and those that are run again
            (`GovernorConfig.reexecute_every`) have the same number as before.
    """

    verdict: Verdict
    rolled_back: bool
    skipped: bool
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What this governor can do on this machine, chosen once at construction.

    Attributes:
        barrier: Device barrier in use: ``"host"`` (CPU: the gate alone), ``"context"`` (context-wide events on both
            sides, the host waits for nothing) or ``"blocking"`` (device synchronise on both sides).
        barrier_reason: Why it is not ``"context"`` on an accelerator; else empty.
        devices: Devices that hold governed tensors, for example ``("cpu",)``.
        tier: Where snapshots are taken into: ``"host"`` (main memory) or ``"device"`` (beside the tensors they copy).
        tier_reason: Why a train state on a device has its snapshots in main memory; else empty.
        host_slots: How many slots of main memory are filled from those of the device tier.
        copy_path: How bytes are moved.
        state_bytes: Bytes of one snapshot; 0 before the first one.
        slots: Slots of that tier.
        cadence: Steps between automatic snapshots, after any stretching (see `cadence_stretched`).
        cadence_stretched: True when the ring was too small for the cadence that was asked for.
        rng: RNG policy in force: ``"restore"``, ``"fork"`` or ``"keep"``.
        reexecution: ``"on"``, or ``"off: "`` and the reason.
        notes_bytes: Bytes that the notes of single steps (`past_steps`) take now; 0 before the first one.
    """

    barrier: str
    devices: tuple[str, ...]
    tier: str
    copy_path: str
    state_bytes: int
    slots: int
    cadence: int
    cadence_stretched: bool
    rng: str
    barrier_reason: str = ""
    tier_reason: str = ""
    host_slots: int = 0
    reexecution: str = "off: not asked for"
    notes_bytes: int = 0


NO_CAPABILITIES = Capabilities(
    barrier="none",
    devices=(),
    tier="none",
    copy_path="none",
    state_bytes=0,
    slots=0,
    cadence=0,
    cadence_stretched=False,
    rng="keep",
)
"""Of a governor that is disabled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """Counters of one governor since it was built (or resumed from `load_state_dict`).

    Times are seconds of host time.
    """

    steps: int = 0
    snapshots: int = 0
    snapshots_deferred: int = 0  # due, but every slot held something that may not be overwritten
    snapshots_rejected: int = 0  # not finite
    snapshots_failed: int = 0  # out of memory, or an extra raised
    snapshots_corrupted: int = 0  # their bytes changed in memory after they were sealed; given up
    snapshots_drained: int = 0  # copied from a device to main memory
    rollbacks_disturbed: int = 0  # read back as something else, so they were done again
    rollbacks: int = 0
    panics: int = 0
    vetoes: int = 0  # optimizer steps not applied because a gradient was not finite
    stale_vetoes: int = 0  # optimizer steps not applied because their backward straddled a rollback
    troubles: int = 0  # panics that were not the return of another one; silent corruption included
    troubles_returned: int = 0  # those of them that came again after their replay: lasting, the others were transient
    skipped_batches: int = 0
    replayed_batches: int = 0
    steps_lost: int = 0
    reexecutions: int = 0  # rollbacks made to run healthy steps again; not among `rollbacks`
    reexecuted_steps: int = 0  # optimizer steps undone by them
    snapshot_s: float = 0.0
    rollback_s: float = 0.0
    gate_wait_s: float = 0.0  # time snapshots and rollbacks waited for open sections
    # steps of the snapshots held now, oldest first; no counters, so they are not compared and not resumed
    held_on_device: tuple[int, ...] = field(default=(), compare=False)
    held_on_host: tuple[int, ...] = field(default=(), compare=False)


class Tally:
    """Statistics that grow; added to several times a step, so they become a record only when somebody asks.

    Threads: any.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a signal handler may ask while its thread adds
        self._counts: dict[str, Any] = {}
        self.set(Statistics())

    def add(self, increments: Mapping[str, float]) -> None:
        """Add to counters by name."""
        with self._lock:
            for name, by in increments.items():
                if by:
                    self._counts[name] += by

    def set(self, statistics: Statistics) -> None:
        """Go on from these."""
        with self._lock:
            self._counts = {one.name: getattr(statistics, one.name) for one in fields(Statistics)}

    def read(self) -> Statistics:
        """As they are now."""
        with self._lock:
            return Statistics(**self._counts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Incident:
    """One panic with what was done about it: one line of the ledger.

    Attributes:
        step: The step at which the panic was noticed.
        onset: The first step of the episode as the detectors see it.
        reason: The verdict's reason, or the caller's for a manual rollback.
        signs: The vital signs of the step.
        evidence: The detector's numbers.
        action: ``"replay"``, ``"skip"``, ``"stop"``, ``"observe"`` (nothing was touched) or ``"manual"``.
        restored_step: Step of the snapshot that was put back; None where nothing was.
        certified: Whether that snapshot was certified (False: vouched for by its caller).
        steps_lost: Optimizer steps undone.
        batches_replayed: Batches that will be delivered again.
        batches_skipped: Batches that will not.
        rollback_ms: Host time of the rollback in milliseconds.
        barrier: Barrier kind used.
        env_id: The caller's number for this environment or model.
        tier: Where the snapshot was: ``"device"`` or ``"host"``; ``"none"`` where nothing was put back.
        note: Anything unusual, for example why a replay became a skip.
        attempt: How often this trouble has been met, from 1; from 2 on it is lasting. 0 where nobody counts.
        lr_factor: Factor on the learning rate of the next step.
        moments: What became of the restored moments: ``"keep"``, ``"reset"`` or ``"damp"``.
    """

    step: int
    onset: int
    reason: str
    signs: Mapping[str, Any]
    evidence: Mapping[str, float]
    action: str
    restored_step: int | None
    certified: bool
    steps_lost: int
    batches_replayed: int
    batches_skipped: int
    rollback_ms: float
    barrier: str
    env_id: int = 0
    tier: str = "none"
    note: str = ""
    attempt: int = 0
    lr_factor: float = 1.0
    moments: str = "keep"

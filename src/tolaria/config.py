"""What a user can choose. One frozen record; every value is checked before anything is built."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from tolaria.budget import TierChoice
from tolaria.errors import InvalidConfig

RngPolicy = Literal["restore", "fork", "keep"]
Mode = Literal["act", "observe"]
OnVeto = Literal["rollback", "keep"]
Moments = Literal["keep", "reset", "damp"]
AfterReturn = Literal["restore", "rekey"]
BarrierChoice = Literal["context", "streams", "blocking"]
CopyPathChoice = Literal["kernel", "foreach", "graph", "batch"]


MOST_OUTSTANDING = 24
"""Steps whose verdicts may be on their way; one more waits for the oldest."""


class Writer(Protocol):
    """What of a TensorBoard `SummaryWriter` (torch's, tensorboardX's or another) is called."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """One number at a step."""

    def add_text(self, tag: str, text_string: str, global_step: int) -> Any:
        """A text, in Markdown, at a step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recovery:
    """What follows a panic, as a value (docs/recovery.md). A panic has *returned* when it comes again after its replay.

    Attributes:
        first: What follows the first panic: ``"replay"``, which tells transient from lasting, or ``"skip"``.
        skip_further: Batches after the panicking one that are left out too when a panic has returned. Needs `watch`.
        widen: With every further return that many times as many, up to `most_further`.
        most_further: See `widen`.
        go_back: A panic that has returned goes back to a snapshot at least that many steps before its onset, as far
            as the ring reaches.
        skips_before_older: Skips that are tried before an older snapshot is used; one older with every further return.
        cool_lr: Factor on the learning rate from the `cool_after`-th panic within `cool_window` steps on that has
            returned; 1.0 leaves it alone.
        warm_steps: Optimizer steps over which the learning rate is back on its schedule, linearly.
        cool_after: See `cool_lr`.
        cool_window: See `cool_lr`; in steps judged, undone ones included.
        moments: What becomes of the restored moments of the optimizers when a panic has returned: ``"keep"``,
            ``"reset"`` (as before the first step), or ``"damp"`` (first moments times `damp`).
        damp: See `moments`.
        rng: What becomes of restored random state when a panic has returned: ``"restore"``, or ``"rekey"`` (no draw
            repeats). Without effect unless rollbacks restore random state (`GovernorConfig.rng`).
        max_retries: Rollbacks allowed within `retry_window` steps before `RetryBudgetExceeded` ends the run.
        retry_window: In steps judged, undone ones included.

    Raises:
        InvalidConfig: A value out of range.
    """

    first: Literal["replay", "skip"] = "replay"
    skip_further: int = 0
    widen: float = 2.0
    most_further: int = 500
    go_back: int = 0
    skips_before_older: int = 2
    cool_lr: float = 0.5
    warm_steps: int = 100
    cool_after: int = 2
    cool_window: int = 1000
    moments: Moments = "keep"
    damp: float = 0.1
    rng: AfterReturn = "restore"
    max_retries: int = 20
    retry_window: int = 1000

    def __post_init__(self) -> None:
        _choice(self, "first", ("replay", "skip"))
        _choice(self, "moments", ("keep", "reset", "damp"))
        _choice(self, "rng", ("restore", "rekey"))
        for name in ("warm_steps", "cool_after", "cool_window", "max_retries", "retry_window"):
            _at_least(self, name, 1)
        for name in ("skip_further", "most_further", "go_back", "skips_before_older"):
            _at_least(self, name, 0)
        if self.most_further < self.skip_further:
            raise _bad(self, "most_further", f"at least skip_further={self.skip_further}")
        for name in ("widen", "cool_lr", "damp"):
            _a_number(self, name)
        if not 1.0 <= self.widen < math.inf:
            raise _bad(self, "widen", "a factor of at least 1")
        if not 0.0 < self.cool_lr <= 1.0:
            raise _bad(self, "cool_lr", "a factor in (0, 1]")
        if not 0.0 <= self.damp <= 1.0:
            raise _bad(self, "damp", "a factor in [0, 1]")


@dataclass(frozen=True, kw_only=True, slots=True)
class GovernorConfig:
    """Settings of one governor. The defaults need no tuning for a loop that uses `watch` and `step`.

    Attributes:
        mode: ``"act"`` rolls back by itself; ``"observe"`` judges and logs and touches nothing.
        cadence: Optimizer steps between automatic snapshots; ``"auto"``: as few as cost no more than 1 % of the
            measured time of the steps, but never fewer than the slots allow. Incidents then depend on the clock.
        probation: Healthy steps that must follow a snapshot before it is certified.
        slots: Snapshots held at once, each as large as the train state. None: as many as cadence and probation need,
            2 + ceil(probation / cadence); where verdicts arrive late (`context` barrier), probation counts 3 more.
        host_slots: Further snapshots in main memory, drained from those on a device, so that a rollback can go further
            back. None: up to 3, as far as a quarter of the available memory (or `host_budget`) holds them. For a
            train state in main memory: further slots there; None: none.
        reach: How many steps back the ring shall reach where it has slots to spare: they thin out with age.
        tier: ``"device"`` or ``"host"``: where snapshots of a train state on a device are held. None: on the device if
            that leaves 15 % of it free above the peak so far, else in page-locked main memory.
        device_budget: Bytes that all slots on one device may take together, instead of that rule. Notes (`past_steps`)
            count as well, and are there whatever the budget: slots have what they leave.
        host_budget: The same in main memory; None: what is available.
        scrub_every: Steps from one idle slot that is read again, and compared with its digest, to the next; 0: never.
        keep_batches: Delivered batches that `watch` keeps for a replay. None: those of `num_kept_steps` steps.
        rng: Global random state (Python, NumPy, torch): ``"restore"`` it with the rest, ``"fork"`` it (re-key, so that
            no draw repeats), or ``"keep"`` it as it runs. None: restore with one live governor in the process, keep
            as soon as there are several.
        on_veto: What follows a non-finite gradient once its step was refused: ``"rollback"`` (exact) or ``"keep"`` (go
            on from the refused step; BatchNorm statistics and random state have moved). See docs/veto.md.
        check_weights_every: Look for non-finite weights every that many steps (and before every snapshot).
        update_ratio_every: Measure the sign ``update_ratio`` every that many steps: how far a step has moved the
            weights, in L2 norms of theirs. The weights are held twice during such a step. 0: never.
        by_group: Gradient norms (and update ratios) of each parameter group as well, as signs ``grad_norm/<group>``.
        reexecute_every: Run the steps since the last snapshot again when they include a multiple of this number, and
            compare the results bit for bit (see docs/guarantees.md, Re-execution). 0: never.
        past_steps: How many steps `step_back` can go back at most: a note is taken after each. All optimizers are of
            `tolaria.optim`, with at least as much `history` (docs/optim.md). 0: none.
        past_first: Answer a panic from a note first, where one is from before its onset: as few steps are lost as can
            be, but the state was in no probation. If the panic returns, everything is as without. Needs `watch`.
        strict: Raise `StaleGradients` instead of dropping gradients whose backward straddled a rollback.
        recovery: What follows a panic.
        barrier: How device work is ordered: ``"context"`` (raises where this machine has no context-wide events),
            ``"streams"`` (only the known streams of this model: neighbours on the device do not wait; see
            docs/environments.md for what it cannot cover) or ``"blocking"``. None: ``"context"`` if there is such a
            thing, else ``"blocking"``. Without effect for a train state on the CPU.
        copy_path: How bytes move between the train state and slots on the same accelerator: ``"kernel"`` (one compiled
            kernel), ``"foreach"`` (torch's multi-tensor copy, which works everywhere), ``"graph"`` (a CUDA graph of
            copies) or ``"batch"`` (the copy engines, beside whatever computes). None: the kernel, unless another one
            is measured to be faster; what was chosen and why is in `capabilities()`. Notes (`past_steps`) always
            take the kernel, or ``"foreach"`` where there is none.
        gate_timeout_s: Seconds a snapshot or rollback waits for open sections before `QuiesceTimeout`.
        ledger: Path of a JSON-lines file, one line per incident; None writes none.
        writer: A TensorBoard `SummaryWriter` of yours: gets incidents as text, vital signs and counts of rollbacks as
            scalars (docs/recovery.md). Flushed and closed by you.
        write_every: Steps from one set of scalars to the next.
        on_incident: Called with each `Incident` on the thread that rolled back; errors in it are logged, not raised.
        env_id: The caller's number for this model or environment, for incidents and reports.
        penalty: What a rollback costs the agent that controls this training, in units of its reward (so not positive,
            as a rule); handed on as `RollbackReport.penalty`, see `Trajectories.charge`.
    """

    mode: Mode = "act"
    cadence: int | Literal["auto"] = 10
    probation: int = 10
    slots: int | None = None
    host_slots: int | None = None
    reach: int = 300
    tier: TierChoice | None = None
    device_budget: int | None = None
    host_budget: int | None = None
    scrub_every: int = 100
    keep_batches: int | None = None
    rng: RngPolicy | None = None
    on_veto: OnVeto = "rollback"
    check_weights_every: int = 1
    update_ratio_every: int = 0
    by_group: bool = False
    reexecute_every: int = 0
    past_steps: int = 0
    past_first: bool = False
    strict: bool = False
    recovery: Recovery = field(default_factory=Recovery)
    barrier: BarrierChoice | None = None
    copy_path: CopyPathChoice | None = None
    gate_timeout_s: float = 60.0
    ledger: str | None = None
    writer: Writer | None = None
    write_every: int = 10
    on_incident: Callable[[Any], None] | None = None
    env_id: int = 0
    penalty: float = 0.0

    def __post_init__(self) -> None:
        _choice(self, "mode", ("act", "observe"))
        _choice(self, "rng", ("restore", "fork", "keep", None))
        _choice(self, "on_veto", ("rollback", "keep"))
        _choice(self, "barrier", ("context", "streams", "blocking", None))
        _choice(self, "tier", ("device", "host", None))
        _choice(self, "copy_path", ("kernel", "foreach", "graph", "batch", None))
        for name in ("check_weights_every", "write_every"):
            _at_least(self, name, 1)
        if not isinstance(self.recovery, Recovery):
            raise _bad(self, "recovery", "a Recovery")
        if self.writer is not None and not all(hasattr(self.writer, name) for name in ("add_scalar", "add_text")):
            raise _bad(self, "writer", "a SummaryWriter, with add_scalar and add_text")
        if self.cadence != "auto":
            _at_least(self, "cadence", 1)
        for name in ("probation", "reach", "scrub_every", "update_ratio_every", "reexecute_every", "past_steps"):
            _at_least(self, name, 0)
        for name in ("slots", "keep_batches", "device_budget", "host_budget"):
            if getattr(self, name) is not None:
                _at_least(self, name, 1)
        if self.host_slots is not None:
            _at_least(self, "host_slots", 0)
        if self.past_first and not self.past_steps:
            raise _bad(self, "past_first", "past_steps of 1 or more with it")
        for name in ("penalty", "gate_timeout_s"):
            _a_number(self, name)
        if not math.isfinite(self.penalty):
            raise _bad(self, "penalty", "a finite number")
        if not self.gate_timeout_s > 0.0:
            raise _bad(self, "gate_timeout_s", "a positive number of seconds")
        if self.slots is not None and self.slots < self._fewest_slots:
            raise _bad(
                self,
                "slots",
                f"at least {self._fewest_slots} with probation={self.probation}: the last certified snapshot, one in "
                "probation, and one to write into",
            )

    @property
    def _fewest_slots(self) -> int:
        return 3 if self.probation else 2

    def num_slots(self, lag: int = 0) -> int:
        """Slots of the ring: the number asked for, or what cadence and probation need if verdicts come `lag` late."""
        return self.slots or 2 + math.ceil((self.probation + lag) / self._wanted_cadence(lag))

    def _wanted_cadence(self, lag: int) -> int:
        """`cadence`; where it follows the clock, the smallest for which 3 slots do."""
        return max(1, self.probation + lag) if self.cadence == "auto" else self.cadence

    def effective_cadence(self, lag: int = 0) -> int:
        """`cadence`, stretched until no snapshot in probation would have to be overwritten in a ring of `num_slots`."""
        if not self.probation + lag or self.num_slots(lag) <= 2:
            return self._wanted_cadence(lag)
        return max(self._wanted_cadence(lag), math.ceil((self.probation + lag) / (self.num_slots(lag) - 2)))

    def num_kept_steps(self, lag: int = 0, cadence: int | None = None) -> int:
        """Steps whose batches are kept: twice what a rollback can reach back to (probation and two cadences).

        `cadence`: in force, where it follows the clock. Where verdicts come late, by `lag` as a rule: and those that
        may be outstanding. Where a rollback is to go further back (`Recovery.go_back`): and those.
        """
        cadence = self.effective_cadence(lag) if cadence is None else cadence
        reaching = 2 * (self.probation + 2 * cadence) + self.recovery.go_back
        return reaching + (MOST_OUTSTANDING if lag else 0)


def _choice(settings: object, name: str, allowed: tuple[object, ...]) -> None:
    if getattr(settings, name) not in allowed:
        raise _bad(settings, name, "one of " + ", ".join(repr(value) for value in allowed))


def _at_least(settings: object, name: str, least: int) -> None:
    value = getattr(settings, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise _bad(settings, name, f"a whole number of at least {least}")


def _a_number(settings: object, name: str) -> None:
    value = getattr(settings, name)
    if isinstance(value, (bool, str, bytes)) or not hasattr(value, "__float__"):  # NumPy has numbers of its own
        raise _bad(settings, name, "a number")


def _bad(settings: object, name: str, expected: str) -> InvalidConfig:
    return InvalidConfig(
        f"building {type(settings).__name__}",
        f"{name}={getattr(settings, name)!r}, expected {expected}",
        "Correct the value; nothing was attached.",
    )

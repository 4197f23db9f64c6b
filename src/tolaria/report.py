"""REPORT: what callers get back of a snapshot or rollback, and the ledger of incidents."""

from __future__ import annotations

import functools
import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from tolaria.config import Writer
from tolaria.errors import PhaseError, RollbackDisturbed, SnapshotRejected, UsageError
from tolaria.records import SCHEMA_VERSION, Health, Incident, Statistics, Verdict, VitalSigns

logger = logging.getLogger("tolaria")

_ALL_SIGNS = tuple(one.name for one in fields(VitalSigns) if one.name != "step")
_SIGNS = ("loss", "grad_norm", "nonfinite_gradients", "nonfinite_weights", "metric")
_COUNTS = ("rollbacks", "steps_lost", "vetoes", "skipped_batches", "replayed_batches")


@dataclass(slots=True, eq=False, kw_only=True)
class SnapshotInfo:
    """A handle to one snapshot.

    Attributes:
        step: Optimizer steps completed when it was taken; None while the request is pending.
        bytes: Tensor bytes held.
        tier: ``"host"`` or ``"device"``: where it was taken into; `held` tells where it is by now.
    """

    step: int | None
    bytes: int
    tier: str
    serial: int = -1
    _state: Callable[[int], str] = field(repr=False)
    _wait: Callable[[int, Any, str], None] = field(repr=False)
    _held: Callable[[int], tuple[str, ...]] = field(default=lambda _: (), repr=False)
    _done: Any = field(default=(), repr=False)

    @classmethod
    def nothing(cls) -> SnapshotInfo:
        """The handle of a snapshot that was not taken (observe mode, or disabled): its state is ``dropped``."""
        return cls(step=None, bytes=0, tier="none", serial=0, _state=lambda _: "dropped", _wait=lambda *_: None)

    @property
    def state(self) -> str:
        """``pending``, ``staged``, ``sealed``, ``certified``, or ``dropped`` (overwritten, rejected or undone)."""
        return self._state(self.serial) if self.serial >= 0 else "pending"

    @property
    def held(self) -> tuple[str, ...]:
        """The tiers that hold it now, the fastest first; empty when it is held no more."""
        return self._held(self.serial)

    def wait(self, until: str = "staged") -> SnapshotInfo:
        """Block until it is ``"staged"`` (its bytes are copied) or ``"sealed"`` (finite, digest taken).

        Raises:
            SnapshotRejected: It is not held any more: not finite (a manual one is kept all the same), overwritten, or
                undone.
            PhaseError: The request is still pending, so waiting on this thread could never end.
            UsageError: Another word in `until`.
        """
        if self.serial < 0:
            raise PhaseError("waiting for a snapshot", "the request is pending", "Wait after the next boundary.")
        if until not in ("staged", "sealed"):
            raise UsageError("waiting for a snapshot", f"until={until!r}, expected 'staged' or 'sealed'", "Correct it.")
        self._wait(self.serial, self._done, until)
        return self


@dataclass(slots=True, eq=False, kw_only=True)
class RollbackReport:
    """What a rollback did.

    Attributes:
        success: The restore was validated and submitted in order (True also before `wait`); False while pending and
            where nothing was done.
        status: ``pending`` (queued for the next boundary), ``submitted``, ``done``, ``disturbed`` (somebody wrote what
            was being restored), or ``failed`` (nothing touched).
        env_id: The caller's number for this environment or model.
        reason: Why.
        snapshot_step: Step of the snapshot restored; None while pending or failed.
        tier: Where that snapshot was: ``device`` or ``host``.
        certified: It was certified (False: vouched for by its caller).
        panic_step: Steps completed when the rollback was asked for.
        steps_lost: Optimizer steps undone.
        optimizer: ``restored``, ``reset`` (given only here, so its state was cleared), or ``none``.
        barrier: Barrier kind used.
        host_ms: Host time of the call in milliseconds, waiting for open sections included.
        wait_ms: The part of it spent waiting for open sections.
        corrupted_steps: Steps of newer snapshots that were found corrupted and passed over.
        device_ms: Milliseconds from the first copy to the last on the slowest device; None until `wait`, and where the
            host waited, so that `host_ms` holds them.
        verified: What was restored is what was captured: read back, its digest equals the one taken when the snapshot
            was sealed. Where nothing was read back (`host` and `blocking`, unless ``verify="after"``), `wait` compares
            the slot itself. None until looked at.
        penalty: What it costs the agent that controls this training (`GovernorConfig.penalty`); 0 unless it succeeded.
    """

    success: bool
    status: str
    env_id: int = 0
    reason: str = ""
    snapshot_step: int | None = None
    tier: str = "none"
    certified: bool = False
    panic_step: int = 0
    steps_lost: int = 0
    optimizer: str = "none"
    barrier: str = "host"
    host_ms: float = 0.0
    wait_ms: float = 0.0
    corrupted_steps: tuple[int, ...] = ()
    device_ms: float | None = None
    verified: bool | None = None
    penalty: float = 0.0
    _finish: Callable[[], tuple[float | None, bool | None, bool]] | None = field(default=None, repr=False)

    def wait(self) -> RollbackReport:
        """Block until the copies are done and, where it can be told, verified (see there).

        Raises:
            SnapshotRejected: The bytes of the snapshot had changed: what was restored is not what was captured.
            RollbackDisturbed: They had not, but something else was read back. The next `step` rolls back once more.
            PhaseError: The request is still pending.
        """
        if self.status == "pending":
            raise PhaseError("waiting for a rollback", "the request is pending", "Wait after the next boundary.")
        if self._finish is not None:
            finish, self._finish = self._finish, None
            self.device_ms, self.verified, was_disturbed = finish()
            self.status = "disturbed" if was_disturbed else "done"
        if self.status == "disturbed":
            raise disturbed(self.snapshot_step)
        if self.verified is False:
            raise SnapshotRejected(
                "verifying a rollback",
                f"the bytes of the snapshot of step {self.snapshot_step} changed since they were sealed",
                'The train state was restored from them: roll back again with verify="before".',
            )
        return self


def disturbed(step: int | None) -> RollbackDisturbed:
    """The error for a rollback that somebody has written into."""
    return RollbackDisturbed(
        "verifying a rollback",
        f"the train state does not read back as the snapshot of step {step}, whose own bytes are as they were sealed: "
        "a writer outside of any section, expected none",
        "Put that writer into `with governor.using():`, and roll back again.",
    )


def incident_line(incident: Incident) -> str:
    """One JSON object on one line, with `schema_version`; non-finite numbers become strings."""
    return json.dumps({"schema_version": SCHEMA_VERSION, **_plain(asdict(incident))}, allow_nan=False)


def _copied(sign: Any) -> Any:
    return dict(sign) if isinstance(sign, Mapping) else sign


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return value


def incident_of(
    vital: VitalSigns,
    verdict: Verdict,
    action: str,
    report: RollbackReport | None,
    batches: tuple[int, int],
    note: str,
    barrier: str,
    env_id: int = 0,
) -> Incident:
    """One panic as a record.

    Args:
        vital: The signs of its step.
        verdict: The judgement.
        action: What follows, see `Incident`.
        report: Of the rollback; None where there was none.
        batches: How many will be delivered again, and how many will not.
        note: Anything unusual.
        barrier: Barrier kind in use.
        env_id: Of the environment or model, where there is no report that tells it.
    """
    if report is not None and report.corrupted_steps:
        note = "; ".join(filter(None, (note, f"corrupted snapshots passed over: {list(report.corrupted_steps)}")))
    return Incident(
        step=vital.step,
        onset=vital.step if verdict.onset is None else verdict.onset,
        reason=verdict.reason,
        signs={name: _copied(value) for name in _ALL_SIGNS if (value := getattr(vital, name)) is not None},
        evidence=dict(verdict.evidence),
        action=action,
        restored_step=None if report is None else report.snapshot_step,
        certified=report is not None and report.certified,
        tier="none" if report is None else report.tier,
        steps_lost=0 if report is None else report.steps_lost,
        batches_replayed=batches[0],
        batches_skipped=batches[1],
        rollback_ms=0.0 if report is None else report.host_ms,
        barrier=barrier,
        env_id=env_id if report is None else report.env_id,
        note=note,
    )


class Board:
    """Writes incidents, vital signs and counts to a TensorBoard writer of the user's. Tags begin with ``tolaria/``.

    Steps are those of the governor: a step that is made again is written again.

    Args:
        writer: Anything with `add_scalar` and `add_text` of a `SummaryWriter`.
        every: Steps from one set of scalars to the next.
    """

    def __init__(self, writer: Writer, every: int) -> None:
        self._writer, self._every = writer, every

    @classmethod
    def of(cls, writer: Writer | None, every: int) -> Board | None:
        """None for nobody."""
        return None if writer is None else cls(writer, every)

    def watch(self, vital: VitalSigns, verdict: Verdict, statistics: Callable[[], Statistics]) -> None:
        """The signs of a judged step, if it is one of those to be written or not healthy."""
        if vital.step % self._every and verdict.health is Health.HEALTHY:
            return
        named = {name: getattr(vital, name) for name in _SIGNS}
        for name, value in {**named, **vital.extra}.items():
            if value is not None:
                self._writer.add_scalar(f"tolaria/signs/{name}", float(value), vital.step)
        self._count(vital.step, statistics())

    def tell(self, incident: Incident, statistics: Statistics) -> None:
        """One incident as text, and what it comes to in all."""
        self._writer.add_text("tolaria/incidents", f"```json\n{incident_line(incident)}\n```", incident.step)
        self._count(incident.step, statistics)

    def _count(self, step: int, statistics: Statistics) -> None:
        for name in _COUNTS:
            self._writer.add_scalar(f"tolaria/{name}", float(getattr(statistics, name)), step)


class Ledger:
    """Where incidents go: one warning line in the log, one line in the file, the board, one call of the user's sink.

    Args:
        path: JSON-lines file, created with the first incident, appended to, flushed line by line; None for none.
        sink: Called with each incident; an error in it is logged, never raised.
        board: Shows them in TensorBoard; None for nobody. After an error there, which is logged, it gets no more signs.
    """

    def __init__(self, path: str | None, sink: Callable[[Incident], None] | None, board: Board | None = None) -> None:
        self._path, self._sink, self._board = path, sink, board
        self._watching = board

    def watch(self, vital: VitalSigns, verdict: Verdict, statistics: Callable[[], Statistics]) -> None:
        """One judged step. Never raises."""
        if self._watching is None:
            return
        try:
            self._watching.watch(vital, verdict, statistics)
        except Exception:
            self._watching = None
            logger.exception("vital signs could not be written, and none are from here on")

    def write(self, incident: Incident, statistics: Callable[[], Statistics]) -> None:
        """Report one incident. Never raises: a full disk must not end a run that was just saved."""
        if logger.isEnabledFor(logging.WARNING):
            logger.warning("%s", describe(incident))
        shown = None if self._board is None else functools.partial(self._board.tell, statistics=statistics())
        for tell in (self._append, shown, self._sink):
            try:
                if tell is not None:
                    tell(incident)
            except Exception:
                logger.exception("an incident could not be reported")

    def _append(self, incident: Incident) -> None:
        if self._path is not None:
            path = Path(self._path)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(incident_line(incident) + "\n")


def describe(incident: Incident) -> str:
    """One clear line for people."""
    signs = ", ".join(
        f"{name} {incident.signs[name]:.4g}" for name in ("loss", "grad_norm") if incident.signs.get(name) is not None
    )
    head = f"step {incident.step}: {incident.reason}" + (f" ({signs})" if signs else "")
    if incident.restored_step is None:
        return f"{head}; {incident.action}, nothing was restored" + (f"; {incident.note}" if incident.note else "")
    tail = (
        f"rolled back to step {incident.restored_step} in {incident.rollback_ms:.1f} ms, "
        f"{incident.steps_lost} steps lost, {incident.action}"
    )
    data = f", {incident.batches_replayed} batches again, {incident.batches_skipped} skipped"
    return f"{head}; {tail}{data}" + (f"; {incident.note}" if incident.note else "")

"""KEEPER: takes, seals, certifies and restores snapshots of one train state. Decides nothing about training.

It joins the sans-I/O protocol, the driver, slot memory and the sections of one model. `governor` decides when.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from torch.optim import Optimizer

from tolaria import budget, capture, moments, protocol, ring
from tolaria.arrivals import Arrivals
from tolaria.attach import Sections, current_backward
from tolaria.backlog import Backlog
from tolaria.barriers import Ground
from tolaria.config import GovernorConfig, Moments
from tolaria.device import DeviceSet, QueuedDevice
from tolaria.driver import Driver
from tolaria.errors import BudgetExceeded, PhaseError, SlotsBusy, SnapshotRejected
from tolaria.notes import Notes, lay_first_plan
from tolaria.observe import Clock
from tolaria.operations import Barrier, Events, HostState, Inspection, Protocol, SectionKind
from tolaria.paths import Paths
from tolaria.protocol import RolledBack, Taken
from tolaria.records import Journal, Statistics
from tolaria.report import RollbackReport, SnapshotInfo, disturbed
from tolaria.ring import Ring, Slot
from tolaria.shield import Shield
from tolaria.snapshot import Vault
from tolaria.state.leaves import Storage, is_page_locked
from tolaria.state.train_state import TrainState
from tolaria.target import Target, chooser
from tolaria.values import replace

logger = logging.getLogger("tolaria")

_MOST_ATTEMPTS = 3  # at a rollback that does not read back as its snapshot
_MOST_DRAINED = 3  # slots of main memory for snapshots that are drained from devices, unless asked for otherwise

READING_LAG = 3
"""Steps by which verdicts trail behind on a device that is not waited for, as a rule."""


@dataclass(slots=True, eq=False)
class Request:
    """A snapshot or rollback that waits for a boundary.

    Attributes:
        run: Does it, and fills in the receipt that its caller already holds.
        after_step: Only right after an optimizer step (a snapshot); a rollback may run between any two sections.
    """

    run: Callable[[], None]
    after_step: bool


class Keeper:
    """Snapshots of one train state.

    Args:
        state: The train state. Surveyed once here, so that unsupported tensors are refused before anything is attached.
        config: Slots, time-outs, strictness.
        with_rng: Whether snapshots hold global random state, asked at each capture.
        read_journal: The governor's counters and detector states, as immutable values; told whether gradients are held.
        write_journal: Takes them back at a rollback.
        count: Adds to the governor's statistics by name, from any thread.

    Raises:
        UnsupportedState, BudgetExceeded: Nothing was attached.
    """

    def __init__(
        self,
        state: TrainState,
        config: GovernorConfig,
        with_rng: Callable[[], bool],
        read_journal: Callable[[bool], Journal],
        write_journal: Callable[[Journal], None],
        count: Callable[..., None],
    ) -> None:
        survey = state.survey()
        devices = DeviceSet(config.barrier)
        devices.open(_places(survey.leaves.storages))
        moments.refuse_unknown((part.optimizer for part in state.optimizers), config.recovery.moments)
        self.state, self.config, self.devices = state, config, devices
        self.accelerators = [torch.device(name) for name, port in devices.items() if port.barrier is not Barrier.HOST]
        reach = config.reach if not self.accelerators and config.host_slots else 0
        self.ground = Ground(devices.barrier, config.gate_timeout_s, reach=reach, drained_reach=config.reach)
        self.lag = READING_LAG if self.reads_late else 0
        slots, room = _layout(config, self.lag, bool(self.accelerators))
        paths = Paths(config.copy_path)
        self.vault = Vault(state, [s.tier for s in slots], devices, room, with_rng, read_journal, write_journal, paths)
        known = () if devices.barrier is Barrier.STREAMS else None
        self.driver = Driver(HostState(ring=slots, streams=known), self.vault, devices)
        self.arrivals = Arrivals(self.driver, self.vault, self.ground)
        self.backlog = Backlog(
            self.driver,
            self.ground,
            lambda: self.vault.plan.host_slots,
            config.scrub_every,
            lambda slot: count(snapshots_corrupted=1),
            lambda: count(snapshots_drained=1),
        )
        stale = functools.partial(count, stale_vetoes=1)
        self.sections = Sections(self.driver, state, config.gate_timeout_s, config.strict, self.run_requests, stale)
        self.notes: Notes | None = None
        if config.past_steps and config.mode == "act":
            optimizers = [part.optimizer for part in state.optimizers]
            self.notes = Notes(self.vault, self.driver, optimizers, config.past_steps, self.sections.count_foreign)
        # an estimate: optimizer state does not exist yet, and comes on top
        lay_first_plan(self.vault, self.notes, survey)
        self._requests: deque[Request] = deque()
        self._stepping: set[int] = set()
        self.before_manual: Callable[[], None] = lambda: None  # may wait, and may raise: then nothing is taken

    @property
    def reads_late(self) -> bool:
        """Whether digests, finite checks and vital signs arrive after the call that asked for them."""
        return self.ground.barrier.has_events

    @property
    def clocks(self) -> dict[str, Clock]:
        """The devices that numbers can be sent from without waiting."""
        return {name: cast("Clock", port) for name, port in self.devices.items() if port.barrier.has_events}

    @property
    def ring(self) -> Ring:
        """The slots as they are now."""
        return self.driver.state.ring

    def attach(self, model: nn.Module, optimizers: Sequence[Optimizer], methods: tuple[str, ...]) -> None:
        """Make forwards and optimizer steps sections."""
        self.sections.attach_module(model, methods)
        if any(device.type == "cuda" for device in self.accelerators):
            self.sections.attach_graphs()
        for optimizer in optimizers:
            self.sections.attach_optimizer(optimizer)

    def close(self) -> None:
        """Detach and free everything."""
        self.sections.detach()
        self.backlog.close()
        if self.notes is not None:
            self.notes.close()
        self.vault.close()

    # ------------------------------------------------------------ boundaries

    def is_inside(self) -> bool:
        """Whether the calling thread is inside a section or a backward pass."""
        return self.driver.depth() > 0 or current_backward() != -1

    def require_boundary(self, doing: str) -> None:
        """Raise `PhaseError` inside a section or a backward pass."""
        if current_backward() != -1:
            raise protocol.refuse_in_autograd(doing)
        if self.driver.depth():
            raise PhaseError(
                doing,
                "it was called from inside one of this thread's own sections (a forward or optimizer hook, or "
                "`using()`); expected a boundary between two steps",
                'Pass when="boundary" to have it done when the section closes.',
            )

    def require_dead_gradients(self, doing: str) -> None:
        """Raise `PhaseError` when a backward ran since the last optimizer step and its gradients are alive."""
        state = self.driver.state
        if state.captures:  # the request will be refused for that; reading gradients now would invalidate the capture
            return
        if (state.running or state.grad_epoch is not None) and self.state.has_live_gradients():
            raise PhaseError(
                doing,
                "a backward ran since the last optimizer step and its gradients are alive; expected a clean boundary",
                'Step or zero the gradients first, or pass grads="capture" (hold them too) or grads="drop".',
            )

    def request(self, run: Callable[[], None], *, after_step: bool) -> None:
        """Queue something for the next boundary of any thread."""
        self._requests.append(Request(run, after_step))

    @contextlib.contextmanager
    def whole_step(self) -> Generator[None]:
        """Sections that the calling thread opens inside are parts of one step: boundaries are before and after it."""
        thread = threading.get_ident()
        self._stepping.add(thread)
        try:
            yield
        finally:
            self._stepping.discard(thread)

    def run_requests(self, after_step: bool) -> None:
        """Run what was queued, in order, if the calling thread is at a boundary. Errors are the boundary's to raise."""
        capture.drain()
        if not self._requests or self.is_inside() or threading.get_ident() in self._stepping:
            return
        if self.driver.state.captures:  # at the boundary after it
            return
        for _ in range(len(self._requests)):
            try:
                request = self._requests.popleft()
            except IndexError:  # another thread reached its boundary first
                return
            if request.after_step and not after_step:
                self._requests.append(request)
            else:
                request.run()

    # ------------------------------------------------------------ snapshots

    def take(
        self, shield: Shield, step: int | None, *, manual: bool, gradients: bool = False
    ) -> tuple[SnapshotInfo, Inspection | None]:
        """Stage and seal one snapshot on the calling thread.

        Args:
            shield: Holds signals back until the caller has noted the result as well.
            step: Its step number; None: the optimizer steps completed.
            manual: Vouched for by the user.
            gradients: Hold live gradients too.

        Returns:
            The handle and what sealing found; None when the slot had moved on meanwhile.
        """
        if manual:
            self.before_manual()
        found = None
        wanted = threading.get_ident(), self.ground, step, manual, gradients
        if self.reads_late:
            taken = self._stage(lambda: self.driver.submit(protocol.snapshot(*wanted), shield), manual)
            self.arrivals.expect_seal(taken, manual)
        else:
            # one submission: an interrupt in between would leave a candidate that is never sealed
            taken, found = self.driver.submit(protocol.snapshot_and_seal(*wanted), shield)
        return self.info(taken), found

    def _stage(self, submit: Callable[[], Taken], manual: bool) -> Taken:
        tier = self.vault.plan.tier
        try:
            return submit()
        except BudgetExceeded:
            if self.vault.plan.tier is tier:
                raise
            return submit()  # the devices turned out to be full; main memory is next
        except SlotsBusy:
            if not manual or not self.arrivals.are_unsealed:
                raise
            # a caller in a hurry: candidates may turn out to be good or bad once they are read
            self.arrivals.seal(wait=True)
            return submit()

    def info(self, taken: Taken | None) -> SnapshotInfo:
        """A handle for what was taken, or for a request."""
        return SnapshotInfo(
            step=taken.step if taken is not None else None,
            bytes=self.vault.num_bytes(taken.slot) if taken is not None else 0,
            tier=self.vault.plan.tier.value if taken is None else self.ring[taken.slot].tier.value,
            serial=taken.snapshot if taken is not None else -1,
            _state=self.phase_of,
            _held=self._held,
            _wait=self._wait,
            _done=taken.done if taken is not None else (),
        )

    def fill(self, receipt: SnapshotInfo, info: SnapshotInfo) -> None:
        """Complete the handle of a queued request."""
        receipt.step, receipt.bytes, receipt.serial, receipt._done = info.step, info.bytes, info.serial, info._done
        receipt.tier = info.tier

    def phase_of(self, serial: int) -> str:
        """The phase of the slot that holds a snapshot; ``dropped`` where none does."""
        slot = ring.by_serial(self.ring, serial)
        return slot.phase.value if slot is not None else "dropped"

    def _held(self, serial: int) -> tuple[str, ...]:
        held = [slot for slot in self.ring if slot.snapshot == serial and slot.phase in ring.READABLE]
        return tuple(dict.fromkeys(slot.tier.value for slot in held))

    def with_held(self, statistics: Statistics) -> Statistics:
        """The statistics together with the steps of the snapshots that are held now."""
        held = {
            tier: tuple(sorted(slot.step for slot in self.ring if slot.tier is tier and slot.phase in ring.READABLE))
            for tier in ring.Tier
        }
        return replace(statistics, held_on_device=held[ring.Tier.DEVICE], held_on_host=held[ring.Tier.HOST])

    def _wait(self, serial: int, done: Events, until: str) -> None:
        self.wait_for(done)
        if until == "sealed":
            self.arrivals.seal(wait=True)
        if until == "sealed" and self.phase_of(serial) == "dropped":
            raise SnapshotRejected(
                "waiting for a snapshot to be sealed",
                "it is not held any more: it was not finite, was overwritten, or was undone by a rollback",
                "Take another one from a healthy state.",
            )

    def wait_for(self, events: Events) -> None:
        """Block the host until all of them have passed."""
        for name, event in events:
            cast("QueuedDevice", self.devices[name]).host_wait(event)

    def certify(self, taken: SnapshotInfo) -> None:
        """Certify a sealed snapshot at once."""
        slot = ring.by_serial(self.ring, taken.serial)
        if slot is not None:
            index = slot.index
            self.driver.change(lambda s: (_with_ring(s, ring.certify(s.ring, index, taken.serial)), None))

    def give_up(self, wanted: Callable[[Slot], bool]) -> None:
        """Free the slots that fulfil a condition and can be read; nothing goes back to them any more."""

        def change(state: HostState) -> tuple[HostState, None]:
            slots = state.ring
            for slot in slots:
                if slot.phase in ring.READABLE and wanted(slot):
                    slots = ring.release(slots, slot.index, slot.snapshot)
            return _with_ring(state, slots), None

        self.driver.change(change)

    def advance(self, step: int) -> None:
        """A healthy step: probation of every candidate taken before it goes on, once the last rollback is verified."""
        if self.arrivals.is_unverified:
            return
        probation = self.config.probation
        self.driver.change(lambda s: (_with_ring(s, ring.advance(s.ring, probation, step)), None))

    def suspend(self) -> None:
        """A suspect step: probation begins again."""
        self.driver.change(lambda s: (_with_ring(s, ring.suspend(s.ring)), None))

    # ------------------------------------------------------------ rollbacks

    def restore(
        self,
        shield: Shield,
        report: RollbackReport,
        *,
        completed: Callable[[], int],
        to: Target = None,
        generations_back: int = 0,
        onset: int | None = None,
        steps_back: int = 0,
        optimizer: Optimizer | None = None,
        verify_before: bool = False,
        patient: bool = False,
        read_back: bool = False,
        routine: bool = False,
    ) -> RolledBack:
        """Restore a snapshot and fill in `report`.

        Args:
            shield: Holds signals back until the caller has noted the result as well.
            report: Filled in on success; on an error its status stays ``failed``.
            completed: Asked after the restore: optimizer steps completed when it took place.
            to: A snapshot, the step of one, or None for the newest good one.
            generations_back: With `to` None: that many good snapshots further back, as far as there are any.
            onset: With `to` None: only snapshots from before this step, if there is one. A manual one may have been
                taken after a bad step whose verdict had not arrived.
            steps_back: And at least that many steps before it, as far as there are any.
            optimizer: Cleared in the same critical section if it is not governed.
            verify_before: Check digests before the first write.
            patient: Wait for graph captures of other threads to end.
            read_back: Read what was restored, and compare it with the snapshot. Where that takes no time of the host
                (`context`), it is always done.
            routine: Nothing was wrong: candidates keep the probation that they had by then.

        Raises:
            RollbackDisturbed: Again and again something else was read back than was restored.
        """
        governed = [part.optimizer for part in self.state.optimizers]
        foreign = optimizer is not None and all(optimizer is not one for one in governed)
        started = time.perf_counter()
        submit = functools.partial(
            protocol.rollback,
            threading.get_ident(),
            self.ground,
            doing="rolling back",
            reset=(optimizer,) if foreign else (),
            patient=patient,
            read_back=read_back or self.reads_late,
            routine=routine,
        )
        choose = chooser(to, generations_back, onset, steps_back)
        done = self._submit(shield, submit(choose=choose, verify_before=verify_before))
        panic_step = completed()
        done, verified = self._verified_now(shield, done, submit)
        self.arrivals.forget_after(done.slot.snapshot)
        if self.notes is not None:
            self.notes.forget()
        report.host_ms = (time.perf_counter() - started) * 1e3
        report.success, report.status, report.verified = True, "submitted", verified
        report.snapshot_step, report.tier = done.slot.step, done.slot.tier.value
        report.certified = done.slot.phase is ring.SlotPhase.CERTIFIED
        report.panic_step = panic_step
        report.steps_lost = max(0, report.panic_step - done.slot.step)
        report.optimizer = "reset" if foreign else "restored" if governed else "none"
        report.barrier, report.penalty = self.ground.barrier.value, self.config.penalty
        report.wait_ms = done.waited_s * 1e3
        report.corrupted_steps = done.corrupted
        report._finish = lambda: (self._duration(done), *self._verify(done, verified))
        return done

    def treat_moments(self, how: Moments) -> None:
        """Change the moments that a rollback has restored, as a registered writer.

        So it stands behind the reading back of what was restored, and before whatever comes next.
        """
        if how != "keep":
            with self.sections.section(SectionKind.FOREIGN):
                moments.treat((part.optimizer for part in self.state.optimizers), how, self.config.recovery.damp)

    def _submit(self, shield: Shield, rollback: Protocol) -> RolledBack:
        done: RolledBack = self.driver.submit(rollback, shield)
        if done.unread is not None:
            logger.warning(
                "the rollback to step %s was made, but what it restored could not be read back: %s: %s",
                *(done.slot.step, type(done.unread).__name__, done.unread),
            )
        if done.read_back and self.reads_late:
            self.arrivals.expect_read_back(done)
        return done

    def _verified_now(
        self, shield: Shield, done: RolledBack, rollback: Callable[..., Protocol]
    ) -> tuple[RolledBack, bool | None]:
        """Where nothing is late: compare what was restored with the snapshot, and do it again if it is not that."""
        passed_over = done.corrupted
        for _ in range(_MOST_ATTEMPTS):
            if not done.read_back or self.reads_late:
                return done, None
            seen = self.arrivals.judge(done, shield)
            if seen is None or seen.intact:
                return replace(done, corrupted=passed_over), None if seen is None else True
            if seen.corrupted:
                passed_over = (*passed_over, done.slot.step)
            serial = done.slot.snapshot

            def older(slots: Ring, before: int | None, limit: int = serial) -> Slot | None:
                return ring.newest_good(slots, limit + 1 if before is None else before)

            done = self._submit(shield, rollback(choose=older))
        raise disturbed(done.slot.step)

    def _duration(self, done: RolledBack) -> float | None:
        """Wait until the devices are done; answers the milliseconds that the slowest of them took to copy."""
        self.wait_for(done.done)
        return self.vault.duration_s(done.began, done.copied) * 1e3 if done.began else None

    def _verify(self, done: RolledBack, verified: bool | None) -> tuple[bool | None, bool]:
        """Whether what was restored is the snapshot (None: nobody can tell now); if not, whether it was disturbed."""
        if verified is not None or done.unread is not None or not self.sections.is_open:
            return verified, False
        if done.read_back:
            seen = self.arrivals.judge(done)
            return (None, False) if seen is None else (seen.intact, not (seen.intact or seen.corrupted))
        # not read back: whether the slot has the bytes that it was sealed with
        thread = threading.get_ident()
        found = self.driver.submit(protocol.reinspect(thread, done.slot.index, done.slot.snapshot, self.ground))
        return None if found is None else found.intact, False


def _with_ring(state: HostState, slots: Ring) -> HostState:
    return state if slots is state.ring else replace(state, ring=slots)


def _places(storages: Sequence[Storage]) -> set[torch.device]:
    """Devices that hold some of the state; where all is in page-locked host memory, the one that may be reading it."""
    found = {storage.key[0] for storage in storages} or {torch.device("cpu")}
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    on_host = all(device.type == "cpu" for device in found)
    if on_host and accelerator is not None and any(is_page_locked(storage.bytes) for storage in storages):
        found.add(torch.device(accelerator.type, torch.accelerator.current_device_index()))
    return found


def _layout(config: GovernorConfig, lag: int, with_devices: bool) -> tuple[Ring, budget.Request]:
    """The slots of the ring, and what is known of the memory that they may take."""
    num_slots = config.num_slots(lag)
    if with_devices:
        drained = _MOST_DRAINED if config.host_slots is None else config.host_slots
        # should the devices have no room for them, main memory takes the snapshots themselves
        slots = ring.empty_ring(max(num_slots, drained), num_slots)
    else:
        drained, num_slots = 0, num_slots + (config.host_slots or 0)
        slots = ring.empty_ring(num_slots)
    return slots, budget.Request({}, 0, num_slots, drained, config.tier, config.device_budget, config.host_budget)

"""KEEPER: takes, seals, certifies and restores snapshots of one train state. Decides nothing about training.

It joins the sans-I/O protocol, the driver, slot memory and the sections of one model. `governor` decides when.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import nn
from torch.optim import Optimizer

from tolaria import capture, memory, protocol, ring
from tolaria.attach import Sections, current_backward
from tolaria.config import GovernorConfig
from tolaria.device import DeviceSet, QueuedDevice
from tolaria.driver import Driver
from tolaria.errors import (
    BudgetExceeded,
    CaptureInProgress,
    DeviceLost,
    NoSnapshot,
    PhaseError,
    QuiesceTimeout,
    SlotsBusy,
    SnapshotRejected,
)
from tolaria.observe import Clock
from tolaria.operations import Barrier, Events, HostState, Inspection
from tolaria.protocol import Ground, RolledBack, Taken
from tolaria.records import Journal
from tolaria.report import RollbackReport, SnapshotInfo, logger
from tolaria.ring import Ring, Slot
from tolaria.shield import Shield
from tolaria.snapshot import Vault
from tolaria.state.leaves import Storage, is_page_locked
from tolaria.state.train_state import TrainState

Target = SnapshotInfo | int | None

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


@dataclass(frozen=True, slots=True, eq=False)
class Finding:
    """What the late reading of a snapshot has shown.

    Attributes:
        taken: The snapshot.
        manual: It was vouched for by its caller, so it is kept whatever was found.
        found: See `Inspection`; None when it could not be read and was given up.
    """

    taken: Taken
    manual: bool
    found: Inspection | None


class Keeper:
    """Snapshots of one train state.

    Args:
        state: The train state. Surveyed once here, so that unsupported tensors are refused before anything is attached.
        config: Slots, time-outs, strictness.
        with_rng: Whether snapshots hold global random state, asked at each capture.
        read_journal: The governor's counters and detector states, as immutable values.
        write_journal: Takes them back at a rollback.
        on_stale: Called when stale gradients were refused.

    Raises:
        UnsupportedState, BudgetExceeded: Nothing was attached.
    """

    def __init__(
        self,
        state: TrainState,
        config: GovernorConfig,
        with_rng: Callable[[], bool],
        read_journal: Callable[[], Journal],
        write_journal: Callable[[Journal], None],
        on_stale: Callable[[], None],
    ) -> None:
        survey = state.survey()
        storages = survey.leaves.storages
        devices = DeviceSet(config.barrier)
        devices.open(_places(storages))
        self.state, self.config, self.devices = state, config, devices
        self.ground = Ground(devices.barrier, config.gate_timeout_s)
        self.accelerators = [torch.device(name) for name, port in devices.items() if port.barrier is not Barrier.HOST]
        self.tier = "device" if any(s.key[0].type != "cpu" for s in storages) else "host"
        self.lag = READING_LAG if self.reads_late else 0
        num_slots = config.num_slots(self.lag)
        _refuse_oversize(sum(s.key[2] for s in storages if s.key[0].type == "cpu"), num_slots)
        self.vault = Vault(state, num_slots, devices, with_rng, read_journal, write_journal)
        self.driver = Driver(HostState(ring=ring.empty_ring(num_slots)), self.vault, devices)
        self.sections = Sections(self.driver, state, config.gate_timeout_s, config.strict, self.run_requests, on_stale)
        self._unsealed: deque[tuple[Taken, bool]] = deque()
        self._findings: deque[Finding] = deque()
        self._sealing = threading.RLock()
        self._requests: deque[Request] = deque()
        self._stepping: set[int] = set()

    @property
    def reads_late(self) -> bool:
        """Whether digests, finite checks and vital signs arrive after the call that asked for them."""
        return self.ground.barrier is Barrier.CONTEXT

    @property
    def clocks(self) -> dict[str, Clock]:
        """The devices that numbers can be sent from without waiting."""
        return {name: cast("Clock", port) for name, port in self.devices.items() if port.barrier is Barrier.CONTEXT}

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
        self.state.model.include_gradients = gradients
        found = None
        try:
            if self.reads_late:
                taken = self._stage(shield, step, manual)
                self._unsealed.append((taken, manual))
            else:
                # one submission: an interrupt in between would leave a candidate that is never sealed
                taken, found = self.driver.submit(
                    protocol.snapshot_and_seal(threading.get_ident(), self.ground, step, manual), shield
                )
        finally:
            self.state.model.include_gradients = False
        return self.info(taken), found

    def _stage(self, shield: Shield, step: int | None, manual: bool) -> Taken:
        try:
            taken: Taken = self.driver.submit(
                protocol.snapshot(threading.get_ident(), self.ground, step, manual), shield
            )
        except SlotsBusy:
            if not manual or not self._unsealed:
                raise
            # a caller in a hurry: candidates may turn out to be good or bad once they are read
            self.seal_arrived(wait=True)
            taken = self.driver.submit(protocol.snapshot(threading.get_ident(), self.ground, step, manual), shield)
        return taken

    def seal_arrived(self, *, wait: bool = False, before: int | None = None) -> None:
        """Seal (or give up) staged snapshots whose reading has arrived, oldest first; `findings` tells what was found.

        Args:
            wait: Wait for all of them.
            before: Leave those of this step and later ones for another time.
        """
        with self._sealing:
            while self._unsealed:
                taken, manual = self._unsealed[0]
                held = ring.by_serial(self.ring, taken.snapshot) is not None
                early = before is not None and taken.completed >= before
                postponed = early or bool(self.driver.state.captures)
                if held and not wait and (postponed or not self.vault.is_examined(taken.slot)):
                    break  # they arrive in order
                with Shield() as shield:  # an interrupt in between would leave a candidate that is never sealed
                    self._seal(shield, taken, manual)
                    self._unsealed.popleft()

    def _seal(self, shield: Shield, taken: Taken, manual: bool) -> None:
        thread = threading.get_ident()
        try:
            found = self.driver.submit(protocol.seal(thread, taken.slot, taken.snapshot, manual, self.ground), shield)
        except (DeviceLost, CaptureInProgress, QuiesceTimeout):
            raise
        except Exception as error:  # out of memory: training goes on with the snapshots held so far
            logger.warning("step %s: a snapshot could not be read, and is given up: %s", taken.step, error)
            self.driver.change(lambda s: (_with_ring(s, ring.release(s.ring, taken.slot, taken.snapshot)), None))
            self._findings.append(Finding(taken, manual, None))
        else:
            if found is not None:
                self._findings.append(Finding(taken, manual, found))

    def findings(self, serial: int | None = None) -> list[Finding]:
        """What late readings have shown since they were last asked for; with `serial`: of that snapshot only."""
        taken = [one for one in list(self._findings) if serial is None or one.taken.snapshot == serial]
        for one in taken:
            self._findings.remove(one)
        return taken

    def info(self, taken: Taken | None) -> SnapshotInfo:
        """A handle for what was taken, or for a request."""
        return SnapshotInfo(
            step=taken.step if taken is not None else None,
            bytes=self.vault.num_bytes(taken.slot) if taken is not None else 0,
            tier=self.tier,
            serial=taken.snapshot if taken is not None else -1,
            _state=self._phase,
            _wait=self._wait,
            _done=taken.done if taken is not None else (),
        )

    def fill(self, receipt: SnapshotInfo, info: SnapshotInfo) -> None:
        """Complete the handle of a queued request."""
        receipt.step, receipt.bytes, receipt.serial, receipt._done = info.step, info.bytes, info.serial, info._done

    def _phase(self, serial: int) -> str:
        slot = ring.by_serial(self.ring, serial)
        return slot.phase.value if slot is not None else "dropped"

    def _wait(self, serial: int, done: Events, until: str) -> None:
        self.wait_for(done)
        if until == "sealed":
            self.seal_arrived(wait=True)
        if until == "sealed" and self._phase(serial) == "dropped":
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
        """A healthy step: probation of every candidate taken before it goes on."""
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
        optimizer: Optimizer | None = None,
        verify_before: bool = False,
        patient: bool = False,
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
            optimizer: Cleared in the same critical section if it is not governed.
            verify_before: Check digests before the first write.
            patient: Wait for graph captures of other threads to end.
        """
        governed = [part.optimizer for part in self.state.optimizers]
        foreign = optimizer is not None and all(optimizer is not one for one in governed)
        started = time.perf_counter()
        done: RolledBack = self.driver.submit(
            protocol.rollback(
                threading.get_ident(),
                self.ground,
                _chooser(to, generations_back, onset),
                "rolling back",
                verify_before,
                (optimizer,) if foreign else (),
                patient,
            ),
            shield,
        )
        for finding in list(self._findings):  # of an undone future
            if finding.taken.snapshot > done.slot.snapshot:
                self._findings.remove(finding)
        report.host_ms = (time.perf_counter() - started) * 1e3
        report.success, report.status = True, "submitted"
        report.snapshot_step = done.slot.step
        report.certified = done.slot.phase is ring.SlotPhase.CERTIFIED
        report.panic_step = completed()
        report.steps_lost = max(0, report.panic_step - done.slot.step)
        report.optimizer = "reset" if foreign else "restored" if governed else "none"
        report.barrier = self.ground.barrier.value
        report.wait_ms = done.waited_s * 1e3
        report.corrupted_steps = done.corrupted
        report._finish = lambda: (self._duration(done), self._verify(done.slot))
        return done

    def _duration(self, done: RolledBack) -> float | None:
        """Wait until the devices are done; answers the milliseconds that the slowest of them took to copy."""
        self.wait_for(done.done)
        ports = [cast("QueuedDevice", self.devices[name]) for name, _ in done.done]
        spans = zip(ports, done.began, done.copied, strict=True)
        return max((port.elapsed_ms(began, ended) for port, (_, began), (_, ended) in spans), default=None)

    def _verify(self, slot: Slot) -> bool | None:
        """Whether the slot has the bytes it was sealed with; None when it has been overwritten or freed since."""
        if not self.sections.is_open:
            return None
        thread = threading.get_ident()
        found = self.driver.submit(protocol.reinspect(thread, slot.index, slot.snapshot, self.ground))
        return None if found is None else found.intact


def _chooser(to: Target, generations_back: int, onset: int | None) -> Callable[[Ring, int | None], Slot | None]:
    def newest(slots: Ring, before: int | None) -> Slot | None:
        earlier = tuple(slot for slot in slots if onset is None or slot.completed < onset)
        slots = earlier if ring.newest_good(earlier, before) is not None else slots
        chosen = ring.newest_good(slots, before)
        for _ in range(generations_back):
            older = None if chosen is None else ring.newest_good(slots, chosen.snapshot)
            chosen = older or chosen
        return chosen

    def named(slots: Ring, before: int | None) -> Slot | None:
        if before is not None:  # the one that was asked for is corrupted: only an older good one will do
            return ring.newest_good(slots, before)
        slot = ring.by_step(slots, to) if isinstance(to, int) else ring.by_serial(slots, to.serial if to else -1)
        if slot is None:
            held = sorted({s.step for s in slots if s.phase in ring.READABLE})
            wanted = f"step {to}" if isinstance(to, int) else f"the snapshot of step {to.step if to else None}"
            raise NoSnapshot(
                "rolling back",
                f"{wanted} is not held, held are steps {held}",
                "Choose one of those, or leave `to` out.",
            )
        return slot

    return newest if to is None else named


def _with_ring(state: HostState, slots: Ring) -> HostState:
    return replace(state, ring=slots)


def _places(storages: Sequence[Storage]) -> set[torch.device]:
    """Devices that hold some of the state; where all is in page-locked host memory, the one that may be reading it."""
    found = {storage.key[0] for storage in storages} or {torch.device("cpu")}
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    on_host = all(device.type == "cpu" for device in found)
    if on_host and accelerator is not None and any(is_page_locked(storage.bytes) for storage in storages):
        found.add(torch.device(accelerator.type, torch.accelerator.current_device_index()))
    return found


def _refuse_oversize(num_bytes: int, num_slots: int) -> None:
    """A first estimate: parameters and buffers alone; optimizer state does not exist yet and comes on top."""
    left = memory.available_host_bytes()
    if left is not None and num_bytes * num_slots > left:
        raise BudgetExceeded(
            "attaching the governor",
            f"{num_slots} slots x {num_bytes / 2**20:,.1f} MiB of parameters and buffers exceed the "
            f"{left / 2**20:,.1f} MiB that are available",
            "Configure fewer slots (a longer cadence or a shorter probation), or free memory.",
        )

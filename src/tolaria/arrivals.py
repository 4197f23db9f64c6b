"""ARRIVALS: what is known about snapshots and rollbacks only some time after they were submitted, and what follows.

Seals of snapshots whose bytes a device is still reading, and readings of what a rollback has restored.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from tolaria import protocol, ring
from tolaria.barriers import Ground
from tolaria.driver import Driver
from tolaria.errors import CaptureInProgress, DeviceLost, QuiesceTimeout
from tolaria.operations import HostState, Inspection
from tolaria.protocol import RolledBack, Taken
from tolaria.report import logger
from tolaria.ring import Slot
from tolaria.shield import Shield
from tolaria.snapshot import Vault
from tolaria.values import replace


@dataclass(frozen=True, slots=True, eq=False)
class Finding:
    """What the late reading of a snapshot has shown.

    Attributes:
        taken: The snapshot.
        manual: It was vouched for by its caller, so it is kept whatever was found.
        found: See `Inspection`; None when it could not be read and was given up.
        device_s: How long the slowest device has copied, in seconds.
    """

    taken: Taken
    manual: bool
    found: Inspection | None
    device_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ReadBack:
    """What reading the restored storages has shown.

    Attributes:
        slot: What was restored.
        intact: They are those of the snapshot.
        corrupted: It was the snapshot's own bytes that had changed (it has been given up), not somebody else writing.
    """

    slot: Slot
    intact: bool
    corrupted: bool = False


class Arrivals:
    """Submissions whose outcome is still to come, oldest first.

    Args:
        driver: Runs the protocols.
        vault: Tells what has arrived.
        ground: Barrier and time-out.

    Threads: any; one at a time settles what has arrived.
    """

    def __init__(self, driver: Driver, vault: Vault, ground: Ground) -> None:
        self._driver, self._vault, self._ground = driver, vault, ground
        self._unsealed: deque[tuple[Taken, bool]] = deque()
        self._findings: deque[Finding] = deque()
        self._restored: RolledBack | None = None  # and not read back yet
        self._newest: RolledBack | None = None  # the only one whose reading is still there
        self._settling = threading.RLock()
        # held for no longer than a look: a rollback may come while another is settled, a signal handler's even here
        self._noting = threading.RLock()

    # ------------------------------------------------------------ snapshots

    def expect_seal(self, taken: Taken, manual: bool) -> None:
        """A snapshot was staged, and is being read."""
        self._unsealed.append((taken, manual))

    @property
    def are_unsealed(self) -> bool:
        """Whether some snapshot still has to be sealed."""
        return bool(self._unsealed)

    def seal(self, *, wait: bool = False, before: int | None = None) -> None:
        """Seal (or give up) staged snapshots whose reading has arrived, oldest first; `findings` tells what was found.

        Args:
            wait: Wait for all of them.
            before: Leave those of this step and later ones for another time.
        """
        with self._settling:
            while self._unsealed:
                taken, manual = self._unsealed[0]
                held = ring.by_serial(self._driver.state.ring, taken.snapshot) is not None
                early = before is not None and taken.completed >= before
                postponed = early or bool(self._driver.state.captures)
                if held and not wait and (postponed or not self._vault.is_examined(taken.slot)):
                    break  # they arrive in order
                with Shield() as shield:  # an interrupt in between would leave a candidate that is never sealed
                    if self._is_next(taken):
                        self._seal(shield, taken, manual)
                    if self._is_next(taken):
                        self._unsealed.popleft()

    def _is_next(self, taken: Taken) -> bool:
        """False where a signal handler of this thread has sealed it: before the shield, or in a wait within."""
        return bool(self._unsealed) and self._unsealed[0][0] is taken

    def _seal(self, shield: Shield, taken: Taken, manual: bool) -> None:
        thread = threading.get_ident()
        try:
            found = self._driver.submit(protocol.seal(thread, taken.slot, taken.snapshot, manual, self._ground), shield)
        except (DeviceLost, CaptureInProgress, QuiesceTimeout):
            raise
        except Exception as error:  # out of memory: training goes on with the snapshots held so far
            logger.warning("step %s: a snapshot could not be read, and is given up: %s", taken.step, error)
            self._release(taken.slot, taken.snapshot)
            self._findings.append(Finding(taken, manual, None))
        else:
            if found is not None:
                self._findings.append(Finding(taken, manual, found, self._vault.duration_s(taken.began, taken.done)))

    @property
    def have_findings(self) -> bool:
        """Whether there are any to ask for."""
        return bool(self._findings)

    def findings(self, serial: int | None = None) -> list[Finding]:
        """What late readings have shown since they were last asked for; with `serial`: of that snapshot only."""
        wanted = [one for one in list(self._findings) if serial is None or one.taken.snapshot == serial]
        return [one for one in wanted if self._removed(one)]

    def poisoned(self, copied: Callable[[float], None], count: Callable[..., None]) -> tuple[int, str] | None:
        """The first automatic snapshot among the findings, which are taken out, that is not finite.

        Args:
            copied: Called with the time that the device has copied for each of them, in seconds.
            count: Called with what changes in the statistics.

        Returns:
            The step that it was taken after, and names.
        """
        first = None
        for finding in self.findings():
            copied(finding.device_s)
            if finding.found is None:
                count(snapshots=-1, snapshots_failed=1)
            if finding.found is None or not finding.found.nonfinite:
                continue
            step, names = finding.taken.completed, ", ".join(finding.found.nonfinite[:8])
            if finding.manual:
                logger.warning("step %s: a manual snapshot is not finite: %s", step, names)
                continue
            count(snapshots=-1, snapshots_rejected=1)
            first = first or (step, names)
        return first

    def forget_after(self, serial: int, step: int = -1) -> None:
        """A rollback to that snapshot: findings about later ones, taken after `step`, belong to an undone future."""
        for finding in list(self._findings):
            if finding.taken.snapshot > serial and finding.taken.completed > step:
                self._removed(finding)

    def _removed(self, finding: Finding) -> bool:
        """Take it out. False where another thread has: a rollback beside a step that looks what has arrived."""
        try:
            self._findings.remove(finding)
        except ValueError:
            return False
        return True

    # ------------------------------------------------------------ rollbacks

    def expect_read_back(self, done: RolledBack) -> None:
        """A rollback was submitted, and what it restored is being read. Earlier ones do not matter any more."""
        with self._noting:
            self._restored = self._newest = done

    @property
    def is_unverified(self) -> bool:
        """Whether the last rollback has not been read back yet."""
        return self._restored is not None

    def read_back(self, *, wait: bool = False, shield: Shield | None = None) -> ReadBack | None:
        """What reading the last rollback back has shown, once; None before that has arrived.

        Args:
            wait: Wait for it.
            shield: The caller's, when what was shown is to be noted before signals are let in.
        """
        with self._settling:
            done = self._restored
            if done is None:
                return None
            held = ring.by_serial(self._driver.state.ring, done.slot.snapshot) is not None
            postponed = bool(self._driver.state.captures) or not self._vault.is_read_back(done.slot.index)
            if held and not wait and self._ground.barrier.has_events and postponed:
                return None
            with self._noting:
                is_newest = self._restored is done
                if is_newest:
                    self._restored = None
            # else another thread has rolled back meanwhile, which is what is to be read back now
            if not is_newest:
                return self.read_back(wait=wait, shield=shield)
            try:
                return self.judge(done, shield)
            except BaseException:  # nobody was told yet
                with self._noting:
                    self._restored = self._restored or done
                raise

    def judge(self, done: RolledBack, shield: Shield | None = None) -> ReadBack | None:
        """Compare what was read back with the snapshot. None when its slot has moved on, so that nobody can tell."""
        thread, slot = threading.get_ident(), done.slot
        if self._ground.barrier.has_events and done is not self._newest:
            return None
        try:
            found = self._driver.submit(
                protocol.reinspect_restored(thread, slot.index, slot.snapshot, self._ground), shield
            )
            if found is None or found.intact:
                return None if found is None else ReadBack(slot, True)
            again = self._driver.submit(protocol.reinspect(thread, slot.index, slot.snapshot, self._ground), shield)
        except (DeviceLost, CaptureInProgress, QuiesceTimeout):
            raise
        except Exception as error:  # the rollback itself was made
            logger.warning("the rollback to step %s could not be verified: %s", slot.step, error)
            return None
        corrupted = again is not None and not again.intact
        if corrupted:
            self._release(slot.index, slot.snapshot)
        return ReadBack(slot, False, corrupted)

    def _release(self, index: int, serial: int) -> None:
        def release(state: HostState) -> tuple[HostState, None]:
            return replace(state, ring=ring.release(state.ring, index, serial)), None

        self._driver.change(release)

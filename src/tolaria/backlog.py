"""BACKLOG: slow work on slots beside training, by one thread of its own: draining into the host tier, and scrubbing.

Both read pinned slots and need no gate, so training, snapshots and rollbacks go on meanwhile. One piece at a time: each
would take bandwidth from the next.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from tolaria import protocol, ring
from tolaria.barriers import Ground
from tolaria.driver import Driver
from tolaria.operations import Inspection
from tolaria.report import logger
from tolaria.ring import Slot, SlotPhase, Tier
from tolaria.values import replace


class Backlog:
    """What is to be done with slots by and by.

    Args:
        driver: Runs the protocols.
        ground: Barrier, time-out, reach.
        num_drained: Asked before each transfer: how many slots of the host tier drained snapshots may fill.
        scrub_every: Steps from one scrubbed slot to the next; 0: never.
        on_corrupted: Called on the background thread with the slot whose bytes have changed, after it was given up.
        on_drained: Called on the background thread after a transfer.

    Threads: `tend` is called at boundaries by whichever thread trains; it never waits.
    """

    def __init__(
        self,
        driver: Driver,
        ground: Ground,
        num_drained: Callable[[], int],
        scrub_every: int,
        on_corrupted: Callable[[Slot], None],
        on_drained: Callable[[], None],
    ) -> None:
        self._driver, self._ground, self._num_drained = driver, ground, num_drained
        self._scrub_every, self._on_corrupted, self._on_drained = scrub_every, on_corrupted, on_drained
        self._pool: ThreadPoolExecutor | None = None
        self._work: Future[None] | None = None
        self._scrubbed_at = 0  # tick of the last scrubbed slot
        self._next_scrubbed = -1  # index of the slot before the next one
        self._unfit: set[int] = set()  # snapshots that could not be drained

    def tend(self, tick: int, cadence: int) -> None:
        """Begin the next piece of work if none is under way.

        Args:
            tick: Steps judged so far.
            cadence: Steps between snapshots.
        """
        if self._work is not None and not self._work.done():
            return
        slots = self._driver.state.ring
        num_drained = self._num_drained()
        if num_drained:
            # so that the ages of `num_drained` snapshots, doubling from one to the next, end at `drained_reach`
            spacing = max(cadence, self._ground.drained_reach // 2**num_drained)
            slot = ring.drainable(slots, spacing)
            if slot is not None and slot.snapshot not in self._unfit:
                self._begin(lambda: self._drain(slot, num_drained))
                return
        if self._scrub_every and tick - self._scrubbed_at >= self._scrub_every:
            self._scrubbed_at = tick
            idle = [slot for slot in slots if slot.phase in (SlotPhase.SEALED, SlotPhase.CERTIFIED)]
            if idle:
                chosen = min(idle, key=lambda slot: (slot.index <= self._next_scrubbed, slot.index))
                self._next_scrubbed = chosen.index
                self._begin(lambda: self._scrub(chosen))

    def _begin(self, work: Callable[[], None]) -> None:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="tolaria-backlog")
        self._work = self._pool.submit(work)

    def _drain(self, slot: Slot, num_drained: int) -> None:
        try:
            ground = replace(self._ground, drained=num_drained)
            done = self._driver.submit(protocol.drain(threading.get_ident(), ground, slot.index, slot.snapshot))
        except Exception as error:  # out of memory: the snapshot is still where it was
            self._unfit.add(slot.snapshot)
            logger.warning("step %d: a snapshot could not be copied to main memory: %s", slot.step, error)
        else:
            if done is not None:
                self._on_drained()

    def _scrub(self, slot: Slot) -> None:
        try:
            # what came to main memory directly has no digest of its own there yet
            resting = slot.tier is Tier.HOST
            found: Inspection | None = self._driver.submit(
                protocol.reinspect(threading.get_ident(), slot.index, slot.snapshot, self._ground, at_rest=resting)
            )
        except Exception as error:
            logger.info("step %d: a snapshot could not be read again: %s", slot.step, error)
            return
        if found is not None and not found.intact:
            self._give_up(slot)

    def _give_up(self, slot: Slot) -> None:
        def release(slots: ring.Ring) -> ring.Ring:
            return ring.release(slots, slot.index, slot.snapshot)

        self._driver.change(lambda s: (replace(s, ring=release(s.ring)), None))
        logger.warning(
            "step %d: the snapshot in the %s tier has changed in memory since it was sealed, and is given up",
            slot.step,
            slot.tier.value,
        )
        self._on_corrupted(slot)

    def finish(self) -> None:
        """Wait for the work under way."""
        if self._work is not None:
            self._work.result()

    def close(self) -> None:
        """Wait for the work under way, and end the thread. Idempotent."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

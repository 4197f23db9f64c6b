"""Randomized work of many threads and streams beside rollbacks, on state that tells by itself if it is torn.

The state is several groups of parameters. A step fills one group with a number that no other step uses, its *tag*. So a
torn write or read shows in one reduction (smallest and largest element differ), and a lost rollback in the tag: one of
an abandoned past is still there. Workers exclude each other within a group, as a program's own threads would; between
them and a rollback stands nothing but tolaria.

    python -m tolaria.testing.stress --seconds 600
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import random
import sys
import threading
import time
from collections.abc import Generator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from tolaria import GovernorConfig, TolariaGovernor, judge
from tolaria.operations import Await, HostState
from tolaria.records import Capabilities
from tolaria.testing.tags import extremes, tag_in
from tolaria.testing.turbulence import Turn

FIRST_TAG = 1
_PATIENCE_S = 60.0
_PAUSES = 0.3  # share of steps that wait in the middle
_MOST_LOOKS = 256


@dataclass(frozen=True, slots=True)
class Tag:
    """When a tag was written: in which epoch, and before which snapshots."""

    epoch: int
    next_snapshot: int


@dataclass(slots=True)
class Counts:
    """What a stress run found.

    Attributes:
        rollbacks: Made.
        lost: Reads that saw something which a rollback ought to have taken back.
        torn: Reads that saw parts of several steps.
        steps: Written by workers.
        reads: Made by workers and after rollbacks.
    """

    rollbacks: int = 0
    lost: int = 0
    torn: int = 0
    steps: int = 0
    reads: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """How hard to try.

    Attributes:
        device: Where the state lives.
        threads: Workers besides the one that rolls back.
        streams: Streams that they choose from; on a CPU there are none.
        groups: Of parameters, each written by one worker at a time.
        parameters: Tensors of each group, at least 2.
        elements: Elements of each.
        seed: Of every choice that is made.
        barrier: For the governor; None: the best there is.
    """

    device: str = "cpu"
    threads: int = 3
    streams: int = 0
    groups: int = 4
    parameters: int = 3
    elements: int = 1 << 15
    seed: int = 0
    barrier: Literal["context", "blocking"] | None = None


@dataclass(slots=True)
class _Look:
    """One read of a group.

    Attributes:
        extremes: Smallest and largest element of each parameter: shape [parameters, 2], perhaps not there yet.
        epoch: When it was.
        restored: Serial number of the snapshot that this epoch began with; -1 for the first.
    """

    extremes: torch.Tensor
    epoch: int
    restored: int


class _Group:
    """Parameters that one worker at a time uses."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters, self.turn = parameters, Turn()


class Stress:
    """One run. Use as a context manager.

    Args:
        plan: How hard to try.
        gated: False for the red twin: workers ask nobody before they touch the state.

    Threads: `run` is called by the one that built it.
    """

    def __init__(self, plan: Plan, gated: bool = True) -> None:
        self.plan, self.gated, self.counts = plan, gated, Counts()
        device = torch.device(plan.device)
        model = nn.ParameterList(
            nn.Parameter(torch.full((plan.elements,), float(FIRST_TAG), device=device))
            for _ in range(plan.groups * plan.parameters)
        )
        config = GovernorConfig(rng="keep", barrier=plan.barrier)
        self.governor = TolariaGovernor(model, config=config, detector=judge.non_finite())
        parameters = list(model)
        self._groups = [_Group(parameters[first :: plan.groups]) for first in range(plan.groups)]
        self._streams = [torch.cuda.Stream(device) for _ in range(plan.streams)] if device.type == "cuda" else []
        self._lock = threading.Lock()
        self._tags = {FIRST_TAG: Tag(0, 0)}
        self._restored = {0: -1}
        self._looks: list[_Look] = []
        self._stop = False
        self._errors: list[BaseException] = []

    def __enter__(self) -> Stress:
        return self

    def __exit__(self, *_: object) -> None:
        self.governor.close()

    @property
    def _driver(self) -> Any:
        return self.governor._keeper.driver

    # ------------------------------------------------------------ what workers do

    def _section(self, write: bool) -> AbstractContextManager[None]:
        return self.governor.using(write=write) if self.gated else contextlib.nullcontext()

    def _stream(self, source: random.Random) -> torch.cuda.Stream | None:
        return source.choice(self._streams) if self._streams else None

    def _work(self, number: int) -> None:
        source = random.Random(self.plan.seed * 1000 + number)
        try:
            with torch.no_grad():
                while not self._stop:
                    if source.random() < 0.5:
                        self._look(source)
                    else:
                        self._write(source)
        except BaseException as error:
            self._errors.append(error)
            self._stop = True

    def _write(self, source: random.Random) -> None:
        """One step in two halves. Some wait in the middle until a rollback wants in (or, in the red twin, has been)."""
        group = source.choice(self._groups)
        order = list(group.parameters)
        source.shuffle(order)
        half = source.randrange(1, len(order))
        pauses = source.random() < _PAUSES
        with self._section(write=True), group.turn.lock, group.turn.used(self._stream(source)):
            state: HostState = self._driver.state
            tag = self._take_tag(state)
            for parameter in order[:half]:
                parameter.fill_(tag)
            if pauses:
                self._wait_for_a_rollback(state.epoch)
            for parameter in order[half:]:
                parameter.fill_(tag)

    def _take_tag(self, state: HostState) -> float:
        with self._lock:
            tag = len(self._tags) + FIRST_TAG
            self._tags[tag] = Tag(state.epoch, state.next_snapshot)
            self.counts.steps += 1
        return float(tag)

    def _wait_for_a_rollback(self, epoch: int) -> None:
        def wanted(state: HostState) -> tuple[HostState, None] | None:
            came = state.epoch != epoch or (self.gated and state.gate.waiting)
            return (state, None) if came or self._stop else None

        self._driver.perform(Await("the middle of a step", wanted, _PATIENCE_S))

    def _look(self, source: random.Random) -> None:
        group = source.choice(self._groups)
        with self._section(write=False), group.turn.lock:
            self._note(group, source)

    def _note(self, group: _Group, source: random.Random) -> None:
        epoch = self._driver.state.epoch
        with group.turn.used(self._stream(source)):
            found = extremes(group.parameters)
        with self._lock:
            self._looks.append(_Look(found, epoch, self._restored.get(epoch, -1)))

    # ------------------------------------------------------------ the one that rolls back

    def run(self, seconds: float, most: int | None = None) -> Counts:
        """Take snapshots and roll back until the time is over.

        Args:
            seconds: How long.
            most: Rollbacks after which to stop earlier.

        Raises:
            Whatever a worker raised.
        """
        deadline = time.monotonic() + seconds
        source = random.Random(self.plan.seed)
        self.governor.snapshot()
        workers = [threading.Thread(target=self._work, args=(n,)) for n in range(1, self.plan.threads + 1)]
        for worker in workers:
            worker.start()
        try:
            while not self._stop and time.monotonic() < deadline and self.counts.rollbacks != most:
                self._turn(source)
        finally:
            self._stop = True
            self._driver.change(_unchanged)  # wakes who waits
            for worker in workers:
                worker.join()
        self._judge()
        if self._errors:
            raise self._errors[0]
        return self.counts

    def _turn(self, source: random.Random) -> None:
        if source.random() < 0.25:
            self.governor.snapshot()
        target = max(slot.snapshot for slot in self._driver.state.ring if slot.is_good)
        with self._lock:
            # workers of the next epoch ask for this before we are back
            self._restored[self._driver.state.epoch + 1] = target
        self.governor.execute_rollback()
        self.counts.rollbacks += 1
        with torch.no_grad(), self._section(write=False):
            for group in self._groups:
                # not waiting: who holds it may be waiting for the next rollback
                if group.turn.lock.acquire(blocking=False):
                    try:
                        self._note(group, source)
                    finally:
                        group.turn.lock.release()
        if len(self._looks) > _MOST_LOOKS:
            self._judge()

    def _judge(self) -> None:
        """Look at what was read since the last time."""
        with self._lock:
            looks = list(self._looks)
            self._looks.clear()
        if self._streams:
            torch.cuda.synchronize()
        for look in looks:
            self.counts.reads += 1
            tag = tag_in(look.extremes)
            if tag is None:
                self.counts.torn += 1
            else:
                self.counts.lost += not self._belongs(self._tags[tag], look)

    @staticmethod
    def _belongs(tag: Tag, look: _Look) -> bool:
        """Whether a read of that epoch may see a tag: written in it, or part of the snapshot that it began with."""
        return tag.epoch == look.epoch or tag.next_snapshot <= look.restored


def _unchanged(state: HostState) -> tuple[HostState, None]:
    """Wakes whoever waits."""
    return state, None


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Thousands of rollbacks are no news. One operator thread: several that spin for a busy core would cost more."""
    logger, threads = logging.getLogger("tolaria"), torch.get_num_threads()
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        logger.setLevel(level)
        torch.set_num_threads(threads)


def check(plan: Plan, seconds: float, most: int | None = None) -> tuple[Counts, Capabilities]:
    """Run a plan with the shipped protocol, and tell what the governor was made of."""
    with _quiet(), Stress(plan) as stress:
        counts = stress.run(seconds, most)
        return counts, stress.governor.capabilities()


def unprotected(plan: Plan, most: int = 200, seconds: float = _PATIENCE_S) -> Counts:
    """The red twin: the same run without the gate, until something is torn or `most` rollbacks were made."""
    with _quiet(), Stress(plan, gated=False) as stress:
        return stress.run(seconds, most)


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; prints one JSON object. Returns 1 if anything was lost or torn."""
    parser = argparse.ArgumentParser(prog="python -m tolaria.testing.stress", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rollbacks", type=int, default=None)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--barrier", choices=("context", "blocking"), default=None)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(argv)
    plan = plan_for(asked.device, asked.barrier, asked.seed)
    counts, capabilities = check(plan, asked.seconds, asked.rollbacks)
    found = {"rollbacks": counts.rollbacks, "lost": counts.lost, "torn": counts.torn}
    sys.stdout.write(json.dumps({**found, "reads": counts.reads, "barrier": capabilities.barrier}) + "\n")
    return 1 if counts.lost or counts.torn else 0


def plan_for(device: str, barrier: Literal["context", "blocking"] | None = None, seed: int = 0) -> Plan:
    """64 streams and 8 threads on CUDA; a few threads on a CPU."""
    if torch.device(device).type == "cuda":
        return Plan(device, threads=8, streams=64, groups=16, elements=1 << 18, seed=seed, barrier=barrier)
    return Plan(device, barrier=barrier, seed=seed)


if __name__ == "__main__":
    sys.exit(main())

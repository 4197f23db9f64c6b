"""What the tests of the whole governor share: small real runs, scripted verdicts, ordered threads, frozen states."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tolaria.governor
from tolaria import Detector, Health, TolariaGovernor, Verdict, VitalSigns
from tolaria.judge import non_finite
from tolaria.ring import SlotPhase

PATIENCE_S = 60.0
"""How long a thread is waited for. Only a failing test ever waits that long."""

SOURCE = Path(tolaria.governor.__file__).parents[1]


# ------------------------------------------------------------ bitwise comparison


class Bits:
    """A tensor frozen at one moment: equal to another when dtype, shape and every bit are."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.kind = (str(tensor.dtype), tuple(tensor.shape))
        self.bits = tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Bits) and self.kind == other.kind and torch.equal(self.bits, other.bits)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Bits({self.kind[0]}, {self.kind[1]}, sum {int(self.bits.sum())})"


def freeze(value: Any) -> Any:
    """A copy of a tree of host values that `==` compares bit for bit."""
    if isinstance(value, torch.Tensor):
        return Bits(value)
    if isinstance(value, Mapping):
        return {key: freeze(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [freeze(item) for item in value]
    return repr(value) if isinstance(value, float) else value


# ------------------------------------------------------------ a run


class Run:
    """A small real training run: BatchNorm and dropout, AdamW, a schedule. Two of one seed are bit-identical.

    Batches come from a generator of their own; dropout draws from the global one, which is seeded as well.
    """

    def __init__(self, seed: int = 1, batches: int = 40, optimizer: Callable[..., Any] | None = None) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.25), nn.Linear(8, 3))
        make = optimizer or (lambda params: torch.optim.AdamW(params, lr=0.05))
        self.optimizer: torch.optim.Optimizer = make(self.model.parameters())
        self.scheduler: Any = torch.optim.lr_scheduler.StepLR(self.optimizer, 4, gamma=0.7)
        generator = torch.Generator().manual_seed(seed)
        self.batches: list[Any] = [
            (torch.randn(16, 6, generator=generator), torch.randint(3, (16,), generator=generator))
            for _ in range(batches)
        ]

    def loss(self, batch: Any) -> torch.Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.model(x), y)

    def backward(self, batch: Any) -> torch.Tensor:
        loss = self.loss(batch)
        loss.backward()
        return loss

    def plain_step(self, batch: Any) -> float:
        """What a loop without a governor does."""
        loss = self.backward(batch)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def step(self, governor: TolariaGovernor, batch: Any, **kwargs: Any) -> Any:
        """The same step under guard."""
        return governor.step(loss=self.backward(batch), **kwargs)

    def train(self, governor: TolariaGovernor, batches: Sequence[Any] | None = None) -> list[Any]:
        """A whole governed loop."""
        return [self.step(governor, batch) for batch in governor.watch(self.batches if batches is None else batches)]

    def state(self, with_rng: bool = True) -> Any:
        """Every bit of the train state, read without tolaria."""
        return freeze(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "rng": torch.get_rng_state() if with_rng else None,
            }
        )

    def poison(self) -> None:
        """Damage that no update can undo."""
        with torch.no_grad():
            self.model[0].weight.fill_(float("nan"))


def nan_batch(batch: Any) -> Any:
    """The same batch with NaN in every input."""
    return (torch.full_like(batch[0], float("nan")), batch[1])


# ------------------------------------------------------------ verdicts


def scripted(script: Mapping[int, str | tuple[str, int]]) -> Detector[int]:
    """A detector that answers by count of judgements (from 1; undone steps count too).

    Args:
        script: Judgement -> ``"suspect"`` or ``"panic"``, or a pair of that and the onset. Healthy otherwise.
    """
    judged = 0

    def update(state: int, signs: VitalSigns) -> tuple[int, Verdict]:
        nonlocal judged
        judged += 1
        answer = script.get(judged, "healthy")
        health, onset = (answer, signs.step) if isinstance(answer, str) else answer
        return state + 1, Verdict(Health(health), signs.step, "" if health == "healthy" else "scripted", onset)

    return Detector(lambda: 0, update)


# ------------------------------------------------------------ threads


class Worker:
    """A thread whose result or exception is handed back by `join`."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work, self._result, self._error = work, None, None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._work()
        except BaseException as error:
            self._error = error

    @property
    def ident(self) -> int:
        assert self._thread.ident is not None
        return self._thread.ident

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def give_a_chance(self) -> None:
        """Return when it has ended, or after a while: for a thread that ought to wait for its caller."""
        self._thread.join(0.3)

    def join(self) -> Any:
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), "the thread hangs: a deadlock, or a wait that nothing ends"
        if self._error is not None:
            raise self._error
        return self._result


class Flag:
    """An event whose wait fails the test instead of going on for ever."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        self._event.set()

    @property
    def is_set(self) -> bool:
        return self._event.is_set()

    def wait(self) -> None:
        assert self._event.wait(PATIENCE_S), "what was waited for never happened"


class _SeenCondition(threading.Condition):
    """Tells who is blocked in `wait`."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        super().__init__(self.lock)
        self.blocked: set[int] = set()
        self.seen = threading.Condition()

    def wait(self, timeout: float | None = None) -> bool:
        with self.seen:
            self.blocked.add(threading.get_ident())
            self.seen.notify_all()
        try:
            return super().wait(timeout)
        finally:
            with self.seen:
                self.blocked.discard(threading.get_ident())


class Gate:
    """Looks at the gate of one governor from outside: who is in, who waits, who is blocked."""

    def __init__(self, governor: TolariaGovernor) -> None:
        self._driver = governor._keeper.driver
        self._condition = _SeenCondition()
        self._driver._changed, self._driver._lock = self._condition, self._condition.lock

    @property
    def state(self) -> Any:
        return self._driver.state.gate

    def until_blocked(self, worker: Worker) -> None:
        """Return when that thread waits for the gate."""
        with self._condition.seen:
            there = self._condition.seen.wait_for(lambda: worker.ident in self._condition.blocked, PATIENCE_S)
        assert there, "that thread never waited for the gate"
        with self._condition:  # it has let go of the lock by now, so it is really waiting
            pass


@contextlib.contextmanager
def a_section_elsewhere(governor: TolariaGovernor, when_waited_for: Callable[[Flag], object]) -> Iterator[None]:
    """A section of another thread, open until the flag is set that is handed over when somebody is about to wait."""
    inside, leave = Flag(), Flag()

    def hold() -> None:
        with governor.using():
            inside.set()
            leave.wait()

    holder = Worker(hold)
    inside.wait()
    condition = governor._keeper.driver._changed
    wait = condition.wait

    def waited(timeout: float | None = None) -> bool:
        when_waited_for(leave)
        return wait(timeout)

    condition.wait = waited  # type: ignore[method-assign]
    try:
        yield
    finally:
        condition.wait = wait  # type: ignore[method-assign]
        leave.set()
        holder.join()


def assert_at_rest(governor: TolariaGovernor) -> None:
    """Nobody is in or waits, no slot is being filled or read, no method of the driver was left replaced."""
    state = governor._keeper.driver.state
    assert (state.gate.sections, state.gate.owner, state.gate.waiting) == ((), None, ())
    assert [slot for slot in state.ring if slot.phase is SlotPhase.FILLING or slot.readers] == []


# ------------------------------------------------------------ fixtures


@pytest.fixture(autouse=True)
def _alone(alone: None) -> None:
    """Every test here."""


@pytest.fixture
def govern() -> Iterator[Callable[..., TolariaGovernor]]:
    """Builds governors (judge: `non_finite` unless told); afterwards checks that each is at rest, and closes it."""
    made: list[TolariaGovernor] = []

    def make(*args: Any, **kwargs: Any) -> TolariaGovernor:
        kwargs.setdefault("detector", non_finite())
        governor = TolariaGovernor(*args, **kwargs)
        made.append(governor)
        return governor

    yield make
    try:
        for governor in made:
            if not governor.is_disabled:
                assert_at_rest(governor)
    finally:
        for governor in made:
            governor.close()


@pytest.fixture
def kit() -> Any:
    """The helpers of this file, by name: test modules cannot import a conftest."""
    return sys.modules[__name__]


@pytest.fixture
def group_of_one() -> Iterator[None]:
    """A process group with this process as its only rank."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def run_script() -> Callable[..., str]:
    """Run Python source in a new process; returns what it printed. `env` is added to the environment."""

    def run(code: str, *args: str, env: Mapping[str, str] | None = None) -> str:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *args],
            capture_output=True,
            text=True,
            timeout=120,
            env={**_environment(), **(env or {})},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def _environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(SOURCE), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}

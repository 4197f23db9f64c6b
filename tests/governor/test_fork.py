"""After `os.fork` the child trains ungoverned, and the parent does not notice."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system"),
]

PRELUDE = """
import gc, os, sys, threading, traceback, warnings
import torch
from torch import nn
from tolaria.errors import PhaseError
from tolaria.governor import TolariaGovernor
from tolaria.config import GovernorConfig
from tolaria.judge import non_finite

torch.set_num_threads(1)
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of a fork in a process with threads
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
x = torch.randn(8, 4)
governor = TolariaGovernor(model, optimizer, detector=non_finite())

def train():
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())

def in_child(work):
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert status == 0, "the child failed"

def closed(call):
    try:
        call()
    except PhaseError as error:
        assert "closed" in str(error)
    else:
        raise AssertionError("not refused")

governor.snapshot()
good = governor.digest()
"""


@pytest.fixture
def fork(run_script: Callable[..., str]) -> Callable[[str], Any]:
    def run(code: str) -> Any:
        import textwrap

        return run_script(PRELUDE + textwrap.dedent(code) + "\nprint('end')")

    return run


def test_the_child_trains_and_its_governor_is_closed(fork: Callable[[str], Any]) -> None:
    assert "end" in fork(
        """
        def work():
            before = governor._keeper.driver.state
            losses = [train() for _ in range(3)]
            assert losses[2] < losses[0]
            assert governor._keeper.driver.state is before, "a section was opened"
            for call in (governor.snapshot, governor.execute_rollback, lambda: governor.step(loss=1.0),
                         lambda: next(governor.watch([1])), governor.digest):
                closed(call)
            with governor.using():
                pass
            governor.close()

        in_child(work)
        assert governor.digest() == good
        train()
        assert governor.digest() != good
        assert governor.execute_rollback().success
        assert governor.digest() == good
        """
    )


def test_the_child_may_build_a_governor_of_its_own(fork: Callable[[str], Any]) -> None:
    assert "end" in fork(
        """
        def work():
            own = TolariaGovernor(model, optimizer, detector=non_finite())
            assert own.capabilities().rng == "restore"
            own.snapshot()
            digest = own.digest()
            train()
            own.execute_rollback()
            assert own.digest() == digest
            own.close()

        in_child(work)
        """
    )


def test_a_lock_that_was_held_at_the_fork(fork: Callable[[str], Any]) -> None:
    """Another thread is inside the driver's lock, and inside a section: neither exists in the child."""
    assert "end" in fork(
        """
        held, leave = threading.Event(), threading.Event()

        def hold():
            with governor.using(), governor._keeper.driver._changed, governor._course._count_lock:
                held.set()
                leave.wait(60)

        thread = threading.Thread(target=hold)
        thread.start()
        held.wait(60)

        def work():
            train()
            closed(governor.snapshot)
            with governor.using():
                train()
            governor.close()

        in_child(work)
        leave.set()
        thread.join(60)
        assert governor.digest() == good
        assert governor.execute_rollback().success
        """
    )


def test_a_fork_in_the_middle_of_a_rollback(fork: Callable[[str], Any]) -> None:
    """Another thread holds the gate exclusively."""
    assert "end" in fork(
        """
        held, leave = threading.Event(), threading.Event()
        governor.register("slow", (lambda: None, lambda _: (held.set(), leave.wait(60))))
        governor.snapshot()
        thread = threading.Thread(target=governor.execute_rollback)
        thread.start()
        held.wait(60)

        def work():
            train()
            closed(governor.execute_rollback)

        in_child(work)
        leave.set()
        thread.join(60)
        assert governor.statistics().rollbacks == 1
        train()
        """
    )


def test_workers_of_a_data_loader(fork: Callable[[str], Any]) -> None:
    assert "end" in fork(
        """
        from torch.utils.data import DataLoader, TensorDataset

        torch.manual_seed(3)
        loader = DataLoader(TensorDataset(torch.randn(12, 4)), batch_size=4, num_workers=2, multiprocessing_context="fork")
        seen = [loss for (batch,) in governor.watch(loader) for loss in [model(batch).square().mean()]]
        assert len(seen) == 3
        seen[-1].backward()
        governor.step(loss=seen[-1])
        assert governor.execute_rollback().success
        """
    )

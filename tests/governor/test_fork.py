"""After `os.fork` the child trains ungoverned, and the parent does not notice."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.slow

SCRIPT = """
import json, os, sys, threading, traceback, warnings
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tolaria.errors import PhaseError
from tolaria.governor import TolariaGovernor
from tolaria.judge import non_finite

torch.set_num_threads(1)
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of a fork in a process with threads


class Scene:
    def __init__(self):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.x = torch.randn(8, 4)
        self.governor = TolariaGovernor(self.model, self.optimizer, detector=non_finite())
        self.governor.snapshot()
        self.good = self.governor.digest()

    def train(self):
        loss = self.model(self.x).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
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


def the_child_trains_and_its_governor_is_closed(scene):
    governor = scene.governor

    def work():
        before = governor._keeper.driver.state
        losses = [scene.train() for _ in range(3)]
        assert losses[2] < losses[0]
        assert governor._keeper.driver.state is before, "a section was opened"
        for call in (governor.snapshot, governor.execute_rollback, lambda: governor.step(loss=1.0),
                     lambda: next(governor.watch([1])), governor.digest):
            closed(call)
        with governor.using():
            pass
        governor.close()

    in_child(work)
    assert governor.digest() == scene.good
    scene.train()
    assert governor.digest() != scene.good
    assert governor.execute_rollback().success
    assert governor.digest() == scene.good


def the_child_may_build_a_governor_of_its_own(scene):
    def work():
        own = TolariaGovernor(scene.model, scene.optimizer, detector=non_finite())
        assert own.capabilities().rng == "restore"
        own.snapshot()
        digest = own.digest()
        scene.train()
        own.execute_rollback()
        assert own.digest() == digest
        own.close()

    in_child(work)


def a_lock_that_was_held_at_the_fork(scene):
    # another thread is inside the driver's lock, and inside a section: neither exists in the child
    governor = scene.governor
    held, leave = threading.Event(), threading.Event()

    def hold():
        with governor.using(), governor._keeper.driver._changed, governor._course._tally._lock:
            held.set()
            leave.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(60)

    def work():
        scene.train()
        closed(governor.snapshot)
        with governor.using():
            scene.train()
        governor.close()

    in_child(work)
    leave.set()
    thread.join(60)
    assert governor.digest() == scene.good
    assert governor.execute_rollback().success


def a_fork_in_the_middle_of_a_rollback(scene):
    # another thread holds the gate exclusively
    governor = scene.governor
    held, leave = threading.Event(), threading.Event()
    governor.register("slow", (lambda: None, lambda _: (held.set(), leave.wait(60))))
    governor.snapshot()
    thread = threading.Thread(target=governor.execute_rollback)
    thread.start()
    assert held.wait(60)

    def work():
        scene.train()
        closed(governor.execute_rollback)

    in_child(work)
    leave.set()
    thread.join(60)
    assert governor.statistics().rollbacks == 1
    scene.train()


def workers_of_a_data_loader(scene):
    loader = DataLoader(TensorDataset(torch.randn(12, 4)), batch_size=4, num_workers=2, multiprocessing_context="fork")
    losses = [scene.model(batch).square().mean() for (batch,) in scene.governor.watch(loader)]
    assert len(losses) == 3
    losses[-1].backward()
    scene.governor.step(loss=losses[-1])
    assert scene.governor.execute_rollback().success


results = {}
for name in sys.argv[1:]:
    scene = Scene()
    try:
        globals()[name](scene)
        results[name] = "passed"
    except BaseException:
        results[name] = traceback.format_exc()
    scene.governor.close()
print(json.dumps(results))
"""

SCENES = [
    "the_child_trains_and_its_governor_is_closed",
    "the_child_may_build_a_governor_of_its_own",
    "a_lock_that_was_held_at_the_fork",
    "a_fork_in_the_middle_of_a_rollback",
    "workers_of_a_data_loader",
]


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Any:
    """All scenes in one new process: this one has too many threads to fork."""
    run_script: Callable[..., str] = request.getfixturevalue("run_script")
    return json.loads(run_script(SCRIPT, *SCENES).splitlines()[-1])


@pytest.mark.parametrize("scene", SCENES)
def test_fork(scene: str, results: dict[str, str]) -> None:
    assert results[scene] == "passed", results[scene]

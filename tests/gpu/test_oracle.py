"""The race oracle fed from a run on a GPU, and PyTorch's stream sanitizer as a second opinion where it can see.

Nothing is held back here, and nothing goes wrong: what counts is whether something orders two accesses.
"""

import contextlib
import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from tolaria import GovernorConfig, TolariaGovernor, judge
from tolaria.cuda import ContextDevice
from tolaria.device import BlockingDevice
from tolaria.errors import TolariaError
from tolaria.testing.gates import distinct_streams
from tolaria.testing.picture import no_synchronize, no_wait, raw_stream
from tolaria.testing.recorder import Recorder

pytestmark = pytest.mark.cuda

COPIES = "cuda:0 tolaria's copies"


class Subject:
    """A model, its optimizer, streams of torch's pool and a raw one."""

    def __init__(self, barrier):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16)).cuda()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        config = GovernorConfig(rng="keep", barrier=barrier, host_slots=0, scrub_every=0)
        self.governor = TolariaGovernor(self.model, self.optimizer, config=config, detector=judge.non_finite())
        self.a, self.b = distinct_streams(2)
        self.raw = raw_stream()
        self.step()
        self.governor.snapshot().wait("sealed")
        torch.cuda.synchronize()

    def step(self):
        self.model(torch.randn(8, 16, device="cuda")).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def write(self, stream):
        with torch.no_grad(), self.governor.using(), torch.cuda.stream(stream):
            for parameter in self.model.parameters():
                parameter.add_(1)

    def read(self, stream):
        with torch.no_grad(), self.governor.using(write=False), torch.cuda.stream(stream):
            return [parameter.clone() for parameter in self.model.parameters()]

    def run(self, waits=True, whole=True):
        """Everybody on a stream of his own. Between the user's own streams stands one wait of the user's.

        Without `whole` the governor may notice by itself that something is wrong, which ends the run early.
        """
        with contextlib.suppress(*[] if whole else [TolariaError]), Recorder(self.governor) as recorder:
            self.write(self.a)
            if waits:
                torch.cuda.current_stream().wait_stream(self.a)
            self.step()
            self.governor.execute_rollback()
            self.read(self.b)
            self.governor.execute_rollback()
            self.write(self.raw)
            info = self.governor.snapshot()
            info.wait("sealed")
            self.write(self.raw)
            self.governor.execute_rollback(to=info).wait()
            self.read(self.a)
        torch.cuda.synchronize()
        return recorder


@pytest.fixture
def subject(request):
    made = Subject(getattr(request, "param", "context"))
    yield made
    made.governor.close()


def pairs(recorder):
    return {(race.first.actor, race.second.actor) for race in recorder.races}


def named(stream):
    return f"cuda:0 stream {stream.cuda_stream:#x}"


@pytest.mark.parametrize("subject", ["context", "blocking"], indirect=True)
def test_the_shipped_governor_has_no_race(subject):
    recorder = subject.run()
    assert [str(race) for race in recorder.races] == []
    seen = {access.actor for access in recorder.ledger._accesses.values()}
    assert {named(subject.a), named(subject.b), named(subject.raw), "cuda:0 default stream"} <= seen
    assert (COPIES in seen) == (subject.governor.capabilities().barrier == "context")


@pytest.mark.parametrize(
    ("name", "instead", "first", "second"),
    [
        ("context_record", ContextDevice.stream_record, "cuda:0 default stream", COPIES),
        ("stream_wait", no_wait, "cuda:0 default stream", COPIES),
        ("context_wait", no_wait, COPIES, "b"),
        ("host_wait", no_wait, COPIES, "thread"),
    ],
)
def test_each_removed_edge_is_a_race(subject, monkeypatch, name, instead, first, second):
    monkeypatch.setattr(ContextDevice, name, instead)
    if name == "host_wait":  # on a slow host the device may be done before it is asked, and then nothing need wait
        monkeypatch.setattr(ContextDevice, "has_passed", lambda *_: False)
    second = named(subject.b) if second == "b" else second
    found = pairs(subject.run(whole=False))
    assert any(one == first and other.startswith(second) for one, other in found), found


@pytest.mark.parametrize("subject", ["blocking"], indirect=True)
def test_without_waiting_for_the_device_copies_race(subject, monkeypatch):
    monkeypatch.setattr(BlockingDevice, "synchronize", no_synchronize)
    found = pairs(subject.run(whole=False))
    assert ("cuda:0 default stream", named(subject.b)) in found


def test_a_wait_that_the_user_forgot_is_a_race(subject):
    recorder = subject.run(waits=False)
    assert (named(subject.a), "cuda:0 default stream") in pairs(recorder)
    race = next(race for race in recorder.races if race.first.actor == named(subject.a))
    assert "in write" in race.first.stack
    assert "in step" in race.second.stack
    assert race.missing.startswith("cuda:0 default stream does not wait for")


# ---------------------------------------------------------------- a second opinion

SECOND_OPINION = """
import json, sys
import torch
import torch.cuda._sanitizer as sanitizer

sys.path[:0] = {path!r}
from gpu.test_oracle import Subject
from tolaria.testing.picture import unordered
from tolaria.testing.recorder import Recorder

subject = Subject("context")
handler = sanitizer.cuda_sanitizer.dispatch.event_handler
errors, original = [], handler._handle_kernel_launch
handler._handle_kernel_launch = lambda *arguments: (errors.extend(original(*arguments)), [])[1]
sanitizer.cuda_sanitizer.enable()

def opinions(work):
    torch.cuda.synchronize()
    errors.clear()
    with Recorder(subject.governor) as recorder:
        work()
    torch.cuda.synchronize()
    return len(errors), len(recorder.races)

def users():
    subject.write(subject.a)
    subject.read(subject.b)

def rollback():
    subject.write(subject.a)
    subject.governor.execute_rollback()

def unordered_rollback():
    with unordered("context"):
        rollback()

def ordered_by_the_rollback():
    rollback()
    subject.read(subject.b)

works = dict(users=users, rollback=rollback, unordered=unordered_rollback, ordered=ordered_by_the_rollback)
print(json.dumps({{name: opinions(work) for name, work in works.items()}}))
sanitizer.cuda_sanitizer.disable()
"""


def test_what_the_sanitizer_of_torch_sees_and_what_it_does_not():
    """In a process of its own: what it hooks into cannot be taken off again."""
    program = SECOND_OPINION.format(path=sys.path)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    seen = {name: (theirs > 0, ours > 0) for name, (theirs, ours) in found.items()}
    assert seen == {
        "users": (True, True),  # torch operators on streams of torch: both
        "rollback": (False, False),
        "unordered": (False, True),  # the governor's copies are a kernel that torch does not dispatch
        "ordered": (True, False),  # context-wide events are none of torch's: a false report
    }

"""Reading back and draining over two devices: the work of each is waited for, and by everybody who has to."""

import pytest
from cuda_driver.fake_driver import Machine
from cuda_driver.two_devices import Pair

from tolaria.cuda import ContextDevice
from tolaria.operations import Part, SectionKind
from tolaria.words import portable_digest

PUSHES = {"cuCtxPushCurrent ctx1", "cuCtxPopCurrent"}


def nothing(self, event):
    pass


def of_the_first_device(original):
    """The same for one device only."""

    def method(self, *event):
        return original(self, *event) if self.index == 0 else None

    return method


@pytest.fixture
def machine():
    made = Machine(2)
    yield made
    assert (made.violations, made.depth()) == ([], 0)


# ------------------------------------------------------------ reading back


def test_a_rollback_reads_back_on_both_devices_behind_the_post_barrier(machine):
    pair = Pair(machine)
    pair.snapshot()
    with machine.tape() as calls:
        done = pair.rollback(read_back=True)
    made = [call for call in calls if call not in PUSHES]
    behind = made[made.index("cuCtxWaitEvent ctx1 h") + 1 :]
    assert behind == [
        "launch own0 read",
        "launch own1 read",
        "cuEventRecord own0 i",
        "cuEventRecord own1 j",
        "launch own0 read",
        "launch own1 read",
        "cuEventRecord own0 k",
        "cuEventRecord own1 l",
    ]
    assert done.read_back
    assert [name for name, _ in done.read] == ["cuda:0", "cuda:1"]
    assert [name for name, _ in pair.driver.state.buffers_done] == ["cuda:0", "cuda:1"]
    assert pair.driver.state.all_done == done.read
    del done, behind
    pair.close()


@pytest.mark.parametrize(("kind", "events"), [(SectionKind.FORWARD, "ab"), (SectionKind.WRITE, "cd")])
def test_sections_wait_for_the_readings_of_both_devices(machine, kind, events):
    pair = Pair(machine)
    pair.snapshot()
    pair.driver.open_section(SectionKind.FOREIGN, False, 5.0)  # nobody has to wait for the snapshot any more
    pair.driver.close_section(0)
    with machine.tape() as calls:
        pair.rollback(read_back=True)
        start = len(machine.calls)
        pair.driver.open_section(kind, False, 5.0)
        pair.driver.close_section(0)
        number = len(machine.calls) - start
    reads = [call for call in calls if call.startswith("cuEventRecord")][-4:]
    letters = dict(zip("abcd", (call.split()[-1] for call in reads), strict=True))
    waits = [call for call in calls[-number:] if call.startswith("cuStreamWaitEvent")]
    assert waits == [f"cuStreamWaitEvent main{i} {letters[events[i]]}" for i in (0, 1)]
    pair.close()


def digests(pair):
    """Of what is live, per device: what a reading now would find."""
    return {
        name: int(sum(portable_digest([pair.store.live[name, part]]) for part in Part)) for name in pair.store.tallies
    }


def reads_what_was_restored(machine, kind=SectionKind.WRITE):
    """A writer comes right after the rollback, in a section. Answers per device whether the reading was first."""
    pair = Pair(machine)
    for tensor in pair.store.live.values():
        tensor.fill_(3)
    pair.snapshot()
    machine.finish()
    expected = digests(pair)
    pair.rollback(read_back=True)
    pair.driver.open_section(kind, False, 5.0)
    for (_, part), tensor in pair.store.live.items():
        if kind is SectionKind.WRITE or part is Part.BUFFERS:  # what such a section may write
            tensor.fill_(9)
    pair.driver.close_section(0)
    machine.finish()
    found = {name: int(tally.row[0]) for name, tally in pair.store.tallies.items()}
    pair.close()
    return [found[name] == expected[name] for name in expected]


@pytest.mark.parametrize("kind", [SectionKind.WRITE, SectionKind.FORWARD])
@pytest.mark.parametrize(
    ("method", "instead", "whole"),
    [
        (None, None, [True, True]),
        ("caller_wait", nothing, [False, False]),
        ("caller_wait", of_the_first_device(ContextDevice.caller_wait), [True, False]),
    ],
    ids=["as it ships", "nobody waits", "one device waits"],
)
def test_what_was_restored_is_read_before_the_next_writer_of_either_device(
    machine, monkeypatch, kind, method, instead, whole
):
    if method is not None:
        monkeypatch.setattr(ContextDevice, method, instead)
    assert reads_what_was_restored(machine, kind) == whole


# ------------------------------------------------------------ draining


def test_a_snapshot_of_two_devices_is_drained_on_the_second_stream_of_each(machine):
    pair = Pair.in_two_tiers(machine)
    taken = pair.snapshot()
    with machine.tape() as calls:
        assert pair.drain(taken) == 2
    made = [call for call in calls if call not in PUSHES and "Priority" not in call and call != "cuCtxPushCurrent ctx0"]
    assert made == [
        "cuEventRecord own0 a",
        "cuStreamWaitEvent own0.1 a",
        "launch own0.1 transfer",
        "cuEventRecord own0.1 b",
        "cuEventRecord own1 c",
        "cuStreamWaitEvent own1.1 c",
        "launch own1.1 transfer",
        "cuEventRecord own1.1 d",
        "cuEventSynchronize b",
        "cuEventSynchronize d",
    ]
    pair.close()


def drained(machine):
    """Answers per device whether the host found the snapshot in the slot that it was drained into."""
    pair = Pair.in_two_tiers(machine)
    for tensor in pair.store.live.values():
        tensor.fill_(3)
    pair.drain(pair.snapshot())
    found = dict(zip(pair.store.live, pair.store.at_rest, strict=True))
    pair.close()
    return [all(bool((found[name, part] == 3).all()) for part in Part) for name in pair.devices]


@pytest.mark.parametrize(
    ("method", "instead", "whole"),
    [
        (None, None, [True, True]),
        ("host_wait", nothing, [False, False]),
        ("host_wait", of_the_first_device(ContextDevice.host_wait), [True, False]),
        ("stream_record", ContextDevice._event, [False, False]),
    ],
    ids=["as it ships", "the host does not wait", "for one device only", "the transfers do not wait"],
)
def test_what_was_drained_is_there_when_the_host_reads_it(machine, monkeypatch, method, instead, whole):
    if method is not None:
        monkeypatch.setattr(ContextDevice, method, instead)
    assert drained(machine) == whole

"""What becomes of errors of a device: a lost one is named as such, whoever noticed; others stay what they are."""

from __future__ import annotations

import pytest
import torch
from cuda_driver.fake_driver import CUresult, Machine
from torch import nn

from tolaria import DeviceLost, RollbackFailed, TolariaInternalError
from tolaria.cuda import STICKY_CODES, ContextDevice, device_lost, named
from tolaria.errors import StateMismatch
from tolaria.snapshot import Vault

STICKY = {700: "illegal address", 710: "failed assert", 719: "launch failure"}


class AcceleratorError(RuntimeError):
    """Like `torch.AcceleratorError`, which only torch can make."""

    def __init__(self, message: str, code: int | None) -> None:
        super().__init__(message)
        self.error_code = code


CALLS = {
    "cuCtxRecordEvent": lambda device, event: device.context_record(),
    "cuCtxWaitEvent": lambda device, event: device.context_wait(event),
    "cuEventRecord": lambda device, event: device.stream_record(),
    "cuStreamWaitEvent": lambda device, event: device.stream_wait(event),
    "cuEventSynchronize": lambda device, event: device.host_wait(event),
    "cuEventQuery": lambda device, event: device.has_passed(event),
    "cuStreamSynchronize": lambda device, event: device.synchronize(),
    "cuEventElapsedTime": lambda device, event: device.elapsed_ms(event, event),
}


@pytest.fixture
def device(machine):
    return ContextDevice("cuda:0", machine.driver, machine.streams)


@pytest.mark.parametrize("code", [700, 710])
@pytest.mark.parametrize("call", CALLS)
def test_a_sticky_answer_of_the_driver_is_a_lost_device(call, code, machine, device):
    event = device.mark()
    machine.fails[call] = code
    with pytest.raises(DeviceLost, match=f"calling {call}"):
        CALLS[call](device, event)


@pytest.mark.parametrize("call", CALLS)
def test_any_other_answer_is_a_bug_of_ours(call, machine, device):
    event = device.mark()
    machine.fails[call] = 400
    with pytest.raises(TolariaInternalError, match=call):
        CALLS[call](device, event)


def test_the_message_names_the_device_error(machine, device):
    """where the bindings' codes are plain IntEnums (cuda-bindings 12 on Python 3.11 and later).

    `str` of one is its number alone: "the device reports 710". (cuda-bindings 13 has an enumeration of its own.)
    """
    machine.fails["cuEventRecord"] = 710
    with pytest.raises(DeviceLost, match="CUDA_ERROR_ASSERT"):
        device.stream_record()


def test_which_codes_are_sticky():
    assert {700, 710, 719} <= STICKY_CODES
    assert not {0, 2, 201, 400, 600} & STICKY_CODES  # out of memory, among others, is not


@pytest.mark.parametrize("code", [700, 710])
def test_named(code):
    error = AcceleratorError("CUDA error: an illegal memory access\nSearch for it in the manual.", code)
    lost = named(error, "performing Copy")
    assert isinstance(lost, DeviceLost)
    assert lost.doing == "performing Copy"
    assert "CUDA error: an illegal memory access" in str(lost)
    assert "manual" not in str(lost)


@pytest.mark.parametrize(
    "error",
    [
        AcceleratorError("CUDA error: invalid argument", 1),
        AcceleratorError("CUDA error", None),
        RuntimeError("anything"),
        torch.OutOfMemoryError("full"),
        StateMismatch("a", "b", "c"),
        device_lost("a", "b"),
    ],
)
def test_not_named(error):
    assert named(error, "performing Copy") is error


def test_an_error_without_a_message():
    """`str(error).splitlines()[0]` of an empty message is an IndexError."""
    assert isinstance(named(AcceleratorError("", 700), "performing Copy"), DeviceLost)


# ------------------------------------------------------------ through the governor


def lost_copy(code):
    return AcceleratorError("CUDA error: an illegal memory access was encountered", code)


def test_a_device_that_is_lost_in_a_rollback(late, govern):
    """After the first write, and still not `RollbackFailed`: rolling back once more cannot help."""
    governor = govern(nn.Linear(2, 2))
    governor.snapshot()
    late.broken_launch = lost_copy(700)
    with pytest.raises(DeviceLost, match="illegal memory access") as caught:
        governor.execute_rollback()
    assert isinstance(caught.value.__cause__, AcceleratorError)
    assert governor._keeper.driver.state.torn


def test_a_device_that_is_lost_while_what_was_restored_is_read(late, govern, monkeypatch):
    """No rollback that was merely not verified, as any other failure of that reading leaves it."""

    def fails(*_):
        raise lost_copy(code)

    monkeypatch.setattr(Vault, "read_live", fails)
    governor = govern(nn.Linear(2, 2))
    governor.snapshot()
    code = 1
    assert governor.execute_rollback().success
    code = 700
    with pytest.raises(DeviceLost, match="illegal memory access"):
        governor.execute_rollback()


def test_a_device_that_is_lost_in_a_snapshot(late, govern):
    governor = govern(nn.Linear(2, 2))
    before = governor.snapshot()
    late.broken_launch = lost_copy(700)
    with pytest.raises(DeviceLost, match="illegal memory access"):
        governor.snapshot()
    assert before.state == "staged"
    assert [slot.phase.value for slot in governor._keeper.ring].count("filling") == 0


def test_a_device_that_is_lost_in_an_automatic_snapshot_ends_the_run(late, govern, run):
    governor = govern(run.model, run.optimizer, cadence=1)
    run.step(governor, run.batches[0])
    loss = run.backward(run.batches[1])
    late.broken_launch = lost_copy(719)
    with pytest.raises(DeviceLost):
        governor.step(loss=loss)


def test_another_error_of_a_copy_in_a_rollback(late, govern):
    governor = govern(nn.Linear(2, 2))
    governor.snapshot()
    late.broken_launch = lost_copy(1)
    with pytest.raises(RollbackFailed, match="AcceleratorError after the first write") as caught:
        governor.execute_rollback()
    assert type(caught.value.__cause__) is AcceleratorError
    governor.execute_rollback()  # the snapshot is still held
    assert not governor._keeper.driver.state.torn


def test_another_error_of_a_copy_in_a_snapshot_stays_as_it_was(late, govern):
    governor = govern(nn.Linear(2, 2))
    error = late.broken_launch = lost_copy(1)
    with pytest.raises(AcceleratorError) as caught:
        governor.snapshot()
    assert caught.value is error
    assert governor.snapshot().state == "staged"


@pytest.mark.parametrize(
    ("call", "method"), [("cuCtxRecordEvent", "snapshot"), ("cuCtxRecordEvent", "execute_rollback"),
                         ("cuStreamWaitEvent", "snapshot"), ("cuCtxWaitEvent", "execute_rollback"),
                         ("cuEventRecord", "execute_rollback")],
)  # fmt: skip
def test_a_device_that_is_lost_in_a_barrier(call, method, late, govern):
    governor = govern(nn.Linear(2, 2))
    governor.snapshot()
    late.fails[call] = 710
    with pytest.raises(DeviceLost):
        getattr(governor, method)()
    late.fails.clear()
    assert governor._keeper.driver.state.gate.owner is None


def test_a_device_that_is_lost_while_a_step_waits_for_its_numbers(late, govern, run):
    """Driver calls made outside of a protocol, too."""
    governor = govern(run.model, run.optimizer)
    run.step(governor, run.batches[0])
    loss = run.backward(run.batches[1])
    late.fails["cuEventQuery"] = 710
    with pytest.raises(DeviceLost):
        governor.step(loss=loss)


def test_a_device_that_is_lost_when_a_governor_is_opened():
    machine = Machine()
    machine.fails["cuDevicePrimaryCtxRetain"] = 710
    with pytest.raises(DeviceLost):
        ContextDevice("cuda:0", machine.driver, machine.streams)


def test_dropping_a_governor_of_a_lost_device_is_silent(late):
    """Nothing is raised from `__del__` (warnings are errors here)."""
    from tolaria import TolariaGovernor

    governor = TolariaGovernor(nn.Linear(2, 2))
    governor.snapshot()
    late.fails["cuStreamSynchronize"] = 710
    del governor


def test_a_context_is_given_back_when_opening_fails_half_way():
    """the primary context stays retained when the stream cannot be made."""
    machine = Machine()
    machine.fails["cuStreamCreateWithPriority"] = 2
    with pytest.raises(TolariaInternalError):
        ContextDevice("cuda:0", machine.driver, machine.streams)
    assert machine.depth() == 0
    assert machine.contexts[0].retained == 0


def test_the_stand_in_answers_like_the_bindings():
    assert str(CUresult(710)) == "710"

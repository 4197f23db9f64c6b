"""The fault of asynchronous devices: writes on a foreign stream that are under way when the panic is answered.

The device itself is in `test_on_a_device`; elsewhere a stand-in decides when the held-back writes land.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tolaria.drill import catalogue, command, gpt_faults, in_flight
from tolaria.drill.catalogue import WORKLOADS
from tolaria.drill.digits import Digits
from tolaria.drill.faults import KINDS, Injector, Moment, Scene, fewest_steps, plan
from tolaria.drill.in_flight import NAME, CudaForeign, overwrite_in_flight
from tolaria.drill.runs import Audience, run_plain
from tolaria.drill.score import survived
from tolaria.drill.workloads import Training
from tolaria.keeper import Keeper
from tolaria.observe import Reading, Readings
from tolaria.protocol import Taken
from tolaria.snapshot import Vault

SPACE = 10 + 10 + 5 + 3  # cadence, probation, steps until detection, and those by which verdicts are late
LATE = 3
MIN_STEPS = 400
with_foreign_kernel = WORKLOADS["digits"].with_foreign_kernel
GARBAGE = 1e3


class StandIn:
    """Poisons at once. The rest lands with it, as on a device that orders itself, or when it is asked about.

    The drill asks right after each rollback: then, what is held back lands behind the restore.
    """

    title = "a stand-in"

    def __init__(self, *, holds: bool = False) -> None:
        self.holds = holds
        self.told: list[tuple[str, str]] = []  # (what, by which thread)
        self.pending: list[Callable[[], Any]] = []

    def tell(self, what: str) -> None:
        self.told.append((what, threading.current_thread().name))

    def settle(self) -> None:
        self.tell("settle")

    @contextmanager
    def stream(self) -> Generator[None]:
        self.tell("stream begins")
        yield
        self.tell("stream ends")

    def write(self, values: torch.Tensor, *, held: bool) -> None:
        self.tell("held write" if held else "write")
        if held:
            values.view(-1)[0] = torch.nan
        self.pending.append(lambda: values.fill_(GARBAGE))
        self.pending.append(lambda: values.view(-1)[0].fill_(torch.nan))
        if not self.holds:
            self.wait()

    def is_under_way(self) -> bool:
        was = bool(self.pending)
        self.wait()
        return was

    def wait(self) -> None:
        for land in self.pending:
            land()
        self.pending.clear()


# -- the list of faults


def test_the_cpu_has_its_seven_faults() -> None:
    assert WORKLOADS["digits"].kinds_for(torch.device("cpu")) is KINDS
    assert WORKLOADS["gpt"].kinds_for(torch.device("cpu")) is gpt_faults.KINDS
    assert command.prepare("digits", 0, MIN_STEPS, torch.device("cpu")).faults == plan(0, MIN_STEPS, KINDS)


def test_cuda_has_one_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "CudaForeign", lambda _: StandIn())
    names = [kind.name for kind in WORKLOADS["digits"].kinds_for(torch.device("cuda"))]
    assert names == [
        "gradient_explosion",
        "zeroed_moments",
        "foreign_write",
        "bit_flip",
        NAME,
        "garbage_batches",
        "returning_bit_flip",
        "nan_batch",
    ]
    assert [name for name in names if name != NAME] == [kind.name for kind in KINDS]
    names = [kind.name for kind in WORKLOADS["gpt"].kinds_for(torch.device("cuda"))]
    assert names.index(NAME) == names.index("garbage_batches") - 1
    assert [name for name in names if name != NAME] == [kind.name for kind in gpt_faults.KINDS]


@pytest.mark.parametrize("steps", [None, 600, 2000], ids=["fewest", "600", "2000"])
@pytest.mark.parametrize("workload", WORKLOADS)
def test_late_verdicts_tell_neighbours_apart(workload: str, steps: int | None) -> None:
    kinds = WORKLOADS[workload].with_foreign_kernel(StandIn())
    for seed in range(50):
        faults = plan(seed, steps or fewest_steps(kinds), kinds)
        assert [fault.batch for fault in faults] == sorted(fault.batch for fault in faults)
        transient = [fault for fault in faults if fault.kind.moment is not Moment.DATA and fault.kind.times == 1]
        ends = [0, *(fault.batch + fault.kind.length for fault in transient)]
        starts = [fault.batch for fault in faults[: len(ends)]]
        assert min(start - end for start, end in zip(starts, ends, strict=True)) >= SPACE
        (kernel,) = (fault for fault in faults if fault.kind.name == NAME)
        assert kernel.batch % 10 == 2, "a snapshot would be taken while it is under way"


# -- what it does


@pytest.fixture(scope="module")
def workload() -> Digits:
    return Digits(0, 40, torch.device("cpu"))


@pytest.fixture
def training(workload: Digits) -> Training:
    return workload.build()


def test_another_thread_writes_inside_a_section(workload: Digits, training: Training) -> None:
    foreign = StandIn(holds=True)

    @contextmanager
    def section() -> Generator[None]:
        foreign.tell("section begins")
        yield
        foreign.tell("section ends")

    parameters = list(training.model.parameters())
    versions = [p._version for p in parameters]
    generator = torch.Generator()
    overwrite_in_flight(foreign, Scene(workload, training, workload.batches[0], generator, section))
    words, threads = zip(*foreign.told, strict=True)
    writes = ["held write", *["write"] * (len(parameters[::3]) - 1)]
    assert words == ("settle", "stream begins", "section begins", *writes, "section ends", "stream ends")
    assert set(threads[1:]) == {"foreign-kernel"}
    assert threads[0] == threading.current_thread().name
    assert [int(p.isnan().sum()) for p in parameters] == [1, *[0] * (len(parameters) - 1)], "poison now, the rest later"
    foreign.wait()
    assert [bool((p.view(-1)[1:] == GARBAGE).all()) for p in parameters] == [n % 3 == 0 for n in range(len(parameters))]
    assert [p._version for p in parameters] == versions


def test_an_error_of_the_launch_is_the_runs(workload: Digits, training: Training) -> None:
    foreign = StandIn()

    def refuse() -> Any:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        overwrite_in_flight(foreign, Scene(workload, training, workload.batches[0], torch.Generator(), refuse))


def test_an_injector_knows_what_is_under_way(workload: Digits, training: Training) -> None:
    foreign = StandIn(holds=True)
    (kind,) = (kind for kind in with_foreign_kernel(foreign) if kind.name == NAME)
    (fault,) = plan(0, MIN_STEPS, [kind])
    batch = workload.batches[0]._replace(index=fault.batch)
    injector = Injector([fault], workload, training)
    assert injector.under_way() == ()
    injector.begin(batch)
    injector.strike(Moment.UPDATE, batch)
    assert injector.struck == (NAME,)
    injector.wait()
    assert foreign.pending == []
    injector.begin(batch)
    injector.strike(Moment.UPDATE, batch)
    assert injector.struck == (), "it does not come again on replay"


def test_the_hold_fits_into_an_int_of_the_kernel() -> None:
    assert in_flight._cycles(1_980_000) == 59_400_000
    assert 0 < in_flight._cycles(0) <= in_flight._cycles(10**9) == 2**31 - 1


# -- whole drills


def make_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers and snapshots are read `LATE` steps after they were sent, as on a device that is not waited for."""
    sent: list[Reading] = []
    number: dict[int, int] = {}  # of a reading, by id: `sent` keeps them, so no id comes twice
    staged: dict[int, int] = {}  # readings sent when a slot was filled
    send, stage = Readings.send, Keeper._stage

    def counted_send(self: Readings, *args: Any) -> Reading:
        reading = send(self, *args)
        sent.append(reading)
        number[id(reading)] = len(sent)
        return reading

    def counted_stage(self: Keeper, *args: Any) -> Taken:
        taken = stage(self, *args)
        staged[taken.slot] = len(sent)
        return taken

    monkeypatch.setattr(Readings, "send", counted_send)
    monkeypatch.setattr(Reading, "has_arrived", lambda self: len(sent) - number[id(self)] >= LATE)
    monkeypatch.setattr(Keeper, "reads_late", True)
    monkeypatch.setattr(Keeper, "_stage", counted_stage)
    monkeypatch.setattr(Vault, "is_examined", lambda self, slot: len(sent) - staged[slot] >= LATE)


def rehearse(foreign: StandIn, seed: int, deaf: Audience) -> command.Result:
    kinds = with_foreign_kernel(foreign)
    return command.run_drill(command.prepare("digits", seed, MIN_STEPS, torch.device("cpu"), kinds), deaf)


@pytest.mark.slow
@pytest.mark.parametrize("late", [False, True], ids=["at once", "late"])
def test_every_fault_of_the_longer_list_is_recovered(
    late: bool, seed: int, deaf: Audience, monkeypatch: pytest.MonkeyPatch
) -> None:
    if late:
        make_late(monkeypatch)
    result = rehearse(StandIn(), seed, deaf)
    assert result.report["recovered"] == result.report["injected"] == len(KINDS) + 1
    assert result.score.is_good
    assert not result.report["runs"]["unguarded"]["survived"]
    (kernel,) = (fault for fault in result.report["faults"] if fault["kind"] == NAME)
    assert kernel["detected_step"] - kernel["step"] <= 1
    assert kernel["action"] == "replay"
    lost = {fault.kind: fault.steps_lost for fault in result.score.faults}
    assert (lost[NAME] > kernel["detected_step"] - kernel["restored_step"]) is late


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_alone_and_unguarded_it_ruins_the_run(seed: int, deaf: Audience) -> None:
    (kind,) = (kind for kind in with_foreign_kernel(StandIn()) if kind.name == NAME)
    stage = command.prepare("digits", seed, MIN_STEPS, torch.device("cpu"), [kind])
    ruined = run_plain("alone", stage.workload, stage.workload.batches, stage.faults, deaf)
    assert [step.batch for step in ruined.kept if step.struck] == [stage.faults[0].batch]
    assert not survived(ruined, stage.workload.chance_loss)


@pytest.mark.slow
def test_writes_that_land_behind_the_restore_are_a_finding(seed: int, deaf: Audience) -> None:
    """The red twin: a rollback that does not wait for foreign streams."""
    result = rehearse(StandIn(holds=True), seed, deaf)
    assert not result.score.is_good
    assert result.report["runs"]["guarded"]["false_rollbacks"]
    assert [NAME.replace("_", " ") in incident.note for incident in result.guarded.incidents].count(True) == 1


# -- the device


@pytest.mark.cuda
def test_on_a_device() -> None:
    foreign = CudaForeign(torch.device("cuda"))
    values, others = torch.zeros(1000, device="cuda"), torch.zeros(3, 5, device="cuda")
    foreign.settle()

    def launch() -> None:
        with foreign.stream():
            foreign.write(values, held=True)
            foreign.write(others, held=False)

    thread = threading.Thread(target=launch)
    thread.start()
    thread.join()
    assert foreign.is_under_way(), f"over within the {in_flight.HOLD_MS} ms for which it is held"
    foreign.wait()
    assert not foreign.is_under_way()
    assert int(values.isnan().sum()) == 16
    assert int(others.isnan().sum()) == 1
    assert float(values.nan_to_num().abs().max()) >= GARBAGE

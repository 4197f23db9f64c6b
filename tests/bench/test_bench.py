"""`tolaria bench`: that the report says what was measured. Never how long anything took."""

from __future__ import annotations

import importlib
import json
import math
import os
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tolaria import memory
from tolaria.bench import contest, own, training
from tolaria.bench.peers.contestant import CATALOGUE, Entry
from tolaria.bench.records import Row, Spread, Standing, as_json
from tolaria.bench.show import Show
from tolaria.bench.workload import SIZES, Size, Transformer, Workload
from tolaria.cli import main

CPU = torch.device("cpu")
TINY = Size("tiny", 32, 2, 2, 64, 2, 16)
TORCH = [entry for entry in CATALOGUE if entry.name.startswith("torch:") and entry.kind == "snapshot"]
SPREAD = {"median", "low", "high", "count"}


# ---------------------------------------------------------------- the workload


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_a_size_is_what_it_says(size: Size) -> None:
    with torch.device("meta"):
        parameters = list(Transformer(size).parameters())
    assert sum(parameter.numel() for parameter in parameters) == size.num_weights
    assert len(parameters) == 12 * size.layers + 1


def test_the_large_sizes_are_those_of_the_targets() -> None:
    assert round(SIZES["355m"].state_bytes / 1e9, 2) == 4.25
    assert round(SIZES["1.3b"].state_bytes / 1e9, 2) == 15.74
    assert SIZES["10mb"].state_bytes == pytest.approx(10e6, rel=0.02)
    assert SIZES["400mb"].state_bytes == pytest.approx(400e6, rel=0.02)


@pytest.mark.usefixtures("alone")
def test_its_tensors_are_all_that_a_step_changes() -> None:
    work = contest.prepare(TINY, CPU)
    before = [tensor.clone() for tensor in work.tensors()]
    work.step(next(work.batches(1)))
    assert len(before) == 4 * len(list(work.model.parameters()))
    assert not any(map(torch.equal, before, work.tensors()))


# ---------------------------------------------------------------- records


def test_a_spread_of_few_is_their_range_and_of_many_their_quartiles() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0, 3)
    assert Spread.of([4.0, 0.0, 2.0, 1.0, 3.0]) == Spread(2.0, 1.0, 3.0, 5)


def test_a_ratio_is_taken_round_by_round() -> None:
    row = Row.beside("snapshot", "x", [2.0, 30.0, 6.0], "floor", [1.0, 10.0, 3.0])
    assert row.times_floor == 2.0  # of 2, 3 and 2; that of the medians is the same, that of the sums is not
    assert Row.beside("snapshot", "x", [1.0, 9.0, 9.0], "floor", [1.0, 1.0, 3.0]).times_floor == 3.0


def test_host_time_is_told_per_tensor() -> None:
    row = own._held("rollback", [3.0, 1.0, 2.0], 100)
    assert (row.ms.median, row.note, row.floor) == (2.0, "20.0 us per tensor", None)


def test_a_standing_survives_json() -> None:
    standing = Standing(name="a", kind="snapshot", status="measured", stall_ms=Spread.of([1.0]), is_exact=False)
    assert Standing.from_json(json.loads(json.dumps(asdict(standing)))) == standing


def test_the_cost_of_a_snapshot_is_what_the_steps_with_it_take_more() -> None:
    without, variant = training.variants()[:2]
    without.ms, without.plain_ms = [101.0, 101.0], [100.0, 100.0]
    variant.ms, variant.plain_ms = [104.0, 104.0], [100.0, 100.0]
    variant.snapshots, variant.tier = 4, "device"  # in two blocks of 20 steps: one in ten
    row = training._row(variant, without, 20, 2.5)
    assert row.times_floor == pytest.approx(1.04)
    assert row.note == (
        "4 snapshots, device tier: 30.00 ms of the steps' time each; "
        "a flat copy alone 2.50 ms, in series with the steps x 1.0025"
    )
    variant.ms = [100.5, 100.5]
    assert "too cheap to be seen" in training._row(variant, without, 20, 2.5).note


# ---------------------------------------------------------------- the command


@pytest.mark.slow
@pytest.mark.usefixtures("alone")
def test_the_report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(SIZES, "10mb", replace(TINY, name="10mb"))
    assert main(["bench", "--device", "cpu", "--rounds", "4", "--steps", "10", "--json"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["schema_version"] == 1
    assert report["command"] == "bench"
    assert report["peers"] == []
    assert (report["device"], report["barrier"], report["rounds"]) == ("cpu", "host", 4)
    assert report["torch"] == torch.__version__
    assert report["size"]["num_tensors"] == 4 * (12 * TINY.layers + 1)
    assert report["size"]["state_bytes"] >= TINY.state_bytes
    rows = {(row["group"], row["name"]): row for row in report["rows"]}
    assert list(rows) == [
        ("snapshot", "to done"),
        ("snapshot", "call to sealed"),
        ("rollback", "to done"),
        ("judgement", "observe and judge"),
        ("training", "without a governor"),
        ("training", "governed, no snapshots"),
        ("training", "governed, default settings"),
        ("training", "governed, a snapshot every step"),
    ]
    for row in rows.values():
        assert set(row) == {"group", "name", "ms", "floor", "floor_ms", "times_floor", "note"}
        assert set(row["ms"]) == SPREAD
        assert row["ms"]["low"] <= row["ms"]["median"] <= row["ms"]["high"]
        if row["floor"] is not None:
            assert row["times_floor"] > 0.0
            assert set(row["floor_ms"]) == SPREAD
    assert rows["snapshot", "to done"]["ms"]["count"] == 4
    # three blocks of ten steps: one snapshot each at the default cadence, ten of them at a cadence of one
    assert rows["training", "governed, default settings"]["note"].startswith("3 snapshots, host tier")
    assert rows["training", "governed, a snapshot every step"]["note"].startswith("30 snapshots, host tier")
    assert rows["training", "governed, no snapshots"]["note"] == ""


@pytest.mark.usefixtures("alone")
def test_the_tables(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(SIZES, "10mb", replace(TINY, name="10mb"))
    standings = [
        Standing(name="one", kind="snapshot", status="not installed", note="pip install one"),
        Standing(
            name="two",
            kind="snapshot",
            status="measured",
            version="1.2",
            stall_ms=Spread.of([1.0]),
            complete_ms=Spread.of([2.0]),
            rollback_ms=Spread.of([6.0]),
            floor_ms=Spread.of([2.0]),
            is_exact=False,
            is_in_place=True,
            note="how",
        ),
        Standing(name="three", kind="judge", status="failed", note="OSError: no"),
    ]
    asked: list[float] = []

    def compare(size: str, device: torch.device, rounds: int, tick: Any, seconds: float) -> list[Standing]:
        asked.append(seconds)
        return standings

    monkeypatch.setattr(contest, "compare", compare)
    assert (
        main(["bench", "--device", "cpu", "--rounds", "1", "--parts", "copies", "--peers", "--peer-seconds", "2"]) == 0
    )
    assert asked == [2.0]
    out = " ".join(capsys.readouterr().out.split())
    assert "tolaria beside its floors" in out
    assert "not installed: pip install one" in out
    assert "failed: OSError: no" in out
    assert "6.000 [6.000, 6.000] │ 3.0 │ NO │ yes" in out
    assert "observe and judge" not in out


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (["--rounds", "0"], "Correct the value"),
        (["--steps", "0"], "Correct the value"),
        (["--steps", "7"], "a multiple of 10"),
        (["--parts", "host-tier"], "Choose another part"),
        (["--peers", "--peer-seconds", "0"], "Correct the value"),
        ([], "Choose a smaller --size"),
    ],
    ids=["rounds", "steps", "odd steps", "part", "seconds", "room"],
)
def test_what_cannot_be_measured_is_refused(
    arguments: list[str], advice: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory, "available_host_bytes", lambda: 1000)
    assert main(["bench", "--device", "cpu", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert advice in captured.err


def test_no_such_device(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "--device", "cuda"]) == 2
    assert "Try --device cpu" in capsys.readouterr().err


def test_with_json_nothing_else_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    show = Show(as_json=True)
    row = Row(group="snapshot", name="x", ms=Spread.of([1.0]))
    with show.running():
        show.part("something", 1)()
    show.rows([row])
    show.standings([Standing(name="a", kind="judge", status="failed")])
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert as_json({}, [row], [])["rows"][0]["floor"] is None


# ---------------------------------------------------------------- the contest


class Broken:
    """Cannot be made."""

    def __init__(self, *_: Any) -> None:
        raise OSError("no room\nat all")


class Aliasing:
    """Keeps the live tensors instead of copies."""

    is_open = False

    def __init__(self, work: Workload, folder: Path) -> None:
        self.work, self.held = work, list[torch.Tensor]()
        Aliasing.is_open = True

    def snapshot(self) -> None:
        self.held = self.work.tensors()

    def complete(self) -> None: ...

    def rollback(self) -> None:
        for tensor, held in zip(self.work.tensors(), self.held, strict=True):
            tensor.copy_(held)

    def close(self) -> None:
        Aliasing.is_open = False


class Copying(Aliasing):
    """Keeps copies, of all but some of the tensors."""

    left_out = 0

    def snapshot(self) -> None:
        live = self.work.tensors()
        kept = len(live) - self.left_out
        self.held = [tensor.clone() for tensor in live[:kept]] + live[kept:]


class Moving(Copying):
    """Puts other tensors in the optimizer's state."""

    def rollback(self) -> None:
        super().rollback()
        self.work.optimizer.load_state_dict(
            {
                **self.work.optimizer.state_dict(),
                "state": {
                    number: {name: value.clone() for name, value in kept.items()}
                    for number, kept in self.work.optimizer.state_dict()["state"].items()
                },
            }
        )


class CopyingMost(Copying):
    """All but the last."""

    left_out = 1


class Fixed(Entry):
    """An entry whose contestant is a class of this file."""

    __slots__ = ()

    def make(self, work: Workload, folder: Path) -> Any:
        return globals()[self.factory](work, folder)


@pytest.fixture
def work(alone: None) -> Workload:
    return contest.prepare(TINY, CPU)


@pytest.mark.parametrize(
    ("factory", "is_exact", "is_in_place"),
    [("Copying", True, True), ("Aliasing", False, True), ("CopyingMost", False, True), ("Moving", True, False)],
)
def test_what_came_back_is_looked_at(work: Workload, factory: str, is_exact: bool, is_in_place: bool) -> None:
    found = contest.run(Fixed("x", "snapshot", "", factory), work, 2)
    assert (found.status, found.is_exact, found.is_in_place) == ("measured", is_exact, is_in_place)
    assert found.rollback_ms is not None
    assert found.rollback_ms.count == 2
    assert not Aliasing.is_open


def test_one_that_breaks_costs_its_row(work: Workload) -> None:
    found = contest.run(Fixed("x", "snapshot", "", "Broken"), work, 2)
    assert (found.status, found.note) == ("failed", "OSError: no room")


class Clock:
    """Each look at it is a second later."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        self.seconds += 1.0
        return self.seconds


def test_rounds_end_with_their_time_but_one_of_each_kind_is_made() -> None:
    assert list(contest.turns(2, math.inf)) == [False, False, False, True, True]
    assert list(contest.turns(2, 0.5, Clock())) == [False, True]
    # the second warm-up begins after one second, the third would after two; then three and four, five would be too late
    assert list(contest.turns(9, 3.5, Clock())) == [False, False, True, True]


def test_one_that_takes_its_time_is_measured_once(work: Workload) -> None:
    found = contest.run(Fixed("x", "snapshot", "", "Copying"), work, 5, seconds=1e-9)
    assert found.stall_ms is not None
    assert found.stall_ms.count == 1


def test_files_that_have_no_room_in_memory_lie_elsewhere_and_the_row_says_so(
    work: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = Fixed("x", "snapshot", "", "Copying", note="how")
    assert contest._has_room(1) == contest._SHARED_MEMORY.is_dir()
    assert not contest._has_room(2**62)
    monkeypatch.setattr(contest, "_has_room", lambda _: False)
    assert contest.run(entry, work, 1).note == "how; /dev/shm has no room: any files lay elsewhere"
    with contest._folder(in_memory=False) as folder:
        assert contest._SHARED_MEMORY not in folder.parents


@pytest.mark.parametrize("entry", [CATALOGUE[0], *TORCH], ids=lambda entry: entry.name)
@pytest.mark.filterwarnings("ignore")  # of torch's own checkpoints, without a process group
def test_ours_and_torchs_bring_everything_back(work: Workload, entry: Entry) -> None:
    found = contest.run(entry, work, 1)
    assert (found.status, found.is_exact) == ("measured", True), found.note
    assert entry.name != "tolaria" or found.is_in_place


@pytest.mark.parametrize("entry", [e for e in CATALOGUE if e.kind == "judge" and not e.package], ids=lambda e: e.name)
def test_judges_are_measured(work: Workload, entry: Entry) -> None:
    found = contest.run(entry, work, 1)
    assert found.status == "measured", found.note
    assert found.judge_ms is not None
    assert found.judge_host_ms is not None


def test_nothing_of_a_contestant_is_left_in_memory(work: Workload) -> None:
    places = [contest._SHARED_MEMORY] if contest._SHARED_MEMORY.is_dir() else []
    before = [set(place.glob("tolaria-bench-*")) for place in places]
    contest.run(next(entry for entry in TORCH if entry.factory == "Files"), work, 1)
    assert [set(place.glob("tolaria-bench-*")) for place in places] == before


def test_who_cannot_run_here_has_a_row() -> None:
    missing = Entry("x", "snapshot", "", "", package="no-such-package-as-this[extra]")
    elsewhere = Entry("x", "snapshot", "", "", device="cuda")
    for entry, status, note in (
        (missing, "not installed", "pip install no-such-package-as-this[extra]"),
        (elsewhere, "not on this device", "works on cuda only"),
    ):
        found = contest._absent(entry, CPU)
        assert found is not None
        assert (found.status, found.note) == (status, note)
    assert contest._absent(CATALOGUE[0], CPU) is None


def test_every_contestant_has_its_factory() -> None:
    """Without its package: the modules import nothing of it."""
    for entry in CATALOGUE:
        module = importlib.import_module(f"tolaria.bench.peers.{entry.module}")
        assert callable(getattr(module, entry.factory)), entry.name


@pytest.mark.slow
def test_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is measured, and one whose process dies before it answers."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    index = next(number for number, entry in enumerate(CATALOGUE) if entry.factory == "DeepCopies")
    entry = CATALOGUE[index]
    found = contest._in_process(index, entry, "10mb", CPU, 1)
    assert (found.name, found.status, found.is_exact, found.is_in_place) == (entry.name, "measured", True, False)
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    dead = contest._in_process(index, entry, "10mb", CPU, 1)
    assert (dead.status, dead.note) == ("failed", "its process ended with 1: ")


def test_what_a_contestant_leaves_behind_is_ended_and_not_waited_for(tmp_path: Path) -> None:
    """A process of its own that holds its outputs open for ever."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    left = f"import signal; held = open({str(pipe)!r}, 'w'); signal.pause()"
    program = f"""if True:
        import subprocess, sys
        subprocess.Popen([sys.executable, "-c", {left!r}])
        with open({str(pipe)!r}) as opened:  # as soon as the other one has opened it, too
            print("left")
    """
    assert contest._run([sys.executable, "-c", program], 60.0) == (0, "left\n", "")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(reader, True)
    assert os.read(reader, 1) == b""  # waits until nobody holds the other end
    os.close(reader)

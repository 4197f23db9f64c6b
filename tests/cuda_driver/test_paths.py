"""Copies inside one device by each path: the same bytes, in the same order, and chosen without waiting for anything."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Sequence

import pytest
import torch
from cuda_driver.fake_driver import Machine
from hypothesis import given, settings
from hypothesis import strategies as st
from state.blocks import POISONS, Blocks, shapes
from torch import nn

from tolaria import TolariaGovernor, UnsupportedState, engine, paths
from tolaria.cuda import ContextDevice
from tolaria.device import BlockingDevice
from tolaria.errors import CaptureInProgress, DeviceLost
from tolaria.kernels import Sweep
from tolaria.paths import Choice, CopyPath, Paths, prepare

Flat = Sequence[torch.Tensor]
ENGINE = (CopyPath.GRAPH, CopyPath.BATCH)


def opened(machine: Machine) -> ContextDevice:
    return ContextDevice("cpu", machine.driver, machine.streams)


def copying(machine: Machine, port: ContextDevice, path: CopyPath) -> Callable[[Flat, Flat], None]:
    def copy(destinations: Flat, sources: Flat) -> None:
        with port.on_stream():
            launch = prepare(path, port, destinations, sources)
        port.enqueue(launch)
        machine.finish()

    return copy


@pytest.mark.parametrize("path", CopyPath)
@settings(max_examples=30)
@given(drawn=shapes, seed=st.integers(0, 2**16), node=st.sampled_from([7, 4096, 1 << 30]))
def test_the_bytes_arrive_and_nothing_else_is_written(
    path: CopyPath, drawn: list[tuple[int, int, int]], seed: int, node: int
) -> None:
    if node == 7:
        drawn = [(size % 200, *rest) for size, *rest in drawn]
    machine = Machine()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "_MOST_NODE_BYTES", node)
        Blocks(drawn, seed).verify(copying(machine, opened(machine), path))
    assert machine.violations == []


@settings(max_examples=20)
@given(drawn=shapes, seed=st.integers(0, 2**16), version=st.sampled_from([13000, 12090]))
def test_to_main_memory_and_back(drawn: list[tuple[int, int, int]], seed: int, version: int) -> None:
    """In one call of the driver, and block by block where it knows none."""
    machine = Machine()
    machine.driver.version = version
    port = opened(machine)

    def there_and_back(destinations: Flat, sources: Flat) -> None:
        held = [torch.full((source.numel(),), 0x77, dtype=torch.uint8) for source in sources]
        port.enqueue(lambda: port.move(held, sources))
        port.enqueue(lambda: port.move(destinations, held))
        machine.finish()

    Blocks(drawn, seed).verify(there_and_back)
    assert machine.violations == []


@pytest.mark.parametrize("path", ENGINE)
def test_ten_thousand_tiny_blocks_are_one_command(path: CopyPath, machine: Machine) -> None:
    port = opened(machine)
    machine.clear()
    Blocks([(1 + i % 9, i % 3, i % 5) for i in range(10_000)], 1).verify(copying(machine, port, path))
    asked = [call for call in machine.calls if call.startswith(("cuGraphLaunch", "cuMemcpyBatchAsync"))]
    assert len(asked) == len(POISONS)


def test_a_block_beyond_what_one_node_takes(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_MOST_NODE_BYTES", 1000)
    Blocks([(2500, 0, 0), (999, 0, 0), (1000, 0, 0)], 5).verify(copying(machine, opened(machine), CopyPath.GRAPH))
    assert [len(graph.nodes) for graph in machine.graphs] == [5, 5]


@pytest.mark.parametrize(("path", "call"), [(CopyPath.GRAPH, "cuGraphLaunch"), (CopyPath.BATCH, "cuMemcpyBatchAsync")])
def test_red_without_the_driver_call(path: CopyPath, call: str, machine: Machine) -> None:
    machine.fails[call] = 0
    with pytest.raises(AssertionError):
        Blocks([(64, 0, 0)], 3).verify(copying(machine, opened(machine), path))


def test_a_graph_is_given_back_once_and_only_when_nobody_can_launch_it(machine: Machine) -> None:
    port = opened(machine)
    blocks = Blocks([(64, 0, 0), (9, 0, 0)], 3)
    launch = port.graph(blocks.destinations, blocks.sources)
    launch()
    gc.collect()
    assert [graph.is_destroyed for graph in machine.graphs] == [False]
    del launch
    gc.collect()
    assert [graph.is_destroyed for graph in machine.graphs] == [True]


# ------------------------------------------------------------ under a governor


def write(governor: TolariaGovernor, model: nn.Module, value: float) -> None:
    with governor.using(), torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(value)


def small() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    model.register_buffer("odd", torch.arange(7, dtype=torch.uint8))
    return model


@pytest.mark.parametrize("path", ["foreach", "graph", "batch"])
def test_a_snapshot_comes_back_by_the_path_that_was_asked_for(path: str, late: Machine, govern) -> None:
    model = small()
    governor = govern(model, copy_path=path, slots=2, probation=0)
    before = [tensor.clone() for tensor in (*model.parameters(), *model.buffers())]
    governor.snapshot()
    for poison in (7.0, 9.0):
        write(governor, model, poison)
        report = governor.execute_rollback().wait()
        assert report.verified
        late.finish()
        assert all(map(torch.equal, (*model.parameters(), *model.buffers()), before))
    assert "asked for" in governor.capabilities().copy_path
    commands = {"graph": "cuGraphLaunch", "batch": "cuMemcpyBatchAsync", "foreach": ""}
    used = {call.split()[0] for call in late.calls} & {"cuGraphLaunch", "cuMemcpyBatchAsync"}
    assert used == {commands[path]} - {""}


@pytest.mark.parametrize("path", ["kernel", "foreach", "graph", "batch"])
def test_a_copy_that_does_not_read_is_read_behind(path: str, late: Machine, govern, monkeypatch) -> None:
    """Where there is a kernel that could do both."""
    monkeypatch.setattr(Sweep, "is_compiled", True)
    governor = govern(small(), copy_path=path, slots=2, probation=0)
    with late.tape() as calls:
        governor.snapshot()
    assert calls.count("launch own0 read") == (0 if path == "kernel" else 2)
    assert governor.execute_rollback().wait().verified


@pytest.mark.parametrize("path", ["graph", "batch"])
def test_a_poisoned_batch_leaves_no_trace(path: str, late: Machine, govern, make_run) -> None:
    late.lag = 2
    clean = make_run()
    clean.plain()
    run = make_run()
    with govern(
        run.model, run.optimizer, scheduler=run.scheduler, cadence=4, probation=4, keep_batches=64, copy_path=path
    ) as governor:
        run.train(governor, run.poisoned(17))
        late.finish()
    assert all(map(torch.equal, run.model.parameters(), clean.model.parameters()))


def out_of_memory(*_: object) -> Callable[[], None]:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("path", ["graph", "batch"])
@pytest.mark.parametrize("where", ["preparing", "asking for it"])
def test_a_rollback_does_not_fail_for_its_path(
    path: str, where: str, late: Machine, govern, monkeypatch, caplog
) -> None:
    """Memory has run out since the snapshot: what was asked for cannot be had, and the bytes come back all the same."""
    monkeypatch.setattr(late.streams, "enqueue", lambda index, stream, work: work())
    model = small()
    governor = govern(model, copy_path=path, slots=2, probation=0)
    before = [tensor.clone() for tensor in (*model.parameters(), *model.buffers())]
    governor.snapshot()
    late.finish()
    with monkeypatch.context() as patch:
        if where == "preparing":
            patch.setattr(ContextDevice, path, out_of_memory)
        else:
            patch.setitem(late.fails, "cuGraphLaunch" if path == "graph" else "cuMemcpyBatchAsync", 2)
        for poison in (7.0, 9.0):
            write(governor, model, poison)
            assert governor.execute_rollback().wait().verified
            late.finish()
            assert all(map(torch.equal, (*model.parameters(), *model.buffers()), before))
    assert f"not made by {CopyPath(path)}" in caplog.text
    assert "asked for" in governor.capabilities().copy_path
    governor.snapshot()
    write(governor, model, 3.0)
    with late.tape() as calls:
        assert governor.execute_rollback().wait().verified
    assert any(call.startswith("cuGraphLaunch" if path == "graph" else "cuMemcpyBatchAsync") for call in calls)


@pytest.mark.parametrize("call", ["cuGraphInstantiate", "cuGraphLaunch"])
def test_a_lost_device_is_told_of_and_not_made_up_for(call: str, late: Machine, govern, monkeypatch) -> None:
    monkeypatch.setattr(late.streams, "enqueue", lambda index, stream, work: work())
    model = small()
    governor = govern(model, copy_path="graph", slots=2, probation=0)
    governor.snapshot()
    late.fails[call] = 700
    with pytest.raises(DeviceLost):
        governor.execute_rollback()
    late.fails.clear()


def test_a_lost_device_is_told_of_in_torchs_own_words_too(late: Machine, govern, monkeypatch) -> None:
    """Which error a path raises depends on who has noticed first."""
    monkeypatch.setattr(late.streams, "enqueue", lambda index, stream, work: work())
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    vars(error)["error_code"] = 700

    def lost(*_: object) -> Callable[[], None]:
        raise error

    governor = govern(small(), copy_path="graph", slots=2, probation=0)
    governor.snapshot()
    late.finish()
    with monkeypatch.context() as patch:
        patch.setattr(ContextDevice, "graph", lost)
        with pytest.raises(DeviceLost):
            governor.execute_rollback()


@pytest.mark.parametrize("call", ["cuGraphInstantiate", "cuGraphLaunch"])
def test_a_capture_that_nobody_has_announced_is_told_of_by_a_snapshot(
    call: str, late: Machine, govern, measuring, monkeypatch
) -> None:
    """It may have been invalidated. A rollback that has begun is made all the same."""
    monkeypatch.setattr(late.streams, "enqueue", lambda index, stream, work: work())
    timed(monkeypatch, {CopyPath.GRAPH: 0.1})
    model = small()
    governor = govern(model, slots=2, probation=0)
    late.lag = 0
    governor.snapshot()
    assert "one graph" in governor.capabilities().copy_path
    late.fails[call] = 900
    with pytest.raises(CaptureInProgress):
        governor.snapshot()
    before = [parameter.clone() for parameter in model.parameters()]
    write(governor, model, 9.0)
    assert governor.execute_rollback().success
    late.finish()
    late.fails.clear()
    assert all(map(torch.equal, model.parameters(), before))
    assert governor.capabilities().copy_path.startswith("one graph")  # captures end


def test_a_path_is_given_up_in_the_direction_that_it_has() -> None:
    choice = Choice(CopyPath.GRAPH, CopyPath.BATCH, "measured", CopyPath.KERNEL)
    choice.give_up(CopyPath.GRAPH, RuntimeError())
    assert (choice.capture, choice.restore) == (CopyPath.KERNEL, CopyPath.BATCH)


def test_what_nobody_has_measured_is_not_said_to_be_faster() -> None:
    choice = Choice(CopyPath.FOREACH, CopyPath.FOREACH, "not measured", CopyPath.FOREACH)
    choice.give_up(CopyPath.FOREACH, RuntimeError())
    assert choice.reason == "not measured"


def test_what_a_snapshot_allocates_in_inference_mode_can_be_written_later(late: Machine, govern) -> None:
    model = small()
    governor = govern(model, slots=2, probation=0)
    with torch.inference_mode():
        governor.snapshot()
    late.finish()
    for value in (7.0, 8.0):  # into either slot
        write(governor, model, value)
        governor.snapshot()
        late.finish()
    write(governor, model, 9.0)
    governor.execute_rollback()
    late.finish()
    assert all(bool((parameter == 8.0).all()) for parameter in model.parameters())


@pytest.mark.parametrize("wanted", ["graph", None])
def test_a_snapshot_by_a_path_that_was_measured_is_taken_by_another(
    wanted: str | None, late: Machine, govern, measuring, monkeypatch, caplog
) -> None:
    """One that was asked for is not replaced."""
    monkeypatch.setattr(late.streams, "enqueue", lambda index, stream, work: work())
    timed(monkeypatch, {CopyPath.GRAPH: 0.1})
    model = small()
    governor = govern(model, slots=2, probation=0, copy_path=wanted)
    late.lag = 0
    governor.snapshot()
    assert "one graph" in governor.capabilities().copy_path
    write(governor, model, 7.0)
    monkeypatch.setattr(ContextDevice, "graph", out_of_memory)
    if wanted is None:
        for poison in (9.0, 11.0):
            governor.snapshot()
            write(governor, model, poison)
            governor.execute_rollback()
            late.finish()
            assert all(bool((parameter == 7.0).all()) for parameter in model.parameters())
        assert caplog.text.count("a copy was not made by") == 1  # and nobody asks for that path again
        shown = governor.capabilities().copy_path
        assert shown.startswith("foreach copy of whole storages (graph was measured to be faster, and has failed")
    else:
        with pytest.raises(torch.OutOfMemoryError):
            governor.snapshot()


def test_a_path_that_does_not_work_here_is_refused_at_once(late: Machine, govern) -> None:
    late.driver.version = 12090
    with pytest.raises(UnsupportedState, match="offers only foreach, graph"):
        govern(small(), copy_path="batch")
    with pytest.raises(UnsupportedState, match="kernel"):
        govern(small(), copy_path="kernel")  # tensors on a CPU stand for the device's


def test_a_driver_without_graphs_offers_none(late: Machine, govern, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_GRAPH_CALLS", (*engine._GRAPH_CALLS, "cuGraphOfTomorrow"))
    with pytest.raises(UnsupportedState, match="offers only foreach, batch"):
        govern(small(), copy_path="graph")


# ------------------------------------------------------------ the choice


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """However small the state is."""
    monkeypatch.setattr(paths, "_SMALLEST_TRIAL_BYTES", 1)


def timed(monkeypatch: pytest.MonkeyPatch, ms: dict[CopyPath, float]) -> None:
    """The trial's clock: tasks are told apart by the order in which they were enqueued."""
    original = paths._Trial.__init__

    def noting(self: paths._Trial, *arguments: object) -> None:
        original(self, *arguments)
        took = {began: ms.get(name, 1.0) if isinstance(name, CopyPath) else 1.0 for name, began, _ in self._spans}
        self._port.elapsed_ms = lambda began, _: took[began]

    monkeypatch.setattr(paths._Trial, "__init__", noting)


@pytest.mark.parametrize(
    ("ms", "chosen"),
    [
        ({CopyPath.GRAPH: 0.5}, "one graph of copies (measured over"),
        ({CopyPath.BATCH: 0.5, CopyPath.GRAPH: 0.7}, "one batch for the copy engines (measured over"),
        ({CopyPath.GRAPH: 0.99}, "foreach copy of whole storages (measured over"),  # by less than noise
        # by less than its launch may take longer
        ({CopyPath.FOREACH: 0.01, CopyPath.GRAPH: 0.005}, "foreach copy of whole storages (measured over"),
        # the device gains that twice over the whole, of which one half was copied into the other
        ({CopyPath.FOREACH: 0.1, CopyPath.GRAPH: 0.07}, "one graph of copies (measured over"),
    ],
)
def test_the_fastest_path_is_taken_once_its_time_has_arrived(
    ms: dict[CopyPath, float], chosen: str, late: Machine, govern, measuring, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed(monkeypatch, ms)
    model = small()
    governor = govern(model, slots=2, probation=0)
    assert governor.capabilities().copy_path == "not chosen before the first snapshot"
    with late.tape() as calls:
        governor.snapshot()
    assert not [call for call in calls if "Synchronize" in call]
    assert governor.capabilities().copy_path == "foreach copy of whole storages (being measured)"
    before = [tensor.clone() for tensor in (*model.parameters(), *model.buffers())]
    late.lag = 0
    assert governor.capabilities().copy_path.startswith(chosen)
    instantiated = len(late.graphs)
    for value in (7.0, 9.0):
        write(governor, model, value)
        governor.execute_rollback()
        late.finish()
        assert all(map(torch.equal, (*model.parameters(), *model.buffers()), before))
    for _ in range(3):
        governor.snapshot()  # into either slot
    tried = [call for call in late.calls if call.startswith("cuGraphInstantiate")]
    if "graph" in chosen:
        assert len(tried) > instantiated
    else:
        assert len(tried) == instantiated == 1  # the one of the trial, which was made once


def test_a_layout_is_measured_once(late: Machine, govern, measuring, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    original = paths._Trial.__init__
    monkeypatch.setattr(
        paths._Trial, "__init__", lambda self, *arguments: made.append(self) or original(self, *arguments)
    )
    model = small()
    governor = govern(model, slots=3, probation=0)
    for _ in range(6):
        governor.snapshot()
    assert len(made) == 1
    model.register_buffer("late", torch.zeros(1 << 12))
    for _ in range(4):
        governor.snapshot()
    assert len(made) == 2


def test_a_layout_that_comes_again_is_not_measured_again(late: Machine, govern, measuring, monkeypatch) -> None:
    made = []
    original = paths._Trial.__init__
    monkeypatch.setattr(
        paths._Trial, "__init__", lambda self, *arguments: made.append(self) or original(self, *arguments)
    )
    late.lag = 0
    model = small()
    governor = govern(model, slots=2, probation=0)
    governor.snapshot()
    measured = governor.capabilities().copy_path
    assert "measured over" in measured
    model.register_buffer("late", torch.zeros(1 << 20))
    governor.snapshot()
    assert "measured over 2 MB" in governor.capabilities().copy_path
    del model.late
    for _ in range(2):
        governor.snapshot()  # one of the slots takes memory for it anew
    assert governor.capabilities().copy_path == measured
    assert len(made) == 2


def test_what_was_asked_for_is_not_measured(late: Machine, govern, measuring) -> None:
    late.lag = 0
    governor = govern(small(), slots=2, probation=0, copy_path="batch")
    for _ in range(2):
        governor.snapshot()
    assert governor.capabilities().copy_path == "one batch for the copy engines (asked for)"
    assert late.graphs == []


def test_where_there_is_one_path_nothing_is_measured(late: Machine, govern, measuring, monkeypatch) -> None:
    monkeypatch.setattr(paths, "offered", lambda *_: (CopyPath.FOREACH,))
    governor = govern(small(), slots=2, probation=0)
    governor.snapshot()
    assert governor.capabilities().copy_path == "foreach copy of whole storages (not measured)"


def test_the_blocks_of_a_trial_lie_apart() -> None:
    memory = torch.zeros(1 << 10, dtype=torch.uint8)
    destinations, sources = paths._halves(memory, [100, 3, 64, 65])
    taken = sorted((block.data_ptr() - memory.data_ptr(), block.numel()) for block in (*sources, *destinations))
    assert taken == [(0, 100), (128, 3), (192, 64), (256, 65), (512, 100), (640, 3), (704, 64), (768, 65)]


def test_a_slot_that_has_no_two_halves_is_not_measured(late: Machine, govern, measuring) -> None:
    governor = govern(nn.Linear(1, 1, bias=False), slots=2, probation=0)
    governor.snapshot()
    assert governor.capabilities().copy_path == "foreach copy of whole storages (not measured)"


def test_a_device_without_a_clock_measures_nothing(measuring, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is waited for at both ends, say: it has no events to take the time with."""
    port = BlockingDevice("cpu")
    monkeypatch.setattr(port, "on_stream", contextlib.nullcontext)
    assert paths.offered(port, torch.device("cpu")) == (CopyPath.FOREACH,)
    monkeypatch.setattr(paths, "offered", lambda *_: (CopyPath.KERNEL, CopyPath.FOREACH))
    held = Paths()
    held.try_out(port, torch.zeros(1 << 12, dtype=torch.uint8), [1 << 12])
    assert held._tried == {}
    assert str(held.of(port, torch.device("cpu"))) == "one compiled kernel for all storages (not measured)"


def test_what_was_measured_is_known_after_closing(late: Machine, govern, measuring) -> None:
    late.lag = 0
    governor = govern(small(), slots=2, probation=0)
    governor.snapshot()
    measured = governor.capabilities().copy_path
    governor.close()
    assert governor.capabilities().copy_path == measured
    assert "measured over" in measured


@pytest.mark.parametrize("call", ["cuGraphInstantiate", "cuGraphLaunch"])
def test_a_device_that_is_lost_in_the_trial_is_told_of(
    call: str, late: Machine, govern, measuring, monkeypatch
) -> None:
    monkeypatch.setattr(late.streams, "enqueue", lambda index, stream, work: work())
    late.fails[call] = 700
    governor = govern(small(), slots=2, probation=0)
    with pytest.raises(DeviceLost):
        governor.snapshot()
    late.fails.clear()


@pytest.mark.parametrize("compiled", [True, False])
def test_only_a_kernel_reads_and_copies_at_once(compiled: bool, late: Machine, govern, measuring, monkeypatch) -> None:
    monkeypatch.setattr(Sweep, "is_compiled", compiled)
    timed(monkeypatch, {})
    governor = govern(small(), slots=2, probation=0)
    governor.snapshot()
    trial = next(iter(governor._keeper.vault.paths._chosen.values()))._trial
    names = [name for name, *_ in trial._spans]
    assert (CopyPath.KERNEL in names, paths._BOTH in names) == (compiled, compiled)
    assert len(names) == len(set(names)) * paths._ROUNDS


def test_small_states_and_those_of_a_known_path_are_not_measured(late: Machine, govern) -> None:
    governor = govern(small(), slots=2, probation=0)
    governor.snapshot()
    assert governor.capabilities().copy_path == "foreach copy of whole storages (not measured)"
    assert late.graphs == []


@pytest.mark.parametrize("broken", ["cuGraphInstantiate", "cuGraphLaunch", "cuMemcpyBatchAsync"])
def test_a_path_that_fails_in_the_trial_is_out(
    broken: str, late: Machine, govern, measuring, monkeypatch, caplog
) -> None:
    caplog.set_level("INFO", "tolaria")
    # at once, so that what fails fails where it is asked for
    monkeypatch.setattr(late.streams, "enqueue", lambda index, stream, work: work())
    late.fails[broken] = 1
    timed(monkeypatch, {CopyPath.GRAPH: 0.1, CopyPath.BATCH: 0.1})
    model = small()
    governor = govern(model, slots=2, probation=0)
    governor.snapshot()
    late.fails.clear()
    late.lag = 0
    other = "batch" if "Graph" in broken else "graph"
    assert f"one {other}" in governor.capabilities().copy_path
    assert caplog.text.count(f"copies are not made by {CopyPath.GRAPH if 'Graph' in broken else CopyPath.BATCH}") == 1
    before = [tensor.clone() for tensor in model.parameters()]
    write(governor, model, 7.0)
    governor.execute_rollback()
    assert all(map(torch.equal, model.parameters(), before))


@pytest.mark.parametrize("broken", ["the reading", "everything"])
def test_what_fails_in_the_trial_fails_no_rollback(broken: str, late: Machine, govern, measuring, monkeypatch) -> None:
    """Its times are asked for where copies are made."""
    monkeypatch.setattr(late.streams, "enqueue", lambda index, stream, work: work())
    try_out, run = Paths.try_out, Sweep.run

    def failing(self: Sweep, *arguments: object, copy: bool, **settings: object) -> None:
        if not copy:
            raise RuntimeError("out of memory")
        run(self, *arguments, copy=copy, **settings)

    def fails(*arguments: object) -> Callable[[], None]:
        raise RuntimeError("out of memory")

    def trying(self: Paths, *arguments: object) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Sweep, "run", failing)
            if broken == "everything":
                patch.setattr(paths, "prepare", fails)
            try_out(self, *arguments)

    monkeypatch.setattr(Paths, "try_out", trying)
    model = small()
    governor = govern(model, slots=2, probation=0)
    late.lag = 0
    governor.snapshot()
    before = [tensor.clone() for tensor in model.parameters()]
    write(governor, model, 7.0)
    governor.execute_rollback()
    assert all(map(torch.equal, model.parameters(), before))
    measured = "measured over" in governor.capabilities().copy_path
    assert measured == (broken == "the reading")


def test_a_trial_touches_no_live_byte_and_no_other_slot(late: Machine, govern, measuring) -> None:
    model = small()
    governor = govern(model, slots=2, probation=0)
    before = [tensor.clone() for tensor in (*model.parameters(), *model.buffers())]
    governor.snapshot()
    late.finish()
    assert all(map(torch.equal, (*model.parameters(), *model.buffers()), before))
    kept = [flat.clone() for flat in governor._keeper.vault.slots[0].arena.views]
    write(governor, model, 3.0)
    governor.snapshot()
    late.finish()
    assert all(map(torch.equal, governor._keeper.vault.slots[0].arena.views, kept))


def test_a_closed_governor_holds_no_memory_of_a_trial(late: Machine, govern, measuring) -> None:
    governor = govern(small(), slots=2, probation=0)
    governor.snapshot()
    held = weakref.ref(governor._keeper.vault.slots[0].arena.flat[torch.device("cpu")].untyped_storage())
    governor.close()
    gc.collect()
    assert held() is None
    assert all(graph.is_destroyed for graph in late.graphs)


def test_a_layout_that_is_gone_takes_its_memory_with_it(late: Machine, govern, measuring) -> None:
    """Nobody asks for the times of a trial any more whose layout has been replaced by another one."""
    model = small()
    governor = govern(model, slots=2, probation=0)
    governor.snapshot()
    held = weakref.ref(governor._keeper.vault.slots[0].arena.flat[torch.device("cpu")].untyped_storage())
    model.register_buffer("late", torch.zeros(1 << 12))  # as the state of an optimizer does after its first step
    for _ in range(2):
        governor.snapshot()
    late.finish()
    gc.collect()
    assert held() is None
    del model.late
    governor.snapshot()
    late.lag = 0
    assert "measured over" in governor.capabilities().copy_path


def test_trials_of_other_devices_and_of_the_present_layout_go_on() -> None:
    former, present, other = (
        Choice(CopyPath.FOREACH, CopyPath.FOREACH, "being measured", CopyPath.FOREACH, object()) for _ in range(3)
    )
    held = Paths()
    held._tried = {("cuda:0", 1, 1): former, ("cuda:0", 2, 2): present, ("cuda:1", 1, 1): other}
    held._chosen = {"cuda:0": present, "cuda:1": other}
    held._drop_former("cuda:0")
    assert [choice.is_being_measured for choice in (former, present, other)] == [False, True, True]
    assert (list(held._tried.values()), former.reason) == ([present, other], "not measured")


def test_with_a_compiled_kernel_its_reading_copy_is_what_the_others_have_to_beat(
    late: Machine, govern, measuring, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sweep, "is_compiled", True)
    timed(monkeypatch, {CopyPath.KERNEL: 1.0, CopyPath.BATCH: 0.5})  # copy and read: 1.0, read: 1.0
    governor = govern(small(), slots=2, probation=0)
    governor.snapshot()
    late.lag = 0
    shown = governor.capabilities().copy_path
    assert shown.startswith("one compiled kernel for all storages into slots, one batch for the copy engines out of")


def failing_where(monkeypatch: pytest.MonkeyPatch, is_out: Callable[[bool, bool], bool]) -> None:
    """Sweeps raise, told whether they copy and whether they read."""
    run = Sweep.run

    def failing(self: Sweep, *arguments: object, copy: bool, answer: torch.Tensor | None = None) -> None:
        if is_out(copy, answer is not None):
            raise RuntimeError("out of memory")
        run(self, *arguments, copy=copy, answer=answer)

    monkeypatch.setattr(Sweep, "run", failing)


def test_a_kernel_that_only_copies_is_read_behind(late: Machine, govern, measuring, monkeypatch) -> None:
    """Then its reading counts as that of any other path."""
    monkeypatch.setattr(late.streams, "enqueue", lambda index, stream, work: work())
    monkeypatch.setattr(Sweep, "is_compiled", True)
    timed(monkeypatch, {CopyPath.KERNEL: 1.0, CopyPath.BATCH: 0.5})
    governor = govern(small(), slots=2, probation=0)
    with monkeypatch.context() as patch:
        failing_where(patch, lambda copies, reads: copies and reads)
        with pytest.raises(RuntimeError, match="out of memory"):
            governor.snapshot()  # the kernel copies and reads until the times are there
    late.lag = 0
    assert governor.capabilities().copy_path.startswith("one batch for the copy engines (measured over")


def test_a_kernel_that_does_not_copy_is_not_taken_for_reading(late: Machine, govern, measuring, monkeypatch) -> None:
    monkeypatch.setattr(late.streams, "enqueue", lambda index, stream, work: work())
    monkeypatch.setattr(Sweep, "is_compiled", True)
    timed(monkeypatch, {CopyPath.FOREACH: 2.0, CopyPath.GRAPH: 3.0, CopyPath.BATCH: 3.0})
    failing_where(monkeypatch, lambda copies, reads: copies and not reads)
    governor = govern(small(), slots=2, probation=0)
    governor.snapshot()
    late.lag = 0
    assert governor.capabilities().copy_path.startswith("foreach copy of whole storages (measured over")


def test_what_fails_later_in_the_trial_has_no_time(late: Machine, govern, measuring, monkeypatch) -> None:
    monkeypatch.setattr(late.streams, "enqueue", lambda index, stream, work: work())
    readings = []
    timed(monkeypatch, {})
    with monkeypatch.context() as patch:
        failing_where(patch, lambda copies, reads: not copies and (readings.append(1) or len(readings) == 2))
        governor = govern(small(), slots=2, probation=0)
        governor.snapshot()
    trial = next(iter(governor._keeper.vault.paths._chosen.values()))._trial
    assert paths._READ not in [name for name, *_ in trial._spans]

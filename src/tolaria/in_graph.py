"""IN THE GRAPH: a training step that is captured as one CUDA graph, with veto and rollback inside it.

The device decides in each replay, by itself, and the host learns of it later, as of every number of a step. What it
decides is final for the device: a replay whose gradients are not finite is refused, and with ``on_veto="rollback"`` it
also goes back to the newest certified snapshot and stays there (it *parks*, see `latch`) until the host has learnt of
it, rolled back by the ordinary protocol, and arranged the data. docs/in_graph.md tells it from the user's side.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch.utils import _pytree

from tolaria import arena, observe, ring
from tolaria.arguments import require_of_step
from tolaria.coordinate import refuse_several_ranks
from tolaria.course import Course
from tolaria.device import QueuedDevice
from tolaria.errors import PhaseError, StateMismatch, UnsupportedState, UsageError
from tolaria.governor import TolariaGovernor
from tolaria.latch import Latch, PredicatedCopy
from tolaria.observe import Scalar
from tolaria.operations import Barrier
from tolaria.records import StepResult
from tolaria.ring import SlotPhase, Tier
from tolaria.state.leaves import Leaves
from tolaria.state.parts import GeneratorPart
from tolaria.state.train_state import SurveyResult
from tolaria.vitals import EXTRA, Sent

_DOING = "capturing a step"


class Recorder:
    """Makes graphs, on a stream of their own.

    Args:
        device: A CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    @contextmanager
    def beside(self) -> Generator[None]:
        """What is launched inside goes to the stream of later captures, ordered with the caller's on both sides."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            current.wait_stream(self._stream)

    def record(self, work: Callable[[], None], generators: Sequence[torch.Generator] = ()) -> Callable[[], None]:
        """Capture `work`, which is executed by each call of what this returns, and not now.

        Args:
            work: What to capture.
            generators: Of the device, which it draws from besides the default one.
        """
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        # other threads may allocate and query events meanwhile; the governor keeps its own hands off
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            work()
        # torch 2.11 has set the offset of random numbers to 0 on that stream, and sets it to its value on the caller's
        torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        return graph.replay


class CapturedStep:
    """A training step under guard that is captured as one CUDA graph and replayed: forward, backward and optimizer.

    The first calls of `step` run as they are written, since libraries and optimizers set themselves up in them. They
    are steps like any other: nothing is thrown away. Then a snapshot is taken, the step is captured, and from there on
    each call is one replay. No rollback leads behind that snapshot.

    Args:
        governor: Of the model and all its optimizers. It may have several captured steps.
        train: Forward and backward; takes nothing, reads its batch from tensors that you fill before each call, and
            returns the loss (as `TolariaGovernor.step` takes it). No optimizer step, no `zero_grad`: gradients are None
            when it is called, and None again afterwards.
        clip: Clip the gradient norm to this value (after unscaling).
        after: Called behind the optimizers, inside the graph: what belongs to the step and lies in governed memory,
            such as an average of the weights. A refused replay undoes it as well.
        warm_up: Calls of `step` that run as they are written; at least 1.

    Attributes:
        is_captured: Calls of `step` are replays.
        loss: What `train` has returned, in memory that each replay writes; None before the capture.

    Raises:
        UsageError: A value that makes no sense.
        UnsupportedState: A set-up that cannot be captured under guard; docs/in_graph.md lists them.

    In observe mode, and with ``TOLARIA_DISABLE=1``, every call runs as it is written.

    Threads: the one that steps. `step` launches on the caller's current stream.
    """

    def __init__(
        self,
        governor: TolariaGovernor,
        train: Callable[[], observe.Loss],
        *,
        clip: float | None = None,
        after: Callable[[], object] | None = None,
        warm_up: int = 3,
    ) -> None:
        if isinstance(warm_up, bool) or not isinstance(warm_up, int) or warm_up < 1:
            raise UsageError(_DOING, f"warm_up={warm_up!r}, expected a whole number of at least 1", "Correct it.")
        self.governor, self._train, self._clip, self._after = governor, train, clip, after
        self.is_captured, self.loss = False, cast("observe.Loss", None)
        self._as_written = governor.is_disabled or governor.config.mode == "observe"
        self._warm_up = self._left = warm_up
        if self._as_written:
            return
        self._device = _device_of(governor)
        _refuse_set_up(governor)
        self._recorder = Recorder(self._device)
        self._latch = Latch(self._device)  # compiles its kernels, which no capture allows
        self._port = cast("QueuedDevice", governor._keeper.devices[str(self._device)])
        self._keeps = governor.config.on_veto == "keep"
        self._aside: PredicatedCopy | None = None
        self._back: PredicatedCopy | None = None
        self._held: dict[int, torch.Tensor] = {}  # slots that a replay may go back to, by address
        self._last: Any = None  # an event behind the last replay
        course = governor._course  # and not the governor, so that it can be dropped
        governor._keeper.before_manual = lambda: _learn(course)

    def step(self, *, metric: float | None = None, **signs: torch.Tensor | float) -> StepResult:
        """One optimizer step under guard, as `TolariaGovernor.step`; a replay once the step is captured.

        Args:
            metric: As there.
            **signs: As there; tensors are read behind the replay.

        Raises:
            StateMismatch: Something that the graph uses was moved, or is another object now; nothing was launched.
            UnsupportedState: What the graph holds as numbers (a hyper-parameter) was changed; nothing was launched. Or
                the step cannot be captured.
            And whatever `TolariaGovernor.step` raises.
        """
        if self._as_written or self._left > 0:
            return self._written(metric, signs)
        course = self.governor._course
        if not self.is_captured:
            self.governor._require_boundary(_DOING)
            course.judge_all()
            if course._unanswered is not None:
                return self._written(metric, signs)  # which rolls back
            self._capture()
        return self._replayed(metric, signs)

    def _written(self, metric: float | None, signs: Mapping[str, torch.Tensor | float]) -> StepResult:
        beside = contextlib.nullcontext() if self._as_written else self._recorder.beside()
        with beside:
            result = self.governor.step(loss=self._train(), clip=self._clip, metric=metric, **signs)
            if self._after is not None and not result.rolled_back:
                with self.governor.using():
                    self._after()
        # a rollback may have taken the optimizer's state with it
        self._left = self._warm_up if result.rolled_back else self._left - 1
        return result

    # ------------------------------------------------------------ capture

    def _capture(self) -> None:
        governor, keeper, update = self.governor, self.governor._keeper, self.governor._update
        refuse_several_ranks(governor._course.completed)
        before = keeper.state.survey()
        _refuse_state(governor, before, self._device)
        governor._course.take_first()  # every step so far has been judged, so it is certified at once
        newest = ring.newest_certified(keeper.ring)
        if newest is not None:  # older ones lack state that the graph uses, so nothing can go back to them
            keeper.give_up(lambda slot: slot.snapshot < newest.snapshot)
        self._prepare_copies(before.leaves)
        with_weights = governor.config.check_weights_every == 1
        parameters, trained = keeper.state.roster()
        for parameter in parameters:
            parameter.grad = None

        def decide(bad: torch.Tensor) -> torch.Tensor | None:
            self._latch.decide(bad)
            if self._aside is not None:
                self._aside.run(to_live=False)
                return None
            return self._latch.flag

        def work() -> None:
            loss = self._train()
            self.loss = cast("observe.Loss", _pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, loss))
            if not observe.gradients(update._counted(parameters)):
                raise UnsupportedState(_DOING, "train() has left no gradient", "Call backward() in it.")
            done = update.launch(parameters, loss, self._clip, None, decide)
            if self._after is not None:
                self._after()
            for copy in filter(None, (self._aside, self._back)):
                copy.run(to_live=True)
            self._numbers: dict[str, Scalar] = {"loss": done.loss, "scaler_skipped": done.scaler_skipped}
            self._numbers |= {EXTRA + name: value for name, value in observe.named_losses(self.loss).items()}
            self._numbers["vetoed"] = self._latch.flag
            self._lists: dict[str, Sequence[torch.Tensor]] = {}
            done.norms.add_to(self._lists, "gradients")
            if with_weights:
                governor._look.at_weights(trained, True, self._numbers, self._lists)
            update._clear(parameters, lambda _: False)

        kept = [{key: dict(state) for key, state in each.state.items()} for each in update.optimizers]
        registered = [part.generator for part in keeper.state.parts if isinstance(part, GeneratorPart)]
        drawn_from = [generator for generator in registered if _is_on(generator.device, self._device)]
        try:
            self._replay = self._recorder.record(work, drawn_from)
        except BaseException:
            if update.scaler is not None:  # else it takes gradients for unscaled that are not, in the step after this
                update.scaler._per_optimizer_states.clear()
            raise
        finally:
            update._clear(parameters, lambda _: False)  # where it was cut short, nobody has written them
        self._survey = keeper.state.survey()
        _refuse_new_state(update.optimizers, before, self._survey, kept)
        self._epoch = keeper.driver.state.epoch
        self._baked = _hyper_parameters(governor)
        self.is_captured = True

    def _prepare_copies(self, leaves: Leaves) -> None:
        """The copies that refused replays make, and memory to set the state aside in where that is the means."""
        live = [storage.bytes for storage in leaves.storages]
        if self._keeps:
            if self._after is not None or not self.governor._update.are_exact:
                aside = arena.allocate(arena.signature_of(leaves.storages), Tier.DEVICE, _DOING)
                self._held[0] = aside.flat[self._device]
                self._aside = PredicatedCopy(self._latch, live, [view.data_ptr() for view in aside.views])
            return
        target = self._target()
        if target is not None:
            offsets = [int(view.storage_offset()) for view in target.views]
            self._back = PredicatedCopy(self._latch, live, offsets, parked=True)

    def _target(self) -> arena.Arena | None:
        """The memory of the newest certified snapshot on the device."""
        keeper = self.governor._keeper
        there = (s for s in keeper.ring if s.phase is SlotPhase.CERTIFIED and s.tier is Tier.DEVICE)
        newest = max(there, key=lambda slot: slot.snapshot, default=None)
        return None if newest is None else keeper.vault.slots[newest.index].arena

    # ------------------------------------------------------------ replay

    def _replayed(self, metric: float | None, signs: Mapping[str, torch.Tensor | float]) -> StepResult:
        governor, keeper, course = self.governor, self.governor._keeper, self.governor._course
        doing = "replaying a captured step"
        keeper.sections.require_no_capture(doing)
        governor._require_boundary(doing)
        require_of_step(doing, None, signs, metric=metric)
        keeper.run_requests(after_step=False)
        if metric is None and governor._update._wants_metric():
            raise UnsupportedState(
                doing, "a ReduceLROnPlateau needs the loss, for which the host would have to wait", "Pass metric=."
            )
        with keeper.whole_step():
            with keeper.sections.whole_step():  # no rollback of another thread from here to the last count
                self._require_unchanged(doing)
                if self._last is not None:  # the caller may have changed streams since, and the latch is in use
                    self._port.caller_wait(self._last)
                self._look_at_the_ring()
                with governor._update._scaled_learning_rate(course.learning_rate_factor()):
                    self._replay()
                sent = self._sent(metric, signs)
                self._last = self._port.mark()
                governor._update._step_schedulers(metric)
                course.account(sent)
            result = course.conclude(sent)
        keeper.run_requests(after_step=True)
        return result

    def _require_unchanged(self, doing: str) -> None:
        """What the graph holds as addresses and as numbers is what it was at the capture."""
        state = self.governor._keeper.state
        if not state.check(self._survey, doing):
            now = state.survey()
            here, then = _whereabouts(now), _whereabouts(self._survey)
            if here != then:
                names = sorted({name for name, *_ in here ^ then})
                raise StateMismatch(
                    doing,
                    f"the graph uses other memory than the train state now: {', '.join(names[:8])}",
                    "Build a new CapturedStep.",
                )
        baked = _hyper_parameters(self.governor)
        if baked != self._baked:
            raise UnsupportedState(
                doing,
                f"the graph holds the hyper-parameters {self._baked}, and now they are {baked}",
                "Build a new CapturedStep; what a schedule changes has to be a tensor on the device.",
            )

    def _look_at_the_ring(self) -> None:
        """Tell the device of a rollback that was made since the last replay, and of a newer certified snapshot."""
        epoch = self.governor._keeper.driver.state.epoch
        if epoch != self._epoch:
            self._latch.release()
            self._epoch = epoch
        if self._back is None:
            return
        target = self._target()
        if target is None:
            self._latch.aim(0)
        else:
            flat = target.flat[self._device]
            self._held[flat.data_ptr()] = flat  # not freed while a replay may read it
            self._latch.aim(flat.data_ptr())

    def _sent(self, metric: float | None, signs: Mapping[str, torch.Tensor | float]) -> Sent:
        """Send off the numbers of a replay, which the next one writes anew."""
        governor = self.governor
        step = governor._course.completed + 1
        own = {EXTRA + name: observe.mean_sign(value) for name, value in signs.items() if name != "grad_norm"}
        numbers: dict[str, Scalar] = {**self._numbers, "metric": metric, **own}
        if "grad_norm" in signs:
            numbers["grad_norm"] = observe.mean_sign(signs["grad_norm"])
        lists = dict(self._lists)
        if "weights" not in lists and step % governor.config.check_weights_every == 0:
            governor._look.at_weights(governor._keeper.state.roster()[1], True, numbers, lists)
        reading = governor._readings.send(numbers, lists)
        torn = governor._keeper.driver.state.torn
        return Sent(step=step, reading=reading, torn=torn, keeps_vetoes=self._keeps)


def _learn(course: Course) -> None:
    """Before a snapshot by hand: a replay may have gone back already, and the host does not know."""
    course.judge_all()
    if course._unanswered is not None:
        raise PhaseError(
            "taking a snapshot",
            "the last replays have panicked, so the state is not the one after the last step, expected a healthy one",
            "Call step() once more: it rolls back. Then take it.",
        )


# ---------------------------------------------------------------- what cannot be captured


def _refuse(seen: str, next_step: str) -> UnsupportedState:
    return UnsupportedState(_DOING, seen, next_step)


def _device_of(governor: TolariaGovernor) -> torch.device:
    keeper = governor._keeper
    if keeper.ground.barrier is not Barrier.CONTEXT:
        raise _refuse(
            f"the barrier is {keeper.ground.barrier.value!r}, expected 'context'",
            "capabilities().barrier_reason says why; use governor.step().",
        )
    if len(keeper.accelerators) != 1:
        raise _refuse(f"the train state is on {keeper.accelerators}, expected one device", "Use governor.step().")
    return keeper.accelerators[0]


def _refuse_set_up(governor: TolariaGovernor) -> None:
    """Raise `UnsupportedState` for what no graph can hold, or what would have to change in it."""
    config, update = governor.config, governor._update
    refuse_several_ranks(governor._course.completed)
    for name in ("update_ratio_every", "by_group", "reexecute_every", "past_steps"):
        if getattr(config, name):
            raise _refuse(f"{name}={getattr(config, name)}, which is not handled in a graph yet", f"Leave {name} out.")
    if not update.optimizers:
        raise _refuse("the governor has no optimizer, expected one", "Pass it to the governor.")
    if update.scaler is not None and not all(
        getattr(optimizer, "_step_supports_amp_scaling", False) for optimizer in update.optimizers
    ):
        raise _refuse("a GradScaler reads its flag on the host for this optimizer", "Use fused=True.")
    for number, group in enumerate(group for optimizer in update.optimizers for group in optimizer.param_groups):
        if not group.get("capturable", True):
            raise _refuse(f"parameter group {number} has capturable=False", "Build the optimizer with capturable=True.")
        changes = bool(update.schedulers) or config.recovery.cool_lr != 1.0
        if changes and not isinstance(group["lr"], torch.Tensor):
            raise _refuse(
                f"the learning rate of parameter group {number} is a number, which a graph would hold for ever, while "
                "schedulers or the cool-down of recovery change it",
                "Pass lr=torch.tensor(..., device=...); or no scheduler, and Recovery(cool_lr=1.0).",
            )


def _refuse_state(governor: TolariaGovernor, surveyed: SurveyResult, device: torch.device) -> None:
    """Raise `UnsupportedState` for state that no replay can put back: elsewhere, or numbers of the host."""
    leaves: Leaves = surveyed.leaves
    elsewhere = [leaf.name for leaf in leaves.leaves if leaves.storages[leaf.storage].key[0] != device]
    if elsewhere:
        raise _refuse(f"not on {device}: {', '.join(elsewhere[:8])}", "Move it there before the governor is built.")
    if leaves.wrappers:
        raise _refuse(f"{leaves.wrappers[0].name} is a wrapper subclass", "Use governor.step().")
    for optimizer in governor._update.optimizers:
        for state in optimizer.state.values():
            numbers = [key for key, value in state.items() if isinstance(value, (int, float))]
            if numbers:
                raise _refuse(
                    f"{type(optimizer).__name__} keeps {numbers} as numbers of the host",
                    "Use one with capturable=True.",
                )


def _refuse_new_state(
    optimizers: Sequence[Any],
    before: SurveyResult,
    after: SurveyResult,
    kept: Sequence[Mapping[Any, dict[str, Any]]],
) -> None:
    """Raise `UnsupportedState` if the capture has made state: every replay would make it anew. It is taken back."""
    known = {id(leaf.tensor) for leaf in before.leaves.leaves}
    made = [leaf.name for leaf in after.leaves.leaves if id(leaf.tensor) not in known]
    if not made:
        return
    for optimizer, states in zip(optimizers, kept, strict=True):
        for key in [key for key in optimizer.state if key not in states]:
            del optimizer.state[key]
        for key, values in states.items():
            optimizer.state[key].clear()
            optimizer.state[key].update(values)
    raise _refuse(
        f"state appeared inside the capture, which every replay would begin anew: {', '.join(made[:8])}",
        "Raise warm_up=, so that it exists before.",
    )


def _is_on(named: torch.device, device: torch.device) -> bool:
    """Whether what says that it is on `named` is on `device`: a generator need not know the number of its device."""
    return named.type == device.type and named.index in (None, device.index)


def _whereabouts(surveyed: SurveyResult) -> set[tuple[Any, ...]]:
    leaves = surveyed.leaves
    return {(leaf.name, leaf.geometry, leaves.storages[leaf.storage].key) for leaf in leaves.leaves}


def _hyper_parameters(governor: TolariaGovernor) -> list[dict[str, Any]]:
    """Of every parameter group, what is no tensor."""
    groups = (group for optimizer in governor._update.optimizers for group in optimizer.param_groups)
    return [
        {name: value for name, value in group.items() if name != "params" and not isinstance(value, torch.Tensor)}
        for group in groups
    ]

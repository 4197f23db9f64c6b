"""`TolariaGovernor`, the public face. observe -> judge -> snapshot | rollback -> recover -> report, once per step."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from tolaria import arguments, facts, judge, living, observe, ring
from tolaria.arguments import Grads, Verify, When, as_list
from tolaria.config import GovernorConfig
from tolaria.course import Course
from tolaria.errors import PhaseError
from tolaria.feed import Feed
from tolaria.gauge import Gauge
from tolaria.keeper import Keeper
from tolaria.measure import Look
from tolaria.observe import Loss, Readings, Scalar
from tolaria.operations import SectionKind
from tolaria.records import NO_CAPABILITIES, Capabilities, Health, Statistics, StepResult, Verdict
from tolaria.report import RollbackReport, SnapshotInfo
from tolaria.settlement import Settlement
from tolaria.shield import Shield
from tolaria.state.train_state import TrainState
from tolaria.stepping import Stepping
from tolaria.update import Update
from tolaria.vitals import Sent, own_signs

_OTHER_NUMBERS = 64  # of a step, besides the norms of gradients and weights


class TolariaGovernor:
    """Keeps last-known-good snapshots of a train state, judges every step, and rolls back in place when one panics.

    Args:
        model: The module whose parameters and buffers are governed. Its `forward` becomes a section.
        optimizer: One optimizer or several; `step` of each becomes a section.
        scheduler: One LR scheduler or several, stepped by `step` after each applied optimizer step. A
            `ReduceLROnPlateau` is stepped with `metric` (or the loss where none is given).
        scaler: The `torch.amp.GradScaler` in use.
        config: Settings.
        coordinator: Reserved for agreement between ranks; not handled yet.
        detector: Judges the vital signs; `tolaria.judge.default_detector()` unless given.
        sections: Names of further methods of `model` that launch forwards, for example ``("evaluate_actions",)``.

    Raises:
        UsageError: The model, or what it trains, is governed already, or something is no part of a train state.
        UnsupportedState: A tensor or set-up that cannot be restored exactly yet.
        BudgetExceeded: Parameters and buffers alone do not fit into the slots asked for.

    Threads: every method may be called from any thread. Signals (Ctrl-C) that arrive while a snapshot or rollback is
    being submitted are delivered right after it.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        *,
        scheduler: Any = None,
        scaler: torch.amp.GradScaler | None = None,
        config: GovernorConfig | None = None,
        coordinator: Any = None,
        detector: judge.Detector[Any] | None = None,
        sections: tuple[str, ...] = (),
    ) -> None:
        optimizers, schedulers = as_list(optimizer), as_list(scheduler)
        arguments.require_parts(model, optimizers, schedulers, scaler, config, detector)
        self.config = config or GovernorConfig()
        self.is_disabled = os.environ.get("TOLARIA_DISABLE", "") not in ("", "0")
        self.model = model
        self._update = Update(optimizers, schedulers, scaler)
        self._course = Course(
            self.config, detector or judge.default_detector(), functools.partial(living.rng_policy, self.config)
        )
        self._closed = False
        if self.is_disabled:
            return
        arguments.refuse_coordinator(coordinator)
        arguments.require_ungoverned(model, self.config.mode == "act", living.governed)
        course, config = self._course, self.config  # nothing inside may hold the governor, so that it can be dropped

        def follows() -> bool:
            return living.rng_policy(config) != "keep"

        self._keeper = Keeper(
            TrainState(model, self._update.optimizers, self._update.schedulers, scaler),
            self.config,
            with_rng=follows,
            read_journal=course.read_journal,
            write_journal=course.write_journal,
            count=course.count,
        )
        self._readings = Readings(self._keeper.clocks, 2 * len(self._keeper.state.roster()[0]) + _OTHER_NUMBERS)
        self._look = Look()
        self._gauge = Gauge(self._update.optimizers, self.config.update_ratio_every, self.config.by_group)
        self._feed = Feed(self.config.keep_batches, self._keeper.accelerators, follows)
        self._course.begin(self._keeper, self._feed)
        self._settlement = Settlement(self._course)
        self._stepping = Stepping(self._course, self._settlement)
        if self.config.mode == "act":
            self._keeper.attach(model, self._update.optimizers, sections)
        living.enter(self)

    # ------------------------------------------------------------ the loop

    def register(self, name: str, obj: Any) -> None:
        """Capture and restore one more thing from the next snapshot on.

        Args:
            name: For messages; unique.
            obj: A module (EMA, target network) or optimizer (both restored in place), anything with `state_dict` and
                `load_state_dict`, a `torch.Generator`, or a (getter, setter) pair.

        Raises:
            UsageError: The name is taken or the object has no readable state. Snapshots taken before cannot be restored
                any more (`StateMismatch`), so register before the first one.
        """
        if self.is_disabled:
            return
        self._require_open(f"registering {name!r}")
        self._keeper.state.register(name, obj)

    def watch(self, loader: Iterable[Any]) -> Iterator[Any]:
        """Deliver the batches of `loader`, and after a rollback those that its recovery wants again.

        Takes the first snapshot before the first batch, and later ones when the loop asks for its next batch, so that
        they hold what the loop body does after `step`. At the end of the loader the last step has been judged.
        """
        if self.is_disabled:
            yield from loader
            return
        self._require_open("watching a loader")
        if self.config.mode == "act" and ring.newest_good(self._keeper.ring) is None:
            self._course.take_first()
        yield from self._feed.deliver(loader, self._settlement.settle)

    def step(
        self,
        *,
        loss: Loss,
        clip: float | None = None,
        metric: float | None = None,
        closure: Any = None,
        **signs: torch.Tensor | float,
    ) -> StepResult:
        """One optimizer step under guard: veto, optimizer, scheduler, observe, judge, then snapshot or rollback.

        Call once per optimizer step, after `backward`; all batches delivered since the last call belong to it.
        Gradients are set to None afterwards.

        Args:
            loss: Scalar tensor or float. Several: a sequence (accumulated micro-batches), or a mapping, which also
                makes each a sign ``loss/<name>``; judged is their mean. None with `closure`: what that returns.
            clip: Clip the gradient norm to this value (after unscaling).
            metric: The caller's own figure of merit, higher is better; also handed to a `ReduceLROnPlateau`.
            closure: For optimizers that evaluate the loss themselves (LBFGS).
            **signs: Further vital signs by name, numbers or tensors on any device. ``grad_norm``: the caller's own,
                from before clipping, is judged in the place of ours.

        Returns:
            The verdict, whether the state was rolled back, whether the optimizer step was not applied.

        Raises:
            PhaseError: Called from inside a section or a backward. UsageError: A loss or a sign that is no number.
            UnsupportedState: Called while this thread captures a graph; nothing was changed.
            RetryBudgetExceeded: The panics do not end; the state is the last good one.
            NoSnapshot, StateMismatch, UnsupportedState: A panic could not be answered; nothing was restored.
        """
        if self.is_disabled:
            parameters = TrainState(self.model, self._update.optimizers).parameters()
            self._update.plain(list(parameters), clip, metric, loss, closure)
            self._course.completed = step = self._course.completed + 1
            return StepResult(verdict=Verdict(Health.HEALTHY, step), rolled_back=False, skipped=False, step=step)
        self._keeper.sections.require_no_capture("stepping")
        self._require_boundary("stepping")
        arguments.require_of_step("stepping", loss, signs, clip=clip, metric=metric)
        self._keeper.run_requests(after_step=False)
        acting = self.config.mode == "act"
        if acting and ring.newest_good(self._keeper.ring) is None:
            self._course.take_first()  # a loop without `watch`: from here on there is something to go back to
        with self._keeper.whole_step():
            # one section from the first gradient read to the last count: no rollback or snapshot of another thread sees
            # weights of one step beside the schedule and the counters of another
            with self._keeper.sections.whole_step() if acting else contextlib.nullcontext():
                sent = self._guarded_step(loss, clip, metric, closure, signs)
                self._course.account(sent)
            result = self._course.conclude(sent)
        self._keeper.run_requests(after_step=True)
        return result

    def _guarded_step(
        self, loss: Loss, clip: float | None, metric: float | None, closure: Any, signs: Mapping[str, Any]
    ) -> Sent:
        """Update, and send off the numbers to be judged."""
        acting = self.config.mode == "act"
        factor = self._course.learning_rate_factor() if acting else 1.0
        stale = acting and self._keeper.sections.are_stale()
        update, step = self._update, self._course.completed + 1
        parameters, trained = self._keeper.state.roster()
        self._gauge.note(step, scaler=update.scaler, gradients=closure is None)
        keeps = self.config.on_veto == "keep"
        late = self._keeper.reads_late and update.can_read_late(may_veto=acting, keeps=keeps)
        run = update.run_late if late else update.run
        done = run(parameters, loss, clip, metric, closure, factor, acting, self._keeper.state.is_static, stale)
        numbers = facts.numbers(done, loss, metric, signs, self._gauge.read(step))
        lists: dict[str, Sequence[torch.Tensor]] = {}
        done.norms.add_to(lists, "gradients")
        if step % self.config.check_weights_every == 0:
            self._look.at_weights(trained, late, numbers, lists)
        return Sent(
            step=step,
            reading=self._readings.send(numbers, lists),
            skipped=done.vetoed or done.stale or (not late and bool(done.scaler_skipped)),
            torn=self._keeper.driver.state.torn,
            vetoed=done.vetoed,
            keeps_vetoes=keeps,
            stale=done.stale,
        )

    def observe(self, *, loss: Loss = None, **signs: torch.Tensor | float) -> Verdict:
        """Judge one step of a loop that steps its optimizer itself, without acting. Healthy ones certify snapshots.

        Args:
            loss: As for `step`.
            **signs: As for `step`. With ``grad_norm`` gradients are not looked at; ``metric`` is the figure of merit.

        Returns:
            The verdict; with the `context` barrier, the gravest of those that have arrived by now.
        """
        if self.is_disabled:
            return Verdict(Health.HEALTHY, self._course.completed)
        return self._observe(loss, signs, wait=False)

    def _observe(self, loss: Loss, signs: Mapping[str, torch.Tensor | float], wait: bool) -> Verdict:
        self._require_boundary("observing")
        arguments.require_of_step("observing", loss, signs)
        numbers: dict[str, Scalar] = {"loss": observe.mean_loss(loss)}
        lists: dict[str, Sequence[torch.Tensor]] = {}
        looks_at_weights = (self._course.completed + 1) % self.config.check_weights_every == 0
        if "grad_norm" not in signs or looks_at_weights:  # else nobody need walk through the model
            parameters, trained = self._keeper.state.roster()
            if "grad_norm" not in signs:
                self._look.at_gradients(parameters, self._keeper.reads_late, numbers, lists)
            if looks_at_weights:
                self._look.at_weights(trained, self._keeper.reads_late, numbers, lists)
        own = {name: observe.mean_sign(value) for name, value in signs.items() if name in ("grad_norm", "metric")}
        others = {**observe.named_losses(loss), **{name: signs[name] for name in signs if name not in own}}
        reading = self._readings.send({**numbers, **own, **own_signs(others)}, lists)
        torn = self._keeper.driver.state.torn
        self._course.account(Sent(step=self._course.completed + 1, reading=reading, torn=torn))
        return self._course.watch_only(wait=wait)

    def check_vital_signs(self, loss: Loss = None, **signs: torch.Tensor | float) -> bool:
        """Judge one step and wait for the answer.

        Returns:
            **True when a rollback is demanded** (as in the governor this one descends from), False when all is well.
        """
        return not self.is_disabled and self._observe(loss, signs, wait=True).is_panic

    # ------------------------------------------------------------ snapshot and rollback

    def snapshot(
        self, step: int | None = None, *, grads: Grads | None = None, when: When | None = None
    ) -> SnapshotInfo:
        """Take a snapshot now. The caller vouches for it: it is a rollback target from now on.

        Args:
            step: Its step number; the governor's own count unless given.
            grads: What to do when a backward ran since the last optimizer step: ``"capture"`` the gradients too, or
                ``"drop"`` them from the snapshot (live ones stay). None refuses.
            when: ``"boundary"``: from inside a section or hook, queue it for the end of the step.

        Raises:
            PhaseError: Not at a boundary, or gradients are alive and `grads` is None.
            UsageError: No value that an argument may have.
            QuiesceTimeout, SlotsBusy, BudgetExceeded, UnsupportedState: Nothing was changed.
        """
        doing = "taking a snapshot"
        step = arguments.require_of_snapshot(doing, step, grads, when)
        if self.is_disabled or self.config.mode == "observe":
            return SnapshotInfo.nothing()
        self._require_open(doing)
        if when == "boundary" and self._keeper.is_inside():
            receipt = self._keeper.info(None)
            self._keeper.request(lambda: self._keeper.fill(receipt, self.snapshot(step, grads=grads)), after_step=True)
            return receipt
        self._require_boundary(doing)
        if grads is None:
            self._keeper.require_dead_gradients(doing)
        with Shield() as shield:
            info, _ = self._course.take(shield, manual=True, step=step, gradients=grads == "capture")
        return info

    def execute_rollback(
        self,
        *,
        env_id: int | None = None,
        optimizer: Optimizer | None = None,
        to: SnapshotInfo | int | None = None,
        reason: str | None = None,
        when: When | None = None,
        verify: Verify | None = None,
    ) -> RollbackReport:
        """Put the train state back, in place and bit for bit. Batches of `watch` go on (they are not delivered again).

        Args:
            env_id: Recorded in the report; that of the configuration unless given.
            optimizer: One that the governor was not given has no snapshot: its state is cleared (a cold start).
            to: A snapshot or the step of one; the newest manual or certified snapshot unless given.
            reason: Recorded in the report.
            when: ``"boundary"``: from inside a section or hook, queue it and return a report with status ``pending``.
            verify: ``"before"``: compare the slot with its digest before the first write, and pass a corrupted one over
                for the next older good snapshot. ``"after"`` (and ``"before"`` too): read the restored bytes back, and
                restore once more what was disturbed. `context` always does; `wait` and the next `step` tell.

        Raises:
            UsageError: No value that an argument may have.
            PhaseError, QuiesceTimeout, NoSnapshot, StateMismatch, SnapshotRejected: Nothing was written.
            RollbackFailed: Failed after the first write; the state is undefined.
        """
        doing = "rolling back"
        arguments.require_of_rollback(doing, optimizer, when, verify)
        report = self._unmade(reason or "manual", env_id)
        if self.is_disabled or self.config.mode == "observe":
            return report
        self._require_open(doing)
        target = arguments.require_target(doing, to, self._keeper.phase_of)

        def run() -> None:
            self._course.roll_back(report, target, optimizer, verify)

        if when == "boundary" and self._keeper.is_inside():
            report.status = "pending"
            self._keeper.request(run, after_step=False)
        else:
            self._require_boundary(doing)
            run()
        return report

    def step_back(self, steps: int = 1, *, reason: str | None = None) -> RollbackReport:
        """Put the train state back to where it was that many optimizer steps ago, bit for bit, without a snapshot.

        Made of what optimizers of `tolaria.optim` leave behind and a note of the rest that `step` takes each time, with
        `past_steps` (docs/optim.md). As a rollback by hand otherwise. What comes back was in no probation and has no
        digest: the report's `verified` stays None.

        Args:
            steps: 1 to `past_steps`.
            reason: Recorded in the report.

        Raises:
            UnsupportedState, UsageError: `past_steps` is 0; `steps` is no whole number of at least 1.
            PhaseError, CaptureInProgress, QuiesceTimeout, NoSnapshot, StateMismatch: Nothing was written.
            RollbackFailed: Failed after the first write; the state is undefined.
        """
        steps = arguments.require_steps("stepping back", steps)
        report = self._unmade(reason or f"back by {steps}", None)
        if self.is_disabled or self.config.mode == "observe":
            return report
        self._require_boundary("stepping back")
        self._stepping.back(report, steps)
        return report

    @contextlib.contextmanager
    def using(self, write: bool = True, streams: Iterable[Any] = ()) -> Generator[None]:
        """A section for what the governor cannot see: other threads, custom kernels, entry points besides `forward`.

        Args:
            write: The section writes governed memory, on any stream (all of them wait for copies that still read it);
                False: it only reads.
            streams: With the ``streams`` barrier: CUDA streams that the section launches on, besides the caller's
                current ones. They are known from now on and must live as long as the governor. Every other barrier
                covers them anyway.

        Raises:
            UsageError: A stream is of a device that holds nothing governed.
        """
        if self.is_disabled or self._closed or self.config.mode == "observe":
            yield
            return
        named = self._keeper.devices.named(streams)
        with self._keeper.sections.section(SectionKind.FOREIGN if write else SectionKind.READ, named):
            yield

    # ------------------------------------------------------------ facts

    def capabilities(self) -> Capabilities:
        """What was chosen for this machine and train state."""
        if self.is_disabled:
            return NO_CAPABILITIES
        return facts.capabilities(self.config, self._keeper, self._course)

    def statistics(self) -> Statistics:
        """Counters so far, and which snapshots are held where."""
        return self._course.statistics if self.is_disabled else self._keeper.with_held(self._course.statistics)

    @property
    def rollbacks(self) -> int:
        """Rollbacks so far."""
        return self._course.statistics.rollbacks

    def digest(self) -> str:
        """A fingerprint of the whole train state (xxh3-128, hex): equal digests mean bit-identical states."""
        if self.is_disabled:
            update = self._update
            return TrainState(self.model, update.optimizers, update.schedulers, update.scaler).digest()
        self._require_boundary("taking a digest")
        with self.using(write=False):
            return self._keeper.state.digest()

    def state_dict(self) -> dict[str, Any]:
        """Detectors, counters and retry budget as plain values, for a checkpoint. Snapshots are not part of it.

        Waits for the verdicts of all steps so far; a panic among them is answered by the next step.
        """
        if not (self.is_disabled or self._closed):
            self._course.judge_all()
        return self._course.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken (a resumed run). Call before the first snapshot."""
        self._course.load_state_dict(state_dict)

    def reset(self) -> None:
        """A new episode: detectors and the retry budget start afresh; snapshots and counters stay."""
        self._course.forget()

    def finish(self) -> bool:
        """Wait for all verdicts; a panic among them is answered by a rollback without replay. Call at the end of a run.

        At the end of `watch` there is nothing left to do. A loop that was left by ``break``, or that has no `watch`,
        may end before the verdicts of its last steps are there (`context` barrier). Leaving ``with governor`` calls
        this, unless by an error.

        Returns:
            Whether the state was rolled back.

        Raises:
            PhaseError: Called from inside a section or a backward.
            NoSnapshot, StateMismatch, UnsupportedState: A panic could not be answered; nothing was restored.
        """
        if self.is_disabled or self._closed:
            return False
        self._require_boundary("finishing")
        return self._settlement.finish()

    def close(self) -> None:
        """Detach from model and optimizers and free all slots. Idempotent. Judges nothing any more: see `finish`."""
        if not (self.is_disabled or self._closed):
            self._settlement.tell_what_is_open()
            self._keeper.close()
            living.leave(self)
        self._closed = True

    def __enter__(self) -> TolariaGovernor:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self.close()

    # ------------------------------------------------------------ small things

    def _unmade(self, reason: str, env_id: int | None) -> RollbackReport:
        """The report of a rollback that is still to be made, or never will be."""
        if self.is_disabled or self.config.mode == "observe":
            reason = ("disabled" if self.is_disabled else "mode='observe'") + ": nothing was touched"
        env_id = self.config.env_id if env_id is None else env_id
        return RollbackReport(success=False, status="failed", env_id=env_id, reason=reason)

    def _require_open(self, doing: str) -> None:
        if self._closed:
            raise PhaseError(doing, "the governor is closed, expected an open one", "Build a new one.")

    def _require_boundary(self, doing: str) -> None:
        self._require_open(doing)
        self._keeper.require_boundary(doing)

    def _abandon(self) -> None:
        """In a forked child: stand aside, taking no lock."""
        self._closed = True
        self._keeper.sections.is_open = False
        living.leave(self)

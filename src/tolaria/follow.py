"""FOLLOW: a governor for loops that belong to a framework, which steps the optimizer and fetches the batches itself.

An adapter translates the framework's hooks into these calls, in this order:

    begin()                                 once, when training is about to start
    for batch in watch(...)                 around whatever the framework fetches from
        gradients_ready(optimizer)          before each optimizer step, gradients complete and not yet clipped
        ...                                 the framework steps optimizer, scheduler and scaler
        stepped(loss=..., is_last=...)      after it, before anything is saved, logged or averaged
    fence()                                 where the framework does what a rollback cannot undo (a new epoch)
    finish()                                once, at the end

`gradients_ready` has a step refused whose gradients are not finite (`refusal`); a step that was not announced by it is
judged only when it has been made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.optim import Optimizer

from tolaria import observe, ring, veto
from tolaria.arguments import require_of_step
from tolaria.brake import brake_foreign_steps
from tolaria.coordinate import world_size
from tolaria.errors import SnapshotRejected, UnsupportedState
from tolaria.gauge import scale_of
from tolaria.governor import TolariaGovernor
from tolaria.measure import Measure, Measured
from tolaria.observe import Loss, Scalar
from tolaria.records import Health, StepResult, Verdict
from tolaria.refusal import Refusals
from tolaria.settings import Settings
from tolaria.shield import Shield
from tolaria.vitals import EXTRA, Sent, own_signs


@dataclass(frozen=True, slots=True, eq=False)
class _Gradients:
    """What `gradients_ready` has read of one optimizer.

    Attributes:
        norm: L2 norm, unscaled; None where `norms` stands for it, or without gradients.
        bad: Gradient tensors with a non-finite value.
        norms: On their devices, to be read late.
        skipped: Not 0 where the scaler will not apply the step.
        refused: Not 0 where we will not have it applied; None where nobody can do anything about it.
    """

    norm: float | None
    bad: int
    norms: Measured
    skipped: torch.Tensor | float
    refused: torch.Tensor | float | None = None


class FollowingGovernor(TolariaGovernor):
    """Judges steps that somebody else's loop has made, and rolls back, replays or skips as `TolariaGovernor.step` does.

    Same arguments, same guarantees; schedulers and scaler are restored and never stepped. Attributes as there.

    Threads: as for `step`, one thread makes the calls of this class.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        acts = self.config.mode == "act" and not self.is_disabled
        self._refusals = Refusals(self._update.optimizers if acts else [], keeps=self.config.on_veto == "keep")
        try:
            brake_foreign_steps(self, "a framework's loop", "skip_further")  # it counts batches it would never be given
        except UnsupportedState:
            self.close()
            raise
        self._gradients: dict[int, _Gradients] = {}  # of the step to come, by optimizer
        if not self.is_disabled:
            self._settlement.looks_again = False  # `stepped` does, before the framework has counted its last batch
        self._measures: dict[int, Measure] = {}  # by optimizer

    # ------------------------------------------------------------ data

    @property
    def num_again(self) -> int:
        """Batches that `watch` will deliver again before it asks its loader for more."""
        return 0 if self.is_disabled else self._feed.num_again

    @property
    def rewinds(self) -> int:
        """How often data and counters were taken back so far: rollbacks, and those made to run healthy steps again."""
        statistics = self._course.statistics
        return statistics.rollbacks + statistics.reexecutions

    def random_state_was_set(self) -> None:
        """The framework has set random state after it was handed its batch (a resume): a replay is to find it so."""
        if not self.is_disabled:
            self._feed.note_random_state()

    def is_trusted(self) -> bool:
        """Whether the newest step is healthy, so that the state may be written to a file. Waits for its verdict."""
        if not (self.is_disabled or self._closed):
            self._course.judge_all()
        return self._course.verdict.health is Health.HEALTHY

    # ------------------------------------------------------------ the loop

    def begin(self) -> None:
        """Take the first snapshot, unless there is a good one. Call before the first batch, on a clean boundary.

        Raises:
            SnapshotRejected: The train state is not finite.
        """
        if self.is_disabled or self.config.mode == "observe":
            return
        self._require_boundary("taking the first snapshot")
        if ring.newest_good(self._keeper.ring) is None:
            self._course.take_first()

    def gradients_ready(self, optimizer: Optimizer | None = None) -> None:
        """Read the gradients that the framework is about to apply; `stepped` judges them.

        Call after the backward (inside a closure too, or a hook of the optimizer), before its update and before
        clipping. Several optimizers: once for each. A scaler's gradients may be unscaled already or not. Without this
        call, a step is judged by its loss and its weights.

        If a gradient is not finite, the step of that optimizer (None: of all) is refused, and `stepped` rolls back
        unless `on_veto="keep"`: docs/veto.md. What a scaler is going to skip is left to it.

        Args:
            optimizer: Whose parameters are meant; None: all that are governed.
        """
        if self.is_disabled:
            return
        update = self._update
        if optimizer is None and update.scaler is not None and update.optimizers:
            for each in update.optimizers:  # each may have been unscaled or not
                self.gradients_ready(each)
            return
        self._gauge.note(self._course.completed + 1, optimizer, update.scaler)
        steps = update.optimizers if optimizer is None else [optimizer]
        if optimizer is None:
            parameters = self._keeper.state.roster()[0]
        else:
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        grads, scale = observe.gradients(parameters), scale_of(update.scaler, optimizer)
        # what is still scaled the scaler will look through by itself
        vetoed = steps if self.config.mode == "act" and scale is None else []
        if self._keeper.reads_late and self._refusals.can_read_late(vetoed):
            self._gradients[id(optimizer)] = self._read_late(grads, scale, vetoed, optimizer)
        else:
            self._gradients[id(optimizer)] = self._read_now(grads, scale, vetoed, optimizer)

    def _read_now(
        self,
        grads: Sequence[torch.Tensor],
        scale: torch.Tensor | None,
        vetoed: Sequence[Optimizer],
        optimizer: Optimizer | None,
    ) -> _Gradients:
        norm, bad = observe.gradient_norm(grads)
        scaler = self._update.scaler
        by_scaler = bad > 0 and scaler is not None and (scale is not None or self._has_flagged(optimizer))
        refused = bad > 0 and not by_scaler and self._refusals.decide_now(vetoed, self._keeper.state.is_static)
        # LBFGS asks several times for one step: the last norm stands for it, and every bad gradient counts
        before = self._gradients.get(id(optimizer))
        if before is not None:
            bad, refused = bad + before.bad, refused or bool(before.refused)
        norm = norm if norm is None or scale is None else norm / float(scale)
        return _Gradients(norm, bad, Measured(), float(by_scaler), float(refused))

    def _has_flagged(self, optimizer: Optimizer | None) -> bool:
        """Whether the scaler, which has unscaled the gradients, will skip the step. Waits for the device."""
        return bool(self._update.skipped_by_scaler(optimizer))

    def _read_late(
        self,
        grads: Sequence[torch.Tensor],
        scale: torch.Tensor | None,
        vetoed: Sequence[Optimizer],
        optimizer: Optimizer | None,
    ) -> _Gradients:
        has_scaler = self._update.scaler is not None and bool(grads)
        if has_scaler and scale is not None:
            # the optimizer will unscale by itself, and skip what is not finite
            single = observe.norms(grads)
            theirs = (~torch.isfinite(observe.total_norm(single))).float() if single else 0.0
            return _Gradients(None, 0, Measured([each / scale for each in single]), theirs)
        norms = self._measure_of(optimizer).take(grads, flagged=bool(vetoed))
        theirs = self._update.skipped_by_scaler(optimizer) if has_scaler else 0.0
        return _Gradients(None, 0, norms, theirs, self._refusals.decide_late(vetoed, norms, theirs))

    def _measure_of(self, optimizer: Optimizer | None) -> Measure:
        return self._measures.setdefault(id(optimizer), Measure())

    def stepped(
        self,
        *,
        loss: Loss = None,
        is_last: bool = False,
        scaler_skipped: bool | None = None,
        **signs: torch.Tensor | float,
    ) -> StepResult:
        """Judge an optimizer step that the framework has made; then snapshot, or roll back and arrange the data.

        Call once per optimizer step (or skipped step), right after it and its scheduler. All batches that `watch` has
        delivered since the last call belong to it. A snapshot that is due is taken when the next batch is asked for, so
        that it holds whatever the framework does after this call.

        Args:
            loss: Scalar tensor or float, not divided by the number of micro-batches; a sequence for several of them.
            is_last: No later step can be waited for (the end of an epoch or of the run, or a file is to be written):
                wait for all verdicts. The steps of a suspicion that is still open are made again, once, from the last
                good snapshot before them; if it returns it passes. That is no panic, and counts in no budget.
            scaler_skipped: The scaler did not apply this step. None: read from the gradients, if there is a scaler.
            **signs: Further vital signs by name.

        Returns:
            As `TolariaGovernor.step`. Where `rolled_back`, `num_again` says how many batches come again; the caller
            takes the framework's own counters back.

        Raises:
            RetryBudgetExceeded, NoSnapshot, StateMismatch, UnsupportedState, UsageError: As for `step`.
        """
        if self.is_disabled:
            done = self._course.completed
            return StepResult(verdict=Verdict(Health.HEALTHY, done), rolled_back=False, skipped=False, step=done)
        self._require_boundary("judging a step")
        require_of_step("judging a step", loss, signs)
        sent = self._sent(loss, scaler_skipped, signs)
        self._course.account(sent)
        if is_last:
            self._course.judge_all()
        result = self._course.conclude(sent)
        if is_last and not result.rolled_back and self.config.mode == "act":
            doubt = self._settlement.look_again_now()
            result = result if doubt is None else replace(result, verdict=doubt, rolled_back=True)
        return result

    def _sent(self, loss: Loss, scaler_skipped: bool | None, signs: Mapping[str, torch.Tensor | float]) -> Sent:
        found = list(self._gradients.values())
        self._gradients.clear()
        self._refusals.lift()
        read = [each.norm for each in found if each.norm is not None]
        skipped: Scalar = sum((each.skipped for each in found), start=0.0)
        if scaler_skipped is not None:
            skipped = float(scaler_skipped)
        late = [each.refused for each in found if isinstance(each.refused, torch.Tensor)]
        vetoed = any(each.refused for each in found if isinstance(each.refused, float))
        step = self._course.completed + 1
        numbers: dict[str, Scalar] = {
            "loss": observe.mean_loss(loss),
            "grad_norm": math.sqrt(sum(norm * norm for norm in read)) if read else None,
            "nonfinite_gradients": sum(each.bad for each in found),
            "scaler_skipped": skipped,
            "vetoed": veto.any_of(late) if late else None,
        }
        lists: dict[str, Sequence[torch.Tensor]] = {}
        for each in found:
            each.norms.add_to(lists, "gradients")
        if step % self.config.check_weights_every == 0:
            self._look.at_weights(self._keeper.state.roster()[1], self._keeper.reads_late, numbers, lists)
        others = {**observe.named_losses(loss), **signs}
        numbers |= own_signs(others)
        numbers |= {EXTRA + name: value for name, value in self._gauge.read(step).items()}
        return Sent(
            step=step,
            reading=self._readings.send(numbers, lists),
            skipped=vetoed or (not isinstance(skipped, torch.Tensor) and bool(skipped)),
            torn=self._keeper.driver.state.torn,
            vetoed=vetoed,
            keeps_vetoes=self.config.on_veto == "keep",
        )

    def fence(self) -> None:
        """Take a snapshot, and let no later rollback go further back than it.

        Call where the framework has done what a rollback cannot undo or repeat, as between two epochs: validation,
        schedulers and hooks of the epoch, checkpoints. The snapshot is manual: vouched for by the adapter, after all
        steps so far have been judged. Gradients that are alive are not in it.

        A train state that is not finite goes back to the newest good snapshot, and the batches since then are lost. The
        hyperparameters and schedulers stay as they are, since nothing would step them again.

        Raises:
            SnapshotRejected: The train state is not finite, also after going back to the newest good snapshot.
        """
        if self.is_disabled or self.config.mode == "observe":
            return
        if ring.newest_good(self._keeper.ring) is None:
            self.begin()
            return
        settings = Settings(self._update.optimizers, self._update.schedulers)
        if super().finish():
            self._put_back(settings)
        if self._take_fence():
            return
        self.execute_rollback(reason="non-finite train state between two epochs")
        self._put_back(settings)
        if not self._take_fence():
            raise SnapshotRejected(
                f"starting an epoch at step {self._course.completed}",
                "the train state is not finite after a rollback",
                "Start from a checkpoint.",
            )

    def finish(self) -> bool:
        """As `TolariaGovernor.finish`; and weights that have become non-finite behind the last step go back too.

        Nobody has judged what a callback or a hook did after it. The steps since the last good snapshot are lost;
        hyperparameters and schedulers stay as they are, as in `fence`.
        """
        rolled_back = super().finish()
        if rolled_back or self.is_disabled or self._closed or self.config.mode != "act":
            return rolled_back
        # weights in shards are looked at by all ranks or by none, and one does not go back alone
        if world_size() > 1 or ring.newest_good(self._keeper.ring) is None or self._has_finite_weights():
            return False
        settings = Settings(self._update.optimizers, self._update.schedulers)
        self.execute_rollback(reason="non-finite weights at the end")
        self._put_back(settings)
        return True

    def _has_finite_weights(self) -> bool:
        with self.using(write=False):
            return not observe.num_nonfinite(self._keeper.state.roster()[1])

    def _put_back(self, settings: Settings) -> None:
        with self.using():
            settings.put_back()

    def close(self) -> None:
        """As `TolariaGovernor.close`."""
        self._refusals.close()
        super().close()

    def _take_fence(self) -> bool:
        """A manual snapshot, after which the older ones are given up. False when it is not finite."""
        with Shield() as shield:
            # candidates in probation could be busy with all slots, and none of them is needed any more
            self._keeper.give_up(lambda slot: slot.in_probation)
            info, found = self._course.take(shield, manual=True, wait=True)
            poisoned = found is not None and bool(found.nonfinite)
            serial = info.serial
            self._keeper.give_up(lambda slot: slot.snapshot == serial if poisoned else slot.snapshot < serial)
        return not poisoned

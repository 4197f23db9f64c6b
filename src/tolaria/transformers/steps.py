"""The optimizer steps of a Transformers `Trainer`: their batches and losses, and a step made once more.

All private access of the adapter is in this file. A `Trainer` walks through its data by a fixed count, so it cannot
be given a batch again: what a rollback wants replayed is trained here, inside `on_step_end`, by the same calls and in
the same order as the trainer's own loop makes them.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers.optimization import GreedyLR

from tolaria.errors import UnsupportedState
from tolaria.follow import FollowingGovernor

Unit = tuple[int, list[Any], Any]
"""The batches of one optimizer step: the trainer's step number, the micro-batches, the number of items in them."""

_MOST_STANDING = 4096
_WRAPPED = ("get_batch_samples", "training_step", "log")


class TrainerSteps:
    """Wraps three methods of one trainer while it trains.

    Args:
        trainer: The `Trainer`. `Trainer.get_batch_samples` is called once per optimizer step, which makes it the unit
            of a replay.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._originals = {name: getattr(trainer, name) for name in _WRAPPED}
        self._governor: FollowingGovernor | None = None
        self._deliveries: Iterator[Unit] | None = None
        self._request: tuple[Any, ...] = ()
        self._model: Any = None  # as the trainer has wrapped it
        self._number = 0  # of the step whose micro-batches are trained now
        self._expected = 0  # micro-batches of it
        self._losses: dict[int, list[torch.Tensor]] = {}  # of every step since the last log, by its number
        self._past: dict[int, list[float]] = {}  # the same of steps before it
        self._logs: list[tuple[int, float]] = []  # at each log: the number of its step, the trainer's sum of losses
        self._has_gaps = False  # some of the steps since the last log were dropped
        self._lowest: float = math.inf  # number of the first step undone since the sums of losses were set right
        self._standing: deque[int] = deque(maxlen=_MOST_STANDING)  # numbers of the steps that no rollback has undone
        self._lost = (0, 0)  # see `_num_undone`
        self._corrected: dict[str, Any] | None = None  # what the trainer will log of an undone step, set right

    # ------------------------------------------------------------ attach

    def attach(self, governor: FollowingGovernor) -> None:
        """Route batches through `watch`, and see losses and gradients."""
        self._governor = governor
        self._deliveries = governor.watch(self._fetch())
        trainer = self._trainer
        self._losses.clear()
        self._past.clear()
        self._standing.clear()
        self._logs, self._lowest, self._has_gaps = [(trainer.state.global_step, 0.0)], math.inf, False
        self._lost, self._corrected = self._num_undone(governor), None
        trainer.get_batch_samples, trainer.training_step, trainer.log = self._next, self._train, self._log

    def detach(self) -> None:
        """Put the methods back."""
        if self._governor is None:
            return
        self._governor = None
        self._deliveries = None
        for name in _WRAPPED:
            vars(self._trainer).pop(name, None)

    def _fetch(self) -> Iterator[Unit]:
        """The units, fetched when they are asked for. Never ends: the trainer knows when it has enough."""
        while True:
            batches, num_items = self._originals["get_batch_samples"](*self._request)
            yield self._trainer.state.global_step + 1, batches, num_items

    # ------------------------------------------------------------ in the place of the trainer's methods

    def _next(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        self._request, self._corrected = (epoch_iterator, num_batches, device), None
        unit = self._deliver()
        while unit[0] <= self._trainer.state.global_step:
            # a snapshot that was due has turned out not to be finite: the steps before this one come first
            self._make_and_judge(unit, is_last=False)
            self._repeat(is_last=False)
            unit = self._deliver()
        self._correct_losses()
        return unit[1], unit[2]

    def _deliver(self) -> Unit:
        assert self._deliveries is not None
        unit = next(self._deliveries)
        self._forget_undone()
        self._open(unit)
        return unit

    def _open(self, unit: Unit) -> None:
        self._number, self._expected = unit[0], len(unit[1])
        self._losses[self._number] = []

    def _train(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        loss = self._originals["training_step"](model, inputs, num_items_in_batch)
        self._model = model
        losses = self._losses[self._number]
        losses.append(loss.detach())
        if len(losses) == self._expected and self._governor is not None:
            self._governor.gradients_ready()  # before they are clipped
        return loss

    def _log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        now = self._trainer.state.global_step
        if "loss" in logs and self._trainer._globalstep_last_logged == now > self._logs[-1][0]:
            for name, value in (self._corrected or {}).items():
                if value is not None:
                    logs[name] = value
                else:
                    logs.pop(name, None)
            self._corrected = None
            self._note_log(now, logs)
        if self._governor is not None:
            logs["tolaria/rollbacks"] = float(self._governor.rollbacks)
        self._originals["log"](logs, start_time)

    # ------------------------------------------------------------ judged, and made again

    @property
    def _loss(self) -> torch.Tensor | None:
        """Loss of the step that was just made; the trainer has divided those of its micro-batches."""
        losses = self._losses.get(self._number)
        return torch.stack(losses).sum() if losses else None

    def judge(self, is_last: bool) -> None:
        """Judge the step that was just made. After a rollback, make again what it wants made again.

        Args:
            is_last: See `FollowingGovernor.stepped`.
        """
        if not self._stepped(is_last):
            if is_last and self._has_gaps:  # the trainer may be about to end, and add what was not logged
                self._sum_since_log()
            return
        number = self._trainer.state.global_step
        norm, rate = self._repeat(is_last)
        self._number = number
        self._corrected = {"grad_norm": norm, "learning_rate": rate or self._trainer._get_learning_rate()}
        if not self._correct_losses():
            self._corrected["loss"] = None

    def _stepped(self, is_last: bool) -> bool:
        assert self._governor is not None
        self._standing.append(self._number)
        result = self._governor.stepped(loss=self._loss, is_last=is_last)
        self._forget_undone()
        return result.rolled_back

    def _repeat(self, is_last: bool) -> tuple[float | None, float | None]:
        """Until no batch is left to be delivered again. Answers gradient norm and learning rate of the last step."""
        made: tuple[float | None, float | None] = (None, None)
        while self._governor is not None and self._governor.num_again:
            made = self._make_and_judge(self._deliver(), is_last)
        return made

    def _make_and_judge(self, unit: Unit, is_last: bool) -> tuple[float | None, float | None]:
        if not unit[1]:
            return None, None
        made = self._step(unit)
        assert self._governor is not None
        self._stepped(is_last and not self._governor.num_again)
        return made

    def _forget_undone(self) -> None:
        """Rollbacks since the last look: the losses of the steps that they have undone count for nothing."""
        assert self._governor is not None
        lost, rolled_back = self._num_undone(self._governor)
        for _ in range(min(lost - self._lost[0], len(self._standing))):
            number = self._standing.pop()
            self._losses.pop(number, None)
            self._past.pop(number, None)
            if rolled_back > self._lost[1]:  # else it was healthy, and comes to the same loss
                self._lowest = min(self._lowest, number)
        self._lost = lost, rolled_back

    @staticmethod
    def _num_undone(governor: FollowingGovernor) -> tuple[int, int]:
        """Steps undone so far, whatever for; and those of them that were not just run again."""
        statistics = governor.statistics()
        return statistics.steps_lost + statistics.reexecuted_steps, statistics.steps_lost

    def _step(self, unit: Unit) -> tuple[float, float]:
        """One optimizer step: micro-batches, clip, optimizer, scheduler. Answers gradient norm and learning rate."""
        trainer, (_, batches, num_items) = self._trainer, unit
        accelerator, model = trainer.accelerator, self._model
        trainer.current_gradient_accumulation_steps = len(batches)
        for index, inputs in enumerate(batches, start=1):
            is_last = index == len(batches)
            accelerator.gradient_state._set_sync_gradients(is_last)
            with contextlib.nullcontext() if is_last else accelerator.no_sync(model=model):
                trainer.training_step(model, inputs, num_items)
        norm = trainer._clip_grad_norm(model) if trainer.args.max_grad_norm > 0 else None
        norm = trainer._get_grad_norm(model, grad_norm=norm)
        trainer.optimizer.step()
        rate = trainer._get_learning_rate()
        if not accelerator.optimizer_step_was_skipped and not self.has_plateau:
            trainer.lr_scheduler.step()
        model.zero_grad()
        return float(norm), rate

    @property
    def has_plateau(self) -> bool:
        """Whether the schedule follows the evaluation, which is not made again."""
        return isinstance(self._trainer.lr_scheduler, (ReduceLROnPlateau, GreedyLR))

    # ------------------------------------------------------------ sums of losses

    def _note_log(self, now: int, logs: dict[str, float]) -> None:
        """The trainer has added the losses since the last log to its sum, and waited for them. Keep them as numbers."""
        last, total = self._logs[-1]
        if self._has_gaps and "loss" in logs:
            window = torch.zeros_like(self._trainer._tr_loss)
            self._add_standing(window, last, now)
            logs["loss"] = window.item() / (now - last)
            self._trainer._total_loss_scalar = total + window.item()
        self._has_gaps = False
        numbers = [number for number, losses in self._losses.items() if number <= now and losses]
        if numbers:
            values = iter(torch.stack([loss for number in numbers for loss in self._losses[number]]).tolist())
            self._past |= {number: [next(values) for _ in self._losses[number]] for number in numbers}
        self._losses = {number: losses for number, losses in self._losses.items() if number > now}
        self._past = {number: losses for number, losses in self._past.items() if number > now - _MOST_STANDING}
        self._logs.append((now, self._trainer._total_loss_scalar))
        while len(self._logs) > 2 and self._logs[1][0] <= now - _MOST_STANDING:
            del self._logs[0]

    def _correct_losses(self) -> bool:
        """After a rollback, let the sums of losses, since the last log and up to it, be those of the steps that stand.

        Returns:
            False when none stands since the last log, so that there is no loss to be logged.
        """
        if self._lowest == math.inf:
            return True  # nothing was undone
        trainer, logs = self._trainer, self._logs
        undone = [index for index, (number, _) in enumerate(logs) if number >= self._lowest]
        for index in filter(None, undone):  # of what lies before the first log that is kept nothing is known
            (after, total), (upto, _) = logs[index - 1 : index + 1]
            window = torch.zeros_like(trainer._tr_loss)
            self._add_standing(window, after, upto)
            logs[index] = upto, total + window.item()
        if undone:
            trainer._total_loss_scalar = logs[-1][1]
        self._lowest = math.inf
        return self._sum_since_log()

    def _sum_since_log(self) -> bool:
        trainer, after = self._trainer, self._logs[-1][0]
        made = self._add_standing(trainer._tr_loss.zero_(), after, trainer.state.global_step)
        self._has_gaps = made < trainer.state.global_step - after
        return made > 0

    def _add_standing(self, total: torch.Tensor, after: int, upto: int) -> int:
        """Add the losses of the steps behind `after`, in their order; one that was dropped counts as their mean.

        Returns:
            How many stand.
        """
        made = [self._losses.get(number) or self._past.get(number) for number in range(after + 1, upto + 1)]
        standing = [losses for losses in made if losses]
        for losses in standing:
            for loss in losses:
                total += loss
        dropped = len(made) - len(standing)
        if standing and dropped:
            total += total / len(standing) * dropped
        return len(standing)


def refuse_unsupported(args: Any) -> None:
    """Raise `UnsupportedState` for ways to train whose state cannot be put back yet."""
    seen = {
        f"{args.world_size} processes": args.world_size > 1,
        f"{args.n_gpu} GPUs in one process (nn.DataParallel)": args.n_gpu > 1,
        "DeepSpeed": bool(args.deepspeed),
        "FSDP": bool(args.fsdp),
    }
    for what, there in seen.items():
        if there:
            raise UnsupportedState(
                "attaching to the Transformers trainer",
                f"it trains with {what}, and a rollback of one part alone would ruin the others",
                'Use one process on one device, or GovernorConfig(mode="observe").',
            )

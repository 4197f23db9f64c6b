"""`TolariaCallback` for Lightning: hooks of the trainer become calls of the governor. No decision is made here."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from tolaria.config import GovernorConfig
from tolaria.errors import UnsupportedState
from tolaria.follow import FollowingGovernor
from tolaria.judge import Detector
from tolaria.lightning.loops import LOGGED, Progress, averages

if TYPE_CHECKING or importlib.util.find_spec("lightning") is not None:
    from lightning.pytorch.callbacks import Callback
else:  # the two packages are one code base, and take each other's callbacks
    from pytorch_lightning.callbacks import Callback


class TolariaCallback(Callback):
    """Governs a `Trainer.fit`: `Trainer(callbacks=[TolariaCallback()])`, with `lightning` and `pytorch_lightning`.

    Weights, buffers, optimizers, schedulers, the scaler, averaged weights of other callbacks, progress counters, logged
    values and the data position are found by themselves. docs/lightning.md says what is not rolled back.

    Args:
        config: Settings of the governor.
        detector: Judges the vital signs; the default one unless given.

    Attributes:
        governor: The governor of the present fit, or of the last one; None before the first.

    Raises (when training starts):
        UnsupportedState: Several ranks, or batches that are fetched inside `training_step`.
        SnapshotRejected: The train state is not finite.
    """

    def __init__(self, config: GovernorConfig | None = None, detector: Detector[Any] | None = None) -> None:
        super().__init__()
        self.governor: FollowingGovernor | None = None
        self._config, self._detector = config or GovernorConfig(), detector
        self._progress: Progress | None = None
        self._resumed: dict[str, Any] | None = None
        self._losses: list[Any] = []  # of the open accumulation window
        self._step_before = 0

    @property
    def rollbacks(self) -> int:
        """Rollbacks so far."""
        return 0 if self.governor is None else self.governor.rollbacks

    # ------------------------------------------------------------ begin and end

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Move to the front: whoever averages or saves weights in the same hooks must see them after the rollback."""
        trainer.callbacks = [self, *(callback for callback in trainer.callbacks if callback is not self)]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach: weights are loaded, optimizers exist, and nothing was trained yet."""
        if trainer.world_size > 1 and self._config.mode == "act":
            raise UnsupportedState(
                "attaching to Lightning",
                f"the trainer runs {trainer.world_size} processes, and a rollback on one of them ruins the others",
                'Use one process, or GovernorConfig(mode="observe").',
            )
        self._progress = progress = Progress(trainer, pl_module)
        self.governor = governor = FollowingGovernor(
            pl_module,
            trainer.optimizers,
            scheduler=progress.schedulers,
            scaler=getattr(trainer.precision_plugin, "scaler", None),
            config=self._config,
            detector=self._detector,
        )
        if self._resumed is not None:
            governor.load_state_dict(self._resumed)
            self._resumed = None  # a later fit goes on by itself
        governor.register("Lightning's counters and logged values", (progress.read, progress.write))
        for name, model, owner in averages(trainer.callbacks):
            governor.register(name, model)
            governor.register(f"{name}, counters", owner)
        self._losses.clear()
        progress.govern_data(governor)  # a fit that resumes amid an epoch is told of no start of that epoch

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Judge what is left to be judged, and let go of the trainer."""
        if self.governor is not None and self._progress is not None:
            self._progress.finish(self.governor)
        self._detach()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Let go of the trainer; the state is as the error says."""
        self._detach()

    def _detach(self) -> None:
        if self._progress is not None:
            self._progress.release()
        if self.governor is not None:
            self.governor.close()

    # ------------------------------------------------------------ one epoch, one batch

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """The fetcher of the epoch exists by now."""
        if self.governor is not None and self._progress is not None:
            self._progress.begin_epoch()
            self._progress.govern_data(self.governor)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Note how many optimizer steps lie behind."""
        self._step_before = trainer.global_step

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Optimizer) -> None:
        """Gradients are complete, and not clipped yet."""
        if self.governor is not None and self._progress is not None:
            self.governor.gradients_ready(optimizer)
            self._progress.leave_unclipped(optimizer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Judge a step, with all micro-batches of its window. Optimizer and schedulers have been stepped."""
        governor, progress = self.governor, self._progress
        if governor is None or progress is None:
            return
        progress.clip_again()
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if loss is not None:
            self._losses.append(loss * trainer.accumulate_grad_batches)  # Lightning has divided it
        if trainer.global_step == self._step_before and not progress.learns_nothing:
            return  # inside a window
        losses = list(self._losses)
        self._losses.clear()
        waiting = governor.num_again
        if governor.stepped(loss=losses or None, is_last=progress.must_be_judged()).rolled_back:
            counted = governor.num_again - waiting
            progress.take_back(counted)
            progress.after_batch(counted)
        else:
            pl_module.log(LOGGED, float(self.rollbacks), prog_bar=True, on_step=True, on_epoch=False)

    # ------------------------------------------------------------ resume

    def state_dict(self) -> dict[str, Any]:
        """Counters, detectors and retry budget, for a checkpoint."""
        return {} if self.governor is None else self.governor.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Comes before training starts, when there is no governor yet."""
        self._resumed = state_dict or None

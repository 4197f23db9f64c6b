"""`TolariaCallback` for the Transformers `Trainer`: its events become calls of the governor. No decision is made here.

Callbacks of Transformers are meant to look and not to touch. This one changes weights and optimizer state in place, on
purpose.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from tolaria.config import GovernorConfig
from tolaria.errors import UnsupportedState, UsageError
from tolaria.follow import FollowingGovernor
from tolaria.judge import Detector
from tolaria.transformers.steps import TrainerSteps, refuse_unsupported


class TolariaCallback(TrainerCallback, ExportableState):
    """Governs `Trainer.train`.

        callback = TolariaCallback()
        trainer = Trainer(..., callbacks=[callback])
        callback.set_trainer(trainer)

    With `set_trainer` batches are replayed or skipped one by one, and logged values are set right. Without it a
    rollback drops all steps since the snapshot, and the model's output must hold `loss`.

    Args:
        config: Settings of the governor.
        detector: Judges the vital signs; the default one unless given.

    Attributes:
        governor: The governor of the present training, or of the last one; None before the first.

    Raises (when training starts):
        UnsupportedState: Several processes or devices, DeepSpeed, FSDP.
        SnapshotRejected: The train state is not finite.
    """

    def __init__(self, config: GovernorConfig | None = None, detector: Detector[Any] | None = None) -> None:
        self.governor: FollowingGovernor | None = None
        self._config, self._detector = config or GovernorConfig(), detector
        self._steps: TrainerSteps | None = None
        self._losses: list[torch.Tensor] = []  # without a trainer: what the model's outputs hold
        self._hook: Any = None
        self._fence_due = self._resumes = False

    def set_trainer(self, trainer: Any) -> TolariaCallback:
        """Make the trainer known. Call before `trainer.train()`; returns the callback."""
        self._steps = TrainerSteps(trainer)
        return self

    @property
    def rollbacks(self) -> int:
        """Rollbacks so far."""
        return 0 if self.governor is None else self.governor.rollbacks

    # ------------------------------------------------------------ begin and end

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach: the model is on its device, optimizer and schedule exist, and nothing was trained yet."""
        self._detach()
        if self._config.mode == "act":
            refuse_unsupported(args)
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        self.governor = governor = FollowingGovernor(
            model,
            getattr(optimizer, "optimizer", optimizer),
            scheduler=kwargs["lr_scheduler"],
            scaler=getattr(optimizer, "scaler", None),
            config=self._config,
            detector=self._detector,
        )
        # a checkpoint of a run without this callback has no entry for it, which the trainer's next save counts on
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        if state.global_step > 0 and saved["attributes"]["governed"] is not None:
            governor.load_state_dict(saved["attributes"]["governed"])
        self._resumes = state.global_step > 0
        if self._steps is not None:
            self._steps.attach(governor)
        else:
            self._hook = model.register_forward_hook(self._see)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Judge what is left to be judged, and let go of the trainer."""
        if self.governor is not None:
            self.governor.finish()
        self._detach()

    def _detach(self) -> None:
        if self._steps is not None:
            self._steps.detach()
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if self.governor is not None:
            self.governor.close()

    def _see(self, module: Any, inputs: Any, output: Any) -> None:
        loss = output.get("loss") if hasattr(output, "get") else None
        if module.training and loss is not None:
            self._losses.append(loss.detach())

    # ------------------------------------------------------------ one step

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Without a trainer no batch can come again, so that no rollback may reach into another epoch."""
        self._fence_due = self._steps is None

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A schedule that follows the evaluation has been stepped, and will not be stepped again on a replay."""
        self._fence_due = self._fence_due or (self._steps is not None and self._steps.has_plateau)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The batches of the step are fetched, so the shuffle of a new epoch is drawn."""
        self._losses.clear()
        if self.governor is None:
            return
        if self._fence_due:
            self._fence_due = False
            self.governor.fence()
        if self._resumes:
            self._resumes = False
            self.governor.random_state_was_set()  # to that of the checkpoint, behind the fetch

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Without a trainer, gradients are seen after they were clipped: a bad one shows in all of them."""
        if self._steps is None and self.governor is not None:
            self.governor.gradients_ready()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Judge the step; a rollback makes its steps again before anything is logged, evaluated or saved."""
        if self.governor is None:
            return control
        ends = state.global_step >= state.max_steps or float(state.epoch or 0.5).is_integer()
        ends = ends or control.should_training_stop
        is_last = ends or control.should_evaluate or control.should_save
        if self._steps is not None:
            self._steps.judge(is_last)
        else:
            self._judge_alone(is_last)
        # at the end the same flag carries the final save, which everybody counts on
        if control.should_save and not ends and not self.governor.is_trusted():
            control.should_save = False
        return control

    def _judge_alone(self, is_last: bool) -> None:
        assert self.governor is not None
        if not self._losses:
            raise UnsupportedState(
                "judging the first step",
                "the output of the model holds no `loss` (label smoothing, compute_loss_func or a trainer of its own)",
                "Call callback.set_trainer(trainer) before trainer.train().",
            )
        self.governor.stepped(loss=list(self._losses), is_last=is_last)
        self._losses.clear()

    # ------------------------------------------------------------ resume

    def state(self) -> dict[str, Any]:
        """Counters, detectors and retry budget, for a checkpoint."""
        return {"args": {}, "attributes": {"governed": self.governed}}

    @property
    def governed(self) -> dict[str, Any] | None:
        """What `state` holds. The trainer sets it on callbacks that it makes anew from a checkpoint."""
        return None if self.governor is None else self.governor.state_dict()

    @governed.setter
    def governed(self, state: Any) -> None:
        raise UsageError(
            "resuming the Transformers trainer",
            "restore_callback_states_from_checkpoint=True makes callbacks anew, and this one needs its trainer",
            "Leave that flag off: the callback that you pass in finds its state in the checkpoint by itself.",
        )

"""A training loop of Accelerate under guard: `govern(accelerator)`. See docs/accelerate.md.

governor = govern(accelerator)                          # after accelerator.prepare(...)
for batch in governor.watch(loader):
    with accelerator.accumulate(model):
        loss = ...
        accelerator.backward(loss)
        optimizer.step(); scheduler.step(); optimizer.zero_grad()
    governor.follow(loss)                               # after each micro-batch
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.optim import Optimizer

from tolaria.config import GovernorConfig
from tolaria.errors import UnsupportedState, UsageError
from tolaria.follow import FollowingGovernor
from tolaria.frameworks import require
from tolaria.judge import Detector
from tolaria.records import StepResult

require(("accelerate",), ("1.14", "1.15"), "accelerate")

_ANNOUNCEMENT = "end_of_dataloader"


class AcceleratedGovernor(FollowingGovernor):
    """Follows the optimizer steps of a loop that uses an `Accelerator`. Made by `govern`.

    It has `state_dict` and `load_state_dict`, so `accelerator.register_for_checkpointing(governor)` saves it.
    """

    def __init__(self, accelerator: Any, config: GovernorConfig, detector: Detector[Any] | None) -> None:
        self._accelerator = accelerator
        self._losses: list[torch.Tensor] = []  # of the open accumulation window
        optimizers = [each.optimizer for each in accelerator._optimizers]
        super().__init__(
            accelerator._models[0],
            optimizers,
            scheduler=[each.scheduler for each in accelerator._schedulers],
            scaler=accelerator.scaler,
            config=config,
            detector=detector,
        )
        # no closure is passed, so the gradients of the step are there, and all processes have shared theirs
        self._hooks = [optimizer.register_step_pre_hook(self._before_step) for optimizer in optimizers]

    @property
    def governor(self) -> AcceleratedGovernor:
        """Itself: by this name every adapter has its governor."""
        return self

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._closed:
            self.gradients_ready(optimizer)

    def watch(self, loader: Iterable[Any]) -> Iterator[Any]:
        """As `TolariaGovernor.watch`, for a prepared loader or any other.

        A prepared loader announces its last batch, which ends an accumulation window. A batch that comes again makes
        the announcement that it made the first time.
        """
        for batch, is_last in super().watch(_with_announcements(loader)):
            if is_last is not None:
                setattr(loader, _ANNOUNCEMENT, is_last)
            yield batch

    def follow(self, loss: torch.Tensor) -> StepResult | None:
        """Judge the optimizer step if this micro-batch ended one. Call after each `accumulate` block.

        Args:
            loss: Scalar tensor of this micro-batch, as it was handed to `accelerator.backward`.

        Returns:
            As `stepped`; None inside an accumulation window.
        """
        self._losses.append(loss.detach())
        if not self._accelerator.sync_gradients:
            return None
        losses = list(self._losses)
        self._losses.clear()
        state = self._accelerator.gradient_state
        skipped = self._update.scaler is not None and self._accelerator.optimizer_step_was_skipped
        return self.stepped(loss=losses, is_last=bool(state.end_of_dataloader), scaler_skipped=skipped)

    def close(self) -> None:
        """As `TolariaGovernor.close`."""
        for hook in self._hooks:
            hook.remove()
        super().close()


def _with_announcements(loader: Iterable[Any]) -> Iterator[tuple[Any, bool | None]]:
    announces = hasattr(loader, _ANNOUNCEMENT)
    batches = iter(loader)
    while True:
        if announces:
            setattr(loader, _ANNOUNCEMENT, False)  # a batch that came again may have left its own
        try:
            batch = next(batches)
        except StopIteration:
            return
        yield batch, getattr(loader, _ANNOUNCEMENT) if announces else None


def govern(
    accelerator: Any, *, config: GovernorConfig | None = None, detector: Detector[Any] | None = None
) -> AcceleratedGovernor:
    """A governor of whatever the accelerator has prepared: the model, optimizers, schedulers and scaler.

    Call once, after `accelerator.prepare`.

    Raises:
        UsageError: No model, or more than one, was prepared.
        UnsupportedState: Several processes.
    """
    config = config or GovernorConfig()
    if accelerator.num_processes > 1 and config.mode == "act":
        raise UnsupportedState(
            "attaching to Accelerate",
            f"there are {accelerator.num_processes} processes, and a rollback of one of them ruins the others",
            'Use one process, or GovernorConfig(mode="observe").',
        )
    if len(accelerator._models) != 1:
        raise UsageError(
            "attaching to Accelerate",
            f"{len(accelerator._models)} models were prepared, expected one",
            "Prepare one model first; for several, build one TolariaGovernor for each.",
        )
    return AcceleratedGovernor(accelerator, config, detector)

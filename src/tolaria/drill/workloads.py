"""What the drill trains. A workload is one class (`digits`, `gpt`) and one row in `catalogue.WORKLOADS`.

Everything a workload hands out depends on its seed, number of steps and device alone, so that every run of a drill
starts from the same weights and sees the same batches in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from tolaria.state.train_state import TrainState


class CannotRun(Exception):
    """The drill cannot run as asked. The message is one line that ends with what to do; exit code 2."""


class Batch(NamedTuple):
    """What the model is given at once; a named tuple, so that `TolariaGovernor.watch` sees its tensors.

    Attributes:
        index: Place in the order of the data, from 0. Micro-batches that one optimizer step accumulates share it.
        inputs: Shape [batch, ...], on the device.
        targets: Shape [batch, ...], int64 (a regression's: float32), on the device.
        weights: Of the single targets in the loss, same shape, float32; None where all count the same.
        part: Which micro-batch of its step, from 0.
    """

    index: int
    inputs: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor | None = None
    part: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Training:
    """What one run trains; every run builds its own.

    Attributes:
        model: In training mode.
        optimizer: Over all its parameters.
        scheduler: Stepped after every optimizer step.
        ema: Average of the weights, moved by the loop: a part of the train state that no framework knows of.
    """

    model: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler
    ema: AveragedModel

    def state(self) -> TrainState:
        """The same train state that a governor of this training sees, for digests of runs without one."""
        state = TrainState(self.model, [self.optimizer], [self.scheduler])
        state.register("ema", self.ema)
        return state


class Workload(Protocol):
    """A model, its data, and where it can be hurt."""

    name: str
    title: str
    chance_loss: float
    """Validation loss of a model that has learnt nothing; above it a run counts as dead."""
    parts: int
    """Micro-batches whose gradients one optimizer step accumulates."""
    clip: float | None
    """Greatest gradient norm; None: gradients are not clipped."""
    batches: tuple[Batch, ...]
    """`parts` per step, in order."""

    def build(self) -> Training:
        """Fresh weights and optimizer, seeding torch's global generators. Equal for each call."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The training loss of one micro-batch, shape [], with a graph."""
        ...

    def validate(self, model: nn.Module) -> float:
        """Mean loss over the validation split, in evaluation mode; leaves the model in training mode."""
        ...

    def nan_batch(self, batch: Batch) -> Batch:
        """The same batch with a NaN in it."""
        ...

    def garbage_batch(self, batch: Batch, generator: torch.Generator) -> Batch:
        """A batch of the same shape, finite, from which only wrong things can be learnt."""
        ...

    def exposed_weight(self, model: nn.Module) -> nn.Parameter:
        """A matrix in which one huge positive entry reaches the loss (normalisation behind it would hide it)."""
        ...

"""Fits of Lightning for the tests of its adapter, and what they are compared by."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from adapters.material import NAN, batches, frozen, scripted
from torch import nn
from torch.utils.data import DataLoader

from tolaria import GovernorConfig, Recovery
from tolaria.judge import non_finite
from tolaria.lightning import TolariaCallback

EXACT = Recovery(cool_lr=1.0)  # whatever lasts, all stays exact
CONFIG = GovernorConfig(cadence=3, probation=2, recovery=EXACT)


def make_module(pl: Any, epoch_schedule: bool = False, manual: bool = False) -> Any:
    """BatchNorm, dropout, AdamW, a schedule per step or epoch; counts its validation batches."""

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.25), nn.Linear(8, 3))
            self.automatic_optimization = not manual
            self.validated: list[int] = []

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            self.log("loss", loss, on_step=True, on_epoch=True, batch_size=len(batch[0]))
            if manual:
                first, second = self.optimizers()
                first.zero_grad()
                second.zero_grad()
                self.manual_backward(loss)
                first.step()
                second.step()
                self.lr_schedulers().step()
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.validated.append(self.trainer.current_epoch)

        def configure_optimizers(self) -> Any:
            if manual:
                first = torch.optim.AdamW(self.net[:2].parameters(), lr=0.05)
                second = torch.optim.SGD(self.net[4].parameters(), lr=0.05, momentum=0.9)
                return [first, second], [torch.optim.lr_scheduler.StepLR(first, 4, gamma=0.9)]
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1 if epoch_schedule else 4, gamma=0.9)
            interval = "epoch" if epoch_schedule else "step"
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": interval}}

    return Module()


def fit(
    pl: Any,
    data: Iterable[Any],
    callbacks: Iterable[Any] = (),
    *,
    module: Callable[[], Any] | None = None,
    ckpt: str | None = None,
    **trainer: Any,
) -> Any:
    """A fit of two epochs on the CPU, with a validation of two batches each. Answers the trainer."""
    torch.manual_seed(3)
    model = make_module(pl) if module is None else module()
    settings = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    made = pl.Trainer(callbacks=list(callbacks), **(settings | trainer))
    loader = data if isinstance(data, DataLoader) or not isinstance(data, list) else DataLoader(data, batch_size=None)
    made.fit(model, loader, DataLoader(batches(2), batch_size=None), ckpt_path=ckpt)
    return made


def state(trainer: Any) -> Any:
    """Every bit of weights, buffers, optimizers and schedulers."""
    return frozen(
        {
            "model": trainer.lightning_module.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
            "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        }
    )


def guard(script: Any = None, config: GovernorConfig = CONFIG) -> TolariaCallback:
    return TolariaCallback(config, detector=non_finite() if script is None else scripted(script))


class Damage:
    """Multiplies the gradients of the first layer, once, before the n-th optimizer step (those of replays count)."""

    def __new__(cls, pl: Any, at: int, factor: float = NAN) -> Any:
        class Callback(pl.Callback):
            trained = 0

            def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
                self.trained += 1
                if self.trained == at:
                    for parameter in pl_module.net[0].parameters():
                        if parameter.grad is not None:
                            parameter.grad.mul_(factor)

        return Callback()


def counters(trainer: Any) -> Any:
    loop = trainer.fit_loop.epoch_loop
    return (
        trainer.global_step,
        trainer.current_epoch,
        loop.batch_progress.state_dict(),
        loop.scheduler_progress.state_dict(),
        loop.automatic_optimization.optim_progress.state_dict(),
        loop._batches_that_stepped,
    )

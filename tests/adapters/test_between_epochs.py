"""Damage done between two epochs, or behind the last one: where Lightning has stepped what nothing will step again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapters.fits import EXACT, fit, guard, make_module, state
from adapters.material import NAN, batches, frozen, is_finite
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from tolaria import GovernorConfig

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(num_workers|checkpoint callback|LeafSpec|isinstance|lr_scheduler.step|val_dataloader|srun).*"
)


def spoiler(pl: Any, at: int) -> Any:
    """Makes a weight NaN at the end of the n-th validation."""

    class Callback(pl.Callback):
        ended = 0

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            self.ended += 1
            if self.ended == at:
                with torch.no_grad():
                    pl_module.net[0].weight[0, 0] = NAN

    return Callback()


def scheduled(pl: Any, kind: str, rate: Any = 0.01) -> Any:
    class Module(type(make_module(pl))):  # type: ignore[misc]
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            self.log("monitored", 1.0)  # no better than the time before

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=rate)
            schedule: Any = StepLR(optimizer, 1, gamma=0.5)
            if kind == "plateau":
                schedule = ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": schedule, "interval": "epoch", "monitor": "monitored"},
            }

    return Module()


@pytest.mark.parametrize(("at", "lost"), [(1, 2), (2, 4)])
@pytest.mark.parametrize("kind", ["step", "plateau"])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_schedule_by_epochs_keeps_step(pl: Any, kind: str, at: int, lost: int, as_tensor: bool) -> None:
    def module() -> Any:
        return scheduled(pl, kind, torch.tensor(0.01) if as_tensor else 0.01)

    def settings(run: Any) -> Any:
        schedule = run.lr_scheduler_configs[0].scheduler.state_dict()
        return frozen([[group["lr"], group["betas"]] for group in run.optimizers[0].param_groups]), frozen(schedule)

    clean = fit(pl, batches(), module=module, max_epochs=3)
    found: list[Any] = []
    callback = guard(config=GovernorConfig(cadence=3, probation=2, recovery=EXACT, on_incident=found.append))
    run = fit(pl, batches(), [callback, spoiler(pl, at)], module=module, max_epochs=3)
    assert settings(run) == settings(clean)
    assert run.fit_loop.epoch_loop.scheduler_progress.state_dict() == (
        clean.fit_loop.epoch_loop.scheduler_progress.state_dict()
    )
    assert is_finite(run.lightning_module.state_dict())
    [incident] = found
    assert incident.reason == "non-finite train state between two epochs"
    assert (incident.step, incident.restored_step) == (20 * at, 20 * at - lost)
    assert incident.batches_skipped == lost
    assert run.global_step == clean.global_step - lost


def test_what_the_end_of_the_epoch_has_counted_and_logged_stays(pl: Any) -> None:
    def stopper() -> Any:
        return pl.callbacks.EarlyStopping("monitored", patience=2)

    def run(*callbacks: Any) -> Any:
        return fit(pl, batches(), callbacks, module=lambda: scheduled(pl, "step"), max_epochs=9)

    clean = run(stopper())
    spoilt = run(stopper(), guard(), spoiler(pl, 2))
    assert spoilt.current_epoch == clean.current_epoch == 3
    losses: list[Any] = []

    class Keep(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            self.seen = [] if trainer.fit_loop.epoch_loop.batch_idx == 0 else self.seen

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
            self.seen.append(outputs["loss"].detach())

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            losses.extend(self.seen)

    last = fit(pl, batches(), [Keep(), guard(), spoiler(pl, 1)])
    assert len(losses) == 20
    assert float(last.callback_metrics["loss_epoch"]) == pytest.approx(float(torch.stack(losses).mean()))


def test_a_rollback_after_it_goes_back_to_the_schedule_that_was_kept(pl: Any) -> None:
    class Again(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            if trainer.current_epoch == 1 and not losses:
                losses.append(1)
                pl_module.net[0].weight.grad.fill_(NAN)

    losses: list[int] = []
    undisturbed = fit(pl, batches(), [guard(), spoiler(pl, 1)], module=lambda: scheduled(pl, "step"), max_epochs=3)
    run = fit(pl, batches(), [guard(), spoiler(pl, 1), Again()], module=lambda: scheduled(pl, "step"), max_epochs=3)
    assert losses
    assert state(run) == state(undisturbed)
    assert run.global_step == undisturbed.global_step


@pytest.mark.parametrize("kind", ["step", "plateau"])
def test_damage_behind_the_last_judgement_is_found_at_the_end(pl: Any, kind: str) -> None:
    clean = fit(pl, batches(), module=lambda: scheduled(pl, kind))
    found: list[Any] = []
    callback = guard(config=GovernorConfig(cadence=3, probation=2, recovery=EXACT, on_incident=found.append))
    run = fit(pl, batches(), [callback, spoiler(pl, 2)], module=lambda: scheduled(pl, kind))
    assert is_finite(run.lightning_module.state_dict())
    assert [incident.reason for incident in found] == ["non-finite weights at the end"]
    assert run.global_step == found[0].restored_step < clean.global_step
    assert run.lr_scheduler_configs[0].scheduler.state_dict() == clean.lr_scheduler_configs[0].scheduler.state_dict()
    assert float(run.callback_metrics["monitored"]) == 1.0


def test_observing_leaves_it(pl: Any) -> None:
    run = fit(pl, batches(), [guard(config=GovernorConfig(mode="observe")), spoiler(pl, 2)])
    assert not is_finite(run.lightning_module.state_dict())

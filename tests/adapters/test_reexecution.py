"""`reexecute_every` in the loops of frameworks: their counters go back with the steps that are run again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapters import test_accelerate as accelerated
from adapters import test_transformers as transformed
from adapters.fits import EXACT, counters, fit, guard, make_module, state
from adapters.material import NAN, batches
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from tolaria import Detector, GovernorConfig, Health, Verdict, VitalSigns
from tolaria.transformers import TolariaCallback

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(num_workers|checkpoint callback|LeafSpec|isinstance|lr_scheduler.step|val_dataloader|srun).*"
)

AGAIN = GovernorConfig(cadence=3, probation=2, recovery=EXACT, reexecute_every=1)


def flip(weight: torch.Tensor) -> None:
    """One bit of the mantissa, which no loss will show."""
    with torch.no_grad():
        weight.view(torch.int32)[0, 0] ^= 1 << 12


def flipper(pl: Any, at: int) -> Any:
    """Flips a bit after the n-th batch; those that come again count too."""

    class Callback(pl.Callback):
        trained = 0

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            self.trained += 1
            if self.trained == at:
                flip(pl_module.net[0].weight)

    return Callback()


# ------------------------------------------------------------ Lightning


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"accumulate_grad_batches": 4},
        {"val_check_interval": 10},
        {"max_epochs": 4},
        {"max_epochs": -1, "max_steps": 27},
    ],
    ids=["plain", "accumulate", "validation", "epochs", "max_steps"],
)
def test_no_step_of_a_fit_is_lost(pl: Any, kwargs: dict[str, Any], flipped: bool) -> None:
    at = 12 * kwargs.get("accumulate_grad_batches", 1)
    clean = fit(pl, batches(), **kwargs)
    callback = guard(config=AGAIN)
    run = fit(pl, batches(), [callback, *([flipper(pl, at)] if flipped else [])], **kwargs)
    assert run.global_step == clean.global_step
    assert counters(run) == counters(clean)
    assert state(run) == state(clean)
    assert callback.governor is not None
    assert callback.governor.statistics().reexecutions > 1
    assert callback.rollbacks == int(flipped)


@pytest.mark.parametrize("at", [0, 12])
def test_no_step_is_lost_with_a_schedule_by_epochs(pl: Any, at: int) -> None:
    def module() -> Any:
        return make_module(pl, epoch_schedule=True)

    clean = fit(pl, batches(), module=module)
    run = fit(pl, batches(), [guard(config=AGAIN), *([flipper(pl, at)] if at else [])], module=module)
    assert counters(run) == counters(clean)
    assert state(run) == state(clean)


def test_no_step_is_lost_of_shuffled_data(pl: Any) -> None:
    def loader() -> Any:
        return DataLoader(batches(), batch_size=None, shuffle=True)

    clean = fit(pl, loader())
    run = fit(pl, loader(), [guard(config=AGAIN), flipper(pl, 12)])
    assert counters(run) == counters(clean)
    assert state(run) == state(clean)


def test_a_batch_behind_those_that_were_left_out_is_counted_as_new(pl: Any) -> None:
    """Found while Lightning asks for its next batch, and nothing is left to come again."""

    class Spoil(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch[0] is data[9][0]:
                pl_module.net[1].running_mean.fill_(NAN)

    data = batches()
    clean = fit(pl, batches(dropped=[9]))
    callback = guard(config=GovernorConfig(cadence=1, probation=0, recovery=EXACT))
    run = fit(pl, data, [callback, Spoil()])
    assert state(run) == state(clean)
    assert callback.rollbacks == 4
    assert counters(run)[2]["current"]["completed"] == 20  # those that were dropped stay counted


# ------------------------------------------------------------ Transformers, Accelerate


class Flip(TrainerCallback):
    """Flips a bit once, after that step."""

    def __init__(self, at: int) -> None:
        self.at, self.done = at, False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.at and not self.done:
            self.done = True
            flip(kwargs["model"].net[0].weight)


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("at", [0, 8])
def test_no_step_of_a_trainer_is_lost(accumulate: int, at: int) -> None:
    kwargs: dict[str, Any] = {"gradient_accumulation_steps": accumulate}
    clean = transformed.train(transformed.samples(), **kwargs)
    callback = transformed.guard(config=AGAIN)
    run = transformed.train(transformed.samples(), callback, Flip(at), **kwargs)
    assert transformed.state(run) == transformed.state(clean)
    if not at:  # else the row of step 8 was written before it was found out
        assert transformed.logged(run) == transformed.logged(clean)
    assert transformed.mean_loss(run) == transformed.mean_loss(clean)
    assert callback.governor is not None
    assert callback.governor.statistics().reexecutions > 2
    assert callback.rollbacks == (1 if at else 0)


def twice(step: int, since: int) -> Detector[Any]:
    """That step panics twice: its batches are replayed, then left out."""
    told: list[int] = []

    def update(state: Any, signs: VitalSigns) -> tuple[Any, Verdict]:
        if signs.step != step or len(told) == 2:
            return state, Verdict(Health.HEALTHY, signs.step)
        told.append(step)
        return state, Verdict(Health.PANIC, signs.step, "scripted", signs.step - since)

    return Detector(lambda: None, update)


def test_the_losses_of_undone_steps_are_told_from_those_run_again() -> None:
    def logged(every: int) -> list[Any]:
        config = GovernorConfig(cadence=3, probation=2, recovery=EXACT, reexecute_every=every)
        callback = TolariaCallback(config, twice(11, 5))
        run = transformed.train(transformed.samples(), callback, num_train_epochs=1, logging_steps=11)
        assert callback.rollbacks == 2
        return transformed.logged(run)

    assert logged(1) == logged(0)


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("at", [0, 12])
def test_no_step_of_a_prepared_loop_is_lost(accumulate: int, at: int) -> None:
    clean = accelerated.plain(batches(), accumulate)

    class Run(accelerated.Run):
        def before_step(self) -> None:
            super().before_step()
            if self.accelerator.sync_gradients and self.steps == at:
                flip(self.model[0].weight)

    run = Run(batches(), accumulate, config=AGAIN).train()
    assert run.state == clean
    assert run.governor is not None
    assert run.governor.statistics().reexecutions > 2
    assert run.rollbacks == (1 if at else 0)

"""A suspicion that is open where nobody can wait for later steps is looked at once more, and is no panic."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import test_accelerate as accelerated
from adapters import test_transformers as transformed
from adapters.fits import EXACT, counters, fit, state
from adapters.material import NAN, batches
from transformers import TrainerCallback

from tolaria import Detector, GovernorConfig, Health, Verdict, VitalSigns
from tolaria.judge import non_finite
from tolaria.lightning import TolariaCallback
from tolaria.settlement import is_second_look
from tolaria.transformers import TolariaCallback as TransformersCallback

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(num_workers|checkpoint callback|LeafSpec|isinstance|lr_scheduler.step|val_dataloader|srun).*",
    "ignore:.*Checkpoint directory.*",
)


def doubtful(steps: Collection[int], times: int = 1000) -> Detector[Any]:
    """Judges by `non_finite`; besides, these steps are suspicious, so many times each."""
    inner, told = non_finite(), dict.fromkeys(steps, 0)

    def update(state: Any, signs: VitalSigns) -> tuple[Any, Verdict]:
        state, verdict = inner.update(state, signs)
        if verdict.is_panic or told.get(signs.step, times) >= times:
            return state, verdict
        told[signs.step] += 1
        return state, Verdict(Health.SUSPECT, signs.step, "scripted", signs.step)

    return Detector(inner.init, update)


def config(found: list[Any], cadence: int = 3, probation: int = 5) -> GovernorConfig:
    return GovernorConfig(cadence=cadence, probation=probation, recovery=EXACT, on_incident=found.append)


def spoil(model: Any) -> None:
    with torch.no_grad():
        model.net[0].weight[0, 0] = NAN


# ------------------------------------------------------------ Lightning


class Spoil:
    """Makes a weight NaN once, at the end of the n-th optimizer step; those that are made again count too."""

    def __new__(cls, pl: Any, at: int) -> Any:
        class Callback(pl.Callback):
            made = 0

            def on_train_start(self, trainer: Any, pl_module: Any) -> None:
                trainer.optimizers[0].register_step_post_hook(lambda *_: self.look(pl_module))

            def look(self, module: Any) -> None:
                self.made += 1
                if self.made == at:
                    spoil(module)

        return Callback()


def saver(pl: Any, folder: Path, every: int) -> Any:
    return pl.callbacks.ModelCheckpoint(folder, every_n_train_steps=every, save_top_k=-1)


@pytest.mark.parametrize("times", [1, 1000])
@pytest.mark.parametrize("at", [9, 13, 15, 20])
def test_a_fault_after_a_suspicion_at_a_save_is_transient_all_the_same(
    pl: Any, tmp_path: Path, at: int, times: int
) -> None:
    clean = fit(pl, batches(24), max_epochs=1)
    found: list[Any] = []
    callback = TolariaCallback(config(found), doubtful([10], times))
    run = fit(
        pl,
        batches(24),
        [callback, Spoil(pl, at), saver(pl, tmp_path, 10)],
        max_epochs=1,
        enable_checkpointing=True,
    )
    assert state(run) == state(clean)
    assert counters(run) == counters(clean)
    assert [incident.action for incident in found] == ["replay"] * 2
    assert [incident.attempt for incident in found if not is_second_look(incident)] == [1]
    assert callback.governor is not None
    assert callback.governor.statistics().panics == 1


@pytest.mark.parametrize("cadence", [3, 12])
def test_suspicions_at_saves_cost_no_batch(pl: Any, tmp_path: Path, cadence: int) -> None:
    """With few snapshots a second look at the later save passes the earlier one once more."""
    clean = fit(pl, batches(), max_epochs=1)
    found: list[Any] = []
    callback = TolariaCallback(config(found, cadence), doubtful([5, 10]))
    run = fit(pl, batches(), [callback, saver(pl, tmp_path, 5)], max_epochs=1, enable_checkpointing=True)
    assert state(run) == state(clean)
    assert counters(run) == counters(clean)
    assert [(incident.step, is_second_look(incident)) for incident in found] == [(5, True), (10, True)]
    assert found[0].reason == "scripted, still open at the end"
    assert callback.governor is not None
    assert callback.governor.statistics().panics == 0
    assert callback.governor.statistics().skipped_batches == 0


# ------------------------------------------------------------ Transformers


class SpoilOnce(TrainerCallback):
    def __init__(self, at: int) -> None:
        self.at, self.done = at, False

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.at and not self.done:
            self.done = True
            spoil(kwargs["model"])


@pytest.mark.parametrize("times", [1, 1000])
@pytest.mark.parametrize(("at", "suspicious"), [(15, [10]), (100, [5, 10])])
def test_a_trainer_that_saves_amid_suspicions_drops_nothing(at: int, suspicious: list[int], times: int) -> None:
    kwargs: dict[str, Any] = {"num_train_epochs": 1, "save_strategy": "steps", "save_steps": suspicious[0]}
    clean = transformed.train(transformed.samples(), **kwargs)
    found: list[Any] = []
    callback = TransformersCallback(config(found), doubtful(suspicious, times))
    run = transformed.train(transformed.samples(), callback, SpoilOnce(at), **kwargs)
    assert transformed.state(run) == transformed.state(clean)
    assert [incident.action for incident in found] == ["replay"] * 2
    assert callback.governor is not None
    assert callback.governor.statistics().panics == int(at < 100)


def test_a_trainer_that_is_not_known_drops_nothing_for_a_suspicion() -> None:
    """No batch could come again, so a second look would lose those since the snapshot."""
    clean = transformed.train(transformed.samples())
    found: list[Any] = []
    callback = TransformersCallback(config(found), doubtful([20]))
    run = transformed.train(transformed.samples(), callback, with_trainer=False)
    assert transformed.state(run) == transformed.state(clean)
    assert not found


# ------------------------------------------------------------ Accelerate


@pytest.mark.parametrize("times", [1, 1000])
def test_a_fault_after_a_suspicion_at_the_end_of_an_epoch_is_transient_all_the_same(times: int) -> None:
    clean = accelerated.plain(batches(12))
    found: list[Any] = []

    class Run(accelerated.Run):
        spoiled = False

        def before_step(self) -> None:
            super().before_step()
            if self.governor is not None and self.governor.statistics().steps >= 23 and not self.spoiled:
                self.spoiled = True
                self.model[0].weight.grad[0, 0] = NAN

    run = Run(batches(12), config=config(found), detector=doubtful([12], times)).train()
    assert run.state == clean
    assert [incident.action for incident in found] == ["replay"] * 2
    assert [is_second_look(incident) for incident in found] == [True, False]

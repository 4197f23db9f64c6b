"""`tolaria.accelerate.govern` in real loops, bit for bit against loops that nothing disturbed."""

from __future__ import annotations

import types
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DataLoaderConfiguration
from adapters.material import NAN, batches, frozen, is_finite, recorded, scripted, window
from torch import nn
from torch.utils.data import DataLoader

from tolaria import GovernorConfig, Recovery, UnsupportedState, UsageError
from tolaria.accelerate import AcceleratedGovernor, govern
from tolaria.judge import non_finite

CONFIG = GovernorConfig(cadence=3, probation=2, recovery=Recovery(cool_lr=1.0))  # whatever lasts, all stays exact


class Run:
    """A prepared loop. Without `guarded` it is what Accelerate's documentation shows.

    Args:
        data: Batches, or a loader.
        accumulate: Micro-batches of a step.
        spoil: Optimizer steps (counted with replays, from 1) whose gradients are multiplied, by which factor.
    """

    def __init__(
        self,
        data: Any,
        accumulate: int = 1,
        guarded: bool = True,
        script: Any = None,
        spoil: Any = None,
        config: GovernorConfig = CONFIG,
        detector: Any = None,
        **kwargs: Any,
    ) -> None:
        for shared in (AcceleratorState, GradientState, PartialState):
            shared._reset_state()
        torch.manual_seed(3)
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate, **kwargs)
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.25), nn.Linear(8, 3))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4, gamma=0.9)
        loader = data if isinstance(data, DataLoader) else DataLoader(data, batch_size=None)
        prepared = self.accelerator.prepare(model, optimizer, loader, scheduler)
        self.model, self.optimizer, self.loader, self.scheduler = prepared
        self.governor: AcceleratedGovernor | None = None
        self.steps, self.spoil = 0, spoil or {}
        if guarded:
            detector = detector or (non_finite() if script is None else scripted(script))
            self.governor = govern(self.accelerator, config=config, detector=detector)

    def train(self, epochs: int = 2) -> Run:
        for _ in range(epochs):
            governor = self.governor
            for x, y in self.loader if governor is None else governor.watch(self.loader):
                with self.accelerator.accumulate(self.model):
                    loss = nn.functional.cross_entropy(self.model(x), y)
                    self.accelerator.backward(loss)
                    self.before_step()
                    self.optimizer.step()
                    self.scheduler.step()
                    self.optimizer.zero_grad()
                if governor is not None:
                    governor.follow(loss)
        return self

    def before_step(self) -> None:
        if self.accelerator.sync_gradients:
            self.steps += 1
            for parameter in self.model[0].parameters():
                parameter.grad.mul_(self.spoil.get(self.steps, 1.0))

    @property
    def state(self) -> Any:
        return frozen(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.scheduler.state_dict(),
            }
        )

    @property
    def rollbacks(self) -> int:
        assert self.governor is not None
        return self.governor.rollbacks


def plain(data: Any, accumulate: int = 1, **kwargs: Any) -> Any:
    return Run(data, accumulate, guarded=False, **kwargs).train().state


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("bad", [7, 19])
def test_a_bad_batch_is_left_out_as_if_the_data_had_never_held_it(accumulate: int, bad: int) -> None:
    clean = plain(batches(dropped=window(bad, accumulate)), accumulate)
    run = Run(batches(bad=[bad]), accumulate).train()
    assert run.state == clean
    assert run.rollbacks == 4  # in each epoch: replayed, then skipped


@pytest.mark.parametrize("bad", [5, 9])
def test_an_epoch_that_ends_in_a_short_window(bad: int) -> None:
    dropped: Collection[int] = [8, 9] if bad > 7 else window(bad, 4)
    clean = plain(batches(10, dropped=dropped), 4)
    assert Run(batches(10, bad=[bad]), 4).train().state == clean


def test_a_replay_of_the_former_epoch_keeps_its_windows() -> None:
    """The first batch of an epoch drew the seed of a shuffle, so random state is new; the number of steps is not."""
    clean, run = Run(batches(10, dropped=range(4)), 4, guarded=False).train(), Run(batches(10, bad=[1]), 4).train()
    assert run.scheduler.scheduler.last_epoch == clean.scheduler.scheduler.last_epoch == 4
    assert is_finite(run.model.state_dict())


def test_without_the_governor_the_same_data_ruin_the_run() -> None:
    run = Run(batches(bad=[7]), guarded=False).train()
    assert not is_finite(run.model.state_dict())


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("at", [1, 10])
def test_transient_damage_leaves_no_trace(accumulate: int, at: int) -> None:
    clean = plain(batches(), accumulate)
    run = Run(batches(), accumulate, spoil={at: NAN}).train()
    assert run.state == clean
    assert run.rollbacks == 1


@pytest.mark.parametrize(("damaged", "noticed"), [(17, 20), (19, 22), (38, 40)])
def test_finite_damage_noticed_later_leaves_no_trace(damaged: int, noticed: int) -> None:
    """Also at the last batch of an epoch (20) and of the run (40), and across the start of an epoch (22)."""
    clean = plain(batches())
    run = Run(batches(), script={noticed: ("panic", noticed - damaged)}, spoil={damaged: 50.0}).train()
    assert run.state == clean
    assert run.rollbacks == 1


def test_unnoticed_the_same_damage_changes_the_run() -> None:
    assert Run(batches(), spoil={17: 50.0}).train().state != plain(batches())


def test_shuffled_data_are_replayed_in_the_same_order() -> None:
    def loader() -> Any:
        return DataLoader(batches(), batch_size=None, shuffle=True)

    clean = plain(loader())
    run = Run(loader(), spoil={2: NAN, 22: NAN}).train()
    assert run.state == clean
    assert run.rollbacks == 2


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata calls it
def test_stateful_loaders_and_bf16() -> None:
    def settings() -> Any:
        return {
            "mixed_precision": "bf16",
            "dataloader_config": DataLoaderConfiguration(use_stateful_dataloader=True),
        }

    clean = plain(batches(dropped=[19]), **settings())
    assert Run(batches(bad=[19]), **settings()).train().state == clean


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_loss_is_judged_as_it_was_handed_over(accumulate: int) -> None:
    seen: list[Any] = []
    run = Run(batches(), accumulate, detector=recorded(seen)).train()
    assert run.rollbacks == 0
    assert 0.8 < seen[0].loss < 1.6
    assert seen[0].grad_norm > 0


def test_the_gradient_norm_is_judged() -> None:
    seen: list[Any] = []
    config = GovernorConfig(cadence=3, probation=2, on_incident=lambda incident: seen.append(incident.signs))
    Run(batches(), spoil={5: NAN}, config=config).train()
    assert seen[0]["nonfinite_gradients"] > 0


def test_it_is_saved_with_the_rest(tmp_path: Path) -> None:
    run = Run(batches(bad=[7]))
    run.accelerator.register_for_checkpointing(run.governor)
    run.train(1)
    run.accelerator.save_state(str(tmp_path))
    whole = run.train(1).state
    run.governor.close()  # type: ignore[union-attr]  # random state belongs to one governor only
    again = Run(batches(bad=[7]))
    again.accelerator.register_for_checkpointing(again.governor)
    again.accelerator.load_state(str(tmp_path))
    assert again.train(1).state == whole
    assert again.rollbacks == 4  # two of them before the checkpoint


def test_it_has_its_governor_by_the_name_that_all_adapters_use() -> None:
    run = Run(batches())
    assert run.governor is not None
    assert run.governor.governor is run.governor
    run.governor.close()


def test_closed_it_leaves_no_trace() -> None:
    run = Run(batches()).train()
    assert run.governor is not None
    run.governor.close()
    assert "forward" not in vars(run.model)
    assert not run.optimizer.optimizer._optimizer_step_pre_hooks


def test_several_processes_and_several_models_are_refused() -> None:
    with pytest.raises(UnsupportedState, match="2 processes"):
        govern(types.SimpleNamespace(num_processes=2))
    with pytest.raises(UsageError, match="0 models"):
        govern(types.SimpleNamespace(num_processes=1, _models=[]))

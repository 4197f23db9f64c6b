"""The callback of Lightning beside other callbacks, settings and schedules that change the loop themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapters.fits import Damage, counters, fit, guard, make_module, state
from adapters.material import batches, is_finite
from torch import nn

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(num_workers|log_every_n_steps|Checkpoint directory|not resumable|LeafSpec|isinstance|Swapping).*",
    "ignore:.*(lr_scheduler.step|val_dataloader|Be aware|SWA).*",
)


# ------------------------------------------------------------ a fit that resumes amid an epoch


class Stateful:
    """A loader that goes on where it was saved."""

    def __init__(self, data: list[Any]) -> None:
        self.data, self.at, self.resumed = data, 0, False

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Any:
        self.at, self.resumed = self.at if self.resumed else 0, False
        while self.at < len(self.data):
            self.at += 1
            yield self.data[self.at - 1]

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.at, self.resumed = saved["at"], True


def resumed(pl: Any, folder: Path, data: list[Any], *guards: Any, accumulate: int) -> Any:
    """Two epochs, of which the first was ended after eight batches of twenty; the rest comes from its checkpoint."""
    saver = pl.callbacks.ModelCheckpoint(folder, every_n_train_steps=8 // accumulate, save_top_k=-1)
    settings = {"accumulate_grad_batches": accumulate, "enable_checkpointing": True}
    fit(pl, Stateful(data), [saver], max_steps=8 // accumulate, **settings)
    (path,) = folder.glob("*.ckpt")
    return fit(pl, Stateful(data), guards, ckpt=str(path), **settings)


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("bad", [9, 17])
def test_a_bad_batch_after_a_resume_amid_an_epoch(pl: Any, tmp_path: Path, accumulate: int, bad: int) -> None:
    first = bad - bad % accumulate
    dropped = range(first, first + accumulate)
    clean = resumed(pl, tmp_path / "clean", batches(dropped=dropped), accumulate=accumulate)
    callback = guard()
    run = resumed(pl, tmp_path / "run", batches(bad=[bad]), callback, accumulate=accumulate)
    assert state(run) == state(clean)
    assert run.global_step == clean.global_step == 2 * (20 // accumulate) - 2
    assert callback.rollbacks == 4


@pytest.mark.parametrize("at", [1, 12])
def test_transient_damage_after_a_resume_amid_an_epoch(pl: Any, tmp_path: Path, at: int) -> None:
    clean = resumed(pl, tmp_path / "clean", batches(), accumulate=1)
    run = resumed(pl, tmp_path / "run", batches(), guard(), Damage(pl, at), accumulate=1)
    bare = resumed(pl, tmp_path / "bare", batches(), Damage(pl, at), accumulate=1)
    assert state(run) == state(clean)
    assert counters(run) == counters(clean)
    assert not is_finite(bare.lightning_module.state_dict())


# ------------------------------------------------------------ clipping


@pytest.mark.parametrize("by", ["value", "norm"])
def test_gradients_that_were_taken_away_are_not_clipped(pl: Any, by: str) -> None:
    """Torch cannot clip none at all by value."""
    settings = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": by}
    clean = fit(pl, batches(dropped=[7]), **settings)
    run = fit(pl, batches(bad=[7]), [guard()], **settings)
    assert state(run) == state(clean)
    assert run.gradient_clip_val == 0.01
    assert state(run) != state(fit(pl, batches(dropped=[7])))


# ------------------------------------------------------------ schedules and callbacks with a life of their own


def following(pl: Any, frequency: int) -> Any:
    """The schedule follows the loss of each step."""

    class Module(type(make_module(pl))):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
            each = {"scheduler": plateau, "monitor": "loss_step", "interval": "step", "frequency": frequency}
            return {"optimizer": optimizer, "lr_scheduler": each}

    return Module


@pytest.mark.parametrize("bad", [0, 7, 19])
def test_a_schedule_that_follows_the_loss_of_each_step(pl: Any, bad: int) -> None:
    module = following(pl, 1)
    clean = fit(pl, batches(dropped=[bad]), module=module)
    run = fit(pl, batches(bad=[bad]), [guard()], module=module)
    assert state(run) == state(clean)


@pytest.mark.parametrize("at", [3, 6, 20])
def test_a_schedule_that_follows_every_third_loss(pl: Any, at: int) -> None:
    module = following(pl, 3)
    clean = fit(pl, batches(), module=module)
    run = fit(pl, batches(), [guard(), Damage(pl, at)], module=module)
    assert state(run) == state(clean)
    assert counters(run) == counters(clean)
    assert "update_lr_schedulers" not in vars(run.fit_loop.epoch_loop)


def averaging(pl: Any) -> Any:
    return pl.callbacks.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1, annealing_epochs=2)


@pytest.mark.parametrize("bad", [7, 19])
def test_statistics_of_an_average_are_gathered_without_the_bad_batch(pl: Any, bad: int) -> None:
    """The pass at the end that only gathers statistics is one window: it would be dropped as a whole."""
    clean = fit(pl, batches(dropped=[bad]), [averaging(pl)], max_epochs=3)
    run = fit(pl, batches(bad=[bad]), [averaging(pl), guard()], max_epochs=3)
    bare = fit(pl, batches(bad=[bad]), [averaging(pl)], max_epochs=3)
    assert state(run) == state(clean)
    assert int(run.lightning_module.net[1].num_batches_tracked) == 19
    assert not is_finite(bare.lightning_module.state_dict())


@pytest.mark.parametrize("at", [25, 40, 60])
def test_a_schedule_that_was_exchanged_during_the_fit(pl: Any, at: int) -> None:
    clean = fit(pl, batches(), [averaging(pl)], max_epochs=3)
    run = fit(pl, batches(), [averaging(pl), guard(), Damage(pl, at)], max_epochs=3)
    assert state(run) == state(clean)
    assert run.lr_scheduler_configs[0].scheduler.__class__.__name__ == "SWALR"


def test_early_stopping_counts_a_validation_once(pl: Any) -> None:
    """A replay passes the validation at five once more."""

    class Module(type(make_module(pl))):  # type: ignore[misc]
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("validated", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def run(*callbacks: Any) -> Any:
        stopper = pl.callbacks.EarlyStopping("validated", patience=1)
        return fit(pl, batches(), [stopper, *callbacks], module=Module, val_check_interval=5, max_epochs=6)

    clean = run()
    guarded = run(guard(), Damage(pl, 6))
    assert guarded.global_step == clean.global_step < 20
    assert state(guarded) == state(clean)

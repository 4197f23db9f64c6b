"""`tolaria.lightning.TolariaCallback` in real fits, bit for bit against fits that nothing disturbed."""

from __future__ import annotations

import csv
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics
from adapters.fits import CONFIG, EXACT, Damage, counters, fit, guard, make_module, state
from adapters.material import NAN, batches, frozen, is_finite, recorded, window
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from tolaria import GovernorConfig, Recovery, RetryBudgetExceeded, UnsupportedState
from tolaria.lightning import TolariaCallback

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(num_workers|log_every_n_steps|enable_model_summary|Checkpoint directory|srun).*",
    "ignore:.*(checkpoint callback|LeafSpec|isinstance|lr_scheduler.step|val_dataloader|Be aware).*",
)


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def each_package(request: pytest.FixtureRequest) -> Any:
    return importlib.import_module(request.param)


# ------------------------------------------------------------ skip


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("bad", [0, 7, 19])
def test_a_bad_batch_is_left_out_as_if_the_data_had_never_held_it(pl: Any, accumulate: int, bad: int) -> None:
    clean = fit(pl, batches(dropped=window(bad, accumulate)), accumulate_grad_batches=accumulate)
    callback = guard()
    run = fit(pl, batches(bad=[bad]), [callback], accumulate_grad_batches=accumulate)
    assert state(run) == state(clean)
    assert run.global_step == clean.global_step
    assert run.lightning_module.validated == clean.lightning_module.validated == [0, 0, 1, 1]
    assert frozen(run.callback_metrics["loss_epoch"]) == frozen(clean.callback_metrics["loss_epoch"])
    assert callback.rollbacks == 4  # in each epoch: replayed, then skipped


def test_both_packages_take_the_callback(each_package: Any) -> None:
    clean = fit(each_package, batches(dropped=[7]))
    callback = guard()
    run = fit(each_package, batches(bad=[7]), [callback])
    assert state(run) == state(clean)
    assert callback.rollbacks == 4


@pytest.mark.parametrize("accumulate", [1, 4])
def test_without_the_callback_the_same_data_ruin_the_run(pl: Any, accumulate: int) -> None:
    run = fit(pl, batches(bad=[7]), accumulate_grad_batches=accumulate)
    assert not is_finite(run.lightning_module.state_dict())
    assert not is_finite(dict(run.callback_metrics))


@pytest.mark.parametrize("bad", [1, 8, 9])
def test_an_epoch_that_ends_in_a_short_window(pl: Any, bad: int) -> None:
    dropped = [8, 9] if bad > 7 else range(4)
    clean = fit(pl, batches(10, dropped=dropped), accumulate_grad_batches=4)
    run = fit(pl, batches(10, bad=[bad]), [guard()], accumulate_grad_batches=4)
    assert state(run) == state(clean)
    assert run.global_step == clean.global_step
    assert run.lightning_module.validated == [0, 0, 1, 1]
    assert run.val_check_batch == 10


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("bad", [7, 19])
def test_a_schedule_by_epochs_keeps_step(pl: Any, bad: int, by_hand: bool) -> None:
    """With a snapshot by hand before the last batch no other batch is left to end the epoch."""

    def module() -> Any:
        return make_module(pl, epoch_schedule=True)

    class Snap(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if by_hand and batch_idx == 19:
                callback.governor.snapshot(grads="drop")  # type: ignore[union-attr]

    clean = fit(pl, batches(dropped=[bad]), module=module)
    callback = guard()
    run = fit(pl, batches(bad=[bad]), [callback, Snap()], module=module)
    assert state(run) == state(clean)
    assert callback.rollbacks == 4


@pytest.mark.parametrize(("at", "validations"), [(14, 5), (10, 4), (20, 4)])
def test_validation_within_an_epoch_comes_again_only_with_its_batch(pl: Any, at: int, validations: int) -> None:
    """A replay from 9 passes the validation at 10 once more; one at the end of the epoch was not there yet."""
    clean = fit(pl, batches(), val_check_interval=10)
    run = fit(pl, batches(), [guard(), Damage(pl, at)], val_check_interval=10)
    assert state(run) == state(clean)
    assert len(clean.lightning_module.validated) == 2 * 4
    assert len(run.lightning_module.validated) == 2 * validations


# ------------------------------------------------------------ replay


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("at", [1, 5, 10])
def test_transient_damage_leaves_no_trace(pl: Any, accumulate: int, at: int) -> None:
    clean = fit(pl, batches(), accumulate_grad_batches=accumulate)
    callback = guard()
    run = fit(pl, batches(), [callback, Damage(pl, at)], accumulate_grad_batches=accumulate)
    assert state(run) == state(clean)
    assert counters(run) == counters(clean)
    assert callback.rollbacks == 1


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_panic_amid_a_replay(pl: Any, accumulate: int) -> None:
    """Some of its batches are still to come again, and are not counted: step 9 sends back to 6, and then step 8."""
    dropped = window(7 * accumulate, accumulate)
    clean = fit(pl, batches(dropped=dropped), max_epochs=1, accumulate_grad_batches=accumulate)
    callback = guard({9: ("panic", 2), 11: ("panic", 0)})
    run = fit(pl, batches(), [callback], max_epochs=1, accumulate_grad_batches=accumulate)
    assert callback.rollbacks == 2
    assert state(run) == state(clean)
    assert run.fit_loop.epoch_loop.batch_progress.current.completed == 20  # those that were dropped stay counted
    assert run.lightning_module.validated == [0, 0]


def test_without_the_callback_transient_damage_stays(pl: Any) -> None:
    assert not is_finite(fit(pl, batches(), [Damage(pl, 5)]).lightning_module.state_dict())


@pytest.mark.parametrize(("damaged", "noticed"), [(17, 20), (20, 20), (38, 40)])
def test_finite_damage_noticed_later_leaves_no_trace(pl: Any, damaged: int, noticed: int) -> None:
    """Also at the last batch of an epoch (20) and of the run (40)."""
    clean = fit(pl, batches())
    callback = guard({noticed: ("panic", noticed - damaged)})
    run = fit(pl, batches(), [callback, Damage(pl, damaged, 50.0)])
    assert state(run) == state(clean)
    assert counters(run) == counters(clean)
    assert run.lightning_module.validated == [0, 0, 1, 1]
    assert callback.rollbacks == 1


def test_unnoticed_the_same_damage_changes_the_run(pl: Any) -> None:
    assert state(fit(pl, batches(), [guard(), Damage(pl, 17, 50.0)])) != state(fit(pl, batches()))


def test_suspicion_at_the_end_of_an_epoch_is_replayed(pl: Any) -> None:
    clean = fit(pl, batches())
    callback = guard({19: ("suspect", 0), 20: ("suspect", 1)})
    run = fit(pl, batches(), [callback, Damage(pl, 19, 50.0)])
    assert state(run) == state(clean)
    assert callback.rollbacks == 1


def test_no_rollback_crosses_the_start_of_an_epoch(pl: Any) -> None:
    found: list[Any] = []
    config = GovernorConfig(cadence=3, probation=2, recovery=EXACT, on_incident=found.append)
    run = fit(pl, batches(), [guard({22: ("panic", 6)}, config)])
    assert [(incident.step, incident.restored_step) for incident in found] == [(22, 20)]
    assert run.lightning_module.validated == [0, 0, 1, 1]
    assert counters(run) == counters(fit(pl, batches()))


@pytest.mark.parametrize("at", [9, 30])
def test_buffers_that_are_not_finite_show_when_the_snapshot_is_taken(pl: Any, at: int) -> None:
    """Found while Lightning asks for its next batch, after the batch that did it has ended."""

    class Spoil(pl.Callback):
        trained = 0

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            self.trained += 1
            if self.trained == at:
                pl_module.net[1].running_mean.fill_(NAN)

    clean = fit(pl, batches())
    callback = guard()
    run = fit(pl, batches(), [callback, Spoil()])
    assert state(run) == state(clean)
    assert counters(run) == counters(clean)
    assert callback.rollbacks == 1


def test_a_run_that_ends_at_a_number_of_steps_is_judged_to_its_end(pl: Any) -> None:
    clean = fit(pl, batches(), max_epochs=-1, max_steps=27)
    callback = guard()
    run = fit(pl, batches(), [callback, Damage(pl, 27)], max_epochs=-1, max_steps=27)
    assert state(run) == state(clean)
    assert callback.rollbacks == 1


# ------------------------------------------------------------ logs, checkpoints, resume


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(next(path.rglob("metrics.csv")).read_text().splitlines()))


@pytest.mark.parametrize("accumulate", [1, 4])
def test_what_was_logged_holds_no_damage(pl: Any, tmp_path: Path, accumulate: int) -> None:
    logger = pl.loggers.CSVLogger(tmp_path / "guarded")
    kwargs = {"log_every_n_steps": 1, "accumulate_grad_batches": accumulate}
    run = fit(pl, batches(bad=[7]), [guard()], logger=logger, **kwargs)
    plain = pl.loggers.CSVLogger(tmp_path / "plain")
    fit(pl, batches(dropped=window(7, accumulate)), logger=plain, **kwargs)
    guarded, clean = rows(tmp_path / "guarded"), rows(tmp_path / "plain")
    assert "nan" not in {value for row in guarded for value in row.values()}
    assert [row["loss_epoch"] for row in guarded if row["loss_epoch"]] == [
        row["loss_epoch"] for row in clean if row["loss_epoch"]
    ]
    steps = [{row["step"]: row["loss_step"] for row in each if row["loss_step"]} for each in (guarded, clean)]
    assert steps[0] == steps[1]
    assert guarded[-1]["tolaria/rollbacks"] or any(row["tolaria/rollbacks"] == "4.0" for row in guarded)
    assert float(run.progress_bar_metrics["tolaria/rollbacks"]) == 4.0


def test_metrics_of_the_module_hold_no_damage(pl: Any) -> None:
    """Their states are neither parameters nor buffers."""

    class Module(type(make_module(pl))):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.mean = torchmetrics.MeanMetric(nan_strategy="disable")

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.mean(loss.detach())
            self.log("mean", self.mean, on_step=False, on_epoch=True)
            return loss

    clean = fit(pl, batches(dropped=[7]), module=Module)
    run = fit(pl, batches(bad=[7]), [guard()], module=Module)
    bare = fit(pl, batches(bad=[7]), module=Module)
    assert frozen(run.callback_metrics["mean"]) == frozen(clean.callback_metrics["mean"])
    assert not is_finite(bare.callback_metrics["mean"])


def test_what_was_logged_without_the_callback_is_damaged(pl: Any, tmp_path: Path) -> None:
    fit(pl, batches(bad=[7]), logger=pl.loggers.CSVLogger(tmp_path), log_every_n_steps=1)
    assert "nan" in {value for row in rows(tmp_path) for value in row.values()}


def saved(folder: Path) -> list[Any]:
    return [torch.load(path, weights_only=True) for path in sorted(folder.glob("*.ckpt"))]


@pytest.mark.parametrize("first", [True, False])
def test_no_checkpoint_holds_damage(pl: Any, tmp_path: Path, first: bool) -> None:
    saver = pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
    order = [guard(), saver] if first else [saver, guard()]
    fit(pl, batches(bad=[7, 19]), order, enable_checkpointing=True)
    files = saved(tmp_path)
    assert len(files) >= 36
    assert all(is_finite(file["state_dict"]) for file in files)
    assert all(is_finite(file["optimizer_states"]) for file in files)
    assert files[0]["callbacks"]["TolariaCallback"]["statistics"]["steps"] > 0


def test_a_suspicion_is_replayed_before_a_checkpoint_is_written(pl: Any, tmp_path: Path) -> None:
    def savers(name: str) -> Any:
        return pl.callbacks.ModelCheckpoint(tmp_path / name, every_n_train_steps=8, save_top_k=-1)

    fit(pl, batches(), [savers("clean")], enable_checkpointing=True)
    callback = guard({8: ("suspect", 0)})
    fit(pl, batches(), [callback, savers("run"), Damage(pl, 8, 50.0)], enable_checkpointing=True)
    assert callback.rollbacks == 1
    clean, run = saved(tmp_path / "clean"), saved(tmp_path / "run")
    assert len(clean) == len(run) == 5
    assert [frozen(file["state_dict"]) for file in run] == [frozen(file["state_dict"]) for file in clean]


def test_what_a_replay_saves_once_more_is_the_same(pl: Any, tmp_path: Path) -> None:
    """Lightning looks only whether the step is that of its last file, and a rollback takes the step back."""
    saver = pl.callbacks.ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit(pl, batches(), [guard({9: ("panic", 2)}), saver], enable_checkpointing=True, max_epochs=1)
    names = {path.name for path in tmp_path.glob("*.ckpt")}
    again = {"step=6-v1.ckpt", "step=7-v1.ckpt", "step=8-v1.ckpt"}  # restored in step 9, and passed once more
    assert names == {f"step={step}.ckpt" for step in range(1, 21)} | again
    for name in again:
        first, second = (torch.load(tmp_path / each, weights_only=True) for each in (name.replace("-v1", ""), name))
        assert frozen(second["state_dict"]) == frozen(first["state_dict"])
        assert frozen(second["optimizer_states"]) == frozen(first["optimizer_states"])
        assert (
            second["loops"]["fit_loop"]["epoch_loop.batch_progress"]
            == (first["loops"]["fit_loop"]["epoch_loop.batch_progress"])
        )


def test_checkpoints_without_the_callback_hold_damage(pl: Any, tmp_path: Path) -> None:
    saver = pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
    fit(pl, batches(bad=[7]), [saver], enable_checkpointing=True)
    assert not all(is_finite(file["state_dict"]) for file in saved(tmp_path))


def test_a_resumed_fit_goes_on_counting(pl: Any, tmp_path: Path) -> None:
    saver = pl.callbacks.ModelCheckpoint(tmp_path, save_top_k=-1)
    fit(pl, batches(bad=[7]), [guard(), saver], enable_checkpointing=True, max_epochs=1)
    path = str(next(tmp_path.glob("*.ckpt")))
    clean = fit(pl, batches(dropped=[7]), ckpt=path)
    callback = guard()
    run = fit(pl, batches(bad=[7]), [callback], ckpt=path)
    assert state(run) == state(clean)
    assert callback.rollbacks == 4  # two of them before the checkpoint


def test_early_stopping_sees_no_damage(pl: Any) -> None:
    stopper = pl.callbacks.EarlyStopping("loss", check_finite=True, patience=9, check_on_train_epoch_end=True)
    assert fit(pl, batches(bad=[7]), [stopper, guard()]).current_epoch == 2
    stopper = pl.callbacks.EarlyStopping("loss", check_finite=True, patience=9, check_on_train_epoch_end=True)
    assert fit(pl, batches(bad=[7]), [stopper]).current_epoch < 2


# ------------------------------------------------------------ other ways to optimize


@pytest.mark.parametrize("bad", [7, 19])
def test_manual_optimization_with_two_optimizers(pl: Any, bad: int) -> None:
    def module() -> Any:
        return make_module(pl, manual=True)

    clean = fit(pl, batches(dropped=[bad]), module=module)
    callback = guard()
    run = fit(pl, batches(bad=[bad]), [callback], module=module)
    assert state(run) == state(clean)
    assert run.global_step == clean.global_step
    assert callback.rollbacks == 4
    assert not is_finite(fit(pl, batches(bad=[bad]), module=module).lightning_module.state_dict())


@pytest.mark.parametrize("first", [True, False])
def test_averaged_weights_hold_no_damage(pl: Any, first: bool) -> None:
    def average() -> Any:
        return pl.callbacks.EMAWeightAveraging(decay=0.9)

    clean = fit(pl, batches(dropped=[7]), [average()])
    callback = guard()
    run = fit(pl, batches(bad=[7]), [callback, average()] if first else [average(), callback])
    assert frozen(run.lightning_module.state_dict()) == frozen(clean.lightning_module.state_dict())
    assert callback.rollbacks == 4


def test_whoever_looks_at_weights_after_a_batch_sees_them_after_the_rollback(pl: Any) -> None:
    seen: list[bool] = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            seen.append(is_finite(pl_module.state_dict()))

    fit(pl, batches(bad=[7]), [Look(), guard()])  # the governor comes last in the list
    assert all(seen)
    assert len(seen) > 40
    seen.clear()
    fit(pl, batches(bad=[7]), [Look()])
    assert not all(seen)


def test_averaged_weights_without_the_callback_hold_damage(pl: Any) -> None:
    run = fit(pl, batches(bad=[7]), [pl.callbacks.EMAWeightAveraging(decay=0.9)])
    assert not is_finite(run.lightning_module.state_dict())


def half(pl: Any) -> Any:
    plugins = importlib.import_module(f"{pl.__name__}.plugins.precision")
    return plugins.MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", growth_interval=5))


def test_fp16_with_a_scaler(pl: Any) -> None:
    clean = fit(pl, batches(dropped=[7]), plugins=[half(pl)])
    run = fit(pl, batches(bad=[7]), [guard()], plugins=[half(pl)])
    assert state(run) == state(clean)
    assert run.precision_plugin.scaler.state_dict() == clean.precision_plugin.scaler.state_dict()
    bare = fit(pl, batches(bad=[7]), plugins=[half(pl)])
    assert not is_finite(bare.lightning_module.state_dict())  # BatchNorm: the scaler is no protection


def test_bf16(pl: Any) -> None:
    clean = fit(pl, batches(dropped=[7]), precision="bf16-mixed")
    run = fit(pl, batches(bad=[7]), [guard()], precision="bf16-mixed")
    assert state(run) == state(clean)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_loss_is_judged_as_the_module_answers_it(pl: Any, accumulate: int) -> None:
    """Lightning divides it by the number of micro-batches; the first of three classes cost 1.1 each."""
    seen: list[Any] = []
    fit(pl, batches(), [TolariaCallback(CONFIG, recorded(seen))], accumulate_grad_batches=accumulate)
    assert 0.8 < seen[0].loss < 1.6
    assert seen[0].grad_norm > 0


# ------------------------------------------------------------ data


class Stream(IterableDataset[Any]):
    """Of no known length, so that Lightning fetches one batch ahead."""

    def __init__(self, source: list[Any]) -> None:
        self.source = source

    def __iter__(self) -> Iterator[Any]:
        return iter(self.source)


@pytest.mark.parametrize("bad", [0, 7, 18, 19])
def test_data_of_unknown_length(pl: Any, bad: int) -> None:
    clean = fit(pl, DataLoader(Stream(batches(dropped=[bad])), batch_size=None))
    callback = guard()
    run = fit(pl, DataLoader(Stream(batches(bad=[bad])), batch_size=None), [callback])
    assert state(run) == state(clean)
    assert callback.rollbacks == 4
    assert run.lightning_module.validated == [0, 0, 1, 1]


def test_worker_processes_that_stay(pl: Any) -> None:
    def loader(**kwargs: Any) -> Any:
        return DataLoader(batches(**kwargs), batch_size=None, num_workers=2, persistent_workers=True)

    clean = fit(pl, loader(dropped=[19]))
    callback = guard()
    run = fit(pl, loader(bad=[19]), [callback])
    assert state(run) == state(clean)
    assert callback.rollbacks == 4


def test_shuffled_data_are_replayed_in_the_same_order(pl: Any) -> None:
    def loader() -> Any:
        return DataLoader(batches(), batch_size=None, shuffle=True)

    clean = fit(pl, loader())
    callback = guard()
    run = fit(pl, loader(), [callback, Damage(pl, 1), Damage(pl, 21)])
    assert state(run) == state(clean)
    assert callback.rollbacks == 2


def test_loaders_that_are_made_anew_each_epoch(pl: Any) -> None:
    clean = fit(pl, batches(dropped=[7]), reload_dataloaders_every_n_epochs=1)
    run = fit(pl, batches(bad=[7]), [guard()], reload_dataloaders_every_n_epochs=1)
    assert state(run) == state(clean)


# ------------------------------------------------------------ limits


def test_panics_without_end_end_the_fit_at_the_last_good_state(pl: Any) -> None:
    callback = guard(
        {n: ("panic", 0) for n in range(8, 100)},
        GovernorConfig(cadence=3, probation=2, recovery=Recovery(max_retries=3)),
    )
    torch.manual_seed(3)
    module = make_module(pl)
    with pytest.raises(RetryBudgetExceeded):
        fit(pl, batches(), [callback], module=lambda: module)
    assert is_finite(module.state_dict())
    assert "forward" not in vars(module)  # detached
    assert callback.governor is not None


def test_a_fit_leaves_no_trace_on_the_trainer(pl: Any) -> None:
    run = fit(pl, batches(), [guard()])
    assert "forward" not in vars(run.lightning_module)
    assert all("step" not in vars(optimizer) or "Governed" not in repr(optimizer.step) for optimizer in run.optimizers)
    assert run.fit_loop._data_fetcher is None or type(run.fit_loop._data_fetcher).__module__.startswith("lightning")


def test_several_ranks_are_refused(pl: Any) -> None:
    class Trainer:
        world_size = 2

    with pytest.raises(UnsupportedState, match="2 processes"):
        guard().on_train_start(Trainer(), make_module(pl))


def test_batches_fetched_inside_of_the_step_are_refused(pl: Any) -> None:
    class Module(type(make_module(pl))):  # type: ignore[misc]
        def training_step(self, dataloader_iter: Any) -> Any:
            batch, _, _ = next(dataloader_iter)
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

    with pytest.warns(UserWarning, match="dataloader_iter"), pytest.raises(UnsupportedState, match="dataloader_iter"):
        fit(pl, batches(), [guard()], module=Module)


def test_disabled_it_is_not_there(pl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOLARIA_DISABLE", "1")
    run = fit(pl, batches(bad=[7]), [guard()])
    assert frozen(run.lightning_module.state_dict()) == frozen(fit(pl, batches(bad=[7])).lightning_module.state_dict())


def test_observing_changes_nothing(pl: Any) -> None:
    callback = guard(config=GovernorConfig(mode="observe"))
    run = fit(pl, batches(bad=[7]), [callback])
    assert frozen(run.lightning_module.state_dict()) == frozen(fit(pl, batches(bad=[7])).lightning_module.state_dict())
    assert callback.governor is not None
    assert callback.governor.statistics().panics > 0

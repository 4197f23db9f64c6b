"""`tolaria.transformers.TolariaCallback` in real trainings, bit for bit against those that nothing disturbed."""

from __future__ import annotations

import json
import types
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters.material import NAN, batches, frozen, is_finite, recorded, scripted, window
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from tolaria import GovernorConfig, Recovery, RetryBudgetExceeded, UnsupportedState, UsageError
from tolaria.judge import non_finite
from tolaria.transformers import TolariaCallback

EXACT = Recovery(cool_lr=1.0)  # whatever lasts, all stays exact
CONFIG = GovernorConfig(cadence=3, probation=2, recovery=EXACT)


class Model(nn.Module):
    """BatchNorm and dropout; answers as the models of the library do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.25), nn.Linear(8, 3))

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        logits = self.net(x)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def samples(count: int = 20, bad: Collection[int] = (), dropped: Collection[int] = ()) -> list[Any]:
    """The batches of `material`, one sample an entry: 16 make a batch."""
    return [{"x": x, "labels": y} for xs, ys in batches(count, bad, dropped) for x, y in zip(xs, ys, strict=True)]


def train(
    data: Any,
    callback: TolariaCallback | None = None,
    *others: Any,
    with_trainer: bool = True,
    resume: str | None = None,
    model: nn.Module | None = None,
    **kwargs: Any,
) -> Trainer:
    torch.manual_seed(3)
    settings = {
        "output_dir": "out",
        "num_train_epochs": 2,
        "per_device_train_batch_size": 16,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "learning_rate": 0.05,
        "train_sampling_strategy": "sequential",
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 30,
        "max_grad_norm": 0.5,
        "dataloader_pin_memory": False,
    }
    trainer = Trainer(
        Model() if model is None else model,
        TrainingArguments(**(settings | kwargs)),
        train_dataset=data,
        eval_dataset=samples(2),
        callbacks=[*([] if callback is None else [callback]), *others],
    )
    if callback is not None and with_trainer:
        callback.set_trainer(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def state(trainer: Trainer) -> Any:
    """Every bit of weights, buffers, optimizer and schedule."""
    assert trainer.model is not None
    assert trainer.lr_scheduler is not None
    return frozen(
        {
            "model": trainer.model.state_dict(),
            "optimizer": trainer.optimizer.state_dict()["state"],
            "schedule": trainer.lr_scheduler.state_dict()["last_epoch"],
        }
    )


def guard(script: Any = None, config: GovernorConfig = CONFIG) -> TolariaCallback:
    return TolariaCallback(config, detector=non_finite() if script is None else scripted(script))


class Damage(TrainerCallback):
    """Spoils the gradients of the first layer once, before the step of the given number."""

    def __init__(self, at: int, factor: float = NAN) -> None:
        self.at, self.factor, self.done = at, factor, False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.at and not self.done:
            self.done = True
            for parameter in kwargs["model"].net[0].parameters():
                parameter.grad.mul_(self.factor)


def losses(trainer: Trainer) -> list[Any]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def mean_loss(trainer: Trainer) -> float:
    """`TrainOutput.training_loss`."""
    return trainer.state.log_history[-1]["train_loss"]


class Enlarge(TrainerCallback):
    """Multiplies the weights by 100 once, in that step."""

    def __init__(self, at: int) -> None:
        self.at, self.done = at, False

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.at and not self.done:
            self.done = True
            with torch.no_grad():
                for parameter in kwargs["model"].parameters():
                    parameter.mul_(100.0)


# ------------------------------------------------------------ skip


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("bad", [7, 19])
def test_a_bad_batch_is_left_out_as_if_the_data_had_never_held_it(accumulate: int, bad: int) -> None:
    clean = train(samples(dropped=window(bad, accumulate)), gradient_accumulation_steps=accumulate)
    callback = guard()
    run = train(samples(bad=[bad]), callback, gradient_accumulation_steps=accumulate)
    assert state(run) == state(clean)
    assert run.state.global_step == 40 // accumulate  # the position in the data, which a resume needs
    assert callback.rollbacks == 4  # in each epoch: replayed, then skipped
    assert losses(run) == losses(clean)


def test_a_short_window_at_the_end_of_an_epoch() -> None:
    clean = train(samples(10, dropped=[8, 9]), gradient_accumulation_steps=4)
    run = train(samples(10, bad=[9]), guard(), gradient_accumulation_steps=4)
    assert state(run) == state(clean)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_without_the_callback_the_same_data_ruin_the_run(accumulate: int) -> None:
    run = train(samples(bad=[7]), gradient_accumulation_steps=accumulate)
    assert run.model is not None
    assert not is_finite(run.model.state_dict())
    assert losses(run)[-1] == 0.0  # what the trainer shows of a dead run


# ------------------------------------------------------------ replay


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("at", [1, 10])
def test_transient_damage_leaves_no_trace(accumulate: int, at: int) -> None:
    kwargs = {"gradient_accumulation_steps": accumulate, "logging_steps": 3}
    clean = train(samples(), **kwargs)
    callback = guard()
    run = train(samples(), callback, Damage(at), **kwargs)
    assert state(run) == state(clean)
    assert callback.rollbacks == 1
    assert logged(run) == logged(clean)


def logged(trainer: Trainer) -> list[Any]:
    names = ("loss", "grad_norm", "learning_rate", "epoch", "step", "eval_loss")
    return [{name: entry[name] for name in names if name in entry} for entry in trainer.state.log_history]


@pytest.mark.parametrize(("damaged", "noticed"), [(17, 20), (19, 22), (38, 40)])
def test_finite_damage_noticed_later_leaves_no_trace(damaged: int, noticed: int) -> None:
    """Also at the last batch of an epoch (20) and of the run (40), and across the start of an epoch (22)."""
    clean = train(samples())
    callback = guard({noticed: ("panic", noticed - damaged)})
    run = train(samples(), callback, Damage(damaged, 50.0))
    assert state(run) == state(clean)
    assert callback.rollbacks == 1
    assert run.state.global_step == 40


def test_unnoticed_the_same_damage_changes_the_run() -> None:
    assert state(train(samples(), guard(), Damage(17, 50.0))) != state(train(samples()))


def test_shuffled_data_are_replayed_in_the_same_order() -> None:
    kwargs = {"train_sampling_strategy": "random"}
    clean = train(samples(), **kwargs)
    callback = guard()
    run = train(samples(), callback, Damage(2), Damage(21), **kwargs)
    assert state(run) == state(clean)
    assert callback.rollbacks == 2


def test_buffers_that_are_not_finite_show_when_the_snapshot_is_taken() -> None:
    """Found while the trainer asks for its next batch: the steps before that one are made again first."""

    class Spoil(TrainerCallback):
        done = False

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 9 and not self.done:
                self.done = True
                kwargs["model"].net[1].running_mean.fill_(NAN)

    clean = train(samples(), eval_strategy="no")
    callback = guard()
    run = train(samples(), callback, Spoil())
    assert state(run) == state(clean)
    assert callback.rollbacks == 1


def with_config() -> Model:
    torch.manual_seed(3)
    model = Model()
    vars(model)["config"] = types.SimpleNamespace(problem_type=None)
    return model


def test_label_smoothing_takes_the_loss_from_the_trainer() -> None:
    clean = train(samples(dropped=[7]), model=with_config(), label_smoothing_factor=0.1)
    run = train(samples(bad=[7]), guard(), model=with_config(), label_smoothing_factor=0.1)
    assert state(run) == state(clean)


def test_bf16() -> None:
    clean = train(samples(dropped=[7]), bf16=True)
    run = train(samples(bad=[7]), guard(), bf16=True)
    assert state(run) == state(clean)


# ------------------------------------------------------------ logs, checkpoints, resume


def test_what_was_logged_holds_no_damage() -> None:
    run = train(samples(bad=[7]), guard(), logging_nan_inf_filter=False)
    assert all(is_finite(entry) for entry in run.state.log_history)
    assert "loss" not in next(entry for entry in run.state.log_history if entry["step"] == 8)  # of the dropped step
    rollbacks = [entry["tolaria/rollbacks"] for entry in run.state.log_history]
    assert (rollbacks[0], rollbacks[-1]) == (0.0, 4.0)


def test_what_was_logged_without_the_callback_is_damaged() -> None:
    run = train(samples(bad=[7]), logging_nan_inf_filter=False)
    assert not all(is_finite(entry) for entry in run.state.log_history)


@pytest.mark.parametrize("bad", [5, 7, 9])
def test_a_dropped_step_counts_as_the_mean_of_its_row(bad: int) -> None:
    """Also where it is the first of the row, or the last."""
    run = train(samples(bad=[bad]), guard(), logging_steps=5)
    clean = train(samples(dropped=[bad]), logging_steps=1)
    assert losses(run)[1] == pytest.approx(sum(losses(clean)[5:9]) / 4, rel=1e-5)


def test_a_step_dropped_behind_the_last_row_counts_as_the_mean_of_those_behind_it() -> None:
    run = train(samples(18, bad=[15]), guard(), num_train_epochs=1, logging_steps=5)
    kept = losses(train(samples(18, dropped=[15]), num_train_epochs=1))
    assert mean_loss(run) == pytest.approx((sum(kept[:15]) + sum(kept[15:]) * 1.5) / 18, rel=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("at", "noticed"), [(9, 12), (3, 12), (9, 9), (14, 20)])
def test_the_mean_loss_of_a_training_holds_no_damage(accumulate: int, at: int, noticed: int) -> None:
    """Rows were written between the damage and its detection: after steps 5, 10 and 15."""
    kwargs = {"logging_steps": 5, "gradient_accumulation_steps": accumulate}
    clean = train(samples(), **kwargs)
    callback = guard({noticed: ("panic", noticed - at)}, GovernorConfig(cadence=2, probation=12, recovery=EXACT))
    run = train(samples(), callback, Enlarge(at), **kwargs)
    assert callback.rollbacks == 1
    assert state(run) == state(clean)
    assert mean_loss(run) == mean_loss(clean)
    assert mean_loss(train(samples(), None, Enlarge(at), **kwargs)) != mean_loss(clean)


def test_the_mean_loss_counts_dropped_steps_as_the_mean_of_their_row() -> None:
    """Step 12 panics twice for what began in step 8: rows were written after steps 5 and 10."""
    script = {12: ("panic", 4), 18: ("panic", 4)}
    run = train(samples(), guard(script), num_train_epochs=1, logging_steps=5)
    kept = losses(train(samples(dropped=range(7, 12)), num_train_epochs=1))
    second, third = kept[5:7], kept[7:10]
    assert losses(run)[2] == pytest.approx(sum(third) / 3, rel=1e-5)
    whole = sum(kept[:5]) + 5 * sum(second) / 2 + 5 * sum(third) / 3 + sum(kept[10:])
    assert mean_loss(run) == pytest.approx(whole / 20, rel=1e-5)


def test_a_loss_that_somebody_else_logs_is_no_row_of_the_trainer() -> None:
    class Logs(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in (7, 8):
                seen.append(state.global_step)
                trainers[0].log({"loss": 7.0})

    class Known(TolariaCallback):
        def set_trainer(self, trainer: Any) -> Any:
            trainers.append(trainer)
            return super().set_trainer(trainer)

    trainers: list[Any] = []
    seen: list[int] = []
    clean = train(samples(), logging_steps=5)
    callback = Known(GovernorConfig(cadence=2, probation=2, recovery=EXACT), scripted({9: ("panic", 2)}))
    run = train(samples(), callback, Logs(), Enlarge(7), logging_steps=5)
    assert seen
    rows = [entry for entry in logged(run) if entry.get("loss") != 7.0]
    assert rows == logged(clean)
    assert mean_loss(run) == mean_loss(clean)


def test_no_checkpoint_holds_damage(tmp_path: Path) -> None:
    run = train(samples(bad=[7, 19]), guard(), save_strategy="steps", save_steps=1)
    files = [load_file(path) for path in tmp_path.glob("out/*/model.safetensors")]
    assert len(files) == 40
    assert all(map(is_finite, files))
    saved = json.loads((tmp_path / "out/checkpoint-40/trainer_state.json").read_text())
    assert saved["stateful_callbacks"]["TolariaCallback"]["attributes"]["governed"]["statistics"]["rollbacks"] == 8
    assert is_finite(run.model.state_dict())  # type: ignore[union-attr]


def test_checkpoints_without_the_callback_hold_damage(tmp_path: Path) -> None:
    train(samples(bad=[7]), save_strategy="steps", save_steps=10)
    assert not all(is_finite(load_file(path)) for path in tmp_path.glob("out/*/model.safetensors"))


def test_nothing_is_saved_while_a_suspicion_is_open(tmp_path: Path) -> None:
    """Step 8 is judged with the replay once more, and stays suspicious; so are the steps after it."""
    callback = guard({count: ("suspect", 0) for count in range(8, 20)})
    train(samples(), callback, save_strategy="steps", save_steps=4)
    names = {path.name for path in tmp_path.glob("out/*")}
    assert "checkpoint-4" in names
    assert "checkpoint-8" not in names
    assert "checkpoint-40" in names


def test_a_resumed_training_goes_on_counting(tmp_path: Path) -> None:
    kwargs = {"save_strategy": "steps", "save_steps": 13}
    train(samples(bad=[7]), guard(), **kwargs)
    path = str(tmp_path / "out/checkpoint-13")
    callback = guard()
    run = train(samples(bad=[7]), callback, resume=path, **kwargs)
    whole = train(samples(bad=[7]), guard(), **kwargs)
    assert state(run) == state(whole)
    assert callback.rollbacks == 4  # two of them before the checkpoint


@pytest.mark.parametrize("at", [14, 15, 20])
def test_the_first_steps_after_a_resume_are_replayed_with_their_draws(tmp_path: Path, at: int) -> None:
    """Random state is that of the checkpoint only after the first batches were fetched."""
    kwargs = {"save_strategy": "steps", "save_steps": 13}
    whole = train(samples(), guard(), **kwargs)
    run = train(samples(), guard(), Damage(at), resume=str(tmp_path / "out/checkpoint-13"), **kwargs)
    assert state(run) == state(whole)


@pytest.mark.parametrize(("bad", "draws", "exact"), [(13, True, False), (13, False, True), (14, True, True)])
def test_the_first_step_after_a_resume_is_dropped_exactly_where_the_model_draws_nothing(
    tmp_path: Path, bad: int, draws: bool, exact: bool
) -> None:
    """Its fetch drew the seed of the loader, so random state is re-keyed."""

    def model() -> Model:
        torch.manual_seed(3)
        made = Model()
        if not draws:
            made.net[3] = nn.Identity()
        return made

    kwargs: dict[str, Any] = {"save_strategy": "steps", "save_steps": 13, "num_train_epochs": 1}
    whole = train(samples(bad=[bad]), guard(), model=model(), **kwargs)
    path = str(tmp_path / "out/checkpoint-13")
    run = train(samples(bad=[bad]), guard(), model=model(), resume=path, **kwargs)
    assert (state(run) == state(whole)) == exact


def test_it_comes_in_where_a_training_without_it_was_saved(tmp_path: Path) -> None:
    """The trainer fails on the next save of a callback that its checkpoint does not know."""
    kwargs = {"save_strategy": "steps", "save_steps": 13}
    clean = train(samples(dropped=[19]), save_strategy="steps", save_steps=13)
    path = str(tmp_path / "out/checkpoint-13")
    callback = guard()
    run = train(samples(bad=[19]), callback, resume=path, **kwargs)
    assert state(run) == state(clean)
    assert callback.rollbacks == 4


def test_callbacks_made_anew_from_a_checkpoint_are_refused(tmp_path: Path) -> None:
    kwargs = {"save_strategy": "steps", "save_steps": 13}
    train(samples(), guard(), **kwargs)
    path = str(tmp_path / "out/checkpoint-13")
    with pytest.raises(UsageError, match="Leave that flag off"):
        train(samples(), guard(), resume=path, restore_callback_states_from_checkpoint=True, **kwargs)


def test_a_schedule_that_follows_the_evaluation() -> None:
    """No rollback crosses an evaluation here: it steps the schedule, and is not made again."""
    kwargs = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 5}
    kwargs |= {"metric_for_best_model": "eval_loss", "lr_scheduler_kwargs": {"patience": 0, "factor": 0.5}}
    clean = train(samples(), **kwargs)
    callback = guard()
    run = train(samples(), callback, Damage(7), Damage(17), Damage(28), **kwargs)
    assert state(run) == state(clean)
    assert callback.rollbacks == 3


@pytest.mark.parametrize("with_trainer", [True, False])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_loss_is_judged_as_the_model_answers_it(accumulate: int, with_trainer: bool) -> None:
    """The trainer divides it by the number of micro-batches, and clips gradients to 0.5."""
    seen: list[Any] = []
    callback = TolariaCallback(CONFIG, recorded(seen))
    train(samples(), callback, gradient_accumulation_steps=accumulate, with_trainer=with_trainer, max_grad_norm=0.01)
    assert 0.8 < seen[0].loss < 1.6
    assert (seen[0].grad_norm > 0.02) == with_trainer


# ------------------------------------------------------------ without a trainer


def test_alone_it_drops_the_steps_since_the_snapshot() -> None:
    every_step = GovernorConfig(cadence=1, probation=0, recovery=EXACT)  # trusted once the next step is healthy
    clean = train(samples(dropped=[6, 7]))
    callback = guard(config=every_step)
    run = train(samples(bad=[7]), callback, with_trainer=False)
    assert state(run) == state(clean)
    assert callback.rollbacks == 2


def test_alone_no_rollback_crosses_the_start_of_an_epoch() -> None:
    """Batches of the former epoch could not come again, and the shuffle of this one would be drawn twice."""
    found: list[Any] = []
    config = GovernorConfig(cadence=3, probation=2, recovery=EXACT, on_incident=found.append)
    train(samples(), guard({22: ("panic", 3)}, config), with_trainer=False)
    assert [(incident.step, incident.restored_step) for incident in found] == [(22, 20)]


def test_alone_it_needs_a_loss_in_the_output() -> None:
    with pytest.raises(UnsupportedState, match="set_trainer"):
        train(samples(), guard(), with_trainer=False, model=with_config(), label_smoothing_factor=0.1)


# ------------------------------------------------------------ limits


def test_panics_without_end_end_the_training_at_the_last_good_state() -> None:
    callback = guard(
        {n: ("panic", 0) for n in range(8, 100)},
        GovernorConfig(cadence=3, probation=2, recovery=Recovery(max_retries=3)),
    )
    model = Model()
    with pytest.raises(RetryBudgetExceeded):
        train(samples(), callback, model=model)
    assert is_finite(model.state_dict())


def test_training_leaves_no_trace_on_the_trainer() -> None:
    run = train(samples(), guard())
    assert not {"get_batch_samples", "training_step", "log"} & set(vars(run))
    assert "forward" not in vars(run.model)


def test_the_same_callback_governs_a_second_training() -> None:
    callback = guard()
    run = train(samples(bad=[7]), callback)
    run.train()
    assert callback.rollbacks == 4


def test_several_processes_are_refused() -> None:
    class Arguments:
        world_size, n_gpu, deepspeed, fsdp = 2, 0, None, None

    with pytest.raises(UnsupportedState, match="2 processes"):
        guard().on_train_begin(Arguments(), None, None)


def test_disabled_it_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOLARIA_DISABLE", "1")
    run, plain = train(samples(bad=[7]), guard()), train(samples(bad=[7]))
    assert frozen(run.model.state_dict()) == frozen(plain.model.state_dict())  # type: ignore[union-attr]


def test_observing_changes_nothing() -> None:
    callback = guard(config=GovernorConfig(mode="observe"))
    run = train(samples(bad=[7]), callback)
    plain = train(samples(bad=[7]))
    assert frozen(run.model.state_dict()) == frozen(plain.model.state_dict())  # type: ignore[union-attr]
    assert callback.governor is not None
    assert callback.governor.statistics().panics > 0

"""What makes no sense is refused by name before anything is done, and not taken for something else."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tolaria import Detector, GovernorConfig, TolariaGovernor, UsageError
from tolaria.follow import FollowingGovernor
from tolaria.judge import non_finite
from tolaria.judge.detector import healthy

Govern = Callable[..., TolariaGovernor]


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"model": None}, "model is a NoneType, expected a torch.nn.Module"),
        ({"scheduler": 3}, "scheduler is 3, expected one with step"),
        ({"scheduler": [torch.optim.lr_scheduler.StepLR]}, "scheduler is a type"),
        ({"scheduler": torch.optim.SGD([torch.zeros(1)])}, "scheduler is a SGD"),
        ({"scaler": "on"}, "scaler is 'on', expected a torch.amp.GradScaler"),
        ({"config": {"cadence": 3}}, "config is a dict, expected a GovernorConfig"),
        ({"detector": non_finite}, "detector is a function, expected one of tolaria.judge"),
        ({"twice": True}, "would step twice"),
    ],
    ids=lambda value: value if isinstance(value, str) else ", ".join(value),
)
def test_what_is_no_part_of_a_train_state(given: dict[str, Any], match: str, kit: Any) -> None:
    run = kit.Run()
    settings = {"model": run.model, **given}
    optimizers = [run.optimizer, run.optimizer] if settings.pop("twice", False) else run.optimizer
    with pytest.raises(UsageError, match=match):
        TolariaGovernor(settings.pop("model"), optimizers, **settings)
    assert "forward" not in vars(run.model)


WRONG = [
    ("snapshot", {"grads": "droop"}, "grads is 'droop', expected 'capture' or 'drop'"),
    ("snapshot", {"when": "now"}, "when is 'now', expected 'boundary'"),
    ("snapshot", {"step": "4"}, "step is '4', expected a whole number"),
    ("execute_rollback", {"verify": "befor"}, "verify is 'befor', expected 'before' or 'after'"),
    ("execute_rollback", {"verify": True}, "verify is True"),
    ("execute_rollback", {"when": 3}, "when is 3, expected 'boundary'"),
    ("execute_rollback", {"to": "newest"}, "to is 'newest', expected a SnapshotInfo"),
    ("step_back", {"steps": "2"}, "steps is '2', expected a whole number"),
    ("step_back", {"steps": 1.0}, "steps is 1.0, expected a whole number"),
    ("step_back", {"steps": 0}, "steps is 0, expected a whole number of at least 1"),
    ("execute_rollback", {"optimizer": nn.Linear(1, 1)}, "optimizer is a Linear, expected a torch.optim.Optimizer"),
]


@pytest.mark.parametrize(("method", "given", "match"), WRONG)
@pytest.mark.parametrize("mode", ["act", "observe"])
def test_words_and_objects_that_nobody_knows(
    mode: str, method: str, given: dict[str, Any], match: str, kit: Any, govern: Govern
) -> None:
    run = kit.Run()
    governor = govern(run.model, run.optimizer, config=GovernorConfig(mode=mode))
    governor.snapshot()
    run.plain_step(run.batches[0])
    before, counted = run.state(), governor.statistics()
    if mode == "observe" and "to" in given:  # nothing is looked up there
        return
    with pytest.raises(UsageError, match=match):
        getattr(governor, method)(**given)
    assert (run.state(), governor.statistics()) == (before, counted)


def test_a_snapshot_of_another_governor_is_no_target(kit: Any, govern: Govern) -> None:
    """Its number is that of one of ours."""
    run, other = kit.Run(), kit.Run()
    governor, stranger = govern(run.model), govern(other.model)
    info, theirs = governor.snapshot(), stranger.snapshot()
    assert info.serial == theirs.serial
    before = run.state()
    with pytest.raises(UsageError, match="another governor's"):
        governor.execute_rollback(to=theirs)
    assert run.state() == before
    assert governor.execute_rollback(to=info).success


@pytest.mark.parametrize("number", [np.int64, torch.tensor])
def test_steps_may_be_numbers_of_others(number: Callable[[int], Any], kit: Any, govern: Govern, tmp_path: Path) -> None:
    """And are plain ones from there on: a line of the ledger holds no others."""
    ledger = tmp_path / "ledger.jsonl"
    governor = govern(kit.Run().model, config=GovernorConfig(ledger=str(ledger)))
    assert type(governor.snapshot(number(7)).step) is int
    assert governor.execute_rollback(to=number(7)).snapshot_step == 7
    assert '"restored_step": 7' in ledger.read_text()


def test_what_a_snapshot_is_waited_for_has_a_name(kit: Any, govern: Govern) -> None:
    with pytest.raises(UsageError, match="until='certified', expected 'staged' or 'sealed'"):
        govern(kit.Run().model).snapshot().wait("certified")


def test_a_class_has_no_state_to_register(kit: Any, govern: Govern) -> None:
    with pytest.raises(UsageError, match="registering 'layer'"):
        govern(kit.Run().model).register("layer", nn.Linear)


@pytest.mark.parametrize("seconds", [float("inf"), 1e12])
def test_sections_may_be_waited_for_as_long_as_it_takes(seconds: float, kit: Any, govern: Govern) -> None:
    governor = govern(kit.Run().model, config=GovernorConfig(gate_timeout_s=seconds))
    inside, asked, wait = threading.Event(), threading.Event(), governor._keeper.driver._wait_for

    def noticed(*arguments: Any) -> Any:
        asked.set()
        return wait(*arguments)

    governor._keeper.driver._wait_for = noticed  # type: ignore[method-assign]

    def hold() -> None:
        with governor.using():
            inside.set()
            asked.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert inside.wait(60)
    assert governor.snapshot().state != "dropped"
    thread.join()


NO_NUMBERS = [
    ({"loss": "x"}, "loss is 'x', expected a number, a tensor, or several of them"),
    ({"loss": ["0.5", 0.5]}, "loss is '0.5'"),
    ({"loss": {"value": object()}}, "loss is a object"),
    ({"kl": "high"}, "kl is 'high', expected a number, or a tensor"),
    ({"kl": None}, "kl is a NoneType"),
    ({"kl": [1.0, 2.0]}, "kl is a list"),
    ({"kl": 1j}, "kl is a complex"),
    ({"grad_norm": "a"}, "grad_norm is 'a'"),
    ({"metric": "0.5"}, "metric is '0.5', expected a number"),
    ({"clip": "1"}, "clip is '1', expected a number"),
]


@pytest.mark.parametrize(("given", "match"), NO_NUMBERS)
@pytest.mark.parametrize("mode", ["act", "observe"])
def test_a_sign_that_is_no_number_is_refused_before_the_step(
    mode: str, given: dict[str, Any], match: str, kit: Any, govern: Govern
) -> None:
    """Found out only when it is sent off, it would leave behind a step that nobody has counted."""
    run = kit.Run()
    governor = govern(run.model, run.optimizer, scheduler=run.scheduler, config=GovernorConfig(mode=mode))
    run.step(governor, run.batches[0])
    loss = run.backward(run.batches[1])
    before, counted, norm = run.state(), governor.statistics(), float(run.model[0].weight.grad.norm())
    with pytest.raises(UsageError, match=match):
        governor.step(**{"loss": loss, **given})
    assert (run.state(), governor.statistics()) == (before, counted)
    assert float(run.model[0].weight.grad.norm()) == norm
    assert governor.step(loss=loss).step == 2


@pytest.mark.parametrize(("given", "match"), [case for case in NO_NUMBERS if "clip" not in case[0]])
def test_nor_is_it_judged(given: dict[str, Any], match: str, kit: Any, govern: Govern) -> None:
    governor = govern(kit.Run().model)
    with pytest.raises(UsageError, match=match.split(",")[0]):
        governor.observe(**given)
    assert governor.statistics().steps == 0


def test_nor_is_a_step_of_somebody_else(kit: Any) -> None:
    """What was read of its gradients still stands for it when the call is corrected."""
    run = kit.Run()
    with FollowingGovernor(run.model, run.optimizer) as governor:
        governor.begin()
        loss = run.backward(run.batches[0])
        governor.gradients_ready()
        run.optimizer.step()
        with pytest.raises(UsageError, match="kl is 'high'"):
            governor.stepped(loss=loss, kl="high")
        assert governor._gradients
        assert governor.stepped(loss=loss).step == 1


@pytest.mark.parametrize("several", [False, True])
def test_numbers_of_numpy_are_losses(several: bool, kit: Any, govern: Govern) -> None:
    """A mean over float32 in NumPy is no Python float."""
    loss: Any = np.array([0.25, 0.75], dtype=np.float32) if several else np.float32(0.5)
    seen: list[float | None] = []
    detector = Detector(lambda: 0, lambda state, signs: (state, (seen.append(signs.loss), healthy(signs.step))[1]))
    run = kit.Run()
    governor = govern(run.model, run.optimizer, detector=detector)
    governor.observe(loss=loss)
    run.backward(run.batches[0])
    governor.step(loss=loss, kl=np.float32(0.125))
    assert seen == [0.5, 0.5]

"""`tolaria.sb3.TolariaCallback` on PPO, A2C, DQN and SAC: bit-exact after faults, and its unguarded twin."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stable_baselines3
import torch
from reinforcement.conftest import (
    ROUNDS,
    Fault,
    build,
    is_finite,
    learn,
    learnt_state,
    steps_per_round,
    timesteps,
)
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, CheckpointCallback
from stable_baselines3.common.logger import KVWriter, Logger

from tolaria import sb3
from tolaria.config import GovernorConfig, Recovery
from tolaria.errors import InvalidConfig, RetryBudgetExceeded, UnsupportedState
from tolaria.judge import Detector
from tolaria.records import Health, Verdict, VitalSigns
from tolaria.sb3 import TolariaCallback, logged_signs

KINDS = ["PPO", "A2C", "DQN", "SAC"]
Clean = Callable[[str], str]


def moments(kind: str) -> dict[str, int]:
    """Steps of the main optimizer at which a fault strikes: amid an update, in its last step, in the run's last."""
    each = steps_per_round(kind)
    return {"amid": 2 * each + each // 2, "last step": 3 * each - 1, "last of the run": ROUNDS * each - 1}


# ---------------------------------------------------------------- replay


@pytest.mark.parametrize("kind", KINDS)
def test_a_healthy_run_is_the_same_with_and_without(kind: str, clean: Clean) -> None:
    callback = TolariaCallback()
    assert learn(build(kind), timesteps(kind), callback) == clean(kind)
    assert callback.rollbacks == callback.dropped == 0


@pytest.mark.parametrize("moment", ["amid", "last step", "last of the run"])
@pytest.mark.parametrize("fault", ["nan_gradient", "blow_up"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_that_does_not_return_leaves_no_trace(kind: str, fault: str, moment: str, clean: Clean) -> None:
    model, callback = build(kind), TolariaCallback(snapshot_every=1)
    injected = Fault(model, fault, moments(kind)[moment])
    assert learn(model, timesteps(kind), callback) == clean(kind)
    assert injected.struck == callback.rollbacks == 1
    assert callback.dropped == 0


@pytest.mark.parametrize("moment", ["amid", "last step", "last of the run"])
@pytest.mark.parametrize("fault", ["nan_gradient", "blow_up"])
@pytest.mark.parametrize("kind", KINDS)
def test_unguarded_it_does(kind: str, fault: str, moment: str, clean: Clean) -> None:
    model = build(kind)
    injected = Fault(model, fault, moments(kind)[moment])
    assert learn(model, timesteps(kind)) != clean(kind)
    assert injected.struck == 1


def test_a_callback_that_only_watches_changes_nothing_and_saves_nothing(clean: Clean) -> None:
    model, callback = build("PPO"), TolariaCallback(GovernorConfig(mode="observe"))
    Fault(model, "blow_up", moments("PPO")["last of the run"])
    assert learn(model, timesteps("PPO"), callback) != clean("PPO")
    assert callback.rollbacks == 0
    assert callback.governor is not None
    assert callback.governor.statistics().panics == 1


def test_a_disabled_governor_is_no_governor(clean: Clean, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOLARIA_DISABLE", "1")
    callback = TolariaCallback()
    assert learn(build("PPO"), timesteps("PPO"), callback) == clean("PPO")
    assert callback.governor is not None
    assert callback.governor.statistics().steps == 0


# ---------------------------------------------------------------- drop


def leave_out(model: Any, left_out: set[int]) -> None:
    """The reference of a dropped round: a run that collects its experience and never learns from it."""
    rounds, train = iter(range(100)), type(model).train

    def maybe(*args: Any, **options: Any) -> None:
        if next(rounds) not in left_out:
            train(model, *args, **options)

    model.train = maybe


@pytest.mark.parametrize("fault", ["nan_gradient", "blow_up"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_that_returns_drops_the_round(kind: str, fault: str, clean: Clean) -> None:
    model, callback = build(kind), TolariaCallback(snapshot_every=1)
    # NaN ends the attempt of a policy that refuses it: the second one begins a step later, not a round later
    each, at = steps_per_round(kind), moments(kind)["last step"]
    injected = Fault(model, fault, at, again_after=each)
    left = learn(model, timesteps(kind), callback)
    assert (injected.struck, callback.rollbacks, callback.dropped) == (2, 2, 1)
    reference = build(kind)
    leave_out(reference, {2})
    assert left == learn(reference, timesteps(kind))
    assert left != clean(kind)


def test_the_rounds_between_two_snapshots_are_lost_together() -> None:
    model, callback = build("DQN", normalized=False), TolariaCallback(snapshot_every=3)
    Fault(model, "blow_up", 11)  # last step of the fourth round, right before which a snapshot was taken
    Fault(model, "blow_up", 20)  # of the sixth: the fourth has taken six steps
    learn(model, timesteps("DQN", 6), callback)
    assert (callback.rollbacks, callback.dropped) == (2, 1)
    reference = build("DQN", normalized=False)
    leave_out(reference, {3})
    learn(reference, timesteps("DQN", 4))
    assert learnt_state(model).digest() == learnt_state(reference).digest()


def test_what_is_logged_of_a_dropped_round_is_dropped_too() -> None:
    rows: list[dict[str, Any]] = []

    class Rows(KVWriter):
        def write(self, key_values: dict[str, Any], key_excluded: Any, step: int = 0) -> None:
            rows.append(dict(key_values))

        def close(self) -> None: ...

    model, callback = build("PPO"), TolariaCallback(snapshot_every=1)
    model.set_logger(Logger(folder=None, output_formats=[Rows()]))
    each = steps_per_round("PPO")
    Fault(model, "blow_up", 2 * each - 1, again_after=each)
    learn(model, timesteps("PPO"), callback)
    assert [row["tolaria/rollbacks"] for row in rows] == [0, 0, 2, 2, 2]
    assert [row["tolaria/dropped"] for row in rows] == [0, 0, 1, 1, 1]
    assert ["train/loss" in row for row in rows] == [False, True, False, True, True]
    assert model.logger.name_to_value["train/n_updates"] == 8  # four rounds of two epochs; not dumped any more
    assert all(np.isfinite(row["train/loss"]) for row in rows if "train/loss" in row)


def test_what_stable_baselines_logs_of_a_round_is_judged() -> None:
    """By a detector of one's own: the same names as `rl_collapse` reads, and nothing that is not finite."""
    seen: list[dict[str, float]] = []

    def update(state: None, signs: VitalSigns) -> tuple[None, Verdict]:
        seen.append(dict(signs.extra))
        return state, Verdict(Health.HEALTHY, signs.step)

    model = build("PPO")
    learn(model, timesteps("PPO"), TolariaCallback(detector=Detector(lambda: None, update)))
    logged = model.logger.name_to_value
    assert len(seen) == ROUNDS
    assert {"approx_kl", "entropy", "policy_change", "drift"} <= set(seen[-1])
    assert all(math.isfinite(value) for each in seen for value in each.values())
    assert all(each["entropy"] > 0.0 for each in seen)
    assert logged_signs({"train/explained_variance": math.nan, "train/approx_kl": 0.5}, model)["approx_kl"] == 0.5
    assert "explained_variance" not in logged_signs({"train/explained_variance": math.nan}, model)
    if "train/approx_kl" in logged:
        assert seen[-1]["approx_kl"] == logged["train/approx_kl"]
    model.ep_info_buffer.extend([{"r": 10.0, "l": 10, "t": 0.0}, {"r": 20.0, "l": 20, "t": 0.0}])
    assert logged_signs({}, model) == {"metric": 15.0}


def test_the_reward_is_the_metric_of_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """`rl_collapse` reads it there, and every other sign by its name."""
    monkeypatch.setattr(sb3, "logged_signs", lambda *_: {"metric": 3.0, "entropy": 0.5})
    seen: list[tuple[float | None, float | None, bool]] = []

    def update(state: None, signs: VitalSigns) -> tuple[None, Verdict]:
        seen.append((signs.metric, signs.extra.get("entropy"), "metric" in signs.extra))
        return state, Verdict(Health.HEALTHY, signs.step)

    learn(build("PPO"), timesteps("PPO"), TolariaCallback(detector=Detector(lambda: None, update)))
    assert seen == [(3.0, 0.5, False)] * ROUNDS


def test_what_was_logged_before_a_dropped_round_stands() -> None:
    model, callback = build("PPO"), TolariaCallback(snapshot_every=1)
    each = steps_per_round("PPO")
    Fault(model, "blow_up", 2 * each - 1, again_after=each)
    model.learn(timesteps("PPO", 2), callback=callback, log_interval=None)  # nothing is dumped
    assert callback.dropped == 1
    assert model.logger.name_to_value["train/n_updates"] == 2


# ---------------------------------------------------------------- poison


class AtRolloutStart(BaseCallback):
    """What there is where rollouts begin."""

    def __init__(self) -> None:
        super().__init__()
        self.learnt: list[str] = []
        self.counts: list[tuple[float, float]] = []
        self.begins: list[bool] = []

    def _on_rollout_start(self) -> None:
        normalize = self.model.get_vec_normalize_env()
        assert normalize is not None
        self.learnt.append(learnt_state(self.model).digest())
        self.counts.append((normalize.obs_rms.count, normalize.ret_rms.count))
        self.begins.append(bool(np.all(self.model._last_episode_starts)))

    def _on_step(self) -> bool:
        return True


@pytest.mark.parametrize("what", ["observation", "reward", "terminal"])
@pytest.mark.parametrize("kind", ["PPO", "A2C"])
def test_a_poisoned_rollout_is_dropped_and_gathered_again(kind: str, what: str) -> None:
    first_of_second = timesteps(kind, 1) // 2  # two environments
    model = build(kind, poison=(first_of_second + 5,), what=what)
    starts, callback = AtRolloutStart(), TolariaCallback(snapshot_every=1)
    learn(model, timesteps(kind), CallbackList([callback, starts]))
    assert (callback.rollbacks, callback.dropped) == (1, 1)
    assert is_finite(model)
    reference = AtRolloutStart()
    learn(build(kind), timesteps(kind), reference)
    assert starts.learnt[:2] == reference.learnt[:2]
    assert starts.learnt[2] == starts.learnt[1]
    observed, returns = starts.counts[1]
    assert starts.counts[2] == (observed + 2, returns)  # the first observations after a reset, and nothing poisoned
    assert starts.begins[:3] == [True, False, True]
    assert np.isfinite(model.get_vec_normalize_env().obs_rms.mean).all()
    assert np.isfinite(model.get_vec_normalize_env().ret_rms.var).all()


@pytest.mark.parametrize("kind", ["PPO", "A2C"])
def test_unguarded_one_nan_ruins_the_statistics_for_ever(kind: str) -> None:
    model = build(kind, poison=(timesteps(kind, 1) // 2 + 5,))
    assert learn(model, timesteps(kind)).startswith("died")
    assert np.isnan(model.get_vec_normalize_env().obs_rms.mean).any()


@pytest.mark.parametrize("kind", ["DQN", "SAC"])
def test_a_poisoned_transition_never_reaches_the_replay_buffer(kind: str) -> None:
    model, callback = build(kind, poison=(57,)), TolariaCallback(snapshot_every=1)
    learn(model, timesteps(kind), callback)
    assert (callback.rollbacks, callback.dropped) == (1, 1)
    assert np.isfinite(model.replay_buffer.observations).all()
    assert np.isfinite(model.replay_buffer.next_observations).all()
    assert is_finite(model)


@pytest.mark.parametrize("kind", ["DQN", "SAC"])
def test_unguarded_it_does_reach_it(kind: str) -> None:
    model = build(kind, poison=(57,))
    learn(model, timesteps(kind))
    assert not (np.isfinite(model.replay_buffer.next_observations).all() and is_finite(model))


def test_environments_that_are_always_poisoned_end_the_run() -> None:
    model, callback = build("PPO", poison=(-1,)), TolariaCallback(GovernorConfig(recovery=Recovery(max_retries=3)))
    with pytest.raises(RetryBudgetExceeded, match="non-finite observation of environments 1"):
        model.learn(timesteps("PPO"), callback=callback)
    assert callback.rollbacks == 4
    assert is_finite(model)


# ---------------------------------------------------------------- leaves no trace


def test_only_while_it_learns_is_there_anything_on_the_model(tmp_path: Path) -> None:
    plain, guarded = build("PPO"), build("PPO")
    checkpoint = CheckpointCallback(save_freq=20, save_path=str(tmp_path / "guarded"))
    guarded.learn(64, callback=CallbackList([TolariaCallback(), checkpoint]))
    plain.learn(64, callback=CheckpointCallback(save_freq=20, save_path=str(tmp_path / "plain")))
    assert vars(guarded).keys() == vars(plain).keys()
    loaded = [stable_baselines3.PPO.load(next((tmp_path / name).iterdir())) for name in ("guarded", "plain")]
    assert vars(loaded[0]).keys() == vars(loaded[1]).keys()
    assert "train" not in vars(loaded[0])
    for a, b in zip(loaded[0].policy.parameters(), loaded[1].policy.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_copy_made_meanwhile_is_not_governed() -> None:
    class Copies(BaseCallback):
        copied: Any = None

        def _on_rollout_end(self) -> None:
            self.copied = copy.deepcopy(self.model)

        def _on_step(self) -> bool:
            return True

    model, callback, copies = build("PPO"), TolariaCallback(), Copies()
    model.learn(64, callback=CallbackList([callback, copies]))
    assert callback.governor is not None
    steps = callback.governor.statistics().steps
    before = [p.detach().clone() for p in model.policy.parameters()]
    copies.copied.train()
    assert callback.governor.statistics().steps == steps
    assert all(torch.equal(a, b) for a, b in zip(before, model.policy.parameters(), strict=True))


def test_an_error_of_the_users_is_not_swallowed_and_leaves_nothing_attached() -> None:
    class Breaks(BaseCallback):
        def _on_rollout_end(self) -> None:
            def broken() -> None:
                raise KeyError("a bug")

            self.model.rollout_buffer.get = lambda _: broken()

        def _on_step(self) -> bool:
            return True

    model, callback = build("PPO"), TolariaCallback()
    with pytest.raises(KeyError, match="a bug"):
        model.learn(64, callback=CallbackList([callback, Breaks()]))
    assert callback.rollbacks == 0
    del model.rollout_buffer.get
    model.learn(64, callback=callback)  # takes off what the failed run has left
    assert "train" not in vars(model)
    assert callback.governor is not None
    assert callback.governor.statistics().steps == 2  # one of the run that failed


@pytest.mark.parametrize("where", ["train", "rollout", "budget", "interrupt"])
def test_an_error_that_ends_learn_leaves_the_model_as_it_was(where: str) -> None:
    class Breaks(BaseCallback):
        def _on_step(self) -> bool:
            if where == "rollout":
                raise KeyError("a bug")
            if where == "interrupt":
                raise KeyboardInterrupt
            return True

        def _on_rollout_end(self) -> None:
            if where == "train":
                self.model.clip_range = None  # `train` calls it

    model = build("PPO", poison=(-1,) if where == "budget" else ())
    before, policy = set(vars(model)), set(vars(model.policy))
    callback = TolariaCallback(GovernorConfig(recovery=Recovery(max_retries=3)))
    with pytest.raises((KeyError, KeyboardInterrupt, RetryBudgetExceeded, TypeError)):
        model.learn(timesteps("PPO"), callback=CallbackList([callback, Breaks()]))
    assert not {"train", "collect_rollouts", "_excluded_save_params"} & set(vars(model))
    assert set(vars(model)) - before <= {"_logger"}  # `learn` makes it
    assert set(vars(model.policy)) == policy
    assert callback.governor is not None
    steps = callback.governor.statistics().steps
    if where in ("rollout", "interrupt"):
        model.learn(64)
        assert callback.governor.statistics().steps == steps


def test_counters_go_on_in_the_next_call_of_learn() -> None:
    model, callback = build("PPO"), TolariaCallback(snapshot_every=1)
    each = steps_per_round("PPO")
    Fault(model, "blow_up", 2 * each - 1, again_after=each)
    model.learn(timesteps("PPO", 2), callback=callback)
    assert (callback.rollbacks, callback.dropped) == (2, 1)
    assert "forward" not in vars(model.policy)
    model.learn(timesteps("PPO", 3), callback=callback, reset_num_timesteps=False)
    assert (callback.rollbacks, callback.dropped) == (2, 1)
    assert callback.governor is not None
    assert callback.governor.statistics().steps == ROUNDS + 1
    other = build("PPO")
    other.learn(timesteps("PPO", 1), callback=callback)
    assert (callback.rollbacks, callback.dropped) == (0, 0)
    assert callback.governor.statistics().steps == 1


def test_several_models_in_one_process_keep_to_themselves() -> None:
    """Each with its number; global random state is left alone, so a rollback of one draws nothing from another."""
    reports: list[int] = []
    models = [build("PPO"), build("PPO")]
    callbacks = [
        TolariaCallback(GovernorConfig(env_id=n, on_incident=lambda i: reports.append(i.env_id))) for n in (4, 5)
    ]
    Fault(models[1], "blow_up", 3)
    for model, callback in zip(models, callbacks, strict=True):
        model.learn(64, callback=callback)
    assert reports == [5]
    assert [callback.rollbacks for callback in callbacks] == [0, 1]


# ---------------------------------------------------------------- refusals


def test_without_stable_baselines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sb3, "_MISSING", ImportError("No module named 'stable_baselines3'"))
    with pytest.raises(UnsupportedState, match=r"pip install 'tolaria\[sb3\]'"):
        TolariaCallback()


@pytest.mark.parametrize("version", ["2.6.9", "2.10.0", "3.0.0a1"])
def test_a_version_that_was_never_tested(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sb3.metadata, "version", lambda _: version)
    with pytest.raises(UnsupportedState, match=rf"is {version}, tested are >=2.7,<2.10.*pip install"):
        TolariaCallback()


def test_forked_random_state_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="rng='fork'"):
        TolariaCallback(GovernorConfig(rng="fork"))

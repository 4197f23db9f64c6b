"""Small models of every kind, faults for them, and a digest that does not ask the adapter what there is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from stable_baselines3 import A2C, DQN, PPO, SAC
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import nn

from tolaria.state.train_state import TrainState

ROUNDS = 5


@pytest.fixture(autouse=True)
def _alone(alone: None) -> None:
    """Every test here: how random state is treated depends on other governors."""


class Poisonous(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Answers with a NaN at given calls of `step`, counted over all episodes. Draws nothing itself."""

    def __init__(self, env: gymnasium.Env[Any, Any], at: tuple[int, ...] = (), what: str = "observation") -> None:
        super().__init__(env)
        self.at, self.what = at, what
        self.steps = self.resets = 0

    def reset(self, **options: Any) -> Any:
        self.resets += 1
        return super().reset(**options)

    def step(self, action: Any) -> Any:
        observation, reward, terminated, truncated, info = super().step(action)
        if self.steps in self.at or -1 in self.at:
            if self.what == "reward":
                reward = float("nan")
            else:
                observation = np.array(observation, copy=True)
                observation[-1] = np.nan
            truncated = truncated or self.what == "terminal"
        self.steps += 1
        return observation, reward, terminated, truncated, info


def environments(
    name: str, count: int, normalized: bool, poison: tuple[int, ...] = (), what: str = "observation"
) -> DummyVecEnv | VecNormalize:
    """`count` environments; the last of them is poisonous."""
    makers: list[Callable[[], gymnasium.Env[Any, Any]]] = [
        (lambda i=i: Poisonous(gymnasium.make(name), poison if i == count - 1 else (), what)) for i in range(count)
    ]
    vector = DummyVecEnv(makers)
    return VecNormalize(vector) if normalized else vector


def build(kind: str, *, poison: tuple[int, ...] = (), what: str = "observation", normalized: bool = True) -> Any:
    """A small model that learns `ROUNDS` rounds in `timesteps(kind)` steps."""
    common: dict[str, Any] = {"seed": 7, "device": "cpu", "policy_kwargs": {"net_arch": [16]}}
    if kind in ("PPO", "A2C"):
        env = environments("CartPole-v1", 2, normalized, poison, what)
        if kind == "A2C":
            return A2C("MlpPolicy", env, n_steps=16, **common)
        return PPO("MlpPolicy", env, n_steps=32, batch_size=16, n_epochs=2, learning_rate=1e-3, **common)
    replay: dict[str, Any] = {"learning_starts": 40, "batch_size": 16, "train_freq": 10, "buffer_size": 500}
    if kind == "DQN":
        env = environments("CartPole-v1", 1, normalized, poison, what)
        return DQN("MlpPolicy", env, gradient_steps=3, target_update_interval=20, **replay, **common)
    env = environments("Pendulum-v1", 1, normalized, poison, what)
    return SAC("MlpPolicy", env, gradient_steps=3, **replay, **common)


def timesteps(kind: str, rounds: int = ROUNDS) -> int:
    return {"PPO": 64 * rounds, "A2C": 32 * rounds}.get(kind, 40 + 10 * rounds)


def steps_per_round(kind: str) -> int:
    """Steps of the optimizer of `main_optimizer`."""
    return {"PPO": 8, "A2C": 1}.get(kind, 3)


def named_optimizers(model: Any) -> list[torch.optim.Optimizer]:
    """Spelt out, so that an optimizer which the adapter overlooks makes digests differ."""
    if isinstance(model, SAC):
        assert model.ent_coef_optimizer is not None
        return [model.actor.optimizer, model.critic.optimizer, model.ent_coef_optimizer]
    return [model.policy.optimizer]


def main_optimizer(model: Any) -> torch.optim.Optimizer:
    return model.critic.optimizer if isinstance(model, SAC) else model.policy.optimizer


def digest(model: Any) -> str:
    """Everything that a run leaves, and the place where its environments are."""
    state = learnt_state(model)
    normalize = model.get_vec_normalize_env()
    if normalize is not None:
        moments = lambda: [  # noqa: E731
            torch.tensor(np.asarray(value))
            for rms in (normalize.obs_rms, normalize.ret_rms)
            for value in (rms.mean, rms.var, rms.count)
        ]
        state.register("normalize", (moments, lambda _: None))
    state.register("last_obs", (lambda: torch.tensor(np.asarray(model._last_obs)), lambda _: None))
    return state.digest()


def learnt_state(model: Any) -> TrainState:
    """Weights, targets, optimizers and the counter of updates."""
    state = TrainState(model.policy, named_optimizers(model))
    state.register("n_updates", (lambda: model._n_updates, lambda _: None))
    return state


class Fault:
    """Strikes at steps of the model's main optimizer, counted over the whole run.

    Args:
        kind: ``"nan_gradient"`` (before the step), or ``"blow_up"`` (finite, after it).
        at: The step, from 0, at which it strikes.
        again_after: Steps until it strikes again.
    """

    def __init__(self, model: Any, kind: str, at: int, again_after: int | None = None) -> None:
        self.struck, self._step = 0, 0
        self._kind, self._at = kind, {at} | ({at + again_after} if again_after else set())
        optimizer = main_optimizer(model)
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        hook = optimizer.register_step_pre_hook if kind == "nan_gradient" else optimizer.register_step_post_hook
        self._hook = hook(self._strike)

    def _strike(self, *_: Any) -> None:
        step, self._step = self._step, self._step + 1
        if step not in self._at:
            return
        self.struck += 1
        for parameter in self._parameters:
            if self._kind == "nan_gradient":
                assert parameter.grad is not None
                parameter.grad[(0,) * parameter.grad.dim()] = float("nan")
            else:
                parameter.data.mul_(-30.0).add_(3.0)

    def remove(self) -> None:
        self._hook.remove()


def learn(model: Any, steps: int, callback: Any = None) -> str:
    """Learn; the digest afterwards, or how it died."""
    try:
        model.learn(steps, callback=callback)
    except (ValueError, RuntimeError) as error:  # a distribution refuses NaN, or torch does
        return f"died: {str(error).splitlines()[0]}"
    return digest(model)


@pytest.fixture(scope="session")
def clean() -> Callable[[str], str]:
    """Digest of the undisturbed, unguarded run of a kind."""
    known: dict[str, str] = {}

    def of(kind: str) -> str:
        if kind not in known:
            known[kind] = learn(build(kind), timesteps(kind))
        return known[kind]

    return of


def is_finite(model: Any) -> bool:
    def finite(module: nn.Module) -> bool:
        return all(bool(value.isfinite().all()) for value in module.state_dict().values())

    return finite(model.policy)

"""How the faults of the cartpole drill strike. Needs Stable-Baselines3 and gymnasium, so `cartpole` imports it late."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback

from tolaria.drill.cartpole import STEPS_PER_ROUND, PolicyFault, PolicyRecord, state_digest

_NOISE = 10.0


class Poisonous(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Answers with a NaN in the observation at given steps, counted over all episodes."""

    def __init__(self, env: gymnasium.Env[Any, Any], at: Collection[int]) -> None:
        super().__init__(env)
        self._at, self._steps = at, 0

    def step(self, action: Any) -> Any:
        """One step of the environment."""
        observation, *others = super().step(action)
        if self._steps in self._at:
            observation = np.array(observation, copy=True)
            observation[1] = np.nan
        self._steps += 1
        return observation, *others


class Injector(BaseCallback):
    """Strikes planned faults in one run, and takes down digests where rollouts begin. Draws from its own generator.

    Args:
        faults: From `plan`.
        record: Of the run.
        seed: Of the noise.
        tell: Called with the number of each round that begins.

    Attributes:
        round: The present one, from 0.
    """

    def __init__(
        self, faults: Sequence[PolicyFault], record: PolicyRecord, seed: int, tell: Callable[[int], None]
    ) -> None:
        super().__init__()
        self.round = -1
        self._faults, self._record, self._tell = faults, record, tell
        self._generator = torch.Generator().manual_seed(seed)
        self._step = 0  # optimizer steps since the rollout ended
        self._hooks: list[Any] = []

    def _on_training_start(self) -> None:
        optimizer = self.model.policy.optimizer
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def _on_rollout_start(self) -> None:
        self._record.digests.append((self.round + 1, state_digest(self.model)))  # type: ignore[arg-type]

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.round += 1
        self._step = 0
        self._tell(self.round)

    def _due(self, *kinds: str) -> PolicyFault | None:
        for fault in self._faults:
            hits = fault.kind in kinds and fault.round == self.round and fault.step == self._step % STEPS_PER_ROUND
            if hits and self._record.struck.get(fault.kind, 0) < fault.times:
                self._record.struck[fault.kind] = self._record.struck.get(fault.kind, 0) + 1
                return fault
        return None

    def _before_step(self, *_: Any) -> None:
        if self._due("nan_gradient"):
            parameter = next(self.model.policy.parameters())
            if parameter.grad is not None:
                parameter.grad[0] = float("nan")

    def _after_step(self, *_: Any) -> None:
        if self._due("blow_up", "last_step", "returning_blow_up", "last_round"):
            blow_up(self.model.policy, self._generator)
        self._step += 1


def blow_up(policy: torch.nn.Module, generator: torch.Generator) -> None:
    """Noise of size 10 on every weight: finite, and the end of the policy. Through `.data`, as a stray kernel would."""
    for parameter in policy.parameters():
        noise = torch.randn(parameter.shape, generator=generator) * _NOISE
        parameter.data.add_(noise.to(parameter.device))

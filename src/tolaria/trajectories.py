"""Which part of a rollout of several environments may be learnt from, and advantages that never cross the rest.

For agents that learn from environments of which single ones are rolled back, reset or poisoned: a controller of several
governed trainings, or a vector of simulators.
"""

from __future__ import annotations

import torch

from tolaria.errors import UsageError
from tolaria.report import RollbackReport


class Trajectories:
    """Marks of one rollout: `num_steps` transitions of each of `num_envs` environments.

    A transition `(t, env)` is the action taken at step t, its reward, and the state it led to.

    Args:
        num_steps: T, length of the rollout.
        num_envs: N. Environments are numbered from 0, as `env_id` of their governors.
        device: Of the marks.

    Attributes:
        valid: Shape [T, N], bool. False: not to be learnt from.
        cut: Shape [T, N], bool. True: what follows the transition is no consequence of it, so no advantage flows back
            into it; the value of the state it led to still does.
        terminal: Shape [T, N], bool. True: nothing follows at all, not even the value.
    """

    def __init__(self, num_steps: int, num_envs: int, device: torch.device | str = "cpu") -> None:
        if num_steps < 1 or num_envs < 1:
            raise UsageError(
                "marking trajectories",
                f"num_steps={num_steps}, num_envs={num_envs}, expected at least 1 of both",
                "Pass the shape of the rollout.",
            )
        self.valid = torch.ones(num_steps, num_envs, dtype=torch.bool, device=device)
        self.cut = torch.zeros_like(self.valid)
        self.terminal = torch.zeros_like(self.valid)

    def clear(self) -> None:
        """A new rollout begins."""
        self.valid.fill_(True)
        self.cut.fill_(False)
        self.terminal.fill_(False)

    def invalidate(self, env_id: int, first: int, last: int) -> None:
        """Transitions `first` to `last` (inclusive) of one environment are void: their past is cut off from them too.

        A `first` below 0 means that the void part began in an earlier rollout.
        """
        self._require(env_id, last)
        first = max(first, 0)
        if first > last:
            return
        self.valid[first : last + 1, env_id] = False
        self.cut[last, env_id] = True
        if first > 0:
            self.cut[first - 1, env_id] = True

    def undo(self, report: RollbackReport, step: int, *, per_step: int = 1) -> None:
        """The environment `report.env_id` was rolled back after transition `step`: the steps lost are void.

        Args:
            report: Of the rollback. One that did not succeed marks nothing.
            step: The newest transition; it led to the panic.
            per_step: Optimizer steps of the environment that make one transition.
        """
        self._require(report.env_id, step)
        if report.success:
            lost = max(1, -(-report.steps_lost // per_step))
            self.invalidate(report.env_id, step - lost + 1, step)

    def charge(self, report: RollbackReport, step: int, rewards: torch.Tensor) -> None:
        """The other way: transition `step` ends an episode, and costs `report.penalty`. The transitions stay valid.

        For agents whose actions are to blame: they did lead there, and are to learn that they should not.

        Args:
            report: Of the rollback. One that did not succeed costs nothing.
            step: The transition that led to the panic.
            rewards: Shape [T, N], floating point; changed in place.
        """
        self._require(report.env_id, step)
        if report.success:
            rewards[step, report.env_id] += report.penalty
            self.terminal[step, report.env_id] = True
            self.cut[step, report.env_id] = True

    def advantages(
        self,
        rewards: torch.Tensor,
        values: torch.Tensor,
        next_values: torch.Tensor,
        dones: torch.Tensor,
        *,
        gamma: float,
        lam: float,
    ) -> torch.Tensor:
        """Generalized advantage estimates (Schulman et al. 2016) within what belongs together.

        Args:
            rewards: Shape [T, N].
            values: Shape [T, N], of the states in which the actions were taken.
            next_values: Shape [T, N], of the states they led to; a value of NaN where `dones` or `terminal` is no harm.
            dones: Shape [T, N], bool: the transition ended an episode.
            gamma: Discount per step.
            lam: Decay of the trace.

        Returns:
            Shape [T, N], the dtype of `values`; 0 where a transition is not valid.
        """
        over = dones.bool() | self.terminal
        ahead = torch.where(over, torch.zeros_like(values), next_values)
        deltas = rewards + gamma * ahead - values
        # not a product with a mask: nan times 0 is nan
        deltas = torch.where(self.valid, deltas, torch.zeros_like(values))
        flows = ~(over | self.cut) & self.valid
        advantages = torch.zeros_like(values)
        running = torch.zeros_like(values[0])
        for step in reversed(range(len(values))):
            running = deltas[step] + gamma * lam * torch.where(flows[step], running, torch.zeros_like(running))
            advantages[step] = running
        return advantages

    def _require(self, env_id: int, step: int) -> None:
        num_steps, num_envs = self.valid.shape
        if not (0 <= env_id < num_envs and 0 <= step < num_steps):
            raise UsageError(
                "marking trajectories",
                f"environment {env_id}, step {step}, expected below {num_envs} and {num_steps}",
                "Number environments as in the rollout.",
            )

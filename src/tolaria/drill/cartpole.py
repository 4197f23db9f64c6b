"""`tolaria drill --workload cartpole`: what is trained, what goes wrong, and one run of it.

PPO of Stable-Baselines3 on CartPole, 16 environments. What the other workloads call a step is a round here: 512
transitions and the 16 optimizer steps that learn from them.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.distributions import Distribution

from tolaria.config import GovernorConfig
from tolaria.drill.workloads import CannotRun
from tolaria.records import Incident
from tolaria.state.train_state import TrainState

if TYPE_CHECKING:
    from stable_baselines3 import PPO

SOLVED = 475.0
"""Mean return of an episode from which CartPole-v1 counts as solved; the most is 500."""

MIN_ROUNDS = 60
STEPS_PER_ROUND = 16  # of the optimizer
_ENVS, _TRANSITIONS, _EPOCHS = 16, 32, 8  # of each round: environments, steps of each, passes over all of them
_EPISODES = 20  # of an evaluation
_POISONED = 3  # the environment that goes wrong


@dataclass(frozen=True, slots=True)
class PolicyFault:
    """One planned fault.

    Attributes:
        kind: Its name.
        title: For people.
        round: In which it strikes, from 0.
        step: Of the round's optimizer steps, or of its transitions for an observation; from 0.
        times: Attempts at the round in which it strikes.
        action: What is expected to follow: ``"replay"``, or ``"skip"`` in the end.
    """

    kind: str
    title: str
    round: int
    step: int
    times: int = 1
    action: str = "replay"


def plan(seed: int, rounds: int) -> tuple[PolicyFault, ...]:
    """When each fault strikes: its share of the run, moved by up to 1.5 % of it; the last one in the last round."""
    draw = random.Random(f"cartpole/{seed}")

    def at(share: float) -> int:
        return round((share + draw.uniform(-0.015, 0.015)) * rounds)

    def amid() -> int:
        return draw.randrange(2, STEPS_PER_ROUND - 2)

    last = STEPS_PER_ROUND - 1
    return (
        PolicyFault("nan_gradient", "one gradient is NaN", at(0.15), amid()),
        PolicyFault("blow_up", "noise of size 10 on every weight", at(0.30), amid()),
        PolicyFault("last_step", "the same, in the last step of an update", at(0.45), last),
        PolicyFault("returning_blow_up", "the same, again on replay", at(0.60), last, times=2, action="skip"),
        PolicyFault("poisoned_observation", "an environment answers NaN", at(0.78), _TRANSITIONS // 2, action="skip"),
        PolicyFault("last_round", "noise in the very last optimizer step", rounds - 1, last),
    )


@dataclass(slots=True, eq=False)
class PolicyRecord:
    """One whole run.

    Attributes:
        name: ``"clean"``, ``"unguarded"`` or ``"guarded"``.
        digests: Of the train state where each rollout began, and at the end, each with the round that it stands before.
        incidents: With the rounds in which they happened.
        struck: How often each fault struck, by kind.
        evaluation: Mean return of 20 episodes of the greedy policy; NaN where it could not act any more.
        ended_by: The error that ended the run early; empty otherwise.
        dropped: Rounds and rollouts that were not learnt from.
    """

    name: str
    digests: list[tuple[int, str]] = field(default_factory=list)
    incidents: list[tuple[int, Incident]] = field(default_factory=list)
    struck: dict[str, int] = field(default_factory=dict)
    evaluation: float = math.nan
    ended_by: str = ""
    dropped: int = 0

    def states_before(self, number: int) -> list[str]:
        """Digests before that round: several where its rollout was gathered again, none where it was not reached."""
        return [digest for before, digest in self.digests if before == number]

    @property
    def is_solved(self) -> bool:
        """Whether the policy of its end solves the task."""
        return self.evaluation >= SOLVED


def require_runnable(rounds: int) -> None:
    """Raise `CannotRun` for too few rounds, or where Stable-Baselines3 is missing or not of a tested version."""
    if rounds < MIN_ROUNDS:
        raise CannotRun(f"{rounds} rounds are too few to learn CartPole: use --steps {MIN_ROUNDS} or more")
    from tolaria.errors import UnsupportedState
    from tolaria.sb3 import require_tested_version

    try:
        import gymnasium  # noqa: F401

        require_tested_version()
    except (ImportError, UnsupportedState) as error:
        raise CannotRun(f"the workload cartpole cannot run ({error}): pip install 'tolaria[sb3]'") from error


@contextmanager
def looking_distributions() -> Generator[None]:
    """Inside, distributions refuse NaN, as they do unless another package has told all of them not to look."""
    before = Distribution._validate_args
    Distribution.set_default_validate_args(True)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


@looking_distributions()
def train(
    name: str,
    seed: int,
    rounds: int,
    faults: Sequence[PolicyFault],
    *,
    device: torch.device,
    guard: GovernorConfig | None = None,
    tell: Callable[[str, int], None] = lambda *_: None,
) -> tuple[PolicyRecord, PPO]:
    """One run from fresh weights to its evaluation. Equal arguments give equal bits.

    Args:
        name: Of the run.
        seed: Of weights, environments and faults.
        rounds: To train for.
        faults: From `plan`; empty for an undisturbed run.
        device: Of the policy.
        guard: Settings of the governor; None runs without one.
        tell: Called with the name and the number of each round that begins.
    """
    from stable_baselines3.common.callbacks import CallbackList

    from tolaria.drill.cartpole_faults import Injector
    from tolaria.sb3 import TolariaCallback

    record = PolicyRecord(name)
    model = build(seed, rounds, faults, device)
    injector = Injector(faults, record, seed, functools.partial(tell, name))
    callbacks: list[Any] = []
    guarding = None
    if guard is not None:
        guarding = TolariaCallback(guard)
        callbacks.append(guarding)
    try:
        model.learn(rounds * _ENVS * _TRANSITIONS, callback=CallbackList([*callbacks, injector]))
    except Exception as error:
        record.ended_by = f"{type(error).__name__}: {error}".splitlines()[0]
    finally:
        injector.remove()
        if guarding is not None:
            record.dropped = guarding.dropped
            guarding.close()
    record.digests.append((injector.round + 1, state_digest(model)))
    record.evaluation = evaluate(model, seed)
    return record, model


def build(seed: int, rounds: int, faults: Sequence[PolicyFault], device: torch.device) -> PPO:
    """A PPO model with fresh weights and environments; settings that solve CartPole from any seed in 70,000 steps."""
    import gymnasium
    from stable_baselines3 import PPO
    from stable_baselines3.common.vec_env import DummyVecEnv

    from tolaria.drill.cartpole_faults import Poisonous

    poison = {fault.round * _TRANSITIONS + fault.step for fault in faults if fault.kind == "poisoned_observation"}

    def make(number: int) -> gymnasium.Env[Any, Any]:
        env = gymnasium.make("CartPole-v1", disable_env_checker=True)
        return Poisonous(env, poison) if number == _POISONED else env

    makers = [functools.partial(make, number) for number in range(_ENVS)]
    return PPO(
        "MlpPolicy",
        DummyVecEnv(makers),
        n_steps=_TRANSITIONS,
        batch_size=_ENVS * _TRANSITIONS * _EPOCHS // STEPS_PER_ROUND,
        n_epochs=_EPOCHS,
        gamma=0.98,
        gae_lambda=0.9,
        learning_rate=functools.partial(_falling, 2e-3),
        seed=seed,
        device=device,
    )


def _falling(start: float, left: float) -> float:
    return start * left


def state_digest(model: PPO) -> str:
    """Of weights, optimizer and the counter of updates."""
    state = TrainState(model.policy, [model.policy.optimizer])
    return f"{state.digest()}/{model._n_updates}"


@looking_distributions()
def evaluate(model: PPO, seed: int) -> float:
    """Mean return of 20 episodes of the greedy policy in fresh environments; NaN where it cannot act any more."""
    import gymnasium
    import numpy as np

    envs = [gymnasium.make("CartPole-v1", disable_env_checker=True) for _ in range(_EPISODES)]
    observed = [env.reset(seed=10_000 * (seed + 1) + number)[0] for number, env in enumerate(envs)]
    returns, open_ones = [0.0] * _EPISODES, list(range(_EPISODES))
    while open_ones:
        try:
            actions, _ = model.predict(np.stack(observed), deterministic=True)
        except ValueError:  # a distribution refuses NaN
            return math.nan
        for number in list(open_ones):
            observed[number], reward, terminated, truncated, _ = envs[number].step(int(actions[number]))
            returns[number] += float(reward)
            if terminated or truncated:
                open_ones.remove(number)
    return sum(returns) / _EPISODES

"""Stable-Baselines3: `model.learn(n, callback=TolariaCallback())`. Needs the extra `sb3`.

Translates what Stable-Baselines3 calls into rounds (`tolaria.rounds`): `train()` is a round, `collect_rollouts()` is
where experience comes from. There is no hook around either, so while `learn` runs both are replaced on the model
*instance*; afterwards, and in what `model.save` writes, there is no trace of it.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from tolaria.config import GovernorConfig
from tolaria.errors import InvalidConfig, UnsupportedState
from tolaria.governor import TolariaGovernor
from tolaria.judge import Detector
from tolaria.rounds import Rounds
from tolaria.surge import round_detector

_MISSING: ImportError | None = None
if TYPE_CHECKING:
    from stable_baselines3.common.callbacks import BaseCallback
else:
    try:
        from stable_baselines3.common.callbacks import BaseCallback
    except ImportError as _error:  # documentation and type tools may import this module all the same
        BaseCallback, _MISSING = object, _error

OLDEST, NEXT = (2, 7), (2, 10)
"""Versions of Stable-Baselines3 that are tested: from the first up to, but without, the second."""

_OFF_POLICY_EVERY = 100  # `train()` calls between two snapshots where one call is as little as one gradient step
_WORTH_A_SNAPSHOT = 128  # transitions
_ASKED = 1024  # transitions on which the change of the policy is measured


class TolariaCallback(BaseCallback):
    """Guards a Stable-Baselines3 model: weights, target networks, optimizers, entropy coefficient, VecNormalize.

    PPO, A2C, DQN, SAC, TD3, DDPG and whatever else trains in `train()`. Finds everything by itself when `learn` begins.
    Each rollback is one warning of the logger ``tolaria``, and a number in Stable-Baselines3's own table.

    Args:
        config: Settings of the governor. Cadence and probation have no say: whole rounds are judged.
        detector: Judges the signs ``drift`` and, for actor-critic policies on a rollout buffer, ``policy_change``;
            `tolaria.surge.round_detector()` unless given. One of yours may judge what Stable-Baselines3 logs as well
            (`logged_signs`): ``any_of(round_detector(), judge.rl_collapse())``.
        snapshot_every: Calls of `train()` between two snapshots. With 1 every fault in `train()` can be mended without
            loss. None: 1 where each call learns from a rollout of at least 128 transitions; as many calls as have 128
            together where rollouts are shorter (A2C); 100 with a replay buffer.
        verbose: As with other callbacks; without effect.

    Attributes:
        governor: The `TolariaGovernor` of this call of `learn`, closed when that ends; None before the first.
        rollbacks: Rollbacks of this model so far, earlier calls of `learn` included.
        dropped: Rounds and rollouts whose experience was not learnt from, likewise.

    Raises:
        UnsupportedState: Stable-Baselines3 is missing, or of a version that was never tested with this.
        RetryBudgetExceeded: From `learn`: the panics do not end. The model is the last good one.
    """

    def __init__(
        self,
        config: GovernorConfig | None = None,
        *,
        detector: Detector[Any] | None = None,
        snapshot_every: int | None = None,
        verbose: int = 0,
    ) -> None:
        require_tested_version()
        super().__init__(verbose)
        self.governor: TolariaGovernor | None = None
        self.dropped = 0
        self._config, self._detector, self._every = config or GovernorConfig(), detector, snapshot_every
        if self._config.rng == "fork":
            raise InvalidConfig(
                "building TolariaCallback",
                "rng='fork', which would make the second attempt at a round another one than the first",
                "Leave it out, or use rng='keep'.",
            )
        self._rounds: Rounds | None = None
        self._detach: list[Callable[[], None]] = []

    @property
    def rollbacks(self) -> int:
        """Rollbacks so far, all calls of `learn` taken together."""
        return 0 if self.governor is None else self.governor.rollbacks

    def close(self) -> None:
        """Let go of the model and free all snapshots. Idempotent.

        The end of `learn` does it by itself, and so does an error out of `train` or `collect_rollouts`. One that some
        other callback raises between the two does not.
        """
        self._let_go()
        if self.governor is not None:
            self.governor.close()

    # ------------------------------------------------------------ hooks of Stable-Baselines3

    def _on_training_start(self) -> None:
        model, former = self.model, self.governor
        self.close()  # an earlier `learn` may have been ended by an error
        governor = self._attach_governor(model)
        if former is not None and former.model is model.policy:
            governor.load_state_dict(former.state_dict())  # counters, and what the detectors remember
        else:
            self.dropped = 0
        self._replace("train", self._train)
        self._replace("collect_rollouts", self._collect)
        self._replace("_excluded_save_params", self._exclude)
        self._log()

    def _attach_governor(self, model: Any) -> TolariaGovernor:
        """Find what there is, and govern it."""
        methods = ("evaluate_actions",) if _has_rollouts(model) and hasattr(model.policy, "evaluate_actions") else ()
        self.governor = governor = TolariaGovernor(
            model.policy,
            list(optimizers(model)),
            config=self._config,
            detector=self._detector or round_detector(),
            sections=methods,
        )
        governor.register("sb3.n_updates", (lambda: model._n_updates, functools.partial(_set_updates, model)))
        if model.get_vec_normalize_env() is not None:
            governor.register("sb3.vec_normalize", (lambda: statistics(model), functools.partial(refill, model)))
        self._rounds = Rounds(governor, snapshot_every=self._every or _usual_cadence(model))
        return governor

    def _on_step(self) -> bool:
        """Refuse observations and rewards that are not finite, before they reach policy or buffer."""
        if self._rounds is None or not self._rounds.is_acting:
            return True
        seen = [("observation", self.locals.get("new_obs")), ("reward", self.locals.get("rewards"))]
        normalize = self.model.get_vec_normalize_env()
        if normalize is not None:  # has spread a NaN to all environments already; what it was given shows whose it was
            seen = [("observation", normalize.get_original_obs()), ("reward", normalize.get_original_reward()), *seen]
        for what, value in seen:
            bad = poisoned_environments(value)
            if bad:
                raise _Poisoned(f"non-finite {what} of environments {', '.join(map(str, bad))}")
        for number, info in enumerate(self.locals.get("infos", ())):
            if poisoned_environments(_batched(info.get("terminal_observation"))):
                raise _Poisoned(f"non-finite last observation of environments {number}")
        return True

    def _on_training_end(self) -> None:
        # nothing is left to judge: the last round was judged inside `train`
        self.close()

    # ------------------------------------------------------------ rounds

    def _train(self, train: Callable[[], Any]) -> None:
        assert self._rounds is not None  # made before `train` was replaced
        before = {key: value for key, value in self.logger.name_to_value.items() if key.startswith("train/")}
        result = self._rounds.run(train, signs=self._signs)
        if not result.learnt:
            self.dropped += 1
            values = self.logger.name_to_value  # of a round that was undone
            for key in [key for key in values if key.startswith("train/")]:
                del values[key]
            values.update(before)
        self._log()

    def _signs(self) -> dict[str, float]:
        return {**logged_signs(self.logger.name_to_value, self.model), **policy_change(self.model)}

    def _collect(self, collect: Callable[[], Any]) -> Any:
        assert self._rounds is not None
        while True:
            self._rounds.snapshot()
            try:
                return collect()
            except _Poisoned as poisoned:
                self._rounds.reject(str(poisoned))
            self.dropped += 1
            restart(self.model)
            self._log()

    def _exclude(self, excluded: Callable[[], list[str]]) -> list[str]:
        return [*excluded(), "train", "collect_rollouts", "_excluded_save_params"]

    def _log(self) -> None:
        """Into the table that Stable-Baselines3 prints next."""
        self.logger.record("tolaria/rollbacks", self.rollbacks)
        self.logger.record("tolaria/dropped", self.dropped)

    # ------------------------------------------------------------ attaching

    def _replace(self, name: str, run: Callable[[Callable[[], Any]], Any]) -> None:
        """Let `run` decide about calls of one of the model's methods."""
        model = self.model
        previous = vars(model).get(name)
        plain = getattr(type(model), name) if previous is None else previous.__func__

        @functools.wraps(plain)
        def method(caller: Any, *args: Any, **kwargs: Any) -> Any:
            if caller is not model:  # a deep copy, which nobody governs
                return plain(caller, *args, **kwargs)
            try:
                return run(functools.partial(plain, caller, *args, **kwargs))
            except BaseException:  # it ends `learn`, which would tell nobody
                self.close()
                raise

        vars(model)[name] = types.MethodType(method, model)

        def detach() -> None:
            if getattr(vars(model).get(name), "__func__", None) is method:
                if previous is None:
                    del vars(model)[name]
                else:
                    vars(model)[name] = previous

        self._detach.append(detach)

    def _let_go(self) -> None:
        while self._detach:
            self._detach.pop()()


class _Poisoned(Exception):
    """Ends a rollout. Never leaves this module."""


def require_tested_version() -> None:
    """Raise `UnsupportedState` unless a tested version of Stable-Baselines3 is installed."""
    doing, fix = "building TolariaCallback", "pip install 'tolaria[sb3]'"
    if _MISSING is not None:
        raise UnsupportedState(doing, f"Stable-Baselines3 cannot be imported ({_MISSING})", fix) from _MISSING
    found = metadata.version("stable-baselines3")
    if not OLDEST <= tuple(map(int, found.split(".")[:2])) < NEXT:
        tested = f">={'.'.join(map(str, OLDEST))},<{'.'.join(map(str, NEXT))}"
        raise UnsupportedState(
            doing, f"Stable-Baselines3 is {found}, tested are {tested}", f"pip install 'stable-baselines3{tested}'"
        )


# ---------------------------------------------------------------- what a model consists of


def _has_rollouts(model: Any) -> bool:
    return getattr(model, "rollout_buffer", None) is not None


def _usual_cadence(model: Any) -> int:
    if not _has_rollouts(model):
        return _OFF_POLICY_EVERY
    return math.ceil(_WORTH_A_SNAPSHOT / min(_WORTH_A_SNAPSHOT, model.n_steps * model.n_envs))


def optimizers(model: Any) -> Iterator[Optimizer]:
    """Every optimizer of a model once: those of the policy's modules, and the entropy coefficient's."""
    seen: set[int] = set()
    for owner in (model, *model.policy.modules()):
        for value in vars(owner).values():
            if isinstance(value, Optimizer) and id(value) not in seen:
                seen.add(id(value))
                yield value


def _set_updates(model: Any, count: int) -> None:
    model._n_updates = count


def statistics(model: Any) -> dict[str, Any]:
    """Means and variances of the model's `VecNormalize`. Its returns of open episodes belong to the environments."""
    normalize = model.get_vec_normalize_env()  # `set_env` may have exchanged it
    of_inputs = normalize.obs_rms if normalize.norm_obs else None
    if isinstance(of_inputs, dict):
        return {"obs": {key: dict(vars(rms)) for key, rms in of_inputs.items()}, "ret": dict(vars(normalize.ret_rms))}
    return {"obs": None if of_inputs is None else dict(vars(of_inputs)), "ret": dict(vars(normalize.ret_rms))}


def refill(model: Any, saved: Mapping[str, Any]) -> None:
    """The inverse of `statistics`."""
    normalize = model.get_vec_normalize_env()
    vars(normalize.ret_rms).update(saved["ret"])
    if isinstance(normalize.obs_rms, dict) and saved["obs"] is not None:
        for key, rms in normalize.obs_rms.items():
            vars(rms).update(saved["obs"][key])
    elif saved["obs"] is not None:
        vars(normalize.obs_rms).update(saved["obs"])


def restart(model: Any) -> None:
    """Every environment begins an episode: no advantage is computed across the break."""
    model._last_obs = model.env.reset()
    model._last_episode_starts = [True] * model.env.num_envs
    normalize = model.get_vec_normalize_env()
    if normalize is not None:
        model._last_original_obs = normalize.get_original_obs()


def _batched(observation: Any) -> Any:
    if observation is None:
        return None
    if isinstance(observation, dict):
        return {key: _batched(value) for key, value in observation.items()}
    return observation[None]


def poisoned_environments(value: Any) -> list[int]:
    """Numbers of the environments with a NaN or an infinity in `value`: shape [envs, ...], or a dict of such arrays."""
    if value is None:
        return []
    if isinstance(value, dict):
        return sorted({number for one in value.values() for number in poisoned_environments(one)})
    array = torch.as_tensor(value)
    if not array.is_floating_point():
        return []
    finite = array.reshape(len(array), -1).isfinite().all(dim=1)
    return [number for number, good in enumerate(finite.tolist()) if not good]


def logged_signs(values: Mapping[str, Any], model: Any) -> dict[str, float]:
    """What Stable-Baselines3 has logged of the round just learnt, by the names that `judge.rl_collapse` knows.

    ``approx_kl``, ``entropy`` (where the policy has one), ``explained_variance``, and ``metric``, the mean reward of
    the last episodes. Values that are not finite say nothing and are left out: of returns that are all alike nothing
    can be explained.
    """
    found = {name: values.get(f"train/{name}") for name in ("approx_kl", "explained_variance")}
    loss = values.get("train/entropy_loss")
    found["entropy"] = None if loss is None else -loss
    rewards = [episode["r"] for episode in model.ep_info_buffer or ()]
    found["metric"] = sum(rewards) / len(rewards) if rewards else None
    return {name: float(value) for name, value in found.items() if value is not None and math.isfinite(value)}


def policy_change(model: Any) -> dict[str, float]:
    """How far the policy is from the one that collected the rollout: ``mean(log-ratio ** 2) / 2`` in nats.

    Schulman's estimator k2 of the KL divergence (http://joschu.net/blog/kl-approx.html) on up to 1,024 transitions.
    Empty where there is no rollout buffer, or the policy is of another kind than Stable-Baselines3's own actor-critic.
    """
    from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
    from stable_baselines3.common.policies import ActorCriticPolicy

    buffer, policy = getattr(model, "rollout_buffer", None), model.policy
    is_known = isinstance(policy, ActorCriticPolicy) and type(buffer) in (RolloutBuffer, DictRolloutBuffer)
    if buffer is None or not is_known:
        return {}
    was_training = policy.training
    policy.set_training_mode(False)
    try:
        drawn = next(iter(buffer.get(min(_ASKED, buffer.buffer_size * buffer.n_envs))))
        discrete = type(model.action_space).__name__ == "Discrete"
        actions = drawn.actions.long().flatten() if discrete else drawn.actions
        _, log_prob, _ = policy.evaluate_actions(drawn.observations, actions)
        return {"policy_change": float((log_prob - drawn.old_log_prob).double().square().mean() / 2)}
    finally:
        policy.set_training_mode(was_training)

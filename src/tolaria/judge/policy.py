"""Collapse of a policy in reinforcement learning."""

from __future__ import annotations

from math import inf
from typing import Any

from tolaria.judge.collapse import collapse
from tolaria.judge.combine import any_of
from tolaria.judge.detector import Detector
from tolaria.judge.surge import surge
from tolaria.records import VitalSigns


def rl_collapse(
    *,
    kl: str = "approx_kl",
    entropy: str = "entropy",
    explained_variance: str = "explained_variance",
    ratio: float = 20.0,
) -> Detector[Any]:
    """Panic when a policy collapses: the KL to the last policy explodes, its entropy dies, or all reward is lost.

    Also when its critic does: the explained variance of the returns is back at 0, where a constant is.

    Reads `VitalSigns.metric` as the reward. Not part of `default_detector`, so join them:
    `any_of(default_detector(), rl_collapse())`.

    Args:
        kl: Name of the approximate KL divergence among `VitalSigns.extra`; `ratio` times its median, 8 steps.
        entropy: Name of the entropy; a `ratio`-th of its median, 8 steps. Only positive values are judged.
        explained_variance: Name of the share of the returns' variance that the critic explains.
        ratio: See above.

    Returns:
        The detector. Reasons: ``"policy update explosion"``, ``"entropy collapse"``, ``"reward collapse"`` (back where
        the reward began for 16 steps, from high above), ``"critic collapse"`` (the same of the explained variance).
    """

    def inverse_entropy(signs: VitalSigns) -> float | None:
        value = signs.extra.get(entropy)
        return None if value is None or value <= 0.0 or 1.0 / value == inf else 1.0 / value

    def lost_reward(signs: VitalSigns) -> float | None:
        return None if signs.metric is None else -signs.metric

    def unexplained(signs: VitalSigns) -> float | None:
        value = signs.extra.get(explained_variance)
        return None if value is None else -value

    return any_of(
        surge(lambda signs: signs.extra.get(kl), "policy update explosion", ratio=ratio, steps=8),
        surge(inverse_entropy, "entropy collapse", ratio=ratio, steps=8),
        collapse(sign=lost_reward, reason="reward collapse", steps=16),
        collapse(sign=unexplained, level=0.0, reason="critic collapse", steps=16),
    )

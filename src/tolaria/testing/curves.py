"""Made loss curves to measure detectors on: healthy ones with awkward noise, and rises spliced into healthy ones.

Plain Python, drawn from the `random.Random` that is passed in: the same seed gives the same curve everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from random import Random
from statistics import median, pstdev

Curve = list[float]


def step_noise(losses: Sequence[float], *, robust: bool) -> float:
    """Standard deviation of the step-to-step noise: of the differences of neighbours, over the square root of two.

    Args:
        losses: Neighbouring losses, 20 or more.
        robust: From the median absolute deviation, which one-step outliers do not widen.
    """
    steps = [after - before for before, after in pairwise(losses)]
    if not robust:
        return pstdev(steps) / math.sqrt(2.0)
    centre = median(steps)
    return 1.4826 * median(abs(step - centre) for step in steps) / math.sqrt(2.0)


# ---------------------------------------------------------------- healthy, with awkward noise


def student_t(draw: Random, freedom: float) -> float:
    """One draw of Student's t."""
    return draw.gauss(0.0, 1.0) / math.sqrt(2.0 * draw.gammavariate(0.5 * freedom, 1.0) / freedom)


def pareto(draw: Random, steps: int) -> Curve:
    """Pareto(1.5) noise, which has no variance, on a level that comes down."""
    gain, size = draw.choice((0.0, 3.0, 30.0)), draw.choice((0.05, 1.0))
    return [size * (gain * math.exp(-i / 400) + draw.paretovariate(1.5)) for i in range(steps)]


def student(draw: Random, steps: int) -> Curve:
    """Student's t with two degrees of freedom, around zero or around a level that comes down."""
    level, size = draw.choice((0.0, 3.0)), draw.choice((0.1, 1.0))
    return [level * (1.0 + 2.0 * math.exp(-i / 300)) + size * student_t(draw, 2.0) for i in range(steps)]


def negative(draw: Random, steps: int) -> Curve:
    """A likelihood that goes from above zero to far below."""
    tau, depth = draw.choice((200.0, 2000.0)), draw.choice((5.0, 50.0))
    noise = draw.choice((0.05, 1.0))
    return [2.0 - depth * (1.0 - math.exp(-i / tau)) + draw.gauss(0.0, noise) for i in range(steps)]


def near_zero(draw: Random, steps: int) -> Curve:
    """Almost solved: noise as large as the loss, far below one, and now and then a hard example."""
    floor, hard = 10.0 ** draw.uniform(-8.0, -3.0), draw.choice((0.0, 0.003, 0.01))
    return [
        (floor + math.exp(-i / 150)) * abs(draw.gauss(0.0, 1.0)) ** draw.choice((1.0, 2.0))
        + (draw.uniform(0.1, 1.0) if draw.random() < hard else 0.0)
        for i in range(steps)
    ]


def rate_drops(draw: Random, steps: int) -> Curve:
    """The learning rate is divided by ten now and then: the loss falls within a few steps, and its noise with it."""
    curve: Curve = []
    level, noise, target = 3.0, draw.choice((0.03, 0.1)), 2.0
    every = draw.choice((300, 1000, 3000))
    for i in range(steps):
        if i and i % every == 0:
            target, noise = 0.3 * target + 0.4 * level, noise * draw.choice((0.5, 0.8))
        level += (target - level) / (15.0 if i > every else 150.0)
        curve.append(level * (1.0 + draw.gauss(0.0, noise)))
    return curve


def batch_sizes(draw: Random, steps: int) -> Curve:
    """The batch size is changed by factors up to 16, either way: the level stays, the noise changes at once."""
    curve: Curve = []
    noise = 0.05
    for i in range(steps):
        if i and i % 400 == 0:
            noise = 0.05 * draw.choice((0.25, 0.5, 1.0, 2.0, 4.0))
        curve.append(2.0 + 2.0 * math.exp(-i / 300) + draw.gauss(0.0, noise))
    return curve


def value_loss(draw: Random, steps: int) -> Curve:
    """PPO-like: a value loss that falls within each rollout and jumps with the next, as the returns grow and wander."""
    curve: Curve = []
    returns, period = 0.0, draw.choice((10, 32, 40))
    jump = 1.0
    for i in range(steps):
        if i % period == 0:
            returns += draw.gauss(0.0, 0.08) - 0.02 * (returns - 1.5 * (1.0 - math.exp(-i / 3000)))
            jump = math.exp(draw.gauss(0.0, 0.2))
        fade = 0.4 + 0.6 * jump * math.exp(-2.0 * (i % period) / period)
        curve.append(math.exp(returns + draw.gauss(0.0, 0.35)) * fade - 0.01 * draw.gauss(1.0, 0.5))
    return curve


def policy_loss(draw: Random, steps: int) -> Curve:
    """PPO-like: around zero, either sign, its size wandering, its level drifting with the entropy bonus."""
    curve: Curve = []
    size, drift = 0.0, 0.0
    for _ in range(steps):
        size += draw.gauss(0.0, 0.03) - 0.002 * size
        drift = 0.995 * drift + draw.gauss(0.0, 0.02)
        curve.append(0.02 * math.exp(size) * (drift + student_t(draw, 4.0)) - 0.005)
    return curve


def wandering(draw: Random, steps: int) -> Curve:
    """Off-policy RL: noise that remembers, on a level that wanders back and forth."""
    curve: Curve = []
    slow, fast = 0.0, 0.0
    memory = draw.choice((0.7, 0.9))
    for _ in range(steps):
        slow = 0.998 * slow + draw.gauss(0.0, 0.03)
        fast = memory * fast + draw.gauss(0.0, 0.3)
        curve.append(2.0 + slow + fast * 0.5 + draw.gauss(0.0, 0.3))
    return curve


STRESS: dict[str, Callable[[Random, int], Curve]] = {
    "Pareto(1.5) noise": pareto,
    "Student-t(2) noise": student,
    "negative losses": negative,
    "near-zero losses": near_zero,
    "learning rate drops": rate_drops,
    "batch size changes": batch_sizes,
    "PPO-like value loss": value_loss,
    "PPO-like policy loss": policy_loss,
    "wandering, correlated": wandering,
}
"""Healthy curves by name: makers that take random numbers and a number of steps."""


# ---------------------------------------------------------------- spliced into a healthy run


def risen(losses: Sequence[float], height: float) -> Curve:
    """All of them higher."""
    return [loss + height for loss in losses]


def ramped(losses: Sequence[float], height: float, steps: int) -> Curve:
    """Rising by `height` in `steps` steps, and going on."""
    return [loss + height * (i + 1) / steps for i, loss in enumerate(losses)]


def spiked(losses: Sequence[float], height: float, steps: int) -> Curve:
    """The first `steps` of them higher."""
    return [loss + height if i < steps else loss for i, loss in enumerate(losses)]

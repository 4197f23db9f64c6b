"""A rise too slow or too small for a spike: where the last losses lie, against the lowest they have been."""

from __future__ import annotations

from itertools import pairwise
from math import inf, isfinite, sqrt
from typing import NamedTuple

from tolaria.judge.detector import RESOLUTION, Detector, difference, healthy, hump, median, require
from tolaria.records import Health, Verdict, VitalSigns

_BLOCK = 8  # losses whose median is one block
_NEAR = 4  # blocks whose median is suspicious first: 32 losses
_SLOW = 8  # blocks whose median is a level: 64 losses
_LEVELS = 256  # levels remembered, one per block: 2,048 steps
_REACH = 56  # levels whose lowest a rise is measured from: slower ones are the run's own course
_SPREADS = 96  # blocks whose noise is remembered
_NOISE_NOW = 6  # blocks whose noise is that of now
_WARM_UP = 60  # blocks before the first verdict: 480 steps
_SURE = 96  # blocks before a slow rise panics: 768 steps, which still catches a ramp from step 500 on
_NORMAL = 1.0483  # standard deviation of normal losses, in median distances of neighbours
_ROAMING = 12.0  # a rise between levels that is common in a run counts that many times
_APART = (2, 8)  # pairs of levels that tell it: 64 and 256 steps apart
_FEW = 8  # of such pairs; fewer do not show it yet, and somewhat more show it less clearly
_WHITE = 0.4  # such a rise that noise without memory makes by itself, in units of noise
_YOUNG = 120  # levels; with fewer nobody knows yet how a run roams, and a rise has to be larger
_CAUTION = 1.15
_LATELY = 32  # levels that do not tell how a run roams, since they may be what is judged: 256 steps
_SUSPECT = 0.95  # rise that is suspicious, in units of noise
_CONFIRM = 2  # suspicious blocks before the one that panics
_FAR = 8.0  # a loss that far above the lowest level is a disturbance
_STUCK = 12  # suspicious blocks after a disturbance that are a plateau
_LONGEST = 64  # suspicious blocks after which this is the new normal
_RELEARN = 32  # blocks after a panic that nobody answered, after which this is the new normal

_RISE, _PLATEAU = "slow loss rise", "plateau after damage"


class DriftState(NamedTuple):
    """What is remembered.

    Attributes:
        pending: Losses of the block that is not full yet.
        blocks: Medians of the last blocks.
        levels: Medians of the last 64 losses at the end of each block.
        spreads: Noise within each block, from the distances of neighbours.
        roaming: Least of what the levels are taken to rise within 64 steps, since a panic that nobody answered.
        quiet: Blocks since the last disturbance.
        onset: First step of the episode; None outside one.
        length: Suspicious blocks of it so far, or blocks since its panic.
        damaged: It began with a disturbance.
        panicked: Its panic has been reported.
    """

    pending: tuple[float, ...] = ()
    blocks: tuple[float, ...] = ()
    levels: tuple[float, ...] = ()
    spreads: tuple[float, ...] = ()
    roaming: float = 0.0
    quiet: int = _LEVELS
    onset: int | None = None
    length: int = 0
    damaged: bool = False
    panicked: bool = False


def loss_drift(*, threshold: float = 1.8, proportion: float = 3.0) -> Detector[DriftState]:
    """Panic on a loss that rose slowly, or a little and for good: the median of the last 64 against the lowest before.

    Judged every 8 steps, from step 480 on; a slow rise panics from step 768 on. The unit is the largest of the
    step-to-step noise, the highest hump of the last 2,048 steps that healed by itself, and how far the run roams within
    64 or 256 steps when all is well. Panics are rises by `threshold` units within 450 steps (a little more in the first
    1,000 steps), and smaller ones that follow a disturbance (a loss far above the level) and have not healed after 100
    steps.

    Args:
        threshold: Rise that panics, in units of noise.
        proportion: Rise that panics, in heights of healed humps.

    Returns:
        The detector. Reasons: ``"slow loss rise"``, ``"plateau after damage"``.

    Raises:
        InvalidConfig: A `threshold` that is not above what is suspicious, or a `proportion` below 1.
    """
    require("loss_drift", threshold=(threshold, _SUSPECT, inf), proportion=(proportion, 1.0, inf))

    def update(state: DriftState, signs: VitalSigns) -> tuple[DriftState, Verdict]:
        loss, step = signs.loss, signs.step
        now = DriftState(*state)
        if loss is None or not isfinite(loss):
            return (now if loss is None or now.panicked else now._replace(quiet=0)), _unchanged(now, step)
        pending = (*now.pending, loss)
        if len(pending) < _BLOCK:
            return now._replace(pending=pending), _unchanged(now, step)
        if now.panicked:
            return _after_panic(now, pending, threshold, proportion, step)
        now = _learn(now, pending)
        if len(now.spreads) < _WARM_UP:
            return now, healthy(step)
        return _decide(now, pending, threshold, proportion, step)

    return Detector(DriftState, update)


def _decide(
    now: DriftState, losses: tuple[float, ...], threshold: float, proportion: float, step: int
) -> tuple[DriftState, Verdict]:
    """The verdict at the end of a block that has been learnt."""
    unit = _unit(now, proportion / threshold)
    low = min(now.levels[-_REACH:])
    if unit <= 0.0:
        return now, healthy(step)
    rise = difference(now.levels[-1], low) / unit
    near = difference(median(now.blocks[-_NEAR:]), low) / unit
    is_disturbed = difference(max(losses), low) / unit >= _FAR
    now = now._replace(quiet=0 if is_disturbed else min(_LEVELS, now.quiet + 1))
    if near < _SUSPECT:
        return now._replace(onset=None, length=0, damaged=False), healthy(step)
    length = now.length + 1
    onset = max(0, step - _NEAR * _BLOCK + 1) if now.onset is None else now.onset
    damaged = now.damaged or (now.onset is None and now.quiet <= _SLOW)
    numbers = {"level": now.levels[-1], "lowest": low, "unit": unit, "rise": max(rise, near), "threshold": threshold}
    caution = _CAUTION if len(now.levels) < _YOUNG else 1.0
    is_sure = len(now.spreads) >= _SURE and length > _CONFIRM
    has_risen = is_sure and min(rise, near) >= caution * threshold
    if has_risen or (damaged and length > _STUCK and rise >= _SUSPECT):
        before = now.levels[: max(1, len(now.levels) - length - _SLOW)]  # what was damage never counts as healed
        after = now._replace(blocks=(), levels=before, onset=onset, length=0, panicked=True)
        return after, Verdict(Health.PANIC, step, _RISE if has_risen else _PLATEAU, onset, numbers)
    if length > _LONGEST:
        return now._replace(levels=now.levels[-1:], onset=None, length=0, damaged=False), healthy(step)
    after = now._replace(onset=onset, length=length, damaged=damaged)
    return after, Verdict(Health.SUSPECT, step, _PLATEAU if damaged else _RISE, onset, numbers)


def _after_panic(
    now: DriftState, losses: tuple[float, ...], threshold: float, proportion: float, step: int
) -> tuple[DriftState, Verdict]:
    """Nobody rolled back: stay suspicious, learning nothing, until the loss is back or this has become the normal."""
    low, unit = min(now.levels[-_REACH:]), _unit(now, proportion / threshold)
    # a run that went on so, or got well by itself, has shown how far it moves
    roaming = max(now.roaming, unit * threshold / _ROAMING)
    if difference(median(losses), low) / unit < _SUSPECT:
        after = now._replace(pending=(), onset=None, length=0, damaged=False, panicked=False, roaming=roaming)
        return after, healthy(step)
    if now.length + 1 >= _RELEARN:
        return DriftState(roaming=roaming), healthy(step)
    return now._replace(pending=(), length=now.length + 1), _unchanged(now, step)


def _unchanged(state: DriftState, step: int) -> Verdict:
    if state.onset is None:
        return healthy(step)
    return Verdict(Health.SUSPECT, step, _PLATEAU if state.damaged else _RISE, state.onset)


def _learn(state: DriftState, losses: tuple[float, ...]) -> DriftState:
    """Take in one block."""
    blocks = (*state.blocks[1 - _SLOW :], median(losses))
    distances = [abs(difference(after, before)) for before, after in pairwise(losses)]
    spreads = (*state.spreads[1 - _SPREADS :], _NORMAL * median(distances))
    levels = (*state.levels[1 - _LEVELS :], median(blocks)) if len(blocks) == _SLOW else state.levels
    return state._replace(pending=(), blocks=blocks, levels=levels, spreads=spreads)


def _unit(state: DriftState, hump_share: float) -> float:
    """What one rise is measured in, in units of loss."""
    noise = median(state.spreads)
    return max(
        noise,
        median(state.spreads[-_NOISE_NOW:]),
        RESOLUTION * abs(state.levels[-1]),
        hump(state.levels[::4]) * hump_share,
        _ROAMING * max(state.roaming, _roaming(state.levels[:-_LATELY], noise)),
    )


def _roaming(levels: tuple[float, ...], noise: float) -> float:
    """A rise between levels of separate losses that every tenth pair exceeds, beyond what noise makes of it."""
    thin = levels[::4]  # of levels that overlap by seven eighths, every fourth one tells as much
    found = 0.0
    for apart in _APART:
        rises = sorted([max(0.0, difference(after, before)) for before, after in zip(thin, thin[apart:], strict=False)])
        if len(rises) >= _FEW:
            common = rises[9 * len(rises) // 10]
            white = _WHITE * noise * (1.0 + _FEW / len(rises))
            if common > white:
                found = max(found, sqrt(common - white) * sqrt(common + white))
    return found

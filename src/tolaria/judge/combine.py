"""Detectors made of detectors."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from typing import Any, NamedTuple

from tolaria.judge.collapse import collapse
from tolaria.judge.detector import Detector, healthy, require
from tolaria.judge.drift import loss_drift
from tolaria.judge.finite import non_finite
from tolaria.judge.spike import loss_spike
from tolaria.judge.surge import gradient_explosion, update_ratio_jump
from tolaria.records import Health, Verdict, VitalSigns

_RANK = {Health.HEALTHY: 0, Health.SUSPECT: 1, Health.PANIC: 2}


class JointState(NamedTuple):
    """State of several detectors.

    Attributes:
        states: Theirs.
        panicked: The panic of the present episode has been reported.
        raised: Which of them have panicked since they were healthy (`all_of`).
        streak: Steps in a row that were not healthy (`sustained`).
    """

    states: tuple[Any, ...]
    panicked: bool = False
    raised: tuple[bool, ...] = ()
    streak: int = 0


def any_of(*detectors: Detector[Any]) -> Detector[JointState]:
    """The worst verdict of several detectors; each sees every step.

    One episode has one PANIC: until all of them are healthy again, what others of them find is SUSPECT. The onset is
    the earliest among those that are not healthy: an episode begins where the first of them became suspicious.

    Raises:
        InvalidConfig: No detector was given.
    """
    require("any_of", detectors=(len(detectors), 1, inf))
    updates = tuple(one.update for one in detectors)

    def update(state: JointState, signs: VitalSigns) -> tuple[JointState, Verdict]:
        before, panicked = state[0], state[1]
        states: list[Any] = []
        alarmed: list[Verdict] = []
        for one, its in zip(updates, before, strict=True):
            its, verdict = one(its, signs)
            states.append(its)
            if verdict.health is not Health.HEALTHY:
                alarmed.append(verdict)
        if not alarmed:
            return JointState(tuple(states)), healthy(signs.step)
        worst = _worst(alarmed)
        if worst.is_panic and panicked:
            worst = replace(worst, health=Health.SUSPECT)
        return JointState(tuple(states), panicked or worst.is_panic), worst

    return Detector(lambda: JointState(tuple(one.init() for one in detectors)), update)


def all_of(*detectors: Detector[Any]) -> Detector[JointState]:
    """Panic when each of several detectors has panicked, within one episode of each; suspicious while any of them is.

    Raises:
        InvalidConfig: No detector was given.
    """
    require("all_of", detectors=(len(detectors), 1, inf))

    def update(state: JointState, signs: VitalSigns) -> tuple[JointState, Verdict]:
        joint = JointState(*state)
        answers = [one.update(its, signs) for one, its in zip(detectors, joint.states, strict=True)]
        states = tuple(its for its, _ in answers)
        raised = tuple(
            verdict.is_panic or (before and verdict.health is not Health.HEALTHY)
            for (_, verdict), before in zip(answers, joint.raised, strict=True)
        )
        alarmed = [verdict for _, verdict in answers if verdict.health is not Health.HEALTHY]
        if not alarmed:
            return JointState(states, raised=raised), answers[0][1]
        panics = all(raised) and not joint.panicked
        worst = replace(_worst(alarmed), health=Health.PANIC if panics else Health.SUSPECT)
        return JointState(states, all(raised), raised), worst

    nobody = (False,) * len(detectors)
    return Detector(lambda: JointState(tuple(one.init() for one in detectors), raised=nobody), update)


def sustained(detector: Detector[Any], steps: int) -> Detector[JointState]:
    """Panic only where a detector has panicked and has not been healthy for that many steps in a row.

    Args:
        detector: Whose panics are held back.
        steps: Steps that are not healthy, the present one included; 1 changes nothing.

    Raises:
        InvalidConfig: `steps` is below 1.
    """
    require("sustained", steps=(steps, 1, inf))

    def update(state: JointState, signs: VitalSigns) -> tuple[JointState, Verdict]:
        joint = JointState(*state)
        its, verdict = detector.update(joint.states[0], signs)
        if verdict.health is Health.HEALTHY:
            return JointState((its,), raised=(False,)), verdict
        streak, raised = joint.streak + 1, joint.raised[0] or verdict.is_panic
        panics = raised and streak >= steps and not joint.panicked
        verdict = replace(verdict, health=Health.PANIC if panics else Health.SUSPECT)
        return JointState((its,), joint.panicked or panics, (raised,), streak), verdict

    return Detector(lambda: JointState((detector.init(),), raised=(False,)), update)


def default_detector() -> Detector[JointState]:
    """What judges a run unless told otherwise; a sign that is not there is not judged.

    Non-finite values, a sustained loss spike, a slow loss rise or a plateau after damage, collapse to the level of a
    random guess, gradient explosion, and a jump of the update ratio.
    """
    return any_of(non_finite(), loss_spike(), loss_drift(), collapse(), gradient_explosion(), update_ratio_jump())


def _worst(verdicts: list[Verdict]) -> Verdict:
    """The first of the gravest, with the earliest onset among all."""
    worst = max(verdicts, key=lambda verdict: _RANK[verdict.health])
    onsets = [verdict.onset for verdict in verdicts if verdict.onset is not None]
    return replace(worst, onset=min(onsets)) if onsets and worst.onset is not None else worst

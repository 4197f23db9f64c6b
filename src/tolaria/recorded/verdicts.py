"""Recorded runs through a detector, step by step, as in `TolariaGovernor` with ``mode="observe"``."""

from __future__ import annotations

from typing import Any

from tolaria.judge import Detector, default_detector
from tolaria.recorded.records import JudgedRun, Panic, RecordedRun, Suspicion
from tolaria.records import Health


def judge_run(run: RecordedRun, detector: Detector[Any] | None = None) -> JudgedRun:
    """Judge every step of a run that is over.

    Args:
        run: Not changed.
        detector: `default_detector()` unless given.
    """
    detector = detector or default_detector()
    state = detector.init()
    panics: list[Panic] = []
    suspicions: list[Suspicion] = []
    lasts = False
    for signs in run.signs:
        state, verdict = detector.update(state, signs)
        if verdict.is_panic:
            onset = signs.step if verdict.onset is None else verdict.onset
            panics.append(Panic(signs.step, verdict.reason, onset, dict(verdict.evidence)))
        is_suspect = verdict.health is Health.SUSPECT
        if is_suspect and lasts:
            suspicions[-1] = Suspicion(suspicions[-1].step, signs.step, suspicions[-1].reason)
        elif is_suspect:
            suspicions.append(Suspicion(signs.step, signs.step, verdict.reason))
        lasts = is_suspect
    return JudgedRun(run, tuple(panics), tuple(suspicions))

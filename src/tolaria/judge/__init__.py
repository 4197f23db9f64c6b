"""JUDGE: detectors that turn the vital signs of a step into a verdict. Pure host numbers: no tensor, no torch.

A detector is a pair of pure functions, `init() -> state` and `update(state, signs) -> (state, verdict)`. States are
values: nested tuples of plain floats, ints, bools and None. A snapshot holds one for free, a rollback puts the old one
back, `json.dumps` writes it and `state_from_json` reads it.

Rules that all detectors keep:

- NaN and infinities never enter a history. A loss of None leaves the history as it is.
- One PANIC per episode, at its trigger; then SUSPECT, with the history frozen, until the signs are normal again.
  Whoever rolls back puts the old state back and never sees that tail; whoever only observes gets one PANIC an event.
- No constant has the unit of a loss: scales come from the run's own past.
- A location is a median and a scale a quantile distance (Hampel 1974: normal consistent, 50 % breakdown). A sustained
  rise is shown by a one-sided cumulative sum (Page 1954) over clipped evidence. What the run has done before and
  recovered from by itself is normal for it.

docs/detection.md says how well they do on recorded and made curves.
"""

from tolaria.judge.collapse import collapse
from tolaria.judge.combine import all_of, any_of, default_detector, sustained
from tolaria.judge.detector import RESOLUTION, Detector, plain_state, state_from_json, state_from_plain
from tolaria.judge.drift import loss_drift
from tolaria.judge.finite import non_finite
from tolaria.judge.policy import rl_collapse
from tolaria.judge.spike import loss_spike
from tolaria.judge.surge import gradient_explosion, surge, update_ratio_jump

__all__ = [
    "RESOLUTION",
    "Detector",
    "all_of",
    "any_of",
    "collapse",
    "default_detector",
    "gradient_explosion",
    "loss_drift",
    "loss_spike",
    "non_finite",
    "plain_state",
    "rl_collapse",
    "state_from_json",
    "state_from_plain",
    "surge",
    "sustained",
    "update_ratio_jump",
]

"""What becomes of one step's numbers: sent by the update, read when they have arrived, judged in order."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from tolaria.measure import TOTALS
from tolaria.observe import BEYOND_MEASURE, Reading, Scalar, mean_sign
from tolaria.records import Health, Verdict, VitalSigns

ROUTINE_SKIPS = 20
"""So many skipped steps in a row are no routine any more."""

EXTRA = "extra:"
"""Prefix of the caller's own signs among the numbers of a `Reading`."""


def own_signs(signs: Mapping[str, torch.Tensor | float]) -> dict[str, Scalar]:
    """The caller's own signs, by the names under which they travel."""
    return {EXTRA + name: mean_sign(value) for name, value in signs.items()}


class Arrived(NamedTuple):
    """One completed step whose numbers are there.

    Attributes:
        signs: To be judged.
        by_scaler: A scaler did not apply the step, which is routine.
        vetoed: It was refused because of its gradients, by the host or on a device.
        kept: And the run goes on from there.
    """

    signs: VitalSigns
    by_scaler: bool
    vetoed: bool
    kept: bool

    def skips(self, before: int) -> int:
        """Skipped steps in a row, with this one, behind so many."""
        return before + 1 if self.by_scaler or (self.vetoed and self.kept) else 0

    def overrule(self, verdict: Verdict, skips: int) -> Verdict:
        """What the detectors say, unless there is something graver than they have seen.

        A veto that is not kept is a panic: what surrounds the step has moved. So are too many skips in a row, once.
        """
        if skips >= ROUTINE_SKIPS and not verdict.is_panic:
            health = Health.PANIC if skips == ROUTINE_SKIPS else Health.SUSPECT
            reason = "GradScaler skips every step" if self.by_scaler else "every step is vetoed"
            verdict = Verdict(health, self.signs.step, reason, self.signs.step, {"skips": float(skips)})
        if not self.vetoed or self.kept or verdict.is_panic:
            return verdict
        onset = self.signs.step if verdict.onset is None else verdict.onset
        return Verdict(Health.PANIC, self.signs.step, "non-finite gradients", onset)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sent:
    """One completed step whose numbers are, perhaps, still on their way.

    Attributes:
        step: Its number.
        reading: ``loss``, ``grad_norm``, ``nonfinite_gradients``, ``nonfinite_weights``, ``scaler_skipped``, ``vetoed``
            (by the device) and ``metric`` where they exist, and the caller's signs; or ``gradients`` and ``weights``
            in their place, as `Measured` enters them.
        skipped: The optimizer step was known not to be applied when it was sent.
        torn: The train state was known to be half written.
        vetoed: The host has refused it because of its gradients.
        keeps_vetoes: Go on after a veto: the refused gradients are nobody's business any more.
        stale: Its backward straddled a rollback: what it tells is about weights that are gone.
    """

    step: int
    reading: Reading
    skipped: bool = False
    torn: bool = False
    vetoed: bool = False
    keeps_vetoes: bool = False
    stale: bool = False

    def read(self) -> Arrived:
        """What there is to judge. Waits for what has not arrived."""
        self.reading.wait()
        numbers, lists = self.reading.numbers, self.reading.lists
        if self.stale:  # only the weights are those of now
            numbers = {name: numbers[name] for name in ("nonfinite_weights",) if name in numbers}
            lists = {name: values for name, values in lists.items() if not name.startswith("gradients")}
        vetoed = self.vetoed or bool(numbers.get("vetoed"))
        by_scaler = bool(numbers.get("scaler_skipped")) and not vetoed
        kept = vetoed and self.keeps_vetoes
        loss, norm = numbers.get("loss"), numbers.get("grad_norm")
        bad, weights = numbers.get("nonfinite_gradients") or 0, numbers.get("nonfinite_weights")
        if lists:
            taken, num_bad = _together(lists, "gradients")
            if taken is not None:
                norm, bad = taken if norm is None else norm, num_bad
            taken, num_bad = _together(lists, "weights")
            if taken is not None:
                weights = num_bad if taken < BEYOND_MEASURE else max(1, num_bad)
        # what a scaler skips is routine: its gradients show nothing
        judges = not kept and not by_scaler
        signs = VitalSigns(
            step=self.step,
            loss=_finite_or_none(loss) if kept else loss,
            grad_norm=norm if judges else None,
            nonfinite_gradients=int(bad) if judges else 0,
            nonfinite_weights=None if weights is None else int(weights),
            metric=numbers.get("metric"),
            extra={
                name.removeprefix(EXTRA): math.nan if value is None else value
                for name, value in numbers.items()
                if name.startswith(EXTRA)
            },
        )
        return Arrived(signs, by_scaler, vetoed, kept)


def _together(lists: Mapping[str, list[float]], name: str) -> tuple[float | None, int]:
    """Of what `Measured.add_to` has sent: the norm of everything, and how many tensors are not finite."""
    single, totals = lists.get(name, ()), lists.get(name + TOTALS, ())
    if not single and not totals:
        return None, 0
    parts = (*single, *totals[::2]) if totals else single
    norm = math.sqrt(sum(map(operator.mul, parts, parts)))
    bad = 0 if math.isfinite(norm) else sum(not math.isfinite(value) for value in single)
    return norm, bad + int(sum(totals[1::2]))


def _finite_or_none(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None

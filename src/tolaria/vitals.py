"""What becomes of one step's numbers: sent by the update, read when they have arrived, judged in order."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tolaria.observe import Reading
from tolaria.records import VitalSigns

EXTRA = "extra:"
"""Prefix of the caller's own signs among the numbers of a `Reading`."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sent:
    """One completed step whose numbers are, perhaps, still on their way.

    Attributes:
        step: Its number.
        reading: ``loss``, ``grad_norm``, ``nonfinite_gradients``, ``nonfinite_weights``, ``scaler_skipped``, ``metric``
            where they exist, and the caller's signs; or lists ``gradients`` and ``weights`` of norms in their place.
        skipped: The optimizer step was known not to be applied when it was sent.
        torn: The train state was known to be half written.
        judges_gradients: False where a veto is kept, so that the refused gradients are nobody's business any more.
    """

    step: int
    reading: Reading
    skipped: bool = False
    torn: bool = False
    judges_gradients: bool = True

    def read(self) -> tuple[VitalSigns, bool]:
        """The vital signs, and whether a scaler skipped the step. Waits for what has not arrived."""
        self.reading.wait()
        numbers, lists = self.reading.numbers, self.reading.lists
        by_scaler = bool(numbers.get("scaler_skipped"))
        loss, norm = numbers.get("loss"), numbers.get("grad_norm")
        bad, weights = numbers.get("nonfinite_gradients") or 0, numbers.get("nonfinite_weights")
        if lists.get("gradients"):
            norm = math.sqrt(sum(each * each for each in lists["gradients"])) if norm is None else norm
            bad = _num_nonfinite(lists["gradients"])
        if "weights" in lists:
            weights = _num_nonfinite(lists["weights"])
        # what a scaler skips is routine: its gradients show nothing
        judges = self.judges_gradients and not by_scaler
        signs = VitalSigns(
            step=self.step,
            loss=loss if self.judges_gradients else _finite_or_none(loss),
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
        return signs, by_scaler


def _num_nonfinite(values: list[float]) -> int:
    return sum(not math.isfinite(value) for value in values)


def _finite_or_none(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None

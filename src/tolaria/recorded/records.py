"""What is read of a recorded run, and what comes of judging it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tolaria.records import VitalSigns


class UnreadableRecord(Exception):
    """A file that holds no recorded run. The message is one line: file, line, what was seen, what was expected."""


@dataclass(frozen=True, slots=True)
class RecordedRun:
    """The vital signs of one run, in order.

    Attributes:
        name: As in the file, or the file's own name where it holds one run.
        file: Where it was read.
        signs: One per recorded step, steps rising.
    """

    name: str
    file: str
    signs: tuple[VitalSigns, ...]


@dataclass(frozen=True, slots=True)
class Panic:
    """One panic: the governor would have rolled back here.

    Attributes:
        step: Where it would have fired.
        reason: The verdict's.
        onset: First step of the episode.
        evidence: The detector's numbers.
    """

    step: int
    reason: str
    onset: int
    evidence: dict[str, float]


@dataclass(frozen=True, slots=True)
class Suspicion:
    """Recorded steps in a row that were suspect, the first and last one included: nothing is certified meanwhile."""

    step: int
    last_step: int
    reason: str


@dataclass(frozen=True, slots=True)
class JudgedRun:
    """A recorded run and its verdicts. After a panic the history stays frozen, since nobody has rolled back."""

    run: RecordedRun
    panics: tuple[Panic, ...]
    suspicions: tuple[Suspicion, ...]

    def as_json(self) -> dict[str, Any]:
        """The object that ``tolaria judge --json`` prints for it."""
        return {
            "run": self.run.name,
            "file": self.run.file,
            "steps": len(self.run.signs),
            "panics": [{"step": one.step, "reason": one.reason, "onset": one.onset} for one in self.panics],
            "suspects": [
                {"step": one.step, "last_step": one.last_step, "reason": one.reason} for one in self.suspicions
            ],
        }

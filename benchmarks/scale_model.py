"""Measured curves, and the few constants that explain them: least squares of relative errors, none of them negative.

A figure is explained by a sum of terms, each a constant times one thing that was varied: one of `UNITS`, or ``fixed``.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from tolaria.bench.records import Spread

FIXED = "fixed"
"""The term that is the same everywhere."""

UNITS: Mapping[str, str] = {
    FIXED: "ms",
    "gigabytes": "ms per GB",
    "tensors": "ms per tensor",
    "streams": "ms per stream",
    "models": "ms per model",
    "snapshots per step": "ms per snapshot",
}
"""What a constant is a constant of, by what it is multiplied with."""


@dataclass(frozen=True, slots=True)
class Point:
    """One place where a figure was measured.

    Attributes:
        curve: Which of the curves it stands on: the thing that is varied there.
        at: All that may explain it, by the names of `UNITS`, without ``fixed``.
        ms: Milliseconds that were measured.
    """

    curve: str
    at: Mapping[str, float]
    ms: Spread


@dataclass(frozen=True, slots=True)
class Fit:
    """What explains a figure.

    Attributes:
        constants: By the name of their term. A term that explains nothing has the constant 0.
        residuals: Of each point: what the terms come to, by what was measured, less 1.
    """

    constants: Mapping[str, float]
    residuals: tuple[float, ...]

    def ms(self, at: Mapping[str, float]) -> float:
        """What the terms come to at one place, in milliseconds."""
        return sum(constant * (1.0 if name == FIXED else at[name]) for name, constant in self.constants.items())

    @property
    def typical(self) -> float:
        """Median size of the residuals."""
        return statistics.median(map(abs, self.residuals))

    @property
    def worst(self) -> float:
        """The residual that is furthest from 0, with its sign."""
        return max(self.residuals, key=abs)

    def describe(self) -> str:
        """One line for people."""
        words = []
        for name, constant in self.constants.items():
            if constant > 0.0:
                words.append(_constant(name, constant))
        return " + ".join(words) + f"; off by {self.typical:.1%} as a rule, {self.worst:+.1%} at worst"


def _constant(name: str, constant: float) -> str:
    if name == "gigabytes":
        return f"bytes at {1e3 / constant:,.0f} GB/s"
    if name == "tensors":
        return f"{constant * 1e3:.3g} us per tensor"
    return f"{constant:.3g} {UNITS[name]}"


def fit(points: Sequence[Point], terms: Sequence[str]) -> Fit:
    """The constants with the least sum of squared relative errors, none of them negative.

    Args:
        points: With medians above 0; at least one for each term.
        terms: Names of `UNITS`; few, because each choice of them is tried.

    Raises:
        ValueError: There are fewer points than terms, or a median is not above 0.
    """
    if len(points) < len(terms):
        raise ValueError(f"{len(points)} points cannot tell {len(terms)} terms apart")
    measured = [point.ms.median for point in points]
    if min(measured) <= 0.0:
        raise ValueError(f"a figure of {min(measured)} ms has no relative error")
    columns = {
        name: [(1.0 if name == FIXED else point.at[name]) / ms for point, ms in zip(points, measured, strict=True)]
        for name in terms
    }
    best: tuple[float, dict[str, float]] | None = None
    for count in range(1, len(terms) + 1):
        for chosen in itertools.combinations(terms, count):
            found = _solve([columns[name] for name in chosen])
            if found is None or min(found[1]) < 0.0:
                continue
            if best is None or found[0] < best[0]:
                best = found[0], dict(zip(chosen, found[1], strict=True))
    assert best is not None  # one positive column alone has a positive constant
    made = Fit({name: best[1].get(name, 0.0) for name in terms}, ())
    residuals = tuple(made.ms(point.at) / ms - 1.0 for point, ms in zip(points, measured, strict=True))
    return Fit(made.constants, residuals)


def _solve(columns: Sequence[Sequence[float]]) -> tuple[float, list[float]] | None:
    """Squared error and constants for ones as the right side; None where these columns are not independent."""
    left = torch.tensor(columns, dtype=torch.float64).T
    sizes = left.norm(dim=0)
    if not bool((sizes > 0.0).all()):
        return None
    scaled = left / sizes
    if int(torch.linalg.matrix_rank(scaled)) < len(columns):
        return None
    right = torch.ones(left.shape[0], 1, dtype=torch.float64)
    constants = torch.linalg.lstsq(scaled, right).solution[:, 0] / sizes
    error = float((left @ constants[:, None] - right).square().sum())
    return error, [float(value) for value in constants]

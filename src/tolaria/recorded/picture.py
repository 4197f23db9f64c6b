"""The picture of judged runs: one loss curve below the other, with panics and suspicions, as an SVG document. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from math import isfinite, log10

from tolaria import svg
from tolaria.recorded.records import JudgedRun
from tolaria.records import VitalSigns

_WIDTH, _HEAD, _ROW = 1200, 64, 190  # of the page, its heading, and one run
_LEFT, _RIGHT, _ABOVE, _PLOT = 76, 1172, 30, 126  # of the plot within a row
_ROOM = 0.06  # of the scale, above and below the curve

_STYLE = """
  .curve { stroke: #0550ae; stroke-width: 1.3 }
  .suspect { fill: #bf8700; fill-opacity: .30 }
  .panic { stroke: #cf222e; stroke-width: 1.6 } .panic-text { fill: #cf222e; font-weight: 600; font-size: 12px }
  .nonfinite { fill: #cf222e }
"""
_DARK_STYLE = """
    .curve { stroke: #79c0ff } .suspect { fill: #d29922 } .panic { stroke: #ff7b72 } .panic-text { fill: #ff7b72 }
    .nonfinite { fill: #ff7b72 }
"""


@dataclass(frozen=True, slots=True)
class _Scale:
    """From steps and losses to places on the page."""

    first: int
    last: int
    low: float
    high: float
    is_logarithmic: bool
    top: float

    def x(self, step: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * (step - self.first) / max(1, self.last - self.first)

    def y(self, loss: float) -> float:
        """What is beyond the scale stands at its edge."""
        share = (self.place(loss) - self.low) / (self.high - self.low)
        return self.top + _PLOT * (1.0 - min(1.0, max(0.0, share)))

    def place(self, loss: float) -> float:
        return log10(loss) if self.is_logarithmic else loss


def draw(runs: Sequence[JudgedRun]) -> str:
    """Draw recorded runs with their verdicts.

    Args:
        runs: One or more; each gets a row of 190 pixels, on a scale of its own that leaves out the highest 1 % of its
            losses (logarithmic where they span more than a factor of 20).

    Returns:
        An SVG document 1200 pixels wide, well-formed XML.
    """
    panics = sum(len(judged.panics) for judged in runs)
    heading = f"tolaria judge: {_count(len(runs), 'run')}, {_count(panics, 'panic')}"
    parts = [
        svg.text(24, 36, heading, "heading"),
        svg.text(_RIGHT, 36, "line: panic, shaded: suspect, dots: not finite", "quiet", "end"),
    ]
    for row, judged in enumerate(runs):
        parts.extend(_row(judged, _HEAD + row * _ROW))
    return svg.document(_WIDTH, _HEAD + _ROW * len(runs), heading, _STYLE, _DARK_STYLE, parts)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _row(judged: JudgedRun, top: float) -> Iterable[str]:
    signs = judged.run.signs
    scale = _scale(signs, top + _ABOVE)
    bottom = scale.top + _PLOT
    yield f'<g class="run" data-run="{escape(judged.run.name)}">'
    words = f"{judged.run.name}: {_count(len(signs), 'step')}, {_count(len(judged.panics), 'panic')}"
    yield svg.text(_LEFT, top + 20, words, "bold")
    yield f'<rect class="panel" x="{_LEFT}" y="{scale.top:.1f}" width="{_RIGHT - _LEFT}" height="{_PLOT}"/>'
    for place in (scale.low, 0.5 * (scale.low + scale.high), scale.high):
        value = 10.0**place if scale.is_logarithmic else place
        yield svg.line(_LEFT, scale.y(value), _RIGHT, scale.y(value), "grid faint")
        yield svg.text(_LEFT - 8, scale.y(value) + 4, f"{value:.3g}", "quiet small", "end")
    for step, anchor in ((scale.first, "start"), (scale.last, "end")):
        yield svg.text(
            scale.x(step), bottom + 16, f"step {step}" if anchor == "start" else str(step), "quiet small", anchor
        )
    for one in judged.suspicions:
        x, end = scale.x(one.step - 0.5), scale.x(one.last_step + 0.5)
        yield (
            f'<rect class="suspect" x="{x:.1f}" y="{scale.top:.1f}" width="{max(0.8, end - x):.1f}" height="{_PLOT}">'
            f"<title>suspect, steps {one.step} to {one.last_step}: {escape(one.reason)}</title></rect>"
        )
    yield _curve(scale, signs)
    for sign in signs:
        if sign.loss is not None and not isfinite(sign.loss):
            yield f'<circle class="nonfinite" cx="{scale.x(sign.step):.1f}" cy="{scale.top:.1f}" r="1.5"/>'
    for panic in judged.panics:
        x = scale.x(panic.step)
        near_end = x > 0.5 * (_LEFT + _RIGHT)
        label = svg.text(
            x + (-6 if near_end else 6),
            scale.top + 15,
            f"{panic.step}: {panic.reason}",
            "panic-text",
            "end" if near_end else "start",
        )
        yield f"<g><title>{escape(panic.reason)}</title>{svg.line(x, scale.top, x, bottom, 'panic')}{label}</g>"
    yield "</g>"


def _scale(signs: Sequence[VitalSigns], top: float) -> _Scale:
    losses = sorted(sign.loss for sign in signs if sign.loss is not None and isfinite(sign.loss))
    losses = losses[: max(1, len(losses) - len(losses) // 100)] or [0.0]
    is_logarithmic = losses[0] > 0.0 and losses[-1] / losses[0] > 20.0
    low, high = (log10(losses[0]), log10(losses[-1])) if is_logarithmic else (losses[0], losses[-1])
    room = max(_ROOM * (high - low), 1e-6 * max(abs(low), abs(high)), 1e-300)
    return _Scale(signs[0].step, signs[-1].step, low - room, high + room, is_logarithmic, top)


def _curve(scale: _Scale, signs: Sequence[VitalSigns]) -> str:
    """Per column of pixels a stroke from its lowest to its highest loss, so that no outlier is lost."""
    columns: dict[int, list[float]] = {}
    for sign in signs:
        if sign.loss is not None and isfinite(sign.loss):
            loss = max(sign.loss, 10.0**scale.low) if scale.is_logarithmic else sign.loss
            columns.setdefault(round(scale.x(sign.step)), []).append(scale.y(loss))
    words: list[str] = []
    for x, ys in columns.items():
        words += [f"{x} {ys[0]:.1f}"] if len(ys) == 1 else [f"{x} {max(ys):.1f}", f"{x} {min(ys):.1f}"]
    return f'<path class="curve" d="M{" L".join(words)}"/>' if words else ""

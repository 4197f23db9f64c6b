"""The picture of a drill: loss curves of three runs with faults and incidents, as an SVG document written by hand.

Pure: records in, text out. Readable on light and dark pages (the colours follow the reader's scheme) and without
colour (every curve has a width or dash of its own). Each fault and incident carries its whole story as a tooltip.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from statistics import median

from tolaria import svg
from tolaria.drill.records import RunAgain, RunRecord, Trained
from tolaria.drill.score import FaultScore, Score
from tolaria.records import Incident
from tolaria.report import describe

_WIDTH, _HEIGHT = 1200, 640
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 1172, 216, 562  # of the plot
_LANE = 26  # height of the lane above the plot, for losses beyond the scale
_CAP = 50.0  # top of the scale
_SMOOTH = 9  # steps of the running median that is drawn

_STYLE = """
  .lane { fill: #fbe9e2 }
  .chance { stroke: #57606a; stroke-width: 1.2; stroke-dasharray: 2 5 }
  .fault { stroke: #8250df; stroke-width: 1.3; stroke-dasharray: 5 4 } .fault-text { fill: #8250df; font-weight: 600 }
  .label { paint-order: stroke; stroke: #ffffff; stroke-width: 5px; stroke-linejoin: round }
  .skipped { fill: #8250df; fill-opacity: .16 }
  .clean { stroke: #afb8c1; stroke-width: 7 }
  .unguarded { stroke: #d1570a; stroke-width: 2 }
  .guarded { stroke: #0550ae; stroke-width: 2.2 }
  .undone { stroke: #218bff; stroke-width: 1.5; stroke-dasharray: 1 4 }
  .incident circle { fill: #ffffff; stroke: #0550ae; stroke-width: 2 }
  .incident path { stroke: #0550ae; stroke-width: 1.5 }
  .name-unguarded { fill: #d1570a; font-weight: 600 }
"""

_DARK_STYLE = """
    .lane { fill: #2d1a12 } .chance { stroke: #9198a1 }
    .label { stroke: #0d1117 } .fault { stroke: #bc8cff } .fault-text { fill: #bc8cff }
    .skipped { fill: #bc8cff; fill-opacity: .22 }
    .clean { stroke: #484f58 } .unguarded { stroke: #f0883e } .guarded { stroke: #79c0ff } .undone { stroke: #58a6ff }
    .incident circle { fill: #0d1117; stroke: #79c0ff } .incident path { stroke: #79c0ff }
    .name-unguarded { fill: #f0883e }
"""


@dataclass(frozen=True, slots=True)
class _Scale:
    """From batches and losses to places on the page."""

    num_batches: int
    floor: float

    def x(self, batch: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * batch / max(1, self.num_batches - 1)

    def y(self, loss: float) -> float:
        """Beyond the scale, and not a number: in the lane above the plot."""
        if not math.isfinite(loss) or loss > _CAP:
            return _TOP - _LANE / 2
        share = math.log(max(loss, self.floor) / self.floor) / math.log(_CAP / self.floor)
        return _BOTTOM - (_BOTTOM - _TOP) * share


def draw(
    clean: RunRecord,
    unguarded: RunRecord,
    guarded: RunRecord,
    score: Score,
    *,
    num_batches: int,
    chance_loss: float,
    heading: str,
) -> str:
    """Draw one drill.

    Args:
        clean: Undisturbed.
        unguarded: Disturbed, without a governor.
        guarded: Disturbed, with one.
        score: What came of it.
        num_batches: Length of the x axis.
        chance_loss: Loss of a model that has learnt nothing, drawn as a line.
        heading: First line of text.

    Returns:
        An SVG document of 1200 x 640, well-formed XML.
    """
    calm = [loss for record in (clean, guarded) for _, loss in _smooth(record.kept) if 0 < loss < _CAP]
    scale = _Scale(num_batches, _round_down(min(calm, default=0.1)))
    parts = [
        *_axes(scale, chance_loss),
        *_skips(scale, score.skipped),
        _curve(scale, "clean", _smooth(clean.kept)),
        _curve(scale, "unguarded", _smooth(unguarded.kept)),
        _curve(scale, "guarded", _smooth(guarded.kept)),
        *_undone(scale, guarded),
        *_faults(scale, guarded, score),
        *_headline(heading, score, clean, unguarded, guarded),
        *_legend(),
    ]
    return svg.document(_WIDTH, _HEIGHT, heading, _STYLE, _DARK_STYLE, parts)


def _round_down(value: float) -> float:
    """The next lower of 1, 2 and 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return max(power * lead for lead in (1, 2, 5) if power * lead <= value * 1.0001)


def _axes(scale: _Scale, chance_loss: float) -> Iterable[str]:
    width = _RIGHT - _LEFT
    yield f'<rect class="panel" x="{_LEFT}" y="{_TOP}" width="{width}" height="{_BOTTOM - _TOP}"/>'
    yield f'<rect class="lane" x="{_LEFT}" y="{_TOP - _LANE}" width="{width}" height="{_LANE}"/>'
    yield svg.text(_LEFT + 8, _TOP - _LANE / 2 + 4, f"above {_CAP:g}, or not finite", "quiet small")
    for power in range(math.floor(math.log10(scale.floor)), math.ceil(math.log10(_CAP)) + 1):
        for lead in (1, 2, 5):
            value = lead * 10.0**power
            if scale.floor * 0.999 <= value <= _CAP * 1.001:
                yield svg.line(_LEFT, scale.y(value), _RIGHT, scale.y(value), "grid" if lead == 1 else "grid faint")
                yield svg.text(
                    _LEFT - 8, scale.y(value) + 4, f"{value:g}", "quiet" if lead == 1 else "quiet small", "end"
                )
    stride = next((s for s in (10, 20, 50, 100, 200, 500) if scale.num_batches / s <= 13), 1000)
    for batch in range(0, scale.num_batches, stride):
        yield svg.line(scale.x(batch), _BOTTOM, scale.x(batch), _BOTTOM + 6, "grid axis")
        yield svg.text(scale.x(batch), _BOTTOM + 22, str(batch), "quiet", "middle")
    yield svg.line(_LEFT, _BOTTOM, _RIGHT, _BOTTOM, "grid axis")
    yield svg.text(_RIGHT, _BOTTOM + 22, "batch", "quiet", "end")
    yield (
        f'<text transform="translate(20 {(_TOP + _BOTTOM) / 2}) rotate(-90)" class="quiet" text-anchor="middle">'
        "training loss</text>"
    )
    yield svg.line(_LEFT, scale.y(chance_loss), _RIGHT, scale.y(chance_loss), "chance")
    yield svg.text(_LEFT + 8, scale.y(chance_loss) - 6, "nothing learnt", "quiet small")


def _smooth(steps: Sequence[Trained]) -> list[tuple[int, float]]:
    """Batches and running medians of their losses; what is not finite counts as infinite."""
    losses = [step.loss if math.isfinite(step.loss) else math.inf for step in steps]
    half = _SMOOTH // 2
    return [(step.batch, median(losses[max(0, i - half) : i + half + 1])) for i, step in enumerate(steps)]


def _curve(scale: _Scale, css: str, points: Sequence[tuple[int, float]]) -> str:
    """A polyline, broken where batches are missing."""
    words: list[str] = []
    previous: int | None = None
    for batch, loss in points:
        command = "L" if previous is not None and batch - previous <= 1 else "M"
        words.append(f"{command}{scale.x(batch):.1f} {scale.y(loss):.1f}")
        previous = batch
    return f'<path class="{css}" d="{" ".join(words)}"/>' if words else ""


def _undone(scale: _Scale, guarded: RunRecord) -> Iterable[str]:
    """What was trained and taken back: the losses from the restored step up to each panic, and a mark at the panic."""
    past: list[Trained] = []
    for event in guarded.events:
        if isinstance(event, Trained):
            past.append(event)
            continue
        if isinstance(event, RunAgain):
            past = [step for step in past if step.step <= event.restored_step]
            continue
        restored = event.step if event.restored_step is None else event.restored_step
        lost = [step for step in past if step.step > restored]
        if lost:
            yield _curve(scale, "undone", [(step.batch, step.loss) for step in lost])
        yield _incident(scale, event, past[-1] if past else None)
        past = [step for step in past if step.step <= restored]


def _incident(scale: _Scale, incident: Incident, at: Trained | None) -> str:
    x, y = (scale.x(at.batch), scale.y(at.loss)) if at is not None else (_LEFT, _TOP)
    return (
        f'<g class="incident" data-step="{incident.step}" data-action="{escape(incident.action)}">'
        f"<title>{escape(describe(incident))}</title>{_mark(x, y)}</g>"
    )


def _mark(x: float, y: float) -> str:
    """A ring with an arrow to the left."""
    arrow = f"M{x + 2.6:.1f} {y:.1f} h-5 m2 -2 l-2 2 l2 2"
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6"/><path d="{arrow}"/>'


def _skips(scale: _Scale, skipped: Sequence[int]) -> Iterable[str]:
    width = scale.x(1) - scale.x(0)
    for batch in skipped:
        yield (
            f'<rect class="skipped" x="{scale.x(batch) - width / 2:.1f}" y="{_TOP}" width="{width:.2f}" '
            f'height="{_BOTTOM - _TOP}"><title>batch {batch}: skipped</title></rect>'
        )


def _faults(scale: _Scale, guarded: RunRecord, score: Score) -> Iterable[str]:
    """A dashed line for each fault, with a label above the plot: two rows, so that neighbours have room."""
    struck = _first_batches(guarded)
    shown = sorted((fault for fault in score.faults if fault.kind in struck), key=lambda fault: struck[fault.kind])
    rows = [106 + 46 * (place % 2) for place in range(len(shown))]
    for fault, y in zip(shown, rows, strict=True):
        yield svg.line(scale.x(struck[fault.kind]), y - 12, scale.x(struck[fault.kind]), _BOTTOM, "fault")
    for fault, y in zip(shown, rows, strict=True):
        x = scale.x(struck[fault.kind])
        x, anchor = (x + 6, "start") if x + 130 < _WIDTH else (x - 6, "end")
        outcome, css = ("recovered", "good") if fault.recovered else ("not recovered", "missed")
        action = fault.incidents[-1].action if fault.incidents else "not detected"
        yield (
            f'<g class="injected" text-anchor="{anchor}"><title>{escape(_story(fault))}</title>'
            f'<text class="label fault-text" x="{x:.1f}" y="{y}">{escape(fault.kind.replace("_", " "))}</text>'
            f'<text class="label small" x="{x:.1f}" y="{y + 16}"><tspan class="quiet">{escape(action)},</tspan>'
            f'<tspan class="{css} bold" dx="4">{outcome}</tspan></text></g>'
        )


def _first_batches(guarded: RunRecord) -> dict[str, int]:
    """The first batch in which each fault struck."""
    first: dict[str, int] = {}
    for event in guarded.events:
        if isinstance(event, Trained):
            for kind in event.struck:
                first.setdefault(kind, event.batch)
    return first


def _story(fault: FaultScore) -> str:
    told = "; then ".join(describe(incident) for incident in fault.incidents) or "never detected"
    return f"{fault.kind.replace('_', ' ')} at step {fault.step}: {told}"


def _headline(heading: str, score: Score, clean: RunRecord, unguarded: RunRecord, guarded: RunRecord) -> Iterable[str]:
    good = sum(fault.recovered for fault in score.faults)
    rollbacks = sum(incident.restored_step is not None for incident in guarded.incidents)
    end = "bit-identical to" if score.is_equal_at_end else "NOT identical to"
    losses = ", ".join(
        f"{record.name} {record.val_loss:.3g}" if score.survived[record.name] else f"{record.name} dead"
        for record in (clean, unguarded, guarded)
    )
    yield svg.text(24, 38, heading, "heading")
    yield svg.text(24, 62, f"validation loss: {losses}", "quiet")
    yield svg.text(
        _RIGHT,
        38,
        f"{good} of {len(score.faults)} faults recovered, {rollbacks} rollbacks, {len(score.false)} of them false",
        "bold",
        "end",
    )
    yield svg.text(_RIGHT, 62, f"the guarded run ended {end} one that never had the skipped batches", "quiet", "end")


def _legend() -> Iterable[str]:
    y = _HEIGHT - 14
    entries = [
        ("clean", "clean run"),
        ("unguarded", "with faults, unguarded"),
        ("guarded", "with faults, guarded"),
        ("undone", "guarded: steps that were undone"),
    ]
    x = float(_LEFT)
    for css, words in entries:
        yield f'<path class="{css}" d="M{x:.1f} {y - 4} h30"/>'
        yield svg.text(x + 38, y, words)
        x += 38 + 7.0 * len(words) + 26
    yield f'<g class="legend incident">{_mark(x + 6, y - 4)}</g>'
    yield svg.text(x + 18, y, "rollback")
    x += 18 + 7.0 * 8 + 26
    yield f'<rect class="skipped" x="{x:.1f}" y="{y - 12}" width="14" height="15"/>'
    yield svg.text(x + 20, y, "skipped batches")

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

from tolaria.drill.records import RunRecord, Trained
from tolaria.drill.score import FaultScore, Score
from tolaria.records import Incident
from tolaria.report import describe

_WIDTH, _HEIGHT = 1200, 640
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 1172, 196, 560  # of the plot
_LANE = 22  # height of the lane above the plot, for losses beyond the scale
_CAP = 100.0  # top of the scale
_SMOOTH = 9  # steps of the running median that is drawn

_STYLE = """
  svg { font-family: ui-sans-serif, system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif; }
  .page { fill: #ffffff } .panel { fill: #f6f8fa } .lane { fill: #fbe9e2 }
  text { fill: #1f2328; font-size: 13px } .quiet { fill: #57606a } .small { font-size: 12px }
  .heading { font-size: 19px; font-weight: 600 } .bold { font-weight: 600 }
  .grid { stroke: #d0d7de; stroke-width: 1 } .faint { stroke-opacity: .45 } .axis { stroke: #8c959f }
  .chance { stroke: #57606a; stroke-width: 1.2; stroke-dasharray: 2 5 }
  .fault { stroke: #8250df; stroke-width: 1.3; stroke-dasharray: 5 4 } .fault-text { fill: #8250df; font-weight: 600 }
  .skipped { fill: #8250df; fill-opacity: .16 }
  path { fill: none; stroke-linejoin: round; stroke-linecap: round }
  .clean { stroke: #afb8c1; stroke-width: 7 }
  .unguarded { stroke: #d1570a; stroke-width: 2 }
  .guarded { stroke: #0550ae; stroke-width: 2.2 }
  .undone { stroke: #218bff; stroke-width: 1.5; stroke-dasharray: 1 4 }
  .incident circle { fill: #ffffff; stroke: #0550ae; stroke-width: 2 }
  .incident path { stroke: #0550ae; stroke-width: 1.5 }
  .missed { fill: #cf222e } .good { fill: #1a7f37 }
  .name-unguarded { fill: #d1570a; font-weight: 600 }
  @media (prefers-color-scheme: dark) {
    .page { fill: #0d1117 } .panel { fill: #161b22 } .lane { fill: #2d1a12 }
    text { fill: #e6edf3 } .quiet { fill: #9198a1 }
    .grid { stroke: #30363d } .axis { stroke: #6e7681 } .chance { stroke: #9198a1 }
    .fault { stroke: #bc8cff } .fault-text { fill: #bc8cff } .skipped { fill: #bc8cff; fill-opacity: .22 }
    .clean { stroke: #484f58 } .unguarded { stroke: #f0883e } .guarded { stroke: #79c0ff } .undone { stroke: #58a6ff }
    .incident circle { fill: #0d1117; stroke: #79c0ff } .incident path { stroke: #79c0ff }
    .missed { fill: #ff7b72 } .good { fill: #3fb950 } .name-unguarded { fill: #f0883e }
  }
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
    kept = [step.loss for record in (clean, guarded) for step in record.kept if 0 < step.loss < _CAP]
    scale = _Scale(num_batches, 10 ** math.floor(math.log10(min(kept, default=0.1))))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" '
        f'role="img" aria-label="{escape(heading)}">',
        f"<title>{escape(heading)}</title><style>{_STYLE}</style>",
        f'<rect class="page" width="{_WIDTH}" height="{_HEIGHT}" rx="10"/>',
        *_axes(scale, chance_loss),
        *_skips(scale, score.skipped),
        _curve(scale, "clean", _smooth(clean.kept)),
        _curve(scale, "unguarded", _smooth(unguarded.kept)),
        _curve(scale, "guarded", _smooth(guarded.kept)),
        *_undone(scale, guarded),
        *_faults(scale, guarded, score),
        *_headline(heading, score, guarded),
        *_legend(),
        "</svg>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _text(x: float, y: float, words: str, css: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{css}" text-anchor="{anchor}">{escape(words)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{css}"/>'


def _axes(scale: _Scale, chance_loss: float) -> Iterable[str]:
    width = _RIGHT - _LEFT
    yield f'<rect class="panel" x="{_LEFT}" y="{_TOP}" width="{width}" height="{_BOTTOM - _TOP}"/>'
    yield f'<rect class="lane" x="{_LEFT}" y="{_TOP - _LANE}" width="{width}" height="{_LANE}"/>'
    yield _text(_LEFT - 8, _TOP - _LANE / 2 + 4, "NaN, ∞", "quiet small", "end")
    decade = scale.floor
    while decade <= _CAP * 1.001:
        yield _line(_LEFT, scale.y(decade), _RIGHT, scale.y(decade), "grid")
        yield _text(_LEFT - 8, scale.y(decade) + 4, f"{decade:g}", "quiet", "end")
        for between in (2, 5):
            if decade * between < _CAP:
                yield _line(_LEFT, scale.y(decade * between), _RIGHT, scale.y(decade * between), "grid faint")
        decade *= 10
    stride = max(1, 10 ** math.floor(math.log10(scale.num_batches)) // 2)
    stride = stride if scale.num_batches / stride > 4 else max(1, stride // 2)
    for batch in range(0, scale.num_batches + 1, stride):
        if scale.x(batch) <= _RIGHT + 2:
            yield _line(scale.x(batch), _BOTTOM, scale.x(batch), _BOTTOM + 6, "grid axis")
            yield _text(scale.x(batch), _BOTTOM + 22, str(batch), "quiet", "middle")
    yield _line(_LEFT, _BOTTOM, _RIGHT, _BOTTOM, "grid axis")
    yield _text((_LEFT + _RIGHT) / 2, _BOTTOM + 44, "batch, in the order of the data", "quiet", "middle")
    yield f'<text transform="translate(22 {(_TOP + _BOTTOM) / 2}) rotate(-90)" class="quiet" text-anchor="middle">training loss</text>'
    yield _line(_LEFT, scale.y(chance_loss), _RIGHT, scale.y(chance_loss), "chance")
    yield _text(_LEFT + 6, scale.y(chance_loss) - 5, "nothing learnt", "quiet small")


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
        restored = event.step if event.restored_step is None else event.restored_step
        lost = [step for step in past if step.step > restored]
        if lost:
            yield _curve(scale, "undone", [(step.batch, step.loss) for step in lost])
        yield _incident(scale, event, past[-1] if past else None)
        past = [step for step in past if step.step <= restored]


def _incident(scale: _Scale, incident: Incident, at: Trained | None) -> str:
    x, y = (scale.x(at.batch), scale.y(at.loss)) if at is not None else (_LEFT, _TOP)
    arrow = f'<path d="M{x + 2.6:.1f} {y:.1f} h-5 m2 -2 l-2 2 l2 2"/>'
    return (
        f'<g class="incident" data-step="{incident.step}" data-action="{escape(incident.action)}">'
        f'<title>{escape(describe(incident))}</title><circle cx="{x:.1f}" cy="{y:.1f}" r="6"/>{arrow}</g>'
    )


def _skips(scale: _Scale, skipped: Sequence[int]) -> Iterable[str]:
    width = scale.x(1) - scale.x(0)
    for batch in skipped:
        yield (
            f'<rect class="skipped" x="{scale.x(batch) - width / 2:.1f}" y="{_TOP}" width="{width:.2f}" '
            f'height="{_BOTTOM - _TOP}"><title>batch {batch}: skipped</title></rect>'
        )


def _faults(scale: _Scale, guarded: RunRecord, score: Score) -> Iterable[str]:
    struck = _first_batches(guarded)
    shown = [fault for fault in score.faults if fault.kind in struck]
    for place, fault in enumerate(sorted(shown, key=lambda fault: struck[fault.kind])):
        x, y = scale.x(struck[fault.kind]), 84 + 46 * (place % 2)
        yield '<g class="injected">'
        yield f"<title>{escape(_story(fault))}</title>"
        yield _line(x, y - 10, x, _BOTTOM, "fault")
        yield _text(x + 6, y, fault.kind.replace("_", " "), "fault-text")
        outcome, css = ("recovered", "good small bold") if fault.recovered else ("not recovered", "missed small bold")
        action = fault.incidents[-1].action if fault.incidents else "not detected"
        yield (
            f'<text x="{x + 6:.1f}" y="{y + 16:.1f}"><tspan class="quiet small">{escape(action)}, </tspan>'
            f'<tspan class="{css}">{outcome}</tspan></text>'
        )
        yield "</g>"


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


def _headline(heading: str, score: Score, guarded: RunRecord) -> Iterable[str]:
    good = sum(fault.recovered for fault in score.faults)
    rollbacks = sum(incident.restored_step is not None for incident in guarded.incidents)
    yield _text(24, 38, heading, "heading")
    end = "ends bit-identical to the reference" if score.is_equal_at_end else "does not end like the reference"
    yield _text(
        _RIGHT,
        38,
        f"{good} of {len(score.faults)} faults recovered, {rollbacks} rollbacks, {len(score.false)} false; {end}",
        "quiet",
        "end",
    )


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
        yield _text(x + 38, y, words)
        x += 38 + 7.0 * len(words) + 26
    yield f'<g class="incident"><circle cx="{x + 6:.1f}" cy="{y - 4}" r="6"/><path d="M{x + 8.6:.1f} {y - 4} h-5 m2 -2 l-2 2 l2 2"/></g>'
    yield _text(x + 18, y, "rollback")
    x += 18 + 7.0 * 8 + 26
    yield f'<rect class="skipped" x="{x:.1f}" y="{y - 12}" width="14" height="15"/>'
    yield _text(x + 20, y, "skipped batches")

"""The picture of `scale.py`: a panel per curve, measured points with quartiles, and lines of what explains them.

Pure: points in, SVG text out. Every series has a shape of its own, for readers without colour.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape

from scale_model import Fit, Point

from tolaria import svg
from tolaria.bench.records import Spread

_WIDTH, _MARGINS = 1200, 100  # the latter above and below all panels together
_COLUMNS, _PANEL_WIDTH, _PANEL_HEIGHT = 3, 384, 350
_SHORT = 24  # characters of a name that has room beside another one
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 370, 34, 236  # of the plot in a panel
_STYLE = """
  .s0 { stroke: #57606a; fill: #57606a } .s1 { stroke: #0550ae; fill: #0550ae } .s2 { stroke: #d1570a; fill: #d1570a }
  .s3 { stroke: #1a7f37; fill: #1a7f37 } .s4 { stroke: #8250df; fill: #8250df } .s5 { stroke: #bf3989; fill: #bf3989 }
  .s6 { stroke: #9a6700; fill: #9a6700 } .s7 { stroke: #1b7c83; fill: #1b7c83 }
  path.curve { fill: none; stroke-width: 1.6; stroke-opacity: .75 } .bar { stroke-width: 1.4 } path.dot { stroke: none }
"""
_DARK_STYLE = """
    .s0 { stroke: #9198a1; fill: #9198a1 } .s1 { stroke: #79c0ff; fill: #79c0ff }
    .s2 { stroke: #f0883e; fill: #f0883e } .s3 { stroke: #3fb950; fill: #3fb950 }
    .s4 { stroke: #bc8cff; fill: #bc8cff } .s5 { stroke: #ff9bce; fill: #ff9bce }
    .s6 { stroke: #d29922; fill: #d29922 } .s7 { stroke: #39c5cf; fill: #39c5cf }
"""
_SHAPES = (
    "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0z",
    "M-3.2-3.2h6.4v6.4h-6.4z",
    "M0-4.4L4 3h-8z",
    "M0-4.6L4.6 0 0 4.6-4.6 0z",
)
_LINE_STEPS = 48


@dataclass(frozen=True, slots=True)
class Series:
    """One figure in one panel.

    Attributes:
        name: For people.
        css: Its colour.
        shape: Of its points.
        points: Places on the x axis and what was measured there.
        line: What explains it, in the same units. Empty where nothing does.
    """

    name: str
    css: str
    shape: str
    points: Sequence[tuple[float, Spread]]
    line: Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Panel:
    """One curve: what is varied on it, and the label of its axes.

    Attributes:
        curve: Its name.
        along: What is varied, by its name in `Point.at`.
        title: Above it.
        y_title: Its unit.
        is_log: Whether the y axis is logarithmic; the x axis always is.
    """

    curve: str
    along: str
    title: str
    y_title: str = "ms"
    is_log: bool = True


PANELS = (
    Panel("size", "gigabytes", "bytes of the train state, GB"),
    Panel("tensors", "tensors", "tensors"),
    Panel("cadence", "cadence", "steps per snapshot", "a step slower by, %", is_log=False),
    Panel("streams", "streams", "busy streams"),
    Panel("models", "models", "governed models", "ms of the host"),
)


def draw(found: Mapping[str, Sequence[Point]], explained: Mapping[str, Fit], heading: str) -> str:
    """Draw all curves that there are.

    Args:
        found: Points by figure.
        explained: What explains them, where anything does.
        heading: First line.

    Returns:
        An SVG document, 1200 wide, well-formed XML.
    """
    parts = [svg.text(24, 34, heading, "heading")]
    words = "points: medians with quartiles; lines: the sum of constants that explains them"
    parts.append(svg.text(24, 56, words, "quiet"))
    shown = [(panel, made) for panel in PANELS if (made := _series(panel, found, explained))]
    for number, (panel, made) in enumerate(shown):
        x, y = 20 + number % _COLUMNS * _PANEL_WIDTH, 76 + number // _COLUMNS * _PANEL_HEIGHT
        parts.append(f'<g transform="translate({x} {y})">')
        parts += _panel(panel, made)
        parts.append("</g>")
    height = _MARGINS + -(-len(shown) // _COLUMNS) * _PANEL_HEIGHT
    return svg.document(_WIDTH, height, heading, _STYLE, _DARK_STYLE, parts)


def _series(panel: Panel, found: Mapping[str, Sequence[Point]], explained: Mapping[str, Fit]) -> list[Series]:
    made: list[Series] = []
    for name, points in found.items():
        here = sorted((p for p in points if p.curve == panel.curve), key=lambda p: p.at[panel.along])
        if here:
            number = len(made)
            places = [(point.at[panel.along], point.ms) for point in here]
            line = _line(panel, here, explained[name]) if name in explained else []
            shown = name.removeprefix(f"{panel.curve}, ")  # the title says it
            made.append(Series(shown, f"s{number % 8}", _SHAPES[number % len(_SHAPES)], places, line))
    return _as_slowdown(made) if panel.curve == "cadence" else made


def _as_slowdown(made: Sequence[Series]) -> list[Series]:
    """Of the steps with snapshots: by how many per cent they are longer than the steps without a governor."""
    by_name = {series.name: series for series in made}
    plain, governed = by_name.get("step without a governor"), by_name.get("step with snapshots")
    if plain is None or governed is None:
        return []
    middles = sorted(spread.median for _, spread in plain.points)
    middle = middles[len(middles) // 2]

    def per_cent(ms: float) -> float:
        return 100.0 * (ms / middle - 1.0)

    points = [
        (x, Spread(per_cent(ms.median), per_cent(ms.low), per_cent(ms.high), ms.count)) for x, ms in governed.points
    ]
    return [replace(governed, points=points, line=[(x, per_cent(ms)) for x, ms in governed.line])]


def _line(panel: Panel, points: Sequence[Point], fit: Fit) -> list[tuple[float, float]]:
    """Along what is varied, all else as at the first point."""
    first, last = points[0].at[panel.along], points[-1].at[panel.along]
    found: list[tuple[float, float]] = []
    for step in range(_LINE_STEPS + 1):
        x = first * (last / first) ** (step / _LINE_STEPS)
        at = {**points[0].at, panel.along: x}
        if panel.along == "cadence":
            at["snapshots per step"] = 1.0 / x
        found.append((x, fit.ms(at)))
    return found


# ---------------------------------------------------------------- panels


@dataclass(frozen=True, slots=True)
class _Scale:
    """From values to places in a panel."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    is_log: bool

    def x(self, value: float) -> float:
        share = math.log(value / self.x_low) / math.log(self.x_high / self.x_low) if self.x_high > self.x_low else 0.5
        return _LEFT + (_RIGHT - _LEFT) * share

    def y(self, value: float) -> float:
        if self.is_log:
            share = math.log(max(value, self.y_low) / self.y_low) / math.log(self.y_high / self.y_low)
        else:
            share = (value - self.y_low) / (self.y_high - self.y_low)
        return _BOTTOM - (_BOTTOM - _TOP) * share


def _scale(panel: Panel, made: Sequence[Series]) -> _Scale:
    xs = [x for series in made for x, _ in series.points]
    ys = [y for series in made for _, ms in series.points for y in (ms.low, ms.high)]
    ys += [y for series in made for _, y in series.line]
    if panel.is_log:
        low = 10.0 ** math.floor(math.log10(min(y for y in ys if y > 0.0)))
        high = 10.0 ** math.ceil(math.log10(max(ys)) + 1e-9)
        return _Scale(min(xs), max(xs), low, max(high, 10.0 * low), True)
    stride = _stride(max(*ys, 0.0) - min(*ys, 0.0))
    low, high = math.floor(min(*ys, 0.0) / stride) * stride, math.ceil(max(*ys, stride) / stride) * stride
    return _Scale(min(xs), max(xs), low, high, False)


def _stride(span: float) -> float:
    """Between grid lines of a straight axis: 1, 2 or 5 times a power of ten, some five of them."""
    rough = max(span, 1e-9) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    return next(lead * power for lead in (1, 2, 5, 10) if lead * power >= rough * 0.999)


def _panel(panel: Panel, made: Sequence[Series]) -> Iterable[str]:
    scale = _scale(panel, made)
    width, height = _RIGHT - _LEFT, _BOTTOM - _TOP
    yield f'<rect class="panel" x="{_LEFT}" y="{_TOP}" width="{width}" height="{height}"/>'
    yield svg.text(_LEFT, _TOP - 12, panel.title, "bold")
    yield svg.text(_RIGHT, _TOP - 12, panel.y_title, "quiet small", "end")
    yield from _grid(scale, made)
    for series in made:
        yield from _drawn(scale, series)
    columns = 2 if all(len(series.name) <= _SHORT for series in made) else 1
    for number, series in enumerate(made):
        x, y = _LEFT + number % columns * 164, _BOTTOM + 42 + number // columns * 17
        yield f'<path class="dot {series.css}" transform="translate({x} {y})" d="{series.shape}"/>'
        yield svg.text(x + 10, y + 4, series.name, "small")


def _grid(scale: _Scale, made: Sequence[Series]) -> Iterable[str]:
    if scale.is_log:
        powers = range(round(math.log10(scale.y_low)), round(math.log10(scale.y_high)) + 1)
        ticks = [10.0**power for power in powers]
    else:
        stride = _stride(scale.y_high - scale.y_low)
        ticks = [scale.y_low + stride * n for n in range(round((scale.y_high - scale.y_low) / stride) + 1)]
    for value in ticks:
        yield svg.line(_LEFT, scale.y(value), _RIGHT, scale.y(value), "grid")
        yield svg.text(_LEFT - 6, scale.y(value) + 4, f"{value:g}", "quiet small", "end")
    written = -math.inf
    for x in sorted({x for series in made for x, _ in series.points}):
        yield svg.line(scale.x(x), _BOTTOM, scale.x(x), _BOTTOM + 5, "grid axis")
        label = f"{x:g}" if x < 1000 else f"{x / 1000:g}k"
        if scale.x(x) - written >= 26:
            yield svg.text(scale.x(x), _BOTTOM + 19, label, "quiet small", "middle")
            written = scale.x(x)


def _drawn(scale: _Scale, series: Series) -> Iterable[str]:
    if series.line:
        words = " L".join(f"{scale.x(x):.1f} {scale.y(y):.1f}" for x, y in series.line)
        yield f'<path class="curve {series.css}" style="fill:none" d="M{words}"/>'
    for x, ms in series.points:
        place = f"{scale.x(x):.1f} {scale.y(ms.median):.1f}"
        story = f"{series.name}: {ms.median:.4g} [{ms.low:.4g}, {ms.high:.4g}] at {x:g}"
        yield svg.line(scale.x(x), scale.y(ms.low), scale.x(x), scale.y(ms.high), f"bar {series.css}")
        yield (
            f'<g transform="translate({place})"><title>{escape(story)}</title>'
            f'<path class="dot {series.css}" d="{series.shape}"/></g>'
        )

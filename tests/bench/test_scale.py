"""`benchmarks/scale.py`: that its constants explain its points, and that report and picture say what was measured."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree

import pytest
import scale
import scale_curves
import scale_picture
import torch
from scale_model import FIXED, Fit, Point, fit
from torch import nn

from tolaria import TolariaGovernor
from tolaria.bench.clock import Clock
from tolaria.bench.records import Spread
from tolaria.bench.workload import Size

CPU = torch.device("cpu")
TINY = Size("tiny", 16, 1, 2, 32, 1, 8)
PLAN = scale_curves.Plan(
    sizes=[4000, 8000],
    sizes_with_one_slot=[],
    tensors_beside_sizes=3,
    tensors=[1, 2],
    bytes_beside_tensors=800,
    streams=[],
    models=[1, 2],
    cadences=[1, 2],
    workload=TINY,
    steps=2,
)


def spread(ms: float) -> Spread:
    return Spread(ms, ms * 0.9, ms * 1.2, 3)


def points(curve: str = "size", *, fixed: float = 0.5, slope: float = 2.0, each: float = 0.001) -> list[Point]:
    """Of a figure that is what three constants make of it."""
    places = [(0.1, 10.0), (1.0, 10.0), (10.0, 10.0), (1.0, 400.0), (1.0, 4000.0)]
    return [
        Point(curve, {"gigabytes": size, "tensors": count}, spread(fixed + slope * size + each * count))
        for size, count in places
    ]


# ---------------------------------------------------------------- constants


def test_constants_are_found_again() -> None:
    found = fit(points(), (FIXED, "gigabytes", "tensors"))
    assert found.constants == pytest.approx({FIXED: 0.5, "gigabytes": 2.0, "tensors": 0.001})
    assert found.ms({"gigabytes": 3.0, "tensors": 100.0}) == pytest.approx(6.6)
    assert max(map(abs, found.residuals)) < 1e-9
    assert found.describe().startswith("0.5 ms + bytes at 500 GB/s + 1 us per tensor; off by 0.0% as a rule")


def test_a_term_that_explains_nothing_is_zero_and_none_is_negative() -> None:
    assert fit(points(each=0.0), (FIXED, "gigabytes", "tensors")).constants["tensors"] == pytest.approx(0.0, abs=1e-12)
    falling = [Point("models", {"models": n}, spread(10.0 - n)) for n in (1.0, 2.0, 4.0)]
    found = fit(falling, (FIXED, "models"))
    assert found.constants["models"] == 0.0
    assert 6.0 < found.constants[FIXED] < 9.0
    assert "per model" not in found.describe()


def test_what_is_small_counts_as_much_as_what_is_large() -> None:
    """Relative errors: 1 ms beside 2 is as bad as 1,000 beside 2,000."""
    two = [Point("size", {"gigabytes": 1.0}, spread(1.0)), Point("size", {"gigabytes": 1000.0}, spread(2000.0))]
    found = fit(two, ("gigabytes",))
    # of 1 c - 1 and 1000/2000 c - 1 the squares are least together where c is 1.2; of absolute ones it would be 2
    assert found.constants["gigabytes"] == pytest.approx(1.2)
    assert found.residuals == pytest.approx((0.2, -0.4))
    assert (found.typical, found.worst) == (pytest.approx(0.3), pytest.approx(-0.4))


def test_terms_that_cannot_be_told_apart_are_not_both_used() -> None:
    together = [Point("x", {"models": n, "streams": 2 * n}, spread(3.0 * n)) for n in (1.0, 2.0, 5.0)]
    found = fit(together, ("models", "streams"))
    assert sorted(value > 0.0 for value in found.constants.values()) == [False, True]
    assert found.ms({"models": 10.0, "streams": 20.0}) == pytest.approx(30.0)


def test_what_has_no_answer_is_refused() -> None:
    with pytest.raises(ValueError, match="1 points cannot tell 2 terms apart"):
        fit(points()[:1], (FIXED, "gigabytes"))
    with pytest.raises(ValueError, match="a figure of 0"):
        fit([Point("size", {}, spread(0.0))], (FIXED,))


def test_host_time_on_a_device_is_explained_without_bytes() -> None:
    assert scale.terms_of("rollback, host", "cuda") == (FIXED, "tensors")
    assert scale.terms_of("rollback", "cuda") == (FIXED, "gigabytes", "tensors")
    assert scale.terms_of("rollback beside streams, host", "cuda") == (FIXED, "streams")
    assert scale.terms_of("models, rollback, streams", "cuda") == (FIXED, "models")


# ---------------------------------------------------------------- the run


@pytest.mark.slow
@pytest.mark.usefixtures("alone")
def test_a_run_its_report_and_its_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts, found = scale.measure(CPU, list(scale.CURVES), 1, tmp_path, PLAN)
    places = {name: [dict(point.at) for point in points] for name, points in found.items()}
    sizes = [{"gigabytes": value / 1e9, "tensors": 3.0} for value in (4000, 8000)]
    tensors = [{"gigabytes": 800 / 1e9, "tensors": value} for value in (1.0, 2.0)]
    for figure in ("flat copy", "snapshot", "sealed", "rollback"):
        assert places.pop(figure) == sizes + tensors
    for figure in ("adding", "step", "snapshot", "rollback"):
        assert places.pop(f"models, {figure}") == [{"models": 1.0}, {"models": 2.0}]
    shares = [{"cadence": 1.0, "snapshots per step": 1.0}, {"cadence": 2.0, "snapshots per step": 0.5}]
    assert places.pop("step with snapshots") == places.pop("step without a governor") == shares
    assert not places
    assert all(point.ms.median > 0.0 for points in found.values() for point in points)
    report = json.loads((tmp_path / "scale.json").read_text())
    assert (report["command"], report["device"], report["rounds"]) == ("scale", "cpu", 1)
    assert scale.read(report) == (facts, found)
    before = (tmp_path / "scale.svg").read_text()
    (tmp_path / "scale.svg").unlink()
    capsys.readouterr()
    scale.main(["--draw", str(tmp_path / "scale.json")])
    assert (tmp_path / "scale.svg").read_text() == before
    printed = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("    ") for line in printed) == sum(map(len, found.values()))


def test_what_was_measured_survives_a_later_curve_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: object) -> scale_curves.Found:
        raise RuntimeError("out of memory")

    def measured(*_: object) -> scale_curves.Found:
        return {"rollback": points()}

    monkeypatch.setattr(
        scale, "CURVES", {"size": (measured, lambda _: 1), "none": (breaks, lambda _: 0), "last": (breaks, lambda _: 1)}
    )
    with pytest.raises(RuntimeError, match="out of memory"):
        scale.measure(CPU, ["size", "none", "last"], 1, tmp_path, PLAN)
    kept = json.loads((tmp_path / "scale.json").read_text())["figures"]
    assert [figure["name"] for figure in kept] == ["rollback"]
    assert kept[0]["constants"]["gigabytes"] == pytest.approx(2.0)
    assert [point["residual"] for point in kept[0]["points"]] == pytest.approx([0.0] * 5, abs=1e-9)


@pytest.mark.usefixtures("alone")
def test_with_one_slot_only_one_gets_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    plain = scale_curves.governed

    @contextmanager
    def counted(model: nn.Module, device: torch.device) -> Iterator[TolariaGovernor]:
        with plain(model, device) as governor:
            yield governor
            held.append(sum(slot.arena is not None for slot in governor._keeper.vault.slots))

    monkeypatch.setattr(scale_curves, "governed", counted)
    model = scale_curves.parameters(4000, 4, CPU)
    found = scale_curves._copies_with_one_slot(model, 4000, Clock(CPU), 2)
    assert held == [1, 1, 1]
    assert {name: len(values) for name, values in found.items()} == {"snapshot": 2, "rollback": 2, "flat copy": 2}
    scale_curves._copies(model, 4000, Clock(CPU), 1)
    assert held[-1] == 2  # the control: there are two


def test_a_large_floor_is_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Fixed:
        def __init__(self, clock: Clock, num_bytes: int) -> None:
            asked.append(num_bytes)

        def copy_ms(self) -> float:
            return 7.0

    monkeypatch.setattr(scale_curves, "Floors", Fixed)
    most = scale_curves.MOST_FLOOR_BYTES
    assert scale_curves._floor(Clock(CPU), 3 * most)() == pytest.approx(21.0)
    assert scale_curves._floor(Clock(CPU), 1000)() == 7.0
    assert asked == [most, 1000]


# ---------------------------------------------------------------- the picture


def drawn(found: scale_curves.Found, explained: dict[str, Fit]) -> ElementTree.Element:
    return ElementTree.fromstring(scale_picture.draw(found, explained, "a <heading>"))


def places(tree: ElementTree.Element, word: str) -> list[tuple[float, float]]:
    """Of the points whose tooltip begins with that word."""
    found: list[tuple[float, float]] = []
    for group in tree.iter("{http://www.w3.org/2000/svg}g"):
        title = group.find("{http://www.w3.org/2000/svg}title")
        if title is not None and (title.text or "").startswith(word):
            x, y = re.findall(r"[-\d.]+", group.attrib["transform"])
            found.append((float(x), float(y)))
    return found


def curves(tree: ElementTree.Element) -> list[list[tuple[float, float]]]:
    """The lines of what explains them."""
    paths = [path.attrib for path in tree.iter("{http://www.w3.org/2000/svg}path")]
    words = [re.findall(r"[-\d.]+", path["d"]) for path in paths if path["class"].startswith("curve")]
    return [[(float(x), float(y)) for x, y in zip(one[::2], one[1::2], strict=True)] for one in words]


def test_points_stand_where_they_belong_and_the_line_goes_through_them() -> None:
    along = [Point("size", {"gigabytes": size, "tensors": 1.0}, spread(10.0 * size)) for size in (0.1, 1.0, 10.0)]
    tree = drawn({"rollback": along}, {"rollback": fit(along, ("gigabytes",))})
    (x0, y0), (x1, y1), (x2, y2) = places(tree, "rollback")
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert y0 > y1 > y2  # more is higher up
    (line,) = curves(tree)
    assert line[0] == pytest.approx((x0, y0), abs=0.2)
    assert line[-1] == pytest.approx((x2, y2), abs=0.2)


def test_cadences_are_drawn_as_slowdown() -> None:
    at = [{"cadence": c, "snapshots per step": 1.0 / c} for c in (1.0, 10.0)]
    plain = [Point("cadence", one, Spread(100.0, 100.0, 100.0, 1)) for one in at]
    slow = [Point("cadence", one, Spread(100.0 + 10.0 / one["cadence"], 101.0, 110.0, 1)) for one in at]
    found = {"step without a governor": plain, "step with snapshots": slow}
    explained = {name: fit(values, scale.terms_of(name, "cuda")) for name, values in found.items()}
    tree = drawn(found, explained)
    assert not places(tree, "step without")
    (_, often), (_, seldom) = places(tree, "step with snapshots: 10 ")[0], places(tree, "step with snapshots: 1 ")[0]
    assert often < seldom
    (line,) = curves(tree)
    assert line[0][1] == pytest.approx(often, abs=0.2)
    assert line[-1][1] == pytest.approx(seldom, abs=0.2)


def test_every_series_of_a_panel_looks_different() -> None:
    found = {f"figure {number}": points() for number in range(8)}
    tree = drawn(found, {})
    marks = [
        (path.attrib["class"], path.attrib["d"])
        for group in tree.iter("{http://www.w3.org/2000/svg}g")
        if group.find("{http://www.w3.org/2000/svg}title") is not None
        for path in group.findall("{http://www.w3.org/2000/svg}path")
    ]
    assert len(set(marks)) == 8
    assert not curves(tree)  # nothing explains them


@pytest.mark.parametrize(("span", "stride"), [(10.0, 2.0), (4.0, 1.0), (0.9, 0.2), (23.0, 5.0)])
def test_grid_lines_are_round(span: float, stride: float) -> None:
    assert math.isclose(scale_picture._stride(span), stride)


def test_nothing_is_written_below_the_page() -> None:
    names = [
        f"models, {what}, {barrier}"
        for barrier in ("context", "streams")
        for what in ("adding", "step", "snapshot", "rollback")
    ]
    along = [Point("models", {"models": count}, spread(1.0)) for count in (1.0, 4.0)]
    tree = drawn(dict.fromkeys(names, along), {})
    lowest = 0.0
    for panel in tree.iter("{http://www.w3.org/2000/svg}g"):
        move = re.match(r"translate\(([-\d.]+) ([-\d.]+)\)", panel.attrib["transform"])
        texts = panel.findall("{http://www.w3.org/2000/svg}text")
        lowest = max([lowest, *(float(move[2]) + float(text.attrib["y"]) for text in texts)] if move else [lowest])
    assert 0.0 < lowest < float(tree.attrib["height"])

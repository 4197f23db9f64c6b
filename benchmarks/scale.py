"""How cost grows: with the bytes of the train state, with tensors, busy streams, governed models, and with the cadence.

    python benchmarks/scale.py [--device cuda] [--curves size tensors] [--rounds 5] [--out scale-report]
    python benchmarks/scale.py --draw scale-report/scale.json

One thing is varied on each curve. Every figure is then explained by a few constants, such as a fixed time, a bandwidth
and a time per tensor, found by least squares of the relative errors over all of its points; what they leave unexplained
is printed beside each point. Writes `scale.json` and `scale.svg` after each curve. On CUDA takes about 100 seconds and
a device of 140 GB; the second form draws and prints again what was measured.

`snapshot` and `rollback` are the copies, on CUDA by events of the device behind a short busy kernel; `host` is the
time that a call holds the host; `sealed` is a call on an idle device until the snapshot is looked through and digested.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # fewer hardware queues would serialise busy streams

import scale_curves
import torch
from scale_model import FIXED, Fit, Point, fit
from scale_picture import draw

import tolaria
from tolaria.bench.clock import Clock
from tolaria.bench.command import open_device
from tolaria.bench.own import name_of
from tolaria.bench.records import Spread
from tolaria.bench.show import Show
from tolaria.records import SCHEMA_VERSION

CURVES: Mapping[str, tuple[Callable[..., scale_curves.Found], Callable[[scale_curves.Plan], int]]] = {
    "size": (scale_curves.sizes, lambda plan: len(plan.sizes) + len(plan.sizes_with_one_slot)),
    "tensors": (scale_curves.tensors, lambda plan: len(plan.tensors)),
    "streams": (scale_curves.streams, lambda plan: len(plan.streams)),
    "cadence": (scale_curves.cadences, lambda plan: len(plan.cadences)),
    "models": (scale_curves.models, lambda plan: len(plan.models)),
}
"""How each curve is measured, and how many places it has."""


def terms_of(figure: str, device: str) -> tuple[str, ...]:
    """What may explain a figure. Calls that copy nothing by themselves cannot depend on bytes."""
    if figure == "flat copy":
        return FIXED, "gigabytes"
    if figure.startswith("rollback beside streams"):
        return FIXED, "streams"
    if figure.startswith("models"):
        return FIXED, "models"
    if figure == "step without a governor":
        return (FIXED,)
    if figure == "step with snapshots":
        return FIXED, "snapshots per step"
    return (FIXED, "tensors") if figure.endswith(", host") and device == "cuda" else (FIXED, "gigabytes", "tensors")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--curves", choices=CURVES, nargs="+", default=list(CURVES))
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each figure at each place")
    parser.add_argument("--out", type=Path, default=Path("scale-report"), help="folder for scale.json and scale.svg")
    parser.add_argument("--draw", type=Path, metavar="FILE", help="measure nothing, draw and print this scale.json")
    given = parser.parse_args(arguments)
    if given.draw:
        facts, found = read(json.loads(given.draw.read_text(encoding="utf-8")))
    else:
        facts, found = measure(open_device(given.device), given.curves, given.rounds, given.out)
    explained = explain(found, facts["device"])
    if given.draw:
        write(given.draw.parent, facts, found, explained)
    print(
        f"{facts['device_name']}, torch {facts['torch']}, Python {facts['python']}; medians of {facts['rounds']}, ms\n"
    )
    for line in table(found, explained):
        print(line)


def measure(
    device: torch.device, curves: Sequence[str], rounds: int, out: Path, plan: scale_curves.Plan | None = None
) -> tuple[dict[str, Any], scale_curves.Found]:
    """The curves in their order.

    Args:
        device: Where.
        curves: Names of `CURVES`.
        rounds: Measurements of each figure at each place.
        out: Folder for the files, which are written anew after each curve.
        plan: The places; those of the device's type unless given.

    Returns:
        What it was measured on and with, and the points.
    """
    plan = plan or (scale_curves.CUDA_PLAN if device.type == "cuda" else scale_curves.CPU_PLAN)
    facts = facts_of(device, rounds)
    clock, found, show = Clock(device), dict[str, list[Point]](), Show(as_json=False)
    with show.running():
        for name, (curve, count) in CURVES.items():
            if name not in curves or not count(plan):
                continue
            for figure, points in curve(plan, clock, rounds, show.part(name, count(plan))).items():
                found.setdefault(figure, []).extend(points)
            write(out, facts, found, explain(found, device.type))
    return facts, found


def facts_of(device: torch.device, rounds: int) -> dict[str, Any]:
    """What is measured on and with."""
    return {
        "schema_version": SCHEMA_VERSION,
        "command": "scale",
        "tolaria": tolaria.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "device": device.type,
        "device_name": name_of(device),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "rounds": rounds,
    }


def explain(found: scale_curves.Found, device: str) -> dict[str, Fit]:
    """The constants of each figure that has points enough."""
    made: dict[str, Fit] = {}
    for figure, points in found.items():
        terms = terms_of(figure, device)
        if len(points) >= len(terms):
            made[figure] = fit(points, terms)
    return made


def table(found: scale_curves.Found, explained: Mapping[str, Fit]) -> list[str]:
    """Lines for people: each figure with its constants, and its points with their residuals."""
    lines: list[str] = []
    for figure, points in found.items():
        known = explained.get(figure)
        lines.append(f"{figure}: {known.describe() if known else 'too few points to explain'}")
        for number, point in enumerate(points):
            where = ", ".join(f"{name} {value:g}" for name, value in point.at.items())
            left = f"{known.residuals[number]:+8.1%}" if known else ""
            ms = point.ms
            lines.append(f"    {where:<42} {ms.median:>10.4g} [{ms.low:.4g}, {ms.high:.4g}] {left}")
    return lines


def write(folder: Path, facts: Mapping[str, Any], found: scale_curves.Found, explained: Mapping[str, Fit]) -> None:
    """`scale.json` and `scale.svg`."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = [
        {
            "name": name,
            "constants": dict(explained[name].constants) if name in explained else None,
            "points": [
                {
                    **asdict(point),
                    "residual": explained[name].residuals[number] if name in explained else None,
                }
                for number, point in enumerate(points)
            ],
        }
        for name, points in found.items()
    ]
    text = json.dumps({**facts, "figures": figures}, allow_nan=False, indent=1)
    (folder / "scale.json").write_text(text + "\n", encoding="utf-8")
    heading = f"How cost grows: {facts['device_name']}, torch {facts['torch']}"
    (folder / "scale.svg").write_text(draw(found, explained, heading), encoding="utf-8")


def read(report: dict[str, Any]) -> tuple[dict[str, Any], scale_curves.Found]:
    """What `write` kept: the facts and the points."""
    found = {
        figure["name"]: [Point(one["curve"], one["at"], Spread(**one["ms"])) for one in figure["points"]]
        for figure in report["figures"]
    }
    return {name: value for name, value in report.items() if name != "figures"}, found


if __name__ == "__main__":
    main()

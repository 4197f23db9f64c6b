"""How well the detectors do: on recorded runs, on rises and spikes spliced into them, and on made curves.

    python benchmarks/judge.py [RUNS.csv.gz [LABELLED.csv.gz LABELS.json]] [--spots 8] [--stress-steps 60000]

RUNS are healthy, the columns as `tolaria judge` reads them. LABELS is a list of objects with `run`, `label` ("healthy",
"panic" or "ignore"), `onset`, and `first_nonfinite` or null. Without files only the made curves are judged. Prints the
tables of docs/detection.md, one row per detector of `baselines.CONTESTANTS`.

A panic run is caught when its first panic is not before its onset, and at most 2 steps after the first non-finite loss
or, where all are finite, 15 after the onset. Spots are random steps after 500; the noise there is that of the 200 steps
before, once from the median absolute deviation and once from the standard deviation of the differences of neighbours.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

from baselines import CONTESTANTS

from tolaria.judge import Detector
from tolaria.recorded.read import read
from tolaria.recorded.records import RecordedRun
from tolaria.records import Health, VitalSigns
from tolaria.testing import curves

SLACK_NONFINITE, SLACK_JUMP = 2, 15
RISE, RISE_WITHIN, SMALL_RISE_WITHIN, RAMP_WITHIN = 3.0, 25, 60, 400


def follow(detector: Detector[Any], signs: Iterable[VitalSigns], state: Any) -> Iterator[tuple[Any, Health]]:
    """States and verdicts, step by step."""
    for one in signs:
        state, verdict = detector.update(state, one)
        yield state, verdict.health


def first(detector: Detector[Any], signs: Sequence[VitalSigns], state: Any, healths: tuple[Health, ...]) -> int | None:
    """Place of the first verdict that is one of `healths`."""
    for place, (_, health) in enumerate(follow(detector, signs, state)):
        if health in healths:
            return place
    return None


def recorded(detector: Detector[Any], healthy: Sequence[RecordedRun], ill: Sequence[tuple[RecordedRun, Any]]) -> str:
    """One row: false panics and suspects on healthy runs; precision, recall and delay."""
    panics, suspects, steps, false_runs = 0, 0, 0, 0
    started = time.process_time()
    for run in healthy:
        counts = Counter(health for _, health in follow(detector, run.signs, detector.init()))
        panics, suspects, steps = (
            panics + counts[Health.PANIC],
            suspects + counts[Health.SUSPECT],
            steps + len(run.signs),
        )
        false_runs += counts[Health.PANIC] > 0
    cost = (time.process_time() - started) / max(1, steps) * 1e6
    caught = 0
    delays: list[int] = []
    for run, label in ill:
        place = first(detector, run.signs, detector.init(), (Health.PANIC,))
        bad = label["first_nonfinite"]
        latest = label["onset"] + SLACK_JUMP if bad is None else bad + SLACK_NONFINITE
        if place is not None and label["onset"] <= run.signs[place].step <= latest:
            caught += 1
            delays.append(run.signs[place].step - label["onset"])
    fired = caught + false_runs
    return (
        f"{panics} on {false_runs} of {len(healthy)} runs | {100 * suspects / max(1, steps):.2f} % | "
        f"{caught / fired if fired else 0:.2f} | {caught}/{len(ill)} | {median(delays) if delays else '-'} | {cost:.0f}"
    )


def spliced(detector: Detector[Any], healthy: Sequence[RecordedRun], spots: int, seed: int) -> str:
    """One row: what of rises, ramps and spikes in healthy runs was found."""
    draw, found, tried = Random(seed), Counter[str](), Counter[str]()
    either = (Health.PANIC, Health.SUSPECT)
    for run in healthy:
        places = range(501, len(run.signs) - SMALL_RISE_WITHIN)
        state, at = detector.init(), 0
        for spot in sorted(draw.sample(places, min(spots, len(places)))):
            for after, _ in follow(detector, run.signs[at:spot], state):
                state = after
            at = spot
            before = [one.loss for one in run.signs[spot - 200 : spot] if one.loss is not None]
            rest = run.signs[spot : spot + RAMP_WITHIN]
            for robust in (True, False):
                unit = curves.step_noise(before, robust=robust)
                name = "MAD" if robust else "deviation"
                trials = [
                    (f"rise {name}", with_losses(rest[:RISE_WITHIN], curves.risen, RISE * unit), (Health.PANIC,)),
                    (f"small {name}", with_losses(rest[:SMALL_RISE_WITHIN], curves.risen, 2.0 * unit), either),
                ]
                if len(rest) == RAMP_WITHIN:
                    trials.append((f"ramp {name}", with_losses(rest, curves.ramped, RISE * unit, 200), (Health.PANIC,)))
                for kind, signs, healths in trials:
                    tried[kind] += 1
                    found[kind] += first(detector, signs, state, healths) is not None
            for length in (1, 2, 3):
                height = 10.0 ** draw.uniform(0.5, 30.0) * curves.step_noise(before, robust=True)
                signs = with_losses(rest[:SMALL_RISE_WITHIN], curves.spiked, height, length)
                tried["spike"] += 1
                found["spike"] += first(detector, signs, state, (Health.PANIC,)) is not None
    kinds = [f"{kind} {name}" for kind in ("rise", "small", "ramp") for name in ("MAD", "deviation")]
    shares = [f"{100 * found[kind] / max(1, tried[kind]):.1f} % of {tried[kind]}" for kind in kinds]
    return " | ".join([*shares, f"{found['spike']} of {tried['spike']}"])


def with_losses(signs: Sequence[VitalSigns], change: Any, *settings: float) -> list[VitalSigns]:
    """The same steps with other losses; the gradient norm is left out, since it would tell that nothing happened."""
    losses = change([one.loss for one in signs], *settings)
    return [VitalSigns(step=one.step, loss=loss) for one, loss in zip(signs, losses, strict=True)]


def stressed(detector: Detector[Any], steps: int, seed: int, length: int = 6000) -> str:
    """One row: panics on made healthy curves."""
    panics, suspects, total = 0, 0, 0
    per_kind: list[str] = []
    for name, make in curves.STRESS.items():
        here = 0
        for part in range(max(1, steps // length)):
            losses = make(Random(f"{seed} {name} {part}"), length)
            signs = [VitalSigns(step=step, loss=loss) for step, loss in enumerate(losses)]
            counts = Counter(health for _, health in follow(detector, signs, detector.init()))
            here, suspects, total = here + counts[Health.PANIC], suspects + counts[Health.SUSPECT], total + length
        panics += here
        per_kind.append(str(here))
    return f"{' | '.join(per_kind)} | {1e5 * panics / total:.2f} | {100 * suspects / total:.2f} %"


def main() -> None:
    """Measure, and print one table per question."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    parser.add_argument("--spots", type=int, default=8, help="places to splice at, per run")
    parser.add_argument("--stress-steps", type=int, default=60_000, help="steps of each kind of made curve")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=CONTESTANTS)
    arguments = parser.parse_args()
    healthy = read(arguments.files[0]) if arguments.files else []
    ill: list[tuple[RecordedRun, Any]] = []
    if len(arguments.files) == 3:
        labels = {str(label["run"]): label for label in json.loads(arguments.files[2].read_text(encoding="utf-8"))}
        labelled = read(arguments.files[1])
        healthy += [run for run in labelled if labels[run.name]["label"] == "healthy"]
        ill = [(run, labels[run.name]) for run in labelled if labels[run.name]["label"] == "panic"]
    names = [arguments.only] if arguments.only else list(CONTESTANTS)
    print(f"Python {platform.python_version()}, {platform.machine()}, seed {arguments.seed}")
    questions: dict[str, Any] = {
        "false panics | suspect | precision | recall | delay | us per step": lambda one: recorded(one, healthy, ill),
        "3 sd: MAD | std | 2 sd: MAD | std | ramp: MAD | std | spikes": lambda one: spliced(
            one, healthy, arguments.spots, arguments.seed
        ),
        f"{' | '.join(curves.STRESS)} | per 100,000 | suspect": lambda one: stressed(
            one, arguments.stress_steps, arguments.seed
        ),
    }
    for place, (heading, answer) in enumerate(questions.items()):
        if not healthy and place < 2:
            continue
        print(f"\n| detector | {heading} |\n|{'---|' * (heading.count('|') + 2)}", flush=True)
        for name in names:
            print(f"| {name} | {answer(CONTESTANTS[name]())} |", flush=True)


if __name__ == "__main__":
    main()

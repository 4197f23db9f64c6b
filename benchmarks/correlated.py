"""False panics of the default detector on losses whose noise is correlated from step to step.

    python benchmarks/correlated.py [--runs 40] [--steps 1500] [--seed 0]

A loss that falls from 4 towards 1, plus stationary noise of standard deviation 0.1 that keeps the share `rho` of itself
from one step to the next (an autoregressive process of order 1), as smoothing leaves it. Nothing is wrong in any run.
"""

from __future__ import annotations

import argparse
import math
from random import Random

from tolaria import Health, VitalSigns, judge

SHARES = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
DEVIATION = 0.1


def curve(draw: Random, rho: float, steps: int) -> list[float]:
    """One healthy run."""
    noise = draw.gauss(0.0, DEVIATION)
    losses = []
    for step in range(steps):
        losses.append(1.0 + 3.0 * math.exp(-step / 300) + noise)
        noise = rho * noise + math.sqrt(1.0 - rho * rho) * draw.gauss(0.0, DEVIATION)
    return losses


def panics(losses: list[float]) -> int:
    """How often the default detector panics; nobody rolls back."""
    detector = judge.default_detector()
    state, count = detector.init(), 0
    for step, loss in enumerate(losses, start=1):
        state, verdict = detector.update(state, VitalSigns(step=step, loss=loss))
        count += verdict.health is Health.PANIC
    return count


def main() -> None:
    """Print one line per share."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(f"{arguments.runs} runs of {arguments.steps} steps each, seed {arguments.seed}")
    print("  rho  runs that panic  panics per 100,000 steps")
    for rho in SHARES:
        draw = Random(f"{arguments.seed} {rho}")
        found = [panics(curve(draw, rho, arguments.steps)) for _ in range(arguments.runs)]
        rate = 1e5 * sum(found) / (arguments.runs * arguments.steps)
        print(f"{rho:5.2f}  {sum(map(bool, found)):>7} of {arguments.runs:<4}  {rate:>12.1f}", flush=True)


if __name__ == "__main__":
    main()

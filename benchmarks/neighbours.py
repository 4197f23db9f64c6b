"""What a panic of one governed model costs its neighbours on the same CUDA device, with either barrier.

    python benchmarks/neighbours.py [--models 8] [--steps 60] [--every 20] [--rounds 3]

First table: as many models as asked for, each with a governor, a stream and a thread of its own; one of them panics
every so many steps. Time per step of the others, by events on their own streams, without its panics and with them.
No batch comes again, so the work is the same in all columns. Each figure is the median of the rounds, which take turns.

Second table: one rollback of a model that has so much work queued on its stream. How long a neighbour, whose stream is
idle, then waits for one tiny kernel; without a rollback it is the column `none`.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import threading
from typing import Literal

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # with fewer, neighbours wait by accident
os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")

import torch
from torch import nn

from tolaria import GovernorConfig, TolariaGovernor, judge
from tolaria.group import GovernorGroup

Barrier = Literal["context", "streams"]
BARRIERS: tuple[Barrier, ...] = ("context", "streams")
WIDTH, BATCH, WARM_UP = 1024, 2048, 5


def main() -> None:
    """Print the two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=20, help="steps between two panics")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    logging.getLogger("tolaria").setLevel(logging.ERROR)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}\n")
    slowdown(arguments.models, arguments.steps, arguments.every, arguments.rounds)
    stall()


# ---------------------------------------------------------------- whole runs


def slowdown(models: int, steps: int, every: int, rounds: int) -> None:
    """Time per step of the neighbours, without and with panics."""
    taken: dict[tuple[Barrier, bool], list[float]] = {(b, p): [] for b in BARRIERS for p in (False, True)}
    rollbacks: dict[Barrier, int] = {}
    for turn in range(rounds + 1):
        for barrier in BARRIERS:
            for panics in (False, True):
                ms, count = round_of(barrier, models, steps, every if panics else 0)
                if turn:  # the first one loads kernels and fills the allocator's caches
                    taken[barrier, panics].append(ms)
                rollbacks[barrier] = count if panics else rollbacks.get(barrier, 0)
    heads = ("barrier", "rollbacks", "ms without", "ms with", "slower by", "spread")
    print(" ".join(f"{head:>10}" for head in heads))
    for barrier in BARRIERS:
        alone, beside = (statistics.median(taken[barrier, panics]) for panics in (False, True))
        spread = max(taken[barrier, False]) / min(taken[barrier, False]) - 1
        figures = f"{alone:>10.3f} {beside:>10.3f} {beside / alone - 1:>10.1%} {spread:>10.1%}"
        print(f"{barrier:>10} {rollbacks[barrier]:>10} {figures}")
    print()


def round_of(barrier: Barrier, models: int, steps: int, every: int) -> tuple[float, int]:
    """One run of all models. Answers the neighbours' mean milliseconds per step, and the rollbacks of the first."""
    streams = [torch.cuda.Stream() for _ in range(models)]
    parts = [make_model() for _ in range(models)]
    began, ended = ([torch.cuda.Event(enable_timing=True) for _ in range(models)] for _ in range(2))
    together = threading.Barrier(models)
    torch.cuda.synchronize()
    with GovernorGroup(GovernorConfig(barrier=barrier, cadence=5, probation=5)) as group:
        for (model, optimizer), stream in zip(parts, streams, strict=True):
            group.add(model, optimizer, streams=[stream])

        def run(number: int) -> None:
            x = torch.randn(BATCH, WIDTH, device="cuda")
            model, governor = parts[number][0], group[number]
            torch.cuda.synchronize()
            with torch.cuda.stream(streams[number]):
                for step in range(WARM_UP + steps):
                    if step == WARM_UP:
                        streams[number].synchronize()
                        together.wait()
                        began[number].record()
                    loss = model(x).square().mean()
                    if every and not number and step % every == every - 1:
                        loss = loss * float("nan")
                    loss.backward()
                    governor.step(loss=loss)
                ended[number].record()

        threads = [threading.Thread(target=run, args=(number,)) for number in range(models)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        torch.cuda.synchronize()
        count = group[0].rollbacks
    took = [began[number].elapsed_time(ended[number]) / steps for number in range(1, models)]
    return statistics.mean(took), count


def make_model() -> tuple[nn.Module, torch.optim.Optimizer]:
    """Large enough that the device, not the host, is what the models share."""
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(6))).cuda()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


# ---------------------------------------------------------------- one rollback


def stall(trials: int = 15) -> None:
    """How long one rollback of a busy model holds an idle neighbour up."""
    cycles = _cycles_per_ms()
    print(" ".join(f"{head:>10}" for head in ("queued ms", "none", *BARRIERS)) + "   (ms, median)")
    for queued_ms in (0, 5, 20):
        waits = [waited(None, int(queued_ms * cycles), trials)]
        waits += [waited(barrier, int(queued_ms * cycles), trials) for barrier in BARRIERS]
        print(f"{queued_ms:>10} " + " ".join(f"{ms:>10.3f}" for ms in waits))


def waited(barrier: Barrier | None, cycles: int, trials: int) -> float:
    """Median milliseconds that a neighbour takes over one tiny kernel, from just before the rollback is asked for."""
    mine, neighbour = torch.cuda.Stream(), torch.cuda.Stream()
    model = nn.Linear(WIDTH, WIDTH).cuda()
    config = GovernorConfig(barrier=barrier or "context", rng="keep")
    tiny = torch.zeros(1, device="cuda")
    found = []
    with TolariaGovernor(model, config=config, detector=judge.non_finite()) as governor, torch.cuda.stream(mine):
        governor.snapshot().wait("sealed")
        for _ in range(trials + 2):
            torch.cuda.synchronize()
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if cycles:
                torch.cuda._sleep(cycles)
            began.record(neighbour)
            if barrier:
                governor.execute_rollback()
            with torch.cuda.stream(neighbour):
                tiny.add_(1)
            ended.record(neighbour)
            torch.cuda.synchronize()
            found.append(began.elapsed_time(ended))
    return statistics.median(found[2:])


def _cycles_per_ms() -> float:
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(2):  # the first one loads it
        torch.cuda.synchronize()
        began.record()
        torch.cuda._sleep(10_000_000)
        ended.record()
    torch.cuda.synchronize()
    return 10_000_000 / began.elapsed_time(ended)


if __name__ == "__main__":
    main()

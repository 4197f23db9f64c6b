"""How fast a snapshot and a rollback move the train state, beside a plain memory copy of the same bytes.

    python benchmarks/state_copy.py [--megabytes 400] [--tensors 100] [--rounds 9]

Floor and candidates take turns within each round, so that a busy machine slows all of them; ratios are taken per
round and their median is printed (1.00 = as fast as the floor, higher is better). `done`: the bytes are copied.
`sealed`: they are also known to be finite, and their digest is taken.
"""

from __future__ import annotations

import argparse
import functools
import logging
import platform
import statistics
import threading
import time
from collections.abc import Callable

import torch
from torch import nn

from tolaria import GovernorConfig, TolariaGovernor, judge, protocol
from tolaria.keeper import Keeper


def seconds(call: Callable[[], object]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def build(num_bytes: int, num_tensors: int) -> nn.Module:
    """A module of that many equal float32 parameters."""
    size = num_bytes // 4 // num_tensors
    return nn.ParameterList([nn.Parameter(torch.randn(size)) for _ in range(num_tensors)])


def _stage(keeper: Keeper) -> None:
    """A snapshot up to `done`, without the seal."""
    keeper.driver.submit(protocol.snapshot(threading.get_ident(), keeper.ground, 0, True))


def main() -> None:
    """Measure and print one table row per call."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--tensors", type=int, nargs="+", default=[1, 100, 1000])
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    num_bytes = arguments.megabytes * 2**20
    logging.getLogger("tolaria").setLevel(logging.ERROR)
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'tensors':>8} {'floor GB/s':>11} {'snapshot done':>14} {'snapshot sealed':>16} {'rollback':>9}")
    source, target = torch.ones(num_bytes, dtype=torch.uint8), torch.zeros(num_bytes, dtype=torch.uint8)
    for num_tensors in arguments.tensors:
        model = build(num_bytes, num_tensors)
        with TolariaGovernor(
            model, config=GovernorConfig(probation=0, slots=2), detector=judge.non_finite()
        ) as governor:
            keeper = governor._keeper
            for _ in range(3):  # every slot gets its memory
                governor.snapshot()

            stage = functools.partial(_stage, keeper)
            rows = []
            for _ in range(arguments.rounds):
                floor = seconds(lambda: target.copy_(source))
                calls = (stage, governor.snapshot, governor.execute_rollback)
                rows.append([floor, *(floor / seconds(call) for call in calls)])
        floors, done, sealed, back = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"{num_tensors:>8} {num_bytes / floors / 1e9:>11.1f} {done:>14.2f} {sealed:>16.2f} {back:>9.2f}")


if __name__ == "__main__":
    main()

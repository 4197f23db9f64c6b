"""What snapshots and rollbacks cost on one CUDA device, and what the barrier is worth.

    python benchmarks/on_gpu.py [--gigabytes 1] [--trials 20]

First table: writers held back on K streams of another thread until the rollback has returned (or 20 ms have passed, for
orderings that wait for them), readers on another stream right after it. `lost`: some parameter still has what the
writers wrote; `torn`: the reader saw two epochs at once. `none` is the control: it has to be lost every time.
`host ms`: by the clock, from the call of the rollback until it has returned.

Second table: host time of one call against the number of governed tensors, and device time beside one flat copy of the
same bytes, measured in the same run. What a governor costs a training loop is measured by `tolaria bench`.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import statistics
import threading
import time
from collections.abc import Callable, Generator
from typing import Any
from unittest import mock

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # fewer hardware queues would hide races behind each other
os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")

import torch
from torch import nn

from tolaria import GovernorConfig, TolariaGovernor, judge
from tolaria.cuda import ContextDevice, find_driver

OLD, NEW = 1.0, 2.0
HELD_BACK_S = 0.020
_LAUNCHES = 400  # some two milliseconds of the host


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--trials", type=int, default=20)
    arguments = parser.parse_args()
    logging.getLogger("tolaria").setLevel(logging.ERROR)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}\n")
    streams(int(arguments.gigabytes * 2**30), arguments.trials)
    tensors()


# ---------------------------------------------------------------- streams


def streams(num_bytes: int, trials: int) -> None:
    """Lost and torn rollbacks per ordering and number of writer streams."""
    print(f"{'ordering':>10} {'streams':>8} {'lost':>8} {'torn':>8} {'host ms, median':>16} {'max':>8}")
    for ordering in ("none", "blocking", "context"):
        for count in (1, 4, 8, 30):
            lost, torn, host_ms = race(ordering, count, num_bytes, trials)
            print(
                f"{ordering:>10} {count:>8} {f'{lost}/{trials}':>8} {f'{torn}/{trials}':>8} "
                f"{statistics.median(host_ms):>16.3f} {max(host_ms):>8.3f}"
            )
    print()


def race(ordering: str, count: int, num_bytes: int, trials: int) -> tuple[int, int, list[float]]:
    """Run `trials` rollbacks behind gated writers. Answers how many were lost, how many torn, and the host times."""
    size = num_bytes // 8 // count * count
    model = nn.ParameterList([nn.Parameter(torch.full((size,), OLD, device="cuda")) for _ in range(2)])
    barrier = "blocking" if ordering == "blocking" else "context"
    writers = [torch.cuda.Stream() for _ in range(count)]
    reader = torch.cuda.Stream()
    lost, torn = 0, 0
    host_ms: list[float] = []
    config = GovernorConfig(barrier=barrier, rng="keep", probation=0, slots=2)
    with TolariaGovernor(model, config=config, detector=judge.non_finite()) as governor:
        governor.snapshot().wait("sealed")
        with _unprotected() if ordering == "none" else contextlib.nullcontext():
            for trial in range(trials + 2):  # the first two load what is needed
                word = torch.zeros(1, dtype=torch.int32).pin_memory()
                _write(governor, model, writers, word)
                opener = threading.Timer(HELD_BACK_S, lambda word=word: word.fill_(1))
                opener.start()
                _train_awhile(reader)
                called = time.perf_counter()
                governor.execute_rollback()
                returned = time.perf_counter()
                with torch.no_grad(), governor.using(write=False), torch.cuda.stream(reader):
                    seen = torch.stack([extreme for p in model for extreme in p.detach().aminmax()])
                opener.join()
                torch.cuda.synchronize()
                left = [float(v) for p in model for v in p.detach().aminmax()]
                if trial >= 2:
                    lost += left != [OLD] * 4
                    torn += len(set(seen.tolist())) > 1
                    host_ms.append((returned - called) * 1e3)
                with torch.no_grad(), governor.using():
                    for parameter in model:
                        parameter.fill_(OLD)
                torch.cuda.synchronize()
    return lost, torn, host_ms


def _train_awhile(stream: torch.cuda.Stream) -> None:
    """Launch, as a training loop does until it panics: a host that has slept takes twice as long for each line."""
    with torch.cuda.stream(stream):
        numbers = torch.zeros(1, device="cuda")
        for _ in range(_LAUNCHES):
            numbers.add_(1.0)


@contextlib.contextmanager
def _unprotected() -> Generator[None]:
    """The governor without its barrier: what it records covers its own idle stream only, and nobody waits for it."""
    own = ContextDevice.stream_record
    with mock.patch.object(ContextDevice, "context_record", own), mock.patch.object(ContextDevice, "context_wait"):
        yield


def _write(governor: TolariaGovernor, model: Any, writers: list[torch.cuda.Stream], word: torch.Tensor) -> None:
    """Each stream, from another thread: a share of one parameter, then a wait for the host, then of the other."""
    driver, _ = find_driver()

    def run() -> None:
        with torch.no_grad(), governor.using():
            for number, stream in enumerate(writers):
                with torch.cuda.stream(stream):
                    first, second = (p.detach().view(len(writers), -1)[number] for p in model)
                    first.fill_(NEW)
                    driver.cuStreamWaitValue32(stream.cuda_stream, word.data_ptr(), 1, 0)
                    second.fill_(NEW)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()


# ---------------------------------------------------------------- tensors


def tensors() -> None:
    """Host time against the number of tensors; device time against the flat copy."""
    print(
        f"{'tensors':>8} {'GB':>6} {'flat ms':>8} {'snapshot host':>14} {'rollback host':>14} "
        f"{'rollback device':>16} {'x flat':>7} {'sealed':>8} {'x flat':>7}"
    )
    for count, num_bytes in ((4, 1 << 30), (40, 1 << 30), (400, 4 << 30), (1200, 4 << 30), (4000, 4 << 30)):
        size = num_bytes // 4 // count
        model = nn.ParameterList([nn.Parameter(torch.ones(size, device="cuda")) for _ in range(count)])
        source, target = (torch.empty(num_bytes, dtype=torch.uint8, device="cuda") for _ in range(2))
        config = GovernorConfig(rng="keep", probation=0, slots=2)
        with TolariaGovernor(model, config=config, detector=judge.non_finite()) as governor:
            for _ in range(3):
                governor.snapshot().wait("sealed")
            flat = _device_ms(lambda source=source, target=target: target.copy_(source))
            columns: list[list[float]] = [[], [], [], []]
            snapshots, rollbacks, device, sealed = columns
            for _ in range(7):
                torch.cuda.synchronize()
                started = time.perf_counter()
                info = governor.snapshot()
                snapshots.append((time.perf_counter() - started) * 1e3)
                info.wait("sealed")
                sealed.append((time.perf_counter() - started) * 1e3 - snapshots[-1])
                torch.cuda._sleep(200_000_000)  # busy until everything is enqueued, so that device time is just that
                report = governor.execute_rollback()
                rollbacks.append(report.host_ms)
                device.append(report.wait().device_ms or 0.0)
        middle = [statistics.median(column) for column in columns]
        print(
            f"{count:>8} {num_bytes / 1e9:>6.2f} {flat:>8.3f} {middle[0]:>11.2f} ms {middle[1]:>11.2f} ms "
            f"{middle[2]:>13.3f} ms {middle[2] / flat:>7.2f} {middle[3]:>8.2f} {middle[3] / flat:>7.2f}"
        )
        del model, source, target
    print()


def _device_ms(call: Callable[[], object], rounds: int = 10) -> float:
    for _ in range(3):
        call()
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    for _ in range(rounds):
        call()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / rounds


if __name__ == "__main__":
    main()

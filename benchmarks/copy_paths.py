"""What each path inside one CUDA device takes, alone and beside a loop that computes, beside one flat copy.

    python benchmarks/copy_paths.py [--gigabytes 4] [--tensors 4 400 1156] [--rounds 9]

`x flat`: device time of one copy of all blocks as a multiple of one flat copy of the same bytes, measured in turns.
`host`: microseconds of the host for one launch. `beside`: by how much matrix products on another stream become longer
when that copy runs beside them, as a share of the flat copy: 0.0 is a copy that costs them nothing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")

import torch

from tolaria.cuda import ContextDevice, TorchStreams, find_driver
from tolaria.paths import offered, prepare

_PRODUCTS, _WIDTH = 12, 8192


def _ms(call: Callable[[], None]) -> float:
    """Device time of what `call` launches on the current stream."""
    began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(1_000_000)  # the launches are over before the device comes to them
    began.record()
    call()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended)


def _host_us(call: Callable[[], None]) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    taken = time.perf_counter() - started
    torch.cuda.synchronize()
    return taken * 1e6


def measure(num_bytes: int, num_tensors: int, rounds: int) -> None:
    """One row per path."""
    driver, why_not = find_driver()
    if driver is None:
        raise SystemExit(why_not)
    port = ContextDevice(f"cuda:{torch.cuda.current_device()}", driver, TorchStreams())
    device = torch.device(port.name)
    size = num_bytes // num_tensors // 64 * 64
    source = torch.ones(size * num_tensors, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    left = torch.randn(_WIDTH, _WIDTH, dtype=torch.bfloat16, device=device)
    product = torch.empty_like(left)
    own = torch.cuda.ExternalStream(int(port._stream), device=device)
    torch.cuda.synchronize()

    def compute() -> None:
        for _ in range(_PRODUCTS):
            torch.mm(left, left, out=product)

    def beside(launch: Callable[[], None]) -> float:
        def both() -> None:
            own.wait_stream(torch.cuda.current_stream())
            port.enqueue(launch)
            compute()

        return _ms(both)

    def flat() -> None:
        target.copy_(source)

    ways: dict[str, Callable[[], None]] = {"flat": flat}
    with torch.cuda.stream(own):
        for path in offered(port, device):
            launch = prepare(path, port, list(target.split(size)), list(source.split(size)))
            ways[path.value] = launch
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
    for number in range(rounds + 2):
        alone = _ms(compute)
        for name, launch in ways.items():
            with torch.cuda.stream(own):
                took = _ms(launch)
                held = _host_us(launch)
            longer = beside(launch) - alone
            if number > 1:
                found[name].append((took, held, longer))
    flats = [took for took, _, _ in found["flat"]]
    for name, rows in found.items():
        ratio = statistics.median(took / flat for (took, _, _), flat in zip(rows, flats, strict=True))
        share = statistics.median(longer / flat for (_, _, longer), flat in zip(rows, flats, strict=True))
        took, held = statistics.median(row[0] for row in rows), statistics.median(row[1] for row in rows)
        print(f"{num_tensors:>8} {name:>8} {took:>9.3f} {ratio:>7.3f} {held:>8.0f} {share:>7.2f}")
    del ways
    port.close()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--tensors", type=int, nargs="+", default=[4, 400, 1156])
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {arguments.gigabytes} GB\n")
    print(f"{'tensors':>8} {'path':>8} {'ms':>9} {'x flat':>7} {'host us':>8} {'beside':>7}")
    for num_tensors in arguments.tensors:
        measure(int(arguments.gigabytes * 1e9), num_tensors, arguments.rounds)


if __name__ == "__main__":
    main()

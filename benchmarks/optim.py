"""What a step costs that leaves the state before it behind, beside torch's own step, on one CUDA device.

    python benchmarks/optim.py [--sizes 100M 355M 1300M] [--rounds 20] [--blocks 8192x2 4096x2]

Parameters are those of a GPT of that size, one tensor each, in float32; gradients are random and stay where they are.

* device: from the first step to the end of the last, while the device is kept busy until all of them are enqueued.
* host: until a step is enqueued.
* blocks: elements for one block of threads x vectors that a thread has under way; all but the first for AdamW alone.
* GB/s: what the step has to move at least (torch 28 bytes per parameter, ours 32, with the moments copied 40).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch.optim import Optimizer

from tolaria.optim import SGD, AdamW, source

SHAPES = {"100M": (8, 768), "355M": (24, 1024), "1300M": (24, 2048)}
_VOCABULARY, _CONTEXT = 50_257, 1_024


def main() -> None:
    """Print one table for each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--blocks", nargs="+", default=[f"{source.CHUNK}x{source.UNROLL}"])
    arguments = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}", flush=True)
    for size in arguments.sizes:
        for number, block in enumerate(arguments.blocks):
            source.CHUNK, source.UNROLL = map(int, block.split("x"))
            print(f"\nblocks of {block}")
            compare(size, arguments.rounds, [] if number == 0 else ["AdamW, moments alternate"])


def gpt(layers: int, width: int) -> list[torch.nn.Parameter]:
    """The parameters of a GPT, as many tensors as it has."""
    block = [(3 * width, width), (3 * width,), (width, width), (width,), (4 * width, width), (4 * width,)]
    block += [(width, 4 * width), (width,), (width,), (width,), (width,), (width,)]
    shapes = [(_VOCABULARY, width), (_CONTEXT, width), *(shape for _ in range(layers) for shape in block), (width,)]
    made = [torch.nn.Parameter(torch.randn(shape, device="cuda") * 0.02) for shape in shapes]
    for parameter in made:
        parameter.grad = torch.randn_like(parameter) * 1e-3
    return made


def compare(size: str, rounds: int, only: Sequence[str]) -> None:
    """All contestants over the same parameters, one after the other."""
    parameters = gpt(*SHAPES[size])
    count = sum(parameter.numel() for parameter in parameters)
    flat_ms = flat(count)
    print(
        f"\n{size}: {count / 1e6:.0f}M parameters in {len(parameters)} tensors; a flat copy of them and their moments"
    )
    print(f"takes {flat_ms:.3f} ms ({24 * count / flat_ms / 1e6:.0f} GB/s)")
    print(f"{'':>34} {'device ms':>10} {'x torch':>8} {'GB/s':>7} {'host ms':>8}", flush=True)
    contestants: list[tuple[str, Callable[[], Optimizer], int]] = [
        ("torch AdamW, fused", lambda: torch.optim.AdamW(parameters, fused=True), 28),
        ("AdamW, moments alternate", lambda: AdamW(parameters), 32),
        ("AdamW, old moments copied", lambda: AdamW(parameters, alternate=False), 40),
        ("AdamW, three steps kept", lambda: AdamW(parameters, history=3), 32),
        ("torch SGD with momentum, fused", lambda: torch.optim.SGD(parameters, momentum=0.9, fused=True), 20),
        ("SGD with momentum", lambda: SGD(parameters, momentum=0.9), 24),
    ]
    base = float("nan")
    for name, build, num_bytes in contestants:
        if (only and name not in only) or (size == "1300M" and "three" in name):
            continue
        optimizer = build()
        device_ms, host_ms = step_ms(optimizer.step, rounds)
        if name.startswith("torch"):
            base = device_ms
        rate = num_bytes * count / device_ms / 1e6
        print(f"{name:>34} {device_ms:>10.3f} {device_ms / base:>8.3f} {rate:>7.0f} {host_ms:>8.3f}", flush=True)
        if isinstance(optimizer, AdamW):
            before = [parameter.detach().clone() for parameter in parameters]
            optimizer.step()
            undo_ms, host_ms = step_ms(optimizer.undo, 1)
            exact = all(torch.equal(p.detach(), q) for p, q in zip(parameters, before, strict=True))
            print(f"{'its undo, exact' if exact else 'its undo, WRONG':>34} {undo_ms:>10.3f} {'':>16} {host_ms:>8.3f}")
            del before
        optimizer.state.clear()
        del optimizer
        torch.cuda.empty_cache()


def flat(count: int) -> float:
    """Milliseconds for one copy of three times that many float32."""
    origin, target = (torch.empty(3 * count, device="cuda") for _ in range(2))
    return step_ms(lambda: target.copy_(origin), 10)[0]


def step_ms(call: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Milliseconds of the device and of the host, per call. Medians of three for more than one round."""
    device: list[float] = []
    host: list[float] = []
    for _ in range(3 if rounds > 1 else 1):
        for _ in range(3 if rounds > 1 else 0):
            call()
        torch.cuda.synchronize()
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(100_000_000)  # busy until everything is enqueued
        began.record()
        started = time.perf_counter()
        for _ in range(rounds):
            call()
        host.append((time.perf_counter() - started) * 1e3 / rounds)
        ended.record()
        ended.synchronize()
        device.append(began.elapsed_time(ended) / rounds)
    return statistics.median(device), statistics.median(host)


if __name__ == "__main__":
    main()

"""What it costs the host to observe and judge a step, beside the step.

    python benchmarks/observe.py [--layers 12] [--width 1024] [--steps 60] [--device cuda]

A transformer (bf16, fused AdamW) is trained with a governor that takes no snapshots after the first. Per step, medians
in microseconds of host time: norms of gradients and weights, the veto, sending the numbers off, judging what arrived;
then the whole of `step` beside what a loop without a governor does in its place, both with the device idle before it,
so that no launch waits for room in a queue; and both loops by the wall clock, as they run.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Generator
from typing import Any
from unittest import mock

import torch
from torch import nn

from tolaria import GovernorConfig, TolariaGovernor, observe, veto
from tolaria.course import Course
from tolaria.observe import Readings
from tolaria.update import Update

PARTS: dict[str, tuple[tuple[Any, str], ...]] = {
    "norms": ((observe, "norms"), (observe, "gradient_norm"), (observe, "num_nonfinite")),
    "veto": ((Update, "_refusal"), (veto, "blank")),
    "send": ((Readings, "send"),),
    "judge": ((Course, "account"), (Course, "conclude")),
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3, help="of each loop; they take turns")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    logging.getLogger("tolaria").setLevel(logging.ERROR)
    device = torch.device(arguments.device)
    print(f"{torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}, torch {torch.__version__}")
    plain: list[tuple[float, float]] = []
    guarded: list[tuple[float, float]] = []
    parts: dict[str, list[float]] = defaultdict(list)
    sizes: list[int] = []
    for _ in range(arguments.rounds):
        for is_governed, found in ((False, plain), (True, guarded)):
            loop = Loop(arguments.layers, arguments.width, device)
            sizes = [parameter.numel() for parameter in loop.model.parameters()]
            _, wall = loop.run(arguments.steps, defaultdict(list) if is_governed else None, settle=False)
            host, _ = loop.run(arguments.steps, parts if is_governed else None, settle=True)
            found.append((host, wall))
    print(f"{sum(sizes) / 1e6:.0f} M parameters in {len(sizes)} tensors\n")
    for name in PARTS:
        print(f"{name:>24} {statistics.median(parts[name]):>10.1f} us")
    print(f"{'observe + judge':>24} {sum(statistics.median(parts[name]) for name in PARTS):>10.1f} us")
    for name, found in (("step, plain", plain), ("step, governed", guarded)):
        print(f"{name:>24} {statistics.median(host for host, _ in found):>10.1f} us of the host")
    for name, found in (("whole, plain", plain), ("whole, governed", guarded)):
        print(f"{name:>24} {statistics.median(wall for _, wall in found):>10.1f} us on the wall")


class Loop:
    """One training run."""

    def __init__(self, layers: int, width: int, device: torch.device) -> None:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(width, 16, 4 * width, dropout=0.0, batch_first=True, device=device)
        self.device = device
        self.model = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        length = 512 if device.type == "cuda" else 8
        self.batches = [torch.randn(32, length, width, device=device) for _ in range(4)]

    def run(
        self, steps: int, parts: dict[str, list[float]] | None, *, settle: bool, warm: int = 15
    ) -> tuple[float, float]:
        """Train. Answers the median host time of what `step` stands for, and the wall time per step; in microseconds.

        Args:
            steps: Measured ones.
            parts: Where the host times of the parts of each step are added; None: without a governor.
            settle: Wait for the device before each step.
            warm: Steps before them.
        """
        config = GovernorConfig(cadence=10_000, host_slots=0, scrub_every=0)
        governor = None if parts is None else TolariaGovernor(self.model, self.optimizer, config=config)
        spent: dict[str, float] = defaultdict(float)
        host: list[float] = []
        began = 0.0
        with contextlib.ExitStack() as stack:
            if governor is not None:
                stack.enter_context(governor)
                stack.enter_context(timed(spent))
            source = (self.batches[i % 4] for i in range(warm + steps))
            for number, x in enumerate(source if governor is None else governor.watch(source)):
                if number == warm:
                    self._wait()
                    began = time.perf_counter()
                with torch.autocast(self.device.type, dtype=torch.bfloat16):
                    loss = self.model(x).square().mean()
                loss.backward()
                if settle:
                    self._wait()
                spent.clear()
                started = time.perf_counter()
                if governor is None:
                    self.optimizer.step()
                    self.optimizer.zero_grad(set_to_none=True)
                else:
                    governor.step(loss=loss)
                if number >= warm:
                    host.append((time.perf_counter() - started) * 1e6)
                    if parts is not None:
                        for name in PARTS:
                            parts[name].append(spent[name] * 1e6)
            self._wait()
            wall = (time.perf_counter() - began) / steps * 1e6
        return statistics.median(host), wall

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@contextlib.contextmanager
def timed(spent: dict[str, float]) -> Generator[None]:
    """Add to `spent`, by part, the seconds that the host is inside of it."""
    with contextlib.ExitStack() as stack:
        for name, places in PARTS.items():
            for owner, attribute in places:
                original = getattr(owner, attribute)
                stack.enter_context(mock.patch.object(owner, attribute, _timed(original, name, spent)))
        yield


def _timed(original: Callable[..., Any], name: str, spent: dict[str, float]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            spent[name] += time.perf_counter() - started

    return method


if __name__ == "__main__":
    main()

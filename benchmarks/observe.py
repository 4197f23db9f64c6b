"""What it costs the host to observe and judge a step, beside the step.

    python benchmarks/observe.py [--layers 12] [--width 1024] [--steps 60] [--device cuda] [--alone]

First `observe` by itself, with the device idle before each call: microseconds of the host for all of it, for judging
what has arrived, and of the device; beside what a loop does for the same knowledge, torch's `clip_grad_norm_` and
`loss.item()`. With `--alone` nothing else is measured. Then whole loops:

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
from tolaria.measure import Measure
from tolaria.observe import Readings
from tolaria.update import Update

Parts = dict[str, tuple[tuple[Any, str], ...]]
PARTS: Parts = {
    "norms": ((Measure, "take"), (observe, "gradient_norm"), (observe, "num_nonfinite")),
    "veto": ((Update, "_refusal"), (veto, "blank")),
    "send": ((Readings, "send"),),
    "judge": ((Course, "account"), (Course, "conclude")),
}
JUDGE: Parts = {"judge": ((Course, "catch_up"),)}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3, help="of each loop; they take turns")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--alone", action="store_true")
    arguments = parser.parse_args()
    logging.getLogger("tolaria").setLevel(logging.ERROR)
    device = torch.device(arguments.device)
    print(f"{torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}, torch {torch.__version__}")
    observed(Loop(arguments.layers, arguments.width, device), arguments.steps)
    if arguments.alone:
        return
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


def observed(loop: Loop, steps: int) -> None:
    """Print a line for each way to observe, and for torch's own."""
    parameters = list(loop.model.parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    loss, norm = torch.ones((), device=loop.device), torch.ones((), device=loop.device)
    sizes = [parameter.numel() for parameter in parameters]
    print(f"{sum(sizes) / 1e6:.0f} M parameters in {len(sizes)} tensors; median us: host, judge, device")

    def show(what: str, call: Callable[[], Any], spent: dict[str, float], *, waits: bool = False) -> None:
        found = [timed_once(loop, call, spent, waits) for _ in range(steps + 20)][20:]
        columns = "".join(f"{statistics.median(column):>10.1f}" for column in zip(*found, strict=True))
        print(f"{what:>44} {columns}")

    for handed in (True, False):
        for every in (10_000, 1):
            config = GovernorConfig(cadence=10_000, host_slots=0, scrub_every=0, check_weights_every=every)
            spent: dict[str, float] = defaultdict(float)
            with TolariaGovernor(loop.model, loop.optimizer, config=config) as governor, timed(spent, JUDGE):
                given = {"grad_norm": norm} if handed else {}
                what = f"observe, norm {'handed in' if handed else 'taken'}, weights {'too' if every == 1 else 'not'}"
                show(what, functools.partial(governor.observe, loss=loss, **given), spent)
    nothing: dict[str, float] = defaultdict(float)
    show("torch: clip_grad_norm_", lambda: torch.nn.utils.clip_grad_norm_(parameters, 1e9), nothing)
    item = torch.Tensor.item
    show("and its item()", lambda: item(torch.nn.utils.clip_grad_norm_(parameters, 1e9)), nothing, waits=True)
    show("torch: loss.item()", loss.item, nothing, waits=True)


def timed_once(loop: Loop, call: Callable[[], Any], spent: dict[str, float], waits: bool) -> tuple[float, float, float]:
    """Microseconds of the host, of judging in it, and of the device."""
    spent.clear()
    loop.wait()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if loop.device.type == "cuda" else []
    if marks:
        if not waits:
            torch.cuda._sleep(8_000_000)  # so that the device has all of it before it begins
        marks[0].record()
    started = time.perf_counter()
    call()
    host = (time.perf_counter() - started) * 1e6
    if not marks:
        return host, spent["judge"] * 1e6, host
    marks[1].record()
    loop.wait()
    return host, spent["judge"] * 1e6, marks[0].elapsed_time(marks[1]) * 1e3


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
                    self.wait()
                    began = time.perf_counter()
                with torch.autocast(self.device.type, dtype=torch.bfloat16):
                    loss = self.model(x).square().mean()
                loss.backward()
                if settle:
                    self.wait()
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
            self.wait()
            wall = (time.perf_counter() - began) / steps * 1e6
        return statistics.median(host), wall

    def wait(self) -> None:
        """Until the device is idle."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@contextlib.contextmanager
def timed(spent: dict[str, float], parts: Parts = PARTS) -> Generator[None]:
    """Add to `spent`, by part, the seconds that the host is inside of it."""
    with contextlib.ExitStack() as stack:
        for name, places in parts.items():
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

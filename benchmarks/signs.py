"""Host time of observing and judging one step, by what is asked for. On a CUDA device if there is one.

    python benchmarks/signs.py [--tensors 292] [--steps 600]

`observe` is what a loop that steps its optimizer itself calls; `step` beside the same step without a governor. The
device is never waited for inside what is timed, and never has more than 4 steps before it. Median and 90th percentile
of the microseconds that the call takes, of single steps. `judge` is the default detector alone, on numbers that have
arrived.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tolaria import GovernorConfig, TolariaGovernor, VitalSigns, judge

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    """Print one line per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=int, default=292, help="parameters of the model, as many as GPT-2 medium has")
    parser.add_argument("--steps", type=int, default=600)
    arguments = parser.parse_args()
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {arguments.tensors} parameters, us per step: median, 90 %")
    show("judge alone", judged(arguments.steps))
    for handed in (True, False):
        for every in (1, 10, 10_000):
            what = f"observe, norm {'handed in' if handed else 'taken'}, weights every {every}"
            show(what, observed(arguments.tensors, arguments.steps, handed, every))
    base = stepped(arguments.tensors, arguments.steps, None)
    show("plain step (fused AdamW, zero_grad)", base)
    asked: dict[str, dict[str, Any]] = {
        "step, defaults": {},
        "step, weights every 10": {"check_weights_every": 10},
        "step, groups": {"by_group": True, "check_weights_every": 10},
        "step, groups, update ratio": {"by_group": True, "update_ratio_every": 1, "check_weights_every": 10},
    }
    for what, settings in asked.items():
        show(what, stepped(arguments.tensors, arguments.steps, settings), statistics.median(base))


def show(what: str, times: list[float], base: float = 0.0) -> None:
    """One line; `base` is taken off in a third column."""
    middle, high = statistics.median(times), statistics.quantiles(times, n=10)[-1]
    beside = f"   {middle - base:8.1f} beside the plain step" if base else ""
    print(f"{what:44} {middle:8.1f} {high:8.1f}{beside}")


def model_of(tensors: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Small layers: what is timed does not depend on their size."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(tensors // 2))).to(DEVICE)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)


def timed(steps: int, prepare: Callable[[int], Any], call: Callable[[Any], Any]) -> list[float]:
    """Microseconds of `call`, after a warm-up."""
    times = []
    for number in range(steps + 100):
        given = prepare(number)
        if number % 4 == 0 and DEVICE == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        call(given)
        if number >= 100:
            times.append((time.perf_counter() - started) * 1e6)
    return times


def judged(steps: int) -> list[float]:
    """The default detector."""
    detector = judge.default_detector()
    state = detector.init()
    noise = torch.randn(steps + 100, 2, generator=torch.Generator().manual_seed(0)).tolist()

    def call(signs: VitalSigns) -> None:
        nonlocal state
        state, _ = detector.update(state, signs)

    def prepare(number: int) -> VitalSigns:
        loss, norm = noise[number]
        return VitalSigns(step=number + 1, loss=2.0 + 0.1 * loss, grad_norm=1.0 + 0.1 * norm)

    return timed(steps, prepare, call)


def observed(tensors: int, steps: int, handed: bool, every: int) -> list[float]:
    """`observe` with a loss and perhaps a norm on the device."""
    model, optimizer = model_of(tensors)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    noise = 2.0 + 0.1 * torch.randn(steps + 100, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))
    norm = torch.ones((), device=DEVICE)
    given = {"grad_norm": norm} if handed else {}
    with TolariaGovernor(
        model, optimizer, config=GovernorConfig(check_weights_every=every, cadence=10_000)
    ) as governor:
        return timed(steps, lambda number: noise[number], lambda loss: governor.observe(loss=loss, **given))


def stepped(tensors: int, steps: int, settings: dict[str, Any] | None) -> list[float]:
    """A whole optimizer step, governed or not."""
    model, optimizer = model_of(tensors)
    noise = 2.0 + 0.1 * torch.randn(steps + 100, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))
    ones = [torch.ones_like(parameter) for parameter in model.parameters()]

    def prepare(number: int) -> torch.Tensor:
        for parameter, one in zip(model.parameters(), ones, strict=True):
            parameter.grad = one
        return noise[number]

    def plain(_: torch.Tensor) -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    if settings is None:
        return timed(steps, prepare, plain)
    with TolariaGovernor(model, optimizer, config=GovernorConfig(cadence=10_000, **settings)) as governor:
        return timed(steps, prepare, lambda loss: governor.step(loss=loss))


if __name__ == "__main__":
    main()

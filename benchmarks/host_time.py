"""Host time of one snapshot and of one rollback against the number of governed tensors.

    python benchmarks/host_time.py [--device cpu|cuda|idle] [--tensors 4 400 4000] [--layers 2 24] [--rounds 15]

`plain`: that many parameters in one module. `transformer`: that many layers with AdamW, whose tensors stand in modules,
parameter groups and optimizer state, so that more than tensors has to be compared. An optimizer step and another
learning rate precede each snapshot.

On a CPU no bytes are moved (they would be moved by the host): what is left is what the host does besides. On CUDA the
device copies meanwhile. `idle`: the path of CUDA on a CPU, over a driver that does nothing. `from the start`: the same
with the imprint of the last survey thrown away each time, so that the whole train state is walked in Python.

The last lines split the times of the first kind of model into a fixed part and one per tensor, by a line through the
smallest and the largest.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import platform
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from unittest import mock

import torch
from idle_driver import on_an_idle_device
from torch import nn

from tolaria import GovernorConfig, TolariaGovernor, judge, protocol
from tolaria.device import CpuDevice


def plain(num_tensors: int, device: str) -> tuple[nn.Module, None]:
    """One module of that many parameters."""
    return nn.ParameterList([nn.Parameter(torch.ones(4, device=device)) for _ in range(num_tensors)]), None


def transformer(num_layers: int, device: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A stack of layers as wide as a thumb, and AdamW after its first step."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, device=device)
    model = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=device != "cpu")
    _step(model, optimizer, 1e-3)
    return model, optimizer


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, rate: float) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.param_groups[0]["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def measure(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, rounds: int, *, from_the_start: bool
) -> tuple[int, float, float]:
    """Answers the number of governed tensors, and the medians for a snapshot and a rollback in microseconds."""
    config = GovernorConfig(rng="keep", probation=0, slots=2)
    snapshots: list[float] = []
    rollbacks: list[float] = []
    with TolariaGovernor(model, optimizer, config=config, detector=judge.non_finite()) as governor:
        keeper = governor._keeper
        for _ in range(3):  # every slot gets its memory
            governor.snapshot().wait("sealed")
        for number in range(rounds):
            if optimizer is not None:
                with governor.using():
                    _step(model, optimizer, 1e-3 / (number + 2))
            if from_the_start:
                keeper.state._imprint = None
            snapshots.append(
                _microseconds(
                    lambda: keeper.driver.submit(protocol.snapshot(threading.get_ident(), keeper.ground, 0, True))
                )
            )
            if from_the_start:
                keeper.state._imprint = None
            rollbacks.append(_microseconds(governor.execute_rollback))
            governor.snapshot().wait("sealed")  # what was staged by hand is overwritten
        num_tensors = len(keeper.state.survey().leaves.leaves)
    return num_tensors, statistics.median(snapshots), statistics.median(rollbacks)


def _microseconds(call: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1e6


def _still(
    self: CpuDevice, destinations: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]
) -> Callable[[], None]:
    return lambda: None


def split(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """The fixed part, and the part per tensor, of times at several numbers of tensors: (number, time) each."""
    (few, short), (many, long) = min(points), max(points)
    slope = (long - short) / (many - few) if many > few else 0.0
    return short - few * slope, slope


def main() -> None:
    """Measure and print one row per model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda", "idle"), default="cpu")
    parser.add_argument("--tensors", type=int, nargs="+", default=[4, 400, 4000])
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 24])
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    logging.getLogger("tolaria").setLevel(logging.ERROR)
    on_cuda = arguments.device == "cuda"
    device = "cuda" if on_cuda else "cpu"
    where = torch.cuda.get_device_name() if on_cuda else platform.processor() or platform.machine()
    print(f"{where}, torch {torch.__version__}, Python {platform.python_version()}; microseconds, medians\n")
    print(f"{'':>12} {'tensors':>8} {'snapshot':>9} {'rollback':>9}   {'from the start':>14} {'rollback':>9}")
    rows = [("plain", plain, n) for n in arguments.tensors] + [
        ("transformer", transformer, n) for n in arguments.layers
    ]
    lines: dict[str, list[tuple[int, float]]] = {"snapshot": [], "rollback": []}
    with _where[arguments.device]():
        for name, build, size in rows:
            found = []
            for from_the_start in (False, True):
                model, optimizer = build(size, device)
                found.append(measure(model, optimizer, arguments.rounds, from_the_start=from_the_start))
            (num_tensors, taken, restored), (_, walked, checked) = found
            print(f"{name:>12} {num_tensors:>8} {taken:>9.0f} {restored:>9.0f}   {walked:>14.0f} {checked:>9.0f}")
            if name == rows[0][0]:
                lines["snapshot"].append((num_tensors, taken))
                lines["rollback"].append((num_tensors, restored))
    for what, points in lines.items():
        fixed, each = split(points)
        print(f"{what} of {rows[0][0]}: {fixed:.0f} us + {each:.2f} us per tensor")


_where: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
    # the digest of a rollback's read-back is taken of what was not copied
    "cpu": lambda: mock.patch.object(CpuDevice, "prepare", _still),
    "cuda": contextlib.nullcontext,
    "idle": on_an_idle_device,
}


if __name__ == "__main__":
    main()

"""What veto and rollback cost inside a captured step, on the device.

    python benchmarks/in_graph.py [--layers 12] [--width 1024] [--rounds 20]

A transformer (bf16 compute, fp32 state, fused AdamW) is captured under guard. Medians in microseconds: what decides and
what copies back, as they stand in every replay, with nothing to do; the same where a replay goes back, beside one flat
copy of the same bytes; and whole replays beside those of a graph without a guard, with and without the norms of the
gradients, which observing a step takes anyway.
"""

from __future__ import annotations

import argparse
import logging
import statistics
from collections.abc import Callable
from unittest import mock

import torch
from torch import nn

from tolaria import GovernorConfig, TolariaGovernor, observe
from tolaria import latch as latches
from tolaria.bench.clock import Clock, Floors
from tolaria.in_graph import CapturedStep, Recorder
from tolaria.latch import NOW, PARKED

_REPEATED = 50


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    logging.getLogger("tolaria").setLevel(logging.ERROR)
    device = torch.device("cuda")
    clock = Clock(device)

    def median_us(call: Callable[[], object]) -> float:
        for _ in range(3):
            call()
        return statistics.median(clock.device_ms(call) * 1e3 for _ in range(arguments.rounds))

    model, optimizer, train = training(arguments.layers, arguments.width, device)
    config = GovernorConfig(cadence=10_000, host_slots=0, scrub_every=0, check_weights_every=1_000_000)
    with TolariaGovernor(model, optimizer, config=config) as governor:
        step = CapturedStep(governor, train)
        for _ in range(5):
            step.step()
        governor.state_dict()
        back, latch = step._back, step._latch
        assert back is not None
        num_bytes = governor.capabilities().state_bytes
        count = sum(parameter.numel() for parameter in model.parameters())
        num_tensors = 1 + 4 * len(list(model.parameters()))
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
        print(f"{count / 1e6:.0f} M parameters, state of {num_bytes / 1e9:.2f} GB in {num_tensors} tensors\n")
        flag = torch.zeros((), device=device)
        recorder = Recorder(device)

        def nodes() -> None:
            for _ in range(_REPEATED):
                latch.decide(flag)
                back.run(to_live=True)

        floors = Floors(clock, num_bytes)
        flat = statistics.median(floors.copy_ms() * 1e3 for _ in range(arguments.rounds))
        for blocks in (1024, 2048, 4096, 16384, 1 << 20):
            with mock.patch.object(latches, "_MOST_BLOCKS", blocks):
                idle = median_us(recorder.record(nodes)) / _REPEATED
                latch.words[PARKED].fill_(latch._aimed)
                going = median_us(recorder.record(lambda: back.run(to_live=True)))
                latch.release()
            name = f"decide + copy back, at most {blocks} blocks"
            print(f"{name:>42} {idle:>10.2f} with nothing to do; going back {going:.0f}, {going / flat:.3f} x flat")
        rivals = {"replay, guarded": step._replay}
        used: list[object] = []  # by graphs, which hold addresses and no memory
        for name, with_norms in (("replay, with norms of the gradients", True), ("replay, plain", False)):
            its_model, its_optimizer, its_train = training(arguments.layers, arguments.width, device)
            used += [its_model, its_optimizer, its_train]
            rivals[name] = plain(its_optimizer, its_train, Recorder(device), with_norms)
        spent: dict[str, list[float]] = {name: [] for name in rivals}
        for turn in range(arguments.rounds + 2):  # in turn: the clock of a device that has worked for long is slower
            for name, replay in rivals.items():
                spent[name] += [clock.device_ms(replay) * 1e3] if turn > 1 else []
        assert not int(latch.words[NOW])
        used.clear()
        for name, times in spent.items():
            print(f"{name:>42} {statistics.median(times):>10.1f}")


def training(
    layers: int, width: int, device: torch.device
) -> tuple[nn.Module, torch.optim.Optimizer, Callable[[], torch.Tensor]]:
    """A model, its optimizer, and forward and backward on one batch."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(width, 16, 4 * width, dropout=0.0, batch_first=True, device=device)
    model = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
    rate = torch.tensor(1e-4, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, fused=True, capturable=True)
    x = torch.randn(8, 512, width, device=device)

    def train() -> torch.Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False):
            loss: torch.Tensor = model(x).float().square().mean()
        loss.backward()
        return loss

    return model, optimizer, train


def plain(
    optimizer: torch.optim.Optimizer, train: Callable[[], torch.Tensor], recorder: Recorder, with_norms: bool
) -> Callable[[], None]:
    """The same step in a graph without a guard."""
    kept: list[torch.Tensor] = []

    def work() -> None:
        train()
        if with_norms:
            grads = observe.gradients(p for group in optimizer.param_groups for p in group["params"])
            kept.append(observe.total_norm(observe.norms(grads)))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with recorder.beside():
        for _ in range(3):
            work()
    return recorder.record(work)


if __name__ == "__main__":
    main()

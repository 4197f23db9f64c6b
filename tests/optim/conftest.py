"""What the tests of `tolaria.optim` share: small parameters, gradients, and states that are compared bit for bit."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tolaria.optim import source

SHAPES = [(7, 3), (5,), (), (0,), (41,)]


def bits(value: Any) -> Any:
    """A tree with its tensors as types, shapes and bytes."""
    if isinstance(value, torch.Tensor):
        flat = value.detach().contiguous().reshape(-1).view(torch.uint8) if value.numel() else value.new_empty(0)
        return str(value.dtype), tuple(value.shape), bytes(flat.tolist())
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    return [bits(item) for item in value] if isinstance(value, (list, tuple)) else value


@pytest.fixture
def frozen() -> Callable[[torch.optim.Optimizer], Any]:
    """The parameters of an optimizer and all that it would save but how it steps, as bytes."""

    def freeze(optimizer: torch.optim.Optimizer) -> Any:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        return bits([parameters, optimizer.state_dict()["state"]])

    return freeze


@pytest.fixture
def parameters() -> Callable[..., list[nn.Parameter]]:
    """New parameters, the same every time."""

    def make(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
        generator = torch.Generator().manual_seed(1)
        return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]

    return make


@pytest.fixture
def feed() -> Callable[..., None]:
    """Give parameters the gradients of a step; each list gets the same ones."""

    def give(number: int, *lists: list[nn.Parameter], value: float | None = None) -> None:
        generator = torch.Generator().manual_seed(100 + number)
        for twins in zip(*lists, strict=True):
            grad = torch.randn(twins[0].shape, generator=generator)
            for parameter in twins:
                own = grad if value is None else torch.full_like(grad, value)
                parameter.grad = own.to(parameter.dtype, copy=True)

    return give


# ---------------------------------------------------------------- a machine that runs launches on the CPU


class Interpreter:
    """Stands in for a kernel: takes the arguments of a launch at their word and follows the addresses in its table.

    The step that it makes is no real one, but of small whole numbers, so that every order of operations gives the same
    bits: the first moment becomes itself halved and 64 times the gradient, each further one the one before it added,
    and the parameter loses the last one times the learning rate.
    """

    def __init__(self, num_moments: int, kind: str) -> None:
        self.num_moments, self.kind = num_moments, kind
        self.launches = 0

    def __call__(self, grid: tuple[int, ...], block: tuple[int, ...], args: list[Any]) -> None:
        assert block == (source.THREADS, 1, 1)
        self.launches += 1
        table, gradients, count, columns, read, written, past, what = args[:8]
        heads = 4 if self.kind == "tolaria_adamw" else 3
        pointers, scalars = args[8 : 8 + heads], args[8 + heads :]
        rate = float(pointers[-3]) if what & source.RATE else scalars[0]
        refused = bool(what & source.FOUND) and float(pointers[-1]) == 1.0
        scale = float(pointers[-2]) if what & source.SCALED else 1.0
        head = table[: columns * count].view(columns, count)
        owners = table[columns * count :].view(torch.int32)
        assert int(head[1].add(source.CHUNK - 1).div(source.CHUNK, rounding_mode="floor").sum()) == grid[0]
        for chunk in range(grid[0]):
            e = int(owners[chunk])
            start = (chunk - int(head[0, e])) * source.CHUNK
            size = min(source.CHUNK, int(head[1, e]) - start)
            assert size > 0
            here = [_at(head[read + k, e], start, size) for k in range(self.num_moments)]
            there = [_at(head[written + k, e], start, size) for k in range(self.num_moments)]
            parameter, kept = _at(head[2, e], start, size), _at(head[past, e], start, size)
            self._step(parameter, _at(gradients[e], start, size), here, there, kept, (rate, scale, refused, what))

    def _step(
        self,
        parameter: torch.Tensor,
        gradient: torch.Tensor,
        here: list[torch.Tensor],
        there: list[torch.Tensor],
        kept: torch.Tensor,
        how: tuple[float, float, bool, int],
    ) -> None:
        rate, scale, refused, what = how
        kept.copy_(parameter)
        old = [torch.zeros_like(m) if what & source.FIRST else m.clone() for m in here]
        if what & source.STORE and not what & source.FIRST:
            for keep, moment in zip(there, old, strict=True):
                keep.copy_(moment)
        new = list(old) if refused else self.moments(old, gradient / scale, negative=bool(what & source.MAXIMIZE))
        if not refused:
            parameter.sub_((new[-1] if new else gradient / scale) * rate)
            if what & source.SCALED:
                gradient.div_(scale)
        for target, moment in zip(here if what & source.STORE else there, new, strict=True):
            target.copy_(moment)

    @staticmethod
    def moments(old: list[torch.Tensor], gradient: torch.Tensor, *, negative: bool = False) -> list[torch.Tensor]:
        """The moments after a step."""
        new: list[torch.Tensor] = []
        for moment in old:
            new.append(moment / 2 + (64 * (-gradient if negative else gradient) if not new else new[-1]))
        return new


def _at(address: Any, start: int, size: int) -> torch.Tensor:
    """Float32 numbers at an address, as a tensor that shares the memory."""
    raw = (ctypes.c_char * (4 * size)).from_address(int(address) + 4 * start)
    return torch.frombuffer(raw, dtype=torch.float32, count=size)


def prepare(grid: tuple[int, ...], block: tuple[int, ...], args: list[Any]) -> None:
    """Stands in for `tolaria_prepare`."""
    table, count, what, found, past, bias, launches, *_ = args
    assert grid[0] * block[0] >= count
    launches += 1
    refused = bool(what & source.FOUND) and float(found) == 1.0
    for e, address in enumerate(table[3 * count : 4 * count].tolist()):
        if address:
            step = _at(address, 0, 1)
            past[e] = float(step)
            step += 0 if refused else 1
            bias[2 * e : 2 * e + 2] = 1.0


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> dict[str, Interpreter]:
    """Launches of kernels on tensors of the CPU, in chunks of eight, with the interpreters by kernel and moments."""
    made: dict[str, Interpreter] = {}

    def compiled(index: int, kernel: str, parameter: torch.dtype, moment: torch.dtype, num_moments: int) -> Any:
        assert parameter is moment is torch.float32
        step = made.setdefault(f"{kernel} {num_moments}", Interpreter(num_moments, kernel))
        return step, prepare

    monkeypatch.setattr(source, "KERNEL_DEVICES", {"cuda", "cpu"})
    monkeypatch.setattr("tolaria.optim.batch.KERNEL_DEVICES", {"cuda", "cpu"})
    monkeypatch.setattr(source, "CHUNK", 8)
    monkeypatch.setattr(source, "compiled", compiled)
    return made

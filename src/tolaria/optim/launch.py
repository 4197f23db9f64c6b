"""LAUNCH: the table of addresses that a kernel of `source` reads, and the launches themselves."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from tolaria.errors import CaptureInProgress
from tolaria.optim import source

Kernels = tuple[Callable[..., Any], Callable[..., Any]]


def addresses(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Where tensors begin."""
    return list(map(torch.Tensor.data_ptr, tensors))


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream of the calling thread records a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Table:
    """Addresses of everything that one launch reads and writes. Laid once; gradients may come from elsewhere each time.

    Args:
        parameters: On one device.
        steps: Their step counts, float32, shape [] each, or none.
        sets: Per set, their moments, parameter by parameter.
        pasts: Per kept step, what takes the former values.

    Construction and launches enqueue on the current stream of the device and wait for nothing. Nothing here may be
    constructed during a capture.
    """

    def __init__(
        self,
        parameters: Sequence[torch.Tensor],
        steps: Sequence[torch.Tensor],
        sets: Sequence[Sequence[torch.Tensor]],
        pasts: Sequence[Sequence[torch.Tensor]],
    ) -> None:
        self._tensors = [*parameters, *steps, *itertools.chain.from_iterable((*sets, *pasts))]
        self._addresses, self._strides = addresses(self._tensors), list(map(torch.Tensor.stride, self._tensors))
        self.device, self._count = parameters[0].device, len(parameters)
        self.num_moments = len(sets[0]) // self._count
        self._sets = len(sets)
        counts = [-(-parameter.numel() // source.CHUNK) for parameter in parameters]
        self._num_chunks = sum(counts)
        columns = [
            list(itertools.accumulate(counts, initial=0))[:-1],
            [parameter.numel() for parameter in parameters],
            addresses(parameters),
            addresses(steps) or [0] * self._count,
            *(addresses(moments[k :: self.num_moments]) for moments in sets for k in range(self.num_moments)),
            *(addresses(past) for past in pasts),
        ]
        self._columns = len(columns)
        owners = torch.arange(self._count, dtype=torch.int32, device="cpu")
        owners = owners.repeat_interleave(torch.tensor(counts, device="cpu"))
        head = self._columns * self._count
        laid = self._pinned(head + -(-self._num_chunks // 2))
        laid[:head] = torch.tensor(columns, dtype=torch.int64, device="cpu").view(-1)
        laid[head:].view(torch.int32)[: self._num_chunks] = owners
        self._laid = laid.to(self.device, non_blocking=True)
        self._gradients = torch.zeros(self._count, dtype=torch.int64, device=self.device)
        self._known: list[int] = []
        self._spare = self._pinned(self._count)  # taking page-locked memory during a capture would invalidate it
        self._recorded: list[torch.Tensor] = []  # of captures: read again at every replay
        self._bias = torch.zeros(2 * self._count, dtype=torch.float32, device=self.device)
        self.num_launched = 0  # by the host; replays are counted on the device only
        self.launches = torch.zeros(1, dtype=torch.int64, device=self.device)

    def _pinned(self, size: int) -> torch.Tensor:
        block = torch.zeros(size, dtype=torch.int64, device="cpu")
        return block.pin_memory() if self.device.type == "cuda" else block

    def fits(self) -> bool:
        """Whether everything lies where it lay. The memory under a tensor may be moved."""
        strides = list(map(torch.Tensor.stride, self._tensors))
        return addresses(self._tensors) == self._addresses and strides == self._strides

    def column(self, index: int, *, past: bool = False) -> int:
        """Where in the table a set of moments begins, or a past."""
        return source.FIXED_COLUMNS + (self._sets * self.num_moments + index if past else index * self.num_moments)

    def on_device(self) -> AbstractContextManager[object]:
        """The device is current inside."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()

    def locate(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        """Where the gradients are, for the next launch: shape [parameters], int64, on the device.

        Raises:
            CaptureInProgress: A second capture without a step in between.
        """
        found = addresses(gradients)
        if is_capturing(self.device):
            if not len(self._spare):
                raise CaptureInProgress(
                    "capturing an optimizer step",
                    "the room for the addresses of its gradients went into the capture before this one",
                    "Make one step outside of any capture between two.",
                )
            block, self._spare = self._spare, self._spare[:0]
            block.copy_(torch.tensor(found, dtype=torch.int64, device="cpu"))
            target = torch.empty_like(self._gradients).copy_(block, non_blocking=True)
            self._recorded += [block, target]
            return target
        if not len(self._spare):
            self._spare = self._pinned(self._count)
        if found != self._known:
            block = self._pinned(self._count)
            block.copy_(torch.tensor(found, dtype=torch.int64, device="cpu"))
            self._gradients.copy_(block, non_blocking=True)
            self._known = found
        return self._gradients

    def prepare(
        self,
        kernel: Callable[..., Any],
        past: torch.Tensor | None,
        betas: tuple[float, float],
        found: torch.Tensor | None,
    ) -> torch.Tensor:
        """Count the steps, note the former counts in `past`, answer the bias corrections: shape [2 * parameters]."""
        self.num_launched += not is_capturing(self.device)
        what = 0 if found is None else source.FOUND
        arguments = [
            self._laid,
            self._count,
            what,
            self._bias if found is None else found,
            self._bias if past is None else past,
            self._bias,
            self.launches,
            *betas,
        ]
        grid = -(-self._count // source.THREADS)
        kernel(grid=(grid, 1, 1), block=(source.THREADS, 1, 1), args=arguments)
        return self._bias

    def launch(
        self,
        kernel: Callable[..., Any],
        gradients: torch.Tensor,
        places: tuple[int, int, int],
        what: int,
        devices_own: Sequence[torch.Tensor | None],
        scalars: Sequence[float],
    ) -> None:
        """One pass over all parameters.

        Args:
            kernel: Of `source`.
            gradients: What `locate` has answered.
            places: Set that is read, set that is written, past that is written.
            what: Bits of `source`.
            devices_own: Further pointers; what is None is not read.
            scalars: Floats, as the kernel lists them.
        """
        if not self._num_chunks:
            return
        read, written, past = places
        arguments = [
            self._laid,
            gradients,
            self._count,
            self._columns,
            self.column(read),
            self.column(written),
            self.column(past, past=True),
            what,
            *(self._bias if each is None else each for each in devices_own),
            *scalars,
        ]
        kernel(grid=(self._num_chunks, 1, 1), block=(source.THREADS, 1, 1), args=arguments)

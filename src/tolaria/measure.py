"""MEASURE: the norms of the gradients, or of the weights, of one run, step after step; nothing waits.

On CUDA by a kernel of our own (`launch`): a few launches, and two numbers for each device whatever the number of
tensors. Anything else, and tensors that are not plain and dense, by torch's operators (`observe.norms`): one number
for each tensor.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from tolaria import launch, observe
from tolaria.launch import LaunchFailed, Share
from tolaria.observe import Scalar
from tolaria.state.imprint import look_alike

_TRIES, _TRY_EVERY = 4, 16  # where tensors look different each time, laying out costs more than torch's operators
_PLAIN = (torch.Tensor, torch.nn.Parameter)


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """L2 norms on their devices.

    Attributes:
        single: shape [tensors] each: of single tensors, not finite where the tensor is not.
        totals: shape [2], float64, one per device: of all tensors together, and how many of them are not finite.
        flags: shape [], float32, beside `totals` where they were asked for: 1 where the norm is not finite, else 0.
    """

    single: Sequence[torch.Tensor] = ()
    totals: Sequence[torch.Tensor] = ()
    flags: Sequence[torch.Tensor] = ()

    def add_to(self, lists: dict[str, Sequence[torch.Tensor]], name: str) -> None:
        """Enter what there is into what is sent to the host (`observe.Readings`)."""
        if self.single:
            lists[name] = [*lists.get(name, ()), *self.single]
        if self.totals:
            lists[name + TOTALS] = [*lists.get(name + TOTALS, ()), *self.totals]


TOTALS = " totals"
"""Suffix of the name under which `Measured.totals` are sent."""


class Measure:
    """Measures one list of tensors whose members may change their addresses, and now and then more.

    Threads: any.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = -1
        self._is_alike: Callable[..., bool] | None = None
        self._shares: list[tuple[Share, torch.device, list[int]]] | None = None
        self._in_vain = 0  # lists in a row that did not look like the one before

    def take(self, tensors: Sequence[torch.Tensor], *, flagged: bool = False) -> Measured:
        """Enqueue on the caller's current streams.

        Args:
            tensors: Any.
            flagged: With `Measured.flags`.
        """
        # what torch does not dispatch, a mode that looks on (a race detector) would not see; and a graph would keep the
        # addresses of memory that later calls use as well
        if tensors and tensors[0].is_cuda and not torch._C._len_torch_dispatch_stack() and not _is_captured():
            with self._lock:
                found = self._by_kernel(tensors, flagged)
            if found is not None:
                return found
        return Measured(single=observe.norms(tensors))

    def _by_kernel(self, tensors: Sequence[torch.Tensor], flagged: bool) -> Measured | None:
        if self._is_alike is not None and len(tensors) == self._count and self._is_alike(*tensors):
            self._in_vain = 0
        else:
            self._in_vain += 1
            if self._in_vain % _TRY_EVERY > _TRIES:
                return None
            self._lay(tensors)
        if self._shares is None:
            return None
        totals: list[torch.Tensor] = []
        flags: list[torch.Tensor] = []
        try:
            for share, device, where in self._shares:
                own = tensors if len(where) == len(tensors) else [tensors[i] for i in where]
                flag = torch.empty((), dtype=torch.float32, device=device) if flagged else None
                totals.append(share.measure(own, flag))
                flags += [] if flag is None else [flag]
        except LaunchFailed as error:
            launch.logger.info("norms are taken by plain torch operators: %s", error)
            self._shares = None  # until they look different
            return None
        return Measured(totals=totals, flags=flags)

    def _lay(self, tensors: Sequence[torch.Tensor]) -> None:
        self._is_alike, self._shares = None, None
        sizes = list(map(_size, tensors))
        if any(size is None for size in sizes):
            return
        self._count, self._is_alike = len(tensors), look_alike(tensors)
        places: dict[torch.device, list[int]] = {}
        for index, (tensor, size) in enumerate(zip(tensors, sizes, strict=True)):
            if size is not None and size[0]:
                places.setdefault(tensor.device, []).append(index)
        shares = []
        for device, where in places.items():
            launcher = launch.launcher_of(device)
            if launcher is None:
                return
            own = [size for index in where if (size := sizes[index]) is not None]
            shares.append((Share(launcher, device, own), device, where))
        self._shares = shares or None


def _is_captured() -> bool:
    return torch.cuda.is_current_stream_capturing()


def _size(tensor: torch.Tensor) -> tuple[int, int] | None:
    """Bytes and kind of what the kernel is to read of it: no bytes where no value can be other than finite.

    None: it cannot.
    """
    if type(tensor) not in _PLAIN or tensor.layout is not torch.strided:
        return None
    if not tensor.numel() or not (tensor.is_floating_point() or tensor.is_complex()):
        return 0, 0
    kind = launch.KINDS.get(tensor.dtype)
    if kind is None or not _is_dense(tensor):
        return None
    return tensor.numel() * tensor.element_size(), kind


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether its numbers lie side by side, in whatever order, each of them once."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


class Look:
    """What one governor looks at besides the loss: gradients and weights. Enters it into what is sent to the host."""

    def __init__(self) -> None:
        self.gradients, self.weights = Measure(), Measure()

    def at_gradients(
        self,
        parameters: Iterable[torch.nn.Parameter],
        late: bool,
        numbers: dict[str, Scalar],
        lists: dict[str, Sequence[torch.Tensor]],
    ) -> None:
        """Norms to be read `late`, or the norm and how many are not finite."""
        if late:
            self.gradients.take(observe.gradients(parameters)).add_to(lists, "gradients")
        else:
            numbers["grad_norm"], numbers["nonfinite_gradients"] = observe.gradient_norm(observe.gradients(parameters))

    def at_weights(
        self,
        weights: Sequence[torch.Tensor],
        late: bool,
        numbers: dict[str, Scalar],
        lists: dict[str, Sequence[torch.Tensor]],
    ) -> None:
        """Norms to be read `late`, or how many of them are not finite, or beyond measure."""
        if late:
            self.weights.take(weights).add_to(lists, "weights")
        else:
            numbers["nonfinite_weights"] = observe.num_overflowing(weights)

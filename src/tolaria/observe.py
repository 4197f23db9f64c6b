"""OBSERVE: reads the vital signs of one optimizer step from losses, gradients and weights.

On a CPU every number is there when its operator returns. On a device with events nothing waits: the numbers of a step
travel to page-locked memory behind the step itself, and are read when they have arrived. On other accelerators they are
read at once, which waits for the device.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from tolaria import launch
from tolaria.config import MOST_OUTSTANDING
from tolaria.launch import Sender, Ticket
from tolaria.state.wrappers import inner_tensors, is_wrapper

Loss = torch.Tensor | float | Sequence[torch.Tensor | float] | Mapping[str, torch.Tensor | float] | None
Scalar = torch.Tensor | float | None
"""A number on the host, or a tensor of one element that holds it on some device."""

_NONE: Mapping[str, Sequence[torch.Tensor]] = {}
_ROW_NUMBERS = 1024
_ROWS_AT_ONCE = 64
_ROWS_OF_A_DEVICE = 2 * (MOST_OUTSTANDING + 1)
"""As many steps as there may be on their way, and as many again that a rollback has forgotten right before."""


class Clock(Protocol):
    """What of a device `Readings` needs."""

    def mark(self) -> Any:
        """An event on the caller's current stream."""

    def has_passed(self, event: Any) -> bool:
        """Whether the device has reached it."""
        ...

    def host_wait(self, event: Any) -> None:
        """Block until it has."""


class Reading:
    """The numbers of one step, perhaps still on their way.

    Attributes:
        numbers: Single ones by name.
        lists: Lists by name.
    """

    def __init__(self, numbers: dict[str, float | None], abandoned: deque[_Transfer]) -> None:
        self.numbers = numbers
        self.lists: dict[str, list[float]] = {}
        self._transfers: list[_Transfer] = []
        self._abandoned = abandoned

    def has_arrived(self) -> bool:
        """Whether `wait` would not wait."""
        return all(transfer.has_arrived() for transfer in self._transfers)

    def forget(self) -> None:
        """Nobody will read it. Its rows are used again when nothing is on its way to them any more."""
        self._abandoned.extend(self._transfers)
        self._transfers.clear()

    def wait(self) -> None:
        """Complete `numbers` and `lists`; waits for what has not arrived. Interrupted, it can be called again."""
        if not self._transfers:
            return
        numbers, lists = dict(self.numbers), {name: list(found) for name, found in self.lists.items()}
        for transfer in reversed(self._transfers):
            values = iter(transfer.values())
            for name, length in transfer.lengths:
                if length is None:
                    numbers[name] = next(values)
                else:
                    lists.setdefault(name, []).extend(itertools.islice(values, length))
        # put there at once: an interrupt finds all of them on their way still, or all there
        arrived, left = self._transfers, list[_Transfer]()
        self.numbers, self.lists, self._transfers = numbers, lists, left
        for transfer in arrived:
            transfer.give_back(transfer.row)


class _Transfer(NamedTuple):
    """Numbers of one device: which they are (a length for each list), where they arrive, and when."""

    clock: Clock
    lengths: tuple[tuple[str, int | None], ...]
    row: torch.Tensor
    event: Any
    give_back: Callable[[torch.Tensor], None]
    count: int
    ticket: Ticket | None

    def has_arrived(self) -> bool:
        """Whether they are there."""
        return self.clock.has_passed(self.event) if self.ticket is None else self.ticket.has_arrived()

    def values(self) -> list[float]:
        """They; waits for them."""
        if self.ticket is not None and self.ticket.has_arrived():
            return self.ticket.values()
        self.clock.host_wait(self.event)
        found: list[float] = self.row[: self.count].tolist()
        return found


class Readings:
    """Sends numbers from devices to the host without waiting for them.

    Args:
        clocks: The devices that have events, by name. Numbers that are elsewhere are read at once.
        expected: Numbers that one step sends, as far as is known.
    """

    def __init__(self, clocks: Mapping[str, Clock], expected: int = 0) -> None:
        self._clocks = {torch.device(name): clock for name, clock in clocks.items()}
        # taken now: page-locked memory that is taken later may invalidate a graph capture of another thread
        self._at_once = max(_ROWS_AT_ONCE, _ROWS_OF_A_DEVICE * len(clocks))
        self._rows = deque(_page_locked(self._at_once, max(_ROW_NUMBERS, expected)) if clocks else ())
        self._senders = {device: made for device in self._clocks if (made := self._sender(device)) is not None}
        self._abandoned: deque[_Transfer] = deque()

    def _sender(self, device: torch.device) -> Sender | None:
        launcher = launch.launcher_of(device)
        return Sender(launcher) if launcher is not None and launcher.can_write(self._rows[0]) else None

    def send(self, numbers: Mapping[str, Scalar], lists: Mapping[str, Sequence[torch.Tensor]] = _NONE) -> Reading:
        """Start the transfer of one step's numbers on the caller's current streams.

        Args:
            numbers: Single ones by name.
            lists: Lists by name, each as one or more tensors of shape [n], on any devices.
        """
        here: dict[str, float | None] = {}
        reading = Reading(here, self._abandoned)
        away: dict[torch.device, list[tuple[str, int | None, torch.Tensor]]] = {}
        clocks = self._clocks
        for name, value in numbers.items():
            if isinstance(value, torch.Tensor) and value.device in clocks:
                away.setdefault(value.device, []).append((name, None, value))
            else:
                here[name] = None if value is None else float(value)
        for name, tensors in lists.items():
            for tensor in tensors:
                if tensor.device in clocks:
                    away.setdefault(tensor.device, []).append((name, len(tensor), tensor))
                else:
                    reading.lists.setdefault(name, []).extend(tensor.tolist())
        for device, entries in away.items():
            count = sum([1 if length is None else length for _, length, _ in entries])
            row = self._row(count + 1)
            ticket = self._sent(device, [tensor for *_, tensor in entries], row, count)
            clock = clocks[device]
            lengths = tuple([(name, length) for name, length, _ in entries])
            reading._transfers.append(_Transfer(clock, lengths, row, clock.mark(), self._rows.append, count, ticket))
        return reading

    def _sent(
        self, device: torch.device, tensors: Sequence[torch.Tensor], row: torch.Tensor, count: int
    ) -> Ticket | None:
        """Enqueue what brings the numbers to the row."""
        sender = self._senders.get(device)
        ticket = None if sender is None else sender.send(tensors, row)
        if ticket is None:
            packed = torch.cat([tensor.detach().reshape(-1) for tensor in tensors]).double()
            row[:count].copy_(packed, non_blocking=True)
        return ticket

    def _row(self, needed: int) -> torch.Tensor:
        while self._abandoned and self._abandoned[0].has_arrived():
            transfer = self._abandoned.popleft()
            transfer.give_back(transfer.row)
        if not self._rows or self._rows[0].numel() < needed:
            self._rows = deque(_page_locked(self._at_once, max(_ROW_NUMBERS, needed)))
        return self._rows.popleft()


def _page_locked(count: int, width: int) -> Sequence[torch.Tensor]:
    rows = torch.zeros(count, width, dtype=torch.float64, device="cpu")
    return (rows.pin_memory() if torch.cuda.is_available() else rows).unbind()


def mean_loss(loss: Loss) -> Scalar:
    """`read_loss` without reading: a tensor stays where it is."""
    if loss is None or isinstance(loss, (int, float)):
        return loss
    if isinstance(loss, torch.Tensor):
        return mean_sign(loss)
    several = several_of(loss)
    if several is None:
        return float(loss)  # type: ignore[arg-type]
    values = [value for value in map(mean_loss, several) if value is not None]
    if not values:
        return None
    if len(values) == 1:
        return values[0]
    home, wide = home_of([value for value in values if isinstance(value, torch.Tensor)]), torch.float64
    # added up as `read_loss` does it: two losses of float16 may be finite, and their sum in that type is not
    values = [value.to(home, wide, non_blocking=True) if isinstance(value, torch.Tensor) else value for value in values]
    return sum(values[1:], start=values[0]) / len(values)


def several_of(loss: Any) -> Iterable[Any] | None:
    """The members where these are several losses; None of a single one, such as a number of NumPy's."""
    if isinstance(loss, Mapping):
        return loss.values()
    if isinstance(loss, (str, bytes, torch.Tensor)):
        return None
    has_members = isinstance(loss, Sequence) or bool(getattr(loss, "shape", ()))
    return loss if has_members else None


def named_losses(loss: Loss) -> dict[str, torch.Tensor | float]:
    """Of several losses by name, each as a sign ``loss/<name>``."""
    return {f"loss/{name}": value for name, value in loss.items()} if isinstance(loss, Mapping) else {}


def home_of(tensors: Sequence[torch.Tensor]) -> torch.device:
    """Where to bring scalars together without waiting: a device, since what comes to the host has to be waited for."""
    devices = [tensor.device for tensor in tensors]
    return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))


def mean_sign(value: torch.Tensor | float) -> Scalar:
    """`read_sign` without reading."""
    if not isinstance(value, torch.Tensor):
        return float(value)
    if value.numel() != 1:
        return value.detach().double().mean()
    # `Readings` brings numbers of all kinds to float64 together; a wide integer would lose digits on the way
    return value.detach() if value.is_floating_point() else value.detach().double()


def read_loss(loss: Loss) -> float | None:
    """The loss as a float: the mean of several, of a tensor's elements, or the number itself; None stays None."""
    if loss is None:
        return None
    if isinstance(loss, torch.Tensor):
        return float(loss.detach().double().mean())
    several = several_of(loss)
    if several is None:
        return float(loss)  # type: ignore[arg-type]
    values = [value for value in map(read_loss, several) if value is not None]
    return sum(values) / len(values) if values else None


def read_sign(value: torch.Tensor | float) -> float:
    """One further sign as a float."""
    return float(value.detach().double().mean()) if isinstance(value, torch.Tensor) else float(value)


def gradients(parameters: Iterable[torch.nn.Parameter]) -> list[torch.Tensor]:
    """The gradients that exist, in order."""
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def gradient_norm(grads: Sequence[torch.Tensor]) -> tuple[float | None, int]:
    """L2 norm over all gradients and the number of gradient tensors with a non-finite value.

    The second number costs a pass of its own, taken only when the norm is not finite. A norm that overflows although
    every gradient is finite is computed again in float64, scaled by the largest element.
    """
    norm, bad, _ = norm_beside(grads, ())
    return norm, bad


def norm_beside(grads: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> tuple[float | None, int, list[float]]:
    """`gradient_norm`, and numbers of shape [] that travel with the norm: where there is one, no wait is added."""
    if not grads:
        return None, 0, list(map(float, others))
    dense = [grad.coalesce().values() if grad.is_sparse else grad for grad in grads]
    # torch takes no list of plain tensors and shards; where there are only plain ones, its norm is the one of clipping
    wrapped = any(map(is_wrapper, dense))
    if wrapped:
        parts = norms(dense)
        total = total_norm(parts) if parts else None
    else:
        total = torch.nn.utils.get_total_norm(dense)
    norm, *beside = (0.0, *map(float, others)) if total is None else _read_together([total, *others])
    if math.isfinite(norm):
        return norm, 0, beside
    bad = num_nonfinite(dense)
    if bad:
        return norm, bad, beside
    if wrapped:
        return norm, 0, beside  # of shards, no rank has the largest element
    largest = max(float(grad.abs().max()) for grad in dense if grad.numel())
    squares = sum(float((grad.double() / largest).square().sum()) for grad in dense)
    return largest * math.sqrt(squares), 0, beside


def _read_together(numbers: Sequence[torch.Tensor]) -> list[float]:
    if len(numbers) == 1:
        return [float(numbers[0])]
    home = home_of(numbers)  # a device: what is brought to the host without waiting is not there yet
    there = [one.detach().reshape(()).to(home, torch.float64, non_blocking=True) for one in numbers]
    found: list[float] = torch.stack(there).tolist()
    return found


def num_nonfinite(tensors: Iterable[torch.Tensor]) -> int:
    """How many of the tensors hold a NaN or an infinity. A wrapper counts as the tensors in it (local shards).

    One norm over all of them; only when that is not finite (which may be an overflow) each is looked at by itself.
    """
    tensors = tensors if isinstance(tensors, Sequence) else list(tensors)
    if _are_alike(tensors) and math.isfinite(float(total_norm([_norms_of(tensors, tensors[0].dtype)]))):
        return 0
    plain = (inner for tensor in tensors for inner in inner_tensors(tensor))
    looked_at = [t.detach() for t in plain if t.numel() and (t.is_floating_point() or t.is_complex())]
    looked_at = [t if t.element_size() > 1 else t.float() for t in looked_at]
    if not looked_at or math.isfinite(float(torch.nn.utils.get_total_norm(looked_at))):
        return 0
    return sum(not bool(torch.isfinite(t).all()) for t in looked_at)


BEYOND_MEASURE = math.sqrt(torch.finfo(torch.float32).max)
"""About 1.8e19: where squares end in float32. No norm of weights of any training is there; one flipped exponent is."""


def num_overflowing(weights: Iterable[torch.Tensor]) -> int:
    """How many of the tensors hold a NaN or an infinity, or have a norm `BEYOND_MEASURE`.

    A flipped exponent leads there, and shows in no loss as long as the batches happen not to ask for that weight. A
    wrapper counts as the tensors in it (local shards).
    """
    tensors = weights if isinstance(weights, Sequence) else list(weights)
    if not _are_alike(tensors):
        tensors = [inner.detach() for tensor in tensors for inner in inner_tensors(tensor)]
    parts = norms(tensors)
    if not parts or float(total_norm(parts)) < BEYOND_MEASURE:
        return 0
    return max(1, sum(not norm < BEYOND_MEASURE for part in parts for norm in part.tolist()))


def norms(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The L2 norm of each tensor, without waiting for the device; not finite where the tensor is not.

    Norms are taken in float32 (float64 of such tensors), so one that overflows, with elements beyond 1e19, counts as
    not finite too. A handful of launches whatever the number of tensors: they cost the host more than the device.

    The norm of a DTensor is that of the whole: every rank has to ask for it. Another wrapper counts as what is in it.

    Returns:
        Per device, element type and kind of tensor one tensor of shape [number of tensors].
    """
    tensors = tensors if isinstance(tensors, Sequence) else list(tensors)
    if _are_alike(tensors):
        return [_norms_of(tensors, tensors[0].dtype)]
    single = (part for t in tensors for part in ((t,) if hasattr(t, "full_tensor") else inner_tensors(t)))
    looked_at = [t.detach().coalesce().values() if t.is_sparse else t.detach() for t in single]
    looked_at = [torch.view_as_real(t) if t.is_complex() else t for t in looked_at if t.numel()]
    grouped: dict[tuple[torch.device, torch.dtype, type], list[torch.Tensor]] = {}
    for tensor in looked_at:
        if tensor.is_floating_point():
            wide = tensor.float() if tensor.dtype.itemsize == 1 else tensor
            grouped.setdefault((wide.device, wide.dtype, type(wide)), []).append(wide)
    return [_norms_of(group, dtype) for (_, dtype, _), group in grouped.items()]


_PLAIN = {torch.Tensor, torch.nn.Parameter}


def _are_alike(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether nothing is to be told apart, as in most models: looking at each tensor costs more than its norm."""
    return (
        len(tensors) > 0
        and {type(tensor) for tensor in tensors} <= _PLAIN
        and all(map(torch.Tensor.numel, tensors))
        and len({(tensor.dtype, tensor.device, tensor.layout) for tensor in tensors}) == 1
        and tensors[0].layout is torch.strided
        and tensors[0].is_floating_point()
        and tensors[0].dtype.itemsize > 1
    )


def _norms_of(group: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    with torch.no_grad():
        found = torch._foreach_norm(list(group), 2, dtype=torch.promote_types(dtype, torch.float32))
    if type(found[0]) is not torch.Tensor:
        return torch.stack([_whole(norm) for norm in found])
    size, places = found[0].element_size(), list(map(torch.Tensor.data_ptr, found))
    if places == list(range(places[0], places[0] + size * len(places), size)):
        return found[0].as_strided((len(found),), (1,))  # CUDA writes them side by side; gathering takes as long again
    return torch.stack(found)


def _whole(norm: torch.Tensor) -> torch.Tensor:
    """A norm as a plain tensor; of a DTensor it is put together from all ranks."""
    full = getattr(norm, "full_tensor", None)
    return norm if full is None else full()


def clipping_norm(grads: Sequence[torch.Tensor], parts: Sequence[torch.Tensor], total: torch.Tensor) -> torch.Tensor:
    """What `torch.nn.utils.clip_grad_norm_` would divide by, bit for bit; nothing waits.

    It is the total of one part that torch takes in the same way. Several parts it rounds each to their type and takes
    together in the order of the gradients. Where torch takes none of the list (shards), or would wait for a device
    (gradients in main memory beside others), it is the total after all.

    Args:
        grads: At least one.
        parts: Their `norms`.
        total: The `total_norm` of those.
    """
    devices = {grad.device for grad in grads}
    same = len(parts) == 1 and {grad.dtype for grad in grads} in ({torch.float32}, {torch.float64})
    waits = len(devices) > 1 and any(device.type == "cpu" for device in devices)
    if same or waits or any(grad.layout is not torch.strided or is_wrapper(grad) for grad in grads):
        return total
    return torch.nn.utils.get_total_norm(grads)


def total_norm(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The L2 norm of everything behind `norms`, on a device; nothing waits. At least one part."""
    if len(parts) == 1:
        return torch.linalg.vector_norm(parts[0])
    home = home_of(parts)
    return torch.linalg.vector_norm(torch.cat([part.to(home, torch.float64, non_blocking=True) for part in parts]))

"""What the faults of the campaign do, one function each. They write like hardware does: no version counter is raised.

Random choices come from the target's generator alone. Nothing here knows of a governor.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Sequence

import torch

from tolaria.drill.campaign.strokes import Act, InjectedError, NothingToHit, Target
from tolaria.drill.workloads import Batch

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def weights_of(target: Target) -> list[torch.Tensor]:
    """All parameters, to be written."""
    return [parameter.data for parameter in target.training.model.parameters()]


def gradients_of(target: Target) -> list[torch.Tensor]:
    """All gradients there are."""
    return [parameter.grad for parameter in target.training.model.parameters() if parameter.grad is not None]


def moments_of(target: Target) -> list[torch.Tensor]:
    """The optimizer's averages; none before its first step."""
    values = (value for state in target.training.optimizer.state.values() for value in state.values())
    return [value for value in values if isinstance(value, torch.Tensor) and value.dim() > 0]


def buffers_of(target: Target) -> list[torch.Tensor]:
    """Buffers of the model that hold more than a counter."""
    return [buffer for buffer in target.training.model.buffers() if buffer.numel() > 1]


def averages_of(target: Target) -> list[torch.Tensor]:
    """The average of the weights: a part that was registered."""
    return [parameter.data for parameter in target.training.ema.parameters()]


def exposed_of(target: Target) -> list[torch.Tensor]:
    """The matrix in which one huge positive entry reaches the loss."""
    return [target.workload.exposed_weight(target.training.model).data]


Where = Callable[[Target], Sequence[torch.Tensor]]


def _pick(target: Target, count: int) -> int:
    if not count:
        raise NothingToHit
    return int(torch.randint(count, (), generator=target.generator))


def flip(where: Where, bits: Iterable[int]) -> Act:
    """One bit of one element flips.

    Args:
        where: The tensors that one is drawn from, by size.
        bits: The places that one is drawn from, 0 the lowest; taken modulo the width of the element.
    """
    places = tuple(bits)

    def act(target: Target) -> None:
        tensors = [tensor for tensor in where(target) if tensor.numel()]
        chosen = _pick(target, sum(tensor.numel() for tensor in tensors))
        for tensor in tensors:
            if chosen < tensor.numel():
                _flip_one(tensor, chosen, places[_pick(target, len(places))])
                return
            chosen -= tensor.numel()

    return act


def _flip_one(tensor: torch.Tensor, index: int, bit: int) -> None:
    if tensor.dtype == torch.bool:
        tensor.view(-1)[index].logical_not_()
        return
    width = 8 * tensor.element_size()
    mask = 1 << bit % width
    word = mask - (1 << width) if mask >= 1 << (width - 1) and width > 8 else mask
    tensor.view(-1).view(_WORDS[tensor.element_size()])[index] ^= word


def flip_exposed_exponent(target: Target) -> None:
    """The highest exponent bit of a positive weight that reaches the loss: 0.05 becomes 1.7e37."""
    flat = exposed_of(target)[0].view(-1)
    candidates = ((flat > 0) & (flat < 2)).nonzero().flatten()
    _flip_one(flat, int(candidates[_pick(target, len(candidates))]), 30)


def flip_in_slots(every: bool) -> Act:
    """One bit flips in the memory of the newest good snapshot, or one in that of every snapshot."""

    def act(target: Target) -> None:
        memories = target.slots(every)
        if not memories:
            raise NothingToHit
        for memory in memories:
            memory[_pick(target, len(memory))] ^= 1 << _pick(target, 8)

    return act


def fill(where: Where, value: float) -> Act:
    """One element of one tensor becomes `value`."""

    def act(target: Target) -> None:
        tensors = where(target)
        flat = tensors[_pick(target, len(tensors))].view(-1)
        flat[_pick(target, len(flat))] = value

    return act


def scale(where: Where, factor: float) -> Act:
    """Every element of all of these is multiplied."""

    def act(target: Target) -> None:
        tensors = [tensor for tensor in where(target) if tensor.is_floating_point()]
        if not tensors:
            raise NothingToHit
        for tensor in tensors:
            tensor.mul_(factor)

    return act


def silence_one(where: Where) -> Act:
    """One whole tensor reads zero."""

    def act(target: Target) -> None:
        tensors = where(target)
        tensors[_pick(target, len(tensors))].zero_()

    return act


def blur(where: Where, size: float) -> Act:
    """Normal noise of that size on every element."""

    def act(target: Target) -> None:
        for tensor in where(target):
            tensor.add_(size * torch.randn(tensor.shape, generator=target.generator))

    return act


def write_from_thread(size: float) -> Act:
    """A thread that nobody knows of adds noise of that size to every third parameter. It is joined at once."""

    def act(target: Target) -> None:
        chosen = weights_of(target)[::3]

        def write() -> None:
            for tensor in chosen:
                tensor.add_(size * torch.randn(tensor.shape, generator=target.generator))

        thread = threading.Thread(target=write, name="foreign-writer")
        thread.start()
        thread.join()

    return act


def break_off(target: Target) -> None:
    """The optimizer has written half of the weights when it raises."""
    weights = weights_of(target)
    for tensor in weights[: len(weights) // 2 + 1]:
        tensor.mul_(1.01)
    raise InjectedError("the step broke off half-way")


def multiply_setting(name: str, factor: float) -> Act:
    """A number in every parameter group is multiplied, and stays so."""

    def act(target: Target) -> None:
        for group in target.training.optimizer.param_groups:
            group[name] = group[name] * factor

    return act


def forget_momentum(target: Target) -> None:
    """Momentum, or the decay of the first moment, is overwritten by 0.1, and stays so."""
    for group in target.training.optimizer.param_groups:
        if "betas" in group:
            group["betas"] = (0.1, group["betas"][1])
        else:
            group["momentum"] = 0.1


def run_schedule_ahead(target: Target) -> None:
    """The scheduler is stepped seven times more."""
    for _ in range(7):
        target.training.scheduler.step()


def reseed(target: Target) -> None:
    """Somebody else seeds torch's global generator."""
    torch.manual_seed(_pick(target, 1 << 30))


def loss_is(value: float) -> Act:
    """The loss is multiplied by NaN (its gradients with it), or infinity is added to it (they stay as they are)."""

    def act(target: Target) -> torch.Tensor:
        assert target.loss is not None  # it strikes at Moment.LOSS
        return target.loss * value if math.isnan(value) else target.loss + value

    return act


def spoil_with_nan(target: Target) -> Batch:
    """The batch holds a NaN."""
    return target.workload.nan_batch(target.batch)


def spoil_targets(target: Target) -> Batch:
    """Finite, and only wrong things to learn."""
    return target.workload.garbage_batch(target.batch, target.generator)


def spoil_with_size(target: Target) -> Batch:
    """What weighs or measures the samples is a thousand times too large."""
    batch = target.batch
    if batch.weights is not None:
        return batch._replace(weights=batch.weights * 1e3)
    return batch._replace(inputs=batch.inputs * 1e3)


def both(*acts: Act) -> Act:
    """One after the other. What they return is dropped."""

    def act(target: Target) -> None:
        for one in acts:
            one(target)

    return act

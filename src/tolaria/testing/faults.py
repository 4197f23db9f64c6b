"""What goes wrong in a training, and when: plans of faults as values, for any loop.

    plan = FaultPlan.parse("nan_loss@7 weight_bit@12x2", seed=3)
    with plan.attach(model, optimizer) as faults:
        for number, batch in faults.over(enumerate(loader)):
            loss = faults.loss(loss_fn(model(batch)))
            loss.backward()
            optimizer.step()

A fault belongs to batches, not to step numbers: a batch keeps its number whatever is rolled back or skipped before it.
So "comes again on replay" has one meaning. The drill strikes by the same rules (`Occasions`).
"""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import nn
from torch.utils import _pytree

from tolaria.errors import InvalidConfig, UsageError
from tolaria.governor import TolariaGovernor
from tolaria.ring import newest_good


class Moment(Enum):
    """Where in a training step a fault strikes."""

    DATA = "data"  # the batch itself is bad, each time it is delivered
    FORWARD = "forward"  # between forward and backward
    UPDATE = "update"  # between backward and optimizer step
    STEP = "step"  # inside the optimizer's step, behind any clipping of the gradients


class Planned(Protocol):
    """A fault that is planned.

    Attributes:
        name: Of its kind. A plan has it once, or each with a batch of its own.
        moment: When in a step.
        batch: Number of the first batch that it hits.
        length: Consecutive batches that it hits.
        times: Of the occasions on which its first batch is trained, at how many it strikes. Bad data strikes each time.
        part: The only micro-batch of a step that it concerns; None: all of them.
    """

    @property
    def name(self) -> str: ...
    @property
    def moment(self) -> Moment: ...
    @property
    def batch(self) -> int: ...
    @property
    def length(self) -> int: ...
    @property
    def times(self) -> int: ...
    @property
    def part(self) -> int | None: ...


P = TypeVar("P", bound=Planned)


def is_hit(fault: Planned, batch: int, part: int = 0) -> bool:
    """Whether a fault concerns that micro-batch."""
    return fault.part in (None, part) and fault.batch <= batch < fault.batch + fault.length


class Occasions(Generic[P]):
    """Which planned faults are due. One per run; called in the order of the loop.

    Attributes:
        struck: Names of those that struck in this step so far.
    """

    def __init__(self, faults: Sequence[P]) -> None:
        self.faults = tuple(faults)
        self.struck: list[str] = []
        self._met = [0] * len(self.faults)
        self._now: tuple[int, int] | None = None

    def begin(self, batch: int, part: int = 0) -> None:
        """A step takes up that batch, the first of its micro-batches or another. Bad data counts as struck."""
        self._now = batch, part
        if part == 0:
            self.struck = []
            for place, fault in enumerate(self.faults):
                self._met[place] += fault.batch == batch
        self.due(Moment.DATA)

    def due(self, moment: Moment) -> list[P]:
        """The faults that strike at this moment of the present step. Nothing before the first `begin`."""
        if self._now is None:
            return []
        found = [
            fault
            for fault, met in zip(self.faults, self._met, strict=True)
            if fault.moment is moment and is_hit(fault, *self._now) and (moment is Moment.DATA or met <= fault.times)
        ]
        self.struck += [fault.name for fault in found if fault.name not in self.struck]
        return found


def generator_for(seed: int, name: str, batch: int, part: int = 0) -> torch.Generator:
    """On the CPU. Depends on its arguments alone, so a fault that returns is the same fault."""
    text = f"{seed}/{name}/{batch}" + (f"/{part}" if part else "")
    return torch.Generator().manual_seed(random.Random(text).getrandbits(63))


# ---------------------------------------------------------------- what can be done to a run


def scale_gradients(parameters: Iterable[torch.Tensor], factor: float) -> None:
    """Every gradient that many times as large."""
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(factor)


def zero_second_moments(optimizer: torch.optim.Optimizer) -> None:
    """`exp_avg_sq` reads zero: the step divides a first moment with a past by the square root of nothing."""
    for values in optimizer.state.values():
        if "exp_avg_sq" in values:
            values["exp_avg_sq"].zero_()


def flip_bit(tensor: torch.Tensor, element: int, bit: int) -> None:
    """One bit of one element, counted from its lowest. Through `.data`: it leaves no version counter behind."""
    place = tuple(int(at) for at in torch.unravel_index(torch.tensor(element), tensor.shape))
    value = tensor.data[place].reshape(1).clone()
    value.view(torch.uint8)[bit // 8] ^= 1 << (bit % 8)
    tensor.data[place] = value[0]


def exponent_bit(dtype: torch.dtype) -> int:
    """The highest bit of a float's exponent: 0.05 becomes 1.7e37. Of other types the highest but one."""
    return 8 * dtype.itemsize - 2


def write_from_foreign_thread(parameters: Sequence[torch.Tensor], generator: torch.Generator) -> None:
    """A thread that nobody knows of fills every third of these with noise of size 10.

    Started and joined here, so where it falls does not depend on scheduling. Through `.data`: like a stray kernel or an
    extension it leaves no version counter behind.
    """

    def write() -> None:
        for parameter in parameters[::3]:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 10)

    thread = threading.Thread(target=write, name="foreign-writer")
    thread.start()
    thread.join()


def newest_slot(governor: TolariaGovernor) -> list[torch.Tensor]:
    """Memory of the snapshot that a rollback would take now, each shape [bytes], uint8.

    A bit that flips there asks no interface, so this goes round the governor's.
    """
    slot = newest_good(governor._keeper.ring)
    arena = None if slot is None else governor._keeper.vault.slots[slot.index].arena
    return [] if arena is None else [view for view in arena.views if len(view)]


class InjectedFault(RuntimeError):
    """Raised inside an optimizer step because a plan says so."""


@dataclass(frozen=True, slots=True)
class Scene:
    """What a fault may touch.

    Attributes:
        parameters: Of the model, that are trained.
        optimizer: The run's own.
        generator: On the CPU; from seed, fault and batch.
        slots: Memory of the newest snapshot.
        value: The batch or the loss that is about to be used; else None.
    """

    parameters: tuple[nn.Parameter, ...]
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    slots: Callable[[], Sequence[torch.Tensor]]
    value: Any = None

    def pick(self, count: int) -> int:
        """One of that many."""
        return int(torch.randint(count, (), generator=self.generator))


def _nan_loss(scene: Scene) -> Any:
    return scene.value * float("nan")


def _nan_gradient(scene: Scene) -> None:
    with_gradient = [p.grad for p in scene.parameters if p.grad is not None and p.grad.numel()]
    gradient = with_gradient[scene.pick(len(with_gradient))]
    gradient.view(-1)[scene.pick(gradient.numel())] = float("nan")


def _weight_bit(scene: Scene) -> None:
    _flip_exponent(scene, [p for p in scene.parameters if p.numel()])


def _moment_bit(scene: Scene) -> None:
    values = [value for state in scene.optimizer.state.values() for value in state.values()]
    _flip_exponent(scene, [v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point() and v.dim()])


def _flip_exponent(scene: Scene, tensors: Sequence[torch.Tensor]) -> None:
    if not tensors:
        raise UsageError("flipping a bit", "there is no such tensor yet", "Plan it behind the first optimizer step.")
    tensor = tensors[scene.pick(len(tensors))]
    flip_bit(tensor, scene.pick(tensor.numel()), exponent_bit(tensor.dtype))


def _slot_bit(scene: Scene) -> None:
    slots = scene.slots()
    if not slots:
        raise UsageError(
            "flipping a bit in a slot", "no slot is known", "Attach with newest_slot, behind the first snapshot."
        )
    memory = slots[scene.pick(len(slots))]
    flip_bit(memory, scene.pick(len(memory)), 3)


def _rate_jump(scene: Scene) -> None:
    for group in scene.optimizer.param_groups:
        group["lr"] = group["lr"] * 1e3


def _raise(scene: Scene) -> None:
    raise InjectedFault("an exception in the middle of an optimizer step, as planned")


def _foreign_write(scene: Scene) -> None:
    write_from_foreign_thread(scene.parameters, scene.generator)


def _nan_batch(scene: Scene) -> Any:
    return _each(scene.value, lambda tensor: tensor * float("nan") if tensor.is_floating_point() else tensor)


def _noise_batch(scene: Scene) -> Any:
    def noisy(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point():
            return (torch.randn(tensor.shape, generator=scene.generator) * 10).to(tensor)
        order = torch.randperm(len(tensor), generator=scene.generator) if tensor.dim() else torch.tensor(0)
        return tensor[order.to(tensor.device)] if tensor.dim() else tensor

    return _each(scene.value, noisy)


def _each(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same containers with other tensors; what is delivered again later is not touched."""
    return _pytree.tree_map_only(torch.Tensor, change, value)


KINDS: dict[str, tuple[Moment, Callable[[Scene], Any]]] = {
    "nan_batch": (Moment.DATA, _nan_batch),
    "noise_batch": (Moment.DATA, _noise_batch),
    "nan_loss": (Moment.FORWARD, _nan_loss),
    "foreign_write": (Moment.FORWARD, _foreign_write),
    "nan_gradient": (Moment.UPDATE, _nan_gradient),
    "huge_gradients": (Moment.STEP, lambda scene: scale_gradients(scene.parameters, 1e6)),
    "weight_bit": (Moment.STEP, _weight_bit),
    "moment_bit": (Moment.STEP, _moment_bit),
    "zero_moments": (Moment.STEP, lambda scene: zero_second_moments(scene.optimizer)),
    "slot_bit": (Moment.STEP, _slot_bit),
    "rate_jump": (Moment.STEP, _rate_jump),
    "exception": (Moment.STEP, _raise),
}
"""By name: when in a step, and what is done. Those of the data and `nan_loss` answer what is used instead."""


# ---------------------------------------------------------------- plans


@dataclass(frozen=True, slots=True)
class PlannedFault:
    """One fault of a plan.

    Attributes:
        name: One of `KINDS`.
        batch: Number of the first batch that it hits.
        times: Of the occasions on which that batch is trained, at how many it strikes. Bad data strikes each time.
        length: Consecutive batches that it hits.
    """

    name: str
    batch: int
    times: int = 1
    length: int = 1
    part: int | None = None

    def __post_init__(self) -> None:
        if self.name not in KINDS or self.batch < 0 or self.times < 1 or self.length < 1:
            raise InvalidConfig(
                "planning a fault",
                f"found {self}, expected one of {', '.join(KINDS)}, a batch from 0, and counts from 1",
                "Correct the plan.",
            )

    @property
    def moment(self) -> Moment:
        """When in a step."""
        return KINDS[self.name][0]

    def __str__(self) -> str:
        times = f"x{self.times}" if self.times > 1 else ""
        return f"{self.name}@{self.batch}" + times + (f"+{self.length}" if self.length > 1 else "")


_WRITTEN = re.compile(r"(\w+)@(\d+)(?:x(\d+))?(?:\+(\d+))?")


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """Which faults strike at which batches. A value: print it, compare it, keep it beside a failing test.

    Attributes:
        faults: In any order.
        seed: Of every choice that a fault makes.
    """

    faults: tuple[PlannedFault, ...]
    seed: int = 0

    @classmethod
    def parse(cls, text: str, seed: int = 0) -> FaultPlan:
        """Read what `str` writes: ``name@batch``, ``x2`` to strike twice, ``+16`` to hit 16 batches in a row.

        Raises:
            InvalidConfig: Not readable, or an unknown fault.
        """
        faults = []
        for word in text.split():
            found = _WRITTEN.fullmatch(word)
            if found is None:
                raise InvalidConfig("reading a plan of faults", f"{word!r}, expected name@batch", "Correct the plan.")
            name, batch, times, length = found.groups()
            faults.append(PlannedFault(name, int(batch), int(times or 1), int(length or 1)))
        return cls(tuple(faults), seed)

    @classmethod
    def draw(cls, seed: int, batches: int, count: int, names: Sequence[str] = ("nan_loss", "weight_bit")) -> FaultPlan:
        """A plan drawn at random: `count` faults of these names, each at a batch of its own."""
        source = random.Random(seed)
        chosen = sorted(source.sample(range(batches), count))
        return cls(tuple(PlannedFault(source.choice(list(names)), batch) for batch in chosen), seed)

    def __str__(self) -> str:
        return " ".join(map(str, self.faults))

    def attach(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        newest_slot: Callable[[], Sequence[torch.Tensor]] = tuple,
    ) -> Faults:
        """Strike in a run of these. A context manager that takes its hooks off again.

        Args:
            model: Its parameters that are trained are what faults hit.
            optimizer: Likewise; faults of the step strike in a hook of it.
            newest_slot: Answers memory of a snapshot, for `slot_bit`; ``lambda: newest_slot(governor)``.
        """
        return Faults(self, model, optimizer, newest_slot)


class Faults:
    """A plan at work in one run. Made by `FaultPlan.attach`.

    Attributes:
        struck: (name, number of the batch), each time, in order.
    """

    def __init__(
        self,
        plan: FaultPlan,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        slots: Callable[[], Sequence[torch.Tensor]],
    ) -> None:
        self.plan = plan
        self.struck: list[tuple[str, int]] = []
        self._parameters = tuple(p for p in model.parameters() if p.requires_grad)
        self._optimizer, self._slots = optimizer, slots
        self._occasions = Occasions(plan.faults)
        self._batch = -1
        self._spoilt: set[Moment] = set()
        self._hooks = [optimizer.register_step_pre_hook(self._before_step)]

    def __enter__(self) -> Faults:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Take the hooks off.

        Raises:
            UsageError: A fault of the plan never struck, so nothing was shown. Not while another error is raised.
        """
        for hook in self._hooks:
            hook.remove()
        names = {(name, batch) for name, batch in self.struck}
        left = [str(one) for one in self.plan.faults if (one.name, one.batch) not in names]
        if left and kind is None:
            raise UsageError(
                "striking planned faults",
                f"{' '.join(left)} never struck, expected every fault of the plan",
                "Plan them within the run, take batches from `over`, and pass losses through `loss`.",
            )

    def over(self, numbered: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
        """The (number, batch) pairs of the loop, bad ones in the place of theirs.

        Stands outermost, so that it sees what is delivered again: ``over(governor.watch(list(enumerate(loader))))``.
        """
        for number, batch in numbered:
            yield number, self.begin(number, batch)

    def begin(self, number: int, batch: Any = None) -> Any:
        """A step takes up that batch. Answers what is to be trained on. For loops that `over` does not fit."""
        self._batch, self._spoilt = number, set()
        self._occasions.begin(number)
        return self._strike(Moment.DATA, batch)

    def loss(self, loss: torch.Tensor) -> torch.Tensor:
        """Between forward and backward: the loss to be used."""
        answer: torch.Tensor = self._strike(Moment.FORWARD, loss)
        return answer

    def update(self) -> None:
        """Between backward and optimizer step, before anything looks at the gradients. Otherwise the step does it."""
        self._once(Moment.UPDATE)

    def _before_step(self, *_: Any) -> None:
        self._once(Moment.UPDATE)
        self._once(Moment.STEP)

    def _once(self, moment: Moment) -> None:
        """However often the optimizer steps on one batch."""
        if moment not in self._spoilt:
            self._spoilt.add(moment)
            self._strike(moment)

    def _strike(self, moment: Moment, value: Any = None) -> Any:
        for fault in self._occasions.due(moment):
            self.struck.append((fault.name, self._batch))
            generator = generator_for(self.plan.seed, fault.name, self._batch)
            scene = Scene(self._parameters, self._optimizer, generator, self._slots, value)
            answer = KINDS[fault.name][1](scene)
            value = value if answer is None else answer
        return value

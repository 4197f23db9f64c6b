"""BATCH: parameters of one group that are stepped alike, and the memory in which their past is left."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tolaria.optim.launch import Table
from tolaria.optim.source import DTYPES, KERNEL_DEVICES

_PLAIN = (torch.Tensor, torch.nn.Parameter)


@dataclass(slots=True, eq=False)
class Room:
    """Memory of one parameter.

    Attributes:
        sets: Moments by name, one dict more than steps are kept: the live ones and those of the steps before.
        pasts: Former values of the parameter, one tensor for each step that is kept.
    """

    sets: list[dict[str, torch.Tensor]] = field(default_factory=list)
    pasts: list[torch.Tensor] = field(default_factory=list)

    def furnish(self, parameter: torch.Tensor, live: dict[str, torch.Tensor], history: int) -> bool:
        """Make `live` the first set, and see that all others and the pasts are there and fit.

        Answers whether all that was left here is still there, in its order: what comes first is overwritten first.
        """
        at = next((i for i, each in enumerate(self.sets) if _are(each, live)), None)
        intact = at is not None or not self.sets
        turned: list[dict[str, torch.Tensor]] = [] if at is None else [*self.sets[at + 1 :], *self.sets[:at]]
        others = turned if at is not None else [each for each in self.sets if not _shares(each, live)]
        others = [each for each in others if _alike(each, live)]
        intact = intact and len(others) == len(turned)
        if at is None:  # somebody has put others in their place: whoever remembers these sees that they are written
            torch.autograd.graph.increment_version([tensor for each in others for tensor in each.values()])
        others += [{k: torch.empty_like(t) for k, t in live.items()} for _ in range(history - len(others))]
        self.sets = [live, *others[:history]]
        intact = intact and all(_twin(past, parameter) for past in self.pasts)
        kept = [past for past in self.pasts if _twin(past, parameter)]
        kept += [torch.empty_like(parameter.detach()) for _ in range(history - len(kept))]
        self.pasts = kept[:history]
        return intact


def _are(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(tensor is other[name] for name, tensor in one.items())


def _shares(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return any(tensor is other.get(name) for name, tensor in one.items())


def _alike(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(_twin(one[name], other[name]) for name in one)


def _twin(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)


class Batch:
    """Parameters that one launch steps: of one group, device and type, all with state or all without.

    Args:
        parameters: shape any, on one device, of one type.
        states: The optimizer's state of each, the live dicts.
        names: Of the moments. Those of `lacking` ones are not in the states yet.
        rooms: Of each parameter.
        history: How many steps are kept.
        lacking: The states have no moments yet, and the step makes them.

    Attributes:
        sets: Per set, the moments of all parameters, parameter by parameter.
        pasts: Per kept step, the former values.
        past_steps: Per kept step, the former step counts: shape [history, parameters]; None without counts.
        live: The set that the states hold.
        fresh: The states did not exist before this step.
        is_continued: What earlier steps of these parameters have left in the rooms is still there.
    """

    def __init__(
        self,
        parameters: Sequence[torch.Tensor],
        states: Sequence[dict[str, Any]],
        names: Sequence[str],
        rooms: Sequence[Room],
        history: int,
        *,
        lacking: bool,
    ) -> None:
        self.parameters, self.states, self.names = list(parameters), list(states), list(names)
        self.history, self.lacking, self.fresh, self.live = history, lacking, False, 0
        self.is_continued = True
        for parameter, state, room in zip(parameters, states, rooms, strict=True):
            live = (
                {name: torch.zeros_like(parameter.detach()) for name in names}
                if lacking
                else {name: state[name] for name in names}
            )
            self.is_continued &= room.furnish(parameter, live, history)
        self.sets = [[room.sets[s][name] for room in rooms for name in names] for s in range(history + 1)]
        self.pasts = [[room.pasts[k] for room in rooms] for k in range(history)]
        self.steps: list[torch.Tensor] = [state["step"] for state in states if "step" in state]
        self.past_steps: torch.Tensor | None = None
        if self.steps:
            like = self.steps[0]
            self.past_steps = torch.zeros(history, len(self.steps), dtype=like.dtype, device=like.device)
        self.device = self.parameters[0].device
        self.table: Table | None = None

    @property
    def num_bytes(self) -> int:
        """Memory that the past takes, the live moments not counted."""
        kept = [*(t for s in self.sets[1:] for t in s), *(t for past in self.pasts for t in past)]
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)

    def stands(self, states: Sequence[dict[str, Any]]) -> bool:
        """Whether these are the states it was made for, with one of its sets in them. Notes which."""
        if len(states) != len(self.states) or not all(map(operator.is_, states, self.states)):
            return False
        if self.steps and not all(map(operator.is_, self.steps, [state.get("step") for state in states])):
            return False
        found = [state.get(name) for state in states for name in self.names]
        if self.lacking:
            return all(tensor is None for tensor in found)
        order = [self.live, *(s for s in range(len(self.sets)) if s != self.live)]
        for s in order if self.names else order[:1]:
            if all(map(operator.is_, found, self.sets[s])):
                self.live = s
                return True
        return False

    def install(self, index: int) -> None:
        """Make the states hold that set."""
        moments = iter(self.sets[index])
        for state in self.states:
            for name in self.names:
                state[name] = next(moments)
        self.live = index

    def written(self) -> list[torch.Tensor]:
        """What the next step would write if the moments stayed in their place."""
        return [*self.parameters, *self.sets[self.live], *self.steps]

    def named(self, index: int) -> dict[str, list[torch.Tensor]]:
        """Moments of one set, by name."""
        return {name: self.sets[index][i :: len(self.names)] for i, name in enumerate(self.names)}

    def could_be_compiled(self) -> bool:
        """Whether the kernels can step these tensors, whatever the gradients are."""
        moments = self.sets[0]
        return (
            self.device.type in KERNEL_DEVICES
            and self.parameters[0].dtype in DTYPES
            and all(
                type(p) in _PLAIN and p.stride() == q.stride()
                for p, q in zip(self.parameters, self.pasts[0], strict=True)
            )
            and all(m.dtype in DTYPES and m.dtype is moments[0].dtype for m in moments)
            and all(m.device == self.device for m in moments)
            and all(
                m.stride() == p.stride() and m.shape == p.shape
                for i, p in enumerate(self.parameters)
                for s in self.sets
                for m in s[i * len(self.names) : (i + 1) * len(self.names)]
            )
            and all(step.device == self.device and step.dtype is torch.float32 for step in self.steps)
            and len(self.steps) in (0, len(self.parameters))
        )

    def gradients(self) -> list[torch.Tensor]:
        """The gradients, as they are now."""
        return [p.grad for p in self.parameters if p.grad is not None]


def fit_the_kernel(parameters: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]) -> bool:
    """Whether each gradient has type, place and strides of its parameter, as the kernels take them for granted."""
    if any(gradient.layout is not torch.strided for gradient in gradients):
        return False
    kinds = {parameters[0].dtype}
    return (
        {gradient.dtype for gradient in gradients} == kinds
        and set(map(type, gradients)).issubset(_PLAIN)
        and list(map(torch.Tensor.stride, gradients)) == list(map(torch.Tensor.stride, parameters))
    )

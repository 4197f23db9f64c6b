"""PAST: what an optimizer's steps have left behind, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from tolaria.optim.batch import Batch, Room


@dataclass(frozen=True, slots=True)
class Options:
    """What an optimizer was asked for.

    Attributes:
        history: How many steps are kept.
        alternate: Let the moments change their place.
        moment_dtype: Element type of the moments; None: that of the parameter.
    """

    history: int
    alternate: bool
    moment_dtype: torch.dtype | None


@dataclass(frozen=True, slots=True)
class Kept:
    """What an optimizer holds of its past, for reading.

    Attributes:
        steps: How many steps can be undone now.
        alternates: The moments change their place with every step, so that the old ones need no copy.
        reason: Why they do not; empty if they do.
        compiled: The last step was made by the kernels, and not by torch's operators.
        num_bytes: Memory that the past takes.
    """

    steps: int
    alternates: bool
    reason: str
    compiled: bool
    num_bytes: int


@dataclass(slots=True, eq=False)
class Trace:
    """Where one batch's state before a step is.

    Attributes:
        batch: The batch.
        past: Which of its pasts has the parameters, and the step counts.
        live: Which of its sets the states held.
        held: Which of its sets has the moments.
        moved: The live moments are another set's since; else they were overwritten in place.
    """

    batch: Batch
    past: int
    live: int
    held: int
    moved: bool


_DURING = -2  # no count of a witness


@dataclass(frozen=True, slots=True)
class Sighting:
    """What can be told of other writers at one moment.

    Attributes:
        versions: Of tensors, by id: torch counts up with every write that it sees.
        foreign: What the witness has counted: writes that torch may not have seen. `_DURING`: some began meanwhile.
    """

    versions: dict[int, int]
    foreign: int

    @classmethod
    def of(cls, tensors: Iterable[torch.Tensor], foreign: int) -> Sighting:
        """The versions that these have now."""
        return cls({id(tensor): tensor._version for tensor in tensors}, foreign)


@dataclass(slots=True, eq=False)
class Left:
    """What one step has left behind.

    Attributes:
        traces: Of its batches.
        number: How many steps this optimizer had made with it, undone ones included.
        before: What of other writers was known when it began; None where nobody had asked for that.
        versions: Of the parameters, after it.
    """

    traces: list[Trace]
    number: int = 0
    before: Sighting | None = None
    versions: dict[int, int] = field(default_factory=dict)

    def note(self, parameters: Iterable[torch.Tensor] | None = None) -> None:
        """Note the versions of parameters; None: of all that the step wrote."""
        for parameter in self.parameters() if parameters is None else parameters:
            if parameters is None or id(parameter) in self.versions:
                self.versions[id(parameter)] = parameter._version

    def parameters(self) -> Iterable[torch.Tensor]:
        """Those that the step wrote."""
        return (parameter for trace in self.traces for parameter in trace.batch.parameters)

    def is_last_word(self) -> bool:
        """Whether nobody has written the parameters since, through torch."""
        return all(parameter._version == self.versions[id(parameter)] for parameter in self.parameters())


@dataclass(slots=True, eq=False)
class Past:
    """The memory and the traces of one optimizer.

    Attributes:
        options: What was asked for.
        rooms: Memory by parameter.
        batches: What the last steps were made with, by group, parameters and what they lacked.
        left: Traces of the steps that can be undone, oldest first.
        turn: Which past the next step writes, counted up.
        captured: A graph was captured, which goes on reading and writing where it did.
        graphed: The batches that captures were made with: their memory must not be given away, whatever comes.
        launches_undone: After a capture: how many launches there had been when the last step was undone.
        compiled: The last step was made by the kernels.
        made: How many steps were made, undone ones included.
        lost: Number of the last step that cannot be gone behind any more.
        witness: Counts sections of writers that torch's versions may not tell of. None: nobody wants to know.
        stays: By id of a group, whether its moments kept their place in its last step.
    """

    options: Options
    rooms: dict[torch.Tensor, Room] = field(default_factory=dict)
    batches: dict[tuple[object, ...], list[Batch]] = field(default_factory=dict)
    left: list[Left] = field(default_factory=list)
    turn: int = 0
    captured: bool = False
    graphed: list[Batch] = field(default_factory=list)
    launches_undone: int = -1
    compiled: bool = False
    made: int = 0
    lost: int = 0
    witness: Callable[[], int] | None = None
    stays: dict[int, bool] = field(default_factory=dict)

    def begin(self, batches: Iterable[Batch], stays: dict[int, bool]) -> Sighting | None:
        """A step comes: forget what it does not follow on. Answers what is to be told of other writers.

        Args:
            batches: What it will write.
            stays: By id of a group, whether its moments must not change their place.
        """
        # what has alternated and does so no more takes sets in another order, so it may meet one that is still needed
        has_changed = any(self.stays.get(group, now) != now for group, now in stays.items())
        self.stays.update(stays)
        if self.left and (self.captured or has_changed or not self.left[-1].is_last_word()):
            self.forget()
        if self.witness is None:
            return None
        written = (tensor for batch in batches for tensor in batch.written())
        return Sighting.of(written, self.witness())

    def forget(self) -> None:
        """Nothing of what was left behind can be taken back any more."""
        self.left.clear()
        self.lost = self.made

    def place(self) -> int:
        """Which past the step writes. After a capture always the one that the graph writes."""
        return 0 if self.captured else self.turn % self.options.history

    def target(self, batch: Batch, stays: bool) -> int:
        """Which set the step writes, or copies the old moments into where the live ones stay."""
        away = 1 + self.place() if stays else 1
        return (batch.live + away) % (self.options.history + 1)

    def end(self, traces: list[Trace], before: Sighting | None) -> None:
        """The step was launched."""
        self.made += 1
        if before is not None and (self.witness is None or self.witness() != before.foreign):
            before = Sighting(before.versions, _DURING)  # what was left behind may be from before it, or from after it
        left = Left(traces, self.made, before)
        left.note()
        self.left.append(left)
        while len(self.left) > self.options.history:
            self.lost = self.left.pop(0).number
        self.turn += 1

    def num_bytes(self) -> int:
        """Memory that the past takes."""
        tensors = [
            tensor
            for room in self.rooms.values()
            for tensor in (*(t for one in room.sets[1:] for t in one.values()), *room.pasts)
        ]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

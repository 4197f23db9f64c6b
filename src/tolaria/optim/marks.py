"""MARKS: a moment between two steps that the steps after it can be taken back to, as far as their optimizer goes.

What steps leave behind are the bytes from before each of them. They are the bytes of the mark if nobody has written
there between the mark and the first step that did. Torch counts the writes that it sees; of the others a witness has
to tell (`Sighting`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from tolaria.optim.leaving import Leaving
from tolaria.optim.past import Left, Past, Sighting

Pair = tuple[torch.Tensor, torch.Tensor]
"""Where bytes go, and where they are."""


@dataclass(frozen=True, slots=True, eq=False)
class Mark:
    """One optimizer between two steps.

    Attributes:
        past: Its past then; another one since a state was loaded.
        number: How many steps it had made.
        tensors: Parameters, moments and step counts that are to be taken back. Held: no other may come by their ids.
        seen: What was known of other writers.
        follows: Nobody had written the parameters since the last step.
    """

    past: Past
    number: int
    tensors: list[torch.Tensor]
    seen: Sighting
    follows: bool


def tensors_of(optimizer: Leaving) -> list[torch.Tensor]:
    """What the steps of an optimizer write, and leave the old bytes of: parameters, moments, step counts."""
    found: list[torch.Tensor] = []
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        state = optimizer.state.get(parameter, {})
        found += [parameter, *(state[name] for name in optimizer._names_in(state))]
        found += [state["step"]] if isinstance(state.get("step"), torch.Tensor) else []
    return found


def mark(optimizer: Leaving, among: frozenset[int]) -> Mark:
    """The present moment, as far as tensors with these ids go. No step is under way; `Past.witness` is there."""
    past, tensors = optimizer._past, [tensor for tensor in tensors_of(optimizer) if id(tensor) in among]
    assert past.witness is not None
    follows = not past.left or past.left[-1].is_last_word()
    return Mark(past, past.made, tensors, Sighting.of(tensors, past.witness()), follows)


def obstacle(optimizer: Leaving, to: Mark) -> str:
    """Why the optimizer cannot be taken back to that mark, bit for bit; empty if it can. Touches no device."""
    past = optimizer._past
    if past is not to.past:
        return "a state was loaded into the optimizer"
    if past.captured:
        return "a step was captured, and its replays tell nobody of what they write"
    if to.number < past.lost:
        return f"the optimizer holds {past.options.history} steps, or steps were not its last writer"
    steps = _since(past, to)
    if any(left.before is None for left in steps):
        return "a step was made before anybody kept notes"
    first: dict[int, tuple[int, int]] = {}
    for left in steps:
        before = left.before
        assert before is not None
        for key, version in before.versions.items():
            first.setdefault(key, (version, before.foreign))
    now = 0 if past.witness is None else past.witness()
    for tensor in to.tensors:
        stepped = first.get(id(tensor))
        version, foreign = stepped or (tensor._version, now)
        if version != to.seen.versions[id(tensor)]:
            return "somebody has written parameters or moments between the note and the step after it"
        if foreign != to.seen.foreign and stepped is None:
            return "a section of `using()` or a replay may have written a parameter that no step has written since"
        if foreign != to.seen.foreign:
            return "a section of `using()` or a replay may have written between the note and the step after it"
    if not all(map(_is_untouched, steps)):
        return "somebody has written moments of an earlier step"
    return ""


def way_back(to: Mark) -> list[Pair]:
    """The copies that take parameters, moments and step counts back to a mark that nothing is in the way of.

    Each target once, and no target is a source: in any order. Moments that have changed their place need none; whoever
    makes the states hold the tensors of the mark again has them.
    """
    pairs: dict[int, Pair] = {}
    for left in reversed(_since(to.past, to)):
        for target, source in _pairs(left):
            pairs[id(target)] = target, source  # the older step has the last word
    return list(pairs.values())


def rewind(to: Mark) -> None:
    """The optimizer was taken back to that mark: the steps after it have left nothing behind any more."""
    past, steps = to.past, _since(to.past, to)
    del past.left[len(past.left) - len(steps) :]
    past.turn -= len(steps)
    if not to.follows:
        past.forget()
    for last in past.left[-1:]:
        last.note()


def _since(past: Past, to: Mark) -> list[Left]:
    return [left for left in past.left if left.number > to.number]


def _is_untouched(left: Left) -> bool:
    """Whether the moments that a step has left where they were still have the versions from before it."""
    before = left.before
    return before is not None and all(
        tensor._version == before.versions[id(tensor)]
        for trace in left.traces
        if trace.moved and not trace.batch.lacking
        for tensor in trace.batch.sets[trace.held]
    )


def _pairs(left: Left) -> Iterator[Pair]:
    for trace in left.traces:
        batch = trace.batch
        yield from zip(batch.parameters, batch.pasts[trace.past], strict=True)
        if batch.fresh or batch.lacking:
            continue  # of the rest there was nothing
        if not trace.moved:
            yield from zip(batch.sets[trace.live], batch.sets[trace.held], strict=True)
        if batch.past_steps is not None:
            yield from zip(batch.steps, batch.past_steps[trace.past].unbind(), strict=True)


def copy(pairs: Iterable[Pair]) -> None:
    """Make copies of that list, on the current stream, by no means of autograd's."""
    kinds: dict[torch.dtype, list[Pair]] = {}  # one launch for each
    for target, source in pairs:
        kinds.setdefault(target.dtype, []).append((target.data, source))
    for some in kinds.values():
        # `.data`: whoever restores counts up the versions himself, once
        torch._foreach_copy_([target for target, _ in some], [source for _, source in some])

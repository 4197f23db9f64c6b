"""LEAVING: an optimizer whose step leaves the whole state before it behind.

The parameters stay where they are, and their old values are stored; the moments alternate between sets of tensors, so
that their old values need no copy at all. Where they must not change their place (a captured graph holds their
addresses) the old ones are copied. Kernels do all of it in one pass; without them torch's own optimizer makes the step
behind a copy, bit for bit as it would without us.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch.optim import Optimizer

from tolaria.errors import CaptureInProgress, InvalidConfig, NoSnapshot, UnsupportedState
from tolaria.optim import source
from tolaria.optim.batch import Batch, Room, fit_the_kernel
from tolaria.optim.launch import Kernels, Table, is_capturing
from tolaria.optim.past import Kept, Options, Past, Trace

Group = dict[str, Any]


class Leaving(Optimizer):
    """What `AdamW` and `SGD` share. Not to be used by itself.

    Call `step` and `undo` on the thread and stream that train, like any optimizer's step. Under a governor `undo`
    writes governed memory: call it inside `using()`.
    """

    _past: Past
    _KERNEL: ClassVar[str]

    def _remember(self, history: int, alternate: bool, moment_dtype: torch.dtype | None) -> None:
        if isinstance(history, bool) or not isinstance(history, int) or history < 1:
            raise InvalidConfig("building an optimizer", f"history={history!r}, expected 1 or more", "Keep one step.")
        is_type = isinstance(moment_dtype, torch.dtype) and moment_dtype.is_floating_point and moment_dtype.itemsize > 1
        if moment_dtype is not None and not is_type:
            raise InvalidConfig(
                "building an optimizer",
                f"moment_dtype={moment_dtype!r}, expected a floating-point type of two bytes or more",
                "Use float32.",
            )
        self._past = Past(Options(history, alternate, moment_dtype))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_past": self._past.options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        options = state.get("_past") or self._past.options
        super().__setstate__({key: value for key, value in state.items() if key != "_past"})
        before = vars(self).get("_past")
        self._past = Past(options)  # a copy has no past, and what was loaded has none either
        if isinstance(before, Past):
            self._past.graphed = before.graphed  # loading ends no graph
        self._step_supports_amp_scaling = self.refuses_by_itself()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state that this class or torch's own of the same name has saved. What was left behind is forgotten."""
        how = [{key: group[key] for key in ("fused", "foreach")} for group in self.param_groups]
        super().load_state_dict(state_dict)
        dtype = self._past.options.moment_dtype
        for group, mine, theirs in zip(self.param_groups, how, state_dict["param_groups"], strict=True):
            group.update(mine)  # how a step is made here, however it was made there
            for parameter, number in zip(group["params"], theirs["params"], strict=True):
                values, state = state_dict["state"].get(number, {}), self.state.get(parameter, {})
                for name in self._names_in(values) if dtype is not None else ():
                    # torch has cast them to the type of the parameter: take them from where they have all their bits
                    state[name] = values[name].to(parameter.device, dtype, copy=True)
                if "step" in state and group["fused"]:
                    state["step"] = state["step"].to(parameter.device, torch.float32)
        self._step_supports_amp_scaling = self.refuses_by_itself()

    # ------------------------------------------------------------ what an optimizer says of itself

    def refuses_by_itself(self) -> bool:
        """Whether a step looks at `found_inf` where that is, without waiting. A scaler leaves refusing to it then."""
        return True

    def _check_gradients(self, gradients: Sequence[torch.Tensor]) -> None:
        """Refuse gradients that torch would refuse, before anything is written."""

    def _check_capture(self) -> None:
        """Refuse a capture that torch would refuse."""

    @abstractmethod
    def _names(self, group: Group) -> list[str]:
        """Of the moments that a group has."""

    @abstractmethod
    def _names_in(self, state: dict[str, Any]) -> list[str]:
        """Of the moments in a state."""

    @abstractmethod
    def _create(self, group: Group, parameters: Sequence[torch.Tensor]) -> None:
        """Give state to parameters that have none, where that is possible before the first step."""

    @abstractmethod
    def _declines(self, group: Group) -> str:
        """Why the moments of a group must not change their place; empty if they may."""

    @abstractmethod
    def _suits(self, group: Group) -> bool:
        """Whether the kernels know these hyper-parameters."""

    @abstractmethod
    def _launch(
        self, batch: Batch, table: Table, kernels: Kernels, group: Group, places: tuple[int, int, int], what: int
    ) -> None:
        """Enqueue one step of a batch."""

    @abstractmethod
    def _operate(self, batch: Batch, group: Group, parameters: list[torch.Tensor], flags: dict[str, Any]) -> None:
        """Make the step of a batch in torch's operators, in place of `parameters` and the live moments."""

    # ------------------------------------------------------------ step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step and leave the state before it behind. Arguments and result as torch's.

        Nothing happens, bit for bit, where the attribute `found_inf` (shape [1] or [], float32) is set and 1 on the
        device when the step gets there: the flag of `GradScaler` and of a governor's veto.

        Raises:
            UnsupportedState: The group is `differentiable`, or a first step is captured.
            CaptureInProgress: Two captures without a step in between.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_capture()
        work = [(group, batch) for group in self.param_groups for batch in self._batches(group)]
        if not work:
            return loss
        capturing = any(is_capturing(batch.device) for _, batch in work)
        kernels = [self._kernels_for(group, batch) for group, batch in work]
        ready: list[Kernels] = [each for each in kernels if each is not None]
        past = self._past
        if capturing and not past.captured:
            past.captured, past.launches_undone = True, _launches(batch for _, batch in work)
        past.graphed += [batch for _, batch in work] if capturing else []
        stays = {id(group): bool(self._reason(group)) for group, _ in work}
        before = past.begin([batch for _, batch in work], stays)
        past.compiled = len(ready) == len(work)
        try:
            if past.compiled:
                traces = [self._step_in_one(*each, kernel) for each, kernel in zip(work, ready, strict=True)]
            else:
                traces = self._step_in_operators(work)
        except BaseException:
            past.forget()  # half a step may have written over what the steps before it had left
            raise
        past.end(traces, before)
        return loss

    def _batches(self, group: Group) -> list[Batch]:
        """The parameters of a group that have a gradient, as they are stepped together."""
        if group.get("differentiable"):
            raise UnsupportedState(
                "making an optimizer step",
                "the group is differentiable, and what a step leaves behind is not recorded by autograd",
                "Use torch's own optimizer there.",
            )
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not parameters:
            return []
        self._check_gradients([parameter.grad for parameter in parameters if parameter.grad is not None])
        fresh = [parameter for parameter in parameters if not self.state.get(parameter)]
        if fresh:
            _refuse_capturing(parameters[0].device)
            self._create(group, fresh)
        names = self._names(group)
        # without moments there is no state, as with torch
        states = [self.state[parameter] if names else _NO_STATE for parameter in parameters]
        lacks = [bool(names) and state.get(names[0]) is None for state in states]
        key = (id(group), tuple(names), tuple(map(id, parameters)), tuple(map(id, fresh)), any(lacks) and tuple(lacks))
        known = self._past.batches.get(key)
        if known is not None and _all_stand(known, states):
            return known
        self._forget_others()
        made = self._divide(parameters, states, names, lacks, set(map(id, fresh)))
        self._past.batches[key] = made
        return made

    def _divide(
        self,
        parameters: Sequence[torch.Tensor],
        states: Sequence[dict[str, Any]],
        names: list[str],
        lacks: Sequence[bool],
        fresh: set[int],
    ) -> list[Batch]:
        _refuse_capturing(parameters[0].device)
        divided: dict[tuple[object, ...], list[int]] = {}
        for i, parameter in enumerate(parameters):
            kind = (parameter.device, parameter.dtype, lacks[i], id(parameter) in fresh)
            divided.setdefault(kind, []).append(i)
        made = []
        for indices in divided.values():
            some = [parameters[i] for i in indices]
            rooms = [self._past.rooms.setdefault(parameter, Room()) for parameter in some]
            batch = Batch(
                some,
                [states[i] for i in indices],
                names,
                rooms,
                self._past.options.history,
                lacking=lacks[indices[0]],
            )
            batch.fresh = id(some[0]) in fresh
            if not batch.is_continued:
                self._past.forget()
            made.append(batch)
        return made

    def _forget_others(self) -> None:
        """Let go of memory of parameters that are no longer there, and of what the very first steps were made with."""
        past = self._past
        there = {id(parameter) for group in self.param_groups for parameter in group["params"]}
        past.rooms = {parameter: room for parameter, room in past.rooms.items() if id(parameter) in there}
        if len(past.batches) >= _MOST_BATCHES:
            past.batches.clear()

    def _kernels_for(self, group: Group, batch: Batch) -> Kernels | None:
        """The kernels for a batch, None if operators have to step it."""
        if not self._suits(group):
            return None
        stands = batch.table is not None and batch.table.fits()
        if not stands and not batch.could_be_compiled():
            return None
        if not fit_the_kernel(batch.parameters, batch.gradients()):
            return None
        if not stands:
            _refuse_capturing(batch.device)
            batch.table = Table(batch.parameters, batch.steps, batch.sets, batch.pasts)
        assert batch.table is not None
        moment = batch.sets[0][0].dtype if batch.names else batch.parameters[0].dtype
        with batch.table.on_device():
            return source.compiled(
                batch.device.index or 0, self._KERNEL, batch.parameters[0].dtype, moment, len(batch.names)
            )

    def _step_in_one(self, group: Group, batch: Batch, kernels: Kernels) -> Trace:
        past, table = self._past, batch.table
        assert table is not None
        stays = bool(self._reason(group))
        place, target, live = past.place(), past.target(batch, stays), batch.live
        found, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        what = (source.STORE if stays else 0) | (source.FIRST if batch.lacking else 0)
        what |= (source.MAXIMIZE if group["maximize"] else 0) | (0 if found is None else source.FOUND)
        what |= 0 if scale is None else source.SCALED
        with table.on_device():
            self._launch(batch, table, kernels, group, (live, target, place), what)
        written = batch.parameters if scale is None else [*batch.parameters, *batch.gradients()]
        torch.autograd.graph.increment_version(written)
        if batch.names and (batch.lacking or not stays):
            batch.install(live if stays else target)
        return Trace(batch, place, live, target if stays else live, not stays)

    def _pointer(self, name: str, device: torch.device) -> torch.Tensor | None:
        """One of the flags that others hang on an optimizer, where the kernel can read it."""
        value = getattr(self, name, None)
        return None if value is None else value.to(device, torch.float32, non_blocking=True)

    def _step_in_operators(self, work: Sequence[tuple[Group, Batch]]) -> list[Trace]:
        """Copy the past away, then let torch make the step."""
        found, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        torchs_own = all(group["fused"] for group, _ in work)  # those do both by themselves
        flags = {"found_inf": found, "grad_scale": scale} if torchs_own else {"found_inf": None, "grad_scale": None}
        traces = [self._copy_away(group, batch) for group, batch in work]
        for (group, batch), trace in zip(work, traces, strict=True):
            refused = None if found is None or torchs_own else found.to(batch.device) == 1
            if scale is not None and not torchs_own:
                factor = scale.to(batch.device)
                torch._foreach_div_(batch.gradients(), factor if refused is None else factor.where(~refused, 1))
            widened = [p.to(batch.sets[0][0].dtype) for p in batch.parameters] if _is_wider(batch) else batch.parameters
            self._operate(batch, group, widened, flags)
            if widened is not batch.parameters:
                torch._foreach_copy_(batch.parameters, widened)
            if refused is not None:
                _take_back(trace, refused)
            if batch.lacking:  # what torch has made goes where the next steps look for it
                made = [state[name] for state in batch.states for name in batch.names]
                torch._foreach_copy_(batch.sets[0], made)
                batch.install(0)
        return traces

    def _copy_away(self, group: Group, batch: Batch) -> Trace:
        past = self._past
        stays = bool(self._reason(group))
        place, target, live = past.place(), past.target(batch, stays), batch.live
        torch._foreach_copy_(batch.pasts[place], batch.parameters)
        if batch.past_steps is not None:
            torch._foreach_copy_(list(batch.past_steps[place].unbind()), batch.steps)
        if batch.names and not batch.lacking:
            torch._foreach_copy_(batch.sets[target], batch.sets[live])
            if not stays:
                batch.install(target)
        return Trace(batch, place, live, target if stays else live, not stays)

    # ------------------------------------------------------------ the way back

    def kept(self) -> Kept:
        """What of the past is held now. Touches no device."""
        past = self._past
        reason = next(filter(None, map(self._reason, self.param_groups)), "")
        steps = len(past.left) if past.left and past.left[-1].is_last_word() else 0
        return Kept(steps, not reason, reason, past.compiled, past.num_bytes())

    def _reason(self, group: Group) -> str:
        if not self._past.options.alternate:
            return "alternate=False"
        if self._past.captured:
            return "a step was captured, and its graph holds the addresses of the moments"
        return self._declines(group)

    @torch.no_grad()
    def undo(self) -> None:
        """Take the last step back, bit for bit: parameters, moments, step counts, also that there were none yet.

        Call it again for the step before, up to `history`. Hyper-parameters, schedulers, random state and buffers of
        the model are not the optimizer's: see docs/optim.md. Enqueues copies on the current streams and waits for
        nothing, unless a graph was captured.

        Raises:
            NoSnapshot: There is no step to take back, or somebody has written the parameters since (a rollback, a
                loaded state, a clamp). Nothing was changed.
            CaptureInProgress: Inside a capture. Nothing was changed.
        """
        past = self._past
        if any(is_capturing(trace.batch.device) for left in past.left[-1:] for trace in left.traces):
            raise CaptureInProgress("undoing an optimizer step", "a graph is captured", "Call it after the capture.")
        if not past.left:
            raise NoSnapshot("undoing an optimizer step", "none is held", "Make a step first, or ask for more history.")
        if not past.left[-1].is_last_word():
            raise NoSnapshot(
                "undoing an optimizer step",
                "the parameters were written since the last step, expected the step to be the last to write them",
                "Roll back through the governor, or take the other change back first.",
            )
        if past.captured:
            self._note_launches()
        left = past.left[-1] if past.captured else past.left.pop()
        for trace in left.traces:
            self._undo(trace)
        if past.captured:
            left.note()
            return
        past.turn -= 1
        for earlier in past.left[-1:]:
            earlier.note(left.parameters())

    def _note_launches(self) -> None:
        """After a capture, replays write the past and the host does not see them: the device has counted them."""
        past = self._past
        tables = [trace.batch.table for trace in past.left[-1].traces]
        launches = sum(int(table.launches) for table in tables if table is not None)
        if launches == past.launches_undone:
            raise NoSnapshot(
                "undoing an optimizer step",
                "none was made or replayed since the capture or the last undo",
                "Make or replay a step first.",
            )
        past.launches_undone = launches

    def _undo(self, trace: Trace) -> None:
        batch = trace.batch
        torch._foreach_copy_(batch.parameters, batch.pasts[trace.past])
        if batch.fresh or batch.lacking:
            for parameter, state in zip(batch.parameters, batch.states, strict=True):
                for name in batch.names if batch.lacking else list(state):
                    state.pop(name, None)
                if not state:
                    self.state.pop(parameter, None)
            return
        if trace.moved:
            batch.install(trace.held)
        elif batch.names:
            torch._foreach_copy_(batch.sets[batch.live], batch.sets[trace.held])
        if batch.past_steps is not None:
            torch._foreach_copy_(batch.steps, list(batch.past_steps[trace.past].unbind()))


_MOST_BATCHES = 32
_NO_STATE: dict[str, Any] = {}


def _refuse_capturing(device: torch.device) -> None:
    if is_capturing(device):
        raise UnsupportedState(
            "capturing an optimizer step",
            "its memory is still to be laid: it is the first one of these parameters, or tensors were replaced",
            "Make two steps outside of the capture first: one makes the state, the next one the memory.",
        )


def _all_stand(batches: Sequence[Batch], states: Sequence[dict[str, Any]]) -> bool:
    mine = {id(state) for state in states}
    return sum(len(batch.states) for batch in batches) == len(states) and all(
        all(id(state) in mine for state in batch.states) and batch.stands(batch.states) for batch in batches
    )


def _launches(batches: Iterable[Batch]) -> int:
    """How often their steps were counted on the device, replays left out."""
    return sum(batch.table.num_launched for batch in batches if batch.table is not None)


def _is_wider(batch: Batch) -> bool:
    return bool(batch.names) and batch.sets[0][0].dtype is not batch.parameters[0].dtype


def _take_back(trace: Trace, refused: torch.Tensor) -> None:
    """Undo, where `refused` is true, what operators have done that know no flag. No bit of the rest changes."""
    batch = trace.batch
    pairs = list(zip(batch.parameters, batch.pasts[trace.past], strict=True))
    if batch.lacking:
        made = [(state[name], None) for state in batch.states for name in batch.names if name in state]
        pairs += [(new, torch.zeros_like(new)) for new, _ in made]
    elif batch.names:
        pairs += zip(batch.sets[batch.live], batch.sets[trace.held], strict=True)
    if batch.past_steps is not None:
        pairs += zip(batch.steps, batch.past_steps[trace.past].unbind(), strict=True)
    for new, old in pairs:
        new.copy_(torch.where(refused.to(new.device).reshape(()), old, new))

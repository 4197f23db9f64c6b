"""ARGUMENTS: what callers pass in, looked at before anything is done."""

from __future__ import annotations

import gc
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.optim import Optimizer

from tolaria.config import GovernorConfig
from tolaria.errors import UnsupportedState, UsageError
from tolaria.observe import several_of
from tolaria.report import SnapshotInfo

When = Literal["boundary"]
Verify = Literal["before", "after"]
Grads = Literal["capture", "drop"]

_WHEN, _VERIFY, _GRADS = get_args(When), get_args(Verify), get_args(Grads)

_ATTACHING = "attaching the governor"


def as_list(value: Any) -> list[Any]:
    """One of something, several, or none (None)."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def require_parts(
    model: Any, optimizers: Sequence[Any], schedulers: Sequence[Any], scaler: Any, config: Any, detector: Any
) -> None:
    """Raise `UsageError` for what is no part of a train state, or no setting; what an optimizer is, is asked later."""
    _require(isinstance(model, nn.Module), _ATTACHING, "model", model, "a torch.nn.Module")
    for scheduler in schedulers:
        offers = all(callable(getattr(scheduler, name, None)) for name in ("step", "state_dict", "load_state_dict"))
        is_one = offers and not isinstance(scheduler, (type, Optimizer))
        _require(is_one, _ATTACHING, "scheduler", scheduler, "one with step, state_dict and load_state_dict")
    is_scaler = scaler is None or isinstance(scaler, torch.amp.GradScaler)
    _require(is_scaler, _ATTACHING, "scaler", scaler, "a torch.amp.GradScaler")
    _require(config is None or isinstance(config, GovernorConfig), _ATTACHING, "config", config, "a GovernorConfig")
    judges = detector is None or all(callable(getattr(detector, name, None)) for name in ("init", "update"))
    _require(judges, _ATTACHING, "detector", detector, "one of tolaria.judge, or a Detector of yours")
    if len({id(optimizer) for optimizer in optimizers}) < len(optimizers):
        raise UsageError(_ATTACHING, "an optimizer was given twice, and would step twice", "Give each once.")


def require_ungoverned(model: nn.Module, acts: bool, governed: Callable[[], Sequence[tuple[nn.Module, bool]]]) -> None:
    """Raise `UsageError` for a model that another governor has, or trains a part of.

    Args:
        model: To be governed.
        acts: Whether its governor will roll back.
        governed: Answers the models that are governed now, each with the same of its governor.
    """
    if _conflict(model, acts, governed()) is not None:
        gc.collect()  # a governor that was dropped may be part of a cycle, and wait to be collected
        conflict = _conflict(model, acts, governed())
        if conflict is not None:
            raise conflict


def _conflict(model: nn.Module, acts: bool, governed: Sequence[tuple[nn.Module, bool]]) -> UsageError | None:
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    for other, other_acts in governed:
        if model is other:
            return UsageError(
                _ATTACHING,
                "this model is governed already, expected one governor per model",
                "Use the first one, or close() it.",
            )
        shares = any(parameter.requires_grad and id(parameter) in trained for parameter in other.parameters())
        if acts and other_acts and shares:
            return UsageError(
                _ATTACHING,
                "another governor trains some of this model's parameters, and its rollbacks would change them here",
                "Govern both as one model, for example in a ModuleList, or close() the other governor.",
            )
    return None


def refuse_coordinator(coordinator: Any) -> None:
    """Raise `UnsupportedState` for one: ranks do not agree on anything yet."""
    if coordinator is not None:
        raise UnsupportedState(
            _ATTACHING,
            "a coordinator was given, and agreement between ranks is not handled yet",
            'Use one process, or mode="observe".',
        )


def require_of_snapshot(doing: str, step: Any, grads: Any, when: Any) -> int | None:
    """Raise `UsageError` for a value that `TolariaGovernor.snapshot` does not take. Answers the step, a plain int."""
    _require_choice(doing, "grads", grads, _GRADS)
    _require_choice(doing, "when", when, _WHEN)
    return None if step is None else _whole(doing, "step", step, "a whole number")


def require_steps(doing: str, steps: Any) -> int:
    """Raise `UsageError` unless it is one step or more. Answers how many, as a plain number."""
    expected = "a whole number of at least 1"
    number = _whole(doing, "steps", steps, expected)
    _require(number >= 1, doing, "steps", number, expected)
    return number


def _whole(doing: str, name: str, value: Any, expected: str) -> int:
    """A number of Python's, of NumPy's or in a tensor as one of Python's: a ledger takes no others."""
    try:
        return operator.index(value)
    except TypeError:
        raise _wrong(doing, name, value, expected) from None


def require_of_step(doing: str, loss: Any, signs: Mapping[str, Any], *, clip: Any = None, metric: Any = None) -> None:
    """Raise `UsageError` for a loss or a sign that is no number. Tensors are not read, so nothing waits."""
    _require_loss(doing, loss)
    for name, value in signs.items():
        _require(is_number(value), doing, name, value, "a number, or a tensor")
    for name, value in (("clip", clip), ("metric", metric)):
        _require(value is None or is_number(value), doing, name, value, "a number")


def _require_loss(doing: str, loss: Any) -> None:
    if loss is None or is_number(loss):
        return
    several = several_of(loss)
    _require(several is not None, doing, "loss", loss, "a number, a tensor, or several of them")
    for one in () if several is None else several:
        _require_loss(doing, one)


def is_number(value: Any) -> bool:
    """Whether `float` answers for it, which no text counts for; any tensor does, and is not asked."""
    if isinstance(value, (float, int, torch.Tensor)):
        return True
    if not hasattr(value, "__float__"):
        return False
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def require_of_rollback(doing: str, optimizer: Any, when: Any, verify: Any) -> None:
    """Raise `UsageError` for a value that `TolariaGovernor.execute_rollback` does not take."""
    is_one = optimizer is None or isinstance(optimizer, Optimizer)
    _require(is_one, doing, "optimizer", optimizer, "a torch.optim.Optimizer")
    _require_choice(doing, "when", when, _WHEN)
    _require_choice(doing, "verify", verify, _VERIFY)


def _require_choice(doing: str, name: str, value: Any, allowed: Sequence[str]) -> None:
    if value is not None and not (isinstance(value, str) and value in allowed):
        raise _wrong(doing, name, value, " or ".join(map(repr, allowed)))


def require_target(doing: str, to: Any, phase: Callable[[int], str]) -> SnapshotInfo | int | None:
    """Raise `UsageError` unless it is a step, None, or a snapshot of the governor that looks up phases by `phase`.

    Answers it, a step as a plain number.
    """
    if isinstance(to, SnapshotInfo):
        if to._state is not None and to.serial >= 0 and to._state != phase:
            raise UsageError(doing, "the snapshot in `to` is another governor's", "Pass one of this governor's own.")
        return to
    return None if to is None else _whole(doing, "to", to, "a SnapshotInfo, a step, or None")


def _require(condition: bool, doing: str, name: str, value: Any, expected: str) -> None:
    if not condition:
        raise _wrong(doing, name, value, expected)


def _wrong(doing: str, name: str, value: Any, expected: str) -> UsageError:
    shown = repr(value) if isinstance(value, (str, int, float)) else f"a {type(value).__qualname__}"
    return UsageError(doing, f"{name} is {shown}, expected {expected}", "Nothing was done: correct the call.")

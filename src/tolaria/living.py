"""LIVING: the governors of this process. They share its global random state, and a fork."""

from __future__ import annotations

import os
import weakref
from typing import Any, Protocol

from tolaria.config import GovernorConfig


class Living(Protocol):
    """What a governor shows of itself here."""

    model: Any
    config: GovernorConfig

    def _abandon(self) -> None:
        """Stand aside in a forked child: no lock may be taken, its owner may not exist here."""


_live: weakref.WeakValueDictionary[int, Living] = weakref.WeakValueDictionary()  # not to be walked
_is_fork_hook_installed = False


def enter(governor: Living) -> None:
    """It governs from now on, until `leave`; a forked child abandons it. Held weakly."""
    global _is_fork_hook_installed
    if not _is_fork_hook_installed:
        os.register_at_fork(after_in_child=_abandon_in_child)
    _is_fork_hook_installed = True
    _live[id(governor)] = governor


def leave(governor: Living) -> None:
    """It governs no more. Idempotent."""
    _live.pop(id(governor), None)


def governors() -> list[Living]:
    """Those that govern now."""
    return [governor for reference in _live.valuerefs() if (governor := reference()) is not None]


def governed() -> list[tuple[Any, bool]]:
    """The models that are governed now, each with whether its governor rolls back."""
    return [(governor.model, governor.config.mode == "act") for governor in governors()]


def rng_policy(config: GovernorConfig) -> str:
    """The policy in force: global random state belongs to one acting governor, or to nobody."""
    return config.rng or ("restore" if sum(one.config.mode == "act" for one in governors()) <= 1 else "keep")


def _abandon_in_child() -> None:
    """After a fork the child lacks our other threads: its governors stand aside without touching a lock."""
    for governor in governors():
        governor._abandon()

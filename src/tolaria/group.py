"""Several governed models in one process: one governor each, and none of them touches what belongs to another."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from tolaria.admission import announce, enter_exclusive, leave_exclusive
from tolaria.config import GovernorConfig
from tolaria.errors import InvalidConfig, UsageError
from tolaria.governor import TolariaGovernor
from tolaria.operations import Protocol
from tolaria.records import Statistics
from tolaria.report import RollbackReport


class GovernorGroup:
    """Governors by `env_id`.

    A rollback of one leaves the others bit for bit as they would have been without it. For that no two models may share
    memory, and none may depend on global random state, which is never put back (``rng="keep"``): each environment draws
    from a generator of its own.

    Args:
        config: Of every governor, with its own `env_id`. A ledger is shared; its lines tell the environments apart.

    Threads: each governor may run on a thread of its own; `add` and `close` are called by one at a time.
    """

    def __init__(self, config: GovernorConfig | None = None) -> None:
        config = config or GovernorConfig()
        if config.rng not in (None, "keep"):
            raise InvalidConfig(
                "building GovernorGroup",
                f"rng={config.rng!r}, which would write random state that belongs to all of them",
                "Leave it out, and pass add() a generator for each environment.",
            )
        self._config = replace(config, rng="keep")
        self._governors: dict[int, TolariaGovernor] = {}

    def add(
        self,
        model: nn.Module,
        optimizer: Optimizer | list[Optimizer] | None = None,
        *,
        env_id: int | None = None,
        generator: torch.Generator | None = None,
        streams: Iterable[Any] = (),
        **options: Any,
    ) -> TolariaGovernor:
        """Govern one more model.

        Args:
            model: As for `TolariaGovernor`.
            optimizer: The same.
            env_id: Its number; the next free one unless given.
            generator: From which this environment draws; it rolls back with the model.
            streams: With ``barrier="streams"``: the CUDA streams that work on this model, as far as they are known now.
                Those that open a section later are found by themselves.
            **options: Further arguments of `TolariaGovernor`, without `config`.

        Raises:
            UsageError: The number is taken, or the model shares memory with another one of the group.
        """
        number = max(self._governors, default=-1) + 1 if env_id is None else env_id
        doing = f"adding environment {number} to the group"
        if number in self._governors:
            raise UsageError(doing, "its number is taken, expected a free one", "Choose another env_id.")
        governor = TolariaGovernor(model, optimizer, config=replace(self._config, env_id=number), **options)
        try:
            self._require_apart(governor, doing)
            if generator is not None:
                governor.register("generator", generator)
            with governor.using(write=False, streams=streams):
                pass
        except BaseException:
            governor.close()
            raise
        self._governors[number] = governor
        return governor

    def _require_apart(self, governor: TolariaGovernor, doing: str) -> None:
        if governor.is_disabled:
            return
        own = _memory(governor, doing)
        for number, other in self._governors.items():
            if own & _memory(other, doing):
                raise UsageError(
                    doing,
                    f"it shares memory with environment {number}, whose rollbacks would change it",
                    "Give each its own copy, or govern them as one model.",
                )

    def __getitem__(self, env_id: int) -> TolariaGovernor:
        """The governor of that environment."""
        try:
            return self._governors[env_id]
        except KeyError:
            known = ", ".join(map(str, self._governors)) or "none"
            raise UsageError(
                f"asking for environment {env_id}", f"it is not in the group, there are: {known}", "add() it first."
            ) from None

    def __iter__(self) -> Iterator[int]:
        return iter(tuple(self._governors))

    def __len__(self) -> int:
        return len(self._governors)

    def execute_rollback(self, *, env_id: int, **options: Any) -> RollbackReport:
        """`TolariaGovernor.execute_rollback` of one environment; the others do not notice."""
        return self[env_id].execute_rollback(**options)

    def statistics(self) -> dict[int, Statistics]:
        """Counters so far, by environment."""
        return {number: governor.statistics() for number, governor in tuple(self._governors.items())}

    @property
    def rollbacks(self) -> int:
        """Of all environments."""
        return sum(governor.rollbacks for governor in tuple(self._governors.values()))

    def remove(self, env_id: int) -> None:
        """Close one governor and forget it; its number is free again."""
        self[env_id].close()
        del self._governors[env_id]

    def finish(self) -> None:
        """`TolariaGovernor.finish` of every environment: wait for the verdicts of its last steps, and answer a panic.

        Call when no environment trains any more. Leaving ``with group`` calls this, unless by an error.

        Raises:
            NoSnapshot, StateMismatch, UnsupportedState: As for one; the others were finished all the same.
        """
        with contextlib.ExitStack() as stack:
            for governor in self._governors.values():
                stack.callback(governor.finish)

    def close(self) -> None:
        """Close all governors. Idempotent. Judges nothing any more: see `finish`."""
        with contextlib.ExitStack() as stack:
            for governor in self._governors.values():
                stack.callback(governor.close)

    def __enter__(self) -> GovernorGroup:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self.close()


def _memory(governor: TolariaGovernor, doing: str) -> set[tuple[Any, int]]:
    """Addresses of all governed storages. Waits for the sections of other threads."""
    keeper, thread = governor._keeper, threading.get_ident()

    def look() -> Protocol:
        yield announce(thread, doing, patient=True)
        try:
            yield from enter_exclusive(thread, keeper.ground.gate_timeout_s, doing, patient=True)
            return keeper.state.survey().leaves.storages
        finally:
            yield leave_exclusive(thread)

    return {(storage.key[0], storage.key[1]) for storage in keeper.driver.submit(look()) if storage.key[2]}

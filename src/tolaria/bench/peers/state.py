"""Weights and optimizer state as the dictionaries that most packages take."""

from __future__ import annotations

from typing import Any

from tolaria.bench.workload import Workload


def state_dicts(work: Workload) -> dict[str, Any]:
    """Those of model and optimizer; their tensors are the live ones."""
    return {"model": work.model.state_dict(), "optimizer": work.optimizer.state_dict()}


def load(work: Workload, found: dict[str, Any]) -> None:
    """Back from such dictionaries. The optimizer keeps the tensors that it is given, where they are on its device."""
    work.model.load_state_dict(found["model"])
    work.optimizer.load_state_dict(found["optimizer"])

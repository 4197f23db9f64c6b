"""`tolaria bench`: the parts in their order, and the report."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

import tolaria
from tolaria import memory
from tolaria.bench import contest, own, training
from tolaria.bench.records import Row, Standing, as_json
from tolaria.bench.show import Show
from tolaria.bench.workload import SIZES, Size, Workload
from tolaria.errors import UsageError
from tolaria.records import SCHEMA_VERSION

MOST_BLOCKS = 3
"""Of each variant of the training loop, however many rounds were asked for."""

_STATES_HELD = 6  # at once, at most: the live one and its gradients, slots, and both sides of a floor


class CannotMeasure(UsageError):
    """What was asked for cannot be measured here. Nothing was run."""

    def __init__(self, seen: str, advice: str) -> None:
        super().__init__("preparing a benchmark", seen, advice)


PARTS = ("copies", "judging", "host-tier", "training")
"""What `--parts` takes, in the order in which they are measured."""


def main(
    *,
    size: str | None,
    device: str,
    rounds: int,
    steps: int,
    peers: bool,
    as_json_object: bool,
    parts: Sequence[str] = PARTS,
    peer_seconds: float | None = None,
) -> int:
    """`tolaria bench`, see `tolaria.cli.Bench` for its arguments. Returns 0.

    Raises:
        CannotMeasure: There is no such device, or the size does not fit.
    """
    where = open_device(device)
    chosen = SIZES[size or ("355m" if where.type == "cuda" else "10mb")]
    if rounds < 1 or steps < 1:
        raise CannotMeasure(f"rounds={rounds}, steps={steps}, expected 1 or more", "Correct the value.")
    if steps % 10:
        raise CannotMeasure(f"steps={steps}, expected a multiple of 10", "Correct the value.")
    if set(parts) == {"host-tier"} and where.type != "cuda":
        raise CannotMeasure(
            "the host tier is for a train state on CUDA, and there is nothing else to measure", "Choose another part."
        )
    if peer_seconds is not None and not peer_seconds > 0.0:
        raise CannotMeasure(f"peer_seconds={peer_seconds}, expected more than 0", "Correct the value.")
    show = Show(as_json=as_json_object)
    with show.running():
        facts, rows = measure(chosen, where, rounds, steps, show.part, parts)
        standings: list[Standing] = []
        if peers:
            tick = show.part("side by side", len(contest.CATALOGUE))
            standings = contest.compare(chosen.name, where, rounds, tick, peer_seconds or math.inf)
    if as_json_object:
        print(json.dumps(as_json(facts, rows, standings), allow_nan=False))
    show.facts(facts)
    show.rows(rows)
    show.standings(standings)
    return 0


def open_device(name: str) -> torch.device:
    """The device of that name, ``"auto"`` being CUDA where there is any.

    Raises:
        CannotMeasure: There is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise CannotMeasure("there is no CUDA device here", "Try --device cpu.")
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def measure(
    size: Size,
    device: torch.device,
    rounds: int,
    steps: int,
    part: Callable[[str, int], Callable[[], None]],
    parts: Sequence[str] = PARTS,
) -> tuple[dict[str, Any], list[Row]]:
    """Everything about tolaria itself.

    Args:
        size: Of the workload.
        device: Where it is.
        rounds: Measurements of each figure.
        steps: Of each block of the training loop.
        part: Told the name of each part and how many ticks it has; answers what is to be called at each tick.
        parts: Which of `PARTS`.

    Returns:
        What it was measured on and with, and the rows.

    Raises:
        CannotMeasure: The size does not fit.
    """
    _require_room(size, device)
    work = contest.prepare(size, device)
    rows: list[Row] = []
    if "copies" in parts:
        rows += own.snapshots(work, rounds, part("snapshot and rollback", rounds))
    if "judging" in parts:
        rows += own.judging(work, rounds, part("observe and judge", rounds + own.WARM_UPS))
    if "host-tier" in parts and device.type == "cuda":
        rows += own.host_tier(work, rounds, part("host tier", rounds))
    if "training" in parts:
        blocks = min(rounds, MOST_BLOCKS)
        rows += training.train(work, steps, blocks, part("training", training.blocks(blocks)))
    with own.bare(work) as governor:
        barrier, copy_path = governor.capabilities().barrier, governor.capabilities().copy_path
    facts = {
        "schema_version": SCHEMA_VERSION,
        "command": "bench",
        "tolaria": tolaria.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "device": device.type,
        "device_name": own.name_of(device),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "size": _size(work),
        "rounds": rounds,
        "steps": steps,
        "barrier": barrier,
        "copy_path": copy_path,
    }
    return facts, rows


def _size(work: Workload) -> dict[str, Any]:
    facts = asdict(work.size)
    facts["sequences"] = facts.pop("batch")
    return {
        **facts,
        "num_weights": work.size.num_weights,
        "state_bytes": work.num_bytes(),
        "num_tensors": len(work.tensors()),
    }


def _require_room(size: Size, device: torch.device) -> None:
    """Refuse what could not be measured in memory."""
    needed = _STATES_HELD * size.state_bytes
    left = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else memory.available_host_bytes()
    if left is not None and needed > left:
        raise CannotMeasure(
            f"{size.name} takes about {needed / 2**30:.1f} GiB on {device}, where {left / 2**30:.1f} GiB are available",
            "Choose a smaller --size, or free memory.",
        )

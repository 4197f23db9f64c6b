"""Whether this process is one of several ranks. The only file of the core that looks at torch.distributed."""

from __future__ import annotations

import torch

from tolaria.errors import UnsupportedState


def world_size() -> int:
    """Ranks of the default process group; 1 where there is none."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def refuse_several_ranks(step: int) -> None:
    """Raise `UnsupportedState` in one of several ranks: a rollback on one of them alone would ruin the others."""
    if world_size() > 1:
        raise UnsupportedState(
            f"rolling back at step {step}",
            "this process is one of several ranks, and a rollback on one of them alone would ruin the others",
            'Use mode="observe", and restart all ranks from a checkpoint.',
        )

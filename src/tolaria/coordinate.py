"""Whether this process is one of several ranks. The only file of the core that looks at torch.distributed."""

from __future__ import annotations

import torch


def world_size() -> int:
    """Ranks of the default process group; 1 where there is none."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1

"""How much memory is left, and taking some of it without being killed for it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from tolaria.errors import BudgetExceeded, UnsupportedState

_CGROUP = Path("/sys/fs/cgroup")


def available_host_bytes() -> int | None:
    """Bytes of main memory that can be taken now: the lesser of the machine's and the container's. None if unknown."""
    found = [value for value in (_machine_bytes(), _container_bytes()) if value is not None]
    return min(found, default=None)


def _machine_bytes() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return None


def _container_bytes() -> int | None:
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        cached = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        return None if limit == "max" else int(limit) - used + int(cached.get("inactive_file", 0))
    except (OSError, ValueError):
        return None


def device_memory(device: torch.device) -> tuple[int, int] | None:
    """Bytes of a device, and the most that was in use at once: this process's peak, and what others have now.

    None where torch does not tell. Waits for nothing.
    """
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    others = max(0, total - free - torch.cuda.memory_reserved(device))
    return total, others + torch.cuda.max_memory_allocated(device)


def allocate(num_bytes: int, device: torch.device, doing: str, *, on_host: bool = False) -> torch.Tensor:
    """A zeroed flat tensor, shape [num_bytes], uint8, on `device`, or for its bytes in page-locked main memory.

    Raises:
        BudgetExceeded: It does not fit. On the host this is asked first, because the system would grant the memory and
            kill the process when it is touched.
    """
    where = "the host" if on_host else str(device)
    if on_host or device.type == "cpu":
        left = available_host_bytes()
        if left is not None and num_bytes > left:
            raise _exceeded(doing, num_bytes, where, f"{left / 2**20:,.1f} MiB are available")
    try:
        if on_host and device.type != "cpu":
            return page_locked(num_bytes)
        return torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _exceeded(doing, num_bytes, where, str(error).splitlines()[0] if str(error) else "refused") from error
    except RuntimeError as error:  # the allocators of main memory have no error type of their own
        if "allocate memory" not in str(error) and "out of memory" not in str(error):
            raise
        raise _exceeded(doing, num_bytes, where, "the allocator refused") from error


def page_locked(num_bytes: int) -> torch.Tensor:
    """Zeroed main memory that a device can reach by itself. Invalidates graph captures of other threads."""
    return torch.zeros(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)


def _exceeded(doing: str, num_bytes: int, where: str, seen: str) -> BudgetExceeded:
    return BudgetExceeded(
        doing,
        f"one slot needs {num_bytes / 2**20:,.1f} MiB on {where}, but {seen}",
        "Snapshots held so far are intact. Free memory, or configure fewer slots (longer cadence, shorter probation).",
    )


def refuse_fake_tensors(doing: str) -> None:
    """Raise `UnsupportedState` where operators are only pretended: nothing has an address there."""
    if torch._C._len_torch_dispatch_stack() and any(
        isinstance(m, FakeTensorMode) for m in _get_current_dispatch_mode_stack()
    ):
        raise UnsupportedState(
            doing, "a FakeTensorMode is active, expected one in which tensors have bytes", "Leave that mode first."
        )

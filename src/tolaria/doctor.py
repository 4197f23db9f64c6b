"""`tolaria doctor`: what this machine offers to a governor. Looks, measures one copy, changes nothing."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import tolaria
from tolaria import coordinate, memory
from tolaria.device import Device, DeviceSet
from tolaria.kernels import Finite
from tolaria.operations import Barrier
from tolaria.records import SCHEMA_VERSION
from tolaria.route import lay

_COPY_BYTES = 64 * 2**20
_COPY_ROUNDS = 8
_EXTRAS = {"cuda": ("cuda-bindings",), "demo": ("scikit-learn", "numpy")}


def main(*, as_json: bool) -> int:
    """`tolaria doctor`. Prints one JSON object or a table; returns 0."""
    found = examine()
    if as_json:
        print(json.dumps(found, allow_nan=False))
    else:
        _present(found, Console())
    return 0


def examine() -> dict[str, Any]:
    """Everything the doctor knows, as plain values.

    Takes well under a second on a CPU; touches each accelerator once, to measure it. Keys: `schema_version`, `tolaria`,
    `python`, `platform`, `torch`, `devices` (each with `device`, `description`, `barrier`, `available_bytes`,
    `copy_bytes_per_s`), `host_threads`, `deterministic`, `extras` (versions, None where missing), `notes`.
    """
    ports = DeviceSet()
    ports.open(_devices())
    devices = [_examine_device(port) for port in sorted(ports.values(), key=lambda port: port.barrier is Barrier.HOST)]
    extras = {extra: {name: _version(name) for name in names} for extra, names in _EXTRAS.items()}
    return {
        "schema_version": SCHEMA_VERSION,
        "tolaria": tolaria.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": {"version": str(torch.__version__), "cuda": torch.version.cuda, "hip": torch.version.hip},
        "devices": devices,
        "host_threads": {"cpus": os.cpu_count(), "torch": torch.get_num_threads()},
        "deterministic": _deterministic(),
        "extras": extras,
        "notes": list(_notes(devices, extras, ports.reason)),
    }


def _devices() -> list[torch.device]:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return [torch.device("cpu")]
    count = torch.accelerator.device_count()
    return [*(torch.device(accelerator.type, index) for index in range(count)), torch.device("cpu")]


def _examine_device(port: Device) -> dict[str, Any]:
    device = torch.device(port.name)
    return {
        "device": port.name,
        "description": _description(device),
        "barrier": port.barrier.value,
        "available_bytes": _available_bytes(device),
        "copy_bytes_per_s": _copy_rate(port, device),
    }


def _description(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine() if device.type == "cpu" else device.type


def _available_bytes(device: torch.device) -> int | None:
    if device.type == "cpu":
        return memory.available_host_bytes()
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def _copy_rate(port: Device, device: torch.device) -> float | None:
    """Bytes per second of a flat copy of 64 MB through the port, the best of several; None where it does not fit."""
    available = _available_bytes(device)
    if available is not None and available < 4 * _COPY_BYTES:
        return None
    source = torch.ones(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    route = lay(port, [source], [target], [Finite.ANYTHING], 0, (), on_host=False)
    best = float("inf")
    for _ in range(_COPY_ROUNDS):
        port.synchronize()
        started = time.perf_counter()
        route.capture(None)
        port.synchronize()
        best = min(best, time.perf_counter() - started)
    return _COPY_BYTES / best


def _deterministic() -> dict[str, Any]:
    return {
        "algorithms": torch.are_deterministic_algorithms_enabled(),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "CUBLAS_WORKSPACE_CONFIG": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _notes(devices: list[dict[str, Any]], extras: dict[str, dict[str, str | None]], reason: str) -> Iterator[str]:
    if os.environ.get("TOLARIA_DISABLE", "") not in ("", "0"):
        yield "TOLARIA_DISABLE is set: every governor in this environment does nothing"
    if any(device["barrier"] == Barrier.BLOCKING.value for device in devices):
        yield f"accelerators are ordered by blocking the host on both sides of a copy: {reason}"
    if any(device["barrier"] != Barrier.HOST.value for device in devices):
        if os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in (":4096:8", ":16:8"):
            yield (
                "for bit-exact replay on a GPU set CUBLAS_WORKSPACE_CONFIG=:4096:8 and "
                "torch.use_deterministic_algorithms(True)"
            )
    else:
        yield "no accelerator is visible to torch: snapshots live in main memory, and the gate alone orders copies"
    ranks = max(coordinate.world_size(), _ranks_of_launcher())
    if ranks > 1:
        yield f"{ranks} ranks: automatic rollback is refused, since on one rank alone it would ruin the others"
    # the absence of `cuda` shows in `reason`, and only where there is a device for it
    if None in extras["demo"].values():
        yield "extra 'demo' is not installed (tolaria drill needs it): pip install 'tolaria[demo]'"


def _ranks_of_launcher() -> int:
    """What torchrun and others announce before any process group exists."""
    announced = os.environ.get("WORLD_SIZE", "")
    return int(announced) if announced.isdecimal() else 1


def _present(found: dict[str, Any], console: Console) -> None:
    torch_build = found["torch"]["cuda"] or found["torch"]["hip"] or "CPU only"
    console.print(
        f"[bold]tolaria {found['tolaria']}[/bold]  Python {found['python']}, torch {found['torch']['version']} "
        f"({torch_build}), {found['platform']}",
        highlight=False,
        soft_wrap=True,
    )
    table = Table()
    for name in ("device", "what", "barrier", "memory available", "copy of 64 MB"):
        table.add_column(name, justify="right" if name in ("memory available", "copy of 64 MB") else "left")
    for device in found["devices"]:
        table.add_row(
            device["device"],
            device["description"],
            device["barrier"],
            _quantity(device["available_bytes"], 2**30, "GiB"),
            _quantity(device["copy_bytes_per_s"], 1e9, "GB/s"),
        )
    console.print(table)
    settings = found["deterministic"]
    lines = [
        f"threads: {found['host_threads']['torch']} of torch on {found['host_threads']['cpus']} CPUs",
        f"deterministic algorithms: {'on' if settings['algorithms'] else 'off'}, "
        f"CUBLAS_WORKSPACE_CONFIG: {settings['CUBLAS_WORKSPACE_CONFIG'] or 'not set'}",
        *(
            f"extra {extra}: " + ", ".join(f"{name} {have or 'missing'}" for name, have in packages.items())
            for extra, packages in found["extras"].items()
        ),
        *(f"note: {note}" for note in found["notes"]),
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _quantity(value: float | None, unit: float, name: str) -> str:
    return "unknown" if value is None else f"{value / unit:,.1f} {name}"

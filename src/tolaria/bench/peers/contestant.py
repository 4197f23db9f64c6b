"""What a contestant has to do, and who they are. Importing this module imports none of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch

from tolaria.bench.workload import Workload


class Keeper(Protocol):
    """Holds one snapshot of a workload and puts it back. Called in this order, over and over, then closed."""

    def snapshot(self) -> None:
        """Returns when training may change weights and optimizer state."""

    def complete(self) -> None:
        """Returns when the snapshot can be restored."""

    def rollback(self) -> None:
        """Weights and optimizer state are those of the snapshot; on a device, ordered on the current stream."""

    def close(self) -> None:
        """Threads, servers and files are gone."""


@runtime_checkable
class WithReference(Protocol):
    """A keeper whose snapshot does more than that: what it does besides is subtracted, round by round."""

    def reference(self) -> None:
        """That alone. Leaves weights and optimizer state as they are."""


class Judge(Protocol):
    """Judges healthy steps."""

    def healthy(self, loss: torch.Tensor) -> None:
        """Judge one step whose gradients are in place. The scalar `loss` has no graph."""

    def reference(self, loss: torch.Tensor) -> None:
        """What the loop would do without it; nothing, for most."""

    def close(self) -> None:
        """No hook is left."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One contestant.

    Attributes:
        name: In the table.
        kind: Which of the two it is.
        module: Of this folder, that has it.
        factory: Name of the callable in it: takes a `Workload` and a folder for files, and answers a contestant.
        package: What to install; empty for what comes with torch.
        device: The only device type that it works on; empty: any.
        note: What is measured, and with which call.
        fused: Whether the workload's AdamW is the fused one.
    """

    name: str
    kind: Literal["snapshot", "judge"]
    module: str
    factory: str
    package: str = ""
    device: str = ""
    note: str = ""
    fused: bool = True

    @property
    def version(self) -> str | None:
        """Of the package: None where it is not installed, empty where there is none."""
        if not self.package:
            return ""
        try:
            return version(self.package.partition("[")[0])
        except PackageNotFoundError:
            return None

    def make(self, work: Workload, folder: Path) -> Any:
        """The contestant itself: a `Keeper` or a `Judge`.

        Raises:
            Exception: Whatever the package raises when it cannot work here.
        """
        factory: Callable[[Workload, Path], Any] = getattr(
            importlib.import_module(f"tolaria.bench.peers.{self.module}"), self.factory
        )
        return factory(work, folder)


CATALOGUE: tuple[Entry, ...] = (
    Entry("tolaria", "snapshot", "ours", "Ours", note="snapshot() until sealed, execute_rollback()"),
    Entry("tolaria, host tier", "snapshot", "ours", "OursOnHost", device="cuda", note='the same with tier="host"'),
    Entry("torch: deepcopy", "snapshot", "plain", "DeepCopies", note="deepcopy of both state dicts; load_state_dict"),
    Entry("torch: save, load on tmpfs", "snapshot", "plain", "Files", note="torch.save; torch.load, load_state_dict"),
    Entry("torch: DCP", "snapshot", "dcp", "Saved", note="dcp.save on tmpfs; dcp.load, set_state_dict"),
    Entry("torch: DCP, async_save", "snapshot", "dcp", "SavedAsync", note="dcp.async_save on tmpfs; dcp.load"),
    Entry(
        "arc-training",
        "snapshot",
        "arc_training",
        "Arc",
        package="arc-training",
        note="step() and optimizer.step() with a snapshot in it, less a plain optimizer step, then another step(); "
        "rollback: step() on a NaN loss",
    ),
    Entry(
        "torchsnapshot",
        "snapshot",
        "torch_snapshot",
        "TorchSnapshot",
        package="torchsnapshot",
        note="Snapshot.async_take on tmpfs; Snapshot.restore",
    ),
    Entry(
        "lm-resiliency",
        "snapshot",
        "lm_resiliency_peer",
        "InMemory",
        package="lm-resiliency",
        note="InMemoryCheckpointManager.save, maybe_wait; load, load_state_dict",
    ),
    Entry(
        "dlrover",
        "snapshot",
        "dlrover_peer",
        "Flash",
        package="dlrover[torch]",
        note="DdpCheckpointer.save_checkpoint(MEMORY); load_checkpoint, load_state_dict",
    ),
    Entry(
        "nvidia-resiliency-ext",
        "snapshot",
        "nvrx",
        "Local",
        package="nvidia-resiliency-ext",
        device="cuda",
        note="LocalCheckpointManager.save on tmpfs; load, load_state_dict",
    ),
    Entry(
        "torchft, HTTP transport",
        "snapshot",
        "torchft_peer",
        "Transport",
        package="torchft",
        note="HTTPTransport.send_checkpoint, which copies nothing on a CPU; recv_checkpoint, load_state_dict",
    ),
    Entry("tolaria", "judge", "ours", "Observes", note="observe(): loss, gradients and weights, default detectors"),
    Entry("torch: item()", "judge", "plain", "Items", note="loss.item(), clip_grad_norm_(inf).item()"),
    Entry(
        "arc-training",
        "judge",
        "arc_training",
        "Steps",
        package="arc-training",
        note="Controller.step() of a healthy step, default settings",
    ),
    Entry(
        "Lightning SpikeDetection",
        "judge",
        "spike_detection",
        "Spikes",
        package="lightning",
        note="on_train_batch_end(): the loss alone, after the optimizer step",
    ),
    Entry(
        "OLMo-core SkipStep",
        "judge",
        "skip_step",
        "SkipSteps",
        package="ai2-olmo-core",
        note="SkipStepAdamW.step() less torch.optim.AdamW.step(foreach); the norm is the caller's",
        fused=False,
    ),
)
"""In the order of the table."""

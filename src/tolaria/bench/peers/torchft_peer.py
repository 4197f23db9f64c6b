"""torchft's HTTP transport, from this process to itself: what a replica that lost its state would fetch."""

from __future__ import annotations

import importlib
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

from tolaria.bench.peers.state import load, state_dicts
from tolaria.bench.workload import Workload

_PATIENCE = timedelta(seconds=300)


class Transport:
    """`send_checkpoint` makes a copy in main memory available; `recv_checkpoint` fetches it."""

    def __init__(self, work: Workload, folder: Path) -> None:
        module = importlib.import_module("torchft.checkpointing.http_transport")
        self._transport: Any = module.HTTPTransport(timeout=_PATIENCE, num_chunks=0)
        self._work, self._step = work, 0

    def snapshot(self) -> None:
        """On the CPU it keeps the live tensors: nothing is copied until somebody fetches them."""
        self._transport.disallow_checkpoint()
        self._step += 1
        self._transport.send_checkpoint([0], self._step, state_dicts(self._work), _PATIENCE)

    def complete(self) -> None:
        """It is."""

    def rollback(self) -> None:
        """Fetched through a socket of this machine, and loaded."""
        with mock.patch.object(socket, "gethostname", return_value="localhost"):
            address = self._transport.metadata()
        load(self._work, self._transport.recv_checkpoint(0, address, self._step, _PATIENCE))

    def close(self) -> None:
        """Its server."""
        self._transport.shutdown(wait=True)

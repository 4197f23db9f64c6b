"""A `Bench` over the simulated driver: held work notes when it is forced, which on a device would have blocked."""

from __future__ import annotations

import contextlib

import torch
from cuda_driver.fake_driver import Machine

LAZY = 7


class FakeBench:
    """Every stream of the machine is lazy, the default one included."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        machine.mains[0].handle = LAZY  # no operators of the test's own run there
        self.forced = False

    def tensor(self, *, on_host=False):
        return torch.zeros(1024)

    def stream(self):
        return self.machine.side_stream()

    def on(self, stream):
        return self.machine.streams.on_side(stream)

    def current(self):
        return self.machine.streams.current(0)

    def launch(self, stream, work):
        self.machine.launch(stream, work)

    def hold(self):
        self.forced = True  # run before anything was let through

    def wait(self, stream):
        with self.machine.lock:
            self.machine._force(stream, stream.launched, seen=True)

    def returns(self, call):
        call()
        return not self.forced

    def finish(self):
        while any(stream.queue for stream in self.machine.all_streams()):
            with contextlib.suppress(Exception):  # work may raise on purpose
                self.machine.finish()
        for stream in self.machine.all_streams():
            stream.ran = stream.launched  # also behind work that raised
        self.forced = False

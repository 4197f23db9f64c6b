"""The production picture: everything that uses a model at once, held back on the device half done when a panic comes.

    python production.py context

makes every scene with that barrier, as it ships and with one edge missing at a time, and prints a JSON object for each:
`scene`, `missing`, what is `whole` afterwards, and whether the host came back `early`, before the device went on. No
answer depends on time: what is in flight stands behind gates, and so do the copies. Run by `test_governor.py`, in a
process of its own, since one that hangs has to be ended from outside.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import sys
import threading
from unittest import mock

import torch
from torch import nn

from tolaria import GovernorConfig, TolariaGovernor, judge
from tolaria.cuda import ContextDevice
from tolaria.driver import Driver
from tolaria.route import DeviceRoute
from tolaria.testing.gates import Gate, distinct_streams, gets_through, own_streams
from tolaria.testing.picture import at_synchronize, held, no_section, no_wait, nothing, raw_stream, settle

PATIENCE_S = 30.0
LIMIT_S = 20.0  # then a gate opens by itself, and the scene says so
FOREIGN = 7  # what the custom kernel writes
ROWS, WIDTH = 32, 64

SOURCE = """
extern "C" __global__ void overwrite(float* values, int count, int value) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) values[i] = (float)value;
}
"""


@functools.cache
def compiled():
    return torch.cuda._compile_kernel(SOURCE, "overwrite")


def in_thread(name, work):
    """Another host thread does it, and is done with it when this returns; what it launched may not be."""
    failed = []

    def run():
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name=name)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


made = []


class Production:
    """A model with buffers, its optimizer and everybody who uses them, each on a stream and a thread of his own.

    Streams: pinned copies on `loading`, forwards on `acting`, gradients and the optimizer on the default stream, a
    custom CUDA kernel that writes parameters on `custom`, later reads on `later` and on a raw stream.
    """

    def __init__(self, barrier, governs_optimizer=True):
        torch.manual_seed(0)
        self.barrier = barrier
        self.model = nn.Sequential(nn.Linear(WIDTH, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, WIDTH)).cuda()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        self.governor = TolariaGovernor(
            self.model,
            *([self.optimizer] if governs_optimizer else []),
            config=GovernorConfig(rng="keep", barrier=barrier, host_slots=0, scrub_every=0),
            detector=judge.non_finite(),
        )
        apart = distinct_streams(6, own_streams(self.governor))
        self.loading, self.acting, self.custom, self.later, self.watchdog, self.control = apart
        self.raw = raw_stream()
        self.kernel = compiled()
        self.pinned = torch.randn(ROWS, WIDTH).pin_memory()
        self.batch = torch.zeros(ROWS, WIDTH, device="cuda")
        self.probe = torch.randn(ROWS, WIDTH, device="cuda")
        self.actions = None
        made.append(self)
        self._warm_up()

    def _warm_up(self):
        """Every kernel loaded, every slot, event and block of memory there: nothing may wait behind a closed gate."""
        self.learn(steps=2)
        torch.cuda.synchronize()
        self.governor.snapshot(grads="drop").wait("sealed")
        for _ in range(3):
            kept = self.weights(), self.moments(), self.read()
            with Gate() as gate:
                gate.open()
                self.in_flight(gate)
                self.busy()
                in_thread("watchdog", self.panic)
                seen = self.read()
            assert gets_through(self.control)
            del kept, seen
            self.governor.execute_rollback(optimizer=self.optimizer).wait()
            self.learn(steps=1)
            torch.cuda.synchronize()
            self.governor.snapshot(grads="drop").wait("sealed")
        torch.cuda.synchronize()

    # ------------------------------------------------------------ who uses the model

    def load(self, gate):
        """A pinned copy on a stream of its own."""
        with torch.cuda.stream(self.loading):
            gate.close(self.loading)
            self.batch.copy_(self.pinned, non_blocking=True)
            self.loaded = self.loading.record_event()

    def act(self, gate):
        """A forward in training mode: reads parameters and writes buffers."""
        with torch.no_grad(), torch.cuda.stream(self.acting):
            gate.close(self.acting)
            self.acting.wait_event(self.loaded)
            self.actions = self.model(self.batch)

    def overwrite(self, gate):
        """A kernel that no operator of torch stands for writes half of the parameters, waits, and writes the rest."""
        parameters = list(self.model.parameters())
        with self.governor.using(write=True), torch.cuda.stream(self.custom):
            for number, parameter in enumerate(parameters):
                if number == len(parameters) // 2:
                    gate.close(self.custom)
                self.launch(parameter)

    def launch(self, parameter):
        self.kernel(grid=(1, 1, 1), block=(256, 1, 1), args=[parameter.data, parameter.numel(), FOREIGN])

    def learn(self, gate=None, steps=1):
        """Gradients on the default stream and optimizer steps; then one more backward, whose gradients stay."""
        stream = torch.cuda.current_stream()
        if gate is not None:
            gate.close(stream)
            stream.wait_event(self.loaded)
        for _ in range(steps):
            self.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.backward()

    def backward(self):
        self.model(self.batch).square().mean().backward()

    def in_flight(self, gate):
        """Everything at once; half done on the device when this returns."""
        in_thread("loader", lambda: self.load(gate))
        in_thread("actor", lambda: self.act(gate))
        in_thread("foreign", lambda: self.overwrite(gate))
        self.learn(gate)

    def busy(self):
        """Events at the end of what is in flight."""
        streams = (self.loading, self.acting, self.custom, torch.cuda.current_stream())
        return [stream.record_event() for stream in streams]

    def panic(self):
        """What the watchdog does, on a thread and a stream of its own. Answers the report."""
        with torch.cuda.stream(self.watchdog):
            if not self.governor.check_vital_signs(float("nan")):
                raise AssertionError("the watchdog saw nothing")
            return self.governor.execute_rollback(env_id=0, optimizer=self.optimizer)

    def read(self):
        """Later reads by another thread, on a stream of torch's and a raw one: copies of everything, and a forward."""
        found = []

        def run():
            for stream in (self.later, self.raw):
                with torch.no_grad(), self.governor.using(write=False), torch.cuda.stream(stream):
                    tensors = [tensor.clone() for tensor in (*self.model.parameters(), *self.model.buffers())]
                    mean, variance = self.model[1].running_mean, self.model[1].running_var
                    hidden = nn.functional.batch_norm(self.model[0](self.probe), mean, variance)
                    found.append([*tensors, self.model[3](hidden.relu())])

        in_thread("reader", run)
        return found

    # ------------------------------------------------------------ what is there

    def weights(self):
        return [tensor.clone() for tensor in (*self.model.parameters(), *self.model.buffers())]

    def moments(self):
        states = (self.optimizer.state[parameter] for parameter in self.model.parameters())
        return [value.clone() for state in states for value in state.values()]


def are_equal(some, others):
    """Bit for bit."""
    return len(some) == len(others) and all(
        torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
        for one, other in zip(some, others, strict=True)
    )


def is_foreign(run):
    """Whether all parameters are what the custom kernel writes."""
    return all(bool((parameter == FOREIGN).all()) for parameter in run.model.parameters())


# ---------------------------------------------------------------- scenes


def rollback_while_all_are_in_flight(barrier, missing, governs_optimizer=True):
    """Work stands behind one gate, the copies of the rollback behind another.

    As it ships, and without the post edge, the work is let through first; without the pre edge the copies are.
    """
    run = Production(barrier, governs_optimizer)
    weights, moments, reads = run.weights(), run.moments(), run.read()
    torch.cuda.synchronize()
    found = {}
    with contextlib.ExitStack() as stack:
        work, copies = stack.enter_context(Gate(LIMIT_S)), stack.enter_context(Gate(LIMIT_S))
        stack.enter_context(held(copies))
        stack.enter_context(without(missing, barrier, work, copies))
        run.in_flight(work)
        assert gets_through(run.control), "streams share a hardware queue: nothing can be shown"
        busy = run.busy()
        reports = []
        in_thread("watchdog", lambda: reports.append(run.panic()))
        early = not work.is_open and not copies.is_open
        seen = run.read()
        if missing in BEFORE:
            work.open()
        else:
            work.open()
            for event in busy:
                event.synchronize()
            if missing in AFTER:
                run.later.synchronize()
                run.raw.synchronize()
                assert not copies.is_open
            copies.open()
        torch.cuda.synchronize()
        forced = work.was_forced or copies.was_forced
    (report,) = reports
    found["weights"] = are_equal(run.weights(), weights)
    found["moments"] = are_equal(run.moments(), moments)
    found["reads"] = all(are_equal(one, other) for one, other in zip(seen, reads, strict=True))
    found["batch"] = torch.equal(run.batch.cpu(), run.pinned)
    found["gradients dropped"] = all(parameter.grad is None for parameter in run.model.parameters())
    found["success"] = report.success and report.env_id == 0
    return {"whole": found, "early": early, "forced": forced, "optimizer": report.optimizer}


BEFORE = ("pre barrier", "the copies' wait for it")
AFTER = ("post barrier", "the mark behind the copies")


def without(missing, barrier, work, copies):
    """Takes one edge of a rollback away; with `blocking` it also says when the gates are opened."""
    if barrier == "blocking":

        def before_the_copies():
            work.open()

        def behind_the_copies():
            copies.open()
            torch.cuda.current_stream().synchronize()
            work.open()

        return at_synchronize(
            None if missing == "pre barrier" else before_the_copies,
            None if missing == "post barrier" else behind_the_copies,
        )
    edges = {
        "pre barrier": ("context_record", ContextDevice.stream_record),
        "the copies' wait for it": ("stream_wait", no_wait),
        "post barrier": ("context_wait", no_wait),
        "the mark behind the copies": ("stream_record", ContextDevice._event),  # an event that was never recorded
    }
    stack, are_submitted = contextlib.ExitStack(), []
    if missing is not None:
        stack.enter_context(mock.patch.object(ContextDevice, *edges[missing]))
    if missing in BEFORE:
        wait, restore = ContextDevice.context_wait, DeviceRoute.restore

        def restoring(route):
            restore(route)
            are_submitted.append(route)

        def when_copied(device, event):
            # not later: behind a context-wide wait the stream of the copies waits for earlier context-wide events too
            if are_submitted:
                copies.open()
                device.synchronize()
            wait(device, event)

        stack.enter_context(mock.patch.object(DeviceRoute, "restore", restoring))
        stack.enter_context(mock.patch.object(ContextDevice, "context_wait", when_copied))
    return stack


def step_between_the_barriers(barrier, missing):
    """Another thread's kernels come when the copies are about to be submitted: all come behind it, or none."""
    run = Production(barrier)
    weights = run.weights()
    late = {"asks": threading.Event(), "in": False, "early": False}

    def step():
        parameters = list(run.model.parameters())
        late["asks"].set()
        with run.governor.using(write=True), torch.cuda.stream(run.custom):
            late["in"] = True
            for number, parameter in enumerate(parameters):
                if number == len(parameters) // 2:
                    run.custom.synchronize()
                    gate.close(run.custom)
                run.launch(parameter)

    thread = threading.Thread(target=step, name="foreign")
    original = DeviceRoute.restore

    def restore(route):
        if thread.ident is None:
            thread.start()
            assert late["asks"].wait(PATIENCE_S)
            if missing is not None:
                thread.join(PATIENCE_S)
        original(route)
        late["early"] = late["early"] or late["in"]

    with contextlib.ExitStack() as stack:
        gate = stack.enter_context(Gate(LIMIT_S))
        stack.enter_context(mock.patch.object(DeviceRoute, "restore", restore))
        if missing is not None:
            stack.enter_context(mock.patch.object(Driver, "open_section", no_section))
            if barrier == "blocking":
                here = torch.cuda.current_stream
                stack.enter_context(at_synchronize(nothing, lambda: (here().synchronize(), gate.open())))
        report = run.governor.execute_rollback(env_id=0, optimizer=run.optimizer)
        settle(run.governor, barrier)
        gate.open()
        thread.join(PATIENCE_S)
        torch.cuda.synchronize()
        forced = gate.was_forced
    whole = is_foreign(run) if missing is None else is_foreign(run) or are_equal(run.weights(), weights)
    return {"whole": {"weights": whole, "success": report.success}, "early": not late["early"], "forced": forced}


def snapshot_of_work_in_flight(barrier, missing):
    """A snapshot while the custom kernels are half done: it holds all of what they write."""
    run = Production(barrier)
    with contextlib.ExitStack() as stack:
        work = stack.enter_context(Gate(LIMIT_S))
        if barrier == "blocking" and missing is None:
            stack.enter_context(at_synchronize(work.open))
        elif barrier == "blocking":
            # the last wait, behind the copies, would wait for the kernels as well
            here = torch.cuda.current_stream
            stack.enter_context(at_synchronize(None, None, lambda: (here().synchronize(), work.open())))
        elif missing == "pre barrier":
            stack.enter_context(mock.patch.object(ContextDevice, "context_record", ContextDevice.stream_record))
        elif missing is not None:
            stack.enter_context(mock.patch.object(ContextDevice, "stream_wait", no_wait))
        in_thread("foreign", lambda: run.overwrite(work))
        with torch.cuda.stream(run.control):
            info = run.governor.snapshot(grads="drop")
        early = not work.is_open
        if missing is not None and barrier == "context":
            settle(run.governor, barrier)
        work.open()
        torch.cuda.synchronize()
        forced = work.was_forced
    run.governor.execute_rollback(to=info).wait()
    torch.cuda.synchronize()
    return {"whole": {"weights": is_foreign(run)}, "early": early, "forced": forced}


def next_step_after_a_snapshot(barrier, missing):
    """The copies of a snapshot are held back; optimizer, forward and custom kernels go on and wait for them lazily.

    An optimizer's stream waits, and a forward's for the buffers; everything waits when a custom kernel comes.
    """
    run = Production(barrier)
    weights, moments = run.weights(), run.moments()
    torch.cuda.synchronize()

    gone_on = []

    def go_on():
        gone_on.append(True)
        with torch.cuda.stream(torch.cuda.default_stream()):
            run.learn()
            if missing in ("the optimizer's wait", "the wait behind the copies"):
                torch.cuda.current_stream().synchronize()
        in_thread("actor", lambda: run.act(free))
        in_thread("foreign", lambda: run.overwrite(free))
        if missing == "the custom kernel's wait":
            run.custom.synchronize()

    with contextlib.ExitStack() as stack:
        free, copies = stack.enter_context(Gate(LIMIT_S)), stack.enter_context(Gate(LIMIT_S))
        free.open()
        in_thread("loader", lambda: run.load(free))
        run.loading.synchronize()
        stack.enter_context(held(copies))
        if barrier == "blocking" and missing is None:
            stack.enter_context(at_synchronize(nothing, copies.open))
        elif barrier == "blocking":
            # this barrier seals a manual snapshot before it answers: everybody goes on while that waits for the device
            stack.enter_context(at_synchronize(nothing, None, None, lambda: (go_on(), copies.open())))
        elif missing is not None:
            edge = {"the optimizer's wait": "caller_wait", "the custom kernel's wait": "context_wait"}[missing]
            stack.enter_context(mock.patch.object(ContextDevice, edge, no_wait))
        with torch.cuda.stream(run.control):
            info = run.governor.snapshot(grads="drop")
        early = not copies.is_open
        if not gone_on:
            go_on()
        copies.open()
        torch.cuda.synchronize()
        forced = copies.was_forced
    run.governor.execute_rollback(to=info).wait()
    torch.cuda.synchronize()
    whole = {"weights": are_equal(run.weights(), weights), "moments": are_equal(run.moments(), moments)}
    return {"whole": whole, "early": early, "forced": forced}


def weights_alone(barrier, missing):
    """The governor of the finding knows the model alone: weights come back, and the optimizer starts anew."""
    return rollback_while_all_are_in_flight(barrier, missing, governs_optimizer=False)


SCENES = {
    "rollback": (
        rollback_while_all_are_in_flight,
        {"context": (*BEFORE, *AFTER), "blocking": ("pre barrier", "post barrier")},
    ),
    "weights alone": (weights_alone, {"context": (), "blocking": ()}),
    "step between the barriers": (
        step_between_the_barriers,
        {"context": ("sections",), "blocking": ("sections",)},
    ),
    "snapshot": (
        snapshot_of_work_in_flight,
        {"context": BEFORE, "blocking": ("pre barrier",)},
    ),
    "next step": (
        next_step_after_a_snapshot,
        {
            "context": ("the optimizer's wait", "the custom kernel's wait"),
            "blocking": ("the wait behind the copies",),
        },
    ),
}
"""Name -> (scene, edges that it can be made without, by barrier)."""


def main(barrier):
    logging.getLogger("tolaria").setLevel(logging.CRITICAL)
    torch.use_deterministic_algorithms(True)
    for name, (scene, edges) in SCENES.items():
        for missing in (None, *edges[barrier]):
            try:
                found = scene(barrier, missing)
                made.pop().governor.close()
            except Exception as error:
                found = {"failed": f"{type(error).__name__}: {error}"}
            sys.stdout.write(json.dumps({"scene": name, "missing": missing, **found}) + "\n")
            sys.stdout.flush()
    os._exit(0)  # nothing of what was taken apart is worth cleaning up


if __name__ == "__main__":
    main(sys.argv[1])

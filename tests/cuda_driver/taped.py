"""CUDA graphs on a CPU: a tape of operators, and kernels of `tolaria.latch` over raw addresses.

What is recorded has no effect: every byte that it wrote is put back, and so is random state. What is replayed are the
operators alone, on the same tensors: no Python runs, numbers are those of the recording, random numbers are drawn anew.
What a capture does not allow raises: reading a tensor on the host.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading

import torch
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tolaria import in_graph, latch
from tolaria.words import CHUNK_BYTES

_current = []  # the tape that records, if any


def tensors_of(tree):
    return [leaf for leaf in _pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Tape(TorchDispatchMode):
    """Records every operator that is performed under it."""

    def __init__(self):
        super().__init__()
        self.calls, self.before = [], {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        # other names for the same memory: a graph does not notice when a tensor is given another
        args, kwargs = _pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs or {}))
        given = tensors_of((args, kwargs))
        self.keep(given)
        made = func(*args, **kwargs)
        memory = {tensor.untyped_storage().data_ptr() for tensor in given}
        fresh = [t for t in tensors_of(made) if t.untyped_storage().data_ptr() not in memory]

        def again():
            answer = func(*args, **kwargs)
            for kept, new in zip(tensors_of(made), tensors_of(answer), strict=True):
                if any(kept is each for each in fresh):
                    kept.copy_(new)

        self.calls.append(again)
        return made

    def keep(self, tensors):
        """Note the bytes of memory that is met for the first time."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.before:
                self.before[storage.data_ptr()] = storage, storage.clone()


class Recorder:
    """Stands in for `in_graph.Recorder`, and announces captures and replays as `capture` does."""

    def __init__(self, sections):
        self.sections, self.num_replays, self.calls = sections, 0, []

    def beside(self):
        return contextlib.nullcontext()

    def record(self, work, generators=()):
        tape, drawn = Tape(), torch.get_rng_state()
        self.generators = generators
        self.sections.begin_capture(7, threading.get_ident())
        _current.append(tape)
        succeeded = False
        try:
            with tape:
                work()
            succeeded = True
        finally:
            _current.pop()
            for storage, held in tape.before.values():
                storage.copy_(held)
            torch.set_rng_state(drawn)
            self.sections.end_capture(7, succeeded=succeeded)

        calls = self.calls = tape.calls

        def replay():
            self.num_replays += 1
            with self.sections.replaying(), torch.no_grad():
                for call in list(calls):
                    call()

        return replay


def _launched(work):
    """A kernel that is recorded is not executed: it writes by address, which no tape could put back."""
    if _current:
        _current[-1].calls.append(work)
    else:
        work()


def _latch(grid, block, arguments):
    bad, words, flag = arguments

    def decide():
        is_bad = float(bad) != 0.0
        if is_bad and not int(words[latch.PARKED]):
            words[latch.PARKED] = words[latch.TARGET]
        words[latch.NOW] = int(is_bad or bool(words[latch.PARKED]))
        flag.fill_(float(words[latch.NOW]))

    _launched(decide)


def _copy_if(grid, block, arguments):
    table, blocks, chunks, words, from_parked, to_live = arguments
    facts = table.tolist()
    firsts, live, held, sizes = (facts[i * blocks : (i + 1) * blocks] for i in range(4))
    owners = table[4 * blocks :].view(torch.int32).tolist()[:chunks]

    def copy():
        if not int(words[latch.PARKED if from_parked else latch.NOW]):
            return
        base = int(words[latch.PARKED]) if from_parked else 0
        for chunk, owner in enumerate(owners):
            offset = (chunk - firsts[owner]) * CHUNK_BYTES
            size = min(sizes[owner] - offset, CHUNK_BYTES)
            ends = live[owner] + offset, base + held[owner] + offset
            ctypes.memmove(*(ends if to_live else reversed(ends)), size)

    _launched(copy)


KERNELS = latch.Kernels(_latch, _copy_if)


def install(monkeypatch, sections):
    """Governed steps that are captured from now on are taped."""
    monkeypatch.setattr(latch, "compiled", lambda device: KERNELS)
    monkeypatch.setattr(in_graph, "Recorder", lambda device: Recorder(sections()))

"""The kernel of `tolaria.launch` in Python over main memory: what its arguments say is done, and nothing else.

Decodes every launch by its fields alone, as the kernel does. A block that no tensor has, a part that lies outside of
its tensor and a number outside of a row are errors.
"""

from __future__ import annotations

import ctypes
import math
import struct

import torch

from tolaria.launch import Call, LaunchFailed

SIZES = {1: 4, 2: 2, 3: 2, 4: 8}


def values(address: int, num_bytes: int, kind: int) -> list[float]:
    assert address
    assert num_bytes % SIZES[kind] == 0
    raw = ctypes.string_at(address, num_bytes)
    if kind == 2:
        words = struct.unpack(f"<{num_bytes // 2}H", raw)
        return [struct.unpack("<f", struct.pack("<I", word << 16))[0] for word in words]
    return list(struct.unpack(f"<{num_bytes // SIZES[kind]}{'.fxed'[kind]}", raw))


class HostLauncher:
    """Stands for `launch.Launcher` where tensors are in main memory."""

    def __init__(self) -> None:
        self.launches: list[int] = []  # blocks of each
        self.fails = False
        self.written: list[int] = []

    def arguments(self, call: Call) -> Call:
        return call

    def can_write(self, row: torch.Tensor) -> bool:
        return True

    def launch(self, call: Call, blocks: int) -> None:
        if self.fails:
            raise LaunchFailed("so it was asked for")
        self.launches.append(blocks)
        assert call.count > 0
        (self._parts, self._total, self._send)[call.what](call, blocks)

    def _parts(self, call: Call, blocks: int) -> None:
        assert call.count <= 160
        sums = (ctypes.c_double * (call.offset + blocks)).from_address(call.scratch)
        firsts = (ctypes.c_int64 * call.count).from_address(call.out)
        assert call.third[0] == 0
        for block in range(blocks):
            tensor = max(i for i in range(call.count) if call.third[i] <= block)
            kind, whole = call.second[tensor] & 7, call.second[tensor] >> 3
            begin = (block - call.third[tensor]) * call.size
            assert 0 <= begin < whole
            found = values(call.first[tensor] + begin, min(whole - begin, call.size), kind)
            sums[call.offset + block] = math.fsum(x * x for x in found) if all(map(math.isfinite, found)) else math.nan
            if begin == 0:
                firsts[tensor] = call.offset + block

    def _total(self, call: Call, blocks: int) -> None:
        assert blocks == 1
        sums = list((ctypes.c_double * call.size).from_address(call.scratch))
        firsts = list((ctypes.c_int64 * call.count).from_address(call.scratch + 8 * call.size))
        assert firsts[0] == 0
        assert firsts == sorted(set(firsts))
        ends = [*firsts[1:], call.size]
        answer = (ctypes.c_double * 2).from_address(call.out)
        answer[0] = math.sqrt(sum(sums))
        answer[1] = sum(not all(map(math.isfinite, sums[first:end])) for first, end in zip(firsts, ends, strict=True))
        if call.flag:
            ctypes.c_float.from_address(call.flag).value = float(not math.isfinite(answer[0]))

    def _send(self, call: Call, blocks: int) -> None:
        assert blocks == 1
        row = (ctypes.c_double * (call.offset + 1)).from_address(call.out)
        for i in range(call.count):
            kind, count = call.second[i] & 7, call.second[i] >> 3
            place = call.third[i]
            assert place + count <= call.offset
            row[place : place + count] = values(call.first[i], count * SIZES[kind], kind)
        row[call.offset] = float(call.size)

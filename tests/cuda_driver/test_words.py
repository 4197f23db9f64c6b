"""Moving bytes as words, and sweeps over many blocks: against plain integers."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tolaria.kernels import Finite, Side, Sweep
from tolaria.words import copy_words, mix, portable_digest

MASK = (1 << 64) - 1
CHUNK = 1 << 15
LANES = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93)


def weight(k: int) -> int:
    """The finaliser of splitmix64 for k * 0x9E3779B97F4A7C15, made odd: as documented, with numbers of its own."""
    z = k * 0x9E3779B97F4A7C15 & MASK
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
    return (z ^ z >> 31) | 1


def documented(blocks: list[bytes], first: int = 0) -> int:
    """sum over chunks c of mix(4096 + c) * sum over i of x[i] * K[i % 4] * mix(1 + i // 4), modulo 2**64."""
    total, chunk = 0, first
    for block in blocks:
        for start in range(0, len(block), CHUNK):
            piece = block[start : start + CHUNK]
            piece += bytes(-len(piece) % 4)
            words = struct.unpack(f"<{len(piece) // 4}I", piece)
            inner = sum(x * LANES[i % 4] * weight(1 + i // 4) for i, x in enumerate(words) if x)
            total += inner * weight(4096 + chunk)
            chunk += 1
    return total & MASK


def flat_of(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)


def digest_of(*blocks: bytes) -> int:
    return int(portable_digest([flat_of(block) for block in blocks])) & MASK


@given(st.lists(st.binary(max_size=70), max_size=5), st.integers(0, 10**6))
def test_the_digest_is_the_documented_one(blocks, first):
    found = int(portable_digest([flat_of(block) for block in blocks], first)) & MASK
    assert found == documented(blocks, first)


@pytest.mark.parametrize("size", [CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
def test_across_the_border_of_a_chunk(size):
    """Random bytes around the borders, zeros elsewhere (which add nothing)."""
    data = bytearray(size)
    generator = torch.Generator().manual_seed(size)
    for border in range(0, size + 1, CHUNK):
        for at in range(max(0, border - 9), min(size, border + 9)):
            data[at] = int(torch.randint(0, 256, (), generator=generator))
    assert digest_of(bytes(data), b"abc") == documented([bytes(data), b"abc"])


def test_the_first_outputs_of_splitmix64():
    """Published numbers: the generator with seed 0 (Vigna's splitmix64.c), whose k-th output is that of mix(k)."""
    first = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [weight(k) for k in (1, 2, 3)] == [number | 1 for number in first]
    assert [mix(k) for k in (1, 2, 3)] == [number | 1 for number in first]


def test_the_lanes_are_odd_and_differ_in_their_low_bits():
    assert all(lane % 2 for lane in LANES)
    differences = [(a - b) % 2**64 for i, a in enumerate(LANES) for b in LANES[:i]]
    assert all(difference % 8 for difference in differences)


def test_the_sign_bit_stays_where_it_is():
    assert digest_of(b"\x00\x00\x00\x80") == 0x80000000 * LANES[0] * weight(1) * weight(4096) & MASK
    assert digest_of(b"\xff" * 16) == documented([b"\xff" * 16])


def test_any_single_bit_is_noticed():
    flat = torch.randint(0, 256, (49,), dtype=torch.uint8)
    before = int(portable_digest([flat]))
    seen = {before}
    for byte in range(flat.numel()):
        for bit in range(8):
            flat[byte] ^= 1 << bit
            seen.add(int(portable_digest([flat])))
            flat[byte] ^= 1 << bit
    assert len(seen) == 1 + 8 * flat.numel()
    assert int(portable_digest([flat])) == before


def test_any_two_bits_are_noticed():
    """Also those that stand in one quad, whose weights differ by constants only."""
    flat = torch.randint(0, 256, (16,), dtype=torch.uint8)
    before = int(portable_digest([flat]))
    for first in range(0, 128, 3):
        for second in range(first):
            changed = flat.clone()
            for bit in (first, second):
                changed[bit // 8] ^= 1 << bit % 8
            assert int(portable_digest([changed])) != before


def test_words_that_change_places_are_noticed():
    """Within a quad, a chunk, across chunks and across blocks."""
    words = torch.zeros(2 * CHUNK // 4 + 8, dtype=torch.int32)
    places = [0, 1, 2, 3, 4, 7, CHUNK // 4 - 1, CHUNK // 4, CHUNK // 4 + 1, 2 * CHUNK // 4 + 7]
    words[places] = torch.arange(1, len(places) + 1, dtype=torch.int32) * 1_000_003
    flat, other = words.view(torch.uint8), torch.tensor([7, 8], dtype=torch.int32)
    before = int(portable_digest([flat, other.view(torch.uint8)]))
    for i in places:
        for j in [*places[: places.index(i)], -1]:
            swapped, last = words.clone(), other.clone()
            if j < 0:
                swapped[i], last[0] = other[0], words[i]
            else:
                swapped[i], swapped[j] = words[j], words[i]
            assert int(portable_digest([swapped.view(torch.uint8), last.view(torch.uint8)])) != before


def test_where_a_block_ends_matters():
    assert digest_of(b"abcd", b"efgh") != digest_of(b"abcdefgh")


def test_zeros_and_nothing():
    assert digest_of() == digest_of(b"") == 0
    assert digest_of(bytes(64)) == 0


def test_the_parts_of_a_whole_add_up():
    blocks = [flat_of(bytes([i]) * (CHUNK + i)) for i in range(1, 5)]
    first = portable_digest(blocks[:2])
    rest = portable_digest(blocks[2:], first=4)  # two chunks each
    assert int(first + rest) == int(portable_digest(blocks))


def test_the_bytes_are_left_alone():
    flat = torch.randint(0, 256, (64,), dtype=torch.uint8)
    before = flat.clone()
    portable_digest([flat])
    assert torch.equal(flat, before)


# ------------------------------------------------------------ sweeps


def answer_of(sweep, side=Side.LIVE, copy=False):
    answer = torch.zeros(2, dtype=torch.int64)
    sweep.run(side, copy=copy, answer=answer)
    return int(answer[0]) & MASK, int(answer[1])


@given(st.lists(st.binary(max_size=40), min_size=1, max_size=5), st.sampled_from(list(Side)))
def test_a_sweep_copies_from_the_side_that_it_reads(blocks, source):
    live = [flat_of(block) for block in blocks]
    held = [torch.full_like(block, 0xA5) for block in live]
    origin, target = (live, held) if source is Side.LIVE else (held, live)
    before = [block.clone() for block in origin]
    sweep = Sweep(live, held, [Finite.ANYTHING] * len(live), first=3)
    assert answer_of(sweep, source, copy=True) == (documented([bytes(b.tolist()) for b in before], 3), 0)
    assert all(map(torch.equal, target, before))
    assert all(map(torch.equal, origin, before))


def test_a_sweep_that_only_reads_writes_nothing():
    live, held = torch.ones(40, dtype=torch.uint8), torch.zeros(40, dtype=torch.uint8)
    answer_of(Sweep([live], [held], [Finite.ANYTHING]), Side.LIVE)
    answer_of(Sweep([live], [held], [Finite.ANYTHING]), Side.HELD)
    assert live.tolist() == [1] * 40
    assert held.tolist() == [0] * 40


def test_answers_add_up():
    live = torch.arange(40, dtype=torch.uint8)
    sweep, answer = Sweep([live], None, [Finite.ANYTHING]), torch.zeros(2, dtype=torch.int64)
    for _ in range(3):
        sweep.run(Side.LIVE, copy=False, answer=answer)
    assert int(answer[0]) & MASK == 3 * documented([bytes(range(40))]) & MASK


TYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_what_is_not_finite_is_found_anywhere(dtype, bad):
    kind = Finite.of(dtype)
    largest = torch.finfo(dtype).max
    values = torch.tensor([0.0, -largest, largest, 1.5, -2.0, largest, 0.25], dtype=dtype)
    for at in range(len(values)):
        live = values.clone()
        sweep = Sweep([torch.zeros(8, dtype=torch.uint8), live.view(torch.uint8)], None, [Finite.ANYTHING, kind])
        assert answer_of(sweep)[1] == 0
        live[at] = bad
        assert answer_of(sweep)[1] == 1
        assert answer_of(Sweep([live.view(torch.uint8)], None, [Finite.ANYTHING]))[1] == 0


def test_other_types_are_not_looked_at_by_a_sweep():
    assert [Finite.of(dtype) for dtype in (torch.int32, torch.bool, torch.float8_e5m2, None)] == [None] * 4


def test_a_sweep_knows_its_blocks_again():
    live = [torch.zeros(8, dtype=torch.uint8), torch.zeros(16, dtype=torch.uint8)]
    sweep = Sweep(live, None, [Finite.ANYTHING] * 2)
    assert sweep.fits(live)
    assert sweep.fits([live[0], live[1].view(-1)])
    assert not sweep.fits(live[:1])
    assert not sweep.fits([live[0], live[1][:8]])
    assert not sweep.fits([live[0], torch.zeros(16, dtype=torch.uint8)])


# ------------------------------------------------------------ copies


@given(
    st.lists(st.tuples(st.integers(1, 70), st.integers(0, 9), st.integers(0, 9)), max_size=8),
    st.integers(0, 2**16),
)
def test_copies_of_any_size_and_address(shapes, seed):
    """Each destination lies between fences in poisoned memory; nothing but its own bytes is written."""
    generator = torch.Generator().manual_seed(seed)
    sources, destinations, memories, expected = [], [], [], []
    for size, source_at, destination_at in shapes:
        origin = torch.randint(0, 256, (size + 16,), dtype=torch.uint8, generator=generator)
        memory = torch.full((size + 16,), 0xA5, dtype=torch.uint8)
        sources.append(origin[source_at : source_at + size])
        destinations.append(memory[destination_at : destination_at + size])
        wanted = memory.clone()
        wanted[destination_at : destination_at + size] = sources[-1]
        memories.append(memory)
        expected.append((wanted, origin.clone(), origin))
    copy_words(destinations, sources)
    for memory, (wanted, before, origin) in zip(memories, expected, strict=True):
        assert torch.equal(memory, wanted)
        assert torch.equal(origin, before)


@pytest.mark.parametrize("at", [0, 1, 4])
def test_nothing_is_copied_as_well(at):
    """An empty tensor has address 0, which counts as aligned whatever its offset is.

    Governed storages begin at offset 0 and slots at multiples of 64, so nothing in the library gets there today.
    """
    memory = torch.full((8,), 0xA5, dtype=torch.uint8)
    copy_words([memory[at:at]], [torch.zeros(0, dtype=torch.uint8)])
    assert memory.tolist() == [0xA5] * 8


def test_words_go_as_words_and_the_rest_as_bytes(monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "_foreach_copy_", lambda to, of: calls.append([(t.dtype, t.numel()) for t in of]))
    memory = torch.zeros(64, dtype=torch.uint8)
    pieces = [memory[0:16], memory[16:19], memory[20:24], memory[25:29]]
    copy_words([torch.zeros_like(piece) for piece in pieces], pieces)
    assert calls == [[(torch.int32, 4), (torch.int32, 1)], [(torch.uint8, 3), (torch.uint8, 4)]]


def test_a_missing_partner_is_an_error():
    with pytest.raises(ValueError, match=r"shorter|longer"):
        copy_words([torch.zeros(4, dtype=torch.uint8)], [])


def test_a_floating_point_nan_keeps_its_payload():
    source = torch.tensor([0x7FA00001, 0x7FC12345], dtype=torch.int32).view(torch.uint8)
    destination = torch.zeros(8, dtype=torch.uint8)
    copy_words([destination], [source])
    assert torch.equal(destination, source)

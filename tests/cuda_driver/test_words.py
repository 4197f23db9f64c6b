"""Moving bytes as words, and the digest of them: against plain integers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tolaria import kernels
from tolaria.cuda import copy_words

MASK = (1 << 64) - 1


def weight(k: int) -> int:
    """The finaliser of splitmix64 for k * 0x9E3779B97F4A7C15, made odd: as documented, with numbers of its own."""
    z = k * 0x9E3779B97F4A7C15 & MASK
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
    return (z ^ z >> 31) | 1


def documented(data: bytes, chunk: int) -> int:
    """digest = sum over i of x[i] * mix(i % C) * mix(C + i // C) modulo 2**64."""
    words = [int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4)]
    return sum(x * weight(i % chunk) * weight(chunk + i // chunk) for i, x in enumerate(words)) & MASK


def flat_of(data: bytes) -> torch.Tensor:
    return torch.tensor(list(data), dtype=torch.uint8)


def digest_of(data: bytes) -> int:
    return int(kernels.portable_digest(flat_of(data))) & MASK


def with_small_chunks(monkeypatch, chunk):
    monkeypatch.setattr(kernels, "CHUNK_WORDS", chunk)


QUADS = st.binary(min_size=0, max_size=10).flatmap(
    lambda head: st.binary(min_size=0, max_size=160).map(lambda tail: (head + tail)[: len(head + tail) // 16 * 16])
)


@pytest.mark.parametrize("chunk", [1, 3, 4, 8, 16])
@given(data=QUADS)
def test_the_digest_is_the_documented_one(chunk, data):
    with pytest.MonkeyPatch.context() as patch:
        with_small_chunks(patch, chunk)
        assert digest_of(data) == documented(data, chunk)


def test_the_first_outputs_of_splitmix64():
    """Published numbers: the generator with seed 0 (Vigna's splitmix64.c), whose k-th output is that of mix(k)."""
    first = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [weight(k) for k in (1, 2, 3)] == [number | 1 for number in first]
    assert [kernels.mix(k) for k in (1, 2, 3)] == [number | 1 for number in first]


@pytest.mark.slow
def test_across_the_border_of_a_real_chunk():
    """Random words in the last quads of one chunk and the first of the next, zeros elsewhere (which add nothing)."""
    chunk = kernels.CHUNK_WORDS
    assert chunk == 1 << 22
    words = torch.zeros(chunk + 16, dtype=torch.int32)
    some = torch.randint(-(2**31), 2**31, (32,), dtype=torch.int64).to(torch.int32)
    words[chunk - 16 :] = some
    expected = sum(
        (int(x) & 0xFFFFFFFF) * weight(i % chunk) * weight(chunk + i // chunk)
        for i, x in enumerate(some.tolist(), start=chunk - 16)
    )
    assert int(kernels.portable_digest(words.view(torch.uint8))) & MASK == expected & MASK


def test_the_sign_bit_stays_where_it_is():
    assert digest_of(b"\x00\x00\x00\x80" + bytes(12)) == (0x80000000 * weight(0) * weight(kernels.CHUNK_WORDS)) & MASK
    assert digest_of(b"\xff" * 16) == documented(b"\xff" * 16, kernels.CHUNK_WORDS)


@pytest.mark.parametrize("chunk", [4, 1 << 22])
def test_any_single_bit_is_noticed(chunk, monkeypatch):
    with_small_chunks(monkeypatch, chunk)
    flat = torch.randint(0, 256, (48,), dtype=torch.uint8)
    before = int(kernels.portable_digest(flat))
    seen = {before}
    for byte in range(flat.numel()):
        for bit in range(8):
            flat[byte] ^= 1 << bit
            seen.add(int(kernels.portable_digest(flat)))
            flat[byte] ^= 1 << bit
    assert len(seen) == 1 + 8 * flat.numel()
    assert int(kernels.portable_digest(flat)) == before


@pytest.mark.parametrize("chunk", [4, 1 << 22])
def test_words_that_change_places_are_noticed(chunk, monkeypatch):
    """Within a chunk and across chunks."""
    with_small_chunks(monkeypatch, chunk)
    words = torch.arange(1, 17, dtype=torch.int32) * 1_000_003
    before = int(kernels.portable_digest(words.view(torch.uint8)))
    for i in range(16):
        for j in range(i):
            swapped = words.clone()
            swapped[i], swapped[j] = words[j], words[i]
            assert int(kernels.portable_digest(swapped.view(torch.uint8))) != before


def test_zeros_and_nothing():
    assert digest_of(b"") == 0
    assert digest_of(bytes(64)) == 0


def test_the_bytes_are_left_alone():
    flat = torch.randint(0, 256, (64,), dtype=torch.uint8)
    before = flat.clone()
    kernels.portable_digest(flat)
    assert torch.equal(flat, before)


def test_on_a_cpu_the_digest_is_the_portable_one():
    flat = torch.randint(0, 256, (64,), dtype=torch.uint8)
    assert int(kernels.digest(flat)) == int(kernels.portable_digest(flat))


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

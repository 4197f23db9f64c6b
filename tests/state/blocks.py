"""Blocks of memory for the tests of copy paths: every size, address and element type, between fences, poisoned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st

POISONS = (0xA5, 0x5A)
"""Each destination is written twice, over other bytes each time: one that is left out differs in one of them."""
_FENCE = 64

Pairs = tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]
Copy = Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], None]
"""destinations, sources"""

_sizes = st.one_of(
    st.integers(0, 70),
    st.sampled_from([4095, 4096, 4097, 32767, 32768, 32769, 65536, 100_001]),
)
shapes = st.lists(st.tuples(_sizes, st.integers(0, 17), st.integers(0, 17)), max_size=12)
"""Of each block: bytes, and by how much source and destination are off a boundary of 64 bytes."""


@dataclass(slots=True)
class Blocks:
    """Sources of random bytes, and as many destinations, each in memory of its own.

    Args:
        drawn: See `shapes`.
        seed: Of the bytes.
        device: Where they are.
    """

    drawn: Sequence[tuple[int, int, int]]
    seed: int
    device: str = "cpu"
    sources: list[torch.Tensor] = field(default_factory=list)
    destinations: list[torch.Tensor] = field(default_factory=list)
    _memory: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        for size, source_at, destination_at in self.drawn:
            origin = torch.randint(0, 256, (size + _FENCE,), dtype=torch.uint8, generator=generator).to(self.device)
            memory = torch.empty(size + 2 * _FENCE, dtype=torch.uint8, device=self.device)
            self.sources.append(origin[source_at : source_at + size])
            self.destinations.append(memory[_FENCE + destination_at :][:size])
            self._memory.append(memory)

    def verify(self, copy: Copy) -> None:
        """Every destination becomes its source, and no byte beside it is written."""
        before = [source.clone() for source in self.sources]
        for poison in POISONS:
            for memory in self._memory:
                memory.fill_(poison)
            copy(self.destinations, self.sources)
            for memory, written, source, kept in zip(
                self._memory, self.destinations, self.sources, before, strict=True
            ):
                assert torch.equal(written, source)
                assert torch.equal(source, kept)
                written.fill_(poison)
                assert bool((memory == poison).all())

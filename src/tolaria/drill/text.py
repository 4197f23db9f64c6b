"""The text that the GPT learns: the Python language reference, as every Python carries it for `help("for")`.

Real prose and code, about 450,000 characters, already on the disk: nothing is downloaded, and nothing is copied into
this package (it is read from the running interpreter's standard library, under that one's licence). It differs a little
from one Python version to the next, and so do the figures of a drill; the alphabet does not.
"""

from __future__ import annotations

import math
from importlib import import_module

import torch

from tolaria.drill.workloads import CannotRun

NUM_SYMBOLS = 96
"""Line end and the 95 printable characters of ASCII; whatever else there is reads as a question mark."""

_BLOCK = 4096  # characters; every tenth block is held out
_HELD_OUT = 10
_FEWEST = 100_000


def read_reference() -> str:
    """The text.

    Raises:
        CannotRun: This Python's standard library was stripped of it.
    """
    try:
        topics: dict[str, str] = import_module("pydoc_data.topics").topics
    except ImportError:
        topics = {}
    text = "\n\n".join(topics[name] for name in sorted(topics))
    if len(text) < _FEWEST:
        raise CannotRun(
            "this Python's standard library was stripped of pydoc_data, the text to learn: "
            "use another Python, or --workload digits"
        )
    return text


def encode(text: str) -> torch.Tensor:
    """Symbols of the text, shape [characters], int64, each below `NUM_SYMBOLS`."""
    raw = torch.frombuffer(bytearray(text.encode("ascii", "replace")), dtype=torch.uint8).long()
    printable = (raw >= 32) & (raw < 127)
    return torch.where(raw == ord("\n"), 0, torch.where(printable, raw - 31, ord("?") - 31))


def split(symbols: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks to train on and blocks held out, shapes [blocks, 4096]; an incomplete last block is left out."""
    blocks = symbols[: len(symbols) // _BLOCK * _BLOCK].view(-1, _BLOCK)
    held_out = torch.arange(len(blocks)) % _HELD_OUT == _HELD_OUT - 1
    return blocks[~held_out], blocks[held_out]


def frequency_loss(train: torch.Tensor, held_out: torch.Tensor) -> float:
    """Cross entropy of the held-out text under the frequencies of single symbols: nothing but the alphabet is known."""
    counts = train.flatten().bincount(minlength=NUM_SYMBOLS).double() + 1
    logarithms = (counts / counts.sum()).log()
    loss = -float(logarithms[held_out.flatten()].mean())
    assert math.isfinite(loss)
    return loss

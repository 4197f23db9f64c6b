"""Batches, faults, verdicts and bitwise comparison for the tests of the adapters."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from tolaria import Detector, Health, Verdict, VitalSigns
from tolaria.judge import non_finite

NAN = float("nan")


def batches(count: int = 20, bad: Collection[int] = (), dropped: Collection[int] = ()) -> list[Any]:
    """The same batches at each call: those in `bad` hold NaN, those in `dropped` are left out."""
    generator = torch.Generator().manual_seed(1)
    made = [
        (torch.randn(16, 6, generator=generator), torch.randint(3, (16,), generator=generator)) for _ in range(count)
    ]
    made = [(x * NAN, y) if index in bad else (x, y) for index, (x, y) in enumerate(made)]
    return [batch for index, batch in enumerate(made) if index not in dropped]


def window(index: int, size: int) -> range:
    """The accumulation window that a batch belongs to."""
    return range(index - index % size, index - index % size + size)


def frozen(value: Any) -> Any:
    """A tree that `==` compares bit for bit."""
    if isinstance(value, torch.Tensor):
        dense = value.detach().cpu().contiguous().reshape(-1)
        return (str(value.dtype), tuple(value.shape), dense.view(torch.uint8).tolist())
    if isinstance(value, Mapping):
        return {key: frozen(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [frozen(item) for item in value]
    return repr(value) if isinstance(value, float) else value


def is_finite(value: Any) -> bool:
    """Whether no tensor and no number of a tree is NaN or infinite."""
    if isinstance(value, torch.Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, Mapping):
        return all(map(is_finite, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(is_finite, value))
    return not isinstance(value, float) or abs(value) < float("inf")


def scripted(script: Mapping[int, tuple[str, int]]) -> Detector[Any]:
    """Non-finite numbers panic; besides, judgement n (from 1, undone steps count too) answers (health, steps since)."""
    judged = 0
    finite = non_finite()

    def update(state: Any, signs: VitalSigns) -> tuple[Any, Verdict]:
        nonlocal judged
        judged += 1
        state, verdict = finite.update(state, signs)
        if judged not in script or verdict.is_panic:
            return state, verdict
        health, since = script[judged]
        return state, Verdict(Health(health), signs.step, "scripted", signs.step - since)

    return Detector(finite.init, update)


def recorded(seen: list[VitalSigns]) -> Detector[Any]:
    """Judges by `non_finite`, and keeps what it was asked about."""
    inner = non_finite()

    def update(state: Any, signs: VitalSigns) -> tuple[Any, Verdict]:
        seen.append(signs)
        return inner.update(state, signs)

    return Detector(inner.init, update)

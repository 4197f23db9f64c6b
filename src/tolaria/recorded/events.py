"""TensorBoard event files, through the `tensorboard` package (extra `tensorboard`), imported when one is read."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tolaria.recorded.records import UnreadableRecord
from tolaria.records import VitalSigns

_LOSSES = ("train/loss", "loss", "loss/train", "train_loss", "training_loss", "train/train_loss", "train_loss_step")
_NORMS = ("train/grad_norm", "grad_norm", "gradient_norm", "train/gradient_norm", "grad_norm/train")
_NOT_TRAINING = {"val", "valid", "validation", "eval", "evaluation", "test"}


def read(path: Path) -> tuple[VitalSigns, ...]:
    """The training loss and, where there is one, the gradient norm of one event file, or of a folder of them.

    Of the tags, the usual names of a training loss are taken, else the only one with "loss" in it that does not belong
    to an evaluation. A step that was written twice, by a run that was resumed, counts as it was written last.

    Raises:
        UnreadableRecord: The package is missing, there is no such file, no event in it, or no such tag.
    """
    if not path.exists():
        raise UnreadableRecord(f"{path}: there is no such file")
    values = _open(path)
    tags = sorted(values)
    if not tags:
        raise UnreadableRecord(f"{path}: no scalar in it, expected TensorBoard events with a training loss")
    losses = values[_loss_tag(path, tags)]
    norm_tag = next((tag for name in _NORMS for tag in tags if tag.lower() == name), None)
    norms = values[norm_tag] if norm_tag is not None else {}
    return tuple(VitalSigns(step=step, loss=losses[step], grad_norm=norms.get(step)) for step in sorted(losses))


def _loss_tag(path: Path, tags: Sequence[str]) -> str:
    for name in _LOSSES:
        for tag in tags:
            if tag.lower() == name:
                return tag
    others = [
        tag for tag in tags if "loss" in tag.lower() and _NOT_TRAINING.isdisjoint(re.split("[^a-z]+", tag.lower()))
    ]
    if len(others) != 1:
        raise UnreadableRecord(f"{path}: expected one tag for the training loss, found {', '.join(tags)[:200]}")
    return others[0]


def _open(path: Path) -> dict[str, dict[int, float]]:
    """Scalars by tag and step."""
    try:
        from tensorboard.backend.event_processing import event_accumulator
        from tensorboard.util.tensor_util import make_ndarray
    except ImportError:
        raise UnreadableRecord(f"{path}: reading TensorBoard files needs: pip install 'tolaria[tensorboard]'") from None
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    keep_all = {event_accumulator.SCALARS: 0, event_accumulator.TENSORS: 0}
    accumulator: Any = event_accumulator.EventAccumulator(str(path), size_guidance=keep_all)
    try:
        accumulator.Reload()
    except Exception as error:  # whatever its parsers raise, the file is at fault
        raise UnreadableRecord(f"{path}: damaged TensorBoard file ({type(error).__name__})") from error
    found = {
        tag: {event.step: float(event.value) for event in accumulator.Scalars(tag)}
        for tag in accumulator.Tags()[event_accumulator.SCALARS]
    }
    for tag in accumulator.Tags()[event_accumulator.TENSORS]:
        arrays = [(event.step, make_ndarray(event.tensor_proto)) for event in accumulator.Tensors(tag)]
        if arrays and all(array.size == 1 and array.dtype.kind in "fiu" for _, array in arrays):
            found[tag] = {step: float(array.reshape(())) for step, array in arrays}
    return found

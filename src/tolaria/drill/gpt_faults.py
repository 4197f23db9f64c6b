"""What goes wrong in a drill of the GPT: the faults of the digits, and four that need more than a look at the loss."""

from __future__ import annotations

import torch

from tolaria.drill.faults import (
    FaultKind,
    Scene,
    explode_gradients,
    flip_exponent_bit,
    spoil_labels,
    spoil_with_nan,
    training_of,
    write_from_foreign,
    zero_moments,
)
from tolaria.testing.faults import Moment, flip_bit

REEXECUTE_EVERY = 100
"""Setting of the governor: the ten steps up to 100, up to 200, ... are run twice. The silent fault strikes in one of
those stretches; outside of them nothing would ever find it."""

_MANTISSA_BIT = 20
_WEIGHT_DECAY = 25.0


def flip_mantissa_bit(scene: Scene) -> None:
    """Bit 20 of a weight: it moves by 6 to 13 %. One in thousands: no loss shows it, and nothing ever takes it back."""
    weight = scene.workload.exposed_weight(training_of(scene).model)
    flip_bit(weight, int(torch.randint(weight.numel(), (), generator=scene.generator)), _MANTISSA_BIT)


def flip_bit_in_slot_and_weight(scene: Scene) -> None:
    """One bit of the newest good snapshot, and an exponent bit of a weight: a rollback must not take that snapshot."""
    slots = scene.newest_slot()
    if slots:
        memory = slots[int(torch.randint(len(slots), (), generator=scene.generator))]
        flip_bit(memory, int(torch.randint(len(memory), (), generator=scene.generator)), 3)
    flip_exponent_bit(scene)


def clobber_weight_decay(scene: Scene) -> None:
    """A hyper-parameter is overwritten: from here on every weight shrinks by up to a fifth in each step.

    Nothing is wrong with the step itself. The loss climbs over several steps, so a snapshot may hold the damage already
    when the panic comes.
    """
    for group in training_of(scene).optimizer.param_groups:
        group["weight_decay"] = _WEIGHT_DECAY


KINDS: tuple[FaultKind, ...] = (
    # transient ones first, as for the digits
    FaultKind("gradient_explosion", "gradients x 1e6 for one step, unclipped", Moment.STEP, explode_gradients, 0.12),
    FaultKind("zeroed_moments", "Adam's second moments zeroed, 3 steps", Moment.UPDATE, zero_moments, 0.19, length=3),
    FaultKind("foreign_write", "another thread overwrites weights", Moment.FORWARD, write_from_foreign, 0.26),
    FaultKind(
        "silent_bit_flip",
        "one mantissa bit of a weight flips: no alarm",
        Moment.UPDATE,
        flip_mantissa_bit,
        0.32,
        beat=(REEXECUTE_EVERY, REEXECUTE_EVERY - 7),
    ),
    FaultKind("bit_flip", "one exponent bit of a weight flips", Moment.UPDATE, flip_exponent_bit, 0.385),
    FaultKind(
        "corrupted_slot",
        "a bit flips in the newest snapshot, and one in a weight",
        Moment.UPDATE,
        flip_bit_in_slot_and_weight,
        0.455,
        beat=(10, 4),
    ),
    FaultKind(
        "weight_decay",
        "weight decay is overwritten, noticed late",
        Moment.UPDATE,
        clobber_weight_decay,
        0.525,
        beat=(100, 16),
    ),
    FaultKind("garbage_batches", "16 batches are followed by noise", Moment.DATA, spoil_labels, 0.655, length=16),
    FaultKind("bad_micro_batch", "one of two micro-batches holds a NaN", Moment.DATA, spoil_with_nan, 0.755, part=1),
    FaultKind(
        "returning_bit_flip", "a bit flip that returns on replay", Moment.UPDATE, flip_exponent_bit, 0.835, times=2
    ),
    FaultKind("nan_batch", "both micro-batches hold a NaN", Moment.DATA, spoil_with_nan, 0.92),
)
"""In the order in which they strike."""

FOREIGN_KERNEL_AT = 0.595
"""Where there is room for the fault that needs a device (`in_flight`)."""

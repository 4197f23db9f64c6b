"""The kinds of fault, one row each. A row says what strikes, where in a run, and how a trial of it may end."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from tolaria.drill.campaign.acts import (
    averages_of,
    blur,
    both,
    break_off,
    buffers_of,
    fill,
    flip,
    flip_exposed_exponent,
    flip_in_slots,
    forget_momentum,
    gradients_of,
    loss_is,
    moments_of,
    multiply_setting,
    reseed,
    run_schedule_ahead,
    scale,
    silence_one,
    spoil_targets,
    spoil_with_nan,
    spoil_with_size,
    weights_of,
    write_from_thread,
)
from tolaria.drill.campaign.strokes import LASTING, TWICE, Moment, Stroke


class Ending(Enum):
    """How trials of a kind are meant to end."""

    EXACT = "exact"  # bit-identical to the reference
    NAMED = "named"  # an error of tolaria's ends the run, at the last good state; or exact all the same
    CLOSE = "close"  # the learning rate was changed by the recovery: validation loss at most 1.3 x clean
    OUTSIDE = "outside"  # undetectable in principle; reported with its rate, never counted as recovered


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of fault.

    Attributes:
        name: In reports.
        title: For people: what is done to the run.
        strokes: What strikes.
        span: Part of the run in which its place is drawn by the seed, as shares of the batches.
        ending: See `Ending`.
        epoch: Batches of one pass over the loader; 0: the run is one pass. Its place is then the last of a pass.
        workloads: Those on which it means something; empty: all.
        cool_lr: Setting of the governor.
        max_retries: Setting of the governor. Its default is meant for 1,000 steps; faults that do not end get one that
            fits a short run.
    """

    name: str
    title: str
    strokes: tuple[Stroke, ...]
    span: tuple[float, float] = (0.0, 1.0)
    ending: Ending = Ending.EXACT
    epoch: int = 0
    workloads: tuple[str, ...] = ()
    cool_lr: float = 1.0
    max_retries: int = 20


_NAN = math.nan
_BUFFERED = ("digits", "regression")
_LATER = (0.35, 0.75)
_FIRST, _LAST = (0.0, 0.0), (1.0, 1.0)
_STEPPED = (0.03, 1.0)  # the optimizer has averages since its first step
_ANY, _MANTISSA = range(32), range(23)

_flip_exponent = Stroke(Moment.UPDATE, flip_exposed_exponent)
_flip_mantissa = Stroke(Moment.REST, flip(weights_of, _MANTISSA))

KINDS: tuple[Kind, ...] = (
    # numbers that are not finite
    Kind("nan_loss", "the loss is NaN, once", (Stroke(Moment.LOSS, loss_is(_NAN)),)),
    Kind("inf_loss", "the loss reads infinity, gradients are right", (Stroke(Moment.LOSS, loss_is(math.inf)),)),
    Kind("nan_gradient", "one element of one gradient is NaN", (Stroke(Moment.UPDATE, fill(gradients_of, _NAN)),)),
    Kind("inf_gradient", "the same with infinity", (Stroke(Moment.UPDATE, fill(gradients_of, math.inf)),)),
    Kind("inf_weight", "a weight becomes infinite, at rest", (Stroke(Moment.REST, fill(weights_of, math.inf)),)),
    # bits
    Kind("exponent_flip", "the highest exponent bit of a weight flips", (_flip_exponent,)),
    Kind("mantissa_flip", "a mantissa bit of any weight flips, at rest", (_flip_mantissa,)),
    Kind("weight_flip", "any bit of any weight flips", (Stroke(Moment.UPDATE, flip(weights_of, _ANY)),)),
    Kind(
        "moment_flip",
        "any bit of the optimizer's averages flips",
        (Stroke(Moment.UPDATE, flip(moments_of, _ANY)),),
        _STEPPED,
    ),
    Kind("gradient_flip", "any bit of any gradient flips", (Stroke(Moment.STEP, flip(gradients_of, _ANY)),)),
    Kind("buffer_flip", "any bit of a buffer flips, at rest", (Stroke(Moment.REST, flip(buffers_of, _ANY)),)),
    Kind("average_flip", "a bit of the registered average of weights", (Stroke(Moment.REST, flip(averages_of, _ANY)),)),
    Kind("slot_flip", "a bit of the newest snapshot flips, nothing else", (Stroke(Moment.REST, flip_in_slots(False)),)),
    Kind(
        "slot_and_weight_flip",
        "a bit of the newest snapshot, and an exponent bit",
        (Stroke(Moment.UPDATE, both(flip_in_slots(False), flip_exposed_exponent)),),
        (0.3, 1.0),
    ),
    # what the optimizer does
    Kind("exploded_gradients", "gradients x 1e6, behind clipping", (Stroke(Moment.STEP, scale(gradients_of, 1e6)),)),
    Kind("flipped_sign", "the sign of every gradient, one step", (Stroke(Moment.STEP, scale(gradients_of, -1.0)),)),
    Kind("lost_gradient", "one gradient reads zero, one step", (Stroke(Moment.STEP, silence_one(gradients_of)),)),
    Kind("frozen", "all gradients read zero, 5 steps", (Stroke(Moment.UPDATE, scale(gradients_of, 0.0), length=5),)),
    Kind(
        "zeroed_moments",
        "the optimizer's averages read zero",
        (Stroke(Moment.UPDATE, scale(moments_of, 0.0)),),
        _STEPPED,
    ),
    Kind(
        "swollen_moments", "the optimizer's averages x 1000", (Stroke(Moment.UPDATE, scale(moments_of, 1e3)),), _STEPPED
    ),
    Kind("rate_jump", "the learning rate x 100, to stay", (Stroke(Moment.UPDATE, multiply_setting("lr", 100.0)),)),
    Kind("schedule_bug", "the scheduler is stepped 7 times too often", (Stroke(Moment.REST, run_schedule_ahead),)),
    Kind(
        "decay_jump", "weight decay x 300, to stay", (Stroke(Moment.UPDATE, multiply_setting("weight_decay", 300.0)),)
    ),
    Kind("lost_momentum", "momentum is overwritten by 0.1, to stay", (Stroke(Moment.REST, forget_momentum),)),
    Kind("half_step", "the optimizer's step raises half-way", (Stroke(Moment.STEP, break_off),)),
    # what becomes of the weights
    Kind("scaled_weights", "every weight x 1.5", (Stroke(Moment.REST, scale(weights_of, 1.5)),)),
    Kind("dead_layer", "one whole parameter reads zero", (Stroke(Moment.REST, silence_one(weights_of)),)),
    Kind("foreign_noise", "a foreign thread adds noise of size 10", (Stroke(Moment.LOSS, write_from_thread(10.0)),)),
    Kind("foreign_touch", "a foreign thread adds noise of size 1e-4", (Stroke(Moment.LOSS, write_from_thread(1e-4)),)),
    Kind(
        "poisoned_statistics",
        "BatchNorm's statistics and the like x 100",
        (Stroke(Moment.REST, scale(buffers_of, 100.0)),),
        workloads=_BUFFERED,
    ),
    # data
    Kind("nan_batch_once", "a batch holds a NaN when it first comes", (Stroke(Moment.BATCH, spoil_with_nan),)),
    Kind("nan_batch", "a batch holds a NaN", (Stroke(Moment.BATCH, spoil_with_nan, occasions=LASTING, part=-1),)),
    Kind("wrong_targets_once", "3 batches of garbage, only at first", (Stroke(Moment.BATCH, spoil_targets, length=3),)),
    Kind("huge_batch_once", "a batch x 1000, only at first", (Stroke(Moment.BATCH, spoil_with_size),)),
    Kind(
        "nan_stretch",
        "6 batches in a row hold a NaN",
        (Stroke(Moment.BATCH, spoil_with_nan, length=6, occasions=LASTING),),
    ),
    # places
    Kind("first_step", "noise on all weights in the first step", (Stroke(Moment.REST, blur(weights_of, 0.1)),), _FIRST),
    Kind("last_step", "an exponent bit flips in the last step", (_flip_exponent,), _LAST),
    Kind("last_step_silent", "a mantissa bit flips after the last step", (_flip_mantissa,), _LAST),
    Kind("end_of_epoch", "an exponent bit flips in the last step of an epoch", (_flip_exponent,), epoch=16),
    Kind(
        "amid_accumulation",
        "noise on all weights before the last micro-batch of a step",
        (Stroke(Moment.BATCH, blur(weights_of, 1.0), part=-1),),
    ),
    Kind(
        "during_replay",
        "an exponent flip, and another one while its steps are replayed",
        (_flip_exponent, Stroke(Moment.UPDATE, flip_exposed_exponent, offset=-1, occasions=frozenset({2, 3}))),
        (0.1, 1.0),
    ),
    Kind(
        "after_rollback",
        "an exponent flip, and a mantissa flip in the first step after the rollback",
        (_flip_exponent, Stroke(Moment.REST, flip(weights_of, _MANTISSA), after_rollback=True)),
        (0.1, 0.85),
    ),
    Kind(
        "second_execution",
        "a mantissa flip when the steps are run again",
        (Stroke(Moment.REST, flip(weights_of, _MANTISSA), occasions=frozenset({2})),),
    ),
    # several
    Kind(
        "all_at_once",
        "exponent flip, zeroed moments, rate jump, and a flip in a snapshot, in one step",
        (
            Stroke(Moment.UPDATE, both(multiply_setting("lr", 100.0), scale(moments_of, 0.0), flip_exposed_exponent)),
            Stroke(Moment.STEP, flip_in_slots(False)),
        ),
        (0.3, 1.0),
    ),
    Kind(
        "in_a_row",
        "exponent flip, NaN gradient three steps later, NaN batch three steps later",
        (
            _flip_exponent,
            Stroke(Moment.UPDATE, fill(gradients_of, _NAN), offset=3),
            Stroke(Moment.BATCH, spoil_with_nan, offset=6, occasions=LASTING),
        ),
        (0.0, 0.9),
    ),
    Kind(
        "returning_flip",
        "an exponent flip that returns on replay",
        (Stroke(Moment.UPDATE, flip_exposed_exponent, occasions=TWICE),),
        (0.0, 0.9),
    ),
    Kind(
        "returns_at_the_end",
        "an exponent flip in the last step, that comes again in each execution",
        (Stroke(Moment.UPDATE, flip_exposed_exponent, occasions=LASTING),),
        _LAST,
    ),
    # faults that do not end
    Kind(
        "broken_unit",
        "from one step on every gradient holds a NaN",
        (Stroke(Moment.UPDATE, fill(gradients_of, _NAN), length=0, occasions=LASTING),),
        (0.2, 0.5),
        Ending.NAMED,
        max_retries=2,
    ),
    Kind(
        "stray_writer",
        "from one step on a foreign thread adds noise of size 10 in every step",
        (Stroke(Moment.LOSS, write_from_thread(10.0), length=0, occasions=LASTING, fresh=True),),
        (0.2, 0.5),
        Ending.NAMED,
        max_retries=2,
    ),
    Kind(
        "every_slot",
        "a bit flips in every snapshot, and a weight becomes infinite",
        (Stroke(Moment.UPDATE, both(flip_in_slots(True), fill(weights_of, math.inf))),),
        (0.0, 1.0),
        Ending.NAMED,
    ),
    # the recovery changes the learning rate
    Kind(
        "cooled",
        "two exponent flips that return on replay; the second one cools the learning rate",
        (
            Stroke(Moment.UPDATE, flip_exposed_exponent, occasions=TWICE),
            Stroke(Moment.UPDATE, flip_exposed_exponent, offset=25, occasions=TWICE),
        ),
        (0.2, 0.5),
        Ending.CLOSE,
        cool_lr=0.5,
    ),
    # outside
    Kind(
        "errs_alike",
        "a mantissa flip that comes again in each execution",
        (Stroke(Moment.REST, flip(weights_of, _MANTISSA), occasions=LASTING),),
        ending=Ending.OUTSIDE,
    ),
    Kind(
        "random_state",
        "somebody seeds the global generator anew between two steps",
        (Stroke(Moment.REST, reseed),),
        ending=Ending.OUTSIDE,
    ),
    Kind(
        "frozen_for_good",
        "from one step on all gradients read zero",
        (Stroke(Moment.UPDATE, scale(gradients_of, 0.0), length=0, occasions=LASTING),),
        _LATER,
        Ending.OUTSIDE,
    ),
    Kind(
        "huge_batch",
        "one batch x 1000, each time that it comes",
        (Stroke(Moment.BATCH, spoil_with_size, occasions=LASTING),),
        ending=Ending.OUTSIDE,
    ),
    Kind(
        "wrong_targets",
        "16 batches of garbage, each time that they come",
        (Stroke(Moment.BATCH, spoil_targets, length=16, occasions=LASTING),),
        _LATER,
        Ending.OUTSIDE,
    ),
)
"""In the order of the table."""

CONTROL = Kind("none", "nothing goes wrong", ())
"""Any panic in it is a false one."""

BY_NAME = {kind.name: kind for kind in (*KINDS, CONTROL)}

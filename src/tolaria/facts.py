"""FACTS: what a governor says of itself, and the numbers of one step that it sends off to be judged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tolaria import living, observe, ring
from tolaria.config import GovernorConfig
from tolaria.course import Course
from tolaria.keeper import Keeper
from tolaria.observe import Loss, Scalar
from tolaria.records import Capabilities
from tolaria.update import Outcome
from tolaria.vitals import EXTRA, own_signs


def capabilities(config: GovernorConfig, keeper: Keeper, course: Course) -> Capabilities:
    """What was chosen for this machine and train state."""
    newest, vault = ring.newest_good(keeper.ring), keeper.vault
    return Capabilities(
        barrier=keeper.ground.barrier.value,
        devices=tuple(vault.devices),
        tier=vault.plan.tier.value,
        tier_reason=vault.plan.reason,
        host_slots=vault.plan.host_slots,
        barrier_reason=keeper.devices.reason,
        copy_path=vault.copy_path,
        state_bytes=vault.num_bytes(newest.index) if newest else 0,
        slots=vault.room.slots,
        cadence=course.cadence,
        cadence_stretched=config.cadence not in ("auto", course.cadence),
        rng=living.rng_policy(config),
        reexecution=course.again.in_force,
        notes_bytes=0 if keeper.notes is None else keeper.notes.num_bytes_held(),
    )


def numbers(
    done: Outcome, loss: Loss, metric: float | None, signs: Mapping[str, Any], gauged: Mapping[str, Any]
) -> dict[str, Scalar]:
    """The numbers of one update.

    Args:
        done: What became of it.
        loss: As handed to `step`.
        metric: Likewise.
        signs: Likewise; ``grad_norm`` stands in the place of ours.
        gauged: Further signs of ours by name.
    """
    others = {**observe.named_losses(loss), **signs}
    given = others.pop("grad_norm", None)
    return {
        "loss": done.loss,
        "grad_norm": done.grad_norm if given is None else observe.mean_sign(given),
        "nonfinite_gradients": done.nonfinite_gradients,
        "scaler_skipped": done.scaler_skipped,
        "vetoed": done.late_veto,
        "metric": metric,
        **{EXTRA + name: value for name, value in gauged.items()},
        **own_signs(others),
    }

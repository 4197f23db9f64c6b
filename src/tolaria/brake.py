"""BRAKE: recovery policies where somebody else's loop makes the optimizer steps."""

from __future__ import annotations

from tolaria.errors import UnsupportedState
from tolaria.governor import TolariaGovernor


def brake_foreign_steps(governor: TolariaGovernor, loop: str, *refused: str) -> None:
    """Give steps that `TolariaGovernor.step` does not make the cooled learning rate as well.

    Call once, before the first step. The rate is lowered during each optimizer step only, as `step` does it.

    Args:
        governor: Of the loop.
        loop: What it is called in messages.
        refused: Names of numbers in `Recovery` that have to be 0, because they cannot be kept there.

    Raises:
        UnsupportedState: One of them is not, or `past_steps`.
    """
    policy = governor.config.recovery
    for name in refused:
        if getattr(policy, name):
            raise UnsupportedState(
                f"governing {loop}",
                f"Recovery({name}={getattr(policy, name)}), which cannot be kept in a loop of that kind",
                f"Leave {name} at 0; docs/recovery.md says what holds there.",
            )
    if governor.config.past_steps:
        raise UnsupportedState(
            f"governing {loop}",
            f"past_steps={governor.config.past_steps}, and notes are taken by TolariaGovernor.step alone",
            "Leave past_steps at 0.",
        )
    if not governor.is_disabled and governor.config.mode == "act":
        update, course = governor._update, governor._course  # and not the governor, so that it can be dropped
        governor._keeper.sections.around_step = lambda: update._scaled_learning_rate(course.learning_rate_factor())

"""What is asked of the outcome of a search."""

from __future__ import annotations

from tolaria.operations import Barrier
from tolaria.testing.timeline import draw
from tolaria.testing.world import Outcome

BARRIERS = (Barrier.HOST, Barrier.BLOCKING, Barrier.CONTEXT)
"""Those of programs that are written here. `streams` wants to know what is current where: it runs in the catalog."""


def assert_sound(found: Outcome, more_than: int) -> None:
    """No violation, in a search of some size."""
    assert found.violation is None, "\n".join((found.violation, draw(found.steps)))
    assert found.complete
    assert found.states > more_than


def assert_caught(found: Outcome, kind: str | tuple[str, ...]) -> None:
    """A violation of that kind, with a schedule to show for it. The search ends there, so it may be a short one."""
    assert found.violation is not None, f"nothing found in {found.states} states"
    assert found.violation.startswith(kind), "\n".join((found.violation, draw(found.steps)))
    assert found.states > 5
    assert 1 < len(found.steps) < 120

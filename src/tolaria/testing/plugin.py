"""Fixtures for tests of other people's code. pytest finds them where tolaria is installed; `-p no:tolaria` says no.

| fixture | what it is |
|---|---|
| `tolaria_gate` | a `Gate` on the CUDA device; the test is skipped where there is none |
| `tolaria_thread_gate` | a `ThreadGate`: holds host threads, on any machine |
| `tolaria_turbulence` | builds a `Turbulence`: threads and streams at work on your model |
| `tolaria_tags` | builds `Tags`: tensors that tell by themselves whether they are torn |
| `tolaria_faults` | attaches a `FaultPlan`, as text, to a loop |

Nothing is imported, set or started before a test asks for one of them. Seeds come from the name of the test, or from
`--tolaria-seed`; the report of a failure names them.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tolaria.testing.faults import Faults
    from tolaria.testing.gates import Gate
    from tolaria.testing.tags import Tags
    from tolaria.testing.thread_gate import ThreadGate
    from tolaria.testing.turbulence import Turbulence


def pytest_addoption(parser: pytest.Parser) -> None:
    """One option, so that a failure can be had again."""
    group = parser.getgroup("tolaria")
    group.addoption(
        "--tolaria-seed", type=int, default=None, help="seed of tolaria's fixtures (default: from the test)"
    )


def _seed_of(request: pytest.FixtureRequest) -> int:
    chosen: int | None = request.config.getoption("--tolaria-seed")
    seed = zlib.crc32(request.node.nodeid.encode()) if chosen is None else chosen
    request.node.add_report_section("setup", "tolaria", f"seeded with {seed}: --tolaria-seed={seed}")
    return seed


@pytest.fixture
def tolaria_gate() -> Iterator[Gate]:
    """A gate that holds back work on the CUDA device, opened by a watchdog after 60 s.

    Skips the test where there is no CUDA device, or no bindings of its driver (`pip install 'tolaria[cuda]'`).
    A gate that the watchdog had to open fails the test: nothing was shown.
    """
    import torch

    from tolaria.errors import UnsupportedState
    from tolaria.testing.gates import Gate

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: tolaria_thread_gate holds host threads, tolaria.testing.explorer needs no device")
    try:
        gate = Gate()
    except UnsupportedState as error:
        pytest.skip(str(error))
    with gate:
        yield gate
        if gate.was_forced:
            pytest.fail("the watchdog had to open the gate: something waited for work that it holds back")


@pytest.fixture
def tolaria_thread_gate() -> Iterator[ThreadGate]:
    """A gate that holds host threads where a test tells them to stop, opened by a watchdog after 60 s.

    A gate that the watchdog had to open fails the test: nothing was shown.
    """
    from tolaria.testing.thread_gate import ThreadGate

    with ThreadGate() as gate:
        yield gate
        if gate.was_forced:
            pytest.fail("the watchdog had to open the gate: something waited for a thread that it holds")


@pytest.fixture
def tolaria_turbulence(request: pytest.FixtureRequest) -> Iterator[Callable[..., Turbulence]]:
    """Builds and enters a `Turbulence`: ``tolaria_turbulence(model, section=governor.using)``. Ended with the test."""
    from tolaria.testing.turbulence import Turbulence

    seed = _seed_of(request)
    with ExitStack() as stack:

        def make(*sources: Any, **settings: Any) -> Turbulence:
            settings.setdefault("seed", seed)
            return stack.enter_context(Turbulence(*sources, **settings))

        yield make


@pytest.fixture
def tolaria_tags() -> Callable[..., Tags]:
    """Builds `Tags`: ``tolaria_tags(model, optimizer)``. What the tensors held is overwritten."""
    from tolaria.testing.tags import Tags

    return Tags


@pytest.fixture
def tolaria_faults(request: pytest.FixtureRequest) -> Iterator[Callable[..., Faults]]:
    """Attaches a plan: ``tolaria_faults("nan_loss@7 weight_bit@12x2", model, optimizer)``. Taken off with the test.

    A fault that never struck is an error of the test.
    """
    from tolaria.testing.faults import FaultPlan

    seed = _seed_of(request)
    with ExitStack() as stack:

        def attach(plan: str | FaultPlan, model: Any, optimizer: Any, **settings: Any) -> Faults:
            chosen = FaultPlan.parse(plan, seed) if isinstance(plan, str) else plan
            return stack.enter_context(chosen.attach(model, optimizer, **settings))

        yield attach

"""`torch.compile(fullgraph=True)` of a governed model, before and after attaching: same numbers, no recompilation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from tolaria import TolariaGovernor

Govern = Callable[..., TolariaGovernor]

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Net(torch.nn.Module):
    """A class of the user's own.

    Not a `Sequential`: `torch.compile` of a class of torch's own looks at `forward` once and for all, so one that was
    compiled while it was governed finds no frame to compile after `close()`.
    """

    def __init__(self, body: torch.nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.body(x)
        return y


@pytest.fixture
def run(kit: Any) -> Any:
    run = kit.Run()
    run.model = Net(run.model).eval()
    return run


@pytest.fixture
def x() -> torch.Tensor:
    return torch.linspace(-1, 1, 24).reshape(4, 6)


def as_module(model: torch.nn.Module, backend: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    compiled: Callable[[torch.Tensor], torch.Tensor] = torch.compile(model, fullgraph=True, backend=backend)
    return compiled


def as_function(model: torch.nn.Module, backend: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    def run(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = model(x)
        return y * 2

    compiled: Callable[[torch.Tensor], torch.Tensor] = torch.compile(run, fullgraph=True, backend=backend)
    return compiled


def gradients(kit: Any, run: Any, call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> Any:
    run.optimizer.zero_grad()
    call(x).square().sum().backward()
    return [parameter.grad.clone() for parameter in run.model.parameters()]


def test_a_class_of_torch(govern: Govern, kit: Any, x: torch.Tensor) -> None:
    model = kit.Run().model.eval()
    expected = model(x)
    govern(model)
    assert torch.equal(as_module(model, "eager")(x), expected)
    assert torch.equal(as_function(model, "eager")(x), expected * 2)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("make", [as_module, as_function])
@pytest.mark.parametrize("when", ["before", "after"])
def test_fullgraph(
    backend: str,
    make: Callable[[torch.nn.Module, Any], Callable[[torch.Tensor], torch.Tensor]],
    when: str,
    govern: Govern,
    run: Any,
    kit: Any,
    x: torch.Tensor,
) -> None:
    factor = 2 if make is as_function else 1
    expected = run.model(x) * factor
    wanted = gradients(kit, run, lambda x: run.model(x) * factor, x)
    if when == "before":
        compiled = make(run.model, backend)
        torch.testing.assert_close(compiled(x), expected)
        governor = govern(run.model, run.optimizer)
    else:
        governor = govern(run.model, run.optimizer)
        compiled = make(run.model, backend)
    torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(gradients(kit, run, compiled, x), wanted)
    run.optimizer.step()
    assert governor.statistics().stale_vetoes == 0
    governor.close()
    torch.testing.assert_close(compiled(x), run.model(x) * factor)


def test_a_rollback_neither_recompiles_nor_is_missed(govern: Govern, run: Any, kit: Any, x: torch.Tensor) -> None:
    governor = govern(run.model, run.optimizer)
    counter = CompileCounter()
    compiled = as_module(run.model, counter)
    governor.snapshot()
    expected = compiled(x).detach().clone()
    for _ in range(3):
        compiled(x).square().sum().backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
    assert not torch.equal(compiled(x), expected)
    compilations = counter.frame_count
    governor.execute_rollback()
    assert torch.equal(compiled(x), expected)
    assert counter.frame_count == compilations


def test_attaching_and_closing_recompile_at_most_once_each(govern: Govern, run: Any, x: torch.Tensor) -> None:
    counter = CompileCounter()
    compiled = as_module(run.model, counter)
    with torch.no_grad():
        compiled(x)
        governor = govern(run.model, run.optimizer)
        for _ in range(4):
            compiled(x)
        governor.close()
        for _ in range(4):
            compiled(x)
    assert counter.frame_count <= 3


def test_a_compiled_module_handed_to_the_governor_is_a_section(
    govern: Govern, run: Any, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = torch.compile(run.model, fullgraph=True, backend="eager")
    expected = compiled(x)
    keys = list(compiled.state_dict())
    governor = govern(compiled, run.optimizer)
    opened: list[str] = []
    driver = governor._keeper.driver
    original = driver.open_section

    def note(kind: Any, *rest: Any) -> int:
        opened.append(kind.value)
        return original(kind, *rest)

    monkeypatch.setattr(driver, "open_section", note)
    torch.testing.assert_close(compiled(x), expected, rtol=0, atol=0)
    assert opened == ["forward"]
    assert list(compiled.state_dict()) == keys
    governor.snapshot()
    with torch.no_grad():
        run.model.body[0].weight.zero_()
    assert not torch.equal(compiled(x), expected)
    governor.execute_rollback()
    torch.testing.assert_close(compiled(x), expected, rtol=0, atol=0)

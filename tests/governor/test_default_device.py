"""A user who has set another default device, or uses another mode of torch's, gets what he would get without it.

The default is `meta` here, where nothing has bytes: whatever is made without saying where is of no use to anybody.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tolaria import GovernorConfig, TolariaGovernor, UnsupportedState, kernels, observe
from tolaria.judge import default_detector
from tolaria.optim import SGD, AdamW
from tolaria.rounds import drift
from tolaria.state import imprint

Govern = Callable[..., TolariaGovernor]


@pytest.fixture
def elsewhere() -> Iterator[Callable[[], None]]:
    """Sets the default device until the test is over."""
    yield lambda: torch.set_default_device("meta")
    torch.set_default_device(None)


def trained(kit: Any, govern: Govern, make: Any, prepare: Callable[[], None], on_veto: str) -> Any:
    torch.set_default_device(None)
    run = kit.Run(optimizer=make)
    batches = [*run.batches[:9], kit.nan_batch(run.batches[0]), *run.batches[9:20]]
    for batch in run.batches[:2]:  # torch's optimizers make their counters on the default device
        run.plain_step(batch)
    config = GovernorConfig(cadence=3, probation=2, by_group=True, update_ratio_every=1, on_veto=on_veto)
    prepare()
    governor = govern(run.model, run.optimizer, scheduler=run.scheduler, detector=default_detector(), config=config)
    for batch in governor.watch(batches):
        run.step(governor, batch, clip=0.5)
    info = governor.snapshot()
    governor.execute_rollback(to=info, verify="before")
    found = governor.digest(), governor.rollbacks, governor.statistics().vetoes
    governor.close()
    return found


@pytest.mark.parametrize("on_veto", ["rollback", "keep"])
@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=0.05),
        lambda p: AdamW(p, lr=0.05),
        lambda p: SGD(p, lr=0.05, momentum=0.9),
    ],
    ids=["torch", "AdamW", "SGD"],
)
def test_a_run_is_the_same_with_another_default_device(
    make: Any, on_veto: str, elsewhere: Callable[[], None], kit: Any, govern: Govern
) -> None:
    expected = trained(kit, govern, make, lambda: None, on_veto)
    assert expected[2]
    assert trained(kit, govern, make, elsewhere, on_veto) == expected


def test_what_travels_to_a_device_is_made_in_main_memory(
    elsewhere: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    parameters = [nn.Parameter(torch.ones(size)) for size in (3, 5)]
    expected = kernels.table_of(([1, 2], [3, 4]), [1, 2])
    elsewhere()
    assert torch.equal(kernels.table_of(([1, 2], [3, 4]), [1, 2]), expected)
    assert {row.device.type for row in observe._page_locked(2, 3)} == {"cpu"}
    assert drift([], []).device.type == "cpu"
    imprint._guards.cache_clear()
    assert imprint._guards() is not None
    optimizer = AdamW(parameters, lr=0.1)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all(value.device.type == "cpu" for state in optimizer.state.values() for value in state.values())


@pytest.mark.parametrize("what", ["snapshot", "execute_rollback"])
def test_pretended_tensors_have_no_bytes_to_copy(what: str, kit: Any, govern: Govern) -> None:
    run = kit.Run()
    governor = govern(run.model, run.optimizer)
    run.step(governor, run.batches[0])
    governor.snapshot()
    before, held = run.state(), governor.statistics()
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(UnsupportedState, match="FakeTensorMode"):
        getattr(governor, what)()
    assert (run.state(), governor.statistics()) == (before, held)
    run.step(governor, run.batches[1])
    governor.execute_rollback()
    assert run.state() == before

"""`mode="observe"`, `TOLARIA_DISABLE=1`, and more ranks than one: the governor judges, or does nothing at all."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tolaria import GovernorConfig, Health, Recovery, TolariaGovernor, UnsupportedState, Verdict, VitalSigns

Govern = Callable[..., TolariaGovernor]


# ------------------------------------------------------------ observe


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("poison", [False, True])
def test_observing_changes_no_number(
    clip: float | None, poison: bool, govern: Govern, kit: Any, tmp_path: Path
) -> None:
    def batch_of(run: Any, number: int) -> Any:
        return kit.nan_batch(run.batches[number]) if poison and number == 7 else run.batches[number]

    plain = kit.Run()
    for number in range(12):
        plain.backward(batch_of(plain, number))
        if poison and number == 9:  # one gradient alone: what clipping makes of it reaches all the others
            plain.model[4].weight.grad[0, 0] = float("inf")
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(plain.model.parameters(), clip)
        plain.optimizer.step()
        plain.scheduler.step()
        plain.optimizer.zero_grad()
    run = kit.Run()
    ledger = tmp_path / "incidents.jsonl"
    config = GovernorConfig(mode="observe", cadence=2, probation=1, recovery=Recovery(cool_lr=0.1), ledger=str(ledger))
    attached = (dict(vars(run.model)), run.optimizer.step)
    governor = govern(run.model, run.optimizer, scheduler=run.scheduler, config=config)
    assert (dict(vars(run.model)), run.optimizer.step) == attached
    results = []
    for number in governor.watch(range(12)):
        loss = run.backward(batch_of(run, number))
        if poison and number == 9:
            run.model[4].weight.grad[0, 0] = float("inf")
        results.append(governor.step(loss=loss, clip=clip))
    assert run.state() == plain.state()
    assert not any(result.rolled_back or result.skipped for result in results)
    assert governor.statistics().vetoes == governor.statistics().rollbacks == governor.statistics().snapshots == 0
    assert len(results) == 12
    if poison:
        lines = [json.loads(line) for line in ledger.read_text().splitlines()]
        assert [(line["step"], line["action"], line["restored_step"]) for line in lines] == [(8, "observe", None)]
        assert [result.verdict.health for result in results[7:9]] == [Health.PANIC, Health.SUSPECT]
    else:
        assert not ledger.exists()


def test_observing_neither_snapshots_nor_rolls_back(govern: Govern, kit: Any) -> None:
    run = kit.Run()
    governor = govern(run.model, run.optimizer, config=GovernorConfig(mode="observe"))
    before = run.state()
    info = governor.snapshot()
    assert (info.step, info.bytes, info.state) == (None, 0, "dropped")
    report = governor.execute_rollback()
    assert (report.success, report.status) == (False, "failed")
    assert "observe" in report.reason
    with governor.using():
        assert governor._keeper.driver.depth() == 0
    run.plain_step(run.batches[0])
    assert run.state() != before
    assert governor._keeper.driver.state.next_snapshot == 0


# ------------------------------------------------------------ disabled


DISABLED = """
import json, sys, torch
from torch import nn
from tolaria.config import GovernorConfig
from tolaria.governor import TolariaGovernor

class NoDetector:
    def init(self):
        return None
    def update(self, state, signs):
        raise AssertionError("judged")

def build():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    return model, optimizer, scheduler, scaler, [torch.randn(8, 6) for _ in range(8)]

def loss_of(model, batch):
    return model(batch).square().mean()

def bits(*parts):
    return [value.tolist() if torch.is_tensor(value) else value for part in parts
            for value in torch.utils._pytree.tree_leaves(part.state_dict())] + [torch.get_rng_state().tolist()]

model, optimizer, scheduler, scaler, batches = build()
for batch in batches:
    scaler.scale(loss_of(model, batch)).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    scaler.step(optimizer)
    scaler.update()
    scheduler.step()
    optimizer.zero_grad()
plain = bits(model, optimizer, scheduler, scaler)

model, optimizer, scheduler, scaler, batches = build()
before = dict(vars(model)), optimizer.step
governor = TolariaGovernor(model, optimizer, scheduler=scheduler, scaler=scaler, detector=NoDetector(),
                           config=GovernorConfig(cadence=1, ledger="/nonexistent/ledger"), coordinator=object())
assert (dict(vars(model)), optimizer.step) == before
governor.register("anything", 3)
results = []
for batch in governor.watch(batches):
    loss = loss_of(model, batch)
    scaler.scale(loss).backward()
    with governor.using():
        results.append(governor.step(loss=loss, clip=0.5))
assert bits(model, optimizer, scheduler, scaler) == plain, "training differs"
assert not any(result.rolled_back or result.skipped for result in results)

again = TolariaGovernor(model, optimizer, detector=NoDetector())  # a second one is refused otherwise
info, report = governor.snapshot(), governor.execute_rollback(optimizer=optimizer)
assert info.state == "dropped" and info.wait() is info
assert (report.success, report.status) == (False, "failed") and "disabled" in report.reason
assert len(optimizer.state) == 6
assert governor.check_vital_signs(float("nan")) is False
assert governor.observe(loss=float("nan")).health.value == "healthy"
assert len(governor.digest()) == 32
assert governor.capabilities().barrier == "none"
assert governor.statistics().steps == 0
governor.load_state_dict(json.loads(json.dumps(governor.state_dict())))
governor.reset()
governor.close()
assert bits(model, optimizer, scheduler, scaler) == plain
print(len(results))
"""


@pytest.mark.slow
def test_disabled_is_a_plain_loop(run_script: Callable[..., str]) -> None:
    assert run_script(DISABLED, env={"TOLARIA_DISABLE": "1"}).split() == ["8"]


@pytest.mark.parametrize("value", ["", "0"])
def test_an_empty_or_zero_switch_disables_nothing(
    value: str, govern: Govern, kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOLARIA_DISABLE", value)
    run = kit.Run()
    governor = govern(run.model, run.optimizer)
    assert not governor.is_disabled
    assert governor.snapshot().state == "sealed"


# ------------------------------------------------------------ several ranks


def pretend(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace tolaria's own function wherever it was imported."""
    for name, module in list(sys.modules.items()):
        if name.startswith("tolaria") and hasattr(module, "world_size"):
            monkeypatch.setattr(module, "world_size", lambda: ranks)


@pytest.mark.usefixtures("group_of_one")
def test_a_group_of_one_rank_is_one_process(govern: Govern, kit: Any) -> None:
    run = kit.Run()
    governor = govern(run.model, run.optimizer)
    governor.snapshot()
    good = run.state(with_rng=False)
    assert run.step(governor, kit.nan_batch(run.batches[0])).rolled_back
    assert run.state(with_rng=False) == good


def test_with_two_ranks_a_panic_reports_and_refuses(
    govern: Govern, kit: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = kit.Run()
    ledger = tmp_path / "ledger"
    governor = govern(run.model, run.optimizer, config=GovernorConfig(ledger=str(ledger)))
    governor.snapshot()
    run.step(governor, run.batches[0])
    pretend(2, monkeypatch)
    run.step(governor, run.batches[1])
    before = kit.freeze(run.model.state_dict())["0.weight"]
    with pytest.raises(UnsupportedState, match="several ranks") as caught:
        run.step(governor, kit.nan_batch(run.batches[2]))
    assert caught.value.state_intact
    assert kit.freeze(run.model.state_dict())["0.weight"] == before  # vetoed, so not poisoned either
    [line] = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert (line["action"], line["restored_step"], line["reason"]) == ("observe", None, "non-finite loss")
    assert "ranks" in line["note"]
    assert governor.statistics().rollbacks == 0
    assert governor.execute_rollback().success  # whoever calls it on every rank answers for it


def test_with_two_ranks_a_panic_is_told_once(govern: Govern, kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = kit.Run()
    governor = govern(run.model, run.optimizer, detector=kit.scripted({2: "panic"}))
    run.step(governor, run.batches[0])
    pretend(2, monkeypatch)
    with pytest.raises(UnsupportedState, match="several ranks"):
        run.step(governor, run.batches[1])
    assert governor._course.unsettled() == (0, None)
    assert not run.step(governor, run.batches[2]).rolled_back


def test_with_two_ranks_the_end_of_the_run_rolls_nothing_back(
    govern: Govern, kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A verdict that comes with the last steps is answered by `finish`."""
    run = kit.Run()
    governor = govern(run.model, run.optimizer)
    governor.snapshot()
    run.step(governor, run.batches[0])
    before = run.state()
    pretend(2, monkeypatch)
    governor._course._unanswered = VitalSigns(step=1), Verdict(Health.PANIC, 1, "late", 1)
    with pytest.raises(UnsupportedState, match="several ranks"):
        governor.finish()
    assert run.state() == before
    assert governor.rollbacks == 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_with_two_ranks_a_suspicion_at_the_end_of_the_data_is_not_looked_at_again(
    ranks: int, govern: Govern, kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = kit.Run()
    last = len(run.batches)
    config = GovernorConfig(cadence=1, probation=1)
    governor = govern(run.model, run.optimizer, config=config, detector=kit.scripted({last: "suspect"}))
    for number, batch in enumerate(governor.watch(run.batches), 1):
        if number == last:
            pretend(ranks, monkeypatch)
        run.step(governor, batch)
    assert governor.rollbacks == (1 if ranks == 1 else 0)


def test_who_is_told_of_a_panic_may_ask_for_more(govern: Govern, kit: Any) -> None:
    told: list[int] = []

    def sink(incident: Any) -> None:
        told.append(incident.step)
        if len(told) < 9:
            governor.finish()

    run = kit.Run()
    config = GovernorConfig(mode="observe", on_incident=sink)
    governor = govern(run.model, run.optimizer, detector=kit.scripted({2: "panic"}), config=config)
    for _ in range(3):
        governor.observe(loss=1.0)
    assert told == [2]


def test_who_is_told_of_a_panic_may_roll_back_beside_another_thread(govern: Govern, kit: Any) -> None:
    """Told without a lock: another rollback has the gate, and waits for the lock under which steps are judged."""
    other = threading.Event()

    def sink(incident: Any) -> None:
        if incident.action == "manual":
            return
        thread = threading.Thread(target=lambda: (governor.execute_rollback(), other.set()))
        thread.start()
        assert other.wait(60)
        assert governor.execute_rollback().success
        thread.join()

    run = kit.Run()
    config = GovernorConfig(on_incident=sink)
    governor = govern(run.model, run.optimizer, detector=kit.scripted({2: "panic"}), config=config)
    governor.snapshot()
    for _ in range(2):
        governor.observe(loss=1.0)
    assert governor.rollbacks == 2


def test_with_two_ranks_observing_is_fine(govern: Govern, kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(2, monkeypatch)
    run = kit.Run()
    governor = govern(run.model, run.optimizer, config=GovernorConfig(mode="observe"))
    assert run.step(governor, kit.nan_batch(run.batches[0])).verdict.is_panic

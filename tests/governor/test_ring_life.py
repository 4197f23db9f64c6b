"""From staged to certified: probation, suspicion, rejected candidates, and the last certified snapshot that stays."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch

import tolaria.memory
from tolaria import BudgetExceeded, GovernorConfig, InvalidConfig, SlotsBusy, TolariaGovernor
from tolaria.ring import READABLE, SlotPhase, newest_good

Govern = Callable[..., TolariaGovernor]


class Life:
    """A run whose ring is looked at after every step."""

    def __init__(self, kit: Any, govern: Govern, script: dict[int, Any] | None = None, **config: Any) -> None:
        self.kit = kit
        self.run = kit.Run()
        self.governor = govern(
            self.run.model,
            self.run.optimizer,
            scheduler=self.run.scheduler,
            detector=kit.scripted(script or {}),
            config=GovernorConfig(**config),
        )
        self.feed = self.governor.watch(self.run.batches)
        self.next = next(self.feed)
        self.states: dict[int, Any] = {0: self.run.state()}

    def step(self, times: int = 1, change: Callable[[Any], Any] = lambda batch: batch) -> Any:
        result = None
        for _ in range(times):
            result = self.run.step(self.governor, change(self.next))
            self.next = next(self.feed)
            self.states[self.governor.state_dict()["completed"]] = self.run.state()
        return result

    @property
    def ring(self) -> dict[int, str]:
        """Step -> phase of everything held, oldest first."""
        held = [slot for slot in self.governor._keeper.ring if slot.phase in READABLE]
        return {slot.step: slot.phase.value for slot in sorted(held, key=lambda slot: slot.snapshot)}


# ------------------------------------------------------------ probation


def test_probation_begins_again_after_a_rollback(govern: Govern, kit: Any) -> None:
    """Also that of a candidate from before the snapshot restored: what the undone steps said of it counts no more."""
    life = Life(kit, govern, cadence=4, probation=6, slots=4)
    life.step(6)
    assert life.ring == {0: "certified", 4: "sealed"}
    manual = life.governor.snapshot()
    life.step()
    life.governor.execute_rollback(to=manual)
    life.step(5)
    assert life.ring[4] == "sealed"
    life.step()
    assert life.ring[4] == "certified"


def test_a_candidate_is_certified_after_its_probation(govern: Govern, kit: Any) -> None:
    life = Life(kit, govern, cadence=4, probation=3)
    assert life.ring == {0: "certified"}
    life.step(3)
    assert life.ring == {0: "certified"}
    life.step()
    assert life.ring == {0: "certified", 4: "sealed"}
    life.step(2)
    assert life.ring == {0: "certified", 4: "sealed"}
    life.step()
    assert life.ring == {0: "certified", 4: "certified"}
    life.step()
    assert life.ring == {0: "certified", 4: "certified", 8: "sealed"}
    life.step(4)
    assert life.ring == {4: "certified", 8: "certified", 12: "sealed"}


def test_the_snapshot_of_the_last_step_is_taken_when_the_loader_ends(govern: Govern, kit: Any) -> None:
    run = kit.Run()
    config = GovernorConfig(cadence=4, probation=1)
    governor = govern(run.model, run.optimizer, scheduler=run.scheduler, config=config)
    run.train(governor, run.batches[:8])
    last = run.state()
    assert sorted(slot.step for slot in governor._keeper.ring if slot.phase in READABLE) == [0, 4, 8]
    run.plain_step(run.batches[9])
    governor.execute_rollback(to=8)
    assert run.state() == last


def test_a_loop_that_stops_asking_still_gets_its_snapshots(govern: Govern, kit: Any) -> None:
    """One that holds the iterator but steps on data from elsewhere: the end of its body is never seen."""
    run = kit.Run()
    governor = govern(run.model, run.optimizer, config=GovernorConfig(cadence=2, probation=1))
    feed = iter(governor.watch(run.batches))
    run.step(governor, next(feed))
    for batch in run.batches[1:9]:
        run.step(governor, batch)
    assert governor.statistics().snapshots >= 4
    assert governor.execute_rollback().certified
    del feed


def test_without_probation_the_next_healthy_step_certifies(govern: Govern, kit: Any) -> None:
    life = Life(kit, govern, cadence=1, probation=0)
    assert life.governor.capabilities().slots == 2
    life.step()
    assert life.ring == {0: "certified", 1: "sealed"}
    life.step()
    assert life.ring == {1: "certified", 2: "sealed"}


def test_a_suspect_step_begins_probation_again_and_takes_no_snapshot(govern: Govern, kit: Any) -> None:
    life = Life(kit, govern, {6: "suspect", 8: "suspect"}, cadence=4, probation=3)
    life.step(5)
    assert life.ring == {0: "certified", 4: "sealed"}
    life.step(3)  # suspect, healthy, suspect: the snapshot of step 8 is due
    assert life.ring == {0: "certified", 4: "sealed"}
    life.step()
    assert life.ring == {0: "certified", 4: "sealed", 9: "sealed"}  # taken as soon as all is well
    life.step()
    assert life.ring == {0: "certified", 4: "sealed", 9: "sealed"}
    life.step()
    assert life.ring == {0: "certified", 4: "certified", 9: "sealed"}


def test_a_panic_passes_over_candidates_and_drops_them(govern: Govern, kit: Any) -> None:
    life = Life(kit, govern, {7: "panic"}, cadence=2, probation=2)
    life.step(6)
    assert life.ring == {2: "certified", 4: "certified", 6: "sealed"}
    held = life.governor._keeper.ring
    assert life.step().rolled_back
    assert life.ring == {2: "certified", 4: "certified"}
    assert life.run.state() == life.states[4]
    assert max(slot.snapshot for slot in held) < life.governor._keeper.driver.state.next_snapshot
    life.step(2)
    assert life.ring == {2: "certified", 4: "certified", 6: "sealed"}  # of the new future


def test_a_manual_rollback_drops_what_is_newer(govern: Govern, kit: Any) -> None:
    life = Life(kit, govern, cadence=2, probation=1, slots=6)
    life.step(9)
    assert life.ring == {0: "certified", 2: "certified", 4: "certified", 6: "certified", 8: "certified"}
    for step in (8, 6, 4, 2, 0):  # every slot of the ring, and twice each
        for _ in range(2):
            report = life.governor.execute_rollback(to=step)
            assert (report.snapshot_step, report.certified) == (step, True)
            assert life.run.state() == life.states[step]
            life.run.plain_step(life.run.batches[30])
        assert max(life.ring) == step


def test_a_manual_snapshot_counts_at_once(govern: Govern, kit: Any) -> None:
    life = Life(kit, govern, {6: "panic"}, cadence=100, probation=5)
    life.step(3)
    life.governor.snapshot()
    life.step(2)
    assert life.step().rolled_back
    assert life.run.state() == life.states[3]
    newest = newest_good(life.governor._keeper.ring)
    assert newest is not None
    assert (newest.step, newest.manual) == (3, True)


def test_manual_snapshots_never_push_out_the_last_certified_one(govern: Govern, kit: Any) -> None:
    """A caller can be wrong about the state that he vouches for."""
    life = Life(kit, govern, cadence=100, probation=5)
    for _ in range(6):
        life.step()
        life.governor.snapshot()
    assert life.ring[0] == "certified"
    assert life.governor.execute_rollback().snapshot_step == 6
    assert life.governor.execute_rollback(to=0).certified
    assert life.run.state() == life.states[0]


# ------------------------------------------------------------ what is refused


@pytest.mark.parametrize("where", ["buffer", "moment"])
def test_a_candidate_that_is_not_finite_is_a_panic(where: str, govern: Govern, kit: Any) -> None:
    """The loss, the gradients and the weights are fine: only the look at the snapshot sees it."""
    life = Life(kit, govern, cadence=4, probation=1)
    life.step(3)
    if where == "buffer":
        life.run.model[1].running_var[2] = float("inf")
    else:
        life.run.optimizer.state[life.run.model[4].bias]["exp_avg_sq"][0] = float("nan")
        life.run.model[4].bias.requires_grad_(False)  # else its weight would be NaN at once
    life.step()
    assert life.governor.rollbacks == 1
    assert life.governor.statistics().snapshots_rejected == 1
    assert life.ring == {0: "certified"}
    life.run.model[4].bias.requires_grad_(True)
    assert life.run.state() == life.states[0]


def test_when_every_slot_must_be_kept_the_snapshot_is_deferred(govern: Govern, kit: Any) -> None:
    """Healthy and suspect in turns: candidates are taken, and none is ever certified."""
    script = dict.fromkeys(range(2, 40, 2), "suspect")
    life = Life(kit, govern, script, cadence=1, probation=2)
    assert life.governor.capabilities().slots == 4
    life.step(12)
    assert life.ring == {0: "certified", 1: "sealed", 3: "sealed", 5: "sealed"}
    assert life.governor.statistics().snapshots_deferred == 3
    held = life.governor._keeper.ring
    with pytest.raises(SlotsBusy) as caught:
        life.governor.snapshot()
    assert caught.value.state_intact
    assert life.governor._keeper.ring == held
    assert life.governor.execute_rollback().snapshot_step == 0


def test_a_deferred_snapshot_is_taken_as_soon_as_there_is_room(govern: Govern, kit: Any) -> None:
    """Two suspicions have begun probation again: at step 12 all slots are taken, at 13 a candidate is certified."""
    life = Life(kit, govern, {5: "suspect", 9: "suspect"}, cadence=4, probation=4)
    life.step(12)
    assert life.ring == {0: "certified", 4: "sealed", 8: "sealed"}
    life.step(1)
    assert life.ring == {4: "certified", 8: "certified", 13: "sealed"}
    assert life.governor.statistics().snapshots_deferred == 1
    life.step(4)
    assert max(life.ring) == 17


def test_the_cadence_is_stretched_and_says_so(govern: Govern, kit: Any) -> None:
    life = Life(kit, govern, cadence=2, probation=7, slots=3)
    capabilities = life.governor.capabilities()
    assert (capabilities.cadence, capabilities.cadence_stretched, capabilities.slots) == (7, True, 3)
    life.step(20)
    assert life.ring == {0: "certified", 7: "certified", 14: "sealed"}
    assert life.governor.statistics().snapshots_deferred == 0


@pytest.mark.parametrize(("cadence", "probation"), [(1, 1), (1, 5), (2, 5), (3, 10), (10, 10), (7, 3)])
def test_the_default_ring_never_defers(cadence: int, probation: int, govern: Govern, kit: Any) -> None:
    life = Life(kit, govern, cadence=cadence, probation=probation)
    capabilities = life.governor.capabilities()
    assert (capabilities.cadence, capabilities.cadence_stretched) == (cadence, False)
    life.step(35)
    assert life.governor.statistics().snapshots_deferred == 0
    assert life.governor.statistics().snapshots == 1 + 35 // cadence


@pytest.mark.parametrize(("slots", "probation"), [(2, 1), (1, 0), (2, 10)])
def test_too_few_slots_are_refused(slots: int, probation: int) -> None:
    with pytest.raises(InvalidConfig, match=f"slots={slots}"):
        GovernorConfig(slots=slots, probation=probation)


def test_slots_are_allocated_once(govern: Govern, kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for the layout without optimizer state, once for the one with it; then never again."""
    allocated: list[int] = []
    original = tolaria.memory.allocate

    def allocate(num_bytes: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        allocated.append(num_bytes)
        return original(num_bytes, *args, **kwargs)

    monkeypatch.setattr(tolaria.memory, "allocate", allocate)
    life = Life(kit, govern, {20: "panic"}, cadence=2, probation=1)
    slots = life.governor.capabilities().slots
    life.step(8)
    settled = len(allocated)
    assert settled <= slots + 1
    life.step(25)
    life.governor.execute_rollback()
    life.governor.snapshot()
    assert len(allocated) == settled


# ------------------------------------------------------------ it survives


def test_the_last_certified_snapshot_survives_everything(
    govern: Govern, kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One trouble after another, with no healthy step in between that could certify a successor."""
    life = Life(kit, govern, dict.fromkeys(range(10, 30), "suspect"), cadence=3, probation=2)
    fails = [""]

    def read() -> int:
        if fails[0] == "raise":
            raise OSError("the extra's own")
        if fails[0] == "interrupt":
            signal.raise_signal(signal.SIGINT)
        return 1

    life.governor.register("extra", (read, lambda _: None))
    life.step(9)
    last = newest_good(life.governor._keeper.ring)
    assert last is not None
    assert (last.step, last.phase) == (6, SlotPhase.CERTIFIED)

    def still_there() -> None:
        assert newest_good(life.governor._keeper.ring) == last
        kit.assert_at_rest(life.governor)

    for trouble, error in (("raise", OSError), ("interrupt", KeyboardInterrupt)):
        for _ in range(4):
            fails[0] = trouble
            with pytest.raises(error):
                life.governor.snapshot(step=1000)
            fails[0] = ""
            manual = newest_good(life.governor._keeper.ring)
            if manual is not None and manual.manual:  # an interrupt is held back: that snapshot is complete
                life.governor.execute_rollback(to=6)
        still_there()
    with monkeypatch.context() as patch:
        patch.setattr(tolaria.memory, "available_host_bytes", lambda: 1)
        for slot in life.governor._keeper.vault.slots:
            if slot is not life.governor._keeper.vault.slots[last.index]:
                slot.arena = None
        for _ in range(4):
            with pytest.raises(BudgetExceeded):
                life.governor.snapshot()
    still_there()
    life.step(5)  # all suspect: no candidate
    still_there()
    assert life.governor.execute_rollback().certified
    assert life.run.state() == life.states[6]

"""The GPT workload, and the four faults that only its drill has. Short runs: each fault with the steps it needs."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from tolaria.config import GovernorConfig, Recovery
from tolaria.drill import command, gpt, gpt_faults
from tolaria.drill.catalogue import WORKLOADS, Entry
from tolaria.drill.faults import Fault, FaultKind, Injector, Moment, fewest_steps, plan, spoil
from tolaria.drill.gpt import Gpt
from tolaria.drill.gpt_faults import KINDS
from tolaria.drill.runs import Audience, disturbed, run_plain
from tolaria.drill.score import survived
from tolaria.drill.text import NUM_SYMBOLS, encode, frequency_loss, read_reference, split
from tolaria.drill.workloads import Batch, Training
from tolaria.operations import Inspection
from tolaria.snapshot import Vault

BY_NAME = {kind.name: kind for kind in KINDS}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def workload() -> Gpt:
    return Gpt(0, 6, CPU)


@pytest.fixture
def training(workload: Gpt) -> Training:
    """After two steps, with gradients."""
    training = workload.build()
    for batch in workload.batches[:4]:
        (workload.loss(training.model, batch) / 2).backward()
        if batch.part == 1 and batch.index < 1:
            training.optimizer.step()
            training.optimizer.zero_grad()
    return training


# -- the text


def test_the_text_is_real_and_every_python_has_it() -> None:
    text = read_reference()
    assert len(text) > 300_000
    assert "for" in text.split()
    assert text.count(" the ") > 1000


def test_the_alphabet_is_the_same_in_every_python() -> None:
    assert encode("\n ~A").tolist() == [0, 1, 95, 34]
    assert encode("é\t\u2019").tolist() == [32, 32, 32]
    assert ord("?") - 31 == 32
    everything = encode("".join(map(chr, range(0x2100))))
    assert (int(everything.min()), int(everything.max())) == (0, NUM_SYMBOLS - 1)


def test_no_held_out_block_is_trained_on() -> None:
    train, held_out = split(torch.arange(25 * 4096 + 17))
    assert (train.shape, held_out.shape) == ((23, 4096), (2, 4096))
    assert held_out[:, 0].tolist() == [9 * 4096, 19 * 4096]
    assert set(train[:, 0].tolist()) | set(held_out[:, 0].tolist()) == {4096 * block for block in range(25)}


def test_to_know_nothing_but_frequencies() -> None:
    even = torch.arange(NUM_SYMBOLS).repeat(4096).view(-1, 4096)
    assert frequency_loss(even, even) == pytest.approx(math.log(NUM_SYMBOLS))
    assert frequency_loss(even * 0, even[:1] * 0) < 0.01


# -- the workload


def test_equal_arguments_give_equal_runs_and_others_do_not(workload: Gpt) -> None:
    again, other = Gpt(0, 6, CPU), Gpt(1, 6, CPU)
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(workload.batches, again.batches, strict=True))
    assert not torch.equal(workload.batches[0].inputs, other.batches[0].inputs)
    assert workload.build().state().digest() == again.build().state().digest() != other.build().state().digest()


def test_two_micro_batches_a_step_of_text_and_the_same_text_one_symbol_later(workload: Gpt) -> None:
    assert [(batch.index, batch.part) for batch in workload.batches] == [(i, p) for i in range(6) for p in range(2)]
    for batch in workload.batches:
        assert batch.inputs.shape == batch.targets.shape == (8, 32)
        assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])


def test_the_future_is_not_seen(workload: Gpt) -> None:
    model = workload.build().model.eval()
    inputs = workload.batches[0].inputs
    changed = inputs.clone()
    changed[:, 20] = (changed[:, 20] + 1) % NUM_SYMBOLS
    before, after = model(inputs), model(changed)
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.equal(before[:, 20:], after[:, 20:])


def test_the_learning_rate_is_warmed_up_and_falls(workload: Gpt) -> None:
    training = Gpt(0, 200, CPU).build()
    rates = []
    for _ in range(200):
        rates.append(training.optimizer.param_groups[0]["lr"])
        training.optimizer.step()
        training.scheduler.step()
    assert rates[0] < 0.05 * max(rates)
    assert 20 <= rates.index(max(rates)) <= 40
    assert rates[-1] < 0.1 * max(rates)


# -- its faults


def test_all_faults_of_the_digits_and_four_more() -> None:
    ours = {"silent_bit_flip", "corrupted_slot", "weight_decay", "bad_micro_batch"}
    assert set(BY_NAME) == {kind.name for kind in WORKLOADS["digits"].kinds} | ours


def test_the_silent_flip_is_planned_among_steps_that_are_run_again() -> None:
    for steps in (fewest_steps(KINDS), 800, 1700):
        for seed in range(50):
            (fault,) = (fault for fault in plan(seed, steps, KINDS) if fault.kind.name == "silent_bit_flip")
            assert fault.batch % WORKLOADS["gpt"].reexecute_every >= 90
            (late,) = (fault for fault in plan(seed, steps, KINDS) if fault.kind.name == "weight_decay")
            assert late.batch % WORKLOADS["gpt"].reexecute_every < 80


def test_the_silent_flip_is_one_bit_that_moves_a_weight_a_little(workload: Gpt, training: Training) -> None:
    weight = workload.exposed_weight(training.model)
    before = weight.detach().clone()
    Fault(BY_NAME["silent_bit_flip"], 3, 0).act(workload, training, workload.batches[3])
    (place,) = (weight != before).nonzero().tolist()
    ratio = float(weight[tuple(place)].detach() / before[tuple(place)])
    assert 0.05 < abs(ratio - 1) < 0.15
    changed = weight.detach().view(torch.int32) ^ before.view(torch.int32)
    assert int(changed.count_nonzero()) == 1
    assert int(changed.sum()).bit_count() == 1


def test_the_corrupted_slot_is_one_bit_too(workload: Gpt, training: Training) -> None:
    slots = [torch.zeros(0, dtype=torch.uint8), torch.zeros(40, dtype=torch.uint8)][1:]
    fault = Fault(BY_NAME["corrupted_slot"], 3, 0)
    fault.act(workload, training, workload.batches[3], newest_slot=lambda: slots)
    assert sorted(slots[0].tolist())[-2:] == [0, 8]
    assert workload.exposed_weight(training.model).abs().max() > 1e30
    fault.act(workload, workload.build(), workload.batches[3])  # without a governor there is no slot


def test_one_of_two_micro_batches_is_bad(workload: Gpt) -> None:
    spoilt = spoil(workload.batches, [Fault(BY_NAME["bad_micro_batch"], 3, 0)], workload)
    assert [(b.index, b.part) for b in spoilt if is_bad(b)] == [(3, 1)]
    spoilt = spoil(workload.batches, [Fault(BY_NAME["nan_batch"], 3, 0)], workload)
    assert [(b.index, b.part) for b in spoilt if is_bad(b)] == [(3, 0), (3, 1)]


def is_bad(batch: Batch) -> bool:
    assert batch.weights is not None
    return not bool(batch.weights.isfinite().all())


def test_noise_differs_between_micro_batches(workload: Gpt) -> None:
    first, second = spoil(workload.batches[4:6], [Fault(BY_NAME["garbage_batches"], 2, 0)], workload)
    assert not torch.equal(first.targets, second.targets)


def test_a_step_of_two_micro_batches_is_struck_once(workload: Gpt, training: Training) -> None:
    injector = Injector([Fault(BY_NAME["nan_batch"], 3, 0), Fault(BY_NAME["bit_flip"], 3, 0)], workload, training)
    for batch in workload.batches[6:8]:
        injector.begin(batch)
    injector.strike(Moment.UPDATE, workload.batches[7])
    assert injector.struck == ("nan_batch", "bit_flip")
    injector.begin(workload.batches[8])
    assert injector.struck == ()


# -- short drills


@pytest.fixture
def smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same workload with one layer and half the text per step: a quarter of the time."""
    monkeypatch.setattr(gpt, "_LAYERS", 1)
    monkeypatch.setattr(Gpt, "_BATCH", 4)
    # and with noise that a slow rise hides in for longer
    monkeypatch.setattr(gpt_faults, "_WEIGHT_DECAY", 2 * gpt_faults._WEIGHT_DECAY)


def drill(kinds: list[FaultKind], steps: int, seed: int, deaf: Audience) -> command.Result:
    return command.run_drill(command.prepare("gpt", seed, steps, CPU, kinds), deaf)


def at(name: str, share: float) -> FaultKind:
    return replace(BY_NAME[name], at=share)


@pytest.mark.slow
@pytest.mark.usefixtures("smaller")
def test_the_four_are_recovered(seed: int, deaf: Audience) -> None:
    names = {"silent_bit_flip": 0.3, "corrupted_slot": 0.45, "weight_decay": 0.7, "bad_micro_batch": 0.9}
    result = drill([at(name, share) for name, share in names.items()], 300, seed, deaf)
    faults = {fault["kind"]: fault for fault in result.report["faults"]}
    assert all(fault["recovered"] for fault in faults.values()), faults
    assert result.score.is_good
    assert not result.report["runs"]["unguarded"]["survived"]
    incidents = {fault.kind: fault.incidents for fault in result.score.faults}
    # the ten steps up to 100, which the flip was in, were run again
    (silent,) = incidents["silent_bit_flip"]
    assert (silent.step, silent.reason, silent.restored_step) == (100, "silent corruption", 90)
    # the newest snapshot was passed over
    (slot,) = incidents["corrupted_slot"]
    assert slot.note.startswith("corrupted snapshots passed over: [")
    assert slot.restored_step == int(slot.note.rpartition("[")[2].rstrip("]")) - 10
    # late, with a snapshot in between that was never trusted
    late = incidents["weight_decay"][0]
    assert late.step >= faults["weight_decay"]["step"] + 5
    assert late.restored_step is not None
    assert late.restored_step < faults["weight_decay"]["step"] <= late.step
    # both micro-batches of the window are gone
    replayed, skipped = incidents["bad_micro_batch"]
    assert (replayed.action, skipped.action, skipped.batches_skipped) == ("replay", "skip", 2)
    assert len(result.score.skipped) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("smaller")
def test_without_reexecution_nobody_finds_the_silent_flip(
    seed: int, deaf: Audience, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The red twin. It is harmless to the loss, and it stays for ever."""
    monkeypatch.setattr(Entry, "config", lambda *_: GovernorConfig(recovery=Recovery(cool_lr=1.0)))
    result = drill([at("silent_bit_flip", 0.93)], 100, seed, deaf)
    assert result.guarded.incidents == []
    assert result.report["recovered"] == 0
    assert not result.score.is_good
    differ = [step for step, found in result.guarded.digests.items() if found != result.clean.digests[step]]
    assert differ == [95, 100]


@pytest.mark.slow
@pytest.mark.usefixtures("smaller")
def test_a_corrupted_slot_that_nobody_checks_is_restored(
    seed: int, deaf: Audience, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The red twin: the digest is compared neither before the rollback nor with what was restored."""
    inspect = Vault.inspect

    def trusting(self: Vault, op: Any) -> Inspection:
        found = inspect(self, op)
        return replace(found, intact=True) if op.again or op.live else found

    monkeypatch.setattr(Vault, "inspect", trusting)
    result = drill([at("corrupted_slot", 0.6)], 100, seed, deaf)
    assert len(result.guarded.incidents) >= 1
    assert result.report["recovered"] == 0
    assert not result.score.is_equal_at_end


@pytest.fixture(scope="module")
def clean_losses() -> dict[int, float]:
    return {}


RUINOUS = [kind for kind in KINDS if kind.name != "silent_bit_flip"]


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread", "smaller")
@pytest.mark.parametrize("kind", RUINOUS, ids=lambda kind: kind.name)
def test_alone_and_unguarded_it_ruins_the_run(
    kind: FaultKind, seed: int, deaf: Audience, clean_losses: dict[int, float]
) -> None:
    """What survives is clearly worse than the clean run, which has learnt for as long."""
    stage = command.prepare("gpt", seed, 110, CPU, [replace(kind, at=0.6, beat=None)])
    if seed not in clean_losses:
        clean_losses[seed] = run_plain("clean", stage.workload, stage.workload.batches, (), deaf).val_loss
    ruined = run_plain("alone", stage.workload, disturbed(stage.workload, stage.faults), stage.faults, deaf)
    struck = [step.batch for step in ruined.kept if step.struck]
    assert struck == list(range(stage.faults[0].batch, stage.faults[0].batch + kind.length))
    dead = not survived(ruined, stage.workload.chance_loss)
    assert dead or ruined.val_loss > 1.05 * clean_losses[seed]

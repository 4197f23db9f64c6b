"""Rollback and replay against the undisturbed run, bit for bit, with loaders that draw from global random state."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from tolaria import GovernorConfig, Incident, TolariaGovernor

Govern = Callable[..., TolariaGovernor]

SAMPLES, BATCH = 48, 8  # six batches an epoch


class Augmented(Dataset[tuple[torch.Tensor, torch.Tensor, int]]):
    """Draws its augmentation in the main process, from torch's, Python's and NumPy's global generators."""

    def __init__(self, augment: bool) -> None:
        generator = torch.Generator().manual_seed(11)
        self.x = torch.randn(SAMPLES, 6, generator=generator)
        self.y = torch.randint(3, (SAMPLES,), generator=generator)
        self.augment = augment

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        x = self.x[index]
        if self.augment:
            x = x + 0.1 * torch.randn(6) + 0.1 * random.random()
            if (numpy := __import__("sys").modules.get("numpy")) is not None:
                x = x + 0.1 * float(numpy.random.rand())
        return x, self.y[index], index


LOADERS: dict[str, Callable[[], DataLoader[Any]]] = {
    "shuffle": lambda: DataLoader(Augmented(False), batch_size=BATCH, shuffle=True),
    "augmentation": lambda: DataLoader(Augmented(True), batch_size=BATCH),
    "both": lambda: DataLoader(Augmented(True), batch_size=BATCH, shuffle=True),
    "own generator": lambda: DataLoader(
        Augmented(False), batch_size=BATCH, shuffle=True, generator=torch.Generator().manual_seed(5)
    ),
}


def seed() -> None:
    random.seed(7)
    torch.manual_seed(7)
    if (numpy := __import__("sys").modules.get("numpy")) is not None:
        numpy.random.seed(7)


class Fit:
    """Three governed epochs. `bad`: which deliveries, counted as they arrive, are poisoned."""

    def __init__(
        self, kit: Any, govern: Govern, loader: DataLoader[Any], bad: set[int], epochs: int = 3, **config: Any
    ) -> None:
        self.run = kit.Run()
        self.order: list[list[int]] = []  # the samples of each batch that arrived
        self.incidents: list[Incident] = []
        self.states: list[Any] = []
        config = {"cadence": 4, "probation": 2, "on_incident": self.incidents.append, **config}
        self.governor = govern(
            self.run.model, self.run.optimizer, scheduler=self.run.scheduler, config=GovernorConfig(**config)
        )
        self.of_epoch: list[list[int]] = []  # the samples of each epoch that arrived
        seed()
        for _ in range(epochs):
            self.of_epoch.append([])
            for x, y, index in self.governor.watch(loader):
                arrived = len(self.order)
                self.order.append(index.tolist())
                self.of_epoch[-1] += index.tolist()
                self.run.step(self.governor, kit.nan_batch((x, y)) if arrived in bad else (x, y))
            self.states.append(self.run.state())
        self.governor.close()


def undisturbed(kit: Any, loader: DataLoader[Any], epochs: int = 3) -> tuple[list[Any], list[list[int]]]:
    """The same without a governor: the state after each epoch, the samples of each batch."""
    run = kit.Run()
    states, order = [], []
    seed()
    for _ in range(epochs):
        for x, y, index in loader:
            order.append(index.tolist())
            run.plain_step((x, y))
        states.append(run.state())
    return states, order


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("bad", [set(), {0}, {3}, {5}, {6}, {7}, {11}, {17}, {2, 15}, {4, 16}], ids=str)
def test_rollback_and_replay_equal_the_undisturbed_run(loader: str, bad: set[int], govern: Govern, kit: Any) -> None:
    """Faults at the start, in the middle and at the end of epochs, once or twice: the data order is the same too."""
    states, order = undisturbed(kit, LOADERS[loader]())
    fit = Fit(kit, govern, LOADERS[loader](), bad)
    assert fit.states == states
    assert [incident.action for incident in fit.incidents] == ["replay"] * len(bad)
    assert [batch for batch in fit.order if batch in order] == fit.order
    assert fit.order[-1] == order[-1]
    if not bad:
        assert fit.order == order


@pytest.mark.parametrize("cadence", [1, 3, 50])
def test_from_any_snapshot(cadence: int, govern: Govern, kit: Any) -> None:
    states, _ = undisturbed(kit, LOADERS["both"]())
    fit = Fit(kit, govern, LOADERS["both"](), {13}, cadence=cadence, probation=1)
    assert fit.states == states


def test_the_environments_own_draws_are_replayed(govern: Govern, kit: Any) -> None:
    """A loop that draws between its steps, as exploration in reinforcement learning does."""

    def noise(batch: Any) -> Any:
        return batch[0] + torch.randn_like(batch[0]) * random.random(), batch[1]

    plain = kit.Run()
    seed()
    for batch in plain.batches[:12]:
        plain.plain_step(noise(batch))
    run = kit.Run()
    governor = govern(run.model, run.optimizer, scheduler=run.scheduler, config=GovernorConfig(cadence=4, probation=1))
    seed()
    bad = True
    for number, batch in governor.watch(list(enumerate(run.batches[:12]))):
        noisy = noise(batch)
        poisoned = bad and number == 10
        bad = bad and not poisoned
        run.step(governor, kit.nan_batch(noisy) if poisoned else noisy)
    assert governor.statistics().rollbacks == 1
    assert run.state() == plain.state()


def test_what_follows_the_step_in_the_loop_body_belongs_to_it(govern: Govern, kit: Any) -> None:
    """An average of the weights and a schedule that the user steps after `governor.step`: replayed exactly too."""

    def parts(run: Any) -> tuple[Any, Any]:
        average = torch.optim.swa_utils.AveragedModel(
            run.model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True
        )
        return average, run.scheduler

    def state(run: Any, average: Any) -> Any:
        return [run.state(), kit.freeze(average.state_dict())]

    plain = kit.Run()
    average, scheduler = parts(plain)
    seed()
    for batch in plain.batches[:14]:
        plain.backward(batch)
        plain.optimizer.step()
        plain.optimizer.zero_grad()
        average.update_parameters(plain.model)
        scheduler.step()
    expected = state(plain, average)
    for bad in (0, 4, 5, 9, 13):
        run = kit.Run()
        average, scheduler = parts(run)
        governor = govern(run.model, run.optimizer, config=GovernorConfig(cadence=4, probation=1))
        governor.register("average", average)
        governor.register("schedule", scheduler)
        left = {bad}
        seed()
        for number, batch in governor.watch(list(enumerate(run.batches[:14]))):
            result = run.step(governor, kit.nan_batch(batch) if number in left else batch)
            left.discard(number)
            if not result.rolled_back:
                average.update_parameters(run.model)
                scheduler.step()
        assert governor.statistics().rollbacks == 1
        assert state(run, average) == expected, bad
        governor.close()


# ------------------------------------------------------------ after a skip


def epochs_of(fit: Fit) -> list[tuple[int, ...]]:
    return [tuple(samples[-SAMPLES:]) for samples in fit.of_epoch]


@pytest.mark.parametrize("loader", ["shuffle", "both"])
def test_a_skip_across_an_epoch_start_repeats_no_shuffle(loader: str, govern: Govern, kit: Any) -> None:
    """The first batch of epoch 2 is bad for good; its fetch drew the shuffle seed, which the rollback puts back."""
    fit = Fit(kit, govern, LOADERS[loader](), {6, 9}, cadence=4, probation=2)
    assert [incident.action for incident in fit.incidents] == ["replay", "skip"]
    assert fit.order[6] == fit.order[9]  # the very batch, delivered again
    assert [incident.restored_step for incident in fit.incidents] == [4, 4]
    first, second, third = epochs_of(fit)
    assert len({first, second, third}) == 3
    assert sorted(third) == list(range(SAMPLES))


@pytest.mark.parametrize("keep_batches", [2, 5])
def test_a_skip_beyond_keep_batches_repeats_no_shuffle(keep_batches: int, govern: Govern, kit: Any) -> None:
    """The batch that drew the seed is not even kept any more."""
    fit = Fit(kit, govern, LOADERS["shuffle"](), {10}, cadence=100, keep_batches=keep_batches)
    assert [incident.action for incident in fit.incidents] == ["skip"]
    assert fit.incidents[0].restored_step == 0
    assert len(fit.order) == 18
    first, second, third = epochs_of(fit)
    assert len({first, second, third}) == 3


def test_a_replay_across_an_epoch_start_repeats_no_shuffle(govern: Govern, kit: Any) -> None:
    fit = Fit(kit, govern, LOADERS["shuffle"](), {7}, cadence=4, probation=2)
    assert [incident.action for incident in fit.incidents] == ["replay"]
    assert len(set(epochs_of(fit))) == 3


def test_skipping_without_draws_leaves_random_state_exact(govern: Govern, kit: Any) -> None:
    """Nothing was drawn for the skipped batch, so dropout goes on as in a run that never held it."""
    plain = kit.Run()
    for number in (0, 1, 2, 3, 4, 6, 7, 8):
        plain.plain_step(plain.batches[number])
    run = kit.Run()
    governor = govern(run.model, run.optimizer, scheduler=run.scheduler, config=GovernorConfig(cadence=4, probation=1))
    for number, batch in governor.watch(list(enumerate(run.batches[:9]))):
        run.step(governor, kit.nan_batch(batch) if number == 5 else batch)
    assert run.state() == plain.state()


# ------------------------------------------------------------ policies


def draws() -> tuple[float, float]:
    return float(torch.rand(())), random.random()


def rolled_back_draws(governor: TolariaGovernor, times: int = 2) -> list[tuple[float, float]]:
    governor.snapshot()
    found = [draws()]
    for _ in range(times):
        governor.execute_rollback()
        found.append(draws())
    return found


def test_restore_repeats_the_draws(govern: Govern, kit: Any) -> None:
    governor = govern(kit.Run().model)
    assert governor.capabilities().rng == "restore"
    assert len(set(rolled_back_draws(governor))) == 1


def test_keep_goes_on(govern: Govern, kit: Any) -> None:
    governor = govern(kit.Run().model, config=GovernorConfig(rng="keep"))
    torch.manual_seed(1)
    random.seed(1)
    expected = [draws() for _ in range(3)]
    torch.manual_seed(1)
    random.seed(1)
    assert rolled_back_draws(governor) == expected


def test_fork_never_repeats_and_is_reproducible(govern: Govern, kit: Any) -> None:
    runs = []
    for _ in range(2):
        governor = govern(kit.Run().model, config=GovernorConfig(rng="fork"))
        torch.manual_seed(1)
        random.seed(1)
        found = rolled_back_draws(governor)
        governor.observe(loss=1.0)  # a step later
        governor.execute_rollback()
        runs.append([*found, draws()])
        governor.close()
    assert runs[0] == runs[1]
    assert len({torch_draw for torch_draw, _ in runs[0]}) == 4
    assert len({python_draw for _, python_draw in runs[0]}) == 4


def test_a_second_governor_ends_the_restoring(govern: Govern, kit: Any) -> None:
    """Global random state is process-wide: while there are two governors it belongs to neither."""
    first = govern(kit.Run().model)
    first.snapshot()
    random_state = torch.get_rng_state()
    second = govern(kit.Run(seed=2).model)
    moved = torch.get_rng_state()
    assert not torch.equal(moved, random_state)
    first.execute_rollback()
    assert torch.equal(torch.get_rng_state(), moved)
    second.close()
    first.execute_rollback()
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("grads", ["capture", "drop"])
def test_batches_whose_gradients_a_snapshot_holds_do_not_come_again(grads: str, govern: Govern, kit: Any) -> None:
    """Two batches to a step, and a snapshot between them: with the gradients it holds the first one."""
    run = kit.Run()
    governor = govern(run.model, run.optimizer, detector=kit.scripted({3: "panic"}), config=GovernorConfig(cadence=100))
    delivered = []
    for number, batch in governor.watch(list(enumerate(run.batches[:8]))):
        run.backward(batch)
        delivered.append(number)
        if delivered == [0, 1, 2, 3, 4]:
            governor.snapshot(grads=grads)
        if number % 2:
            governor.step(loss=1.0)
    assert governor.rollbacks == 1
    assert delivered == [0, 1, 2, 3, 4, 5, *([5] if grads == "capture" else [4, 5]), 6, 7]

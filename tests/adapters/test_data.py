"""`watch` over loaders of every make: which batches count in the end, across the ends of epochs.

The numbers of the batches trained are a registered list, so that it rolls back with the weights: what it holds at the
end is the course of the run that stands.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import datasets
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from tolaria import GovernorConfig, TolariaGovernor
from tolaria.judge import non_finite

pytestmark = pytest.mark.filterwarnings(
    "ignore:'pin_memory' argument is set as true",  # there is no device here, and the flag is what is tested
    "ignore:'set_vital' is deprecated",  # torchdata calls it
)

COUNT = 12


def rows() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    return [{"number": number, "x": torch.randn(4, generator=generator).tolist()} for number in range(COUNT)]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(tensors())


def tensors() -> list[Any]:
    return [{"number": torch.tensor([row["number"]]), "x": torch.tensor([row["x"]])} for row in rows()]


def of_datasets(shuffle: bool = False) -> Any:
    return DataLoader(datasets.Dataset.from_list(rows()).with_format("torch"), batch_size=1, shuffle=shuffle)


def in_a_generator() -> Any:
    class Epochs:
        def __iter__(self) -> Iterator[Any]:
            yield from tensors()

    return Epochs()


LOADERS: dict[str, Callable[[], Iterable[Any]]] = {
    "list": tensors,
    "generator": in_a_generator,
    "DataLoader": lambda: DataLoader(tensors(), batch_size=None),
    "pinned": lambda: DataLoader(tensors(), batch_size=None, pin_memory=True),
    "shuffled": lambda: DataLoader(tensors(), batch_size=None, shuffle=True),
    "workers": lambda: DataLoader(tensors(), batch_size=None, num_workers=2, shuffle=True),
    "persistent": lambda: DataLoader(tensors(), batch_size=None, num_workers=2, persistent_workers=True),
    "iterable": lambda: DataLoader(Stream(), batch_size=None),
    "StatefulDataLoader": lambda: StatefulDataLoader(tensors(), batch_size=None, shuffle=True),
    "StatefulDataLoader, workers": lambda: StatefulDataLoader(tensors(), batch_size=None, num_workers=2),
    "datasets": of_datasets,
    "datasets, shuffled": lambda: of_datasets(shuffle=True),
    "datasets, iterable": lambda: datasets.Dataset.from_list(rows()).with_format("torch").to_iterable_dataset(),
}


def number_of(batch: Any) -> int:
    return int(batch["number"])


def train(
    make: Callable[[], Iterable[Any]], governed: bool = True, bad: int | None = None, fault_at: int | None = None
) -> Any:
    """Two epochs. `bad` is a batch that ruins the loss whenever it comes; `fault_at` an event that comes once.

    Answers the numbers of the batches that stand, the weights, and the governor.
    """
    torch.manual_seed(5)
    loader = make()  # one may draw the seed of its first epoch when it is made
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    stands: list[int] = []
    governor = TolariaGovernor(model, optimizer, config=GovernorConfig(cadence=2, probation=2), detector=non_finite())
    governor.register("numbers", (lambda: list(stands), lambda saved: stands.__setitem__(slice(None), saved)))
    trained = 0
    for _ in range(2):
        for batch in governor.watch(loader) if governed else loader:
            trained += 1
            stands.append(number_of(batch))
            loss = model(batch["x"].reshape(-1, 4)).square().mean()
            if number_of(batch) == bad or trained == fault_at:
                loss = loss * float("nan")
            loss.backward()
            if governed:
                governor.step(loss=loss)
            else:
                optimizer.step()
                optimizer.zero_grad()
    governor.close()
    return stands, [p.detach().clone() for p in model.parameters()], governor


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("at", [13, 24])
def test_a_replay_delivers_exactly_the_same_batches(name: str, at: int) -> None:
    """At the first batch of an epoch, with those of the former one, and at the very last."""
    clean, weights, _ = train(LOADERS[name], governed=False)
    stands, after, governor = train(LOADERS[name], fault_at=at)
    assert governor.rollbacks == 1
    assert stands == clean
    assert all(map(torch.equal, after, weights))


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("bad", [11])
def test_a_skip_leaves_out_exactly_the_bad_batch(name: str, bad: int) -> None:
    stands, after, governor = train(LOADERS[name], bad=bad)
    assert governor.statistics().skipped_batches == 2
    assert all(bool(torch.isfinite(each).all()) for each in after)
    for epoch in (stands[: COUNT - 1], stands[COUNT - 1 :]):
        assert sorted(epoch) == [number for number in range(COUNT) if number != bad]


def test_an_exhausted_generator_can_still_be_replayed() -> None:
    """Nothing can rewind it: what comes again comes from the kept batches."""
    source = iter(tensors())
    torch.manual_seed(5)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    governor = TolariaGovernor(model, optimizer, config=GovernorConfig(cadence=2, probation=2), detector=non_finite())
    seen: list[int] = []
    for batch in governor.watch(source):
        seen.append(number_of(batch))
        loss = model(batch["x"]).square().mean() * (float("nan") if len(seen) == COUNT else 1.0)
        loss.backward()
        governor.step(loss=loss)
    governor.close()
    assert seen[:COUNT] == list(range(COUNT))
    assert seen[COUNT:] == list(range(seen[COUNT], COUNT))


def test_without_watch_nothing_comes_again() -> None:
    """The red twin: the course has a hole."""
    torch.manual_seed(5)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    stands: list[int] = []
    governor = TolariaGovernor(model, optimizer, config=GovernorConfig(cadence=2, probation=2), detector=non_finite())
    governor.register("numbers", (lambda: list(stands), lambda saved: stands.__setitem__(slice(None), saved)))
    for trained, batch in enumerate(tensors(), start=1):
        stands.append(number_of(batch))
        loss = model(batch["x"]).square().mean() * (float("nan") if trained == 7 else 1.0)
        loss.backward()
        governor.step(loss=loss)
    governor.close()
    assert stands != list(range(COUNT))


# ------------------------------------------------------------ batches that torch's pytree takes for leaves


@dataclasses.dataclass
class Record:
    number: torch.Tensor
    x: torch.Tensor
    more: dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    number: torch.Tensor
    x: torch.Tensor
    more: dict[str, torch.Tensor]


class Encoding(collections.UserDict[str, Any]):
    """As the tokenizers of Transformers answer."""

    def __getattr__(self, name: str) -> Any:
        return self.data[name]


KINDS: dict[str, Callable[..., Any]] = {"dataclass": Record, "frozen": Frozen, "UserDict": Encoding}


def trained_on(kind: Callable[..., Any], body: Callable[[Any], torch.Tensor], fault_at: int | None = None) -> Any:
    """One epoch whose loop body changes its batches. Answers the weights, and how many batches were left out."""
    loader = [kind(**row, more={"scale": torch.ones(1)}) for row in tensors()]
    torch.manual_seed(5)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    config = GovernorConfig(cadence=2, probation=2)
    with TolariaGovernor(model, optimizer, config=config, detector=non_finite()) as governor:
        for trained, batch in enumerate(governor.watch(loader), start=1):
            loss = model(body(batch)).square().mean() * (float("nan") if trained == fault_at else 1.0)
            loss.backward()
            governor.step(loss=loss)
        return [p.detach().clone() for p in model.parameters()], governor.statistics().skipped_batches


def put_in(batch: Any) -> torch.Tensor:
    """A container inside of the batch is written to, and read again."""
    batch.more["scale"] = batch.more["scale"] * 2
    return batch.x * batch.more["scale"]


def put_in_its_place(batch: Any) -> torch.Tensor:
    if isinstance(batch, Encoding):
        batch["x"] = batch.x * 2
    else:
        batch.x = batch.x * 2
    return batch.x


def multiply(batch: Any) -> torch.Tensor:
    return batch.x.mul_(2)


@pytest.mark.parametrize("body", [put_in, put_in_its_place])
@pytest.mark.parametrize("name", ["dataclass", "UserDict"])
def test_what_a_loop_puts_into_a_batch_does_not_come_again(name: str, body: Callable[[Any], torch.Tensor]) -> None:
    clean, _ = trained_on(KINDS[name], body)
    weights, skipped = trained_on(KINDS[name], body, fault_at=8)
    assert all(map(torch.equal, weights, clean))
    assert skipped == 0


def test_nor_what_it_puts_into_a_frozen_one() -> None:
    clean, _ = trained_on(Frozen, put_in)
    weights, skipped = trained_on(Frozen, put_in, fault_at=8)
    assert all(map(torch.equal, weights, clean))
    assert skipped == 0


@pytest.mark.parametrize("name", KINDS)
def test_a_batch_that_was_changed_in_place_is_not_trained_on_again(name: str) -> None:
    """It would be doubled twice."""
    _, skipped = trained_on(KINDS[name], multiply, fault_at=8)
    assert skipped > 0

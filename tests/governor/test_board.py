"""A TensorBoard writer of the user's: incidents as text, signs and counts as scalars, and nothing in it ends a run."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tolaria import GovernorConfig, InvalidConfig, TolariaGovernor

Govern = Callable[..., TolariaGovernor]


class Writer:
    """Notes what it is told; raises where it is told to."""

    def __init__(self, fails: tuple[str, ...] = ()) -> None:
        self.fails = fails
        self.scalars: list[tuple[str, float, int]] = []
        self.texts: list[tuple[str, str, int]] = []

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        if "scalar" in self.fails:
            raise OSError("the disk is full")
        self.scalars.append((tag, scalar_value, global_step))

    def add_text(self, tag: str, text_string: str, global_step: int) -> None:
        if "text" in self.fails:
            raise OSError("the disk is full")
        self.texts.append((tag, text_string, global_step))


def train(kit: Any, govern: Govern, writer: Any, bad: int = 5, **config: Any) -> Any:
    run = kit.Run()
    governor = govern(
        run.model,
        run.optimizer,
        scheduler=run.scheduler,
        config=GovernorConfig(cadence=2, probation=1, rng="restore", writer=writer, **config),
    )
    left = 2
    for number, batch in governor.watch(list(enumerate(run.batches[:12]))):
        poisoned = number == bad and left > 0
        left -= poisoned
        run.step(governor, kit.nan_batch(batch) if poisoned else batch, kl=torch.tensor(0.25))
    return run


def test_a_real_writer_holds_incidents_signs_and_counts(govern: Govern, kit: Any, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path / "board")) as writer:
        run = train(kit, govern, writer, ledger=str(tmp_path / "ledger.jsonl"), write_every=4)
    events = EventAccumulator(str(tmp_path / "board"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    [text] = [tag for tag in events.Tags()["tensors"] if tag.startswith("tolaria/incidents")]
    told = [event.tensor_proto.string_val[0].decode() for event in events.Tensors(text)]
    lines = (tmp_path / "ledger.jsonl").read_text().splitlines()
    assert told == [f"```json\n{line}\n```" for line in lines]
    assert len(lines) == 2
    losses = {event.step: event.value for event in events.Scalars("tolaria/signs/loss")}
    assert set(losses) == {4, 6, 8}  # every fourth, and the one that was not healthy; 11 batches were learnt from
    assert [event.value for event in events.Scalars("tolaria/signs/kl")] == [0.25] * len(
        events.Scalars("tolaria/signs/loss")
    )
    assert [event.value for event in events.Scalars("tolaria/rollbacks") if event.step == 8] == [2.0]
    assert {"tolaria/steps_lost", "tolaria/vetoes", "tolaria/signs/grad_norm"} <= set(events.Tags()["scalars"])
    alone = kit.Run()
    for number in [*range(5), *range(6, 12)]:
        alone.plain_step(alone.batches[number])
    assert run.state() == alone.state()


def test_without_incidents_there_are_scalars_only(govern: Govern, kit: Any) -> None:
    writer = Writer()
    train(kit, govern, writer, bad=-1)
    assert writer.texts == []
    assert {step for _, _, step in writer.scalars} == {10}
    assert ("tolaria/signs/kl", 0.25, 10) in writer.scalars


def test_an_incident_carries_its_line(govern: Govern, kit: Any) -> None:
    writer = Writer()
    train(kit, govern, writer)
    assert [(tag, step) for tag, _, step in writer.texts] == [("tolaria/incidents", 6)] * 2
    line = json.loads(writer.texts[1][1].removeprefix("```json\n").removesuffix("\n```"))
    assert (line["schema_version"], line["action"]) == (1, "skip")


@pytest.mark.parametrize("fails", [("scalar",), ("text",), ("scalar", "text")])
def test_a_writer_that_fails_never_ends_a_run(
    fails: tuple[str, ...], govern: Govern, kit: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = train(kit, govern, None).state()
    path = tmp_path / "ledger.jsonl"
    with caplog.at_level(logging.ERROR, "tolaria"):
        assert train(kit, govern, Writer(fails), ledger=str(path), write_every=1).state() == expected
    assert len(path.read_text().splitlines()) == 2
    told = [record.message for record in caplog.records if record.levelno == logging.ERROR]
    # signs are given up at the first failure, and each incident is tried
    assert len([message for message in told if "vital signs" in message]) == int("scalar" in fails)
    assert len([message for message in told if "incident" in message]) == 2


def test_what_is_no_writer_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="writer="):
        GovernorConfig(writer="runs/1")  # type: ignore[arg-type]

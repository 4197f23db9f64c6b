"""The command line. Imports no torch: `tolaria --help` answers at once, and a command loads what it needs.

Exit codes: 0 good, 1 a finding (a fault that was not recovered, a panic in a judged file) or an error of the run,
2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from tolaria.errors import TolariaError, UsageError


@dataclass(frozen=True)
class Drill:
    """Train a real model under injected faults: clean, unguarded and guarded side by side.

    Exits with 0 when the guarded run recovered from every fault and was never rolled back without cause, else with 1.
    Ten seeds in a row: tolaria drill --seeds 10
    """

    workload: Literal["gpt", "digits", "cartpole"] = "gpt"
    """What is trained: a small GPT on the Python language reference, a CNN on the scikit-learn digits (needs
    tolaria[demo]), or PPO on CartPole (needs tolaria[sb3])."""

    seed: int = 0
    """Seed of weights, data order and faults."""

    seeds: int = 1
    """Number of drills, with consecutive seeds."""

    steps: int | None = None
    """Optimizer steps of each run, 600 unless given: 600 or more for gpt, 400 or more for digits. For cartpole: rounds
    of PPO, 60 or more, 140 unless given."""

    device: str = "auto"
    """Device to train on; auto takes CUDA where there is any, else the CPU."""

    json: bool = False
    """Print the report as one JSON object per seed and line, and nothing else."""

    out: Path | None = None
    """Folder for the picture (drill.svg), report.json and incidents.jsonl; with several seeds one folder each in it."""


@dataclass(frozen=True)
class Doctor:
    """Show what this machine offers to a governor: devices, barrier, memory, copy speed."""

    json: bool = False
    """Print one JSON object, and nothing else."""


@dataclass(frozen=True)
class Bench:
    """Measure what snapshots, rollbacks and judging cost here, each beside its floor in the same run.

    A transformer is trained with AdamW, with a governor and without one. Takes half a minute for 10mb on a CPU.
    """

    size: Literal["10mb", "400mb", "355m", "1.3b"] | None = None
    """Of the train state in bytes (10mb, 400mb), or of the model in weights (355m: 4.25 GB of state, 1.3b: 15.74 GB).
    355m on CUDA and 10mb on a CPU unless given."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to measure; auto takes CUDA where there is any, else the CPU."""

    rounds: int = 9
    """Measurements of each figure."""

    parts: tuple[Literal["copies", "judging", "host-tier", "training"], ...] = (
        "copies",
        "judging",
        "host-tier",
        "training",
    )
    """What to measure; host-tier on CUDA only."""

    steps: int = 20
    """Steps of each block of the training loop, a multiple of 10."""

    peers: bool = False
    """Also measure other packages on the same work, each in a process of its own, where they are installed."""

    peer_seconds: float | None = None
    """Seconds after which no package begins another round; one round of each counts in any case."""

    json: bool = False
    """Print one JSON object, and nothing else."""


@dataclass(frozen=True)
class Judge:
    """Replay recorded runs through the detectors: when the governor would have fired, and why.

    Exits with 0 when no run would have panicked, with 1 when one would, with 2 when a file is malformed.
    """

    files: tyro.conf.Positional[tuple[Path, ...]]
    """CSV or CSV.gz (columns step, loss, grad_norm and run; the last two optional), JSON lines of the same names,
    trainer_state.json, TensorBoard event files or their folder (needs tolaria[tensorboard])."""

    json: bool = False
    """Print one JSON object, and nothing else."""

    picture: Path | None = None
    """File to draw the judged curves to, as SVG."""


@dataclass(frozen=True)
class Verify:
    """Show that snapshots and rollbacks are safe: every schedule of small programs, and each edge removed in turn.

    Explores the shipped protocol on a simulated machine, checks that every mutant of it is caught, works it hard beside
    random threads, and forces races on a GPU if there is one. Exits with 1 on any violation, and when the budget cut a
    search.
    """

    device: Literal["cpu", "cuda"] | None = None
    """Where to work and to force races; CUDA where there is any."""

    budget: float = 120.0
    """Seconds for everything; a sixth of them is the stress slice."""

    json: bool = False
    """Print one JSON object, and nothing else."""

    replay: str | None = None
    """Show the schedule of this token again, and do nothing else."""


Command = (
    Annotated[Drill, tyro.conf.subcommand("drill")]
    | Annotated[Judge, tyro.conf.subcommand("judge")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Bench, tyro.conf.subcommand("bench")]
    | Annotated[Doctor, tyro.conf.subcommand("doctor")]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; those of the process unless given.

    Returns:
        The exit code.
    """
    try:
        command = tyro.cli(
            Command,
            prog="tolaria",
            description="Keeps a PyTorch training run alive: in-memory snapshots, judged steps, exact rollback.",
            args=None if argv is None else list(argv),
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    except SystemExit as stop:  # help, or wrong usage: tyro has said what was wrong
        return stop.code if isinstance(stop.code, int) else 2
    try:
        if isinstance(command, Drill):
            return _drill(command)
        if isinstance(command, Judge):
            return _judge(command)
        if isinstance(command, Bench):
            return _bench(command)
        return _verify(command) if isinstance(command, Verify) else _doctor(command)
    except KeyboardInterrupt:
        print("tolaria: interrupted", file=sys.stderr)
        return 130
    except TolariaError as error:
        print(f"tolaria: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def _drill(command: Drill) -> int:
    from tolaria.drill.command import main as drill
    from tolaria.drill.workloads import CannotRun

    try:
        return drill(
            workload=command.workload,
            seed=command.seed,
            seeds=command.seeds,
            steps=command.steps,
            device=command.device,
            as_json=command.json,
            out=command.out,
        )
    except CannotRun as error:
        print(f"tolaria drill: {error}", file=sys.stderr)
        return 2


def _judge(command: Judge) -> int:
    from tolaria.recorded.command import main as judge
    from tolaria.recorded.records import UnreadableRecord

    if not command.files:
        print("tolaria judge: no file was given, expected one or more", file=sys.stderr)
        return 2
    try:
        return judge(files=command.files, as_json=command.json, picture=command.picture)
    except UnreadableRecord as error:
        print(f"tolaria judge: {error}", file=sys.stderr)
        return 2


def _bench(command: Bench) -> int:
    from tolaria.bench.command import main as bench

    return bench(
        size=command.size,
        device=command.device,
        rounds=command.rounds,
        steps=command.steps,
        peers=command.peers,
        as_json_object=command.json,
        parts=command.parts,
        peer_seconds=command.peer_seconds,
    )


def _doctor(command: Doctor) -> int:
    from tolaria.doctor import main as doctor

    return doctor(as_json=command.json)


def _verify(command: Verify) -> int:
    from tolaria.testing.verify import main as verify

    return verify(command.device, command.budget, command.json, command.replay)

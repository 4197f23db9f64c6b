"""The command line. Imports no torch: `tolaria --help` answers at once, and a command loads what it needs.

Exit codes: 0 good, 1 a finding (a fault that was not recovered) or an error of the run, 2 wrong usage, 130 interrupted.
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

    workload: Literal["digits", "cartpole"] = "digits"
    """What is trained: a CNN on the scikit-learn digits (needs tolaria[demo]), or PPO on CartPole (tolaria[sb3])."""

    seed: int = 0
    """Seed of weights, data order and faults."""

    seeds: int = 1
    """Number of drills, with consecutive seeds."""

    steps: int | None = None
    """Optimizer steps of each run, 400 or more (600 unless given); of cartpole rounds of PPO, 60 or more (140)."""

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


Command = Annotated[Drill, tyro.conf.subcommand("drill")] | Annotated[Doctor, tyro.conf.subcommand("doctor")]


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
        return _drill(command) if isinstance(command, Drill) else _doctor(command)
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


def _doctor(command: Doctor) -> int:
    from tolaria.doctor import main as doctor

    return doctor(as_json=command.json)

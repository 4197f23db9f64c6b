"""One cartpole drill from seed to report, and `tolaria drill --workload cartpole` around it.

*Recovered*: the governor answered in the round in which the fault struck, and

- where the round was made again: nothing more happened in it, and the train state behind it is bit-identical to the
  clean run's (as long as nothing was dropped before; afterwards the runs have learnt from different experience);
- where the round or its rollout was dropped: the train state behind it is bit-identical to the one before it.

An incident in a round without a fault is a *false rollback*. A run has *solved* the task when its greedy policy reaches
a mean return of 475 in 20 fresh episodes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tolaria.config import GovernorConfig
from tolaria.drill.cartpole import SOLVED, PolicyFault, PolicyRecord, evaluate, plan, require_runnable, train
from tolaria.drill.cartpole_show import PolicyShow
from tolaria.records import SCHEMA_VERSION, Incident

ROUNDS = 140
"""Of each run, unless `--steps` says otherwise: 71,680 steps of the environments."""


@dataclass(frozen=True, slots=True, eq=False)
class PolicyResult:
    """One drill after it ran.

    Attributes:
        faults: As planned.
        clean, unguarded, guarded: The three runs.
        only_last: Mean return of the clean run's policy after the last fault: how an unguarded run ends that meets no
            other. NaN where that policy cannot act.
        recovered: By kind of fault.
        false: Incidents in rounds without a fault.
    """

    faults: tuple[PolicyFault, ...]
    clean: PolicyRecord
    unguarded: PolicyRecord
    guarded: PolicyRecord
    only_last: float
    recovered: dict[str, bool]
    false: tuple[Incident, ...]

    @property
    def is_good(self) -> bool:
        """The guarded run solves the task in spite of every fault, an unguarded one does not, nothing fell in vain."""
        unguarded = self.unguarded.is_solved or self.only_last >= SOLVED
        return all(self.recovered.values()) and not self.false and self.guarded.is_solved and not unguarded


def run_policy_drill(
    seed: int, rounds: int, device: torch.device, show: PolicyShow, config: GovernorConfig, kinds: Sequence[str] = ()
) -> PolicyResult:
    """Run one drill: three trainings and their comparison. Deterministic in its arguments, on one machine.

    Args:
        seed: Of weights, environments and faults.
        rounds: Of each run.
        device: Of the policy.
        show: Told about each round and incident.
        config: Settings of the governor; its `on_incident` is replaced.
        kinds: Faults to inject; all unless given.
    """
    from tolaria.drill.cartpole_faults import blow_up

    faults = tuple(fault for fault in plan(seed, rounds) if not kinds or fault.kind in kinds)
    incidents: list[tuple[int, Incident]] = []
    reached = [-1]

    def tell(name: str, number: int) -> None:
        reached[0] = number
        show.round(name, number + 1, rounds)

    def note(incident: Incident) -> None:
        # a rollout that is dropped, before any step is lost, would have led to the round after the one reached last
        gathering = incident.restored_step is not None and incident.steps_lost == 0
        incidents.append((reached[0] + gathering, incident))
        show.incident(incident)

    clean, model = train("clean", seed, rounds, (), device=device, tell=tell)
    blow_up(model.policy, torch.Generator().manual_seed(seed))
    only_last = evaluate(model, seed)
    unguarded, _ = train("unguarded", seed, rounds, faults, device=device, tell=tell)
    reached[0] = -1
    guarded, _ = train(
        "guarded", seed, rounds, faults, device=device, guard=replace(config, on_incident=note), tell=tell
    )
    guarded.incidents = incidents
    false = tuple(incident for at, incident in incidents if all(fault.round != at for fault in faults))
    first_drop = min((at for at, incident in incidents if incident.action == "skip"), default=rounds)
    recovered = {fault.kind: is_recovered(fault, clean, guarded, first_drop) for fault in faults}
    return PolicyResult(faults, clean, unguarded, guarded, only_last, recovered, false)


def is_recovered(fault: PolicyFault, clean: PolicyRecord, guarded: PolicyRecord, first_drop: int) -> bool:
    """See the head of this file. `first_drop` is the first round that was dropped, or whose rollout was."""
    actions = [incident.action for at, incident in guarded.incidents if at == fault.round]
    if not guarded.struck.get(fault.kind) and fault.kind != "poisoned_observation":
        return False
    before, behind = guarded.states_before(fault.round), guarded.states_before(fault.round + 1)
    if fault.action == "replay":
        is_same = fault.round > first_drop or behind[:1] == clean.states_before(fault.round + 1)[:1]
        return actions == ["replay"] and bool(behind) and is_same
    if fault.kind == "poisoned_observation":
        return actions == ["skip"] and len(before) == 2 and before[0] == before[1]
    return actions == ["replay", "skip"] and behind[:1] == before[-1:]


def as_json(result: PolicyResult, seed: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """The object that ``--json`` prints. A mean return of null: the policy could not act any more."""
    incidents = result.guarded.incidents
    faults = []
    for fault in result.faults:
        answered = [incident for at, incident in incidents if at == fault.round]
        faults.append(
            {
                "kind": fault.kind,
                "round": fault.round,
                "reason": answered[0].reason if answered else None,
                "action": answered[-1].action if answered else None,
                "rollback_ms": round(sum(incident.rollback_ms for incident in answered), 3) if answered else None,
                "recovered": result.recovered[fault.kind],
            }
        )
    runs: dict[str, dict[str, Any]] = {
        record.name: {
            "survived": record.is_solved,
            "mean_return": _finite(record.evaluation),
            "ended_by": record.ended_by or None,
        }
        for record in (result.clean, result.unguarded, result.guarded)
    }
    runs["unguarded"]["mean_return_of_last_fault_alone"] = _finite(result.only_last)
    runs["guarded"] |= {
        "rollbacks": len(incidents),
        "false_rollbacks": len(result.false),
        "dropped": result.guarded.dropped,
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "workload": "cartpole",
        "seed": seed,
        "device": str(device),
        "steps": rounds,
        "runs": runs,
        "faults": faults,
        "injected": len(faults),
        "recovered": sum(result.recovered.values()),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def main(
    *,
    seeds: Sequence[int],
    rounds: int,
    device: torch.device,
    as_json_lines: bool,
    folders: Iterator[tuple[Path | None, Path | None]],
    quiet: Callable[[], Any],
) -> int:
    """`tolaria drill --workload cartpole`.

    Args:
        seeds: One drill each.
        rounds: Of each run.
        device: Of the policies.
        as_json_lines: Print the reports, and nothing else.
        folders: For each drill, where its report goes and where its ledger is; None for nowhere.
        quiet: A context in which the library's own log lines are not shown.

    Returns:
        0 when every drill was good, 1 otherwise.

    Raises:
        CannotRun: Too few rounds, or Stable-Baselines3 is missing.
    """
    require_runnable(rounds)
    show = PolicyShow(as_json_lines)
    good = True
    with quiet():
        for seed in seeds:
            folder, ledger = next(folders)
            show.begin(seed, rounds, plan(seed, rounds))
            config = GovernorConfig(ledger=None if ledger is None else str(ledger))
            result = run_policy_drill(seed, rounds, device, show, config)
            report = as_json(result, seed, rounds, device)
            if folder is not None:
                text = json.dumps(report, indent=2, allow_nan=False)
                (folder / "report.json").write_text(text + "\n", encoding="utf-8")
            if as_json_lines:
                print(json.dumps(report, allow_nan=False), flush=True)
            show.result(report)
            good = good and result.is_good
    show.all_seeds()
    return 0 if good else 1

"""Each fault alone, without a governor, ruins the run: the drill's faults are worth surviving.

`pytest tests/drill/test_red_twins.py --seed 3` does it for another seed.
"""

from __future__ import annotations

import pytest
import torch

from tolaria.drill.command import prepare
from tolaria.drill.faults import KINDS, FaultKind
from tolaria.drill.runs import Audience, disturbed, run_plain
from tolaria.drill.score import survived

STEPS = 400


@pytest.fixture(scope="module")
def clean_losses() -> dict[int, float]:
    return {}


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_alone_and_unguarded_it_ruins_the_run(
    kind: FaultKind, seed: int, deaf: Audience, clean_losses: dict[int, float]
) -> None:
    stage = prepare("digits", seed, STEPS, torch.device("cpu"), [kind])
    if seed not in clean_losses:
        clean = run_plain("clean", stage.workload, stage.workload.batches, (), deaf)
        assert survived(clean, stage.workload.chance_loss)
        clean_losses[seed] = clean.val_loss
    ruined = run_plain("alone", stage.workload, disturbed(stage.workload, stage.faults), stage.faults, deaf)
    struck = [step.batch for step in ruined.kept if step.struck]
    assert struck == list(range(stage.faults[0].batch, stage.faults[0].batch + kind.length))
    dead = not survived(ruined, stage.workload.chance_loss)
    assert dead or ruined.val_loss > 1.3 * clean_losses[seed]

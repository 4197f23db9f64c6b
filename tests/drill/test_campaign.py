"""The fault campaign: sixty of its trials, its red twins, and what its judgement can tell apart."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tolaria.drill.campaign import acts, campaign, page
from tolaria.drill.campaign import trial as trials
from tolaria.drill.campaign.__main__ import main
from tolaria.drill.campaign.kinds import BY_NAME, CONTROL, KINDS, Ending, Kind
from tolaria.drill.campaign.outcome import Facts, Outcome, judge
from tolaria.drill.campaign.strokes import LASTING, Moment, Striker, Stroke
from tolaria.drill.campaign.tally import row_of, summary
from tolaria.drill.campaign.trial import WORKLOADS, Mode, References, open_references, place_of, run_trial
from tolaria.drill.workloads import CannotRun
from tolaria.feed import Feed
from tolaria.settlement import STILL_OPEN

STEPS = 30
INSIDE = [kind for kind in KINDS if kind.ending is not Ending.OUTSIDE]
SIXTY = [(kind, list(WORKLOADS)[number % 3]) for number, kind in enumerate(INSIDE)]
SIXTY += [(kind, "regression") for kind in INSIDE if (kind, "regression") not in SIXTY]
SIXTY = [(kind, workload if campaign.applies(kind.name, workload) else "digits") for kind, workload in SIXTY][:60]

GOOD = {"struck": 1, "panics": 1, "is_equal": True, "ratio": 1.0}


@pytest.fixture(scope="module")
def references() -> Callable[[str], References]:
    opened: dict[str, References] = {}

    def reference(workload: str) -> References:
        return opened.setdefault(workload, open_references(workload, 0, STEPS))

    return reference


@pytest.fixture(autouse=True)
def _alone(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOLARIA_DISABLE", raising=False)


# ------------------------------------------------------------ trials


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "workload"), SIXTY, ids=[f"{kind.name}-{workload}" for kind, workload in SIXTY])
def test_sixty_faults(kind: Kind, workload: str, references: Callable[[str], References]) -> None:
    trial = run_trial(kind, references(workload), 0)
    assert trial.outcome.is_good, trial
    assert trial.facts.struck


def test_a_second_look_at_the_last_step_is_no_false_panic(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last batch is odd by nature: its step is suspicious, is run again, and comes to the same."""
    odd = open_references("regression", 0, STEPS)
    *others, last = odd.workload.batches
    odd.workload.batches = (*others, last._replace(targets=last.targets * 1e3))
    looks: list[str] = []
    known = trials.is_second_look
    monkeypatch.setattr(trials, "is_second_look", lambda incident: looks.append(incident.reason) or known(incident))
    trial = run_trial(CONTROL, odd, 0)
    assert looks == [f"loss spike, {STILL_OPEN}"]
    assert (trial.outcome, trial.facts.panics, trial.facts.is_equal) == (Outcome.UNHARMED, 0, True)


def test_they_are_sixty_of_every_kind_and_workload() -> None:
    assert len(SIXTY) == len(set(SIXTY)) == 60
    assert {kind.name for kind, _ in SIXTY} == {kind.name for kind in INSIDE}
    assert {workload for _, workload in SIXTY} == set(WORKLOADS)
    assert len(INSIDE) >= 20


@pytest.mark.slow
@pytest.mark.parametrize("workload", WORKLOADS)
def test_an_undisturbed_run_has_no_panic_and_ends_like_the_clean_one(
    workload: str, references: Callable[[str], References]
) -> None:
    trial = run_trial(CONTROL, references(workload), 0)
    assert (trial.outcome, trial.facts.panics, trial.facts.ratio) == (Outcome.UNHARMED, 0, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mantissa_flip", "flipped_sign", "scaled_weights", "gradient_flip"])
def test_blind_it_is_a_silent_failure(name: str, references: Callable[[str], References]) -> None:
    """The red twin of the whole: no detector and no re-execution."""
    assert run_trial(BY_NAME[name], references("regression"), 0, "blind").outcome is Outcome.SILENT


@pytest.mark.slow
def test_a_replay_that_leaves_out_a_batch_is_seen(
    references: Callable[[str], References], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The red twin of the comparison: a governor whose replay is broken."""
    rewind = Feed.rewind

    def broken(feed: Feed, position: int, skip: range | None, restores_random_state: bool, further: int = 0) -> Any:
        found = rewind(feed, position, skip, restores_random_state, further)
        if feed._queue and skip is not None:
            feed._queue.rotate(1)
        return found

    monkeypatch.setattr(Feed, "rewind", broken)
    trial = run_trial(BY_NAME["exponent_flip"], references("regression"), 0, "signs")
    assert trial.outcome is Outcome.WRONG


def test_equal_arguments_give_an_equal_trial(references: Callable[[str], References]) -> None:
    kind = BY_NAME["weight_flip"]
    assert run_trial(kind, references("regression"), 0) == run_trial(kind, references("regression"), 0)


# ------------------------------------------------------------ judgement


@pytest.mark.parametrize(
    ("facts", "ending", "expected"),
    [
        ({}, Ending.EXACT, Outcome.RECOVERED),
        ({"panics": 0}, Ending.EXACT, Outcome.UNHARMED),
        ({"panics": 0, "is_equal": False}, Ending.EXACT, Outcome.SILENT),
        ({"panics": 0, "is_equal": False}, Ending.CLOSE, Outcome.SILENT),
        ({"panics": 0, "bad_kept": 1}, Ending.EXACT, Outcome.SILENT),
        ({"is_equal": False}, Ending.EXACT, Outcome.WRONG),
        ({"is_equal": False}, Ending.CLOSE, Outcome.RECOVERED),
        ({"is_equal": False, "ratio": 1.31}, Ending.CLOSE, Outcome.WORSE),
        ({"ratio": 1.31}, Ending.EXACT, Outcome.RECOVERED),
        ({"ratio": 1.31, "skipped": 1}, Ending.EXACT, Outcome.WORSE),
        ({"ratio": float("nan"), "skipped": 1}, Ending.EXACT, Outcome.WORSE),
        ({"ratio": 1.3, "skipped": 1}, Ending.EXACT, Outcome.RECOVERED),
        ({"struck": 0}, Ending.EXACT, Outcome.UNTOUCHED),
        ({"is_false": True}, Ending.EXACT, Outcome.FALSE),
        ({"ended_by": "RetryBudgetExceeded", "is_honest": True}, Ending.NAMED, Outcome.ENDED),
        ({"ended_by": "RetryBudgetExceeded"}, Ending.NAMED, Outcome.CRASHED),
    ],
)
def test_judgement(facts: dict[str, Any], ending: Ending, expected: Outcome) -> None:
    assert judge(Facts(**{**GOOD, **facts}), ending) is expected


def test_only_a_control_may_not_strike() -> None:
    assert judge(Facts(0, 0, is_equal=True), Ending.EXACT, is_control=True) is Outcome.UNHARMED


# ------------------------------------------------------------ strokes and acts


def struck_by(stroke: Stroke, references: References, visits: Sequence[int], place: int = 3) -> list[int]:
    """Which of these visits of batches it hits."""
    workload = references.workload
    striker = Striker("test", [stroke], place, 0, workload, workload.build())
    found = []
    for number, index in enumerate(visits):
        before = striker.struck
        striker.begin(workload.batches[index])
        striker.strike(stroke.moment)
        if striker.struck > before:
            found.append(number)
    return found


@pytest.mark.parametrize(
    ("stroke", "expected"),
    [
        (Stroke(Moment.REST, acts.reseed), [3]),
        (Stroke(Moment.REST, acts.reseed, occasions=LASTING), [3, 6]),
        (Stroke(Moment.REST, acts.reseed, occasions=frozenset({2})), [6]),
        (Stroke(Moment.REST, acts.reseed, offset=-1, length=2), [2, 3]),
        (Stroke(Moment.REST, acts.reseed, offset=1, length=0), [4, 7]),
    ],
)
def test_when_it_strikes(stroke: Stroke, expected: list[int], references: Callable[[str], References]) -> None:
    assert struck_by(stroke, references("regression"), [0, 1, 2, 3, 4, 2, 3, 5]) == expected


@pytest.mark.parametrize("bit", [0, 20, 30, 31])
def test_a_flip_changes_one_bit_and_comes_back(bit: int) -> None:
    tensor = torch.ones(3, 2)
    acts._flip_one(tensor, 4, bit)
    words = tensor.view(-1).view(torch.int32) ^ torch.ones(6).view(torch.int32)
    assert words.count_nonzero() == 1
    assert (int(words[4]) & 0xFFFFFFFF) == 1 << bit
    acts._flip_one(tensor, 4, bit)
    assert tensor.equal(torch.ones(3, 2))


def test_what_finds_nothing_to_hit_has_not_struck(references: Callable[[str], References]) -> None:
    stroke = Stroke(Moment.REST, acts.scale(acts.moments_of, 0.0))
    assert struck_by(stroke, references("regression"), [3]) == []
    assert run_trial(Kind("early", "", (stroke,)), References(references("regression").workload), 1).facts.struck


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_places_lie_in_the_run(kind: Kind) -> None:
    for seed in range(50):
        assert 0 <= place_of(kind, "digits", seed, STEPS) < STEPS


# ------------------------------------------------------------ command


def command(*arguments: str, seeds: int = 1) -> list[str]:
    chosen = ["--workloads", "regression", "--kinds", "exponent_flip", "none", "--seeds", str(seeds)]
    return [*chosen, "--mode", "signs", *arguments]


@pytest.mark.slow
def test_it_resumes_and_prints_one_object(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "results.jsonl"
    assert main(command("--results", str(results), "--json")) == 0
    first = json.loads(capsys.readouterr().out)
    assert (first["trials"], first["good"], first["silent"], first["controls"]) == (1, 1, 0, 1)
    results.write_text(results.read_text() + '{"kind": "expo')  # broken off

    def again(*_: Any) -> Any:
        raise AssertionError("it was there already")

    monkeypatch.setattr(campaign, "run_batch", again)
    assert main(command("--results", str(results), "--json")) == 0
    assert json.loads(capsys.readouterr().out)["kinds"] == first["kinds"]
    assert len(campaign.read(results)) == 2


@pytest.mark.parametrize(
    "arguments",
    [["--kinds", "nothing"], ["--workloads", "mnist"], ["--seeds", "0"], ["--processes", "0"], ["--mode", "deaf"]],
)
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().out == ""


def test_a_file_that_is_none_of_ours_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text('{"a": 1}\n{"b": 2}\n')
    with pytest.raises(CannotRun, match="line 1"):
        campaign.read(tmp_path / "other.jsonl")


def test_workloads_in_turn_give_every_kind_each_seed_once() -> None:
    plan = campaign.choose((), (), 3, 6, "full", in_turn=True)
    trials = [(kind, workload, seed) for workload, seed, kinds, _ in plan.batches(set()) for kind in kinds]
    wanted = [(kind, seed) for kind in sorted(BY_NAME) for seed in range(3, 9)]
    assert sorted((kind, seed) for kind, _, seed in trials) == wanted
    assert {workload for kind, workload, _ in trials if kind == CONTROL.name} == set(WORKLOADS)
    everything = {
        (kind, workload, seed)
        for workload, seed, kinds, _ in campaign.choose((), (), 3, 6, "full").batches(set())
        for kind in kinds
    }
    assert set(trials) < everything  # the rest can be added later
    assert not plan.batches(set(trials))


def rows(references: References) -> list[dict[str, Any]]:
    good = row_of(run_trial(CONTROL, references, 0, "blind"), "full")
    return [
        {**good},
        {**good, "kind": "mantissa_flip", "struck": 1},
        {**good, "kind": "weight_flip", "outcome": "silent", "ratio": None},
        {**good, "kind": "errs_alike", "outcome": "silent", "ratio": None},
    ]


def test_the_summary_counts_what_is_inside_and_names_misses(references: Callable[[str], References]) -> None:
    found = summary(rows(references("regression")), campaign.about(campaign.choose((), (), 0, 1, "full"), 60.0, 1))
    assert (found["trials"], found["good"], found["silent"], found["num_kinds"], found["controls"]) == (2, 1, 1, 2, 1)
    assert [row["kind"] for row in found["misses"]] == ["weight_flip"]
    assert {count["kind"]: count["harmed"] for count in found["kinds"]} == {
        "mantissa_flip": 0,
        "weight_flip": 1,
        "errs_alike": 1,
        "none": 0,
    }
    json.dumps(found, allow_nan=False)


def test_the_page_is_written_between_its_marks(tmp_path: Path, references: Callable[[str], References]) -> None:
    about: Callable[[Mode], Any] = lambda mode: campaign.about(campaign.choose((), (), 0, 1, mode), 60.0, 1)  # noqa: E731
    full = summary(rows(references("regression")), about("full"))
    target = tmp_path / "campaign.md"
    target.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n")
    page.write(target, full, {"signs": summary([], about("signs"))})
    text = target.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "1 of 2 trials passed (50.00 %), 1 silent failures" in text
    assert "| weight flip | regression | 0 |" in text
    with pytest.raises(CannotRun, match="marks"):
        page.write(tmp_path / "none.md", full, {})

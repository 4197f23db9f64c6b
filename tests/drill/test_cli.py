"""The command line: exit codes, one clear line for each mistake, the doctor."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from tolaria import doctor
from tolaria.cli import main
from tolaria.drill import command
from tolaria.errors import InvalidConfig, NoSnapshot


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["dril"],
        ["drill", "--steps", "many"],
        ["drill", "--workload", "imagenet"],
        ["drill", "--no-such-option"],
        ["doctor", "extra"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (["--steps", "10"], "use --steps 600 or more"),
        (["--workload", "digits", "--steps", "10"], "use --steps 400 or more"),
        (["--seeds", "0"], "use 1 or more"),
        (["--seed", "-1"], "use one from 0"),
        (["--device", "nonsense"], "try --device cpu"),
        (["--device", "meta:9x"], "try --device cpu"),
    ],
    ids=" ".join,
)
def test_what_cannot_run_is_one_line_and_2(
    arguments: list[str], advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["drill", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert advice in captured.err


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert main(["drill", "--workload", "digits", "--device", "cpu"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert "pip install 'tolaria[demo]'" in captured.err


def test_without_the_text(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A standard library that was stripped of what only `help()` needs."""
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert main(["drill", "--device", "cpu"]) == 2
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1
    assert "--workload digits" in captured.err


def test_a_disabled_governor_cannot_be_drilled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TOLARIA_DISABLE", "1")
    assert main(["drill"]) == 2
    assert "TOLARIA_DISABLE" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["drill", "--device", "cpu", "--out", str(tmp_path / "file")]) == 2
    assert "choose another folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyboardInterrupt(), 130),
        (NoSnapshot("rolling back", "there is none", "Take one."), 1),
        (InvalidConfig("building", "cadence=0", "Correct it."), 2),
    ],
    ids=["interrupted", "error", "usage"],
)
def test_errors_are_one_line(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> NoReturn:
        raise error

    monkeypatch.setattr(command, "run_drill", fail)
    assert main(["drill", "--device", "cpu"]) == code
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_exit_code_and_folders_of_several_seeds(
    finished: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """One finding among three drills is a finding. The drills themselves are stubs."""

    class Outcome:
        def __init__(self, seed: int) -> None:
            self.report = {**finished.report, "seed": seed}
            self.is_good = seed != 5

    class Stub:
        def __init__(self, seed: int) -> None:
            self.score = Outcome(seed)
            self.report = self.score.report

    written: list[Path] = []
    monkeypatch.setattr(command, "run_drill", lambda stage, *_: Stub(stage.seed))
    monkeypatch.setattr(command, "_write", lambda _, folder: written.append(folder))
    monkeypatch.setattr(command, "_present", lambda *_: None)
    arguments = [
        "drill",
        "--workload",
        "digits",
        "--device",
        "cpu",
        "--json",
        "--steps",
        "400",
        "--seeds",
        "3",
        "--out",
        str(tmp_path),
    ]
    assert main([*arguments, "--seed", "4"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["seed"] for line in lines] == [4, 5, 6]
    assert [path.name for path in written] == ["seed-4", "seed-5", "seed-6"]
    assert main([*arguments, "--seed", "6"]) == 0


def test_a_drill_leaves_torch_as_it_was() -> None:
    threads = torch.get_num_threads()
    inside = []

    def fail() -> NoReturn:
        with command.deterministic(torch.device("cpu")):
            inside.append(torch.get_num_threads())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert inside == [1]
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()


# -- doctor


def test_doctor_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert list(found) == [
        "schema_version",
        "tolaria",
        "python",
        "platform",
        "torch",
        "devices",
        "host_threads",
        "deterministic",
        "extras",
        "notes",
    ]
    cpu = found["devices"][-1]
    assert cpu["device"] == "cpu"
    assert cpu["barrier"] == "host"
    assert cpu["copy_bytes_per_s"] > 0
    assert found["extras"]["demo"]["scikit-learn"]
    assert found["torch"]["version"] == str(torch.__version__)


def test_doctor_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "cpu" in shown
    assert "host" in shown
    assert "GB/s" in shown


def test_doctor_notes_what_is_missing_or_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("TOLARIA_DISABLE", "1")
    monkeypatch.setattr(doctor, "_version", lambda _: None)
    notes = " ".join(doctor.examine()["notes"])
    assert "4 ranks" in notes
    assert "TOLARIA_DISABLE is set" in notes
    assert "pip install 'tolaria[demo]'" in notes


def test_doctor_says_nothing_of_what_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "TOLARIA_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    notes = " ".join(doctor.examine()["notes"])
    assert "ranks" not in notes
    assert "TOLARIA_DISABLE" not in notes
    assert "pip install" not in notes

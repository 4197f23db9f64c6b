"""`tolaria judge`: exit codes, the JSON object, the printed story, the picture."""

import json
import random
import xml.etree.ElementTree as ET

import pytest

from tolaria.cli import main
from tolaria.recorded.picture import draw
from tolaria.recorded.records import RecordedRun
from tolaria.recorded.verdicts import judge_run
from tolaria.records import VitalSigns


def losses(seed, bad=()):
    draw_random = random.Random(seed)
    return [*(2.0 + draw_random.gauss(0.0, 0.05) for _ in range(300)), *bad]


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "good.csv"
    path.write_text("step,loss\n" + "".join(f"{i},{loss}\n" for i, loss in enumerate(losses(0))))
    return path


@pytest.fixture
def bad(tmp_path):
    path = tmp_path / "bad.csv"
    tail = [2.0, 2.0, *[6.0] * 20, *["nan"] * 10]
    rows = [f"late,{10 * i},{loss}\n" for i, loss in enumerate(losses(1, tail))]
    rows += [f"fine,{i},{loss}\n" for i, loss in enumerate(losses(2))]
    path.write_text("run,step,loss\n" + "".join(rows))
    return path


def test_exit_codes_and_json(good, bad, capsys):
    assert main(["judge", str(good), "--json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    assert (run["run"], run["steps"], run["panics"]) == ("good", 300, [])
    assert main(["judge", str(good), str(bad), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    names = [(one["run"], one["steps"], len(one["panics"])) for one in report["runs"]]
    assert names == [("good", 300, 0), ("late", 332, 1), ("fine", 300, 0)]
    late = report["runs"][1]
    assert late["panics"] == [{"step": 3060, "reason": "sustained loss spike", "onset": 3020}]
    # an interval before the panic, and one after it that lasts, NaN included: the episode has one entry
    assert [(one["step"], one["last_step"]) for one in late["suspects"]][-2:] == [(3020, 3050), (3070, 3310)]
    assert all(set(one) == {"step", "last_step", "reason"} for one in late["suspects"])


def test_the_story_for_people(bad, capsys):
    assert main(["judge", str(bad)]) == 1
    out = capsys.readouterr().out
    assert "run late: 332 steps, 1 panic" in out
    assert "step 3060: PANIC, sustained loss spike since step 3020 (loss 6" in out
    assert "run fine: 300 steps, no panic" in out
    assert "2 runs, 632 steps: 1 would have been rolled back" in out


@pytest.mark.parametrize("arguments", [["judge"], ["judge", "--json"], ["judge", "--nonsense", "x"]], ids=" ".join)
def test_wrong_usage(arguments, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err


def test_a_malformed_file_prints_one_line_and_nothing_else(good, tmp_path, capsys):
    (tmp_path / "broken.csv").write_text("step,loss\n0,1\n1,one\n")
    assert main(["judge", str(good), str(tmp_path / "broken.csv"), "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert "broken.csv, line 3: loss is 'one'" in captured.err


def test_the_picture(bad, tmp_path, capsys):
    picture = tmp_path / "out.svg"
    assert main(["judge", str(bad), "--picture", str(picture)]) == 1
    assert str(picture) in capsys.readouterr().out
    root = ET.fromstring(picture.read_text())
    words = ["".join(one.itertext()) for one in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "3060: sustained loss spike" in words
    assert "tolaria judge: 2 runs, 1 panic" in words
    assert len(list(root.iter("{http://www.w3.org/2000/svg}circle"))) == 10  # what is not finite
    assert main(["judge", str(bad), "--picture", str(tmp_path / "no" / "out.svg")]) == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    "values",
    [
        [None],
        [float("nan")] * 3,
        [0.0, 0.0],
        [-5.0, 1e300, -1e300],
        [1e-300, 1.0],
        [float("inf"), 2.0],
        [1e308, -1e308],
    ],
    ids=str,
)
def test_any_curve_can_be_drawn(values):
    run = RecordedRun('<&">', "f", tuple(VitalSigns(step=i, loss=loss) for i, loss in enumerate(values)))
    root = ET.fromstring(draw([judge_run(run)]))
    numbers = " ".join(one.get("d", "") for one in root.iter("{http://www.w3.org/2000/svg}path"))
    assert "nan" not in numbers
    assert "inf" not in numbers

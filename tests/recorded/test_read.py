"""Every format, every usual spelling of what is not a number, and what a malformed file is told."""

import gzip
import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tolaria.recorded import events
from tolaria.recorded.read import read
from tolaria.recorded.records import UnreadableRecord


def write(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    data = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


def values(run):
    return [(signs.step, signs.loss, signs.grad_norm) for signs in run.signs]


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_csv_with_all_columns_in_any_order(tmp_path, name):
    (one, two) = read(write(tmp_path, name, "step,Loss, run ,grad_norm\n0,2.5,x,1\n0,3.5,y,\n7,2.25,x,inf\n\n"))
    assert (one.name, two.name) == ("x", "y")
    assert values(one) == [(0, 2.5, 1.0), (7, 2.25, math.inf)]
    assert values(two) == [(0, 3.5, None)]


def test_csv_with_step_and_loss_only_is_named_by_its_file(tmp_path):
    (run,) = read(write(tmp_path, "my.run.csv.gz", "﻿loss,step\r\n1,0\r\n2,1\r\n"))
    assert run.name == "my.run"
    assert values(run) == [(0, 1.0, None), (1, 2.0, None)]


@pytest.mark.parametrize("word", ["nan", "NaN", "NAN", "-nan", "1.#QNAN", "-1.#IND"])
def test_spellings_of_nan(tmp_path, word):
    (run,) = read(write(tmp_path, "a.csv", f"step,loss\n0,{word}\n"))
    assert run.signs[0].loss is not None
    assert math.isnan(run.signs[0].loss)


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("inf", math.inf),
        ("Infinity", math.inf),
        ("+INF", math.inf),
        ("1.#INF", math.inf),
        ("-inf", -math.inf),
        ("1e999", math.inf),
        (" 2.5 ", 2.5),
        ("", None),
        ("null", None),
        ("None", None),
    ],
)
def test_spellings_of_infinity_and_of_nothing(tmp_path, word, value):
    (run,) = read(write(tmp_path, "a.csv", f"step,loss\n0,{word}\n1,1.0\n"))
    assert run.signs[0].loss == value


def test_json_lines(tmp_path):
    lines = '{"step": 0, "loss": 1.5}\n{"step": 0, "eval_loss": 9}\n{"step": 1, "loss": NaN, "grad_norm": "inf"}\n'
    (run,) = read(write(tmp_path, "log.jsonl", lines))
    assert run.name == "log"
    assert values(run)[0] == (0, 1.5, None)
    assert run.signs[1].loss is not None
    assert math.isnan(run.signs[1].loss)
    assert run.signs[1].grad_norm == math.inf


def test_json_lines_of_several_runs(tmp_path):
    rows = [{"run": run, "step": step, "loss": run + step} for step in range(3) for run in (1, 2)]
    one, two = read(write(tmp_path, "log.jsonl.gz", "\n".join(map(json.dumps, rows))))
    assert (one.name, two.name) == ("1", "2")
    assert [signs.loss for signs in two.signs] == [2, 3, 4]


def test_trainer_state(tmp_path):
    state = {
        "global_step": 30,
        "log_history": [
            {"epoch": 0.1, "grad_norm": 1.25, "learning_rate": 5e-5, "loss": 2.5, "step": 10},
            {"epoch": 0.1, "eval_loss": 2.0, "step": 10},
            {"epoch": 0.2, "grad_norm": math.nan, "loss": 0.0, "step": 20},
            {"train_loss": 1.0, "train_runtime": 3.0, "step": 20},
        ],
    }
    (run,) = read(write(tmp_path, "trainer_state.json", json.dumps(state, indent=2)))
    assert run.name == "trainer_state"
    assert [(signs.step, signs.loss) for signs in run.signs] == [(10, 2.5), (20, 0.0)]
    assert run.signs[0].grad_norm == 1.25


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.csv", "", "line 1: no column 'step'"),
        ("a.csv", "step,value\n0,1\n", "line 1: no column 'loss' in the header, which has step, value"),
        ("a.csv", "step,loss\n", "no step with a loss"),
        ("a.csv", "step,loss\n1,\n2,\n", "no step with a loss"),
        ("a.csv", "step,loss\n0,1\n1,abc\n", "line 3: loss is 'abc', expected a number"),
        ("a.csv", "step,loss\n0,1\n1.5,1\n", "line 3: step is '1.5', expected a whole number"),
        ("a.csv", "step,loss\n0,1\nnan,1\n", "line 3: step is 'nan', expected a whole number"),
        ("a.csv", "step,loss\n0,1\n,1\n", "line 3: step is '', expected a whole number"),
        ("a.csv", "step,loss\n0,1\n1,1,1\n", "line 3: 3 columns, expected the 2 of the header"),
        ("a.csv", "step,loss\n5,1\n5,1\n", "line 3: step 5 after step 5, expected a later one"),
        ("a.csv", "step,loss,grad_norm\n0,1,x\n", "line 2: grad_norm is 'x', expected a number"),
        ("a.csv", "step,loss\n0,1_0\n", "line 2: loss is '1_0'"),
        ("a.csv", 'step,loss\n0,"1\n', "not CSV"),
        ("a.csv", b"step,loss\n0,1\n1,\xff\n", "line 3: not text in UTF-8"),
        ("a.jsonl", '{"step": 0, "loss": 1}\n{"step": 1, "loss"\n', "line 2: not JSON"),
        ("a.jsonl", '{"step": 0, "loss": 1}\n[1]\n', "line 2: '[1]', expected an object"),
        ("a.jsonl", '{"step": 0, "loss": 1}\n{"loss": 1}\n', "line 2: step is None"),
        ("a.jsonl", '{"step": true, "loss": 1}\n', "line 1: step is True"),
        ("a.jsonl", '{"step": 0, "loss": [1]}\n', "line 1: loss is [1]"),
        ("a.json", '{"log_history": {}}', "log_history is no list"),
        ("a.json", '{"log_history": [3]}', "log_history[0]: 3, expected an object"),
        ("a.json", '{"log_history": [{"loss": "x", "step": 1}]}', "log_history[0]: loss is 'x'"),
        ("a.json", '{"log_history": []}', "no step with a loss"),
    ],
)
def test_a_malformed_file_is_told_in_one_line(tmp_path, name, text, told):
    path = write(tmp_path, name, text)
    with pytest.raises(UnreadableRecord) as caught:
        read(path)
    assert told in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_damaged_gzip_and_missing_files(tmp_path):
    whole = gzip.compress(b"step,loss\n" + b"1,2\n" * 999)
    for data in (whole[:-9], b"\x1f\x8bnot gzip"):
        (tmp_path / "a.csv.gz").write_bytes(data)
        with pytest.raises(UnreadableRecord, match="damaged gzip"):
            read(tmp_path / "a.csv.gz")
    for name in ("no.csv", "events.out.tfevents.1"):
        with pytest.raises(UnreadableRecord, match="no such file"):
            read(tmp_path / name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("any")


@settings(max_examples=40)
@given(st.binary(max_size=200))
def test_any_bytes_are_runs_or_an_error_of_one_line(folder, data):
    path = folder / "file.csv"
    for content in (data, b"step,loss\n" + data, b'{"step": 0, "loss": 1}\n' + data):
        path.write_bytes(content)
        try:
            runs, told = read(path), ""
        except UnreadableRecord as error:
            runs, told = [], str(error)
        assert all(run.signs for run in runs)
        assert bool(runs) != (len(told.splitlines()) == 1)


# ---------------------------------------------------------------- TensorBoard


def write_events(folder, scalars):
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(folder))
    for tag, step, value in scalars:
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
        writer.add_event(Event(wall_time=float(step), step=step, summary=summary))
    writer.close()
    (path,) = folder.glob("*tfevents*")
    return path


def test_tensorboard_events(tmp_path):
    scalars = [("train/loss", step, 2.0 - step / 64) for step in range(64)]
    scalars += [("train/grad_norm", step, math.nan if step == 9 else 1.5) for step in range(0, 64, 3)]
    scalars += [("eval/loss", 60, 9.0)]
    path = write_events(tmp_path, scalars)
    for place in (path, tmp_path):  # the file, and its folder
        (run,) = read(place)
        assert run.name == place.name
        assert [(signs.step, signs.loss) for signs in run.signs] == [(step, 2.0 - step / 64) for step in range(64)]
        assert [signs.grad_norm for signs in run.signs[:4]][:3] == [1.5, None, None]
        assert run.signs[9].grad_norm is not None
        assert math.isnan(run.signs[9].grad_norm)


def test_tensorboard_without_a_clear_loss(tmp_path):
    path = write_events(tmp_path, [("policy_loss", 0, 1.0), ("value_loss", 0, 1.0), ("lr", 0, 1.0)])
    with pytest.raises(UnreadableRecord, match="found lr, policy_loss, value_loss"):
        read(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnreadableRecord, match="no scalar in it"):
        read(tmp_path / "empty")


def test_without_the_package_the_fix_is_one_line(tmp_path, monkeypatch):
    import sys

    for name in ("tensorboard", "tensorboard.backend", "tensorboard.backend.event_processing"):
        monkeypatch.setitem(sys.modules, name, None)
    path = tmp_path / "events.out.tfevents.1"
    path.touch()
    with pytest.raises(UnreadableRecord, match=r"pip install 'tolaria\[tensorboard\]'"):
        events.read(path)

"""Files of recorded runs: CSV, JSON lines, Hugging Face's trainer_state.json; TensorBoard's by `events`."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from math import inf, isfinite, nan
from pathlib import Path
from typing import Any

from tolaria.recorded import events
from tolaria.recorded.records import RecordedRun, UnreadableRecord
from tolaria.records import VitalSigns

_NAMED = {
    **dict.fromkeys(("nan", "+nan", "-nan", "1.#qnan", "-1.#ind", "1.#ind", "nan(ind)", "-nan(ind)"), nan),
    **dict.fromkeys(("inf", "+inf", "infinity", "+infinity", "1.#inf"), inf),
    **dict.fromkeys(("-inf", "-infinity", "-1.#inf"), -inf),
}
_MISSING = ("", "null", "none", "na", "n/a")


def read(path: Path) -> list[RecordedRun]:
    """All runs in a file; of a folder, the one in its TensorBoard event files.

    The kind is told from name and contents: ``.gz`` is unpacked, ``tfevents`` is TensorBoard's, what begins with a
    brace is JSON (one object with ``log_history``, or one per line), all else is CSV with a header.

    Raises:
        UnreadableRecord: There is no such file, or it is malformed. Names the file and the line.
    """
    if path.is_dir() or "tfevents" in path.name:
        return [_run(path.name, path, events.read(path))]
    text = _text(path)
    if text.lstrip().startswith("{"):
        whole = _whole(text)
        if whole is not None and "log_history" in whole:
            return [_run(_stem(path), path, _log_history(path, whole["log_history"]))]
        return _grouped(path, _json_lines(path, text))
    return _grouped(path, _rows(path, text))


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
        if path.suffix == ".gz" or data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        return data.decode("utf-8-sig")
    except FileNotFoundError:
        raise UnreadableRecord(f"{path}: there is no such file") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UnreadableRecord(f"{path}, line {line}: not text in UTF-8") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UnreadableRecord(f"{path}: damaged gzip file ({error})") from None
    except OSError as error:
        raise UnreadableRecord(f"{path}: cannot be read ({error.strerror})") from None


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").rsplit(".", 1)[0]


def _run(name: str, path: Path, signs: Iterable[VitalSigns]) -> RecordedRun:
    found = tuple(signs)
    if not found:
        raise UnreadableRecord(f"{path}: no step with a loss in it")
    return RecordedRun(name, str(path), found)


# A row is where it stands ("line 7") and its values by name; the same for CSV and JSON.
_Row = tuple[str, Mapping[str, Any]]


def _rows(path: Path, text: str) -> Iterator[_Row]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [name.strip().lower() for name in next(reader, [])]
        for needed in ("step", "loss"):
            if needed not in header:
                seen = ", ".join(header)[:80] or "nothing"
                raise UnreadableRecord(f"{path}, line 1: no column {needed!r} in the header, which has {seen}")
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(header):
                raise UnreadableRecord(
                    f"{path}, line {reader.line_num}: {len(cells)} columns, expected the {len(header)} of the header"
                )
            yield f"line {reader.line_num}", dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise UnreadableRecord(f"{path}, line {reader.line_num}: not CSV ({error})") from None


def _whole(text: str) -> dict[str, Any] | None:
    """The object that all of the text is, if it is one."""
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _json_lines(path: Path, text: str) -> Iterator[_Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UnreadableRecord(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(value, dict):
            raise UnreadableRecord(
                f"{path}, line {number}: {line.strip()[:40]!r}, expected an object with step and loss"
            )
        if "loss" in value or "grad_norm" in value:  # others belong to evaluations and the like
            yield f"line {number}", value


def _log_history(path: Path, history: Any) -> Iterator[VitalSigns]:
    if not isinstance(history, list):
        raise UnreadableRecord(f"{path}: log_history is no list")
    last: int | None = None
    for number, entry in enumerate(history):
        where = f"log_history[{number}]"
        if not isinstance(entry, dict):
            raise UnreadableRecord(f"{path}, {where}: {entry!r:.40}, expected an object")
        if "loss" in entry:
            last, signs = _signs(path, (where, entry), last)
            yield signs


def _grouped(path: Path, rows: Iterable[_Row]) -> list[RecordedRun]:
    """Rows by their ``run``, in the order in which the runs begin."""
    runs: dict[str, list[VitalSigns]] = {}
    for where, row in rows:
        given = row.get("run")
        name = _stem(path) if given is None else str(given).strip()
        signs = runs.setdefault(name, [])
        signs.append(_signs(path, (where, row), signs[-1].step if signs else None)[1])
    if all(each.loss is None and each.grad_norm is None for signs in runs.values() for each in signs):
        raise UnreadableRecord(f"{path}: no step with a loss in it")
    return [_run(name, path, signs) for name, signs in runs.items()]


def _signs(path: Path, row: _Row, last: int | None) -> tuple[int, VitalSigns]:
    where, values = row
    step = _number(path, where, "step", values.get("step"))
    if step is None or not isfinite(step) or step != int(step):
        raise UnreadableRecord(f"{path}, {where}: step is {values.get('step')!r:.40}, expected a whole number")
    if last is not None and step <= last:
        raise UnreadableRecord(
            f"{path}, {where}: step {int(step)} after step {last}, expected a later one "
            "(several runs in one file need a column 'run')"
        )
    loss, norm = (_number(path, where, name, values.get(name)) for name in ("loss", "grad_norm"))
    return int(step), VitalSigns(step=int(step), loss=loss, grad_norm=norm)


def _number(path: Path, where: str, name: str, value: Any) -> float | None:
    """A number in any of the usual spellings; None where it is missing."""
    if value is None:
        return None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:  # of a whole number beyond the range of floats
            return inf if value > 0 else -inf
    word = value.strip().lower() if isinstance(value, str) else None
    if word in _MISSING:
        return None
    if word in _NAMED:
        return _NAMED[word]
    try:
        if word is not None and "_" not in word:
            return float(word)
    except ValueError:
        pass
    raise UnreadableRecord(f"{path}, {where}: {name} is {value!r:.40}, expected a number")

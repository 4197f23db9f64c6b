"""The package that users get: everything in it, nothing else, and it imports from where it is."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "tolaria"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from this tree with the build tools that are installed here."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*build, "--wheel-dir", folder, ROOT], capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def metadata(wheel: Path, names: set[str]) -> Message:
    (path,) = (name for name in names if name.endswith(".dist-info/METADATA"))
    with zipfile.ZipFile(wheel) as archive:
        return Parser().parsestr(archive.read(path).decode())


def test_holds_the_package_and_nothing_else(names: set[str]) -> None:
    expected = {path.relative_to(PACKAGE.parent).as_posix() for path in PACKAGE.rglob("*.py")} | {"tolaria/py.typed"}
    assert {name for name in names if ".dist-info/" not in name} == expected


@pytest.mark.parametrize("file", ["LICENSE", "NOTICE"])
def test_holds_the_licence(wheel: Path, names: set[str], file: str) -> None:
    (path,) = (name for name in names if name.endswith(f".dist-info/licenses/{file}"))
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read(path) == (ROOT / file).read_bytes()


def test_metadata(metadata: Message) -> None:
    assert metadata["Name"] == "tolaria"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"


def test_needs_four_packages_and_caps_none(metadata: Message) -> None:
    needed = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert sorted(line.partition(">=")[0] for line in needed) == ["rich", "torch", "tyro", "xxhash"]
    assert not [line for line in needed if "<" in line or "==" in line]


def test_imports_from_the_wheel(wheel: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import tolaria; print(tolaria.__file__);"
        "[getattr(tolaria, name) for name in tolaria.__all__]"
    )
    done = subprocess.run([sys.executable, "-c", code, wheel], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(wheel)


def test_pytest_finds_the_fixtures_in_it(wheel: Path, tmp_path: Path) -> None:
    """And a run that uses none of them is the same, also where tolaria was imported before pytest began."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "test_it.py").write_text(
        "import sys\n"
        "def test_nothing(): assert 'torch' not in sys.modules\n"
        "def test_held(tolaria_thread_gate): assert not tolaria_thread_gate.is_open\n"
    )
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import tolaria, pytest; print(tolaria.__file__);"
        "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', '-W', 'error', '--rootdir', '.']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "site"], cwd=tests, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout
    assert Path(done.stdout.splitlines()[0]).is_relative_to(tmp_path)

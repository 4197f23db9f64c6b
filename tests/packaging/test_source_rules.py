"""Rules of the source tree that no linter knows. Each check has a test that it bites."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "tolaria"
SOURCES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}

MAX_LINES = 500
DISTRIBUTED = "coordinate.py"
MEASURED = "bench/peers/dcp.py"
"""Times torch.distributed's own checkpoints beside ours; uses nothing of it."""
TERMINAL = ("bench/", "cli.py", "__main__.py", "doctor.py", "drill.py", "drill/", "recorded/", "testing/verify.py")
"""The edges that talk to a person; all other files are core."""


def is_core(name: str) -> bool:
    return not name.startswith(TERMINAL)


def mentions_of_distributed(source: str) -> Iterator[str]:
    """Every place that reaches `torch.distributed`, in any spelling that needs no string tricks."""
    tree = ast.parse(source)
    names_of_torch = {"torch"} | {
        alias.asname
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name == "torch" and alias.asname
    }
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                found = [a.name for a in names if a.name.startswith("torch.distributed")]
            case ast.ImportFrom(module=str(module), names=names):
                found = [module] if module.startswith("torch.distributed") else []
                found += [f"{module}.{a.name}" for a in names if module == "torch" and a.name == "distributed"]
            case ast.Attribute(value=ast.Name(id=owner), attr="distributed") if owner in names_of_torch:
                found = [f"{owner}.distributed"]
            case _:
                continue
        yield from (f"line {node.lineno}: {name}" for name in found)


def prints(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and node.id == "print":
            yield f"line {node.lineno}: print"


def test_the_tree_is_found() -> None:
    assert {"__init__.py", "errors.py", "governor.py", "cli.py", DISTRIBUTED} <= set(SOURCES)
    assert (PACKAGE / "py.typed").is_file()


@pytest.mark.parametrize("name", SOURCES)
def test_file_is_short(name: str) -> None:
    lines = len(SOURCES[name].read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{name} has {lines} lines: split it"


@pytest.mark.parametrize("name", [name for name in SOURCES if name not in (DISTRIBUTED, MEASURED)])
def test_torch_distributed_stays_in_one_file(name: str) -> None:
    assert list(mentions_of_distributed(SOURCES[name].read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("name", [name for name in SOURCES if is_core(name)])
def test_core_does_not_print(name: str) -> None:
    assert list(prints(SOURCES[name].read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch.distributed",
        "import torch.distributed.tensor as dt",
        "from torch.distributed import get_rank",
        "from torch.distributed.tensor import DTensor",
        "from torch import nn, distributed",
        "import torch\ndef f(): return torch.distributed.is_initialized()",
        "import torch as t\nt.distributed.barrier()",
    ],
)
def test_each_mention_of_distributed_is_seen(source: str) -> None:
    assert len(list(mentions_of_distributed(source))) == 1


@pytest.mark.parametrize("source", ["import torch", "x.distributed", "'torch.distributed'", "from torch import nn"])
def test_other_code_is_no_mention_of_distributed(source: str) -> None:
    assert list(mentions_of_distributed(source)) == []


def test_each_print_is_seen() -> None:
    assert len(list(prints("print('x')\nwrite = print\ndef f():\n    print()"))) == 3
    assert list(prints("'print'\nx.print()\npprint(1)")) == []

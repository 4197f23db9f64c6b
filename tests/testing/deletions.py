"""Lines of the source that implement an edge, and what notices that one is gone.

`test_deletions` takes those away that the model checker notices, each in a copy of the source and a process of its own.
`scripts/delete_edges` takes all of them away and runs the tests named here.
"""

from __future__ import annotations

import shutil
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Explores one program of the catalog with whatever source is on the path, and prints what it found.
EXPLORE = """
import sys
from tolaria.testing import checks
(check,) = (c for c in checks.programs() if c.title == sys.argv[1])
print("violation:", check.explore(deadline=None).violation)
"""


@dataclass(frozen=True)
class Deletion:
    """One line (or two that are one) taken away.

    Attributes:
        name: The edge.
        file: Below src/tolaria.
        old: What is taken away. Occurs once.
        new: What is left in its place.
        program: The program of the catalog, with its barrier, that is not sound without it; empty: the checker does not
            see this line.
        tests: What to run where the checker does not see it.
    """

    name: str
    file: str
    old: str
    new: str = ""
    program: str = ""
    tests: str = ""

    def apply(self, source: Path) -> None:
        """Take it away from a copy of src/tolaria."""
        path = source / self.file
        text = path.read_text(encoding="utf-8")
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: {self.file} holds the line {text.count(self.old)} times, expected once")
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")


def copy_of_the_source(folder: Path) -> Path:
    """A copy of src/tolaria below `folder`, which then goes on the path."""
    target = folder / "tolaria"
    shutil.copytree(ROOT / "src" / "tolaria", target, ignore=shutil.ignore_patterns("__pycache__"))
    return target


DELETIONS = [
    Deletion(**entry) for entry in tomllib.loads((Path(__file__).with_suffix(".toml")).read_text())["deletion"]
]

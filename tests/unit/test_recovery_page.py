"""docs/recovery.md names every field of what it documents, with its default, and nothing else."""

import re
from dataclasses import fields
from pathlib import Path

from tolaria import Incident, Recovery

PAGE = (Path(__file__).parents[2] / "docs" / "recovery.md").read_text(encoding="utf-8")


def table(heading):
    """Rows of the first table after a heading, as cells."""
    section = PAGE.split(f"\n## {heading}\n", 1)[1]
    lines = section[section.index("\n|") + 1 :].split("\n\n", 1)[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_every_policy_with_its_default():
    documented = {}
    for names, defaults, *_ in table("The policies"):
        names, defaults = re.findall(r"`(\w+)`", names), [each.strip(" `") for each in defaults.split(",")]
        documented.update(zip(names, defaults, strict=True))
    written = {
        field.name: str(field.default).join('""' if isinstance(field.default, str) else ("", ""))
        for field in fields(Recovery)
    }
    assert documented == written


def test_every_field_of_the_ledger():
    documented = [re.fullmatch(r"`(\w+)`", row[0])[1] for row in table("The ledger")]
    assert sorted(documented) == sorted(["schema_version", *(field.name for field in fields(Incident))])

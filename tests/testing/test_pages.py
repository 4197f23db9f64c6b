"""The page for others: its code runs as it stands, and finds what the page says."""

import re
from pathlib import Path

from tolaria.testing.timeline import draw

PAGE = Path(__file__).parents[2] / "docs" / "testing.md"


def test_the_worked_example(capsys):
    page = PAGE.read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    (printed,) = re.findall(r"```text\n(.*?)```", page, re.DOTALL)
    names = {}
    exec(compile(code, str(PAGE), "exec"), names)
    out = capsys.readouterr().out
    assert printed.strip() in out
    assert "missing: A does not wait for R" in out
    assert draw(names["found"].steps) in out
    assert names["racy"].violation.startswith("torn")

"""What an installation adds to one of torch."""

import re
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path

from packaging.markers import Marker

MOST_BYTES = 25 * 2**20


def closure(name: str) -> set[str]:
    """A distribution and everything it requires on this machine, without extras."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        one = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if one in found:
            continue
        found.add(one)
        for requirement in distribution(one).requires or ():
            needed, _, marker = requirement.partition(";")
            if "extra ==" in marker or not _applies(marker):
                continue
            waiting.append(re.split(r"[^\w.-]", needed.strip())[0])
    return found


def _applies(marker: str) -> bool:
    """Markers of the few kinds that occur: what is not installed was not needed here."""
    return not marker.strip() or Marker(marker).evaluate()


def size(name: str) -> int:
    """Bytes of an installed distribution; of this one the package itself, since it may be installed editable."""
    if name == "tolaria":
        found = find_spec("tolaria")
        assert found is not None
        assert found.origin is not None
        return sum(path.stat().st_size for path in Path(found.origin).parent.rglob("*.py"))
    paths = (Path(str(file.locate())) for file in distribution(name).files or ())
    return sum(path.stat().st_size for path in paths if path.is_file())


def test_the_footprint_beside_torch_is_small():
    added = closure("tolaria") - closure("torch")
    assert {"tolaria", "xxhash", "tyro", "rich"} <= added
    assert "numpy" not in added
    total = {name: size(name) for name in sorted(added)}
    assert sum(total.values()) <= MOST_BYTES, total

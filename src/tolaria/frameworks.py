"""What all adapters ask before anything else: is the framework there, and in a version they were tested with?"""

from __future__ import annotations

import importlib.metadata

from tolaria.errors import UnsupportedState, UsageError


def require(packages: tuple[str, ...], tested: tuple[str, ...], extra: str) -> None:
    """Refuse a missing or an untested framework, with a one-line fix.

    Args:
        packages: Distributions, any of which will do; all that are installed must be of a tested version.
        tested: Beginnings of version numbers, for example ``"2.6"``.
        extra: The extra of tolaria that installs one.

    Raises:
        UsageError: None of the packages is installed.
        UnsupportedState: One is of another version.
    """
    found = {name: version for name in packages if (version := _version(name)) is not None}
    if not found:
        raise UsageError(
            f"loading tolaria.{extra}",
            f"none of {', '.join(packages)} is installed",
            f"Run: pip install 'tolaria[{extra}]'",
        )
    for name, version in found.items():
        if not any(version == known or version.startswith(f"{known}.") for known in tested):
            raise UnsupportedState(
                f"loading tolaria.{extra}",
                f"{name} {version} is installed; tested are {', '.join(f'{known}.*' for known in tested)}",
                f"Run: pip install '{name}=={tested[-1]}.*'",
            )


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None

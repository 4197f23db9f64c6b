"""The Transformers `Trainer` under guard: `TolariaCallback`, with `set_trainer`. See docs/transformers.md."""

from __future__ import annotations

from tolaria.frameworks import require

require(("transformers",), ("5.22", "5.23"), "transformers")

from tolaria.transformers.callback import TolariaCallback  # noqa: E402  only after the version is known

__all__ = ["TolariaCallback"]

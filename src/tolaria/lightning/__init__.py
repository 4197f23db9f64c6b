"""Lightning under guard: `Trainer(callbacks=[TolariaCallback()])`. See docs/lightning.md."""

from __future__ import annotations

from tolaria.frameworks import require

require(("lightning", "pytorch-lightning"), ("2.5", "2.6"), "lightning")

from tolaria.lightning.callback import TolariaCallback  # noqa: E402  only after the version is known

__all__ = ["TolariaCallback"]

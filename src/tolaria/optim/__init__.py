"""Optimizers whose step leaves the whole state before it behind: a snapshot every step, for less than a copy.

`AdamW` and `SGD` take the place of torch's own. See docs/optim.md.
"""

from tolaria.optim.adamw import AdamW
from tolaria.optim.past import Kept
from tolaria.optim.sgd import SGD

__all__ = ["SGD", "AdamW", "Kept"]

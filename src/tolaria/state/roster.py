"""ROSTER: the parameters of a train state, found once and proven each step.

Finding them walks the whole model in Python. A roster holds the containers that were walked, and compares what is in
them by identity, in a few calls of C.
"""

from __future__ import annotations

import itertools
import operator
from collections import OrderedDict
from collections.abc import Sequence

from torch import nn
from torch.nn.parameter import is_lazy

from tolaria.state.imprint import Contents, Unfit
from tolaria.state.parts import ModulePart, OptimizerPart, StatePart
from tolaria.state.standing import holds_an_optimizer, walks_plainly

Parameters = list[nn.Parameter]

_flat = itertools.chain.from_iterable
_TABLES = (operator.attrgetter("_parameters"), operator.attrgetter("_modules"))


def find(parts: Sequence[StatePart]) -> tuple[Parameters, Parameters]:
    """Every parameter of the parts once; and those that ought to be finite: all but constants such as masks of -inf.

    Parameters of lazy modules that wait for their first batch are only among the former.
    """
    constants = {id(parameter) for part in parts for parameter in part.constants()}
    everything = list({id(parameter): parameter for part in parts for parameter in part.parameters()}.values())
    return everything, [p for p in everything if id(p) not in constants and not is_lazy(p)]


class Roster:
    """What `find` has answered, and whether it would answer that again.

    Args:
        parts: Of the train state.

    Attributes:
        found: The answer. Not to be changed.

    Raises:
        Unfit: Something has a way of its own to say what is in it, or waits for its first batch.
    """

    def __init__(self, parts: Sequence[StatePart]) -> None:
        self.found = find(parts)
        if any(map(is_lazy, self.found[0])):
            raise Unfit
        self._parts = list(parts)
        own = [part for part in parts if isinstance(part, ModulePart)]
        self._modules = [module for part in own for module in part.module.modules()]
        if not all(map(walks_plainly, self._modules)):
            raise Unfit
        self._tables = [list(map(table, self._modules)) for table in _TABLES]
        self._known = [(part, len(part.known)) for part in own]
        self._optimizers = [part.optimizer for part in parts if isinstance(part, OptimizerPart)]
        if any(map(holds_an_optimizer, self._optimizers)):
            raise Unfit  # one around another, which may be exchanged
        self._groups = [optimizer.param_groups for optimizer in self._optimizers]
        self._members = self._lists()
        self._lists_stand = Contents([*self._groups, *self._members])
        self._dicts = [*self._tables[0], *self._tables[1]]
        if any(type(table) not in (dict, OrderedDict) for table in self._dicts):
            raise Unfit
        self._sizes = list(map(len, self._dicts))
        self._filled = [table for table in self._dicts if table]
        self._values = list(_flat(map(dict.values, self._filled)))
        # constants are known by their names
        self._keys = list(_flat(self._filled)) if len(self.found[0]) != len(self.found[1]) else None

    def _lists(self) -> list[Parameters]:
        return [group["params"] for groups in self._groups for group in groups]

    def stands(self, parts: Sequence[StatePart]) -> bool:
        """Whether `find` would answer the same for these parts."""
        return (
            len(parts) == len(self._parts)
            and all(
                all(map(operator.is_, map(table, self._modules), noted))
                for table, noted in zip(_TABLES, self._tables, strict=True)
            )
            and all(map(operator.is_, (optimizer.param_groups for optimizer in self._optimizers), self._groups))
            and list(map(len, self._dicts)) == self._sizes
            and all(map(operator.is_, _flat(map(dict.values, self._filled)), self._values))
            and (self._keys is None or list(_flat(self._filled)) == self._keys)
            and self._lists_stand.stand()
            and all(map(operator.is_, self._lists(), self._members))
            and not any(map(holds_an_optimizer, self._optimizers))
            and all(len(part.known) == count for part, count in self._known)
        )

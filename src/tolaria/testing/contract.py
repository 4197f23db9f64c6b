"""What a conformance check finds: which sentences of a contract an implementation breaks."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping
from dataclasses import dataclass

from tolaria.errors import TolariaError


@dataclass(frozen=True, slots=True)
class Breach:
    """One sentence that does not hold.

    Attributes:
        rule: Its short name, stable.
        sentence: As it stands in the contract.
        seen: What was seen instead.
    """

    rule: str
    sentence: str
    seen: str


class ContractBroken(TolariaError, AssertionError):
    """An implementation does not keep its contract. A failed assertion to whatever runs the tests.

    Attributes:
        breaches: Every sentence that was broken, in the order of the contract.
    """

    _state_sentence = "No train state was touched."

    def __init__(self, doing: str, breaches: tuple[Breach, ...], advice: str) -> None:
        self.breaches = breaches
        listed = "".join(f"\n  {one.rule}: {one.sentence}\n    seen: {one.seen}" for one in breaches)
        super().__init__(doing, f"{len(breaches)} broken{listed}\n", advice)

    def __reduce__(self) -> tuple[type[ContractBroken], tuple[str, tuple[Breach, ...], str]]:  # type: ignore[override]
        return type(self), (self.doing, self.breaches, self.advice)

    @property
    def rules(self) -> tuple[str, ...]:
        """Short names of the sentences that were broken."""
        return tuple(one.rule for one in self.breaches)


class Examination:
    """Takes down breaches, at most one for each rule: the first that is seen.

    Args:
        doing: What is examined; the beginning of the error's message.
        rules: Short name -> sentence.
        advice: What the reader can do; the end of the message.
    """

    def __init__(self, doing: str, rules: Mapping[str, str], advice: str) -> None:
        self._doing, self._rules, self._advice = doing, rules, advice
        self._found: dict[str, Breach] = {}

    def expect(self, rule: str, holds: bool, seen: str) -> bool:
        """One observation. Answers whether it holds."""
        if not holds:
            self._found.setdefault(rule, Breach(rule, self._rules[rule], seen))
        return holds

    @contextlib.contextmanager
    def trying(self, rule: str) -> Generator[None]:
        """An exception inside is a breach of that rule."""
        try:
            yield
        except Exception as error:
            self.expect(rule, False, f"{type(error).__name__}: {error}")

    def conclude(self) -> None:
        """Raise if anything was found.

        Raises:
            ContractBroken: With every breach.
        """
        if self._found:
            breaches = tuple(self._found[rule] for rule in self._rules if rule in self._found)
            raise ContractBroken(self._doing, breaches, self._advice)

"""Whether a detector keeps the contract of `tolaria.judge`: for detectors of your own.

    check_detector(my_detector(), panics_on=("loss stays high",))

in a test says by name which sentence is broken. Plain host numbers; no device, no thread.
"""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import Any

from tolaria.errors import InvalidConfig
from tolaria.judge import Detector, state_from_json
from tolaria.records import Health, Verdict, VitalSigns
from tolaria.testing import curves
from tolaria.testing.contract import Examination

NAN, INF = math.nan, math.inf

RULES: Mapping[str, str] = {
    "answers": "`update` answers a state and a `Verdict` for any signs, missing, huge and not finite ones included.",
    "values": "A state is a value: nested tuples of plain floats, ints, bools, strings and None.",
    "finite state": "NaN and infinities never enter a state.",
    "pure": "Equal arguments give equal results, also when other runs are judged in between.",
    "arguments": "`update` changes neither the state nor the signs that it is given.",
    "pickle": "A state that was pickled goes on as if it had not been.",
    "json": "A state that went through `json` and `state_from_json` goes on as if it had not.",
    "step": "A verdict names the step that was judged.",
    "onset": "A verdict that is not healthy has a reason, and an onset not after its step; a healthy one neither.",
    "evidence": "Evidence is numbers by name, and `json` can write it.",
    "missing": "Without any sign nothing is learnt: the state of a healthy run stays as it is.",
    "not finite": "Losses that are not finite do not blind it: it panics behind them where it does without.",
    "healthy": "No panic on a healthy run.",
    "one panic": "An episode has one panic; then it is suspect until the signs are normal again.",
    "panics": "What it is there for panics.",
}
"""The contract, sentence by sentence."""

STEPS = 600
"""Of each healthy run, unless told otherwise."""

_SPLICE = 250  # a damaged run is healthy until here
_TAIL = 60


def _signs(step: int, loss: float | None, draw: Random) -> VitalSigns:
    """A healthy step with that loss: every other sign is there, and calm."""
    grown = 1.0 - math.exp(-step / 200)
    extra = {
        "update_ratio": 1e-3 * math.exp(draw.gauss(0.0, 0.1)),
        "approx_kl": 0.01 * math.exp(draw.gauss(0.0, 0.4)),
        "entropy": (1.5 - 0.3 * grown) * math.exp(draw.gauss(0.0, 0.02)),
    }
    return VitalSigns(
        step=step,
        loss=loss,
        grad_norm=math.exp(draw.gauss(0.0, 0.3)),
        nonfinite_weights=0,
        metric=100.0 * grown + draw.gauss(0.0, 3.0),
        extra=extra,
    )


def _learning(draw: Random, steps: int) -> list[float]:
    return [0.2 + 2.1 * math.exp(-i / 80) + draw.gauss(0.0, 0.04) for i in range(steps)]


def _level(draw: Random, steps: int) -> list[float]:
    return [2.0 + draw.gauss(0.0, 0.05) for _ in range(steps)]


def _with_outliers(draw: Random, steps: int) -> list[float]:
    return [loss * (8.0 if i % 97 == 96 else 1.0) for i, loss in enumerate(_learning(draw, steps))]


def healthy_runs(seed: int = 0, steps: int = STEPS) -> Iterator[tuple[str, list[VitalSigns]]]:
    """Runs that nothing is wrong with, by name: calm ones, and every made curve with awkward noise."""
    plain: dict[str, Callable[[Random, int], list[float]]] = {
        "a calm decay": _learning,
        "a level": _level,
        "a constant": lambda _, n: [1.0] * n,
        "single outliers": _with_outliers,
    }
    for name, make in {**plain, **curves.STRESS}.items():
        draw = Random(f"{seed}/{name}")
        losses = make(draw, steps)
        yield name, [_signs(step, loss, draw) for step, loss in enumerate(losses, 1)]


def damaged_runs(seed: int = 0) -> dict[str, list[VitalSigns]]:
    """Runs that something happens to, by name: what `panics_on` may list. The damage begins behind step 250."""

    def run(name: str, **later: Any) -> list[VitalSigns]:
        draw = Random(f"{seed}/{name}")
        signs = [_signs(step, loss, draw) for step, loss in enumerate(_learning(draw, _SPLICE + _TAIL), 1)]
        return [*signs[:_SPLICE], *(_changed(one, later) for one in signs[_SPLICE:])]

    return {
        "loss is not finite": run("a", loss=NAN),
        "gradients are not finite": run("b", nonfinite_gradients=3),
        "weights are not finite": run("c", nonfinite_weights=2),
        "metric is not finite": run("d", metric=INF),
        "loss stays high": run("e", loss=6.0),
        "loss is back where it began": run("f", loss=2.3),
        "gradients explode": run("g", grad_norm=1e6),
        "updates jump": run("h", extra={"update_ratio": 10.0}),
        "policy runs away": run("i", extra={"approx_kl": 50.0}),
        "entropy dies": run("j", extra={"entropy": 1e-4}),
        "reward is lost": run("k", metric=0.0),
    }


def _changed(signs: VitalSigns, later: Mapping[str, Any]) -> VitalSigns:
    fields: dict[str, Any] = {**later, "extra": {**signs.extra, **later.get("extra", {})}}
    return replace(signs, **fields)


def _odd_signs() -> list[VitalSigns]:
    """Legal, and hostile."""
    values = (None, NAN, INF, -INF, 0.0, -0.0, 1e308, -1e308, 5e-324, -1.0)
    extras: list[dict[str, float]] = [{name: value} for value in values if value is not None for name in _EXTRA]
    odd: list[dict[str, Any]] = [{"loss": v} for v in values]
    odd += [{"loss": 1.0, "grad_norm": v} for v in values] + [{"metric": v} for v in values]
    odd += [{"extra": extra} for extra in extras] + [{"nonfinite_gradients": 7}, {"nonfinite_weights": 7}]
    return [VitalSigns(step=step, **fields) for step, fields in enumerate(odd, 1)]


_EXTRA = ("update_ratio", "approx_kl", "entropy")


def check_detector(
    detector: Detector[Any], *, panics_on: Collection[str] = (), seed: int = 0, steps: int = STEPS
) -> None:
    """Judge made runs with a detector, and look whether it keeps every sentence of `RULES`.

    Args:
        detector: What `tolaria.judge` calls one: `init` and `update`.
        panics_on: What it is there for: names of `damaged_runs`, each of which it has to panic on, not before the
            damage. Empty: nothing is demanded of it, which a detector without a use would pass.
        seed: Of the runs.
        steps: Of each healthy run; 300 or more.

    Raises:
        ContractBroken: One or more sentences do not hold; `rules` has their names.
        InvalidConfig: `panics_on` names a run that there is not.
    """
    damaged = damaged_runs(seed)
    if unknown := sorted(set(panics_on) - set(damaged)):
        raise InvalidConfig(
            "checking a detector", f"panics_on names {unknown}, expected some of {list(damaged)}", "Correct the names."
        )
    look = _Look(detector)
    look.at_odd_signs(damaged["loss stays high"][:50])
    for name, run in healthy_runs(seed, steps):
        verdicts = look.judge(name, run)
        panics = [one.step for one in verdicts if one.health is Health.PANIC]
        look.examination.expect("healthy", not panics, f"{name}: panic at step {panics[:1]} of {len(run)}")
    calm = next(healthy_runs(seed, 320))[1]
    look.at_values(calm[:200], damaged)
    look.at_nothing(calm)
    look.at_not_finite({name: damaged[name] for name in panics_on or ("loss stays high",)})
    for name, run in damaged.items():
        verdicts = look.judge(name, run)
        panics = [one.step for one in verdicts if one.health is Health.PANIC]
        look.examination.expect("one panic", _is_one_panic(verdicts), f"{name}: panics at steps {panics}")
        if name in panics_on:
            seen = f"{name}: panics at steps {panics}, expected after step {_SPLICE}"
            look.examination.expect("panics", bool(panics) and panics[0] > _SPLICE, seen)
    look.examination.conclude()


def _is_one_panic(verdicts: Sequence[Verdict]) -> bool:
    """Between two panics there is a healthy step."""
    since_healthy = 0
    for one in verdicts:
        since_healthy = 0 if one.health is Health.HEALTHY else since_healthy + (one.health is Health.PANIC)
        if since_healthy > 1:
            return False
    return True


class _Look:
    """Runs a detector and takes down what is wrong."""

    def __init__(self, detector: Detector[Any]) -> None:
        self.detector = detector
        advice = "docs/testing.md has the contract of a detector; mend it or change what it is asked."
        self.examination = Examination("checking a detector against its contract", RULES, advice)

    def judge(self, name: str, run: Sequence[VitalSigns], state: Any = None) -> list[Verdict]:
        """The verdicts on a run, each looked at. Ends early where `update` fails."""
        verdicts: list[Verdict] = []
        state = self.detector.init() if state is None else state
        for signs in run:
            step = self.step(name, state, signs)
            if step is None:
                break
            state, verdict = step
            verdicts.append(verdict)
        return verdicts

    def step(self, name: str, state: Any, signs: VitalSigns) -> tuple[Any, Verdict] | None:
        """One step; None where there is no answer."""
        expect, where = self.examination.expect, f"{name}, step {signs.step}"
        try:
            after, verdict = self.detector.update(state, signs)
        except Exception as error:
            expect("answers", False, f"{where}: {type(error).__name__}: {error}")
            return None
        if not isinstance(verdict, Verdict):
            expect("answers", False, f"{where}: {verdict!r}")
            return None
        expect("step", verdict.step == signs.step, f"{where}: the verdict says {verdict.step}")
        self._look_at_verdict(where, verdict)
        return after, verdict

    def _look_at_verdict(self, where: str, verdict: Verdict) -> None:
        if verdict.health is Health.HEALTHY:
            known = verdict.onset is None and not verdict.reason
        else:
            known = verdict.onset is not None and verdict.onset <= verdict.step and bool(verdict.reason)
        if not known:
            self.examination.expect("onset", False, f"{where}: {verdict}")
        if verdict.evidence:
            with self.examination.trying("evidence"):
                written = json.loads(json.dumps(dict(verdict.evidence)))
                plain = all(type(value) in (int, float) for value in verdict.evidence.values())
                same = plain and len(written) == len(verdict.evidence)
                self.examination.expect("evidence", same, f"{where}: {verdict.evidence}")

    def at_odd_signs(self, before: Sequence[VitalSigns]) -> None:
        """Answers to hostile signs, early and late in a run, and what becomes of the state."""
        for history in ((), before):
            state = self.detector.init()
            for signs in (*history, *_odd_signs()):
                found = self.step("odd signs", state, signs)
                if found is None:
                    return
                state = found[0]
                self._look_at_state(f"behind {signs}", state)

    def _look_at_state(self, where: str, state: Any) -> None:
        for leaf in _leaves(state):
            plain = leaf is None or type(leaf) in (float, int, bool, str)
            self.examination.expect("values", plain, f"{where}: {type(leaf).__name__} {leaf!r}")
            if type(leaf) is float:
                self.examination.expect("finite state", math.isfinite(leaf), f"{where}: {leaf}")

    def at_values(self, calm: Sequence[VitalSigns], damaged: Mapping[str, Sequence[VitalSigns]]) -> None:
        """States as values: used again, compared, sent away and fetched back."""
        expect = self.examination.expect
        in_alarm = ("loss is not finite", "loss stays high", "gradients explode")
        for name, run in {"a calm decay": calm, **{name: damaged[name] for name in in_alarm}}.items():
            middle = self._after(run[:-50])
            if middle is None:
                return
            before = copy.deepcopy(middle)
            signs = [copy.deepcopy(one) for one in run[-50:]]
            first = self._trace(middle, signs)
            expect("arguments", repr(middle) == repr(before), f"{name}: {_difference([repr(before)], [repr(middle)])}")
            expect("arguments", repr(signs) == repr(list(run[-50:])), f"{name}: the signs have changed")
            self._after(damaged["loss stays high"])
            second = self._trace(before, signs)
            expect("pure", first == second, f"{name}: {_difference(first, second)}")
            with self.examination.trying("pickle"):
                third = self._trace(pickle.loads(pickle.dumps(before)), signs)
                expect("pickle", third == second, f"{name}: {_difference(second, third)}")
            with self.examination.trying("json"):
                fourth = self._trace(state_from_json(json.loads(json.dumps(before))), signs)
                expect("json", fourth == second, f"{name}: {_difference(second, fourth)}")

    def at_nothing(self, calm: Sequence[VitalSigns]) -> None:
        """Steps without any sign."""
        state = self._after(calm[:300])
        found = None if state is None else self.step("no signs", state, VitalSigns(step=301))
        if found is not None:
            after, _ = found
            seen = _difference([repr(state)], [repr(after)])
            self.examination.expect("missing", repr(after) == repr(state), seen)

    def at_not_finite(self, damaged: Mapping[str, Sequence[VitalSigns]]) -> None:
        """Runs in which some losses are not finite, well before the damage, and the same runs without those steps."""
        for name, run in damaged.items():
            with_bad: list[VitalSigns] = []
            for signs in run:
                with_bad.append(signs)
                if signs.step in (60, 120, 180):
                    with_bad.append(VitalSigns(step=signs.step, loss=(NAN, INF, -INF)[signs.step // 60 - 1]))
            plain, behind = (
                [one.step for one in self.judge(name, each) if one.is_panic and one.step > _SPLICE]
                for each in (run, with_bad)
            )
            seen = f"{name}: panics at {plain[:1]}, behind losses that are not finite at {behind[:1]}"
            self.examination.expect("not finite", bool(plain) == bool(behind), seen)

    def _after(self, run: Sequence[VitalSigns]) -> Any:
        """The state at the end; None where a step has no answer."""
        state = self.detector.init()
        for signs in run:
            found = self.step("a run", state, signs)
            if found is None:
                return None
            state = found[0]
        return state

    def _trace(self, state: Any, run: Sequence[VitalSigns]) -> list[str]:
        """Verdicts and the last state, as text: NaN equals itself there."""
        trace = []
        for signs in run:
            found = self.step("a run", state, signs)
            if found is None:
                break
            state, verdict = found
            trace.append(repr(verdict))
        return [*trace, repr(_as_tuples(state))]


def _leaves(state: Any) -> Iterator[Any]:
    if isinstance(state, tuple):
        for item in state:
            yield from _leaves(item)
    else:
        yield state


def _as_tuples(state: Any) -> Any:
    """Named tuples as plain ones: `json` forgets their names."""
    return tuple(map(_as_tuples, state)) if isinstance(state, tuple) else state


def _difference(first: Sequence[str], second: Sequence[str]) -> str:
    """Where two traces part, with a little of what stands around it."""
    for one, other in zip(first, second, strict=False):
        if one != other:
            at = max(0, next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), 0) - 40)
            return f"...{one[at : at + 80]}... and then ...{other[at : at + 80]}..."
    return f"{len(first)} answers and then {len(second)}"

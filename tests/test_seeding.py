"""Every test starts from the same random numbers, and a failure says which: the fixture `seed` of conftest.py."""

from __future__ import annotations

from pathlib import Path

import pytest

CONFTEST = Path(__file__).with_name("conftest.py").read_text(encoding="utf-8")
DRAW = """
import random, numpy, pytest, torch

def draw():
    return random.random(), float(numpy.random.rand()), float(torch.rand(()))
"""


@pytest.fixture
def suite(pytester: pytest.Pytester) -> pytest.Pytester:
    """An empty suite with this repository's conftest.py."""
    pytester.makeconftest(CONFTEST)
    pytester.makeini("[pytest]\naddopts = -p no:cacheprovider\nmarkers = cuda\n")
    return pytester


def test_all_tests_start_from_the_same_numbers(suite: pytest.Pytester) -> None:
    suite.makepyfile(
        DRAW
        + """
seen = set()

@pytest.mark.parametrize("_", range(3))
def test_draw(_):
    seen.add(draw())
    assert len(seen) == 1
"""
    )
    suite.runpytest_inprocess().assert_outcomes(passed=3)


def test_another_seed_gives_other_numbers(suite: pytest.Pytester) -> None:
    suite.makepyfile(DRAW + "\ndef test_draw(seed): print('drawn', seed, *draw())")

    def drawn(*args: str) -> str:
        lines = suite.runpytest_inprocess("-s", *args).outlines
        return next(line for line in lines if "drawn" in line)

    assert drawn("--seed=7") == drawn("--seed=7")
    assert drawn("--seed=7") != drawn("--seed=8")
    assert drawn() == drawn()


def test_fixtures_of_wider_scope_are_seeded_and_do_not_shift_the_test(suite: pytest.Pytester) -> None:
    suite.makepyfile(
        DRAW
        + """
first = []

@pytest.fixture(scope="module")
def made_once():
    return draw()

def test_with_fixture(made_once):
    first.append(draw())
    assert made_once == first[0]

def test_after_fixture(made_once):
    assert draw() == first[0]
"""
    )
    suite.runpytest_inprocess("--seed=5").assert_outcomes(passed=2)  # not the seed that this test itself began with


def test_a_failure_names_its_seed(suite: pytest.Pytester) -> None:
    suite.makepyfile("def test_ok(): pass\ndef test_bad(): assert False")
    result = suite.runpytest_inprocess("--seed=11")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*- seed -*", "*--seed=11"])


def test_hypothesis_resets_torch_for_each_example_and_never_varies(suite: pytest.Pytester) -> None:
    suite.makepyfile(
        """
import torch
from hypothesis import given, settings, strategies as st

drawn, numbers = [], set()

@settings(max_examples=20)
@given(st.integers())
def test_examples(n):
    drawn.append(n)
    numbers.add(float(torch.rand(())))

def test_after():
    assert len(drawn) == 20 and len(numbers) == 1
    print("examples", drawn)
"""
    )

    def examples() -> str:
        result = suite.runpytest_inprocess("-s")
        result.assert_outcomes(passed=2)
        return next(line for line in result.outlines if "examples" in line)

    assert examples() == examples()

"""A skip fails the run unless the test is marked `cuda`: the rule of conftest.py, run on small suites of its own.

Every allowed case has a twin that must fail.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

CONFTEST = Path(__file__).with_name("conftest.py").read_text(encoding="utf-8")
RULE = "*Only single tests marked `cuda` may be skipped*"


@pytest.fixture
def suite(pytester: pytest.Pytester) -> pytest.Pytester:
    """An empty suite with this repository's conftest.py and markers."""
    pytester.makeconftest(CONFTEST)
    pytester.makeini("[pytest]\nmarkers = cuda\naddopts = --strict-markers -p no:cacheprovider -ra\n")
    return pytester


@pytest.fixture(params=[False, True], ids=["without_gpu", "with_gpu"])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether torch claims to see a CUDA device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a pretended device")
    return bool(request.param)


# -- allowed ----------------------------------------------------------------------------------------------------------


def test_a_suite_without_skips_passes(suite: pytest.Pytester) -> None:
    suite.makepyfile("def test_ok(): pass")
    result = suite.runpytest_inprocess()
    assert result.ret == pytest.ExitCode.OK
    result.assert_outcomes(passed=1)


EXPECTED_FAILURES = {
    "marker": "@pytest.mark.xfail(reason='later')\ndef test_a(): assert False",
    "not run": "@pytest.mark.xfail(run=False, reason='later')\ndef test_a(): assert False",
    "call": "def test_a(): pytest.xfail('later')",
}


@pytest.mark.parametrize("body", EXPECTED_FAILURES.values(), ids=EXPECTED_FAILURES)
def test_an_expected_failure_is_no_skip(suite: pytest.Pytester, body: str) -> None:
    suite.makepyfile("import pytest\n" + body)
    result = suite.runpytest_inprocess()
    assert result.ret == pytest.ExitCode.OK
    result.assert_outcomes(xfailed=1)


MARKED_CUDA = {
    "function": "@pytest.mark.cuda\ndef test_a(): pass",
    "class": "@pytest.mark.cuda\nclass TestA:\n    def test_a(self): pass",
    "module": "pytestmark = pytest.mark.cuda\ndef test_a(): pass",
    "parameter": "@pytest.mark.parametrize('x', [pytest.param(1, marks=pytest.mark.cuda)])\ndef test_a(x): pass",
}


@pytest.mark.parametrize("body", MARKED_CUDA.values(), ids=MARKED_CUDA)
def test_cuda_tests_run_on_a_gpu_and_are_skipped_elsewhere(suite: pytest.Pytester, gpu: bool, body: str) -> None:
    suite.makepyfile("import pytest\n" + body)
    result = suite.runpytest_inprocess()
    assert result.ret == pytest.ExitCode.OK
    if gpu:
        result.assert_outcomes(passed=1)
    else:
        result.assert_outcomes(skipped=1)
        result.stdout.fnmatch_lines("SKIPPED * needs a CUDA device: torch.cuda.is_available() is false")


def test_a_cuda_test_may_skip_for_want_of_a_second_gpu(suite: pytest.Pytester, gpu: bool) -> None:
    suite.makepyfile("import pytest\n@pytest.mark.cuda\ndef test_a(): pytest.skip('needs two')")
    result = suite.runpytest_inprocess()
    assert result.ret == pytest.ExitCode.OK
    result.assert_outcomes(skipped=1)


# -- forbidden --------------------------------------------------------------------------------------------------------

SINGLE_SKIPS = {
    "call": "def test_a(): pytest.skip('REASON')",
    "marker": "@pytest.mark.skip(reason='REASON')\ndef test_a(): pass",
    "condition": "@pytest.mark.skipif(True, reason='REASON')\ndef test_a(): pass",
    "class": "@pytest.mark.skip(reason='REASON')\nclass TestA:\n    def test_a(self): pass",
    "import": "def test_a(): pytest.importorskip('no_such_module', reason='REASON')",
    "fixture": "@pytest.fixture\ndef x(): pytest.skip('REASON')\ndef test_a(x): pass",
    "teardown": "@pytest.fixture\ndef x():\n    yield\n    pytest.skip('REASON')\ndef test_a(x): pass",
    "no parameters": "@pytest.mark.parametrize('REASON', [])\ndef test_a(REASON): pass",
    "subtest": "def test_a(subtests):\n    with subtests.test():\n        pytest.skip('REASON')",
    "unittest": (
        "import unittest\nclass TestA(unittest.TestCase):\n    def test_a(self): raise unittest.SkipTest('REASON')"
    ),
    "cuda in the name only": "def test_cuda(): pytest.skip('REASON')",
}


@pytest.mark.parametrize("body", SINGLE_SKIPS.values(), ids=SINGLE_SKIPS)
def test_a_skipped_test_fails_the_run(suite: pytest.Pytester, gpu: bool, body: str) -> None:
    suite.makepyfile("import pytest\n" + body + "\ndef test_ok(): pass")
    result = suite.runpytest_inprocess()
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert result.parseoutcomes().get("skipped", 0) == 0
    result.stdout.fnmatch_lines(["*::test_*REASON*", RULE])


MODULE_SKIPS = {
    "call": "pytest.skip('REASON', allow_module_level=True)",
    "import": "pytest.importorskip('no_such_module', reason='REASON')",
    "unittest": "import unittest\nraise unittest.SkipTest('REASON')",
    "marked cuda": "pytestmark = pytest.mark.cuda\npytest.skip('REASON', allow_module_level=True)",
}


@pytest.mark.parametrize("body", MODULE_SKIPS.values(), ids=MODULE_SKIPS)
def test_a_skipped_module_fails_the_run(suite: pytest.Pytester, gpu: bool, body: str) -> None:
    suite.makepyfile(test_gone="import pytest\n" + body, test_there="def test_ok(): pass")
    result = suite.runpytest_inprocess()
    assert result.ret not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
    result.stdout.fnmatch_lines(["test_gone.py: *REASON*", RULE])


def test_a_folder_named_cuda_is_no_marker(suite: pytest.Pytester) -> None:
    suite.mkdir("cuda").joinpath("test_a.py").write_text("import pytest\ndef test_a(): pytest.skip('REASON')")
    result = suite.runpytest_inprocess()
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(RULE)

"""Rules for every test: seeded random numbers, deterministic hypothesis, and no silent skips (tests/README.md)."""

from __future__ import annotations

import gc
import random
import signal
import sys
from collections.abc import Generator, Iterator
from typing import Any

import hypothesis
import pytest
import torch

DEFAULT_SEED = 20_260_101
SEED_KEY = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=DEFAULT_SEED, help="seed of random, numpy and torch before each test")


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background, and tests send it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.stash[SEED_KEY] = config.getoption("--seed")


def pytest_report_header(config: pytest.Config) -> str:
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    return f"torch {torch.__version__} ({cuda}), seed {config.stash[SEED_KEY]}"


# -- No silent skips --------------------------------------------------------------------------------------------------
#
# A check that nobody runs rots. So a skip is a failure, unless the test is marked `cuda`. The report itself is turned
# into a failure, which every consumer understands: exit code, closing line, JUnit file. An expected failure (xfail) is
# no skip: its report carries `wasxfail`.


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    no_device = pytest.mark.skip(reason="needs a CUDA device: torch.cuda.is_available() is false")
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(no_device)


# Outermost, so that it sees what the wrappers for xfail and unittest have made of the report.
@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and not item.get_closest_marker("cuda"):
        _fail_skipped(report)
    if report.failed:
        seed = item.config.stash[SEED_KEY]
        report.sections.append(("seed", f"random, numpy and torch were seeded with {seed}: --seed={seed}"))
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if report.skipped:  # a whole module: its tests, and so their markers, are unknown
        _fail_skipped(report)
    return report


def _fail_skipped(report: pytest.TestReport | pytest.CollectReport) -> None:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    report.outcome = "failed"
    report.longrepr = f"{report.nodeid}: {reason}\nOnly single tests marked `cuda` may be skipped (tests/README.md)."


# -- Random numbers ---------------------------------------------------------------------------------------------------


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)  # every device
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(seed % 2**32)


# For fixtures of wider scope, which are made before those of the test.
@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    _seed_everything(item.config.stash[SEED_KEY])


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """The seed that random, numpy and torch start from in this test, whatever ran before."""
    value = request.config.stash[SEED_KEY]
    _seed_everything(value)
    return value


class _TorchRandom:
    """Torch's generators in the form that hypothesis resets before each example."""

    def seed(self, *args: Any, **_: Any) -> None:
        torch.manual_seed(*args)

    def getstate(self, *_: Any, **__: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def setstate(self, *args: Any, **_: Any) -> None:
        torch.set_rng_state(*args)


_TORCH_RANDOM = _TorchRandom()  # hypothesis keeps a weak reference only
hypothesis.register_random(_TORCH_RANDOM)
hypothesis.settings.register_profile("deterministic", derandomize=True, deadline=None, print_blob=True)
hypothesis.settings.load_profile("deterministic")


# -- Governors --------------------------------------------------------------------------------------------------------


@pytest.fixture
def alone() -> Iterator[None]:
    """No governor of another test is alive: the policy for random state depends on how many there are.

    One intra-op thread: the tensors are tiny, and OpenMP threads that spin for a busy core cost 100 ms an operator.
    """
    from tolaria import living

    if living.governors():
        gc.collect()
    for left in living.governors():
        left.close()  # type: ignore[attr-defined]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

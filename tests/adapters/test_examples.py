"""The examples of the adapters: what each promises, it does. They run offline and on a CPU."""

from __future__ import annotations

import math
import runpy
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


@pytest.mark.filterwarnings("ignore:.*(LeafSpec|num_workers|isinstance).*")
def test_lightning_autoencoder() -> None:
    script = example("lightning_autoencoder")
    callback = script["TolariaCallback"]()
    assert math.isnan(script["train"]([]))
    assert script["train"]([callback]) < 0.08  # 0.0722 without the broken image
    assert callback.rollbacks == 4


def test_transformers_language_model() -> None:
    script = example("transformers_language_model")
    assert math.isnan(script["train"](guarded=False)[0])
    perplexity, callback = script["train"](guarded=True)
    assert perplexity == script["train"](guarded=False, fault=False)[0]  # to the last bit
    assert callback.rollbacks == 1


def test_accelerate_classifier() -> None:
    script = example("accelerate_classifier")
    assert script["train"](guarded=False)[0] < 0.2
    accuracy, rollbacks = script["train"](guarded=True)
    assert accuracy > 0.85
    assert rollbacks == 8

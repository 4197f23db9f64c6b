"""Three set-ups of `test_setups` in processes with other settings, which torch and CUDA read once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cuda

SETUPS = Path(__file__).with_name("test_setups.py")


# not torch's sanitizer: it knows no context-wide events, and reports what they order (docs/proof.md)
@pytest.mark.parametrize(
    "setting",
    [
        "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True",
        "PYTORCH_CUDA_ALLOC_CONF=backend:cudaMallocAsync",
        "PYTORCH_NO_CUDA_MEMORY_CACHING=1",
        "CUDA_LAUNCH_BLOCKING=1",
        "CUDA_DEVICE_MAX_CONNECTIONS=1",
    ],
)
def test_a_governed_run_is_the_plain_one(setting):
    name, value = setting.split("=")
    done = subprocess.run(
        [sys.executable, str(SETUPS)], env={**os.environ, name: value}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]

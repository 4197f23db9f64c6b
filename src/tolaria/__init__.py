"""tolaria: keeps a PyTorch training run alive.

The flow of one step, and the file of each stage:

    observe -> judge -> snapshot | rollback -> recover -> report        (governor.py joins them)

Public names are resolved on first use, so that `tolaria --help` answers without importing torch. Nothing
runs at import.

PYTEST_DONT_REWRITE: our fixtures make pytest want to rewrite this package, and warn where it was imported before.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tolaria.config import GovernorConfig, Recovery
    from tolaria.errors import (
        BudgetExceeded,
        CaptureInProgress,
        DeviceLost,
        InvalidConfig,
        NoSnapshot,
        PhaseError,
        QuiesceTimeout,
        RetryBudgetExceeded,
        RollbackDisturbed,
        RollbackFailed,
        SafetyError,
        SlotsBusy,
        SnapshotRejected,
        StaleGradients,
        StateMismatch,
        TolariaError,
        TolariaInternalError,
        UnsupportedState,
        UsageError,
    )
    from tolaria.governor import TolariaGovernor
    from tolaria.judge import (
        Detector,
        all_of,
        any_of,
        collapse,
        default_detector,
        gradient_explosion,
        loss_drift,
        loss_spike,
        non_finite,
        rl_collapse,
        sustained,
        update_ratio_jump,
    )
    from tolaria.records import Capabilities, Health, Incident, Statistics, StepResult, Verdict, VitalSigns
    from tolaria.report import RollbackReport, SnapshotInfo

_HOMES = {
    "config": ("GovernorConfig", "Recovery"),
    "errors": (
        "BudgetExceeded",
        "CaptureInProgress",
        "DeviceLost",
        "InvalidConfig",
        "NoSnapshot",
        "PhaseError",
        "QuiesceTimeout",
        "RetryBudgetExceeded",
        "RollbackDisturbed",
        "RollbackFailed",
        "SafetyError",
        "SlotsBusy",
        "SnapshotRejected",
        "StaleGradients",
        "StateMismatch",
        "TolariaError",
        "TolariaInternalError",
        "UnsupportedState",
        "UsageError",
    ),
    "governor": ("TolariaGovernor",),
    "judge": (
        "Detector",
        "all_of",
        "any_of",
        "collapse",
        "default_detector",
        "gradient_explosion",
        "loss_drift",
        "loss_spike",
        "non_finite",
        "rl_collapse",
        "sustained",
        "update_ratio_jump",
    ),
    "records": ("Capabilities", "Health", "Incident", "Statistics", "StepResult", "Verdict", "VitalSigns"),
    "report": ("RollbackReport", "SnapshotInfo"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__version__ = "0.1.0"
__all__ = [
    "BudgetExceeded",
    "Capabilities",
    "CaptureInProgress",
    "Detector",
    "DeviceLost",
    "GovernorConfig",
    "Health",
    "Incident",
    "InvalidConfig",
    "NoSnapshot",
    "PhaseError",
    "QuiesceTimeout",
    "Recovery",
    "RetryBudgetExceeded",
    "RollbackDisturbed",
    "RollbackFailed",
    "RollbackReport",
    "SafetyError",
    "SlotsBusy",
    "SnapshotInfo",
    "SnapshotRejected",
    "StaleGradients",
    "StateMismatch",
    "Statistics",
    "StepResult",
    "TolariaError",
    "TolariaGovernor",
    "TolariaInternalError",
    "UnsupportedState",
    "UsageError",
    "Verdict",
    "VitalSigns",
    "all_of",
    "any_of",
    "collapse",
    "default_detector",
    "gradient_explosion",
    "loss_drift",
    "loss_spike",
    "non_finite",
    "rl_collapse",
    "sustained",
    "update_ratio_jump",
]


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'tolaria' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tolaria.{home}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
